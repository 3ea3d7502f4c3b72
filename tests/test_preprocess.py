"""Preprocessing: the way there and back, the whole-volume view, missing channels, and runs that go on."""

import dataclasses
import itertools

import numpy as np
import pytest

from unicon_pipeline import preprocess
from unicon_pipeline.budget import PRESETS
from unicon_pipeline.contract import CT_HU_RULE, PET_SUV_RULE, IntensityRule
from unicon_pipeline.dataset import Case, read_case, read_task
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.export import export_case
from unicon_pipeline.families.dna_encoders import new_residual_encoder_spec
from unicon_pipeline.geometry import Grid, Volume, grids_differ_mm, orient, write_image
from unicon_pipeline.input_shape import Overrides
from unicon_pipeline.intensity import body_box, normalise
from unicon_pipeline.label_spec import Labels
from unicon_pipeline.phantoms import make_phantom, write_phantom_task
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.prepare import prepare_case
from unicon_pipeline.preprocess import plan_and_preprocess
from unicon_pipeline.store import open_case, read_meta, stored_case_ids, write_case
from unicon_pipeline.workers import Workers

SMALL = {"shape_zyx": (20, 32, 32), "spacing_zyx_mm": (10.0, 9.0, 9.0)}
LABELS = Labels(("low", "high"), ((1,), (2,)), False, (1, 2), None)
CODES = ["LPS", "RAS", "SLP", "PIR"]


def plan(spacing, modalities=("CT", "PET"), view="patch", shape=(16, 16, 16), labels=LABELS, orientation="LPS"):
    rules = {"CT": CT_HU_RULE, "PET": PET_SUV_RULE, "T1": IntensityRule("zscore", "none")}
    return DataPlan(
        "Task", "segmentation", modalities, labels, "0" * 64, orientation, spacing, view, shape, 2,
        {name: rules[name] for name in modalities}, (16, 16, 16), (), 4.0, 1.0, 1.0, 1.0, (), "0" * 64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def case():
    """CT, PET on the CT's grid, and labels whose halves differ so that no flip goes unseen."""
    phantom = make_phantom(3, **SMALL)
    ct = phantom.ct
    pet = Volume(np.maximum(0, ct.array_zyx + 1000) / 400, ct.grid)
    # Oblique, and its axes 6 degrees off the patient's.
    cos, sin = np.cos(0.1), np.sin(0.1)
    grid = dataclasses.replace(ct.grid, direction=(cos, -sin, 0.0, sin, cos, 0.0, 0.0, 0.0, 1.0))
    body = ct.array_zyx > -300
    labels = np.where(np.arange(32) < 12, 1, 2) * body
    labels[:8] = 0
    return {"CT": Volume(ct.array_zyx, grid), "PET": Volume(pet.array_zyx, grid)}, Volume(labels.astype(np.int16), grid)


def stored_as(volumes, code):
    return {name: orient(volume, code) for name, volume in volumes.items()}


def one_hot(labels_zyx):
    return np.stack([labels_zyx == value for value in range(3)]).astype(np.float32) * 20 - 10


@pytest.mark.parametrize("code", CODES)
def test_labels_come_back_where_they_were(case, code):
    images, labels = case
    there = orient(labels, code)
    prepared = prepare_case(stored_as(images, code), plan(labels.grid.spacing_zyx_mm), there)
    back, probabilities = export_case(one_hot(prepared.labels_zyx), LABELS, prepared.geometry, True)
    assert np.array_equal(back.array_zyx, there.array_zyx)
    assert grids_differ_mm(back.grid, there.grid) < 1e-6
    assert list(probabilities) == ["background", "low", "high"]
    assert np.array_equal(probabilities["high"].array_zyx > 0.5, there.array_zyx == 2)


@pytest.mark.parametrize("code", CODES)
def test_the_network_sees_the_same_however_a_case_is_stored(case, code):
    images, labels = case
    spacing = (7.0, 11.0, 8.0)
    expected = prepare_case(images, plan(spacing), labels)
    found = prepare_case(stored_as(images, code), plan(spacing), orient(labels, code))
    assert np.array_equal(found.array_czyx, expected.array_czyx)
    assert np.array_equal(found.labels_zyx, expected.labels_zyx)
    assert found.geometry.oriented.shape_zyx == (20, 32, 32)


def test_other_spacings_come_back_nearly(case):
    images, labels = case
    prepared = prepare_case(images, plan((6.0, 6.0, 6.0)), labels)
    back, _ = export_case(one_hot(prepared.labels_zyx), LABELS, prepared.geometry, False)
    for value in (1, 2):
        there, found = labels.array_zyx == value, back.array_zyx == value
        assert 2 * (there & found).sum() / (there.sum() + found.sum()) > 0.95


def test_values_are_normalised_and_cropped_to_the_body(case):
    images, _ = case
    prepared = prepare_case(images, plan(images["CT"].grid.spacing_zyx_mm))
    box = body_box(images)
    assert prepared.labels_zyx is None
    assert np.array_equal(prepared.array_czyx[0], normalise(images["CT"].array_zyx[box], CT_HU_RULE))
    assert np.array_equal(prepared.array_czyx[1], normalise(images["PET"].array_zyx[box], PET_SUV_RULE))
    assert prepared.geometry.crop_start_zyx == tuple(side.start for side in box)
    assert prepared.geometry.resized_shape_zyx == prepared.array_czyx.shape[1:]
    assert prepared.array_czyx.dtype == np.float32


def test_the_crop_is_widened_to_hold_every_label(case):
    images, labels = case
    ct = images["CT"].array_zyx.copy()
    ct[:10] = -1000
    stray = labels.array_zyx.copy()
    stray[1, 2, 30] = 1
    images = {"CT": Volume(ct, labels.grid)}
    prepared = prepare_case(images, plan(labels.grid.spacing_zyx_mm, ("CT",)), Volume(stray, labels.grid))
    assert body_box(images)[0].start == 7
    assert prepared.geometry.crop_start_zyx[0] == 1
    assert np.bincount(prepared.labels_zyx.ravel()).tolist()[1:] == np.bincount(stray.ravel()).tolist()[1:]


@pytest.mark.parametrize("present", [("CT",), ("PET",), ("PET", "CT")])
def test_a_missing_channel_is_zero_and_known_to_be_missing(case, present):
    images, _ = case
    prepared = prepare_case({name: images[name] for name in present}, plan((9.0, 9.0, 9.0)))
    assert prepared.present == tuple(name for name in ("CT", "PET") if name in present)
    for channel, name in zip(prepared.array_czyx, ("CT", "PET")):
        assert channel.any() == (name in present)


def test_no_channel_of_the_plan(case):
    with pytest.raises(DatasetError, match="Task needs CT or PET; the case has T1"):
        prepare_case({"T1": case[0]["CT"]}, plan((9.0, 9.0, 9.0)))


def test_pet_on_its_own_grid_is_brought_onto_the_ct(tmp_path):
    """A hot spot at one place in the patient lands on the CT voxel of that place, in the network's input too."""
    grid = Grid((20, 24, 28), (4.0, 3.0, 3.0), (-40.0, -30.0, 10.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    other = Grid((24, 16, 16), (3.5, 6.0, 6.0), (-46.5, -37.0, 8.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    place = np.array([5.0, 6.0, 50.0])  # x, y, z in mm
    ct = np.full(grid.shape_zyx, 40.0, np.float32)
    ct[0, 0, 0] = -1000
    mm = np.moveaxis(np.indices(other.shape_zyx), 0, -1)[..., ::-1] * other.spacing_zyx_mm[::-1] + other.origin_xyz_mm
    pet = 8 * np.exp(-((mm - place) ** 2).sum(-1) / 2 / 8**2)
    write_image(tmp_path / "c_0000.nii.gz", ct, grid)
    write_image(tmp_path / "c_0001.nii.gz", pet.astype(np.float32), other)
    files = {"CT": tmp_path / "c_0000.nii.gz", "PET": tmp_path / "c_0001.nii.gz"}
    prepared = prepare_case(read_case(Case("c", files, None, "c")), plan(grid.spacing_zyx_mm))
    assert prepared.array_czyx.shape == (2, 20, 24, 28)
    weight = np.clip(prepared.array_czyx[1] - 1, 0, None)  # the top of the bell
    index = np.moveaxis(np.indices(weight.shape), 0, -1).reshape(-1, 3)
    centre = np.average(index, axis=0, weights=weight.ravel())
    expected = (place - grid.origin_xyz_mm) / grid.spacing_zyx_mm[::-1]
    assert centre[::-1] == pytest.approx(expected, abs=0.25)


class TestVolumeView:
    @pytest.mark.parametrize("shape", [(32, 48, 48), (8, 16, 8), (8, 48, 16), (17, 21, 33)])
    def test_padded_with_air_and_cut_about_the_centre(self, case, shape):
        images, _ = case
        spacing = images["CT"].grid.spacing_zyx_mm
        whole = prepare_case(images, plan(spacing)).array_czyx
        fixed = prepare_case(images, plan(spacing, view="volume", shape=shape, labels=None)).array_czyx
        assert fixed.shape == (2, *shape)
        expected = whole
        for axis, want in enumerate(shape, start=1):
            missing = want - expected.shape[axis]
            if missing < 0:
                expected = expected.take(range(-missing // 2, -missing // 2 + want), axis=axis)
            else:
                widths = [(0, 0)] * 4
                widths[axis] = (missing // 2, missing - missing // 2)
                expected = np.stack([np.pad(channel, widths[1:], constant_values=air)
                                     for channel, air in zip(expected, (-2.0, 0.0))])  # fmt: skip
        assert np.array_equal(fixed, expected)

    def test_a_missing_channel_is_zero_to_the_edge(self, case):
        images, _ = case
        view = plan((9.0, 9.0, 9.0), view="volume", shape=(48, 48, 48), labels=None)
        prepared = prepare_case({"PET": images["PET"]}, view)
        assert not prepared.array_czyx[0].any()
        assert prepared.array_czyx[1].any()


@pytest.fixture(scope="module")
def foundation():
    return new_residual_encoder_spec("Apache-2.0", {"made_by": "the tests"})


@pytest.fixture
def raw(tmp_path):
    return write_phantom_task(tmp_path / "raw" / "Task", "lesions", 3, 5, modalities=("CT", "PET"), **SMALL)


@pytest.fixture
def run(raw, tmp_path, foundation):
    def again(spacing=None, processes=1):
        return plan_and_preprocess(
            raw, tmp_path / "work", foundation, PRESETS["cpu"], overrides=Overrides(spacing), processes=processes
        )

    return again


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
            for path in sorted(folder.rglob("*")) if path.is_file()}  # fmt: skip


def changed(before, after):
    assert before.keys() == after.keys()
    return sorted({name.split("/")[1] for name in before if name.startswith("cases/") and before[name] != after[name]})


class TestRuns:
    def test_what_is_stored(self, run, raw, tmp_path):
        made, failed = run()
        cases = tmp_path / "work" / "preprocessed" / "Task" / "cases"
        assert not failed
        assert stored_case_ids(cases) == ("phantom_0001", "phantom_0002", "phantom_0003")
        task = read_task(raw)
        for case in task.cases:
            images = read_case(case)
            labels = preprocess.check_labels(case, images["CT"].grid, task.labels)
            expected, stored = prepare_case(images, made, labels), open_case(cases, case.case_id)
            assert np.array_equal(stored.array[:], expected.array_czyx)
            assert np.array_equal(stored.labels[:], expected.labels_zyx)
            assert stored.present == ("CT", "PET")
            voxels = np.array(stored.foreground["lesion"])
            assert 0 < len(voxels) <= 2000
            assert (stored.labels[:][tuple(voxels.T)] == 1).all()

    def test_a_second_run_changes_nothing_and_reads_no_image(self, run, tmp_path, monkeypatch):
        folder = tmp_path / "work" / "preprocessed" / "Task"
        first, _ = run()
        before = snapshot(folder)
        monkeypatch.setattr(preprocess, "read_in_units", None)
        monkeypatch.setattr(preprocess, "fingerprint_task", None)
        assert run() == (first, {})
        after = snapshot(folder)
        assert changed(before, after) == []
        assert {name: data for name, (_, data) in before.items()} == {name: data for name, (_, data) in after.items()}

    def test_a_damaged_file_and_a_changed_input_cost_their_cases_only(self, run, raw, tmp_path):
        folder = tmp_path / "work" / "preprocessed" / "Task"
        run()
        before = snapshot(folder)
        damaged = folder / "cases" / "phantom_0002" / "image.b2nd"
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 255
        damaged.write_bytes(bytes(data))
        run()
        after = snapshot(folder)
        assert changed(before, after) == ["phantom_0002"]
        assert after["cases/phantom_0002/image.b2nd"][1] == before["cases/phantom_0002/image.b2nd"][1]
        (folder / "cases" / "phantom_0003" / "meta.json").write_text("{")
        run()
        assert changed(after, snapshot(folder)) == ["phantom_0003"]
        after = snapshot(folder)
        other = make_phantom(77, **SMALL)
        write_image(raw / "imagesTr" / "phantom_0001_0001.nii.gz", other.pet.array_zyx, other.pet.grid)
        run()
        assert changed(after, snapshot(folder)) == ["phantom_0001"]

    def test_another_plan_makes_all_cases_anew(self, run, tmp_path):
        folder = tmp_path / "work" / "preprocessed" / "Task"
        run()
        before = snapshot(folder)
        run((12.0, 12.0, 12.0))
        assert changed(before, snapshot(folder)) == ["phantom_0001", "phantom_0002", "phantom_0003"]
        assert read_meta(folder / "cases", "phantom_0001")["geometry"]["original"]["spacing_zyx_mm"][0] == 10.0

    def test_a_case_that_is_gone_is_forgotten(self, run, raw, tmp_path):
        run()
        for path in itertools.chain(raw.glob("imagesTr/phantom_0001*"), raw.glob("labelsTr/phantom_0001*")):
            path.unlink()
        run()
        cases = tmp_path / "work" / "preprocessed" / "Task" / "cases"
        assert stored_case_ids(cases) == ("phantom_0002", "phantom_0003")

    def test_a_truncated_file_is_reported_and_the_others_finish(self, run, raw, tmp_path):
        path = raw / "imagesTr" / "phantom_0002_0001.nii.gz"
        whole = path.read_bytes()
        run()
        path.write_bytes(whole[: len(whole) // 2])
        made, failed = run()
        assert list(failed) == ["phantom_0002"]
        assert str(path) in failed["phantom_0002"]
        cases = tmp_path / "work" / "preprocessed" / "Task" / "cases"
        assert stored_case_ids(cases) == ("phantom_0001", "phantom_0003")  # no stale copy of the broken one
        assert "phantom_0002" not in {name for fold in made.folds for name in fold}
        path.write_bytes(whole)
        assert run()[1] == {}
        assert len(stored_case_ids(cases)) == 3

    def test_a_case_that_breaks_after_planning_leaves_no_stale_copy(self, run, raw, tmp_path):
        made, _ = run()
        cases = tmp_path / "work" / "preprocessed" / "Task" / "cases"
        (raw / "labelsTr" / "phantom_0001.nii.gz").write_bytes(b"no labels")
        assert list(preprocess.preprocess_task(read_task(raw), made, cases, Workers())) == ["phantom_0001"]
        assert stored_case_ids(cases) == ("phantom_0002", "phantom_0003")

    def test_an_interrupted_run_leaves_no_half_file_and_goes_on(self, run, tmp_path, monkeypatch):
        cases = tmp_path / "work" / "preprocessed" / "Task" / "cases"

        done = []

        def second_interrupted(folder, case_id, *rest):
            if done:
                (folder / case_id).mkdir()
                (folder / case_id / ".1.partial.labels.b2nd").write_bytes(b"half")  # as a killed process leaves it
                raise KeyboardInterrupt
            done.append(case_id)
            write_case(folder, case_id, *rest)

        monkeypatch.setattr(preprocess, "write_case", second_interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
        assert [path.name for path in cases.iterdir()] == done
        before = snapshot(cases.parent)
        monkeypatch.undo()
        assert run()[1] == {}
        after = snapshot(cases.parent)
        assert len(stored_case_ids(cases)) == 3
        first = [name for name in before if done[0] in name]
        assert first and all(before[name] == after[name] for name in first)

    def test_large_cases_get_fewer_processes(self, run, monkeypatch):
        asked = []

        def ask(megabytes_each):
            asked.append(megabytes_each)
            return 1

        monkeypatch.setattr(preprocess, "usable_processes", ask)
        run(processes=None)
        run((2.0, 2.0, 2.0), processes=None)
        assert asked[1] < asked[3] - 50  # the second spacing makes arrays a hundred times as large
        assert 300 < asked[1] < 310
