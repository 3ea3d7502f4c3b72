"""From the network's maps to labels and probabilities on the input's grid, slab by slab as they come.

Resizing is linear along each axis, so a slab of output slices needs a few input slices only, and what follows it
(a last linear layer, the decision) needs one voxel at a time: never are all classes of a volume held at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from unicon_pipeline.contract import ZYX
from unicon_pipeline.dataset import Labels
from unicon_pipeline.geometry import Volume, orient, orientation_code
from unicon_pipeline.prepare import CaseGeometry
from unicon_pipeline.resize import axis_matrix, axis_orders

_SLAB_BYTES = 16 << 20

LastLayer = tuple[np.ndarray, np.ndarray]  # weights (channels, maps) and bias (channels,)


class CaseExport:
    """Takes a case's slabs in their order, and gives its labels (and probabilities) on the input's grid.

    Where the network was not asked, and outside the crop, everything is background.
    """

    def __init__(
        self,
        labels: Labels,
        geometry: CaseGeometry,
        last_layer: LastLayer | None = None,
        probabilities_in: Path | None = None,
    ):
        """
        Args:
            last_layer: makes logits of the maps, where they are none yet. Exclusive labels: channel 0 is background.
            probabilities_in: a folder for files that hold each output's probability while it grows; None: not wanted.
        """
        self.labels, self.geometry, self._last_layer = labels, geometry, last_layer
        self._crop = tuple(slice(a, b) for a, b in zip(geometry.crop_start_zyx, geometry.crop_stop_zyx, strict=True))
        shape: ZYX = tuple(side.stop - side.start for side in self._crop)
        orders = axis_orders(geometry.network_spacing_zyx_mm, geometry.oriented.spacing_zyx_mm, order=1)
        small = geometry.resized_shape_zyx
        self._matrices = [axis_matrix(n, m, order) for n, m, order in zip(small, shape, orders, strict=True)]
        self._nearest = [matrix.argmax(axis=1) for matrix in self._matrices]
        self._first, self._last = _extent(self._matrices[0])
        self._whole = np.zeros(geometry.oriented.shape_zyx, np.uint8 if max(labels.written) < 256 else np.int16)
        self._probabilities = self._empty_probabilities(probabilities_in)
        self._held: np.ndarray | None = None
        self._seen = np.zeros((0, *small[1:]), bool)
        self._start = self._next = 0  # first input row held; next output row

    def add(self, maps_kzyx: np.ndarray | None, seen_zyx: np.ndarray | None, rows: int) -> None:
        """The next `rows` of input.

        Args:
            maps_kzyx: float32, None where nothing was computed.
            seen_zyx: where the network was asked, None where everywhere.
        """
        small = self.geometry.resized_shape_zyx
        if maps_kzyx is None:
            seen_zyx = np.zeros((rows, *small[1:]), bool)
        elif seen_zyx is None:
            seen_zyx = np.ones((rows, *small[1:]), bool)
        if maps_kzyx is None and self._held is not None:
            maps_kzyx = np.zeros((len(self._held), rows, *small[1:]), np.float32)
        if maps_kzyx is not None:
            if self._held is None:
                self._held = np.zeros((len(maps_kzyx), len(self._seen), *small[1:]), np.float32)
            self._held = np.concatenate((self._held, maps_kzyx), axis=1) if self._held.shape[1] else maps_kzyx
        self._seen = np.concatenate((self._seen, seen_zyx))
        ready = int(np.searchsorted(self._last, self._start + len(self._seen)))
        for own in self._chunks(self._next, ready):
            self._write(own)
        self._next = max(self._next, ready)
        self._forget()

    def result(self) -> tuple[Volume, dict[str, Volume]]:
        """Labels in the smallest type, and name -> probability in 0..1; those of exclusive labels sum to 1."""
        code = orientation_code(self.geometry.original)

        def back(array_zyx: np.ndarray) -> Volume:
            turned = orient(Volume(array_zyx, self.geometry.oriented), code)
            return Volume(turned.array_zyx, self.geometry.original)

        return back(self._whole), {name: back(array) for name, array in self._probabilities.items()}

    def _chunks(self, start: int, stop: int) -> Iterator[slice]:
        """Output rows, so many at a time that their logits stay small."""
        channels = max(self.labels.output_channels, 1 if self._held is None else len(self._held))
        height = max(1, _SLAB_BYTES // (4 * channels * math.prod(len(matrix) for matrix in self._matrices[1:])))
        yield from (slice(row, min(row + height, stop)) for row in range(start, stop, height))

    def _write(self, rows: slice) -> None:
        z_nearest, y_nearest, x_nearest = self._nearest
        seen = self._seen[z_nearest[rows] - self._start]
        if self._held is None or not seen.any():
            return
        z, y, x = self._matrices
        used = slice(self._first[rows.start], self._last[rows.stop - 1] + 1)
        near = slice(used.start - self._start, used.stop - self._start)
        slab = np.einsum("oz,kzyx->koyx", z[rows, used], self._held[:, near], optimize=True)
        logits = np.matmul(np.matmul(y, slab), x.T)
        if self._last_layer is not None:
            weight, bias = self._last_layer
            logits = np.einsum("ck,kzyx->czyx", weight, logits, optimize=True) + bias.reshape(-1, 1, 1, 1)
        everywhere = seen.all()
        if not everywhere:
            seen = seen[:, y_nearest][:, :, x_nearest]
        decided = decide(logits, self.labels)
        self._whole[self._crop][rows] = decided if everywhere else decided * seen
        if self._probabilities:
            channels = _probabilities(logits, self.labels)
            for wanted, channel in zip(self._probabilities.values(), channels, strict=True):
                place = wanted[self._crop][rows]
                place[...] = channel if everywhere else np.where(seen, channel, place)

    def _forget(self) -> None:
        """Drops the input rows that no further output row needs."""
        done = self._next == len(self._first)
        keep_from = self._start + len(self._seen) if done else max(self._start, int(self._first[self._next]))
        drop = min(keep_from - self._start, len(self._seen))
        self._seen = self._seen[drop:]
        if self._held is not None:
            self._held = self._held[:, drop:].copy()
        self._start += drop

    def _empty_probabilities(self, folder: Path | None) -> dict[str, np.ndarray]:
        if folder is None:
            return {}
        names = self.labels.names if self.labels.regions else ("background", *self.labels.names)
        arrays = {
            name: np.memmap(folder / f"{number}.float32", np.float32, "w+", shape=self._whole.shape)
            for number, name in enumerate(names)
        }
        if not self.labels.regions:
            arrays["background"][:] = 1.0
        return arrays


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


def _extent(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last column that each row uses."""
    used = matrix != 0
    return used.argmax(axis=1), matrix.shape[1] - 1 - used[:, ::-1].argmax(axis=1)
