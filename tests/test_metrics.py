"""Against references that are not ours: SimpleITK, scikit-image meshes, SciPy, and analytic shapes."""

import math
import tracemalloc

import numpy as np
import pytest
import SimpleITK as sitk
import surface_distance
from scipy import ndimage, stats
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes

from unicon_pipeline import metrics
from unicon_pipeline.metrics import (
    Summary,
    area_under_curve,
    bootstrap_interval,
    bootstrap_statistic,
    dice,
    format_summary,
    summarise,
    surface_scores,
    volume_ml,
)

SPACING = (5.0, 1.5, 1.0)


def box(shape, start, stop):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
    return mask


def ball(shape, spacing, centre_mm, radius_mm):
    axes = [(np.arange(n) + 0.5) * step for n, step in zip(shape, spacing, strict=True)]
    grid = np.meshgrid(*axes, indexing="ij")
    return sum((a - c) ** 2 for a, c in zip(grid, centre_mm, strict=True)) <= radius_mm**2


def mesh_scores(prediction, reference, spacing, tolerance_mm):
    """NSD and HD95 from scikit-image's triangle meshes: centroids weighted by triangle area."""
    surfaces = []
    for mask in (prediction, reference):
        vertices, faces, _, _ = marching_cubes(np.pad(mask, 1).astype(np.float32), 0.5, spacing=spacing)
        a, b, c = (vertices[faces[:, i]] for i in range(3))
        surfaces.append(((a + b + c) / 3, np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2))
    within, percentiles = 0.0, []
    for (points, areas), (others, _) in (surfaces, surfaces[::-1]):
        distances = cKDTree(others).query(points)[0]
        within += areas[distances <= tolerance_mm].sum()
        order = np.argsort(distances)
        share = np.cumsum(areas[order]) / areas.sum()
        percentiles.append(distances[order][np.searchsorted(share, 0.95)])
    return within / sum(areas.sum() for _, areas in surfaces), max(percentiles)


def as_sitk(mask, spacing=SPACING):
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    image.SetSpacing(spacing[::-1])
    return image


def test_dice_equals_simpleitks():
    rng = np.random.default_rng(0)
    for share in (0.02, 0.3, 0.9):
        a, b = rng.random((6, 9, 11)) < share, rng.random((6, 9, 11)) < 0.3
        overlap = sitk.LabelOverlapMeasuresImageFilter()
        overlap.Execute(as_sitk(a), as_sitk(b))
        assert dice(a, b) == pytest.approx(overlap.GetDiceCoefficient(1), abs=1e-12)


def test_volume_equals_simpleitks():
    mask = ball((12, 40, 50), SPACING, (30, 30, 25), 18)
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(as_sitk(mask))
    assert volume_ml(mask, SPACING) == pytest.approx(shape.GetPhysicalSize(1) / 1000)
    assert volume_ml(mask, SPACING) == pytest.approx(4 / 3 * math.pi * 18**3 / 1000, rel=0.05)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_hausdorff_of_shifted_slabs_equals_simpleitks_in_mm_on_every_axis(axis):
    # A slab that is thin along its shift: half its surface moves by the whole shift, so the 95th percentile is
    # the maximum, which SimpleITK computes.
    start, stop = [4, 4, 4], [34, 34, 34]
    start[axis], stop[axis] = 4, 6
    a = box((40, 40, 40), start, stop)
    b = np.roll(a, 7, axis)
    hausdorff = sitk.HausdorffDistanceImageFilter()
    hausdorff.Execute(as_sitk(a), as_sitk(b))
    assert surface_scores(a, b, SPACING, 1.0)[1] == pytest.approx(hausdorff.GetHausdorffDistance(), abs=1e-6)
    assert hausdorff.GetHausdorffDistance() == pytest.approx(7 * SPACING[axis])


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (1.0, 1.0, 3.0)])
def test_concentric_spheres_are_their_radii_apart(spacing):
    shape = tuple(round(56 / step) for step in spacing)
    inner, outer = (ball(shape, spacing, (28, 28, 28), radius) for radius in (16, 22))
    voxel = max(spacing)
    assert surface_scores(inner, outer, spacing, 6 + voxel) == (1.0, pytest.approx(6, abs=voxel))
    # Points on the two voxelised spheres come closer to each other by up to a voxel diagonal.
    assert surface_scores(inner, outer, spacing, 6 - math.hypot(*spacing))[0] < 0.05


@pytest.mark.parametrize(("shift", "tolerance_mm"), [((0, 0, 5), 2.0), ((2, 0, 0), 4.0), ((1, 3, 2), 3.3)])
def test_surface_scores_agree_with_a_triangle_mesh(shift, tolerance_mm):
    spacing, shape = (2.5, 1.0, 1.0), (26, 64, 64)
    a = ball(shape, spacing, (30, 30, 30), 20)
    b = np.roll(ball(shape, spacing, (30, 30, 30), 18), shift, (0, 1, 2))
    nsd, hd95_mm = surface_scores(a, b, spacing, tolerance_mm)
    expected_nsd, expected_hd95_mm = mesh_scores(a, b, spacing, tolerance_mm)
    assert nsd == pytest.approx(expected_nsd, abs=0.12)
    assert hd95_mm == pytest.approx(expected_hd95_mm, abs=1.0)
    # The spacing in the wrong order is not within these bounds.
    wrong_nsd, wrong_hd95_mm = surface_scores(a, b, spacing[::-1], tolerance_mm)
    assert abs(wrong_nsd - expected_nsd) > 0.12 or abs(wrong_hd95_mm - expected_hd95_mm) > 1.0


def test_what_lies_around_the_masks_changes_nothing():
    a, b = ball((10, 30, 30), SPACING, (25, 22, 15), 10), ball((10, 30, 30), SPACING, (28, 20, 17), 9)
    inside = np.argwhere(a | b)
    crop = tuple(slice(low, high + 1) for low, high in zip(inside.min(0), inside.max(0), strict=True))
    padded = surface_scores(np.pad(a, 9), np.pad(b, 9), SPACING, 2.0)
    assert surface_scores(a[crop], b[crop], SPACING, 2.0) == surface_scores(a, b, SPACING, 2.0) == padded
    assert 0 < padded[0] < 1


def test_identical_masks_are_perfect_even_at_the_image_border_and_as_one_voxel():
    for mask in (np.ones((3, 4, 5), bool), box((3, 4, 5), (0, 0, 0), (1, 1, 1))):
        assert surface_scores(mask, mask, SPACING, 0.0) == (1.0, 0.0)
        assert dice(mask, mask) == 1.0


def test_empty_masks():
    empty, full = np.zeros((4, 5, 6), bool), box((4, 5, 6), (1, 1, 1), (3, 3, 3))
    assert math.isnan(dice(empty, empty))
    assert all(math.isnan(value) for value in surface_scores(empty, empty, SPACING, 2.0))
    for pair in ((empty, full), (full, empty)):
        assert dice(*pair) == 0.0
        nsd, hd95_mm = surface_scores(*pair, SPACING, 2.0)
        assert nsd == 0.0 and math.isnan(hd95_mm)


def test_a_step_of_exactly_the_tolerance_is_within_it_whatever_the_rounding_of_the_stored_spacing():
    a, b = box((12, 12, 12), (2, 2, 2), (8, 8, 8)), box((12, 12, 12), (3, 2, 2), (9, 8, 8))
    for step in (1.9999998, 2.0, 2.0000002):
        assert surface_scores(a, b, (step, 1.0, 1.0), 2.0)[0] == 1.0
    assert surface_scores(a, b, (2.01, 1.0, 1.0), 2.0)[0] < 1.0


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 0.7, 1.3), (0.7, 1.3, 5.0)])
@pytest.mark.parametrize("tolerance_mm", [0.0, 1.1, 2.05])
def test_surface_scores_equal_the_librarys_own(spacing, tolerance_mm):
    rng = np.random.default_rng(4)
    rough = [ndimage.gaussian_filter(rng.normal(size=(14, 20, 24)), 1.5) > 0.05 for _ in range(2)]
    far = box((14, 20, 24), (3, 3, 3), (7, 9, 8)), box((14, 20, 24), (13, 19, 23), (14, 20, 24))
    speckle = rng.random((14, 20, 24)) < 0.3
    for prediction, reference in (rough, rough[::-1], far, (speckle, rough[0])):
        distances = surface_distance.compute_surface_distances(reference, prediction, spacing)
        expected = (
            surface_distance.compute_surface_dice_at_tolerance(distances, tolerance_mm),
            surface_distance.compute_robust_hausdorff(distances, 95),
        )
        assert surface_scores(prediction, reference, spacing, tolerance_mm) == pytest.approx(expected, rel=1e-9)


def test_a_stray_voxel_far_away_costs_little_memory():
    shape = (120, 300, 300)
    a = box(shape, (50, 100, 100), (60, 120, 120))
    b = box(shape, (119, 299, 299), shape) | a
    tracemalloc.start()
    try:
        nsd, _ = surface_scores(a, b, SPACING, 1.0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.9 < nsd < 1.0
    assert peak < 10 * a.size  # bytes; a distance map alone takes 8 a voxel, its transform three times that


def test_wrong_arguments_are_refused():
    mask = np.ones((3, 3, 3), bool)
    with pytest.raises(ValueError, match="boolean"):
        dice(mask.astype(np.uint8), mask)
    with pytest.raises(ValueError, match="one shape"):
        surface_scores(mask, mask[:2], SPACING, 1.0)
    with pytest.raises(ValueError, match="spacing"):
        surface_scores(mask, mask, (1.0, 0.0, 1.0), 1.0)
    for tolerance_mm in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="tolerance"):
            surface_scores(mask, mask, SPACING, tolerance_mm)


def test_bootstrap_agrees_with_scipys():
    values = np.random.default_rng(1).gamma(2.0, 1.0, 40)
    expected = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile").confidence_interval
    assert bootstrap_interval(values, n_boot=20000) == pytest.approx((expected.low, expected.high), abs=0.03)
    wider = bootstrap_interval(values, n_boot=20000, level=0.99)
    assert wider[0] < expected.low < expected.high < wider[1]


def test_whole_patients_are_drawn():
    values = np.random.default_rng(2).normal(size=12)
    repeated, patients = np.repeat(values, 5), np.repeat([f"p{i}" for i in range(12)], 5)
    alone = bootstrap_interval(values)
    # Five copies of a case of the same patient bring no information.
    assert bootstrap_interval(repeated, patients) == pytest.approx(alone, abs=1e-12)
    low, high = bootstrap_interval(repeated)
    assert high - low < 0.6 * (alone[1] - alone[0])


def test_bootstrap_is_repeatable_and_bounded_in_memory(monkeypatch):
    values = np.random.default_rng(3).random(50)
    whole = bootstrap_interval(values, seed=5)
    assert bootstrap_interval(values, seed=5) == whole != bootstrap_interval(values, seed=6)
    monkeypatch.setattr(metrics, "BOOTSTRAP_BLOCK", 1000)
    assert bootstrap_interval(values, seed=5) == pytest.approx(whole, abs=0.02)


def test_bootstrap_of_one_patient_claims_nothing():
    assert all(math.isnan(bound) for bound in bootstrap_interval([0.5, 0.7], ["a", "a"]))
    assert all(math.isnan(bound) for bound in bootstrap_interval([]))
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval([0.5, math.nan])
    with pytest.raises(ValueError, match="groups"):
        bootstrap_interval([0.5, 0.6], ["a"])


def test_summary_counts_what_is_undefined_and_leaves_it_out():
    summary = summarise([0.2, None, 0.9, math.nan, 0.7, math.inf], list("abcdef"))
    assert (summary.n, summary.n_undefined) == (3, 3)
    assert (summary.mean, summary.median) == (pytest.approx(0.6), pytest.approx(0.7))
    assert 0.2 <= summary.low < 0.6 < summary.high <= 0.9
    assert summarise([None, None]) == Summary(None, None, None, None, 0, 2)
    assert summarise([0.4]) == Summary(0.4, 0.4, None, None, 1, 0)


class TestAreaUnderCurve:
    def test_counts_ordered_pairs_with_half_for_ties(self):
        scores, positive = np.array([0.1, 0.4, 0.4, 0.8, 9.0]), np.array([0, 0, 1, 1, np.nan])
        assert area_under_curve(scores, positive) == (1 + 0.5 + 1 + 1) / 4

    def test_one_class_alone_has_none(self):
        assert math.isnan(area_under_curve(np.array([1.0, 2.0]), np.array([1.0, np.nan])))


def test_bootstrap_statistic_agrees_with_the_interval_of_a_mean():
    values = np.random.default_rng(0).normal(size=60)
    low, high = bootstrap_statistic(lambda rows: float(values[rows].mean()), 60)
    expected = bootstrap_interval(values.tolist())
    assert (low, high) == pytest.approx(expected, abs=0.05)


def test_summary_for_a_person():
    assert format_summary({"mean": 0.7312, "low": 0.6, "high": 0.8, "n": 8}) == "0.731 (0.60 to 0.80, n = 8)"
    assert format_summary({"mean": None, "low": None, "high": None, "n": 0}) == "undefined (n = 0)"
