"""Resizing on axis-aligned grids: one small matrix per axis, applied slab by slab.

A spline resize of whatever order is linear and separable, so the 1-D resize of the identity holds all there is to know
about an axis, and matrix products do the rest. A sample's influence fades within some voxels, so a few rows of a matrix
need a few columns only, and a volume passes through as a stream of planes. The rules (when an axis is handled on its
own, how shapes are rounded) are those of nnU-Net.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from unicon_pipeline.contract import ZYX, SpacingZYX

ANISOTROPY = 3.0  # an axis this many times coarser than the finest one is resampled on its own

_NO_WEIGHT = 1e-8  # float32 holds no more of a sum: 14 voxels from its centre, a cubic spline is below
_ROWS = 16  # rows of a matrix that are applied together
_SLAB_VOXELS = 1 << 20


@lru_cache(maxsize=16)
def axis_matrix(n_in: int, n_out: int, order: int) -> np.ndarray:
    """The matrix that resizes a line of `n_in` samples to `n_out`: float32, shape (n_out, n_in), read-only.

    Voxel edges are aligned and values beyond the edge repeat, as in
    `skimage.transform.resize(mode="edge", anti_aliasing=False)`. Order 0 takes the nearest sample.
    """
    if order == 0:
        matrix = np.zeros((n_out, n_in), dtype=np.float32)
        matrix[np.arange(n_out), nearest_samples(n_in, n_out)] = 1
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
    """
    result = np.empty((len(array_czyx), *shape_zyx), dtype=np.float32)
    for channel, out in zip(array_czyx, result, strict=True):
        slabs = (np.ascontiguousarray(channel[rows], dtype=np.float32) for rows in z_slabs(channel.shape))
        resize_stream(slabs, channel.shape, out, orders, clip)
    return result


def resize_stream(
    slabs: Iterable[np.ndarray], source_zyx: ZYX, out_zyx: np.ndarray, orders: ZYX = (3, 3, 3), clip: bool = True
) -> None:
    """As `resize`, of one channel whose planes come one slab after the other, into a contiguous float32 array.

    Args:
        slabs: contiguous float32 arrays (some planes, y, x), in order; together a volume of shape `source_zyx`. None
            has more planes than the first.

    Memory beyond the result is that of a few slabs, however large the volume is.
    """
    if source_zyx == out_zyx.shape:
        clip = False
    limits = _Limits(source_zyx, orders) if clip and max(orders) > 1 else None
    stream = iter(slabs if limits is None else limits.watch(slabs))
    ratios = [m / n for n, m in zip(source_zyx, out_zyx.shape, strict=True)]
    blocks = [_blocks(n, m, order) for n, m, order in zip(source_zyx, out_zyx.shape, orders, strict=True)]
    # The strongest shrink first: less is left for the others.
    in_plane = sorted((ratios[axis], axis) for axis in (1, 2) if source_zyx[axis] != out_zyx.shape[axis])
    same_z = source_zyx[0] == out_zyx.shape[0]
    before = [(axis, blocks[axis]) for ratio, axis in in_plane if ratio <= ratios[0] and not same_z]
    after = [(axis, blocks[axis]) for ratio, axis in in_plane if ratio > ratios[0] or same_z]
    slabs = (_applied(slab, before) for slab in stream)
    for rows, planes, along_z in _unchanged(slabs) if same_z else _windows(slabs, blocks[0]):
        _applied(planes, [*along_z, *after], out_zyx[rows])
    for _ in stream:  # planes that nothing is made of count for the range
        pass
    if limits is not None:
        limits.apply(out_zyx)


def z_slabs(shape_zyx: ZYX) -> Iterator[slice]:
    """Ranges of planes of about a million voxels: what is done slab by slab needs little memory besides."""
    planes, y, x = shape_zyx
    height = max(1, _SLAB_VOXELS // max(1, y * x))
    return (slice(start, min(start + height, planes)) for start in range(0, planes, height))


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


def sample_centres(n_in: int, n_out: int) -> np.ndarray:
    """Where the output samples lie between the input's, whose number 0 is at 0."""
    return n_in / n_out * (np.arange(n_out) + 0.5) - 0.5


def nearest_samples(n_in: int, n_out: int) -> np.ndarray:
    """The input sample that is nearest to each output sample; half-way the later one."""
    return np.clip(np.floor(sample_centres(n_in, n_out) + 0.5).astype(np.intp), 0, n_in - 1)


@dataclass(frozen=True)
class _Block:
    """Output `rows` are made of input `columns`: by a matrix (rows, columns), or picked by index (1-D)."""

    rows: slice
    columns: slice
    weights: np.ndarray


_Steps = list[tuple[int, tuple[_Block, ...]]]  # axis, and all blocks along it


@lru_cache(maxsize=128)
def _blocks(n_in: int, n_out: int, order: int) -> tuple[_Block, ...]:
    blocks = []
    for start in range(0, n_out, _ROWS):
        rows = slice(start, min(start + _ROWS, n_out))
        if order == 0 or n_in == n_out:
            places = nearest_samples(n_in, n_out)[rows]
            columns, weights = slice(int(places[0]), int(places[-1]) + 1), places - places[0]
        else:
            matrix = axis_matrix(n_in, n_out, order)[rows]
            used = np.flatnonzero((np.abs(matrix) > _NO_WEIGHT).any(axis=0))
            columns = slice(int(used[0]), int(used[-1]) + 1)
            weights = np.ascontiguousarray(matrix[:, columns])
        blocks.append(_Block(rows, columns, weights))
    return tuple(blocks)


def _applied(array_zyx: np.ndarray, steps: _Steps, out_zyx: np.ndarray | None = None) -> np.ndarray:
    """A contiguous array after all `steps`, the last of which goes to `out_zyx`."""
    for number, (axis, blocks) in enumerate(steps, start=1):
        if number == len(steps) and out_zyx is not None:
            out = out_zyx
        else:
            shape = list(array_zyx.shape)
            shape[axis] = blocks[-1].rows.stop
            out = np.empty(shape, np.float32)
        for block in blocks:
            _apply(block, array_zyx, axis, out)
        array_zyx = out
    if out_zyx is not None and not steps:
        out_zyx[...] = array_zyx
    return array_zyx


def _apply(block: _Block, array_zyx: np.ndarray, axis: int, out_zyx: np.ndarray) -> None:
    if axis == 2:
        source = array_zyx.reshape(-1, array_zyx.shape[2])[:, block.columns]
        target = out_zyx.reshape(-1, out_zyx.shape[2])[:, block.rows]
    elif axis == 1:
        source, target = array_zyx[:, block.columns], out_zyx[:, block.rows]
    else:
        source = array_zyx.reshape(len(array_zyx), -1)[block.columns]
        target = out_zyx.reshape(len(out_zyx), -1)[block.rows]
    if block.weights.ndim == 1:
        target[...] = source.take(block.weights, axis=min(axis, 1))
    elif axis == 2:
        np.matmul(source, block.weights.T, out=target)
    else:
        np.matmul(block.weights, source, out=target)


def _unchanged(slabs: Iterable[np.ndarray]) -> Iterator[tuple[slice, np.ndarray, _Steps]]:
    """As `_windows`, where z is not resized."""
    start = 0
    for slab in slabs:
        yield slice(start, start + len(slab)), slab, []
        start += len(slab)


def _windows(slabs: Iterable[np.ndarray], blocks: tuple[_Block, ...]) -> Iterator[tuple[slice, np.ndarray, _Steps]]:
    """Yields rows of the output, the planes that they are made of (a view that holds until the next), and how."""
    waiting = iter(blocks)
    block = next(waiting)
    buffer, first, held = None, 0, 0
    for slab in slabs:
        if buffer is None:
            widest = max(one.columns.stop - one.columns.start for one in blocks)
            buffer = np.empty((widest + len(slab), *slab.shape[1:]), np.float32)
            flat, plane = buffer.reshape(-1), slab[0].size
        gone = min(held, block.columns.start - first)
        first, held = first + gone, held - gone
        if gone:  # moved as a flat array, which numpy does without a copy
            flat[: held * plane] = flat[gone * plane : (gone + held) * plane]
        buffer[held : held + len(slab)] = slab
        held += len(slab)
        while block.columns.stop <= first + held:
            planes = buffer[block.columns.start - first : block.columns.stop - first]
            alone = _Block(slice(0, block.rows.stop - block.rows.start), slice(0, len(planes)), block.weights)
            yield block.rows, planes, [(0, (alone,))]
            block = next(waiting, None)
            if block is None:
                return


class _Limits:
    """The range of a channel, or of each slice along an axis of order 0."""

    def __init__(self, source_zyx: ZYX, orders: ZYX):
        self._interpolated = tuple(axis for axis in range(3) if orders[axis] > 0)
        shape = [1 if orders[axis] else source_zyx[axis] for axis in range(3)]
        self._source_zyx, self._by_plane = source_zyx, orders[0] == 0
        self._low, self._high = np.full(shape, np.inf, np.float32), np.full(shape, -np.inf, np.float32)

    def watch(self, slabs: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        start = 0
        for slab in slabs:
            rows = slice(start, start + len(slab)) if self._by_plane else slice(None)
            start += len(slab)
            for limit, extreme in ((self._low, np.minimum), (self._high, np.maximum)):
                extreme(limit[rows], extreme.reduce(slab, axis=self._interpolated, keepdims=True), out=limit[rows])
            yield slab

    def apply(self, out_zyx: np.ndarray) -> None:
        low, high = self._low, self._high
        for axis in range(3):
            if axis not in self._interpolated:
                nearest = nearest_samples(self._source_zyx[axis], out_zyx.shape[axis])
                low, high = low.take(nearest, axis=axis), high.take(nearest, axis=axis)
        np.clip(out_zyx, low, high, out=out_zyx)
