"""What a region is like, in figures: how large, how shaped, how it looks in CT and takes up the tracer in PET.

Definitions are those of the Image Biomarker Standardisation Initiative (IBSI; Zwanenburg et al., Radiology 2020;
295:328-338, and its reference manual, arXiv 1612.07003), whose four-character codes stand beside them. Arrays are
z, y, x. Nothing here depends on how the axes are ordered or turned.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np
from scipy import fft, ndimage
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist

from unicon_pipeline.contract import SpacingZYX
from unicon_pipeline.geometry import GRID_TOLERANCE_MM, Grid, Volume, fields_of_view_overlap, grids_differ_mm, onto_grid

SHAPE = (
    "volume_ml", "surface_mm2", "sphericity", "diameter_mm", "major_axis_mm", "minor_axis_mm", "least_axis_mm",
    "elongation", "flatness", "components",
)  # fmt: skip
UPTAKE = ("suv_max", "suv_mean", "suv_peak", "suv_sd", "suv_cov", "metabolic_volume_ml", "tlg_g")
DENSITY = ("hu_mean", "hu_sd", "hu_p10", "hu_median", "hu_p90")
DESCRIPTORS = SHAPE + UPTAKE + DENSITY

# Positive and skewed to the right, with effects that multiply: a linear model reads their logarithms.
LOGARITHMIC = frozenset(SHAPE + UPTAKE) - {"sphericity", "elongation", "flatness", "suv_cov"}

# The isocontour of the EANM guideline (Boellaard et al., Eur J Nucl Med Mol Imaging 2015; 42:328-354).
METABOLIC_SHARE = 0.41
# A sphere of 1 ml, as for PERCIST's SULpeak (Wahl et al., J Nucl Med 2009; 50 Suppl 1:122S-150S).
PEAK_RADIUS_MM = (3 / (4 * math.pi)) ** (1 / 3) * 10

# Voxels that share a corner are one component, so that the meshes of two components have no cell in common.
_TOUCHING = np.ones((3, 3, 3), bool)

Box = tuple[slice, slice, slice]


def describe_region(mask: Volume, images: Mapping[str, Volume]) -> dict[str, float]:
    """All DESCRIPTORS of a region; NaN where one cannot be known.

    An empty mask has a `volume_ml` of 0 and nothing else. Without a "PET" or "CT" that shows some of the region, its
    figures are NaN; where it shows a part, they are that part's. Other modalities have no unit and give none.

    Shape: `volume_ml` counts voxels (YEKZ). `surface_mm2` is the area (C0JK) of the marching cubes mesh, and
    `sphericity` (QCFX, at most 1) compares it with the volume inside that mesh, which a count would overstate for small
    regions. `diameter_mm`: the longest distance between points of the surface (L0JK). Axes: of the ellipsoid with the
    same second moments, 4 x the square root of the variance of the voxels' centres (TDIC, P9VJ, 7J51), so none of a
    single voxel; `elongation` (Q3CK) and `flatness` (N17B): minor and least relative to major, 1 for a ball.
    `components`: parts that do not even share a corner.

    PET, in SUV: maximum, mean, standard deviation and its ratio to the mean (coefficient of variation, 7TET).
    `suv_peak`: the highest mean of a 1 ml sphere about any voxel of the region, which may reach beyond it (IBSI's
    global intensity peak, 0F91). `metabolic_volume_ml`: the region's voxels with at least 41 % of its maximum. `tlg_g`:
    that volume times its mean SUV (total lesion glycolysis, in g as SUV is g/ml).

    CT, in HU: mean (Q4LE), standard deviation, 10th percentile (QG58), median (Y12H), 90th percentile (8DWT).

    Args:
        mask: not 0 is region; bool or integers (Z, Y, X).
        images: modality -> image in HU or SUV. Best on the grid it was acquired on: brought onto the finer grid of a
            CT, a PET loses of its maximum wherever no new voxel lies at the centre of the hottest. The region goes to
            the image instead, as the voxels with their centre in it, or those that it touches where it holds no centre.
    """
    figures = dict.fromkeys(DESCRIPTORS, math.nan) | {"volume_ml": 0.0}
    found = ndimage.find_objects(np.asarray(mask.array_zyx != 0).view(np.uint8))
    if not found:
        return figures
    region = _cropped(mask, found[0])
    region = Volume(region.array_zyx != 0, region.grid)
    figures |= _shape(region.array_zyx, region.grid.spacing_zyx_mm)
    for modality, describe in (("PET", _uptake), ("CT", _density)):
        if modality in images and (seen := _seen(region, images[modality].grid)) is not None:
            figures |= describe(images[modality], *seen)
    return {name: float(value) for name, value in figures.items()}


def linear_row(descriptors: Mapping[str, float]) -> np.ndarray:
    """The DESCRIPTORS in order, as a linear model reads them, float64 (D,): LOGARITHMIC ones as natural logarithms.

    NaN where one is unknown, or has no logarithm.
    """
    values = np.array([descriptors.get(name, math.nan) for name in DESCRIPTORS], np.float64)
    logarithmic = np.array([name in LOGARITHMIC for name in DESCRIPTORS])
    positive = values > 0
    values[logarithmic & ~positive] = math.nan
    return np.log(values, out=values, where=logarithmic & positive)


def _shape(region_zyx: np.ndarray, spacing_zyx_mm: SpacingZYX) -> dict[str, float]:
    from skimage.measure import marching_cubes  # only here: every prediction would load it

    labelled, components = ndimage.label(region_zyx, _TOUCHING)
    corners, area, enclosed = [], 0.0, 0.0
    for part_zyx, start_zyx in _parts(labelled):
        vertices, faces, _, _ = marching_cubes(np.pad(part_zyx, 1).astype(np.float32), 0.5, spacing=spacing_zyx_mm)
        vertices = vertices.astype(np.float64)
        a, b, c = (vertices[faces[:, corner]] for corner in range(3))
        area += np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2
        enclosed += abs(np.einsum("ni,ni->n", a, np.cross(b, c)).sum()) / 6
        corners.append(vertices[ConvexHull(vertices).vertices] + np.multiply(start_zyx, spacing_zyx_mm))
    points = np.concatenate(corners)
    if components > 1:
        points = points[ConvexHull(points).vertices]
    centres = np.argwhere(region_zyx) * np.asarray(spacing_zyx_mm)
    least = minor = major = math.nan
    if len(centres) > 1:
        variances = np.linalg.eigvalsh(np.cov(centres, rowvar=False))
        # Rounding of what is flat: its logarithm would be an outlier.
        least, minor, major = 4 * np.sqrt(np.where(variances < 1e-9 * variances[-1], 0, variances))
    return {
        "volume_ml": len(centres) * math.prod(spacing_zyx_mm) / 1000,
        "surface_mm2": area,
        "sphericity": (36 * math.pi * enclosed**2) ** (1 / 3) / area,
        "diameter_mm": pdist(points).max(),
        "major_axis_mm": major,
        "minor_axis_mm": minor,
        "least_axis_mm": least,
        "elongation": minor / major,
        "flatness": least / major,
        "components": components,
    }


def _uptake(image: Volume, box: Box, inside_zyx: np.ndarray) -> dict[str, float]:
    values = image.array_zyx[box][inside_zyx].astype(np.float64)
    highest, mean, sd = values.max(), values.mean(), values.std()
    figures = {
        "suv_max": highest,
        "suv_mean": mean,
        "suv_peak": _peak(image, box, inside_zyx),
        "suv_sd": sd,
        "suv_cov": sd / mean if mean > 0 else math.nan,
    }
    if highest > 0:  # without uptake a share of it bounds nothing
        hot, voxel_ml = values[values >= METABOLIC_SHARE * highest], math.prod(image.grid.spacing_zyx_mm) / 1000
        figures |= {"metabolic_volume_ml": len(hot) * voxel_ml, "tlg_g": hot.sum() * voxel_ml}
    return figures


def _density(image: Volume, box: Box, inside_zyx: np.ndarray) -> dict[str, float]:
    values = image.array_zyx[box][inside_zyx].astype(np.float64)
    return dict(zip(DENSITY, (values.mean(), values.std(), *np.percentile(values, (10, 50, 90)))))


def _peak(image: Volume, box: Box, inside_zyx: np.ndarray) -> float:
    """The highest mean over the voxels with their centre within PEAK_RADIUS_MM of a voxel of the region."""
    spacing = image.grid.spacing_zyx_mm
    reach = [int(PEAK_RADIUS_MM / step) for step in spacing]
    offsets = np.ogrid[tuple(slice(-n, n + 1) for n in reach)]
    ball = sum((offset * step) ** 2 for offset, step in zip(offsets, spacing)) <= PEAK_RADIUS_MM**2
    peaks = []
    for part_zyx, start_zyx in _parts(ndimage.label(inside_zyx, _TOUCHING)[0]):
        first = [side.start + start for side, start in zip(box, start_zyx)]
        around = tuple(slice(max(0, a - n), a + size + n) for a, size, n in zip(first, part_zyx.shape, reach))
        values = image.array_zyx[around].astype(np.float64)
        centre = tuple(slice(a - side.start, a - side.start + n)
                       for a, side, n in zip(first, around, part_zyx.shape))  # fmt: skip
        sums, counts = _sums_over(ball, values, np.ones_like(values))
        # The image may end within the sphere: then the mean is over what there is.
        peaks.append((sums[centre][part_zyx] / np.rint(counts[centre][part_zyx])).max())
    return max(peaks)


def _sums_over(ball: np.ndarray, *arrays: np.ndarray) -> Iterator[np.ndarray]:
    """Around each voxel, the sum over the voxels of a symmetric `ball` (odd sides); 0 beyond the array."""
    shape = [fft.next_fast_len(size + side - 1, real=True) for size, side in zip(arrays[0].shape, ball.shape)]
    spectrum = fft.rfftn(ball.astype(np.float64), shape)
    same = tuple(slice(side // 2, side // 2 + size) for size, side in zip(arrays[0].shape, ball.shape))
    return (fft.irfftn(fft.rfftn(array, shape) * spectrum, shape)[same] for array in arrays)


def _parts(labelled_zyx: np.ndarray) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
    """Each component in its own box, so that a stray voxel far away costs nothing; and where the box begins."""
    for number, box in enumerate(ndimage.find_objects(labelled_zyx), start=1):
        yield labelled_zyx[box] == number, tuple(side.start for side in box)


def _seen(region: Volume, grid: Grid) -> tuple[Box, np.ndarray] | None:
    """A box of `grid` around the region, and which of its voxels are region (bool); None where it shows none of it."""
    to_grid = np.linalg.inv(grid.affine) @ region.grid.affine
    ends = [(-0.5, size - 0.5) for size in region.grid.shape_zyx[::-1]]
    corners = np.array([(*corner, 1.0) for corner in itertools.product(*ends)]) @ to_grid.T
    low = np.maximum(np.floor(corners[:, 2::-1].min(axis=0) + 0.5 + 1e-3).astype(int), 0)
    high = np.minimum(np.ceil(corners[:, 2::-1].max(axis=0) + 0.5 - 1e-3).astype(int), grid.shape_zyx)
    if (low >= high).any():
        return None
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high))
    part = _part_of(grid, box)
    if grids_differ_mm(part, region.grid) <= GRID_TOLERANCE_MM:
        return box, region.array_zyx
    if not fields_of_view_overlap(part, region.grid):
        return None
    inside = onto_grid(Volume(region.array_zyx.view(np.uint8), region.grid), part, 0.0, nearest=True).array_zyx != 0
    if not inside.any():
        centres = np.argwhere(region.array_zyx)[:, ::-1] @ to_grid[:3, :3].T + to_grid[:3, 3]
        touched = np.rint(centres[:, ::-1]).astype(int) - low
        touched = touched[((touched >= 0) & (touched < inside.shape)).all(axis=1)]
        inside[tuple(touched.T)] = True
    return (box, inside) if inside.any() else None


def _cropped(volume: Volume, box: Box) -> Volume:
    return Volume(volume.array_zyx[box], _part_of(volume.grid, box))


def _part_of(grid: Grid, box: Box) -> Grid:
    corner = (grid.affine @ (*(side.start for side in box[::-1]), 1))[:3]
    shape = tuple(side.stop - side.start for side in box)
    return dataclasses.replace(grid, shape_zyx=shape, origin_xyz_mm=tuple(corner.tolist()))
