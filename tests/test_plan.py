"""The plan: nnU-Net's rules worked out by hand for a foundation with round figures."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from unicon_pipeline.budget import Machine
from unicon_pipeline.contract import CT_HU_RULE, FeatureLevel, FoundationSpec, InputContract
from unicon_pipeline.dataset import Case, Task
from unicon_pipeline.errors import PlanError
from unicon_pipeline.fingerprint import CaseFingerprint, ChannelStatistics, Fingerprint
from unicon_pipeline.input_shape import Overrides, _patch
from unicon_pipeline.label_spec import Labels
from unicon_pipeline.plan import DataPlan, contract_digest, format_plan, plan_task
from unicon_pipeline.records import read_record, write_record
from unicon_pipeline.tables import Table

LABELS = Labels(("tumour",), ((1,),), False, (1,), None)

# 70 maps at full resolution, twice with the decoder: 140 elements a voxel. nnU-Net's 560e6 elements in 8 GB are
# 4e6 voxels for each of two samples, so 500 000 voxels per GB.
VOXELS_PER_GB = 500_000
GPU = Machine(4.0, False, "test")


def spec(macs=1000.0, **contract):
    level = FeatureLevel((1, 1, 1), 32, 70)
    own = InputContract(("CT",), "LPS", None, None, (8, 8, 8), {"CT": CT_HU_RULE})
    own = dataclasses.replace(own, **contract)
    return FoundationSpec("net", {}, own, "pyramid", level, (level,), 320, macs, "Apache-2.0")


def data(shapes, spacings, task_type="segmentation", failed=None, events=None):
    """A task and its fingerprint, one case per shape and spacing (z y x, mm)."""
    names = [f"case{i:03d}" for i in range(len(shapes))]
    records = tuple(
        CaseFingerprint(name, ("CT",), shape, shape, spacing, {"tumour": 10}, (), {"CT": name}, None)
        for name, shape, spacing in zip(names, shapes, spacings)
    )
    statistics = ChannelStatistics(40.0, 10.0, -100.0, 200.0, -50.0, 41.0, 150.0, 1000)
    labels = LABELS if task_type == "segmentation" else None
    table = None if events is None else Table(tuple(names), {"event": tuple(events), "time_days": (5.0,) * len(names)})
    cases = tuple(Case(name, {"CT": Path(f"{name}.nii.gz")}, None, name) for name in names)
    task = Task("Task", Path("Task"), task_type, ("CT",), {}, labels, ".nii.gz", cases, (), table, None)
    return task, Fingerprint("Task", "LPS", records, {"CT": statistics}, failed or {}, ("CT",), labels)


def plan(shapes, spacings, *arguments, foundation=None, memory=4.0, on_cpu=False, **overrides):
    task, fingerprint = data(shapes, spacings, *arguments)
    return plan_task(task, fingerprint, foundation or spec(), Machine(memory, on_cpu, "test"), Overrides(**overrides))


def reason(found, name):
    (row,) = [decision for decision in found.decisions if decision.name == name]
    return row.reason


ISOTROPIC = [(100, 300, 300)] * 20, [(1.0, 1.0, 1.0)] * 20
REAL = [(60, 200, 200)] * 20, [(3.27, 0.98, 0.98)] * 20


class TestSpacing:
    def test_median(self):
        found = plan([(50, 90, 90)] * 3, [(2.0, 0.7, 0.8), (3.0, 0.9, 0.8), (2.5, 1.5, 0.8)])
        assert found.spacing_zyx_mm == (2.5, 0.9, 0.8)
        assert reason(found, "spacing z y x") == "median of 3 cases"

    def test_tenth_percentile_on_a_coarse_axis_with_few_voxels(self):
        z = [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0]  # the tenth percentile is 4.9
        found = plan([(12, 256, 256)] * 10, [(size, 1.5, 1.5) for size in z])
        assert found.spacing_zyx_mm == pytest.approx((4.9, 1.5, 1.5))
        assert "10th percentile on the coarse axis z" in reason(found, "spacing z y x")

    def test_never_finer_than_the_other_axes(self):
        found = plan([(12, 256, 256)] * 10, [(size, 1.5, 1.5) for size in [1.0] * 4 + [8.0] * 6])
        assert found.spacing_zyx_mm == (1.5, 1.5, 1.5)

    def test_a_coarse_axis_with_many_voxels_keeps_the_median(self):
        z = [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0]
        assert plan([(90, 256, 256)] * 10, [(size, 1.5, 1.5) for size in z]).spacing_zyx_mm == (8.5, 1.5, 1.5)

    def test_median_shape_at_that_spacing(self):
        found = plan([(10, 20, 30), (10, 20, 30), (40, 40, 40)], [(2.0, 2.0, 2.0), (2.0, 1.0, 2.0), (2.0, 2.0, 2.0)])
        assert found.spacing_zyx_mm == (2.0, 2.0, 2.0)
        assert found.median_shape_zyx == (10, 20, 30)  # of (10, 20, 30), (10, 10, 30), (40, 40, 40)


class TestPatch:
    def test_shrinks_the_relatively_largest_axis_until_it_fits(self):
        # 256^3 clipped to the median and rounded up is 104 x 256 x 256. z falls to 80, then all three together to
        # 64 x 192 x 192 (0.64 of each); z to 56 and y to 184 bring 2.06e6 voxels under 4 x 500 000.
        found = plan(*ISOTROPIC)
        assert found.patch_shape_zyx == (56, 184, 192)
        assert found.batch_size == 2
        assert found.estimated_memory_gb == pytest.approx(4 * 56 * 184 * 192 / (4 * VOXELS_PER_GB), rel=5e-3)

    def test_starts_with_256_cubed_in_the_proportions_of_a_voxel(self):
        # 256 x (8 x 1 x 1)^(1/3) = 512 mm a side: 64 x 512 x 512, then clipped to 500 and rounded up to 504.
        found = plan([(200, 500, 600)] * 3, [(8.0, 1.0, 1.0)] * 3, memory=80.0)
        assert found.patch_shape_zyx == (64, 504, 512)

    def test_small_cases_fit_whole_and_the_batch_grows_to_five_percent(self):
        assert plan([(32, 64, 64)] * 20, [(1.0, 1.0, 1.0)] * 20).batch_size == 2  # 5 % are one case
        found = plan([(32, 64, 64)] * 200, [(1.0, 1.0, 1.0)] * 200)
        assert (found.patch_shape_zyx, found.batch_size) == ((32, 64, 64), 10)
        # 0.5 GB: room for 500 000 voxels, 3 of 131 072.
        assert plan([(32, 64, 64)] * 200, [(1.0, 1.0, 1.0)] * 200, memory=0.5).batch_size == 3

    @pytest.mark.parametrize("divisors", [(8, 8, 8), (4, 16, 32), (16, 32, 32)])
    @pytest.mark.parametrize("shape", [(61, 203, 199), (7, 500, 33), (1, 1, 1)])
    @pytest.mark.parametrize("on_cpu", [False, True])
    def test_is_divisible(self, divisors, shape, on_cpu):
        foundation = spec(macs=5e4, divisible_by_zyx=divisors)
        for task_type in ("segmentation", "classification"):
            found = plan([shape] * 4, [(2.0, 1.0, 1.0)] * 4, task_type, foundation=foundation, on_cpu=on_cpu)
            assert all(size >= by and size % by == 0 for size, by in zip(found.patch_shape_zyx, divisors))
            assert found.view == ("patch" if task_type == "segmentation" else "volume")

    def test_a_further_modality_and_a_coarse_stem_cost_memory(self):
        task, fingerprint = data(*ISOTROPIC)
        more = dataclasses.replace(task, modalities=("CT", "PET"))
        (one, two) = (plan_task(t, fingerprint, spec(), GPU) for t in (task, more))
        assert math.prod(two.patch_shape_zyx) < 0.75 * math.prod(one.patch_shape_zyx)
        assert list(two.intensity) == ["CT", "PET"]


class TestCpu:
    FOUNDATION = spec(macs=5e4)  # 2 s at 180 GFLOP/s over 2 patches x 2 (decoder) x 2 x 3 passes: 300 000 voxels

    def test_coarser_in_steps_of_three_percent_until_a_patch_covers_a_quarter(self):
        found = plan(*REAL, foundation=self.FOUNDATION, memory=2.0, on_cpu=True)
        z, y, x = found.spacing_zyx_mm
        steps = math.log(y / 0.98) / math.log(1.03)
        assert (z, y) == (3.27, x)
        assert steps == pytest.approx(round(steps), abs=1e-6)
        assert steps > 3
        voxels, median = math.prod(found.patch_shape_zyx), math.prod(found.median_shape_zyx)
        assert voxels <= 300_000
        assert voxels >= 0.25 * median
        before = plan(*REAL, foundation=self.FOUNDATION, memory=2.0, on_cpu=True,
                      spacing_zyx_mm=(z, y / 1.03, x / 1.03))  # fmt: skip
        assert math.prod(before.patch_shape_zyx) < 0.25 * math.prod(before.median_shape_zyx)
        assert "3.27 x 0.98 x 0.98 mm" in reason(found, "spacing z y x")

    def test_a_gpu_keeps_the_detail(self):
        assert plan(*REAL, foundation=self.FOUNDATION, memory=2.0).spacing_zyx_mm == (3.27, 0.98, 0.98)

    def test_a_wish_for_the_spacing_is_kept(self):
        found = plan(*REAL, foundation=self.FOUNDATION, on_cpu=True, spacing_zyx_mm=(3.27, 0.98, 0.98))
        assert found.spacing_zyx_mm == (3.27, 0.98, 0.98)

    def test_a_whole_volume_gets_as_coarse_as_it_must(self):
        # Without a decoder half the work: 600 000 voxels. The field of view is 196 mm cubed.
        found = plan(*REAL, "classification", foundation=self.FOUNDATION, memory=2.0, on_cpu=True)
        assert math.prod(found.patch_shape_zyx) <= 600_000
        assert all(n * s >= 196 - 1e-6 for n, s in zip(found.patch_shape_zyx, found.spacing_zyx_mm))
        finer = [196 / (s / 1.03) for s in found.spacing_zyx_mm]
        assert math.prod(math.ceil(n / 8 - 1e-9) * 8 for n in finer) > 600_000


class TestContractAndWishes:
    def test_the_foundations_spacing_and_shape_win(self):
        fixed = spec(spacing_zyx_mm=(1.5, 0.75, 0.75), fixed_shape_zyx=(80, 96, 96))
        for task_type in ("segmentation", "classification"):
            found = plan(*ISOTROPIC, task_type, foundation=fixed, on_cpu=True)
            assert (found.spacing_zyx_mm, found.patch_shape_zyx) == ((1.5, 0.75, 0.75), (80, 96, 96))
            assert reason(found, "spacing z y x") == "the foundation's own"
        for wish in ({"spacing_zyx_mm": (1.0, 1.0, 1.0)}, {"patch_shape_zyx": (64, 64, 64)}):
            with pytest.raises(PlanError, match="Leave the"):
                plan(*ISOTROPIC, foundation=fixed, **wish)

    def test_a_fixed_shape_alone_takes_the_field_of_view(self):
        found = plan(*ISOTROPIC, "classification", foundation=spec(fixed_shape_zyx=(40, 96, 96)))
        assert found.spacing_zyx_mm == pytest.approx((2.5, 3.125, 3.125))

    def test_wishes_are_recorded(self):
        found = plan(*ISOTROPIC, spacing_zyx_mm=(2, 2, 2), patch_shape_zyx=(32, 64, 64), batch_size=3)
        assert (found.spacing_zyx_mm, found.patch_shape_zyx, found.batch_size) == ((2.0, 2.0, 2.0), (32, 64, 64), 3)
        for name in ("spacing z y x", "patch", "batch"):
            assert reason(found, name) == "set by the user"

    @pytest.mark.parametrize(
        ("wish", "says"),
        [
            ({"patch_shape_zyx": (30, 64, 64)}, "multiples of"),
            ({"patch_shape_zyx": (0, 64, 64)}, "multiples of"),
            ({"spacing_zyx_mm": (1.0, 0.0, 1.0)}, "three positive numbers"),
            ({"spacing_zyx_mm": (1.0, 1.0)}, "three positive numbers"),
            ({"batch_size": 0}, "at least 1"),
            ({"memory": 0.0}, "positive number of GB"),
            ({"memory": math.nan}, "positive number of GB"),
        ],
    )
    def test_impossible_wishes(self, wish, says):
        with pytest.raises(PlanError, match=says):
            plan(*ISOTROPIC, **wish)

    def test_too_little_memory_says_how_much_is_needed_and_what_to_do(self):
        # The smallest patch is 32 x 64 x 64 (two positions of the coarsest map): 131 072 of 500 000 voxels a GB.
        foundation = spec(divisible_by_zyx=(32, 64, 32))
        assert plan(*ISOTROPIC, foundation=foundation, memory=0.27).patch_shape_zyx == (32, 64, 64)
        with pytest.raises(PlanError, match=r"needs about 0\.262 GB, and 0\.2 GB were allowed. Allow more memory"):
            plan(*ISOTROPIC, foundation=foundation, memory=0.2)
        with pytest.raises(PlanError, match="smaller patch, batch"):
            plan(*ISOTROPIC, batch_size=50)


class TestWhatElseStopsAPlan:
    def test_no_event(self):
        task, fingerprint = data(*ISOTROPIC, "prognosis", events=[0.0] * 20)
        with pytest.raises(PlanError, match="no usable case has an event"):
            plan_task(task, fingerprint, spec(), GPU)
        task, fingerprint = data(*ISOTROPIC, "prognosis", events=[0.0] * 19 + [1.0])
        assert plan_task(task, fingerprint, spec(), GPU).view == "volume"

    def test_a_fingerprint_of_something_else(self):
        task, fingerprint = data(*ISOTROPIC)
        for wrong in ({"task": "Other"}, {"orientation": "RAS"}):
            with pytest.raises(PlanError, match="Make the fingerprint again"):
                plan_task(task, dataclasses.replace(fingerprint, **wrong), spec(), GPU)
        with pytest.raises(PlanError, match="no usable case"):
            plan_task(task, dataclasses.replace(fingerprint, cases=()), spec(), GPU)


class TestRecord:
    def test_round_trip_is_exact_and_two_runs_are_the_same_bytes(self, tmp_path):
        rng = np.random.default_rng(0)
        spacings = [tuple(rng.uniform(0.5, 3, 3).tolist()) for _ in range(7)]
        shapes = [tuple(rng.integers(30, 90, 3).tolist()) for _ in range(7)]
        found = plan(shapes, spacings)
        write_record(tmp_path / "a.json", found)
        assert read_record(tmp_path / "a.json", DataPlan) == found
        write_record(tmp_path / "b.json", plan(shapes, spacings))
        assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
        write_record(tmp_path / "b.json", read_record(tmp_path / "a.json", DataPlan))
        assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()

    def test_where_a_foundation_came_from_does_not_matter(self):
        there = dataclasses.replace(spec(), provenance={"from": "elsewhere"}, licence="other")
        assert contract_digest(there) == contract_digest(spec())
        assert contract_digest(spec(orientation="RAS")) != contract_digest(spec())

    def test_failed_cases_are_in_no_fold_and_are_shown(self):
        task, fingerprint = data(*ISOTROPIC, "segmentation")
        kept = dataclasses.replace(fingerprint, cases=fingerprint.cases[:-1], failed={"case019": "truncated"})
        found = plan_task(task, kept, spec(), GPU)
        assert sorted(name for fold in found.folds for name in fold) == [f"case{i:03d}" for i in range(19)]
        table = format_plan(found)
        assert "19 of 20" in table
        assert "left out: case019" in table
        assert all(len(line) <= 120 for line in table.splitlines())
        assert all(decision.reason for decision in found.decisions)


def test_a_tiny_image_still_leaves_two_positions_for_the_coarsest_norm():
    assert _patch((1.0, 1.0, 1.0), (12, 14, 10), 1e9, (16, 16, 16)) == (16, 16, 32)
    assert _patch((1.0, 1.0, 1.0), (12, 14, 40), 1.0, (16, 16, 16)) == (16, 16, 32)
