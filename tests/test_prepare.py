"""One case to network input: the way there and back, the whole-volume view, missing channels, little memory."""

import dataclasses
import weakref

import numpy as np
import pytest

from unicon_pipeline import prepare
from unicon_pipeline.contract import CT_HU_RULE, PET_SUV_RULE, IntensityRule
from unicon_pipeline.dataset import Case, read_case
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.export import CaseExport
from unicon_pipeline.geometry import Grid, Volume, grids_differ_mm, orient, write_image
from unicon_pipeline.intensity import body_box, normalise
from unicon_pipeline.label_spec import Labels
from unicon_pipeline.phantoms import make_phantom
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.prepare import prepare_case

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
def phantom():
    """CT, PET on the CT's grid, and labels whose halves differ so that no flip goes unseen."""
    ct = make_phantom(3, **SMALL).ct
    pet = Volume(np.maximum(0, ct.array_zyx + 1000) / 400, ct.grid)
    # Oblique, and its axes 6 degrees off the patient's.
    cos, sin = np.cos(0.1), np.sin(0.1)
    grid = dataclasses.replace(ct.grid, direction=(cos, -sin, 0.0, sin, cos, 0.0, 0.0, 0.0, 1.0))
    body = ct.array_zyx > -300
    labels = np.where(np.arange(32) < 12, 1, 2) * body
    labels[:8] = 0
    return {"CT": Volume(ct.array_zyx, grid), "PET": Volume(pet.array_zyx, grid)}, Volume(labels.astype(np.int16), grid)


@pytest.fixture
def case(phantom):
    images, labels = phantom
    return dict(images), labels  # preparing empties the dict


def stored_as(volumes, code):
    return {name: orient(volume, code) for name, volume in volumes.items()}


def exported(prepared, folder=None):
    """Labels and probabilities on the image's grid, as if a network had found the prepared labels."""
    export = CaseExport(LABELS, prepared.geometry, probabilities_in=folder)
    maps = np.stack([prepared.labels_zyx == value for value in range(3)]).astype(np.float32) * 20 - 10
    export.add(maps, None, maps.shape[1])
    return export.result()


@pytest.mark.parametrize("code", CODES)
def test_labels_come_back_where_they_were(case, code, tmp_path):
    images, labels = case
    there = orient(labels, code)
    prepared = prepare_case(stored_as(images, code), plan(labels.grid.spacing_zyx_mm), there)
    back, probabilities = exported(prepared, tmp_path)
    assert np.array_equal(back.array_zyx, there.array_zyx)
    assert grids_differ_mm(back.grid, there.grid) < 1e-6
    assert list(probabilities) == ["background", "low", "high"]
    assert np.array_equal(probabilities["high"].array_zyx > 0.5, there.array_zyx == 2)


@pytest.mark.parametrize("code", CODES)
def test_the_network_sees_the_same_however_a_case_is_stored(case, code):
    images, labels = case
    spacing = (7.0, 11.0, 8.0)
    stored = stored_as(images, code)
    expected = prepare_case(images, plan(spacing), labels)
    found = prepare_case(stored, plan(spacing), orient(labels, code))
    assert np.array_equal(found.array_czyx, expected.array_czyx)
    assert np.array_equal(found.labels_zyx, expected.labels_zyx)
    assert found.geometry.oriented.shape_zyx == (20, 32, 32)


def test_other_spacings_come_back_nearly(case):
    images, labels = case
    prepared = prepare_case(images, plan((6.0, 6.0, 6.0)), labels)
    assert prepared.labels_zyx.dtype == labels.array_zyx.dtype
    back, _ = exported(prepared)
    for value in (1, 2):
        there, found = labels.array_zyx == value, back.array_zyx == value
        assert 2 * (there & found).sum() / (there.sum() + found.sum()) > 0.95


def test_values_are_normalised_and_cropped_to_the_body(case):
    images, _ = case
    prepared = prepare_case(dict(images), plan(images["CT"].grid.spacing_zyx_mm))
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
    prepared = prepare_case(dict(images), plan(labels.grid.spacing_zyx_mm, ("CT",)), Volume(stray, labels.grid))
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


def test_each_image_is_let_go_when_it_is_used_the_largest_first(case, monkeypatch):
    images, labels = case
    grid = labels.grid
    arrays = {"CT": images["CT"].array_zyx.astype(np.int16), "PET": images["PET"].array_zyx.astype(np.float32)}
    images = {name: Volume(array, grid) for name, array in arrays.items()}
    alive = {name: weakref.ref(array) for name, array in arrays.items()}
    images["T1"] = Volume(np.ones(grid.shape_zyx, np.float32), grid)
    arrays.clear()
    seen = []
    fill, labelled = prepare.resize_stream, prepare.resize_labels

    def note(work):
        def noted(*arguments):
            seen.append([name for name, array in alive.items() if array() is not None])
            return work(*arguments)

        return noted

    monkeypatch.setattr(prepare, "resize_stream", note(fill))
    monkeypatch.setattr(prepare, "resize_labels", note(labelled))
    prepare_case(images, plan((9.0, 9.0, 9.0)), labels)
    assert images == {}
    assert seen == [["CT", "PET"], ["CT"], []]


@pytest.mark.parametrize("spacing", [(10.0, 9.0, 9.0), (7.0, 8.0, 11.0)])
def test_small_integers_are_prepared_as_floats_are(case, spacing):
    images, labels = case
    ct = np.rint(images["CT"].array_zyx)
    as_floats = prepare_case({"CT": Volume(ct.astype(np.float32), labels.grid)}, plan(spacing), labels)
    small = Volume(labels.array_zyx.astype(np.uint8), labels.grid)
    as_integers = prepare_case({"CT": Volume(ct.astype(np.int16), labels.grid)}, plan(spacing), small)
    assert np.array_equal(as_integers.array_czyx, as_floats.array_czyx)
    assert np.array_equal(as_integers.labels_zyx, as_floats.labels_zyx)
    assert as_integers.labels_zyx.dtype == np.uint8


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
        whole = prepare_case(dict(images), plan(spacing)).array_czyx
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
