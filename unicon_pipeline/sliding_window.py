"""Sliding-window inference: nnU-Net's tiles and Gaussian weights, one accumulation in float32.

Positions: the smallest number of evenly spread tiles whose step is at most half a tile. Weights: a Gaussian
of sigma tile / 8, at its maximum 1, nowhere 0. (nnU-Net: Isensee et al., Nature Methods 2021.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from unicon_pipeline.contract import ZYX
from unicon_pipeline.device import autocast

STEP = 0.5


def tile_starts(shape_zyx: ZYX, tile_zyx: ZYX, step: float = STEP) -> tuple[tuple[int, ...], ...]:
    """First voxels of the tiles along each axis; `shape_zyx` is at least `tile_zyx`."""
    starts = []
    for size, tile in zip(shape_zyx, tile_zyx, strict=True):
        intervals = math.ceil((size - tile) / (tile * step))
        starts.append(tuple(int(np.round((size - tile) / max(intervals, 1) * i)) for i in range(intervals + 1)))
    return tuple(starts)


@lru_cache(maxsize=8)
def gaussian_weights(tile_zyx: ZYX) -> Tensor:
    """(Z, Y, X) float32 importance of a tile's voxels."""
    impulse = np.zeros(tile_zyx)
    impulse[tuple(size // 2 for size in tile_zyx)] = 1.0
    weights = gaussian_filter(impulse, [size / 8 for size in tile_zyx], mode="constant")
    weights /= weights.max()
    return torch.from_numpy(np.maximum(weights, weights[weights > 0].min()).astype(np.float32))


@torch.inference_mode()
def sliding_window_logits(
    model: Callable[..., list[Tensor]],
    array_czyx: np.ndarray,
    present: tuple[bool, ...],
    air: tuple[float, ...],
    tile_zyx: ZYX,
    device: torch.device,
    precision: torch.dtype,
    mirror_axes: tuple[int, ...] = (),
) -> Tensor:
    """Logits (output channels, Z, Y, X), float32 on the CPU, of a normalised case.

    Args:
        model: merged, in evaluation mode, on `device`.
        array_czyx: channels in the task's order, absent ones zero.
        present: which channels the case has.
        air: each channel's value outside the image, for volumes smaller than a tile (as in training).
        mirror_axes: of z, y, x (0, 1, 2); the average over all mirrorings along them, 2 to the power of their number.
    """
    images, inner = _padded(torch.from_numpy(array_czyx), air, tile_zyx)
    present_bc = torch.tensor([present], device=device)
    weights = gaussian_weights(tuple(tile_zyx)).to(device)
    logits, total = None, torch.zeros(images.shape[1:], device=device)
    for tile in _tiles(images.shape[1:], tile_zyx):
        batch = images[(slice(None), *tile)][None].to(device)
        with autocast(device, precision):
            output = _mirrored(model, batch, present_bc, mirror_axes)
        if logits is None:
            logits = torch.zeros((output.shape[1], *images.shape[1:]), device=device)
        logits[(slice(None), *tile)] += output[0].float() * weights
        total[tile] += weights
    logits /= total
    return logits[(slice(None), *inner)].cpu()


@torch.inference_mode()
def whole_logits(
    model: Callable[..., list[Tensor]],
    array_czyx: np.ndarray,
    present: tuple[bool, ...],
    device: torch.device,
    precision: torch.dtype,
) -> Tensor:
    """Logits (output channels,), float32 on the CPU, of a case that is one input; arguments as above."""
    images = torch.from_numpy(array_czyx)[None].to(device)
    with autocast(device, precision):
        return model(images, torch.tensor([present], device=device))[0][0].float().cpu()


def tile_count(shape_zyx: ZYX, tile_zyx: ZYX) -> int:
    """How many forward passes a volume takes."""
    padded = tuple(max(size, tile) for size, tile in zip(shape_zyx, tile_zyx, strict=True))
    return math.prod(len(starts) for starts in tile_starts(padded, tile_zyx))


def _padded(images_czyx: Tensor, air: tuple[float, ...], tile_zyx: ZYX) -> tuple[Tensor, tuple[slice, ...]]:
    """Pads each channel with its air to at least a tile, evenly on both sides; says where the volume lies then."""
    padded, inner = [], ()
    for channel, value in zip(images_czyx, air, strict=True):
        image, inner = pad_nd_image(channel, tile_zyx, "constant", {"value": value}, return_slicer=True)
        padded.append(image)
    return torch.stack(padded), tuple(inner)


def _tiles(shape_zyx: ZYX, tile_zyx: ZYX) -> Iterator[tuple[slice, ...]]:
    for corner in itertools.product(*tile_starts(tuple(shape_zyx), tile_zyx)):
        yield tuple(slice(start, start + size) for start, size in zip(corner, tile_zyx, strict=True))


def _mirrored(
    model: Callable[..., list[Tensor]], batch: Tensor, present_bc: Tensor, mirror_axes: tuple[int, ...]
) -> Tensor:
    output = model(batch, present_bc)[0]
    if not mirror_axes:
        return output
    output = output.float()
    spatial = [2 + axis for axis in mirror_axes]
    flips = [axes for n in range(1, len(spatial) + 1) for axes in itertools.combinations(spatial, n)]
    for axes in flips:
        output += model(batch.flip(axes), present_bc)[0].float().flip(axes)
    return output / (len(flips) + 1)
