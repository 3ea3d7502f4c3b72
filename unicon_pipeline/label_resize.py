"""Resizing label maps: the label with the largest share of a voxel gets it.

By nnU-Net's rule each label's indicator is resized linearly. Most voxels lie where all samples around have one label,
and for the others the share of a label is the sum of the weights of those samples (eight at most) that have it: no
label is ever resized as a volume.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from unicon_pipeline.contract import ZYX
from unicon_pipeline.resize import nearest_samples, sample_centres, z_slabs

_MANY = 0.35  # where labels meet in a larger part of a slab, it is quicker to compute all of it
_AT_ONCE = 1 << 17  # what is computed for so many voxels stays in the cache

# Shares of one voxel that differ by less are equal: float32 sums are exact only to within this.
_TIE = 1e-6


def resize_labels(array_zyx: np.ndarray, shape_zyx: ZYX, orders: ZYX) -> np.ndarray:
    """Resizes a label map, in its own type: the label with the largest share of a voxel gets it.

    Each label's indicator is resized with `orders` (z, y, x; 1 is linear, 0 nearest). Labels whose shares are equal
    leave the voxel to the nearest one, or else to the smallest of them. Shares are computed only where labels meet.
    An array that has the shape already is returned as it is.
    """
    if array_zyx.shape == tuple(shape_zyx):
        return array_zyx
    lines = [_Line.between(n, m, order) for n, m, order in zip(array_zyx.shape, shape_zyx, orders, strict=True)]
    result = np.empty(shape_zyx, array_zyx.dtype)
    for rows in z_slabs(shape_zyx):
        along_z, planes = lines[0].part(rows)
        _resize_label_slab(np.ascontiguousarray(array_zyx[planes]), result[rows], (along_z, *lines[1:]))
    return result


@dataclass(frozen=True)
class _Line:
    """Where output samples lie along an axis: the `nearest` input of each, and the pair it lies between.

    The pair is `lower` and the one after, with `weights`; where the axis is not interpolated, it is one sample.
    """

    nearest: np.ndarray
    lower: np.ndarray
    weights: tuple[np.ndarray, ...]

    @classmethod
    def between(cls, n_in: int, n_out: int, order: int) -> _Line:
        nearest = nearest_samples(n_in, n_out)
        if order == 0 or n_in in (1, n_out):
            return cls(nearest, nearest, (np.ones(n_out, np.float32),))
        centres = np.clip(sample_centres(n_in, n_out), 0, n_in - 1)
        lower = np.minimum(centres.astype(np.intp), n_in - 2)
        upper_weight = (centres - lower).astype(np.float32)
        return cls(nearest, lower, (1 - upper_weight, upper_weight))

    def part(self, rows: slice) -> tuple[_Line, slice]:
        """The line of some output rows, and the input that it counts from and needs."""
        lower = self.lower[rows]
        used = slice(int(lower[0]), int(lower[-1]) + len(self.weights))
        return _Line(self.nearest[rows] - used.start, lower - used.start, tuple(w[rows] for w in self.weights)), used


def _resize_label_slab(source_zyx: np.ndarray, out_zyx: np.ndarray, lines: tuple[_Line, _Line, _Line]) -> None:
    nearest, low, high = source_zyx, source_zyx, source_zyx
    for axis, line in enumerate(lines):
        nearest = nearest.take(line.nearest, axis=axis)
        if len(line.weights) == 2:
            pair = [(slice(None),) * axis + (side,) for side in (slice(None, -1), slice(1, None))]
            low, high = np.minimum(low[pair[0]], low[pair[1]]), np.maximum(high[pair[0]], high[pair[1]])
    out_zyx[...] = nearest
    several = low != high
    if not several.any():
        return
    for axis, line in enumerate(lines):
        several = several.take(line.lower, axis=axis)
    flat, where = out_zyx.reshape(-1), np.flatnonzero(several)
    if len(where) > _MANY * flat.size:
        step = max(1, _AT_ONCE // out_zyx[0].size)
        planes = [slice(start, start + step) for start in range(0, len(out_zyx), step)]
        around = _around_all(source_zyx, lines, planes)
        chosen = [slice(some.start * out_zyx[0].size, some.stop * out_zyx[0].size) for some in planes]
    else:
        parts = range(0, len(where), _AT_ONCE)
        chosen = [where[start : start + _AT_ONCE] for start in parts]
        around = (_around_some(source_zyx, np.unravel_index(some, out_zyx.shape), lines) for some in chosen)
    for some, (labels, weights) in zip(chosen, around):
        flat[some] = _largest_share(flat[some], labels, weights)


def _around_some(
    source_zyx: np.ndarray, index_zyx: tuple[np.ndarray, ...], lines: tuple[_Line, _Line, _Line]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The labels of the input around some output voxels, one array for each corner, and their weights."""
    strides = (source_zyx.shape[1] * source_zyx.shape[2], source_zyx.shape[2], 1)
    place = sum(line.lower.take(index) * stride for line, index, stride in zip(lines, index_zyx, strides))
    along = [[weight.take(index) for weight in line.weights] for line, index in zip(lines, index_zyx)]
    flat = source_zyx.reshape(-1)
    labels, weights = [], []
    for sz, sy, sx in product(*(range(len(line.weights)) for line in lines)):
        labels.append(flat[sz * strides[0] + sy * strides[1] + sx :].take(place))
        weights.append(along[0][sz] * along[1][sy] * along[2][sx])
    return labels, weights


def _around_all(
    source_zyx: np.ndarray, lines: tuple[_Line, _Line, _Line], planes: list[slice]
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """As `_around_some`, of all voxels of some `planes` after the other."""
    z, y, x = lines
    rows = [source_zyx.take(y.lower + side, axis=1) for side in range(len(y.weights))]
    labels = [row.take(x.lower + side, axis=2) for row in rows for side in range(len(x.weights))]
    weights = [np.outer(of_row, of_column).reshape(-1) for of_row in y.weights for of_column in x.weights]
    for some in planes:
        yield (
            [of_corner.take(z.lower[some] + side, axis=0).reshape(-1)
             for side in range(len(z.weights)) for of_corner in labels],
            [np.outer(of_plane[some], weight).reshape(-1) for of_plane in z.weights for weight in weights],
        )  # fmt: skip


def _largest_share(nearest: np.ndarray, corners: list[np.ndarray], weights: list[np.ndarray]) -> np.ndarray:
    """The label with the largest share of each voxel, of the labels around it and their weights; all 1-D."""
    share = _share(nearest, corners, weights)
    left = np.flatnonzero(share < 0.5 - _TIE / 2)  # elsewhere no other label can have more
    if not len(left):
        return nearest
    result = nearest.copy()
    corners, weights = _taken(corners, left), _taken(weights, left)
    for extreme in (np.minimum, np.maximum):  # where two labels meet, one of these is it
        label = extreme.reduce(corners)
        most = _share(label, corners, weights) > 0.5 + _TIE
        result[left[most]] = label[most]
        others = np.flatnonzero(~most)
        left, corners, weights = left.take(others), _taken(corners, others), _taken(weights, others)
    shares = [_share(label, corners, weights) for label in corners]
    enough = np.maximum.reduce(shares) - _TIE
    none = np.iinfo(nearest.dtype).max
    smallest = np.minimum.reduce([np.where(s >= enough, label, none) for s, label in zip(shares, corners)])
    result[left] = np.where(share.take(left) >= enough, nearest.take(left), smallest)
    return result


def _taken(arrays: list[np.ndarray], where: np.ndarray) -> list[np.ndarray]:
    return [array.take(where) for array in arrays]


def _share(label: np.ndarray, corners: list[np.ndarray], weights: list[np.ndarray]) -> np.ndarray:
    share = np.zeros(label.shape, np.float32)
    part = np.empty_like(share)
    for other, weight in zip(corners, weights):
        share += np.multiply(weight, other == label, out=part)
    return share
