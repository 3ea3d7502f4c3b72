"""Batches: the same whatever the workers, in step with their labels, and with the foreground they promise."""

import dataclasses
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from batchgenerators.augmentations.utils import interpolate_img
from scipy.ndimage import gaussian_filter

from unicon_pipeline import augment
from unicon_pipeline.contract import CT_HU_RULE, PET_SUV_RULE
from unicon_pipeline.dataset import Labels
from unicon_pipeline.errors import DatasetError, UniconError
from unicon_pipeline.loader import PatchLoader, VolumeLoader, _read, cases_per_step
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.store import write_case

PATCH = (8, 20, 16)
CT_AIR = -2.0  # -1024 HU lies below the rule's first knot


def make_plan(patch=PATCH, spacing=(3.0, 2.0, 2.0), view="patch"):
    return DataPlan(
        task="Dataset001_Test",
        task_type="segmentation",
        modalities=("CT", "PET"),
        labels=Labels(names=("a", "b"), values=((1,), (2,)), regions=False, written=(1, 2), ignore=None),
        foundation="0" * 64,
        orientation="LPS",
        spacing_zyx_mm=spacing,
        view=view,
        patch_shape_zyx=patch,
        batch_size=2,
        intensity={"CT": CT_HU_RULE, "PET": PET_SUV_RULE},
        median_shape_zyx=(24, 40, 40),
        folds=(),
        memory_gb=2.0,
        estimated_memory_gb=1.0,
        estimated_minutes_to_train=1.0,
        estimated_seconds_per_case=1.0,
        decisions=(),
        fingerprint_sha256="0" * 64,
    )


def store(folder, case_id, labels, array=None, present=("CT", "PET")):
    """Writes a case whose channels are, unless given, 3 x the label value plus a little noise."""
    if array is None:
        noise = np.random.default_rng(len(case_id)).normal(scale=0.05, size=(2, *labels.shape))
        array = (3.0 * labels[None] + noise).astype(np.float32)
        for channel, name in enumerate(("CT", "PET")):
            array[channel] *= name in present
    foreground = {name: np.argwhere(labels == value)[:500].tolist() for name, value in (("a", 1), ("b", 2))}
    write_case(folder, case_id, array, labels, {"present": list(present), "foreground": foreground})


def blobs(shape, seed):
    """Label values 0, 1, 2 in large smooth shapes without any symmetry."""
    smooth = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3)
    return (smooth > np.quantile(smooth, 0.6)).astype(np.int16) + (smooth > np.quantile(smooth, 0.85))


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases with space")
    for number, (shape, present) in enumerate([((24, 40, 40), ("CT", "PET")), ((18, 44, 36), ("CT",))]):
        store(folder, f"case{number}", blobs(shape, number), present=present)
    store(folder, "case2", blobs((20, 36, 30), 2), present=("PET",))
    return folder


IDS = ("case0", "case1", "case2")


def take(loader, n):
    with loader:
        return [next(loader) for _ in range(n)]


def assert_same(batch, other):
    assert batch["case_ids"] == other["case_ids"]
    for name in ("data", "labels", "present"):
        assert torch.equal(batch[name], other[name])


def test_shapes_and_types(cases):
    (batch,) = take(PatchLoader(cases, IDS, make_plan(), batch_size=3, seed=0, workers=0), 1)
    assert batch["data"].shape == (3, 2, *PATCH) and batch["data"].dtype == torch.float32
    assert batch["labels"].shape == (3, 1, *PATCH) and batch["labels"].dtype == torch.int16
    assert batch["present"].shape == (3, 2) and batch["present"].dtype == torch.bool
    assert sorted(batch["case_ids"]) == list(IDS)


def test_batches_depend_on_seed_and_step_only(cases):
    settings = dict(cases_folder=cases, case_ids=IDS, plan=make_plan(), batch_size=2)
    np.random.seed(11)
    random.seed(11)
    numpy_next, python_next = np.random.random(), random.random()
    np.random.seed(11)
    random.seed(11)
    alone = take(PatchLoader(**settings, seed=5, workers=0), 8)
    assert (np.random.random(), random.random()) == (numpy_next, python_next), "the caller's generators were moved"
    for batch, other in zip(alone, take(PatchLoader(**settings, seed=5, workers=2), 8), strict=True):
        assert_same(batch, other)
    for batch, other in zip(alone[5:], take(PatchLoader(**settings, seed=5, workers=0, first_step=5), 3), strict=True):
        assert_same(batch, other)
    assert not torch.equal(alone[0]["data"], alone[1]["data"])
    assert not torch.equal(alone[0]["data"], take(PatchLoader(**settings, seed=6, workers=0), 1)[0]["data"])


def test_cases_are_used_equally_often_in_changing_order(cases):
    batches = take(PatchLoader(cases, IDS, make_plan(), batch_size=2, seed=0, workers=0, augment=False), 15)
    used = [case_id for batch in batches for case_id in batch["case_ids"]]
    assert set(Counter(used).values()) == {10}
    assert len({tuple(used[i : i + 3]) for i in range(0, 30, 3)}) > 2


def test_last_third_holds_foreground_of_every_class(tmp_path):
    labels = np.zeros((24, 60, 60), np.int16)
    labels[0, 0, 0] = 1  # single voxels: random patches hardly ever meet them
    labels[20, 40, 31] = 2
    store(tmp_path, "rare", labels)
    random_patches = foreground_of = forced = 0
    classes = Counter()
    for batch in take(PatchLoader(tmp_path, ("rare",), make_plan(), batch_size=3, seed=1, workers=0), 60):
        found = batch["labels"].flatten(1).amax(1) > 0
        random_patches += 2
        foreground_of += int(found[:2].sum())
        forced += int(found[2])
        classes[int(batch["labels"][2].max())] += 1
    # a shrunk or turned patch may step over a single voxel by nearest sampling, hence not all 60
    assert forced >= 50 and foreground_of < random_patches / 3
    assert classes[1] > 15 and classes[2] > 15
    for batch in take(PatchLoader(tmp_path, ("rare",), make_plan(), 2, seed=1, workers=0, augment=False), 30):
        assert batch["labels"][1].max() > 0
    never = PatchLoader(tmp_path, ("rare",), make_plan(), 1, 1, 0, augment=False, foreground_fraction=0)
    assert sum(int(batch["labels"].max() > 0) for batch in take(never, 30)) < 15


def test_a_case_without_foreground_gives_random_patches(tmp_path):
    store(tmp_path, "empty", np.zeros((20, 30, 30), np.int16))
    (batch,) = take(PatchLoader(tmp_path, ("empty",), make_plan(), 2, 0, 0), 1)
    assert batch["labels"].max() == 0


def test_outside_of_the_image_lies_air(tmp_path):
    labels = np.full((4, 10, 30), 2, np.int16)
    store(tmp_path, "small", labels, np.full((2, *labels.shape), 1.5, np.float32))
    for batch in take(PatchLoader(tmp_path, ("small",), make_plan(), 2, 0, 0, augment=False), 5):
        inside = torch.zeros(PATCH, dtype=torch.bool)
        inside[2:6, 5:15] = True
        for sample in range(2):
            assert torch.all(batch["labels"][sample, 0] == torch.where(inside, 2, 0))
            assert torch.all(batch["data"][sample, 0] == torch.where(inside, 1.5, CT_AIR))
            assert torch.all(batch["data"][sample, 1] == torch.where(inside, 1.5, 0.0))


@pytest.mark.parametrize("start", [(-3, 2, 1), (2, -1, 4), (5, 7, 6), (-2, -2, -2), (1, 1, 1)])
def test_a_box_over_any_border_is_numpys_padding(start):
    image = np.random.default_rng(0).normal(size=(2, 8, 9, 10)).astype(np.float32)
    padded = np.stack([np.pad(channel, 6, constant_values=value) for channel, value in zip(image, (-2.0, 0.0))])
    z, y, x = (slice(first + 6, first + 12) for first in start)
    np.testing.assert_array_equal(_read(image, np.array(start), np.array(start) + 6, [-2.0, 0.0]), padded[:, z, y, x])


def test_labels_stay_in_step_with_the_image(cases):
    """The image is 3 x the labels: thresholds must find the labels again after any spatial change."""
    agreements, turned = [], 0
    plain = take(PatchLoader(cases, ("case0",), make_plan(), 2, 3, 0, augment=False), 40)
    changed = take(PatchLoader(cases, ("case0",), make_plan(), 2, 3, 0, foreground_fraction=0), 40)
    for batch, before in zip(changed, plain, strict=True):
        turned += not torch.equal(batch["labels"], before["labels"])
        found = (batch["data"][:, 1:] > 1.5).short() + (batch["data"][:, 1:] > 4.5).short()
        agreements.append((found == batch["labels"]).float().mean().item())
    assert turned > 30
    assert np.mean(agreements) > 0.95 and min(agreements) > 0.8


def test_absent_channels_stay_exactly_zero(cases):
    seen = Counter()
    for batch in take(PatchLoader(cases, IDS, make_plan(), 3, 2, 0), 30):
        for sample, case_id in enumerate(batch["case_ids"]):
            expected = {"case0": [True, True], "case1": [True, False], "case2": [False, True]}[case_id]
            assert batch["present"][sample].tolist() == expected
            for channel, there in enumerate(expected):
                assert bool(batch["data"][sample, channel].any()) == there
        seen.update(batch["case_ids"])
    assert len(seen) == 3


def test_uptake_keeps_its_scale(cases):
    """An SUV may move by a tenth, not become another one; CT takes the full recipe."""
    image = np.stack([blobs((16, 32, 32), 4), blobs((16, 32, 32), 5)]).astype(np.float32)
    recipes = [augment.recipe_for(CT_HU_RULE), augment.recipe_for(PET_SUV_RULE)]
    moved = []
    for step in range(60):
        changed = image.copy()
        with augment.seeded_globals(np.random.SeedSequence(step)):
            augment.change_intensity(changed, recipes)
        moved.append([np.median(c[i == 1]) for c, i in zip(changed, image, strict=True)])
    deviation = np.abs(np.array(moved) - 1).max(axis=0)
    assert 0.02 < deviation[1] < 0.12 < deviation[0]


@pytest.mark.parametrize("shape", [(8, 20, 16), (4, 20, 16)], ids=["any axis", "flat"])
def test_spatial_change_is_rigid_in_millimetres(shape):
    """Against an independent interpolation at coordinates in mm, and: no shear, flat patches turn in plane."""
    spacing = np.array([3.0, 2.0, 1.0])
    values = np.random.default_rng(0).normal(size=(1, 30, 40, 40)).astype(np.float32)
    tested = 0
    for seed in range(40):
        change = augment.draw_spatial_change(np.random.default_rng(seed), shape, tuple(spacing), (0.7, 1.4))
        if change.matrix_zyx is None:
            continue
        tested += 1
        in_mm = spacing[:, None] * change.matrix_zyx / spacing
        gram = in_mm.T @ in_mm
        if shape[0] == 4:
            np.testing.assert_allclose([in_mm[0, 0], *in_mm[0, 1:], *in_mm[1:, 0]], [1, 0, 0, 0, 0], atol=1e-9)
            gram = gram[1:, 1:]
        assert 0.7**2 <= gram[0, 0] <= 1.4**2
        np.testing.assert_allclose(gram, gram[0, 0] * np.eye(len(gram)), atol=1e-9)
        centre = np.array([14.0, 20.5, 19.0])
        result = augment.resample(values, change, centre, shape, [-7.0])
        offsets = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in shape], indexing="ij"))
        coordinates = np.tensordot(change.matrix_zyx, offsets, axes=1) + centre[:, None, None, None]
        expected = interpolate_img(values[0], coordinates, order=1, mode="constant", cval=-7.0)
        np.testing.assert_allclose(result[0], expected, atol=1e-5)
        assert np.all(np.abs(coordinates - centre[:, None, None, None]).max((1, 2, 3)) <= change.reach(shape) + 1e-9)
    assert tested > 8


def test_turned_patches_read_all_they_need(tmp_path):
    """A constant image around every patch: no air may leak into a turned or enlarged one."""
    shape = (60, 90, 90)
    labels = np.zeros(shape, np.int16)
    labels[30, 45, 45] = 1
    store(tmp_path, "constant", labels, np.ones((2, *shape), np.float32))
    loader = PatchLoader(tmp_path, ("constant",), make_plan(), 1, 0, 0)
    turned = 0
    for step in range(40):
        generator = np.random.default_rng(step)
        image, others = loader._sample(loader._case("constant"), generator, 0)
        change = augment.draw_spatial_change(np.random.default_rng(step), PATCH, (3.0, 2.0, 2.0), (0.7, 1.4))
        turned += change.matrix_zyx is not None
        np.testing.assert_allclose(image, 1.0, atol=1e-6)
    assert turned > 8


def test_a_killed_worker_is_an_error_that_names_the_step(cases):
    loader = PatchLoader(cases, IDS, make_plan(), 2, 0, workers=1, first_step=40)
    with loader:
        next(loader)
        (child,) = multiprocessing.active_children()
        os.kill(child.pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(UniconError, match="Step 4[0-9]: a data loading process ended"):
            for _ in range(10):
                next(loader)
        assert time.monotonic() - started < 10
        assert loader.step > 40
        assert list(loader) == []
    assert not multiprocessing.active_children()


def test_errors_of_a_case_come_through_and_nothing_is_left_running(cases):
    with pytest.raises(DatasetError, match="case9"):
        take(PatchLoader(cases, ("case9",), make_plan(), 1, 0, workers=1), 1)
    loader = PatchLoader(cases, IDS, make_plan(), 2, 0, workers=1)
    next(loader)
    assert multiprocessing.active_children()
    loader.close()
    loader.close()
    assert not multiprocessing.active_children()
    with pytest.raises(StopIteration):
        next(loader)


def test_settings_that_cannot_work_are_refused(cases, tmp_path):
    plan = make_plan()
    with pytest.raises(DatasetError, match="No case"):
        PatchLoader(cases, (), plan, 2, 0, 0)
    with pytest.raises(UniconError, match="batch size"):
        PatchLoader(cases, IDS, plan, 0, 0, 0)
    with pytest.raises(DatasetError, match="2 channels, the plan has 1"):
        take(PatchLoader(cases, IDS, dataclasses.replace(plan, modalities=("CT",)), 1, 0, 0), 1)
    write_case(tmp_path, "bare", np.zeros((2, 9, 9, 9), np.float32), None, {"present": ["CT"], "foreground": {}})
    with pytest.raises(DatasetError, match="bare .*no labels"):
        take(PatchLoader(tmp_path, ("bare",), plan, 1, 0, 0), 1)
    with pytest.raises(DatasetError, match="targets for case1, case2"):
        VolumeLoader(cases, IDS, plan, 1, 0, 0, targets={"case0": np.zeros(1)})


def test_volumes_are_centred_and_carry_their_targets(cases):
    targets = {case_id: np.array([number, np.nan]) for number, case_id in enumerate(IDS)}
    plan = make_plan(patch=(24, 24, 48), view="volume")
    settings = dict(cases_folder=cases, case_ids=IDS, plan=plan, batch_size=3, seed=0, targets=targets)
    (batch,) = take(VolumeLoader(**settings, workers=0, augment=False), 1)
    assert batch["data"].shape == (3, 2, 24, 24, 48) and batch["targets"].dtype == torch.float32
    for sample, case_id in enumerate(batch["case_ids"]):
        assert batch["targets"][sample, 0] == IDS.index(case_id) and torch.isnan(batch["targets"][sample, 1])
    first = batch["data"][batch["case_ids"].index("case0"), 0]  # stored shape (24, 40, 40)
    assert torch.all(first[..., :4] == CT_AIR) and torch.all(first[..., 44:] == CT_AIR)
    expected = 3.0 * blobs((24, 40, 40), 0)[:, 8:32]
    assert np.abs(first[..., 4:44].numpy() - expected).max() < 0.5
    changed = take(VolumeLoader(**settings, workers=0), 4)
    for batch, other in zip(changed, take(VolumeLoader(**settings, workers=1), 4), strict=True):
        assert batch["case_ids"] == other["case_ids"] and torch.equal(batch["data"], other["data"])
    assert not torch.equal(changed[0]["data"], take(VolumeLoader(**settings, workers=0, augment=False), 1)[0]["data"])


def test_regions_move_with_their_image_and_rows_come_along(tmp_path):
    shape = (12, 20, 20)
    for number in range(3):
        mask = (blobs(shape, number) > 0).astype(np.uint8)
        image = np.repeat(6.0 * mask[None], 2, axis=0).astype(np.float32)
        write_case(tmp_path, f"case{number}", image, mask if number else None, {"present": ["CT"], "foreground": {}})
    plan = dataclasses.replace(make_plan((12, 24, 18), view="volume"), labels=None, region="Dataset002_Tumour")
    targets, rows = dict.fromkeys(IDS, 1.0), {case_id: np.array([n, np.nan]) for n, case_id in enumerate(IDS)}
    settings = dict(cases_folder=tmp_path, case_ids=IDS, plan=plan, batch_size=3, seed=0, targets=targets, tabular=rows)
    (plain,) = take(VolumeLoader(**settings, workers=0, augment=False), 1)
    assert plain["region"].shape == (3, 12, 24, 18) and plain["region"].dtype == torch.uint8
    assert plain["tabular"].dtype == torch.float32 and plain["targets"].shape == (3,)
    for sample, case_id in enumerate(plain["case_ids"]):
        assert plain["has_region"][sample] == (case_id != "case0") == bool(plain["region"][sample].any())
        assert plain["tabular"][sample, 0] == IDS.index(case_id) and plain["tabular"][sample, 1].isnan()
        if case_id != "case0":
            assert torch.equal(plain["region"][sample] == 1, plain["data"][sample, 0] > 3)
    shared = []
    for batch in take(VolumeLoader(**settings, workers=0), 20):
        seen, marked = batch["data"][:, 1] > 3, batch["region"] == 1  # PET is absent: only moved, not changed
        shared += [(seen & marked)[i].sum() / (seen | marked)[i].sum() for i in range(3) if batch["has_region"][i]]
    assert min(shared) > 0.9 and max(shared) == 1
    with pytest.raises(DatasetError, match="No figures for case1, case2"):
        VolumeLoader(**{**settings, "tabular": {"case0": rows["case0"]}}, workers=0)
    settings = {**settings, "plan": dataclasses.replace(plan, region=None), "tabular": None}
    assert set(take(VolumeLoader(**settings, workers=0), 1)[0]) == {"data", "targets", "present", "case_ids"}


@pytest.mark.parametrize("events, cases", [(3, 10), (5, 13), (7, 8), (1, 6)])
def test_strata_are_spread_so_that_no_stretch_lacks_an_event(events, cases):
    ids = tuple(f"case{n}" for n in range(cases))
    strata = {case_id: int(n < events) for n, case_id in enumerate(ids)}
    loader = VolumeLoader(".", ids, make_plan(), 1, 0, 0, targets=dict.fromkeys(ids, 0.0), strata=strata)
    drawn = [loader._case_id(number) for number in range(20 * cases)]
    stretch = cases_per_step(list(strata.values()), at_least=1)
    assert stretch <= -(-cases // min(events, cases - events))
    for start in range(len(drawn) - stretch):
        assert any(strata[case_id] for case_id in drawn[start : start + stretch])
    assert set(Counter(drawn).values()) == {20}
    assert (
        events == 1
        or len({tuple(c for c in drawn[n : n + cases] if strata[c]) for n in range(0, 9 * cases, cases)}) > 2
    )


def test_workers_need_no_torch():
    """A worker imports this module; torch would cost it seconds and hundreds of megabytes."""
    script = "import sys, unicon_pipeline.loader; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
