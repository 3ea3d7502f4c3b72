"""The volume view around a region: how large it is planned, where it lies, what is stored of it."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from unicon_pipeline.budget import PRESETS, Machine
from unicon_pipeline.contract import CT_HU_RULE, PET_SUV_RULE, FeatureLevel, FoundationSpec, InputContract
from unicon_pipeline.dataset import Case, Task, read_task
from unicon_pipeline.descriptors import DESCRIPTORS, describe_region
from unicon_pipeline.errors import DatasetError, PlanError
from unicon_pipeline.fingerprint import Fingerprint
from unicon_pipeline.geometry import Grid, Volume, orient, read_image, read_labels, write_labels
from unicon_pipeline.input_shape import REGION_MARGIN_MM, Overrides
from unicon_pipeline.label_spec import Labels
from unicon_pipeline.measure import CaseFingerprint, measure_case
from unicon_pipeline.phantoms import write_phantom_task
from unicon_pipeline.plan import DataPlan, format_plan, plan_task
from unicon_pipeline.prepare import prepare_case
from unicon_pipeline.preprocess import plan_and_preprocess
from unicon_pipeline.records import read_record, write_record
from unicon_pipeline.region import as_region, bulk_box, region_mask
from unicon_pipeline.store import open_case, read_meta

UPRIGHT = (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)
GPU = Machine(4.0, False, "test")
CODES = ["LPS", "RAS", "SLP", "PIR"]


def ball(grid, centre_xyz_mm, radius_mm):
    mm = np.moveaxis(np.indices(grid.shape_zyx), 0, -1)[..., ::-1] * grid.spacing_zyx_mm[::-1] + grid.origin_xyz_mm
    return (((mm - centre_xyz_mm) ** 2).sum(-1) <= radius_mm**2).astype(np.uint8)


class TestBulkBox:
    def test_of_a_compact_region_it_is_the_box(self):
        mask = np.zeros((20, 30, 40), bool)
        mask[3:9, 10:11, 22:40] = True
        assert bulk_box([mask[:5], mask[5:]]) == ndimage.find_objects(mask.astype(int))[0]
        assert bulk_box([mask[::-1, ::-1, ::-1]]) == (slice(11, 17), slice(19, 20), slice(0, 18))

    def test_stray_voxels_do_not_count_and_one_voxel_is_a_region(self):
        mask = np.zeros((40, 40, 40), np.uint8)
        mask[5:15, 5:15, 5:15] = 1
        mask[39, 39, 39] = mask[0, 38, 20] = 1
        assert bulk_box([mask]) == (slice(5, 15),) * 3
        mask[:] = 0
        mask[7, 0, 39] = 1
        assert bulk_box([mask]) == (slice(7, 8), slice(0, 1), slice(39, 40))

    def test_nothing(self):
        assert bulk_box([np.zeros((4, 5, 6), bool)]) is None


class TestMask:
    FINE = Grid((40, 48, 48), (3.0, 2.0, 2.0), (-50.0, -40.0, 7.0), UPRIGHT)
    COARSE = Grid((30, 30, 24), (4.0, 5.0, 5.0), (-60.0, -50.0, 5.0), UPRIGHT)

    def test_from_another_grid(self):
        """The voxels whose centre lies in a voxel of the region: half a coarse voxel at most from the ball."""
        found = Volume(3 * ball(self.COARSE, (0.0, 5.0, 65.0), 22), self.COARSE)
        mask = as_region(found, self.FINE)
        assert mask.grid == self.FINE and mask.array_zyx.dtype == np.uint8 and mask.array_zyx.max() == 1
        assert mask.array_zyx.sum() * 12 == pytest.approx(found.array_zyx.astype(bool).sum() * 100, rel=0.05)
        centre = ndimage.center_of_mass(mask.array_zyx)[::-1] * np.array([2.0, 2.0, 3.0]) + self.FINE.origin_xyz_mm
        assert centre == pytest.approx((0.0, 5.0, 65.0), abs=1.0)

    def test_of_another_place(self):
        far = dataclasses.replace(self.COARSE, origin_xyz_mm=(5000.0, 0.0, 0.0))
        with pytest.raises(DatasetError, match="do not overlap"):
            as_region(Volume(np.ones(far.shape_zyx, np.uint8), far), self.FINE)

    def test_labels_come_first_and_what_is_ignored_is_no_region(self, tmp_path):
        labels = np.zeros(self.FINE.shape_zyx, np.uint8)
        labels[3], labels[4], labels[5] = 1, 2, 9
        write_labels(tmp_path / "labels.nii.gz", labels, self.FINE)
        write_labels(tmp_path / "found.nii.gz", np.full(self.FINE.shape_zyx, 7, np.uint8), self.FINE)
        case = Case("c", {"CT": Path("c_0000.nii.gz")}, tmp_path / "labels.nii.gz", "c")
        declared = Labels(("tumour", "node"), ((1,), (2,)), False, (1, 2), 9)
        mask = region_mask(case, self.FINE, declared, tmp_path / "found.nii.gz").array_zyx
        assert [int(mask[z].all()) for z in (2, 3, 4, 5)] == [0, 1, 1, 0] and mask.dtype == np.uint8
        bare = dataclasses.replace(case, labels=None)
        assert region_mask(bare, self.FINE, declared, tmp_path / "found.nii.gz").array_zyx.all()
        assert region_mask(bare, self.FINE, declared) is None


def planned(boxes, spacing=(3.0, 1.0, 1.0), region="Lesions", machine=GPU, wishes=None, **contract):
    """The plan of cases with these regions' boxes (voxels; None: no region) in bodies of 100 x 300 x 300 voxels."""
    names = [f"case{number:03d}" for number in range(len(boxes))]
    records = tuple(
        CaseFingerprint(name, ("CT",), (110, 400, 400), (100, 300, 300), spacing, {}, (), {"CT": name}, None,
                        bulk_shape_zyx=box)
        for name, box in zip(names, boxes)
    )  # fmt: skip
    cases = tuple(Case(name, {"CT": Path(f"{name}.nii.gz")}, None, name) for name in names)
    labels = Labels(("tumour",), ((1,),), False, (1,), None)
    task = Task("Task", Path("Task"), "prognosis", ("CT",), {}, labels, ".nii.gz", cases, (), None, None, region)
    own = InputContract(("CT",), "LPS", None, None, (8, 8, 8), {"CT": CT_HU_RULE})
    level = FeatureLevel((1, 1, 1), 32, 70)  # without a decoder 1e6 voxels a GB at a batch of two
    spec = FoundationSpec(
        "net", {}, dataclasses.replace(own, **contract), "pyramid", level, (level,), 320, 1000.0, "Apache-2.0"
    )
    return plan_task(
        task, Fingerprint("Task", "LPS", records, {}, {}, ("CT",), labels), spec, machine, Overrides(**(wishes or {}))
    )


def told(plan, name):
    (row,) = [decision for decision in plan.decisions if decision.name == name]
    return row


class TestPlan:
    # 5 % of the boxes may be larger: of twenty, none but the largest.
    BOXES = [(20 + number, 60, 40) for number in range(19)] + [(90, 250, 250)]

    def test_a_crop_around_the_regions_with_a_margin_at_the_cases_own_spacing(self):
        found = planned(self.BOXES)
        assert (found.view, found.region, found.labels) == ("volume", "Lesions", None)
        assert found.spacing_zyx_mm == (3.0, 1.0, 1.0)
        # (38 x 3 + 20) / 3 = 44.7, 60 + 20, 40 + 20, in multiples of 8
        assert found.patch_shape_zyx == found.median_shape_zyx == (48, 80, 64)
        assert REGION_MARGIN_MM == 10
        assert "144 x 80 x 64 mm around the region, holding 19 of 20 whole" in told(found, "input").reason
        assert told(found, "region").value == "20 of 20 cases"
        assert "what Lesions marks" in told(found, "view").reason
        assert "what Lesions takes" in told(found, "time per case").reason
        assert not [row for row in found.decisions if row.name == "median shape"]
        assert all(len(line) <= 120 for line in format_plan(found).splitlines())

    def test_costs_are_those_of_the_crop(self):
        found = planned(self.BOXES)
        assert found.estimated_memory_gb == pytest.approx(2 * 48 * 80 * 64 / 2 / 1e6, rel=5e-3)
        assert found.batch_size == 2  # 5 % of twenty crops are one, though their bodies have far more voxels
        assert planned(self.BOXES * 5).batch_size == 5
        whole = planned(self.BOXES, region=None)
        assert whole.estimated_minutes_to_train > 10 * found.estimated_minutes_to_train

    def test_coarser_until_it_fits_and_no_coarser(self):
        found = planned(self.BOXES, machine=Machine(0.1, False, "test"))
        assert math.prod(found.patch_shape_zyx) <= 1e5 < 48 * 80 * 64
        sides = np.multiply(found.patch_shape_zyx, found.spacing_zyx_mm)
        assert (sides >= np.array([134, 80, 60]) - 1e-6).all()
        finer = np.ceil(np.array([134, 80, 60]) / np.divide(found.spacing_zyx_mm, 1.03) / 8) * 8
        assert finer.prod() > 1e5
        assert "the crop fits the memory" in told(found, "spacing z y x").reason

    def test_a_fixed_shape_is_never_finer_than_the_cases(self):
        found = planned(self.BOXES, fixed_shape_zyx=(64, 64, 64))
        assert found.patch_shape_zyx == (64, 64, 64)
        assert found.spacing_zyx_mm == (3.0, 80 / 64, 1.0)
        assert "holding 19 of 20 whole; the only shape" in told(found, "input").reason

    def test_a_contract_that_fixes_all(self):
        found = planned(self.BOXES, fixed_shape_zyx=(32, 32, 32), spacing_zyx_mm=(2.0, 2.0, 2.0))
        assert (found.patch_shape_zyx, found.spacing_zyx_mm) == ((32, 32, 32), (2.0, 2.0, 2.0))
        assert "64 x 64 x 64 mm around the region, holding 2 of 20 whole" in told(found, "input").reason

    def test_a_fixed_spacing_cuts_the_crop_that_does_not_fit(self):
        found = planned(self.BOXES, spacing_zyx_mm=(1.0, 1.0, 1.0), machine=Machine(0.1, False, "test"))
        assert np.less_equal(found.patch_shape_zyx, (136, 80, 64)).all() and math.prod(found.patch_shape_zyx) <= 1e5
        assert "wanted were 134 x 80 x 60 mm" in told(found, "input").reason
        assert found.estimated_memory_gb <= 0.1

    def test_wishes_are_kept(self):
        found = planned(self.BOXES, wishes={"spacing_zyx_mm": (4, 2, 2), "patch_shape_zyx": (40, 40, 48)})
        assert (found.spacing_zyx_mm, found.patch_shape_zyx) == ((4.0, 2.0, 2.0), (40, 40, 48))
        assert "set by the user" in told(found, "input").reason

    def test_cases_without_a_region_are_named_and_do_not_count(self):
        found = planned([*self.BOXES, None, None])
        assert found.patch_shape_zyx == planned(self.BOXES).patch_shape_zyx
        assert told(found, "region").value == "20 of 22 cases"
        assert "case020, case021" in told(found, "region").reason
        with pytest.raises(PlanError, match="no usable case shows any of it. Expected labels in labelsTr/, or a model"):
            planned([None, None])

    def test_record(self, tmp_path):
        found = planned(self.BOXES)
        write_record(tmp_path / "plan.json", found)
        assert read_record(tmp_path / "plan.json", DataPlan) == found
        older = json.loads((tmp_path / "plan.json").read_text())
        del older["region"]  # as plans were before
        (tmp_path / "plan.json").write_text(json.dumps(older))
        assert read_record(tmp_path / "plan.json", DataPlan) == dataclasses.replace(found, region=None)


class TestView:
    GRID = Grid((30, 48, 40), (4.0, 2.0, 2.5), (-50.0, -48.0, 11.0), UPRIGHT)
    CENTRE = (-12.0, 14.0, 61.0)

    def case(self, mask=None):
        """Soft tissue to the edges, so that nothing is cropped; the region is bone."""
        mask = ball(self.GRID, self.CENTRE, 14) if mask is None else mask
        ct = np.where(mask, 1500, 40).astype(np.int16)
        return {"CT": Volume(ct, self.GRID)}, Volume(mask, self.GRID)

    def prepared(self, images, labels, spacing=None, shape=(12, 16, 20)):
        spacing = spacing or self.GRID.spacing_zyx_mm
        rules = {"CT": CT_HU_RULE, "PET": PET_SUV_RULE}
        plan = DataPlan(
            "Task", "prognosis", ("CT", "PET"), None, "0" * 64, "LPS", spacing, "volume", shape, 2, rules, shape, (),
            4.0, 1.0, 1.0, 1.0, (), "0" * 64, region="Lesions",
        )  # fmt: skip
        return prepare_case(dict(images), plan, labels)

    @pytest.mark.parametrize("code", CODES)
    @pytest.mark.parametrize("spacing", [None, (2.0, 2.0, 2.0), (6.0, 5.0, 5.0)])
    def test_the_region_is_in_the_middle_and_its_mask_in_step(self, code, spacing):
        images, labels = self.case()
        stored = {name: orient(volume, code) for name, volume in images.items()}
        found = self.prepared(stored, orient(labels, code), spacing, (24, 32, 40))
        mask, ct = found.labels_zyx, found.array_czyx[0]
        assert mask.shape == (24, 32, 40) and mask.dtype == np.uint8 and mask.max() == 1
        assert ndimage.center_of_mass(mask) == pytest.approx((11.5, 15.5, 19.5), abs=0.8)
        voxel = math.prod(spacing or self.GRID.spacing_zyx_mm)
        assert mask.sum() * voxel == pytest.approx(4 / 3 * math.pi * 14**3, rel=0.12)
        bone = ct > 1.35  # half-way from 40 HU (0.2) to 1500 HU (2.5)
        assert 2 * (bone & (mask > 0)).sum() / (bone.sum() + mask.sum()) > 0.85
        assert found.present == ("CT",) and not found.array_czyx[1].any()
        again = self.prepared(images, labels, spacing, (24, 32, 40))
        assert np.array_equal(again.array_czyx, found.array_czyx) and np.array_equal(again.labels_zyx, mask)

    def test_it_is_a_part_of_the_whole_and_air_beyond(self):
        images, labels = self.case(ball(self.GRID, (-48.0, 14.0, 13.0), 14))
        whole = self.prepared(images, labels, shape=(64, 96, 96))
        part = self.prepared(images, labels, shape=(12, 16, 20))
        middle = tuple(slice((n - m) // 2, (n - m) // 2 + m) for n, m in zip((64, 96, 96), (12, 16, 20)))
        assert np.array_equal(whole.array_czyx[(slice(None), *middle)], part.array_czyx)
        assert np.array_equal(whole.labels_zyx[middle], part.labels_zyx)
        assert (part.array_czyx[0, :3] == -2.0).all() and (part.array_czyx[0, :, :, :5] == -2.0).all()
        assert whole.labels_zyx.sum() == labels.array_zyx.sum()

    def test_without_a_region_it_is_the_middle_of_the_case(self):
        images, labels = self.case()
        nothing = self.prepared(images, Volume(np.zeros_like(labels.array_zyx), self.GRID))
        missing = self.prepared(images, None)
        assert not nothing.labels_zyx.any() and nothing.labels_zyx.shape == (12, 16, 20)
        assert missing.labels_zyx is None
        assert np.array_equal(nothing.array_czyx, missing.array_czyx)
        assert np.array_equal(missing.array_czyx[0] > 1, labels.array_zyx[9:21, 16:32, 10:30] > 0)

    def test_any_label_is_region_and_stray_voxels_do_not_move_it(self):
        images, labels = self.case()
        values = labels.array_zyx.astype(np.int16) * 300
        values[0, 0, 0] = 2
        found = self.prepared(images, Volume(values, self.GRID), shape=(16, 20, 24))
        assert np.array_equal(found.labels_zyx, self.prepared(images, labels, shape=(16, 20, 24)).labels_zyx)

    def test_a_region_smaller_than_a_voxel_is_kept(self):
        tiny = np.zeros(self.GRID.shape_zyx, np.uint8)
        tiny[21, 30, 9] = 1
        images, labels = self.case(tiny)
        found = self.prepared(images, labels, (20.0, 16.0, 16.0), (6, 6, 6))
        assert found.labels_zyx.sum() == 1
        assert np.argwhere(found.labels_zyx)[0] == pytest.approx([2.5] * 3, abs=0.5)


@pytest.fixture
def raw(tmp_path):
    """Four survival cases with CT and PET: 1 and 2 with labels, 3 without, 4 with an empty map."""
    folder = write_phantom_task(
        tmp_path / "raw" / "Survival", "survival", 4, 5, modalities=("CT", "PET"),
        shape_zyx=(20, 32, 32), spacing_zyx_mm=(10.0, 9.0, 9.0),
    )  # fmt: skip
    description = json.loads((folder / "dataset.json").read_text())
    description |= {"region": "Lesions", "labels": {"background": 0, "tumour": 2}}
    (folder / "dataset.json").write_text(json.dumps(description))
    for number, radius in ((1, 30), (2, 45), (4, 0)):
        grid = read_image(folder / "imagesTr" / f"phantom_000{number}_0000.nii.gz").grid
        labels = 2 * ball(grid, middle_of(grid), radius) * (radius > 0)
        write_labels(folder / "labelsTr" / f"phantom_000{number}.nii.gz", labels, grid)
    return folder


def middle_of(grid):
    return (grid.affine @ (*((np.array(grid.shape_zyx[::-1]) - 1) / 2), 1))[:3]


class TestPreprocessing:
    # A plane of the PET lies half a voxel beside the CT's: the mask is made on the PET's own grid.
    def found(self, raw, case_id, radius=40):
        grid = read_image(raw / "imagesTr" / f"{case_id}_0001.nii.gz").grid
        path = raw.parent / "found" / f"{case_id}.nii.gz"
        write_labels(path, 5 * ball(grid, middle_of(grid), radius), grid)
        return path

    @pytest.fixture
    def run(self, raw, tmp_path):
        level = FeatureLevel((1, 1, 1), 32, 70)
        own = InputContract(("CT",), "LPS", None, None, (4, 4, 4), {"CT": CT_HU_RULE})
        spec = FoundationSpec("net", {}, own, "pyramid", level, (level,), 320, 1000.0, "Apache-2.0")

        def again(regions=None):
            return plan_and_preprocess(raw, tmp_path, spec, PRESETS["gpu8"], processes=1, regions=regions)

        return again

    def test_masks_and_descriptors_are_stored(self, raw, tmp_path, run):
        found = {"phantom_0003": self.found(raw, "phantom_0003")}
        plan, failed = run(found)
        assert not failed and plan.region == "Lesions" and plan.labels is None
        assert told(plan, "region").value == "3 of 4 cases" and "phantom_0004" in told(plan, "region").reason
        cases = tmp_path / "preprocessed" / "Survival" / "cases"
        for case in read_task(raw).cases:
            own = {name: read_image(path) for name, path in case.images.items()}
            path = case.labels or found[case.case_id]
            mask = as_region(read_labels(path), own["CT"].grid)
            stored = open_case(cases, case.case_id)
            assert stored.array.shape == (2, *plan.patch_shape_zyx)
            assert stored.labels.shape == plan.patch_shape_zyx and stored.foreground == {}
            figures = describe_region(mask, own)
            expected = {name: value if math.isfinite(value) else None for name, value in figures.items()}
            assert stored.meta["descriptors"] == expected
            if case.case_id == "phantom_0004":
                assert not stored.labels[:].any() and expected["volume_ml"] == 0 and expected["suv_max"] is None
            else:
                assert ndimage.center_of_mass(stored.labels[:]) == pytest.approx(
                    [(size - 1) / 2 for size in plan.patch_shape_zyx], abs=1.0
                )
                assert stored.labels[:].sum() == pytest.approx(mask.array_zyx.sum(), rel=0.1)
        for name in ("suv_max", "hu_mean"):
            assert read_meta(cases, "phantom_0003")["descriptors"][name] is not None

    def test_a_missing_region_is_no_failure(self, tmp_path, run):
        plan, failed = run()
        cases = tmp_path / "preprocessed" / "Survival" / "cases"
        stored = open_case(cases, "phantom_0003")
        assert not failed and stored.labels is None
        assert stored.meta["descriptors"] == dict.fromkeys(DESCRIPTORS)
        assert "phantom_0003, phantom_0004" in told(plan, "region").reason

    def test_only_what_changed_is_made_again(self, raw, tmp_path, run):
        cases = tmp_path / "preprocessed" / "Survival" / "cases"

        def made():
            return {number: (cases / f"phantom_000{number}" / "meta.json").stat().st_mtime_ns for number in range(1, 5)}

        first, _ = run({"phantom_0003": self.found(raw, "phantom_0003")})
        before = made()
        assert run({"phantom_0003": self.found(raw, "phantom_0003")}) == (first, {})
        assert made() == before
        run({"phantom_0003": self.found(raw, "phantom_0003", 43)})  # no larger than the largest: the plan stays
        after = made()
        assert [number for number in after if after[number] != before[number]] == [3]
        for wrong in (tmp_path / "gone.nii.gz", raw / "dataset.json"):
            _, failed = run({"phantom_0003": wrong})
            assert list(failed) == ["phantom_0003"] and wrong.name in failed["phantom_0003"]

    def test_masks_for_a_task_without_a_region(self, raw, run):
        description = json.loads((raw / "dataset.json").read_text())
        del description["region"]
        (raw / "dataset.json").write_text(json.dumps(description))
        with pytest.raises(PlanError, match="looks at no region, but masks of 1 cases are given"):
            run({"phantom_0003": Path("mask.nii.gz")})

    def test_the_box_is_measured_in_the_foundations_orientation(self, raw):
        task = read_task(raw)
        shapes = {code: measure_case(task.cases[0], task.modalities, task.labels, code).record.bulk_shape_zyx
                  for code in ("LPS", "SLP")}  # fmt: skip
        assert shapes["LPS"] == (6, 6, 6)
        assert sorted(shapes["SLP"]) == sorted(shapes["LPS"])
        record = measure_case(task.cases[2], task.modalities, task.labels, "LPS").record
        assert (record.bulk_shape_zyx, record.labels_sha256) == (None, None)
