"""What is measured of one case: figures counted by hand, in any orientation, kept and used again while they hold."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from unicon_pipeline import measure
from unicon_pipeline.dataset import Case, Labels, read_case
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.geometry import Grid, Volume, orient, write_image, write_labels
from unicon_pipeline.histogram import percentiles
from unicon_pipeline.measure import kept_file, measure_case
from unicon_pipeline.records import sha256_file

LPS = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
GRID = Grid((24, 32, 28), (3.0, 1.0, 2.0), (0.0, 0.0, 0.0), LPS)
REGIONS = Labels(("whole", "node"), ((1, 2), (2,)), True, (1, 2), None)
TUMOUR = [60.0] * 8 + list(range(100, 164))
BOTH = ("CT", "PET")


def body() -> np.ndarray:
    """12 x 20 x 16 voxels of 40 HU in air, a bone of 700 HU in them."""
    ct = np.full(GRID.shape_zyx, -1000, np.int16)
    ct[6:18, 6:26, 6:22] = 40
    ct[17, 25, 21] = 700
    return ct


def label_map() -> np.ndarray:
    """A tumour of 4 x 4 x 4 voxels, a node of 2 x 2 x 2."""
    labels = np.zeros(GRID.shape_zyx, np.uint8)
    labels[8:12, 8:12, 8:12], labels[14:16, 20:22, 14:16] = 1, 2
    return labels


def shown() -> np.ndarray:
    """The body with tumour (100 to 163 HU) and node (60 HU)."""
    ct, labels = body(), label_map()
    ct[labels == 1], ct[labels == 2] = np.arange(100, 164), 60
    return ct


def write_case(folder, ct=None, labels=None, code="LPS", pet=True, grid=GRID) -> Case:
    ct, labels = shown() if ct is None else ct, label_map() if labels is None else labels
    images = {"CT": folder / "case_0000.nii.gz"}
    ct, labels = (orient(Volume(array, grid), code) for array in (ct, labels))
    write_image(images["CT"], ct.array_zyx, ct.grid)
    write_labels(folder / "case.nii.gz", labels.array_zyx, labels.grid)
    if pet:
        images["PET"] = folder / "case_0001.nii.gz"
        write_image(images["PET"], np.where(ct.array_zyx > -900, 2, 0), ct.grid)
    return Case("case", images, folder / "case.nii.gz", "case")


def equal(one, other) -> bool:
    def flat(measured):
        histograms = [(name, h.bins.tolist(), h.counts.tolist(), h.moments) for name, h in measured.histograms.items()]
        return measured.record, histograms, measured.thumbnail_zyx.tolist()

    return flat(one) == flat(other)


@pytest.mark.parametrize("code", ["LPS", "RAS", "SLP"])
def test_figures_do_not_depend_on_how_it_is_stored(tmp_path, code):
    case = write_case(tmp_path, code=code)
    measured = measure_case(case, BOTH, REGIONS, "LPS")
    record = measured.record
    assert (record.case_id, record.modalities, record.oddities) == ("case", BOTH, ())
    assert record.shape_zyx == (24, 32, 28)
    assert record.spacing_zyx_mm == (3.0, 1.0, 2.0)
    assert record.cropped_shape_zyx == (18, 26, 22)  # the body and three voxels on each side
    assert (record.label_voxels, record.labelled_voxels) == ({"whole": 64 + 8, "node": 8}, 72)
    assert record.label_ml == pytest.approx({"whole": 0.432, "node": 0.048})
    assert record.label_parts == {"whole": 2, "node": 1}
    assert record.images_sha256 == {name: sha256_file(path) for name, path in case.images.items()}
    assert record.labels_sha256 == sha256_file(case.labels)
    ct = measured.histograms["CT"]
    assert (ct.moments.n, ct.moments.total) == (72, sum(TUMOUR))
    assert percentiles(ct, (10, 50, 90)) == pytest.approx(np.percentile(TUMOUR, (10, 50, 90)))
    assert measured.histograms["PET"].counts.tolist() == [72]
    box = shown()[3:21, 3:29, 3:25]
    starts = [[0, 2, 4, 6, 9, 11, 13, 15], [0, 3, 6, 9, 13, 16, 19, 22], [0, 2, 5, 8, 11, 13, 16, 19]]
    means = [box[z:z2, y:y2, x:x2].mean() for (z, z2), (y, y2), (x, x2) in itertools.product(
        *(itertools.pairwise([*start, size]) for start, size in zip(starts, box.shape)))]  # fmt: skip
    np.testing.assert_allclose(measured.thumbnail_zyx.reshape(-1), means)


def test_as_stored(tmp_path):
    assert measure_case(write_case(tmp_path, code="SLP"), BOTH, REGIONS, None).record.shape_zyx == (32, 28, 24)


@pytest.mark.parametrize("labelled", [True, False])
def test_without_labels_the_whole_body_counts(tmp_path, labelled):
    case = write_case(tmp_path, body(), np.zeros(GRID.shape_zyx, np.uint8))
    measured = measure_case(case, BOTH, REGIONS if labelled else None, "LPS")
    assert measured.record.oddities == (("nothing is labelled",) if labelled else ())
    assert (measured.record.labels_sha256 is None) == (not labelled)
    assert measured.record.label_parts == ({"whole": 0, "node": 0} if labelled else {})
    assert {name: h.moments.n for name, h in measured.histograms.items()} == {"CT": 3840, "PET": 3840}
    assert measured.histograms["CT"].moments.total == 3839 * 40 + 700


def test_in_slabs_as_in_one_piece(tmp_path, monkeypatch):
    """Also of a PET, whose body is found by looking at neighbours."""
    rng = np.random.default_rng(0)
    pet = rng.gamma(1, 0.5, GRID.shape_zyx) * (body() > -900)
    write_image(tmp_path / "pet.nii.gz", pet, GRID)
    cases = [write_case(tmp_path), Case("pet", {"PET": tmp_path / "pet.nii.gz"}, None, "pet")]
    whole = [measure_case(case, BOTH, REGIONS, "LPS") for case in cases]
    monkeypatch.setattr(measure, "_SLAB_VOXELS", 2000)
    for case, expected in zip(cases, whole):
        found = measure_case(case, BOTH, REGIONS, "LPS")
        assert found.record == expected.record
        for name, histogram in found.histograms.items():
            assert np.array_equal(histogram.bins, expected.histograms[name].bins)
            assert np.array_equal(histogram.counts, expected.histograms[name].counts)
            assert histogram.moments.total == pytest.approx(expected.histograms[name].moments.total)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_pet_of_its_own_grid_counts_where_the_ct_says(tmp_path, labelled):
    """As if it were brought onto the CT's grid; where it shows nothing, the uptake is 0."""
    case = write_case(tmp_path, code="RAS")
    grid = Grid((9, 12, 10), (5.0, 2.6, 3.3), (9.0, 4.0, 11.0), LPS)
    pet = np.random.default_rng(0).uniform(1, 9, grid.shape_zyx)
    write_image(case.images["PET"], pet, grid)
    found = measure_case(case, BOTH, REGIONS if labelled else None, "LPS").histograms["PET"].moments
    mask = label_map() > 0 if labelled else shown() > -600
    expected = orient(read_case(case)["PET"], "LPS").array_zyx[mask]
    assert (found.n, found.low, found.high) == pytest.approx((mask.sum(), expected.min(), expected.max()), rel=1e-5)
    assert found.total == pytest.approx(expected.sum(dtype=float), rel=1e-5)
    assert (found.low == 0) == (not labelled)
    labels = np.zeros(GRID.shape_zyx, np.uint8)
    labels[6:8, 24:26, 6:8] = 1  # beyond the PET
    case = write_case(tmp_path, labels=labels, pet=False)
    case = dataclasses.replace(case, images=case.images | {"PET": tmp_path / "case_0001.nii.gz"})
    write_image(case.images["PET"], pet, dataclasses.replace(grid, origin_xyz_mm=(40.0, 4.0, 11.0)))
    found = measure_case(case, BOTH, REGIONS, "LPS").histograms["PET"].moments
    assert (found.n, found.low, found.high) == (8, 0.0, 0.0)


def test_another_patients_pet(tmp_path):
    case = write_case(tmp_path)
    write_image(case.images["PET"], shown() * 0.005 + 5, dataclasses.replace(GRID, origin_xyz_mm=(0.0, 0.0, 900.0)))
    with pytest.raises(DatasetError, match="case_0001.nii.gz shares no space with .*case_0000.nii.gz"):
        measure_case(case, BOTH, REGIONS, "LPS")


def test_touching_at_a_corner_is_one_part(tmp_path, monkeypatch):
    labels = np.zeros(GRID.shape_zyx, np.uint8)
    labels[8, 8, 8] = labels[9, 9, 9] = labels[11, 9, 9] = 1
    labels[12, 9, 9] = 2  # beside the last one: one part of the whole
    case = write_case(tmp_path, labels=labels)
    assert measure_case(case, BOTH, REGIONS, None).record.label_parts == {"whole": 2, "node": 1}
    for most, parts in ((21, {"whole": 2, "node": 1}), (20, {"whole": 2}), (19, {})):  # boxes of 5 x 2 x 2 and 1
        monkeypatch.setattr(measure, "_MOST_VOXELS_FOR_PARTS", most)
        assert measure_case(case, BOTH, REGIONS, None).record.label_parts == parts


def test_what_is_ignored_is_no_foreground(tmp_path):
    labels = label_map()
    labels[:, 30] = 3
    declared = Labels(("tumour", "node"), ((1,), (2,)), False, (1, 2), 3)
    measured = measure_case(write_case(tmp_path, labels=labels), BOTH, declared, "LPS")
    assert (measured.record.labelled_voxels, measured.histograms["CT"].moments.n) == (72, 72)
    assert measured.record.oddities == ()


def test_oddities(tmp_path):
    labels = np.zeros(GRID.shape_zyx, np.uint8)
    labels[0, 0, :5] = 1
    ct = body()
    ct[17, 25, 21] = 41
    grid = dataclasses.replace(GRID, spacing_zyx_mm=(3.0, 0.5, 2.0))
    case = write_case(tmp_path, ct, labels, pet=False, grid=grid)
    assert measure_case(case, BOTH, REGIONS, "LPS").record.oddities == (
        "no PET", "voxels 6.0 times longer than wide", "the highest value of the CT is 41: no bone, or not HU",
        "5 labelled voxels lie outside the body, where a prediction does not look",
    )  # fmt: skip
    thin = dataclasses.replace(GRID, shape_zyx=(5, 32, 28))
    write_image(tmp_path / "pet.nii.gz", np.full(thin.shape_zyx, 0.5) + np.eye(32, 28) * 0.9, thin)
    case = Case("pet", {"PET": tmp_path / "pet.nii.gz"}, None, "pet")
    assert measure_case(case, BOTH, None, "LPS").record.oddities == (
        "no CT", "only 5 voxels along an axis", "the highest value of the PET is 1.4: is it SUV?",
    )  # fmt: skip


def test_unusable_files_are_named(tmp_path):
    case = write_case(tmp_path)
    with pytest.raises(DatasetError, match=r"case\.nii\.gz holds the label values \[2\]"):
        measure_case(case, BOTH, Labels(("tumour",), ((1,),), False, (1,), None), "LPS")
    case.images["PET"].write_bytes(b"no image")
    with pytest.raises(DatasetError, match="case_0001"):
        measure_case(case, BOTH, REGIONS, "LPS")


class TestKept:
    @pytest.fixture
    def reads(self, monkeypatch):
        """Names of the cases whose images were read."""
        names, read = [], measure._read
        monkeypatch.setattr(measure, "_read", lambda case: names.append(case.case_id) or read(case))
        return names

    def test_it_is_used_again(self, tmp_path, reads):
        case, kept = write_case(tmp_path), tmp_path / "kept"
        first = measure_case(case, BOTH, REGIONS, "LPS", kept)
        written = kept_file(kept, "case").read_bytes()
        assert equal(first, measure_case(case, BOTH, REGIONS, "LPS", kept))
        assert (reads, [path.name for path in kept.iterdir()]) == (["case"], ["case.safetensors"])
        kept_file(kept, "case").unlink()
        measure_case(case, BOTH, REGIONS, "LPS", kept)
        assert kept_file(kept, "case").read_bytes() == written
        assert len(written) < 20_000

    @pytest.mark.parametrize(
        "change", ["image", "labels", "orientation", "meaning", "modalities", "image gone", "labels gone"]
    )
    def test_not_after_a_change(self, tmp_path, reads, change):
        case, kept = write_case(tmp_path), tmp_path / "kept"
        arguments = [BOTH, REGIONS, "LPS"]
        first = measure_case(case, *arguments, kept)
        if change == "image":
            write_image(case.images["PET"], np.where(body() > -900, 3, 0), GRID)
        elif change == "labels":
            write_labels(case.labels, label_map().clip(0, 1), GRID)
        elif change == "image gone":
            case = dataclasses.replace(case, images={"CT": case.images["CT"]})
        elif change == "labels gone":
            case = dataclasses.replace(case, labels=None)
        else:
            position = ("modalities", "meaning", "orientation").index(change)
            others = [("CT", "PET", "T1"), dataclasses.replace(REGIONS, values=((1,), (2,))), "RAS"]
            arguments[position] = others[position]
        second = measure_case(case, *arguments, kept)
        assert reads == ["case", "case"]
        assert not equal(first, second)
        assert equal(second, measure_case(case, *arguments))

    @pytest.mark.parametrize("damage", ["empty", "cut", "no JSON", "a field less", "another file"])
    def test_not_when_damaged(self, tmp_path, reads, damage):
        case, kept = write_case(tmp_path), tmp_path / "kept"
        first = measure_case(case, BOTH, REGIONS, "LPS", kept)
        path = kept_file(kept, "case")
        whole = path.read_bytes()
        damaged = {
            "empty": b"", "cut": whole[:-5], "no JSON": whole.replace(b'{\\"key', b'[\\"key'),
            "a field less": whole.replace(b"label_parts", b"label_pairs"), "another file": json.dumps({}).encode(),
        }[damage]  # fmt: skip
        assert damaged != whole
        path.write_bytes(damaged)
        assert equal(first, measure_case(case, BOTH, REGIONS, "LPS", kept))
        assert (reads, path.read_bytes()) == (["case", "case"], whole)
