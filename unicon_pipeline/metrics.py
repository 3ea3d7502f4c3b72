"""How good a result is, as numbers: overlap, surface distances, volumes, and intervals over patients.

Masks are boolean arrays in z, y, x. What cannot be computed is NaN here, never a made-up number, and
`summarise` counts it. Surface metrics are those of DeepMind's `surface-distance`, whose surface elements
are weighted by their area, as the definition of the normalised surface distance asks. It places them
on the grid of voxel corners, so a distance is exact to about a voxel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import surface_distance
from scipy import ndimage
from scipy.spatial import cKDTree
from surface_distance import lookup_tables

from unicon_pipeline.contract import SpacingZYX

# Distances are whole voxel steps, so many equal the tolerance: a 2 mm spacing stored as 2.0000001 must not
# push them out of it.
SPACING_ROUNDING_MM = 1e-4

# Resamples x groups held at once: bounds the memory of a bootstrap over very many patients.
BOOTSTRAP_BLOCK = 4_000_000


@dataclass(frozen=True)
class Summary:
    """One metric over the cases.

    `low` and `high` bound the mean (95 % percentile bootstrap over patients); None with fewer than two
    patients. `n` cases had a value; `n_undefined` had none, and are in neither mean nor median.
    """

    mean: float | None
    median: float | None
    low: float | None
    high: float | None
    n: int
    n_undefined: int


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Dice overlap of two boolean masks (z, y, x), 0 to 1.

    NaN when both are empty (nothing to find, nothing found); 0 when one is.

    Raises:
        ValueError: not boolean 3-D arrays of one shape.
    """
    _check_masks(prediction, reference)
    total = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    if total == 0:
        return math.nan
    return 2.0 * int(np.count_nonzero(prediction & reference)) / total


def surface_scores(
    prediction: np.ndarray, reference: np.ndarray, spacing_zyx_mm: SpacingZYX, tolerance_mm: float
) -> tuple[float, float]:
    """Normalised surface distance (0 to 1) at a tolerance, and the 95th percentile Hausdorff distance in mm.

    The former is the share of both surfaces' area that lies within `tolerance_mm` of the other surface.
    The latter is the larger of the two directions' area-weighted 95th percentiles. The image border
    closes a mask. Only the masks' surroundings matter: cropping both to their common bounding box
    changes nothing, and a crop is what makes large images fast.

    Returns:
        (nsd, hd95_mm). Both masks empty: (NaN, NaN). One empty: (0, NaN), as no distance exists.

    Raises:
        ValueError: not boolean 3-D arrays of one shape, or a spacing or tolerance out of range.
    """
    _check_masks(prediction, reference)
    if len(spacing_zyx_mm) != 3 or not all(0 < step < math.inf for step in spacing_zyx_mm):
        raise ValueError(f"The spacing must be three positive numbers (z, y, x in mm), not {spacing_zyx_mm}.")
    if not 0 <= tolerance_mm < math.inf:
        raise ValueError(f"The tolerance must be a finite number of mm, at least 0, not {tolerance_mm}.")
    empty_masks = int(not prediction.any()) + int(not reference.any())
    if empty_masks:
        return (math.nan if empty_masks == 2 else 0.0), math.nan
    distances = _surface_distances(prediction, reference, spacing_zyx_mm)
    nsd = surface_distance.compute_surface_dice_at_tolerance(distances, tolerance_mm + SPACING_ROUNDING_MM)
    return float(nsd), float(surface_distance.compute_robust_hausdorff(distances, 95.0))


def volume_ml(mask: np.ndarray, spacing_zyx_mm: SpacingZYX) -> float:
    """Volume of a boolean mask (z, y, x) in millilitres."""
    return int(np.count_nonzero(mask)) * math.prod(spacing_zyx_mm) / 1000.0


def bootstrap_interval(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`.

    Args:
        values: one finite number a case.
        groups: the patient of each value. Whole patients are drawn, since the cases of one patient
            resemble each other and drawing them singly would make the interval too narrow. Without it
            every value is its own patient.
        level: the share of resampled means inside the interval.

    Returns:
        (low, high); (NaN, NaN) with fewer than two patients, as one shows no spread.

    Raises:
        ValueError: values and groups of different lengths, or a value that is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    labels = list(range(len(array))) if groups is None else list(groups)
    if array.ndim != 1 or len(labels) != len(array):
        raise ValueError(f"Expected as many groups as values, found {len(labels)} and {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError("A bootstrap needs finite values: leave undefined ones out before.")
    index_of = {label: index for index, label in enumerate(dict.fromkeys(labels))}
    if len(index_of) < 2:
        return math.nan, math.nan
    members = np.array([index_of[label] for label in labels])
    sums, counts = np.bincount(members, weights=array), np.bincount(members).astype(np.float64)
    generator = np.random.default_rng(seed)
    means, block = [], max(1, BOOTSTRAP_BLOCK // len(sums))
    for start in range(0, n_boot, block):
        drawn = generator.integers(len(sums), size=(min(block, n_boot - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarise(values: Sequence[float | None], groups: Sequence[Hashable] | None = None, seed: int = 0) -> Summary:
    """Mean, its interval, median and counts of one metric; None, NaN and infinite values are undefined.

    Args:
        groups: the patient of each value, see `bootstrap_interval`.
    """
    labels = list(range(len(values))) if groups is None else list(groups)
    defined = [(v, g) for v, g in zip(values, labels, strict=True) if v is not None and math.isfinite(v)]
    if not defined:
        return Summary(None, None, None, None, 0, len(values))
    array = np.array([value for value, _ in defined], dtype=np.float64)
    low, high = bootstrap_interval(array, [group for _, group in defined], seed=seed)
    return Summary(
        mean=float(array.mean()),
        median=float(np.median(array)),
        low=finite_or_none(low),
        high=finite_or_none(high),
        n=len(array),
        n_undefined=len(values) - len(array),
    )


def format_summary(summary: Mapping[str, Any]) -> str:
    """A summary as written to JSON, for a person: "0.731 (0.62 to 0.81, n = 8)"."""
    if summary["mean"] is None:
        return f"undefined (n = {summary['n']})"
    interval = "" if summary["low"] is None else f"{summary['low']:.2f} to {summary['high']:.2f}, "
    return f"{summary['mean']:.3f} ({interval}n = {summary['n']})"


def bootstrap_statistic(
    statistic: Callable[[np.ndarray], float], n: int, n_boot: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic that is no mean; it gets the row numbers drawn from 0..n-1.

    Draws for which the statistic is undefined (NaN) are left out; (NaN, NaN) if it always is, or for n < 2.
    """
    generator = np.random.default_rng(seed)
    drawn = np.array([statistic(generator.integers(n, size=n)) for _ in range(n_boot)])
    drawn = drawn[np.isfinite(drawn)]
    if n < 2 or not len(drawn):
        return math.nan, math.nan
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float:
    """ROC AUC (the Mann-Whitney statistic, ties count one half); NaN where one class is missing.

    Args:
        scores: (n,), higher = more likely positive.
        positive: (n,) with 1, 0, or NaN for cases to leave out.
    """
    high, low = scores[positive == 1], scores[positive == 0]
    if not len(high) or not len(low):
        return math.nan
    from scipy.stats import mannwhitneyu  # only here: it takes a third of a second to load

    return float(mannwhitneyu(high, low).statistic) / (len(high) * len(low))


def resample_counts(patients: Sequence[Hashable], resamples: int, seed: int) -> Iterator[np.ndarray]:
    """(resamples, n) how often each case is in a resample of whole patients, in blocks of bounded size.

    `patients`: of each of the n cases. None of one patient, which shows no spread.
    """
    index_of = {label: index for index, label in enumerate(dict.fromkeys(patients))}
    members = np.array([index_of[label] for label in patients], dtype=np.intp)
    generator, block = np.random.default_rng(seed), max(1, BOOTSTRAP_BLOCK // max(len(members), 1))
    for start in range(0, resamples if len(index_of) > 1 else 0, block):
        share = np.full(len(index_of), 1 / len(index_of))
        drawn = generator.multinomial(len(index_of), share, size=min(block, resamples - start))
        yield drawn[:, members].astype(np.float64)


def ratio(part: np.ndarray, whole: np.ndarray, otherwise: float = math.nan) -> np.ndarray:
    """part / whole where whole is above 0, else `otherwise`."""
    shape = np.broadcast_shapes(np.shape(part), np.shape(whole))
    return np.divide(part, whole, out=np.full(shape, otherwise), where=np.broadcast_to(whole > 0, shape))


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN: what is undefined is written as null."""
    return float(value) if math.isfinite(value) else None


def _surface_distances(
    prediction: np.ndarray, reference: np.ndarray, spacing_zyx_mm: SpacingZYX
) -> dict[str, np.ndarray]:
    """What `surface_distance.compute_surface_distances` returns, for two masks that are not empty.

    The library's own function fills the box around both masks with distances: gigabytes, and half a minute, as
    soon as one stray voxel lies far away. Here only surface points look for their neighbours.
    """
    points, areas = _surface_elements(reference, spacing_zyx_mm)
    other_points, other_areas = _surface_elements(prediction, spacing_zyx_mm)
    result = {}
    for direction, side, here, there, weights in (
        ("gt_to_pred", "gt", points, other_points, areas),
        ("pred_to_gt", "pred", other_points, points, other_areas),
    ):
        distances = cKDTree(there).query(here)[0]
        order = np.argsort(distances, kind="stable")
        result[f"distances_{direction}"] = distances[order]
        result[f"surfel_areas_{side}"] = weights[order]
    return result


def _surface_elements(mask: np.ndarray, spacing_zyx_mm: SpacingZYX) -> tuple[np.ndarray, np.ndarray]:
    """Voxel corners on the surface, (n, 3) in mm, and the area that each stands for, (n,) in mm2."""
    padded = np.pad(mask, 1).astype(np.uint8)
    # Which of a corner's eight voxels are inside, as one byte; the library's table gives that byte's area.
    codes = ndimage.correlate(padded, lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL, mode="constant")
    surface = (codes != 0) & (codes != 255)
    table = lookup_tables.create_table_neighbour_code_to_surface_area(spacing_zyx_mm)
    return np.argwhere(surface) * np.asarray(spacing_zyx_mm), table[codes[surface]]


def _check_masks(prediction: np.ndarray, reference: np.ndarray) -> None:
    if prediction.dtype != bool or reference.dtype != bool:
        raise ValueError(f"Masks must be boolean, not {prediction.dtype} and {reference.dtype}.")
    if prediction.ndim != 3 or prediction.shape != reference.shape:
        raise ValueError(f"Masks must be 3-D of one shape, not {prediction.shape} and {reference.shape}.")
