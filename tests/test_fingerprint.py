"""What is measured of a task: figures counted by hand, bad files set aside, the same with any number of processes."""

import json

import numpy as np
import pytest

from unicon_pipeline.dataset import read_task
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.fingerprint import (
    SAMPLES_PER_CASE,
    Fingerprint,
    _chosen_voxels,
    _statistics,
    fingerprint_case,
    fingerprint_task,
    is_current,
)
from unicon_pipeline.geometry import Grid, Volume, orient, write_image, write_labels
from unicon_pipeline.records import read_record, sha256_file, write_record
from unicon_pipeline.workers import Workers

LPS = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def write_case(folder, case_id, seed=0, code="LPS", pet=True, labelled=True):
    """A body of 12 x 20 x 16 voxels in air; tumour of 4 x 4 x 4 voxels at 100 to 163 HU, node of 2 x 2 x 2 at 60."""
    grid = Grid((24, 32, 28), (3.0, 1.0, 2.0), (0.0, 0.0, 0.0), LPS)
    ct = np.full(grid.shape_zyx, -1000, np.float32)
    ct[6:18, 6:26, 6:22] = 40 + seed
    labels = np.zeros(grid.shape_zyx, np.int16)
    if labelled:
        labels[8:12, 8:12, 8:12], labels[14:16, 20:22, 14:16] = 1, 2
        ct[labels == 1], ct[labels == 2] = np.arange(100, 164), 60
    (folder / "imagesTr").mkdir(parents=True, exist_ok=True)
    ct, labels = (orient(Volume(array, grid), code) for array in (ct, labels))
    write_image(folder / "imagesTr" / f"{case_id}_0000.nii.gz", ct.array_zyx, ct.grid)
    write_labels(folder / "labelsTr" / f"{case_id}.nii.gz", labels.array_zyx, labels.grid)
    if pet:
        write_image(folder / "imagesTr" / f"{case_id}_0001.nii.gz", np.where(ct.array_zyx > -900, 2, 0), ct.grid)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "Task"
    for number, code in enumerate(["LPS", "RAS", "SLP"]):
        write_case(folder, f"case{number}", number, code, pet=number != 1)
    description = {
        "channel_names": {"0": "ct", "1": "PET"}, "file_ending": ".nii.gz", "regions_class_order": [1, 2],
        "labels": {"background": 0, "whole": [1, 2], "node": 2},
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def test_figures_of_a_case(folder):
    task = read_task(folder)
    for case in task.cases:  # the same body, stored in three orientations
        record, values = fingerprint_case(case, task, "LPS")
        assert record.shape_zyx == (24, 32, 28)
        assert record.spacing_zyx_mm == (3.0, 1.0, 2.0)
        assert record.cropped_shape_zyx == (18, 26, 22)  # the body and three voxels on each side
        assert record.label_voxels == {"whole": 64 + 8, "node": 8}
        assert record.images_sha256 == {name: sha256_file(path) for name, path in case.images.items()}
        assert record.labels_sha256 == sha256_file(case.labels)
        assert sorted(values["CT"]) == [60] * 8 + list(range(100, 164))
        assert set(values) == set(case.images)
    assert fingerprint_case(task.cases[2], task, None)[0].shape_zyx == (32, 28, 24)  # stored as P, L, S


def test_statistics_are_those_of_labelled_voxels(folder):
    found = fingerprint_task(read_task(folder), "LPS", Workers()).intensity
    values = np.tile([60.0] * 8 + list(range(100, 164)), 3)
    ct = found["CT"]
    assert (ct.n, ct.min, ct.max, ct.median) == (216, 60, 163, np.median(values))
    assert (ct.mean, ct.std) == pytest.approx((values.mean(), values.std()))
    assert (ct.percentile_00_5, ct.percentile_99_5) == pytest.approx(np.percentile(values, (0.5, 99.5)))
    assert (found["PET"].n, found["PET"].mean) == (144, 2)


def test_without_labels_the_body_is_sampled(folder):
    write_case(folder, "case0", 0, labelled=False)
    task = read_task(folder)
    record, values = fingerprint_case(task.cases[0], task, "LPS")
    assert "nothing is labelled" in record.oddities
    assert len(values["CT"]) == 12 * 20 * 16
    assert set(values["CT"]) == {40}


def test_of_a_large_body_the_same_10000_voxels_are_drawn_each_time(folder):
    grid = Grid((30, 40, 40), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), LPS)
    image = np.random.default_rng(0).permutation(48_000).reshape(grid.shape_zyx).astype(np.float32) / 600
    image[0, :2] = -1000
    write_image(folder / "imagesTr" / "case1_0000.nii.gz", image, grid)
    write_labels(folder / "labelsTr" / "case1.nii.gz", np.zeros(grid.shape_zyx, np.int16), grid)
    task = read_task(folder)
    (_, first), (_, second) = (fingerprint_case(task.cases[1], task, "LPS") for _ in range(2))
    assert len(first["CT"]) == len(np.unique(first["CT"])) == 10_000
    assert np.array_equal(first["CT"], second["CT"])
    assert first["CT"].mean() == pytest.approx(40, abs=1)  # of 0 to 80 HU


def test_oddities(folder):
    labels = folder / "labelsTr" / "case1.nii.gz"
    grid = Grid((24, 32, 28), (3.0, 0.5, 2.0), (0.0, 0.0, 0.0), LPS)
    array = np.zeros(grid.shape_zyx, np.int16)
    array[0, 0, :5] = 1
    image = np.full(grid.shape_zyx, -1000, np.float32)
    image[6:18, 6:26, 6:22] = 40
    write_labels(labels, array, grid)
    write_image(folder / "imagesTr" / "case1_0000.nii.gz", image, grid)
    task = read_task(folder)
    oddities = fingerprint_case(task.cases[1], task, "LPS")[0].oddities
    assert oddities == ("no PET", "voxels 6.0 times longer than wide",
                        "5 labelled voxels lie outside the body, where a prediction does not look")  # fmt: skip
    assert fingerprint_case(task.cases[0], task, "LPS")[0].oddities == ()


def test_the_same_with_two_processes_and_on_a_second_run(folder, tmp_path):
    task = read_task(folder)
    with Workers(2) as workers:
        one, two = fingerprint_task(task, "LPS", Workers()), fingerprint_task(task, "LPS", workers)
    assert one == two
    write_record(tmp_path / "fingerprint.json", one)
    assert read_record(tmp_path / "fingerprint.json", Fingerprint) == one


def test_unusable_cases_are_named_and_the_others_kept(folder):
    truncated = folder / "imagesTr" / "case1_0000.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:200])
    with Workers(2) as workers:
        found = fingerprint_task(read_task(folder), "LPS", workers)
    assert [case.case_id for case in found.cases] == ["case0", "case2"]
    assert list(found.failed) == ["case1"]
    assert str(truncated) in found.failed["case1"]
    for path in (folder / "imagesTr").glob("*_0000*"):
        path.write_bytes(b"no image")
    with pytest.raises(DatasetError, match="(?s)no usable case among 3.*case0: .*case2: "):
        fingerprint_task(read_task(folder), "LPS", Workers())


def test_whether_it_is_current(folder):
    task = read_task(folder)
    found = fingerprint_task(task, "LPS", Workers())
    assert is_current(found, task, "LPS")
    assert not is_current(found, task, None)
    write_case(folder, "case3")
    assert not is_current(found, read_task(folder), "LPS")
    for path in folder.glob("*/case3*"):
        path.unlink()
    assert is_current(found, read_task(folder), "LPS")
    description = json.loads((folder / "dataset.json").read_text())
    description["labels"]["node"] = 1
    (folder / "dataset.json").write_text(json.dumps(description))
    assert not is_current(found, read_task(folder), "LPS")
    write_case(folder, "case0", seed=5)
    assert not is_current(found, task, "LPS")


def test_percentiles_are_those_of_numpy():
    found = _statistics(np.arange(100_000, dtype=np.float32))
    expected = np.percentile(np.arange(100_000), (0.5, 99.5))
    assert (found.percentile_00_5, found.percentile_99_5) == pytest.approx(expected)


@pytest.mark.parametrize("size", [30_000, 2_000_000])
def test_a_large_foreground_is_sampled_without_repetition(size):
    mask = np.arange(size) % 2 == 0
    chosen = _chosen_voxels(mask, np.random.default_rng(1))
    assert len(np.unique(chosen)) == len(chosen) == SAMPLES_PER_CASE
    assert mask[chosen].all()
    assert np.array_equal(chosen, _chosen_voxels(mask, np.random.default_rng(1)))
