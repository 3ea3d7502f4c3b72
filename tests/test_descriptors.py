"""The descriptors of a region, against the IBSI's published values, other libraries, and simple bodies."""

import dataclasses
import math

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.distance import pdist
from skimage.measure import regionprops
from surface_distance import lookup_tables

from unicon_pipeline import baselines, metrics
from unicon_pipeline.descriptors import (
    DENSITY,
    DESCRIPTORS,
    LOGARITHMIC,
    PEAK_RADIUS_MM,
    SHAPE,
    UPTAKE,
    describe_region,
    linear_row,
)
from unicon_pipeline.geometry import Grid, Volume, onto_grid, orient

UPRIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
SPACING = (3.0, 1.2, 0.9)

# The digital phantom of the IBSI (design by A. Zwanenburg, CC BY 4.0): voxels of 2 mm, z, y, x; -: outside the region.
PHANTOM = """
    1 4 4 1 1   1 4 6 1 1   4 1 6 4 1   4 4 6 4 1
    1 4 4 1 1   1 1 6 1 1   -1 1 3 1 1   4 4 6 1 1
    1 4 4 -1 -1   1 1 1 1 1   1 1 -9 1 1   1 1 6 1 1
    1 4 4 -1 -1   1 1 1 1 1   1 1 1 1 1   1 1 6 1 1
"""
# Value and tolerance in the reference manual, half a unit of the last digit where it gives none; lengths in mm.
PUBLISHED = {
    "volume_ml": (0.592, 0.004),
    "surface_mm2": (388, 3),
    "sphericity": (0.843, 0.005),
    "diameter_mm": (13.1, 0.1),
    "major_axis_mm": (11.4, 0.1),
    "minor_axis_mm": (9.31, 0.06),
    "least_axis_mm": (8.54, 0.05),
    "elongation": (0.816, 0.005),
    "flatness": (0.749, 0.005),
    "suv_max": (6, 0),
    "suv_mean": (2.15, 0.005),
    "suv_peak": (3.1, 0.05),
    "suv_sd": (math.sqrt(3.05), 0.0015),
    "suv_cov": (0.812, 0.0005),
    "hu_mean": (2.15, 0.005),
    "hu_sd": (math.sqrt(3.05), 0.0015),
    "hu_p10": (1, 0),
    "hu_median": (1, 0),
    "hu_p90": (4, 0),
}


def grid(shape, spacing=SPACING, origin=(0.0, 0.0, 0.0), direction=UPRIGHT) -> Grid:
    return Grid(tuple(shape), tuple(spacing), tuple(origin), tuple(direction))


def ellipsoid(shape, spacing, radii, centre=None) -> np.ndarray:
    centre = [n / 2 - 0.3 for n in shape] if centre is None else centre
    axes = np.ogrid[tuple(slice(0, n) for n in shape)]
    return sum(((a - c) * s / r) ** 2 for a, c, s, r in zip(axes, centre, spacing, radii)) <= 1


@pytest.fixture(scope="module")
def case():
    """A mask of two parts, CT as integers and PET, on one anisotropic grid."""
    rng = np.random.default_rng(5)
    shape = (20, 44, 52)
    mask = ellipsoid(shape, SPACING, (18, 14, 9)) | ellipsoid(shape, SPACING, (5, 4, 4), (3, 8, 45))
    ct = rng.integers(-200, 300, shape).astype(np.int16)
    pet = rng.gamma(2.0, 2.0, shape).astype(np.float32)
    on = grid(shape, origin=(-40.0, 12.0, 7.0))
    return Volume(mask.astype(np.uint8), on), {"CT": Volume(ct, on), "PET": Volume(pet, on)}


def test_published_values_of_the_ibsi_phantom():
    signed = np.array(PHANTOM.split(), np.float32).reshape(4, 4, 5)
    on = grid(signed.shape, (2.0, 2.0, 2.0))
    image = Volume(np.abs(signed), on)
    found = describe_region(Volume(signed > 0, on), {"CT": image, "PET": image})
    for name, (value, tolerance) in PUBLISHED.items():
        assert found[name] == pytest.approx(value, abs=tolerance + 1e-9), name
    assert found["components"] == 1
    # 41 % of the maximum is 2.46: one voxel of 3, sixteen of 4 and seven of 6 have more, of 0.008 ml each.
    assert found["metabolic_volume_ml"] == pytest.approx(24 * 0.008)
    assert found["tlg_g"] == pytest.approx((3 + 16 * 4 + 7 * 6) * 0.008)


class TestShape:
    @pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), SPACING])
    def test_agrees_with_other_libraries(self, spacing):
        mask = ellipsoid((24, 40, 48), spacing, (9, 14, 17))
        found = describe_region(Volume(mask, grid(mask.shape, spacing)), {})
        other = regionprops(mask.astype(np.uint8), spacing=spacing)[0]
        n = np.count_nonzero(mask)
        # scikit-image: axes of the solid ellipsoid of these moments, and the population's variance.
        scale = 4 / (2 * math.sqrt(5)) * math.sqrt(n / (n - 1))
        assert found["volume_ml"] == pytest.approx(other.area / 1000)
        assert found["volume_ml"] == pytest.approx(metrics.volume_ml(mask, spacing))
        assert found["major_axis_mm"] == pytest.approx(other.axis_major_length * scale, rel=1e-9)
        assert found["least_axis_mm"] == pytest.approx(other.axis_minor_length * scale, rel=1e-9)
        itk = sitk.GetImageFromArray(mask.astype(np.uint8))
        itk.SetSpacing(spacing[::-1])
        moments = sitk.LabelShapeStatisticsImageFilter()
        moments.Execute(itk)
        variances = np.array(moments.GetPrincipalMoments(1))
        axes = [found[f"{name}_axis_mm"] for name in ("least", "minor", "major")]
        np.testing.assert_allclose(np.square(axes) / np.square(axes[2]), variances / variances[2], rtol=1e-6)
        assert found["elongation"] == pytest.approx(math.sqrt(variances[1] / variances[2]))
        assert found["flatness"] == pytest.approx(math.sqrt(variances[0] / variances[2]))

    @pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), SPACING])
    def test_surface_is_that_of_the_library_of_the_surface_distances(self, spacing):
        mask = ellipsoid((24, 40, 48), spacing, (9, 14, 17))
        corners = np.lib.stride_tricks.sliding_window_view(np.pad(mask, 1), (2, 2, 2))
        codes = (corners * lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL).sum(axis=(3, 4, 5))
        area = lookup_tables.create_table_neighbour_code_to_surface_area(spacing)[codes].sum()
        found = describe_region(Volume(mask, grid(mask.shape, spacing)), {})
        assert found["surface_mm2"] == pytest.approx(area, rel=1e-6)

    def test_diameter_is_that_of_all_pairs_of_points(self):
        mask = np.random.default_rng(2).random((6, 9, 9)) < 0.1
        points = []
        padded = np.pad(mask, 1)
        for axis in range(3):
            border = np.argwhere(np.diff(padded.astype(np.int8), axis=axis)).astype(float)
            border[:, axis] += 0.5
            points.append(border * SPACING)
        found = describe_region(Volume(mask, grid(mask.shape)), {})
        assert found["diameter_mm"] == pytest.approx(pdist(np.concatenate(points)).max(), rel=1e-6)

    def test_ball(self):
        mask = ellipsoid((60, 60, 60), (1.0, 1.0, 1.0), (25, 25, 25))
        found = describe_region(Volume(mask, grid(mask.shape, (1.0, 1.0, 1.0))), {})
        assert found["volume_ml"] == pytest.approx(4 / 3 * math.pi * 2.5**3, rel=0.01)
        assert found["diameter_mm"] == pytest.approx(50, abs=1.5)
        assert found["major_axis_mm"] == pytest.approx(4 * 25 / math.sqrt(5), rel=0.01)  # variance r2 / 5 on an axis
        assert 0.9 < found["sphericity"] < 1
        assert found["elongation"] == pytest.approx(1, abs=0.01) == found["flatness"]

    def test_box_touching_every_border(self):
        found = describe_region(Volume(np.ones((10, 20, 30), np.uint8), grid((10, 20, 30), (1.0, 1.0, 1.0))), {})
        assert found["volume_ml"] == pytest.approx(6)
        assert found["surface_mm2"] == pytest.approx(2 * (200 + 300 + 600), rel=0.05)  # edges are cut at half a voxel
        variances = (np.array([10, 20, 30]) ** 2 - 1) / 12 * 6000 / 5999  # of whole numbers: (n2 - 1) / 12
        assert found["flatness"] == pytest.approx(math.sqrt(variances[0] / variances[2]))
        assert found["major_axis_mm"] == pytest.approx(4 * math.sqrt(variances[2]))

    def test_one_voxel(self, case):
        mask, images = case
        one = np.zeros_like(mask.array_zyx)
        one[0, 0, 51] = 1
        found = describe_region(Volume(one, mask.grid), images)
        # The mesh about one voxel is an octahedron with its corners half a voxel away.
        a, b, c = SPACING
        faces = 0.5 * 8 / 4 * math.sqrt((a * b) ** 2 + (b * c) ** 2 + (a * c) ** 2)
        assert found["volume_ml"] == pytest.approx(a * b * c / 1000)
        assert found["surface_mm2"] == pytest.approx(faces, rel=1e-6)
        assert found["sphericity"] == pytest.approx((36 * math.pi * (a * b * c / 6) ** 2) ** (1 / 3) / faces, rel=1e-6)
        assert found["diameter_mm"] == pytest.approx(a)
        assert found["suv_max"] == found["suv_mean"] == pytest.approx(images["PET"].array_zyx[0, 0, 51])
        assert found["hu_p10"] == found["hu_p90"] == images["CT"].array_zyx[0, 0, 51]
        assert found["suv_sd"] == 0
        unknown = {name for name, value in found.items() if math.isnan(value)}
        assert unknown == {"major_axis_mm", "minor_axis_mm", "least_axis_mm", "elongation", "flatness"}

    def test_flat_region_has_no_least_axis(self):
        mask = np.zeros((5, 9, 9), bool)
        mask[2, 2:6, 2:7] = True
        found = describe_region(Volume(mask, grid(mask.shape)), {})
        assert found["least_axis_mm"] == found["flatness"] == 0
        assert math.isfinite(found["sphericity"])
        oblique = np.zeros((7, 9, 9), bool)
        oblique[[1, 2, 3, 3], [1, 2, 3, 4], [1, 2, 3, 5]] = True  # in one plane, along no axis
        found = describe_region(Volume(oblique, grid(oblique.shape)), {})
        assert found["minor_axis_mm"] > 0 == found["least_axis_mm"]

    def test_parts_add_up_and_touching_corners_are_one(self, case):
        mask, _ = case
        assert describe_region(mask, {})["components"] == 2
        diagonal = np.zeros((6, 6, 6), bool)
        diagonal[[1, 2, 3], [1, 2, 3], [1, 2, 3]] = True
        assert describe_region(Volume(diagonal, grid(diagonal.shape)), {})["components"] == 1
        apart = np.zeros((6, 6, 6), bool)
        apart[[1, 3], [1, 3], [1, 3]] = True
        one = apart & (np.arange(6) < 2)
        two, single = (describe_region(Volume(array, grid(array.shape)), {}) for array in (apart, one))
        assert (two["components"], single["components"]) == (2, 1)
        assert two["surface_mm2"] == pytest.approx(2 * single["surface_mm2"])


class TestImages:
    def test_statistics(self, case):
        mask, images = case
        found = describe_region(mask, images)
        inside = mask.array_zyx > 0
        hu, suv = images["CT"].array_zyx[inside].astype(float), images["PET"].array_zyx[inside].astype(float)
        hot, voxel_ml = suv[suv >= 0.41 * suv.max()], math.prod(SPACING) / 1000
        expected = {
            "hu_mean": hu.mean(), "hu_sd": hu.std(), "hu_p10": np.quantile(hu, 0.1), "hu_median": np.median(hu),
            "hu_p90": np.quantile(hu, 0.9), "suv_max": suv.max(), "suv_mean": suv.mean(), "suv_sd": suv.std(),
            "metabolic_volume_ml": len(hot) * voxel_ml, "tlg_g": len(hot) * voxel_ml * hot.mean(),
        }  # fmt: skip
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-12), name

    def test_peak_is_the_best_of_all_spheres_also_at_the_border(self):
        rng = np.random.default_rng(8)
        shape = (7, 15, 18)
        pet = rng.gamma(1.0, 3.0, shape)
        mask = ellipsoid(shape, SPACING, (12, 9, 9), (1, 6, 8)) | ellipsoid(shape, SPACING, (4, 3, 3), (5, 13, 16))
        where = np.argwhere(np.ones(shape, bool))
        means = [
            pet.ravel()[np.linalg.norm((where - centre) * SPACING, axis=1) <= PEAK_RADIUS_MM].mean()
            for centre in np.argwhere(mask)
        ]
        found = describe_region(Volume(mask, grid(shape)), {"PET": Volume(pet.astype(np.float32), grid(shape))})
        assert found["suv_peak"] == pytest.approx(max(means), rel=1e-6)
        assert 4 / 3 * math.pi * PEAK_RADIUS_MM**3 == pytest.approx(1000)

    def test_nothing_taken_up_has_no_metabolic_volume(self, case):
        mask, images = case
        cold = Volume(np.zeros_like(images["PET"].array_zyx), mask.grid)
        found = describe_region(mask, {"PET": cold})
        assert found["suv_max"] == found["suv_mean"] == found["suv_peak"] == 0
        assert all(math.isnan(found[name]) for name in ("suv_cov", "metabolic_volume_ml", "tlg_g"))

    def test_what_is_not_there_is_nan(self, case):
        mask, images = case
        whole = describe_region(mask, images)
        for absent, names in (("PET", UPTAKE), ("CT", DENSITY)):
            found = describe_region(mask, {name: image for name, image in images.items() if name != absent})
            assert all(math.isnan(found[name]) for name in names)
            assert all(found[name] == whole[name] for name in set(DESCRIPTORS) - set(names))
        other = describe_region(mask, {"T1": images["CT"]})
        assert all(math.isnan(other[name]) for name in UPTAKE + DENSITY)

    def test_empty_mask(self, case):
        mask, images = case
        found = describe_region(Volume(np.zeros_like(mask.array_zyx), mask.grid), images)
        assert found.pop("volume_ml") == 0
        assert all(math.isnan(value) for value in found.values())

    @pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16])
    def test_any_mask_type_and_no_input_changes(self, case, dtype):
        mask, images = case
        before = mask.array_zyx.copy()
        other = Volume((mask.array_zyx * (1 if dtype is bool else 3)).astype(dtype), mask.grid)
        assert describe_region(other, images) == describe_region(mask, images)
        np.testing.assert_array_equal(mask.array_zyx, before)


class TestGrids:
    @pytest.mark.parametrize("code", ["RAS", "SLP", "PIR"])
    def test_order_of_the_axes_does_not_matter(self, case, code):
        mask, images = case
        turned = describe_region(orient(mask, code), {name: orient(image, code) for name, image in images.items()})
        assert turned == pytest.approx(describe_region(mask, images), rel=1e-6)

    def test_oblique_grid(self, case):
        mask, images = case
        angle = math.radians(25)
        c, s = math.cos(angle), math.sin(angle)
        oblique = dataclasses.replace(mask.grid, direction=(c, -s, 0.0, s, c, 0.0, 0.0, 0.0, 1.0))
        turned = {name: Volume(image.array_zyx, oblique) for name, image in images.items()}
        assert describe_region(Volume(mask.array_zyx, oblique), turned) == describe_region(mask, images)

    def test_header_rounding_changes_nothing(self, case):
        mask, images = case
        moved = dataclasses.replace(mask.grid, origin_xyz_mm=tuple(v + 4e-3 for v in mask.grid.origin_xyz_mm))
        shifted = {name: Volume(image.array_zyx, moved) for name, image in images.items()}
        assert describe_region(mask, shifted) == describe_region(mask, images)

    @pytest.mark.parametrize("degrees", [0, 20])
    def test_pet_on_its_own_grid_keeps_its_maximum(self, degrees):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        coarse = grid((12, 16, 16), (4.0, 4.1, 4.1), (-3.03, 2.02, 1.0), (c, -s, 0.0, s, c, 0.0, 0.0, 0.0, 1.0))
        pet = Volume(np.random.default_rng(1).gamma(2.0, 2.0, coarse.shape_zyx).astype(np.float32), coarse)
        fine = grid((48, 70, 70), (1.0, 1.0, 1.0), (-8.0, -2.0, 0.0))
        mask = Volume(ellipsoid(fine.shape_zyx, (1.0, 1.0, 1.0), (12, 15, 15)), fine)
        found = describe_region(mask, {"PET": pet})
        # Each PET voxel whose centre lies in the region, found by ITK's own arithmetic.
        image = sitk.GetImageFromArray(mask.array_zyx.astype(np.uint8))
        image.SetOrigin(fine.origin_xyz_mm)
        inside = []
        for index in np.argwhere(np.ones(coarse.shape_zyx)):
            at = image.TransformPhysicalPointToIndex((coarse.affine @ (*index[::-1], 1))[:3].tolist())
            held = all(0 <= i < n for i, n in zip(at, fine.shape_zyx[::-1]))
            if held and image[at]:
                inside.append(pet.array_zyx[tuple(index)])
        assert found["suv_max"] == max(inside)
        assert found["suv_mean"] == pytest.approx(np.mean(inside, dtype=float))
        resampled = describe_region(mask, {"PET": onto_grid(pet, fine, 0.0)})
        assert resampled["suv_max"] < found["suv_max"]

    def test_region_smaller_than_a_pet_voxel(self):
        coarse = grid((6, 6, 6), (4.0, 4.0, 4.0))
        pet = Volume(np.arange(216, dtype=np.float32).reshape(6, 6, 6), coarse)
        mask = np.zeros((24, 24, 24), bool)
        mask[13, 9, 6:8] = True  # mm; PET voxels 3, 2 and, along x, 6 / 4 -> 1.5 and 7 / 4: 2
        found = describe_region(Volume(mask, grid(mask.shape, (1.0, 1.0, 1.0), (0.1, 0.1, 0.1))), {"PET": pet})
        assert found["suv_max"] == found["suv_mean"] == pet.array_zyx[3, 2, 2]

    def test_region_outside_or_partly_outside_the_pet(self, case):
        mask, images = case
        pet = images["PET"]
        far = dataclasses.replace(pet.grid, origin_xyz_mm=(500.0, 0.0, 0.0))
        found = describe_region(mask, {"PET": Volume(pet.array_zyx, far)})
        assert all(math.isnan(found[name]) for name in UPTAKE)
        assert math.isfinite(found["surface_mm2"])
        half = Volume(pet.array_zyx[:10], dataclasses.replace(pet.grid, shape_zyx=(10, 44, 52)))
        shown = half.array_zyx[mask.array_zyx[:10] > 0]
        assert describe_region(mask, {"PET": half})["suv_mean"] == pytest.approx(shown.mean(dtype=float))

    def test_stray_voxel_far_away_changes_little(self, case):
        mask, images = case
        stray = mask.array_zyx.copy()
        stray[19, 0, 0] = 1
        found, before = (describe_region(Volume(array, mask.grid), images) for array in (stray, mask.array_zyx))
        assert found["components"] == before["components"] + 1
        assert found["suv_peak"] >= before["suv_peak"]
        assert found["surface_mm2"] == pytest.approx(before["surface_mm2"], rel=0.01)


class TestTable:
    def test_names(self, case):
        assert tuple(describe_region(*case)) == DESCRIPTORS == (*SHAPE, *UPTAKE, *DENSITY)
        assert LOGARITHMIC <= set(DESCRIPTORS)
        assert set(baselines.VOLUME + baselines.SUV) <= LOGARITHMIC  # which takes their logarithms too
        assert all(type(value) is float for value in describe_region(*case).values())

    def test_linear_row(self, case):
        found = describe_region(*case)
        row = linear_row(found)
        for name, value in zip(DESCRIPTORS, row, strict=True):
            assert value == pytest.approx(math.log(found[name]) if name in LOGARITHMIC else found[name])

    def test_what_has_no_logarithm_is_nan(self):
        row = dict(zip(DESCRIPTORS, linear_row({"volume_ml": 0.0, "suv_max": 2.0, "hu_mean": -50.0})))
        assert {name: value for name, value in row.items() if not math.isnan(value)} == pytest.approx(
            {"suv_max": math.log(2), "hu_mean": -50.0}
        )
