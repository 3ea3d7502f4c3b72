"""Resizing on axis-aligned grids: one small matrix per axis.

A spline resize of whatever order is linear and separable, so the 1-D resize of the identity holds all there
is to know about an axis, and matrix products do the rest. The rules (when an axis is handled on its own, how
labels are decided, how shapes are rounded) are those of nnU-Net and its batchgenerators (0.25.5).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import ndimage

from unicon_pipeline.contract import ZYX, SpacingZYX

ANISOTROPY = 3.0  # an axis this many times coarser than the finest one is resampled on its own

# Shares of one voxel that differ by less are equal: float32 products are exact only to within this.
_TIE = 1e-6


@lru_cache(maxsize=128)
def axis_matrix(n_in: int, n_out: int, order: int) -> np.ndarray:
    """The matrix that resizes a line of `n_in` samples to `n_out`: float32, shape (n_out, n_in), read-only.

    Voxel edges are aligned and values beyond the edge repeat, as in
    `skimage.transform.resize(mode="edge", anti_aliasing=False)`. Order 0 takes the nearest sample.
    """
    if order == 0:
        matrix = np.zeros((n_out, n_in), dtype=np.float32)
        matrix[np.arange(n_out), _nearest(n_in, n_out)] = 1
    elif n_in == n_out:
        matrix = np.eye(n_in, dtype=np.float32)
    else:
        # zoom is asked for columns one voxel apart and unchanged, so it works along the first axis alone.
        zoomed = ndimage.zoom(np.eye(n_in), (n_out / n_in, 1), order=order, mode="nearest", grid_mode=True)
        matrix = zoomed.astype(np.float32)
    matrix.setflags(write=False)
    return matrix


def resize(array_czyx: np.ndarray, shape_zyx: ZYX, orders: ZYX = (3, 3, 3), clip: bool = True) -> np.ndarray:
    """Resizes every channel; returns a new contiguous float32 array of shape (C, *shape_zyx).

    Args:
        orders: spline order per axis (z, y, x); 0 is nearest.
        clip: keeps each channel within the range of its input, since cubic splines overshoot. Where an axis has
            order 0, each of its slices keeps its own range, because nnU-Net resizes slice by slice then.

    Memory beyond input and output: two intermediates of one channel, none larger than input and output together.
    """
    source_zyx = array_czyx.shape[1:]
    result = np.empty((len(array_czyx), *shape_zyx), dtype=np.float32)
    if source_zyx == tuple(shape_zyx):
        result[:] = array_czyx
        return result
    for channel, out in zip(array_czyx, result, strict=True):
        _resize_channel(np.ascontiguousarray(channel, dtype=np.float32), out, orders)
        if clip:
            _clip_to_source(channel, out, orders)
    return result


def resize_labels(array_zyx: np.ndarray, shape_zyx: ZYX, orders: ZYX) -> np.ndarray:
    """Resizes a label map to a new int16 array of `shape_zyx`: the label with the largest share of a voxel gets it.

    Each label's indicator is resized with `orders` (z, y, x; 1 is linear, 0 nearest). Labels whose shares are equal
    leave the voxel to the nearest one, or else to the smallest of them. The work for a label is limited to where
    it can be.
    """
    labels = np.asarray(array_zyx).astype(np.int16)
    if labels.shape == tuple(shape_zyx):
        return labels
    nearest = labels
    for axis, order in enumerate(orders):
        places = _nearest(labels.shape[axis], shape_zyx[axis])
        nearest = nearest.take(places, axis=axis)
        if order == 0:
            labels = labels.take(places, axis=axis)
    result = np.zeros(shape_zyx, np.int16)
    best, background = np.zeros(shape_zyx, np.float32), np.ones(shape_zyx, np.float32)
    for index, box in enumerate(ndimage.find_objects(np.ascontiguousarray(labels))):
        if box is None:
            continue
        matrices, target = _restricted(labels.shape, shape_zyx, orders, box)
        if not all(map(len, matrices)):  # it lies between the samples of a coarser grid
            continue
        share = (labels[box] == index + 1).astype(np.float32)
        for axis in sorted(range(3), key=lambda a: matrices[a].shape[0] / matrices[a].shape[1]):
            share = _apply(matrices[axis], share, axis)
        lead = share - best[target]
        result[target][(lead > _TIE) | ((lead >= -_TIE) & (share > _TIE) & (nearest[target] == index + 1))] = index + 1
        np.maximum(best[target], share, out=best[target])
        background[target] -= share
    lead = background - best
    result[(lead > _TIE) | ((lead >= -_TIE) & (result != nearest))] = 0
    return result


def needs_separate_axis(spacing_a: SpacingZYX, spacing_b: SpacingZYX) -> int | None:
    """The axis (0 z, 1 y, 2 x) to resample on its own, or None.

    It is the coarsest axis of the first spacing (mm) whose coarsest and finest axes differ more than threefold;
    None if neither does, or if the coarsest is shared by two axes.
    """
    for spacing in (spacing_a, spacing_b):
        if max(spacing) / min(spacing) > ANISOTROPY:
            coarsest = [axis for axis in range(3) if spacing[axis] == max(spacing)]
            return coarsest[0] if len(coarsest) == 1 else None
    return None


def axis_orders(
    current_spacing: SpacingZYX, target_spacing: SpacingZYX, order: int, anisotropic_order: int = 0
) -> tuple[int, int, int]:
    """Spline order per axis (z, y, x): `order`, but `anisotropic_order` for an axis that is resampled on its own."""
    separate = needs_separate_axis(current_spacing, target_spacing)
    z, y, x = (anisotropic_order if axis == separate else order for axis in range(3))
    return z, y, x


def resized_shape(shape_zyx: ZYX, spacing: SpacingZYX, new_spacing: SpacingZYX) -> ZYX:
    """The shape at `new_spacing` of an image of `shape_zyx` at `spacing` (mm), rounded; at least one voxel an axis."""
    z, y, x = (
        max(1, round(old / new * size)) for old, new, size in zip(spacing, new_spacing, shape_zyx, strict=True)
    )
    return z, y, x


def _nearest(n_in: int, n_out: int) -> np.ndarray:
    centres = n_in / n_out * (np.arange(n_out) + 0.5) - 0.5
    return np.clip(np.floor(centres + 0.5).astype(np.intp), 0, n_in - 1)


def _apply(matrix: np.ndarray, array_zyx: np.ndarray, axis: int, out: np.ndarray | None = None) -> np.ndarray:
    """`matrix` applied along one axis of a contiguous array; the result is contiguous as well."""
    z, y, x = array_zyx.shape
    if axis == 0:
        flat = np.matmul(matrix, array_zyx.reshape(z, y * x), out=None if out is None else out.reshape(-1, y * x))
        return flat.reshape(-1, y, x)
    if axis == 1:
        return np.matmul(matrix, array_zyx, out=out)
    rows = np.matmul(array_zyx.reshape(z * y, x), matrix.T, out=None if out is None else out.reshape(z * y, -1))
    return rows.reshape(z, y, -1)


def _resize_channel(source_zyx: np.ndarray, out_zyx: np.ndarray, orders: ZYX) -> None:
    steps = []
    for axis, order in enumerate(orders):
        n_in, n_out = source_zyx.shape[axis], out_zyx.shape[axis]
        if n_in != n_out:
            steps.append((n_out / n_in, axis, order))
    steps.sort()  # the strongest shrink first: less is left for the others
    current = source_zyx
    for position, (_, axis, order) in enumerate(steps):
        out = out_zyx if position == len(steps) - 1 else None
        n_in, n_out = source_zyx.shape[axis], out_zyx.shape[axis]
        if order == 0:
            current = np.take(current, _nearest(n_in, n_out), axis=axis, out=out, mode="clip")
        else:
            current = _apply(axis_matrix(n_in, n_out, order), current, axis, out)


def _clip_to_source(source_zyx: np.ndarray, out_zyx: np.ndarray, orders: ZYX) -> None:
    interpolated = tuple(axis for axis in range(3) if orders[axis] > 0)
    if not interpolated:
        return
    low = source_zyx.min(axis=interpolated, keepdims=True)
    high = source_zyx.max(axis=interpolated, keepdims=True)
    for axis in range(3):
        if orders[axis] == 0:
            nearest = _nearest(source_zyx.shape[axis], out_zyx.shape[axis])
            low, high = low.take(nearest, axis=axis), high.take(nearest, axis=axis)
    np.clip(out_zyx, low, high, out=out_zyx)


def _restricted(
    source_shape: ZYX, target_shape: ZYX, orders: ZYX, box: tuple[slice, ...]
) -> tuple[list[np.ndarray], tuple[slice, ...]]:
    """The axis matrices cut to the columns of `box` and the rows that these reach, and those rows as slices."""
    matrices, target = [], []
    for axis in range(3):
        if orders[axis] == 0:  # already taken from the nearest slices
            matrix = np.eye(target_shape[axis], dtype=np.float32)[:, box[axis]]
        else:
            matrix = axis_matrix(source_shape[axis], target_shape[axis], orders[axis])[:, box[axis]]
        rows = np.flatnonzero(matrix.any(axis=1))
        span = slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 0)
        matrices.append(np.ascontiguousarray(matrix[span]))
        target.append(span)
    return matrices, tuple(target)
