"""Sliding-window inference: nnU-Net's tiles and Gaussian weights, summed in float32 and given away slab by slab.

Positions: the smallest number of evenly spread tiles whose step is at most half a tile. Weights: a Gaussian
of sigma tile / 8, at its maximum 1, nowhere 0. (nnU-Net: Isensee et al., Nature Methods 2021.) Tiles go row by row
along z; once a row of tiles is done, what lies before the next row is final, so no more than one row is held.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn

from unicon_pipeline.contract import ZYX
from unicon_pipeline.device import autocast
from unicon_pipeline.lean_blocks import forget_free_maps
from unicon_pipeline.progress import steps_bar

logger = logging.getLogger(__name__)

STEP = 0.5
_SLAB_ROWS = 16
Tile = tuple[slice, ...]  # z, y, x


@dataclass(frozen=True)
class Window:
    """How a network is moved over a case.

    Args:
        air: each channel's value outside the image, for volumes smaller than a tile (as in training).
        precision: of the network; sums are float32.
        mirror_axes: of z, y, x (0, 1, 2); the average over all mirrorings along them, 2 to the power of their number.
        step: largest distance of two tiles, as a share of a tile.
        batch: tiles in one forward pass.
    """

    tile_zyx: ZYX
    air: tuple[float, ...]
    precision: torch.dtype
    mirror_axes: tuple[int, ...] = ()
    step: float = STEP
    batch: int = 1


@dataclass(frozen=True)
class Slab:
    """The weighted mean of what the network gave for the `rows` (z) of a case, a few of them.

    `maps_kzyx`: float32 on the CPU, None where no tile was computed. `seen_zyx`: where tiles were computed, None where
    everywhere. `tiles`, `air_tiles`: how many were computed since the slab before, and how many were left out.
    """

    rows: slice
    maps_kzyx: Tensor | None
    seen_zyx: Tensor | None
    tiles: int
    air_tiles: int


@torch.inference_mode()
def window_slabs(
    network: nn.Module,
    array_czyx: np.ndarray,
    present: tuple[bool, ...],
    window: Window,
    is_air: Callable[[Tile], bool] | None = None,
) -> Iterator[Slab]:
    """Slabs of a normalised case, from its first row (z) to its last.

    Args:
        network: merged, in evaluation mode; its device computes. Called with (images, present), it gives a list whose
            first item is (B, K, Z, Y, X).
        array_czyx: channels in the task's order, absent ones zero.
        present: which channels the case has.
        is_air: of a tile in the case's voxels, whether it may be left out.
    """
    forget_free_maps()
    images, inner = _padded(torch.from_numpy(array_czyx), window)
    z_starts, *yx_starts = tile_starts(images.shape[1:], window.tile_zyx, window.step)
    passes, sums = _Passes(network, present, window), _Sums(images.shape[1:], window.tile_zyx)
    planes = list(itertools.product(*yx_starts))
    with steps_bar("tiles", len(z_starts) * len(planes)) as done:
        for z, following in zip(z_starts, (*z_starts[1:], images.shape[1])):
            every = [_tile((z, y, x), window.tile_zyx) for y, x in planes]
            tiles = [tile for tile in every if is_air is None or not is_air(_shifted(tile, inner))]
            done(len(every) - len(tiles))
            for batch, output in passes(images, tiles):
                sums.add(batch, output, z)
                done(len(batch))
            counts = (len(tiles), len(every) - len(tiles))
            first, last = max(z, inner[0].start), min(following, inner[0].stop)
            for start in range(first, last, _SLAB_ROWS):
                rows = slice(start, min(start + _SLAB_ROWS, last))
                yield Slab(_shift(rows, inner[0]), *sums.mean(_shift(rows, slice(z, None)), inner[1:]), *counts)
                counts = (0, 0)
            sums.advance(following - z)


def window_maps(network: nn.Module, array_czyx: np.ndarray, present: tuple[bool, ...], window: Window) -> Tensor:
    """All slabs as one: (K, Z, Y, X), float32 on the CPU; arguments as `window_slabs`."""
    return torch.cat([slab.maps_kzyx for slab in window_slabs(network, array_czyx, present, window)], dim=1)


@torch.inference_mode()
def whole_logits(
    network: nn.Module, array_czyx: np.ndarray, present: tuple[bool, ...], precision: torch.dtype
) -> Tensor:
    """Logits (output channels,), float32 on the CPU, of a case that is one input; arguments as above."""
    device = _device(network)
    images = torch.from_numpy(array_czyx)[None].to(device)
    with autocast(device, precision):
        return network(images, torch.tensor([present], device=device))[0][0].float().cpu()


def tile_starts(shape_zyx: Sequence[int], tile_zyx: ZYX, step: float = STEP) -> tuple[tuple[int, ...], ...]:
    """First voxels of the tiles along each axis; `shape_zyx` is at least `tile_zyx`."""
    starts = []
    for size, tile in zip(shape_zyx, tile_zyx, strict=True):
        intervals = math.ceil((size - tile) / (tile * step))
        spread = (int(np.round((size - tile) / max(intervals, 1) * i)) for i in range(intervals + 1))
        starts.append(tuple(dict.fromkeys(spread)))  # tiles of one voxel would come twice
    return tuple(starts)


def tile_count(shape_zyx: ZYX, tile_zyx: ZYX, step: float = STEP) -> int:
    """How many tiles a volume has."""
    padded = tuple(max(size, tile) for size, tile in zip(shape_zyx, tile_zyx, strict=True))
    return math.prod(len(starts) for starts in tile_starts(padded, tile_zyx, step))


@lru_cache(maxsize=8)
def gaussian_weights(tile_zyx: ZYX) -> Tensor:
    """(Z, Y, X) float32 importance of a tile's voxels."""
    z, y, x = (gaussian_filter1d(np.eye(size)[size // 2], size / 8, mode="constant") for size in tile_zyx)
    weights = z[:, None, None] * y[:, None] * x
    weights /= weights.max()
    return torch.from_numpy(np.maximum(weights, weights[weights > 0].min()).astype(np.float32))


class _Sums:
    """Weighted sums over the tiles of one row: `_maps` (K, tile's z, Y, X), and the sums of the weights."""

    def __init__(self, shape_zyx: Sequence[int], tile_zyx: ZYX):
        self._shape = (tile_zyx[0], *shape_zyx[1:])
        self._tile = tuple(tile_zyx)
        self._maps: Tensor | None = None
        self._weights = torch.zeros(self._shape)

    def add(self, tiles: list[Tile], output_bkzyx: Tensor, row_start: int) -> None:
        device = output_bkzyx.device
        if self._maps is None:
            self._maps = torch.zeros((output_bkzyx.shape[1], *self._shape), device=device)
        if self._maps.device != device:
            self._maps = self._maps.to(device)
        if self._weights.device != device:
            self._weights = self._weights.to(device)
        importance = gaussian_weights(self._tile).to(device)
        for tile, output in zip(tiles, output_bkzyx, strict=True):
            place = (slice(tile[0].start - row_start, tile[0].stop - row_start), *tile[1:])
            for sums, channel in zip(self._maps, output, strict=True):  # one by one: a hundred need a lot of memory
                sums[place] += channel.float() * importance
            self._weights[place] += importance

    def mean(self, rows: slice, inner_yx: Sequence[slice]) -> tuple[Tensor | None, Tensor | None]:
        """`maps_kzyx` and `seen_zyx` of a `Slab`."""
        place = (rows, *inner_yx)
        weights = self._weights[place]
        seen = weights > 0
        if self._maps is None or not bool(seen.any()):
            return None, None
        everywhere = bool(seen.all())
        mean = self._maps[(slice(None), *place)] / (weights if everywhere else weights.clamp_min(1e-30))
        return mean.cpu(), None if everywhere else seen.cpu()

    def advance(self, rows: int) -> None:
        """Moves on by so many rows: these are given away, and new ones begin at zero."""
        for sums in (self._weights,) if self._maps is None else (self._weights, self._maps.movedim(1, 0)):
            kept = len(sums) - rows
            for row in range(kept):  # one by one, so that no second copy is needed
                sums[row] = sums[row + rows]
            sums[max(kept, 0) :] = 0


class _Passes:
    """Forward passes over batches of tiles; without memory on a GPU it goes on with less, and says so."""

    def __init__(self, network: nn.Module, present: tuple[bool, ...], window: Window):
        self._network, self._window, self._batch = network, window, window.batch
        self._present = torch.tensor([present])
        self._device = _device(network)
        self._sums_device = self._device

    def __call__(self, images_czyx: Tensor, tiles: list[Tile]) -> Iterator[tuple[list[Tile], Tensor]]:
        waiting = list(tiles)
        while waiting:
            batch = waiting[: self._batch]
            try:
                output = self._forward(torch.stack([images_czyx[(slice(None), *tile)] for tile in batch]))
                output = output.to(self._sums_device)
            except torch.OutOfMemoryError:
                self._use_less()
                continue
            yield batch, output
            del waiting[: len(batch)]

    def _forward(self, images_bczyx: Tensor) -> Tensor:
        images, axes = images_bczyx.to(self._device), [2 + axis for axis in self._window.mirror_axes]
        present = self._present.expand(len(images), -1).to(self._device)
        flips = [flip for n in range(1, len(axes) + 1) for flip in itertools.combinations(axes, n)]
        with autocast(self._device, self._window.precision):
            output = self._network(images, present)[0]
            if flips:
                output = output.float()
            for flip in flips:
                output += self._network(images.flip(flip), present)[0].float().flip(flip)
        return output / (len(flips) + 1) if flips else output

    def _use_less(self) -> None:
        """The next of: half the batch, sums on the CPU, all on the CPU.

        Raises:
            torch.OutOfMemoryError: the CPU has not enough either.
        """
        if self._device.type == "cpu":
            raise
        if self._batch > 1:
            self._batch //= 2
            logger.warning("The GPU has too little memory: %d tiles at a time.", self._batch)
        elif self._sums_device.type != "cpu":
            self._sums_device = torch.device("cpu")
            logger.warning("The GPU has too little memory: the results are kept in the machine's own.")
        else:
            self._device = torch.device("cpu")
            self._network.to(self._device)
            logger.warning("The GPU has too little memory for one tile: this goes on with the CPU, which is slower.")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _device(network: nn.Module) -> torch.device:
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def _padded(images_czyx: Tensor, window: Window) -> tuple[Tensor, tuple[slice, ...]]:
    """Pads each channel with its air to at least a tile, evenly on both sides; says where the volume lies then."""
    shape = images_czyx.shape[1:]
    if all(size >= tile for size, tile in zip(shape, window.tile_zyx, strict=True)):
        return images_czyx, tuple(slice(0, size) for size in shape)
    padded, inner = [], ()
    for channel, value in zip(images_czyx, window.air, strict=True):
        image, inner = pad_nd_image(channel, window.tile_zyx, "constant", {"value": value}, return_slicer=True)
        padded.append(image)
    return torch.stack(padded), tuple(inner)


def _tile(corner: ZYX, tile_zyx: ZYX) -> Tile:
    return tuple(slice(start, start + size) for start, size in zip(corner, tile_zyx, strict=True))


def _shift(side: slice, inner: slice) -> slice:
    return slice(side.start - inner.start, side.stop - inner.start)


def _shifted(tile: Tile, inner: Sequence[slice]) -> Tile:
    return tuple(_shift(side, own) for side, own in zip(tile, inner, strict=True))
