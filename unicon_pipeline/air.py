"""Where a case is nothing but air, so that a network need not be asked: decided before anything is computed.

Cautiously: every plane has a rectangle around all that may belong to the body, with the lungs and whatever else lies
inside, and the table if it lies in the image. What no rectangle touches is air. It does not matter how the case is
turned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from unicon_pipeline.contract import ZYX
from unicon_pipeline.geometry import Volume
from unicon_pipeline.intensity import body_slabs

_MARGIN_VOXELS = 2  # of the network's grid: what interpolation reaches, and the edges of what is seen


class BodyHull:
    """A rectangle for each plane (z) of a case's network input; planes without a body have an empty one."""

    def __init__(self, rectangles: np.ndarray):
        """`rectangles`: (planes, 4): first and last + 1 along y, then along x."""
        self.rectangles = rectangles

    @classmethod
    def of(cls, images: Mapping[str, Volume], box: Sequence[slice], shape_zyx: ZYX) -> BodyHull | None:
        """Of the images of a case, on one grid.

        Args:
            box: what is cropped of them (z, y, x).
            shape_zyx: of the network input that the crop becomes.

        Returns:
            None where no body is found at all.
        """
        deciding = ["CT"] if "CT" in images else list(images)
        own = [_rectangles(images[modality].array_zyx[tuple(box)], modality) for modality in deciding]
        first, last = np.min(own, axis=0)[:, ::2], np.max(own, axis=0)[:, 1::2]
        merged = np.stack((first, last), axis=2).reshape(-1, 4)
        if not (merged[:, 1] > merged[:, 0]).any():
            return None
        return cls(_rescaled(merged, tuple(side.stop - side.start for side in box), shape_zyx))

    def is_air(self, tile: Sequence[slice]) -> bool:
        """Whether a tile (z, y, x) holds nothing but air."""
        z, y, x = tile
        y_from, y_to, x_from, x_to = self.rectangles[max(z.start, 0) : z.stop].T
        touched = (y_from < y.stop) & (y_to > y.start) & (x_from < x.stop) & (x_to > x.start)
        return not touched.any()


def _rectangles(array_zyx: np.ndarray, modality: str) -> np.ndarray:
    """(planes, 4): y and x from, to; an empty plane has its whole length as its first voxel and 0 as its end."""
    planes, rows, columns = array_zyx.shape
    found = np.empty((planes, 4), np.int64)
    for where, mask in body_slabs(array_zyx, modality):
        for offset, (axis, size) in ((0, (2, rows)), (2, (1, columns))):
            line = mask.any(axis=axis)
            some = line.any(axis=1)
            found[where, offset] = np.where(some, line.argmax(axis=1), size)
            found[where, offset + 1] = np.where(some, size - line[:, ::-1].argmax(axis=1), 0)
    return found


def _rescaled(rectangles: np.ndarray, source_zyx: ZYX, target_zyx: ZYX) -> np.ndarray:
    """The rectangles of each target plane: around those of all source planes that it, with its margin, covers."""
    z, *yx = (source / target for source, target in zip(source_zyx, target_zyx, strict=True))
    scaled = np.empty((target_zyx[0], 4), np.int64)
    for plane in range(target_zyx[0]):
        first = max(0, math.floor((plane - _MARGIN_VOXELS) * z) - 1)
        near = rectangles[first : math.ceil((plane + 1 + _MARGIN_VOXELS) * z) + 1]
        for offset, factor in ((0, yx[0]), (2, yx[1])):
            scaled[plane, offset] = math.floor(near[:, offset].min() / factor) - _MARGIN_VOXELS
            scaled[plane, offset + 1] = math.ceil(near[:, offset + 1].max() / factor) + _MARGIN_VOXELS
    empty = scaled[:, 1] - scaled[:, 0] <= 2 * _MARGIN_VOXELS
    scaled[empty] = 0
    return scaled
