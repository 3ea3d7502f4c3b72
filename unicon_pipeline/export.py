"""From logits on the network's grid to labels and probabilities on the input's grid, slab by slab.

Resizing is linear along each axis, so a slab of output slices needs a few input slices only: never are all
classes held at the input's resolution.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from unicon_pipeline.contract import ZYX
from unicon_pipeline.dataset import Labels
from unicon_pipeline.geometry import Volume, orient, orientation_code
from unicon_pipeline.prepare import CaseGeometry
from unicon_pipeline.resize import axis_matrix, axis_orders

_SLAB_BYTES = 64 << 20


def export_case(
    logits_czyx: np.ndarray, labels: Labels, geometry: CaseGeometry, with_probabilities: bool
) -> tuple[Volume, dict[str, Volume]]:
    """The label map on the input's grid, and (if wanted) each output's probability there.

    Args:
        logits_czyx: float32 on the network's grid. Exclusive labels: channel 0 is background.

    Returns:
        Labels, and name -> probability in 0..1; for exclusive labels these hold "background" too and sum to 1.
        Outside the crop everything is background.
    """
    names = labels.names if labels.regions else ("background", *labels.names)
    crop = tuple(slice(a, b) for a, b in zip(geometry.crop_start_zyx, geometry.crop_stop_zyx, strict=True))
    whole = np.zeros(geometry.oriented.shape_zyx, np.int16)
    probabilities = {name: np.zeros(whole.shape, np.float32) for name in names} if with_probabilities else {}
    if "background" in probabilities and not labels.regions:
        probabilities["background"][:] = 1.0
    for rows, slab in _resized_slabs(logits_czyx, geometry):
        whole[crop][rows] = decide(slab, labels)
        for name, channel in zip(probabilities, _probabilities(slab, labels), strict=False):
            probabilities[name][crop][rows] = channel
    code = orientation_code(geometry.original)

    def back(array_zyx: np.ndarray) -> Volume:
        turned = orient(Volume(array_zyx, geometry.oriented), code)
        return Volume(np.ascontiguousarray(turned.array_zyx), geometry.original)

    return back(whole), {name: back(array) for name, array in probabilities.items()}


def decide(logits_czyx: np.ndarray, labels: Labels) -> np.ndarray:
    """Label values (Z, Y, X), int16: the largest channel; for regions, each positive one over those before it."""
    if not labels.regions:
        return np.array((0, *labels.written), np.int16)[logits_czyx.argmax(axis=0)]
    decided = np.zeros(logits_czyx.shape[1:], np.int16)
    for channel, value in zip(logits_czyx, labels.written, strict=True):
        decided[channel > 0] = value
    return decided


def _probabilities(logits_czyx: np.ndarray, labels: Labels) -> np.ndarray:
    if labels.regions:
        return 1.0 / (1.0 + np.exp(-logits_czyx))
    shifted = np.exp(logits_czyx - logits_czyx.max(axis=0))
    return shifted / shifted.sum(axis=0)


def _resized_slabs(logits_czyx: np.ndarray, geometry: CaseGeometry) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (rows of the cropped volume, logits of these rows at the crop's resolution)."""
    shape: ZYX = tuple(b - a for a, b in zip(geometry.crop_start_zyx, geometry.crop_stop_zyx, strict=True))
    small = logits_czyx.shape[1:]
    orders = axis_orders(geometry.network_spacing_zyx_mm, geometry.oriented.spacing_zyx_mm, order=1)
    z, y, x = (axis_matrix(n, m, order) for n, m, order in zip(small, shape, orders, strict=True))
    height = max(1, _SLAB_BYTES // (4 * len(logits_czyx) * shape[1] * shape[2]))
    for start in range(0, shape[0], height):
        rows = slice(start, min(start + height, shape[0]))
        used = np.flatnonzero(z[rows].any(axis=0))
        near = slice(used[0], used[-1] + 1)
        slab = np.einsum("oz,czyx->coyx", z[rows, near], logits_czyx[:, near], optimize=True)
        yield rows, np.matmul(np.matmul(y, slab), x.T)
