"""Voxel values: numpy's interpolation as reference, units refused or accepted, the body's box."""

import numpy as np
import pytest

from unicon_pipeline import resize
from unicon_pipeline.contract import CT_HU_RULE, PET_SUV_RULE, InputContract, IntensityRule
from unicon_pipeline.errors import DatasetError, PlanError
from unicon_pipeline.geometry import Grid, Volume
from unicon_pipeline.intensity import (
    body_box,
    body_mask,
    body_slabs,
    box_of,
    check_units,
    nonzero_region,
    normalise,
    normalised_air,
    normaliser,
    rules_for,
)
from unicon_pipeline.phantoms import make_phantom

ZSCORE = IntensityRule("zscore", "none")


def contract(**intensity):
    return InputContract(tuple(intensity), "LPS", None, None, (8, 8, 8), intensity)


def volume(array):
    array = np.asarray(array, np.float32)
    return Volume(array, Grid(array.shape, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)))


class TestRules:
    def test_the_foundation_comes_first(self):
        own = IntensityRule("piecewise", "HU", (-100.0, 300.0), (0.0, 1.0))
        rules = rules_for(("CT", "PET", "T1"), contract(CT=own), {"T1": "zscore"})
        assert rules == {"CT": own, "PET": PET_SUV_RULE, "T1": ZSCORE}
        assert list(rules) == ["CT", "PET", "T1"]
        assert rules_for(("CT",), contract(), {}) == {"CT": CT_HU_RULE}

    @pytest.mark.parametrize("declared", [{}, {"T1": "minmax"}])
    def test_a_modality_without_a_scheme(self, declared):
        with pytest.raises(PlanError, match='"T1": "zscore"'):
            rules_for(("CT", "T1"), contract(), declared)

    @pytest.mark.parametrize(
        "rule",
        [
            IntensityRule("piecewise", "HU", (0.0,), (0.0,)),
            IntensityRule("piecewise", "HU", (0.0, 0.0), (0.0, 1.0)),
            IntensityRule("piecewise", "HU", (0.0, 1.0, 2.0), (0.0, 1.0)),
            IntensityRule("piecewise", "HU", (0.0, float("inf")), (0.0, 1.0)),
            IntensityRule("other", "HU"),
        ],
    )
    def test_a_broken_rule_is_refused(self, rule):
        with pytest.raises(PlanError):
            rules_for(("CT",), contract(CT=rule), {})


class TestNormalise:
    @pytest.mark.parametrize(
        "rule", [CT_HU_RULE, PET_SUV_RULE, IntensityRule("piecewise", "HU", (-100.0, 240.0), (-1.5, 3.0))]
    )
    def test_is_numpys_interpolation(self, rule):
        values = np.random.default_rng(0).uniform(-3000, 4000, (5, 6, 7)).astype(np.float32)
        values.ravel()[: len(rule.knots_in)] = rule.knots_in
        found = normalise(values, rule)
        assert found.dtype == np.float32
        assert found == pytest.approx(np.interp(values, rule.knots_in, rule.knots_out), abs=2e-5)

    def test_leaves_the_input_alone(self):
        values = np.random.default_rng(0).normal(0, 100, (3, 4, 5)).astype(np.float32)
        values.setflags(write=False)
        for rule in (CT_HU_RULE, ZSCORE):
            assert not np.shares_memory(normalise(values, rule), values)

    def test_an_suv_means_the_same_in_every_image(self):
        quiet, hot = np.zeros((2, 2, 2), np.float32), np.full((2, 2, 2), 40, np.float32)
        quiet[0, 0, 0] = hot[0, 0, 0] = 20
        assert normalise(quiet, PET_SUV_RULE)[0, 0, 0] == normalise(hot, PET_SUV_RULE)[0, 0, 0]
        assert normalise(hot, PET_SUV_RULE)[1, 1, 1] > normalise(hot, PET_SUV_RULE)[0, 0, 0]

    def test_zscore(self):
        values = np.random.default_rng(1).normal(1e4, 3, (8, 8, 8)).astype(np.float32)
        found = normalise(values, ZSCORE)
        assert found.mean() == pytest.approx(0, abs=1e-3)
        assert found.std() == pytest.approx(1, abs=1e-3)
        assert not normalise(np.full((4, 4, 4), 7.3, np.float32), ZSCORE).any()

    def test_zscore_of_what_is_not_zero(self):
        values = np.zeros((6, 5, 4), np.float32)
        values[2:4] = np.random.default_rng(2).normal(50, 7, (2, 5, 4))
        found = normalise(values, IntensityRule("zscore_nonzero", "none"), values != 0)
        assert not found[:2].any() and not found[4:].any()
        assert (found[2:4].mean(), found[2:4].std()) == pytest.approx((0, 1), abs=1e-5)
        assert not normalise(values * 0, IntensityRule("zscore_nonzero", "none"), values > 99).any()

    def test_minmax_and_identity(self):
        values = np.array([[[3.0, 5.0, 11.0]]], np.float32)
        assert normalise(values, IntensityRule("minmax", "none")).tolist() == [[[0.0, 0.25, 1.0]]]
        assert not normalise(values * 0 + 4, IntensityRule("minmax", "none")).any()
        assert normalise(values, IntensityRule("identity", "none")).tolist() == values.tolist()

    @pytest.mark.parametrize("scheme", ["piecewise", "zscore", "zscore_nonzero", "minmax", "identity"])
    def test_planes_on_demand_and_small_integers_give_the_same(self, scheme, monkeypatch):
        monkeypatch.setattr(resize, "_SLAB_VOXELS", 50)
        rule = CT_HU_RULE if scheme == "piecewise" else IntensityRule(scheme, "none")
        values = np.random.default_rng(3).integers(-1200, 2000, (7, 9, 5)).astype(np.int16)
        values[:, 0] = 0
        expected = normalise(values.astype(np.float32), rule, values != 0)
        turned = values.transpose(2, 1, 0)[::-1].copy().transpose(2, 1, 0)[:, :, ::-1]  # a view, planes not contiguous
        planes = normaliser(turned, rule, values != 0)
        for rows in (slice(0, 3), slice(6, 7), slice(0, 7)):
            assert np.array_equal(planes(rows), expected[rows])
            assert planes(rows).dtype == np.float32
            assert planes(rows).flags.c_contiguous
        assert np.array_equal(normalise(turned, rule, values != 0), expected)

    def test_air(self):
        assert normalised_air(CT_HU_RULE, "CT") == -2
        assert normalised_air(PET_SUV_RULE, "PET") == 0
        assert normalised_air(ZSCORE, "T1") == 0


class TestUnits:
    @pytest.fixture(scope="class")
    def phantom(self):
        return make_phantom(3, shape_zyx=(20, 32, 32), spacing_zyx_mm=(10.0, 9.0, 9.0))

    def test_hu_and_suv_pass(self, phantom):
        check_units(phantom.ct.array_zyx, "CT", "ct.nii.gz")
        check_units(phantom.pet.array_zyx, "PET", "pet.nii.gz")
        check_units(phantom.ct.array_zyx + 5000, "T1", "t1.nii.gz")

    def test_values_and_layout_as_they_are_stored(self, phantom):
        stored = phantom.ct.array_zyx.astype(np.int16)
        check_units(stored, "CT", "ct.nii.gz")
        check_units(stored.transpose(2, 0, 1)[::-1], "CT", "ct.nii.gz")
        with pytest.raises(DatasetError, match="RescaleIntercept"):
            check_units((stored + 1024).astype(np.uint16), "CT", "ct.nii.gz")

    def test_one_hot_voxel_is_still_suv(self, phantom):
        hot = phantom.pet.array_zyx.copy()
        hot[0, 0, 0] = 900  # a full bladder, or tracer at the injection site
        check_units(hot, "PET", "pet.nii.gz")

    @pytest.mark.parametrize(
        ("modality", "change", "says"),
        [
            ("PET", lambda ct, pet: pet * 5000, "Bq/ml.*injected dose.*dataset_conversion.suv"),
            ("PET", lambda ct, pet: ct, "looks like HU"),
            ("CT", lambda ct, pet: ct + 1024, "RescaleIntercept"),
            ("CT", lambda ct, pet: (ct + 1000) / 4000, "already scaled"),
            ("CT", lambda ct, pet: ct * 10, "not HU"),
            ("CT", lambda ct, pet: ct * 0 - 1000, "every voxel is -1000"),
            ("PET", lambda ct, pet: pet * 0, "image is empty"),
            ("T1", lambda ct, pet: pet * 0, "image is empty"),
        ],
    )
    def test_other_units_are_refused_with_the_way_to_convert(self, phantom, modality, change, says):
        with pytest.raises(DatasetError, match=says) as problem:
            check_units(change(phantom.ct.array_zyx, phantom.pet.array_zyx), modality, "folder/image.nii.gz")
        assert "folder/image.nii.gz" in str(problem.value)


class TestBodyBox:
    def test_body_and_three_voxels_around_it(self):
        ct = np.full((20, 30, 40), -1000.0)
        ct[8:12, 1:20, 25:39] = 40
        assert body_box({"CT": volume(ct)}) == (slice(5, 15), slice(0, 23), slice(22, 40))

    def test_ct_alone_decides_where_it_is_there(self):
        ct, pet = np.full((20, 20, 20), -1000.0), np.zeros((20, 20, 20))
        ct[8:12, 8:12, 8:12] = 40
        pet[0:20, 4:16, 4:16] = 2
        assert body_box({"PET": volume(pet), "CT": volume(ct)}) == (slice(5, 15),) * 3
        assert body_box({"PET": volume(pet)})[1] == slice(0, 20)  # blurred by one voxel, and the margin

    def test_a_noisy_pet_voxel_in_air_is_no_body(self):
        pet = np.zeros((20, 20, 20))
        pet[10:14, 10:14, 10:14] = 3
        pet[0, 0, 0] = 0.3
        assert body_box({"PET": volume(pet)}) == (slice(6, 18),) * 3

    def test_other_modalities_count_together(self):
        t1, t2 = np.zeros((20, 20, 20)), np.zeros((20, 20, 20))
        t1[5, 10, 10], t2[15, 10, 10] = 100, 100
        assert body_box({"T1": volume(t1), "T2": volume(t2)})[0] == slice(2, 19)

    @pytest.mark.parametrize("dtype", [np.int16, np.float32])
    def test_ct_as_it_is_stored(self, dtype):
        ct = np.full((20, 30, 40), -1000, dtype)
        ct[8:12, 1:20, 25:39] = -599
        ct[0, 0, 0] = -600
        box = (slice(5, 15), slice(0, 23), slice(22, 40))
        assert body_box({"CT": Volume(ct, volume(ct).grid)}) == box
        assert body_mask(np.full((1, 1, 1), 0, np.uint16), "CT").all()

    @pytest.mark.parametrize("modality", ["CT", "PET", "T1"])
    def test_slab_by_slab_the_same(self, modality, monkeypatch):
        values = np.random.default_rng(5).normal(0, 0.5, (11, 12, 10)).astype(np.float32) ** 2
        values[values < 0.01] = 0
        whole = body_mask(values, modality)
        assert modality == "CT" or whole.any() > whole.all()
        monkeypatch.setattr(resize, "_SLAB_VOXELS", 250)
        slabs = list(body_slabs(values, modality))
        assert [rows for rows, _ in slabs][:2] == [slice(0, 2), slice(2, 4)]
        assert np.array_equal(np.concatenate([mask for _, mask in slabs]), whole)

    def test_nothing_found_is_the_whole_image(self):
        assert body_box({"CT": volume(np.full((4, 5, 6), -1000.0))}) == (slice(0, 4), slice(0, 5), slice(0, 6))

    def test_images_on_different_grids_are_refused(self):
        with pytest.raises(DatasetError, match="share one grid"):
            body_box({"CT": volume(np.zeros((4, 5, 6))), "PET": volume(np.zeros((4, 5, 7)))})


def test_fat_and_the_border_of_the_lung_are_body():
    ct = np.full((20, 20, 20), -1000, np.float32)
    ct[8:12, 5:15, 5:15] = -500
    assert body_box({"CT": volume(ct)}) == (slice(5, 15), slice(2, 18), slice(2, 18))


def test_low_activity_in_bq_is_no_suv():
    pet = np.random.default_rng(0).gamma(2, 100, (16, 16, 16)).astype(np.float32)
    assert pet.max() < 10_000
    with pytest.raises(DatasetError, match="not SUV"):
        check_units(pet, "PET", "p.nii.gz")


def test_the_region_that_is_not_zero_has_no_holes(monkeypatch):
    monkeypatch.setattr(resize, "_SLAB_VOXELS", 200)
    first, second = np.zeros((12, 14, 16)), np.zeros((12, 14, 16))
    first[2:8, 3:9, 4:10] = 5
    first[4:6, 5:7, 6:8] = 0  # a hole within
    first[3, 3:5, 5] = 0  # a dent
    second[7:9, 8:12, 8:12] = -1
    region = nonzero_region({"T1": volume(first), "T2": volume(second)})
    expected = (first != 0) | (second != 0)
    expected[4:6, 5:7, 6:8] = True
    assert np.array_equal(region, expected)
    assert box_of(region) == (slice(2, 9), slice(3, 12), slice(4, 12))
    assert box_of(region * 0) == (slice(0, 12), slice(0, 14), slice(0, 16))
