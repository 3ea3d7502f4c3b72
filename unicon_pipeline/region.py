"""The region that a case-level task looks at: which voxels it is, and the box that it lies in. Arrays are z, y, x."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from unicon_pipeline.dataset import Case, Labels, check_labels
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.geometry import GRID_TOLERANCE_MM, Grid, Volume, grids_differ_mm, onto_grid, read_labels
from unicon_pipeline.resize import z_slabs

REGION = Labels(("region",), ((1,),), False, (1,), None)  # how masks are labelled

_STRAY_SHARE = 0.005  # of the voxels, at either end of each axis

Box = tuple[slice, slice, slice]


def region_mask(case: Case, grid: Grid, labels: Labels | None, found: Path | None = None) -> Volume | None:
    """A case's region on `grid`, uint8, 1 = region: any output of its label map, else what a model has found.

    Args:
        grid: of the case's first image.
        labels: what the case's label map holds.
        found: a label map, on any grid, that the model's segmentation task has written; not 0 is region.

    Returns:
        None where the case has neither.

    Raises:
        DatasetError: as `check_labels`; or the file is unusable, or shares no space with the image.
    """
    if labels is not None and case.labels is not None:
        volume = check_labels(case, grid, labels)
        wanted = sorted({value for values in labels.values for value in values})
        mask = np.empty(volume.array_zyx.shape, np.uint8)
        for rows in z_slabs(mask.shape):  # isin makes 64-bit copies
            mask[rows] = np.isin(volume.array_zyx[rows], wanted)
        return Volume(mask, volume.grid)
    return None if found is None else found_region(found, grid)


def found_region(path: Path, grid: Grid) -> Volume:
    """As `region_mask`, of a label map that a model has written."""
    volume = read_labels(path)
    try:
        return as_region(volume, grid)
    except DatasetError as problem:
        raise DatasetError(f"{path}: {problem}") from problem


def as_region(labels: Volume, grid: Grid) -> Volume:
    """A label map of any grid as a mask on `grid`, uint8: 1 where it is not 0, nearest.

    Raises:
        DatasetError: they share no space.
    """
    mask = Volume((labels.array_zyx != 0).view(np.uint8), labels.grid)
    return onto_grid(mask, grid, 0.0, nearest=True) if grids_differ_mm(mask.grid, grid) > GRID_TOLERANCE_MM else mask


def bulk_box(slabs: Iterable[np.ndarray]) -> Box | None:
    """The box (z, y, x slices) that a region fills, without the outermost half percent of its voxels at either end of
    each axis: a few stray voxels in a mask that was predicted neither move nor widen it.

    Args:
        slabs: all planes of a mask (bool, or 0 and 1), some at a time.

    Returns:
        None where there is no region.
    """
    planes, rows, columns = [], 0, 0
    for slab in slabs:
        planes.append(slab.sum(axis=(1, 2), dtype=np.int64))
        flat = slab.sum(axis=0, dtype=np.int64)
        rows, columns = rows + flat.sum(axis=1), columns + flat.sum(axis=0)
    below = [np.cumsum(line) for line in (np.concatenate(planes), rows, columns)]
    if not below[0][-1]:
        return None
    stray = _STRAY_SHARE * below[0][-1]
    z, y, x = (slice(int((line > stray).argmax()), int((line >= line[-1] - stray).argmax()) + 1) for line in below)
    return z, y, x
