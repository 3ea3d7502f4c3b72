"""Convolution blocks that hold no map twice, for prediction on a CPU: the same function, a quarter of the memory.

At full resolution a U-Net's maps are what fills the memory: a convolution's input and output, the output again
normalised, and in the decoder the upsampled map, the skip, and both side by side. Here a convolution reads its input a
few rows (z) at a time, from several maps that are never put together, of which one may be upsampled as it is read.
What it gives lies where an input lay that nobody else needs, and is normalised there. Maps have their channels last in
memory, where rows of one sample are one piece.

A list of maps is given away: its maps count as one, their channels side by side, it is emptied, and they may be
overwritten. A map that is not in a list stays as it is.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from torch import Tensor, nn
from torch.nn import functional

# Values of a piece, going in or coming out; time hardly depends on it.
_PIECE_VALUES = 3_000_000
_FEWEST_ONEDNN = 20_480  # channels x z x y of an input


class Upsampled:
    """What a transposed convolution makes of a map, computed row by row (z) when it is read."""

    def __init__(self, maps: Tensor, up: nn.ConvTranspose3d):
        self._maps, self._up = maps, up
        self.shape = (len(maps), up.out_channels, *(n * s for n, s in zip(maps.shape[2:], up.stride, strict=True)))

    @staticmethod
    def is_possible(up: nn.Module) -> bool:
        """Whether its voxels do not reach over each other."""
        return isinstance(up, nn.ConvTranspose3d) and up.kernel_size == up.stride and up.padding == (0, 0, 0)

    def __getitem__(self, place: slice | tuple[slice, slice, slice]) -> Upsampled | Tensor:
        if isinstance(place, slice):
            return Upsampled(self._maps[place], self._up)
        samples, _, rows = place
        step = self._up.stride[0]
        first, last = rows.start // step, -(-rows.stop // step)
        return self._up(self._maps[samples, :, first:last])[:, :, rows.start - first * step : rows.stop - first * step]


class LeanConv(nn.Module):
    """A convolution that reads its input piece by piece, from one map or from several."""

    def __init__(self, conv: nn.Conv3d):
        super().__init__()
        self.conv = conv

    def forward(self, maps: Tensor | list[Tensor | Upsampled]) -> Tensor:
        """Maps (B, C, Z, Y, X), or a list that is given away."""
        given = isinstance(maps, list)
        parts = maps if given else [maps]
        samples = []
        for number in range(parts[0].shape[0]):
            own = [part[number : number + 1] for part in parts]
            shape = self._shape(own[0].shape)
            out = next((part for part in own if given and _is_map(part, shape, self.conv.weight.dtype)), None)
            samples.append(self._of_one(own, shape, out))
        if given:
            maps.clear()
        return _batch(samples)

    def _shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        conv = self.conv
        edges = zip(shape[2:], conv.padding, conv.kernel_size, conv.stride, strict=True)
        return (1, conv.out_channels, *((n + 2 * pad - kernel) // step + 1 for n, pad, kernel, step in edges))

    def _of_one(self, parts: list[Tensor | Upsampled], shape: tuple[int, ...], out: Tensor | None) -> Tensor:
        """Of one sample; `out`: which of the parts is overwritten."""
        conv, depth, overwritten = self.conv, parts[0].shape[2], out
        kernel, step, pad = conv.kernel_size[0], conv.stride[0], conv.padding[0]
        behind = None  # the rows before the next piece of the overwritten part, as they were
        for rows in self._pieces(shape):
            first, last = rows.start * step - pad, (rows.stop - 1) * step - pad + kernel
            inside = slice(max(first, 0), min(last, depth))
            read = []
            for part in parts:
                if part is overwritten and behind is not None:
                    read.append(torch.cat((behind, part[:, :, rows.start : inside.stop]), dim=2))
                else:
                    read.append(part[:, :, inside])
                if part is overwritten:
                    kept = slice(max(rows.stop - pad, 0) - inside.start, rows.stop - inside.start)
                    behind = read[-1][:, :, kept].clone()
            piece = read[0] if len(read) == 1 else torch.cat(read, dim=1)
            if inside != slice(first, last):
                piece = functional.pad(piece, (0, 0, 0, 0, inside.start - first, last - inside.stop))
            in_plane = (0, *conv.padding[1:])
            piece = functional.conv3d(piece, conv.weight, conv.bias, conv.stride, in_plane, 1, conv.groups)
            if out is None:
                out = _MAPS.empty(shape, piece.dtype)
            out[:, :, rows] = piece
        return out

    def _pieces(self, shape: tuple[int, ...]) -> Iterator[slice]:
        """Output rows; so many that torch takes oneDNN's convolution in float32 too: it goes by these sizes."""
        channels = max(shape[1], self.conv.in_channels * math.prod(self.conv.stride))
        enough = _FEWEST_ONEDNN // (self.conv.in_channels * shape[3] * self.conv.stride[1]) + 1
        return _pieces(shape[2], channels * math.prod(shape[3:]), enough)


class LeanSequence(nn.Sequential):
    """Modules one after the other; what one gives, the next may overwrite."""

    def forward(self, maps: Tensor | list[Tensor | Upsampled]) -> Tensor:
        """Of maps, or of a list that is given away to the first module."""
        return in_turn(self, maps)


def in_turn(modules: Iterable[nn.Module], maps: Tensor | list[Tensor | Upsampled]) -> Tensor:
    """As `LeanSequence`; modules of other kinds than those here get the map itself."""
    for module in modules:
        if isinstance(maps, list) and not isinstance(module, _LEAN):
            (maps,) = maps
        maps = module(maps)
        if isinstance(module, _LEAN):
            maps = [maps]
    return maps[0] if isinstance(maps, list) else maps


class InstanceNormChannelsLast(nn.Module):
    """Instance norm of maps whose channels lie last in memory; torch's own would bring them to the usual layout."""

    def __init__(self, norm: nn.InstanceNorm3d, nonlin: nn.Module | None = None):
        """`nonlin`: an activation that follows it."""
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.nonlin = nonlin
        if nonlin is not None:
            nonlin.inplace = True

    @staticmethod
    def can_replace(norm: nn.Module) -> bool:
        """Whether it is an instance norm with weights, that looks at nothing but its input."""
        return type(norm) is nn.InstanceNorm3d and norm.affine and not norm.track_running_stats

    def forward(self, maps: Tensor | list[Tensor]) -> Tensor:
        """Maps (B, C, Z, Y, X), or in a list that is given away."""
        given = isinstance(maps, list)
        samples = (maps.pop() if given else maps).split(1)
        return _batch([
            self._of_one(sample, sample if given and _is_last(sample) else _MAPS.empty(sample.shape, sample.dtype))
            for sample in samples
        ])  # fmt: skip

    def _of_one(self, sample: Tensor, out: Tensor) -> Tensor:
        mean, variance = channel_moments(sample)
        unused = mean.new_empty(0)
        for rows in _pieces(sample.shape[2], sample[0, :, 0].numel()):
            voxels, place = _voxels(sample[:, :, rows]), _voxels(out[:, :, rows])
            # Batch norm over one sample's voxels, each written where it is to be.
            torch.native_batch_norm(
                voxels, self.weight, self.bias, mean, variance, False, 0.0, self.eps, out=(place, unused, unused)
            )
            if self.nonlin is not None:
                self.nonlin(place)
        return out


class LeanBlock(nn.Module):
    """Convolution, instance norm, activation; takes the place of the library's `ConvDropoutNormReLU`."""

    def __init__(self, block: ConvDropoutNormReLU):
        super().__init__()
        self.conv = LeanConv(block.conv)
        self.norm = InstanceNormChannelsLast(block.norm, getattr(block, "nonlin", None))
        self.all_modules = nn.Sequential(self.conv, self.norm)

    @staticmethod
    def can_replace(block: nn.Module) -> bool:
        """Whether it is the usual block, in which norm and activation only ever see what the convolution made."""
        if type(block) is not ConvDropoutNormReLU or not isinstance(block.conv, nn.Conv3d):
            return False
        kinds = [type(module) for module in block.all_modules if not isinstance(module, nn.Dropout3d)]
        usual = kinds[0] is nn.Conv3d and kinds[1:2] == [nn.InstanceNorm3d] and len(kinds) <= 3
        usual = usual and issubclass((*kinds, nn.ReLU)[2], nn.ReLU | nn.LeakyReLU)
        plain = block.conv.dilation[0] == 1 and block.conv.padding_mode == "zeros"
        return usual and plain and InstanceNormChannelsLast.can_replace(block.norm)

    def forward(self, maps: Tensor | list[Tensor | Upsampled]) -> Tensor:
        """As `LeanConv`."""
        return self.norm([self.conv(maps)])


_LEAN = (LeanConv, InstanceNormChannelsLast, LeanBlock)


class _Maps:
    """Memory for large maps, taken again once the map that lay in it is gone.

    The heap would serve as well, but among pieces of all sizes it is soon too torn for maps to fit where others were.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._taking = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Maps (1, C, Z, Y, X), channels last, with any values."""
        size = math.prod(shape) * dtype.itemsize
        with self._taking:
            fits = [(free.size, place) for place, free in enumerate(self._free) if size <= free.size <= 1.25 * size]
            buffer = self._free.pop(min(fits)[1]) if fits else np.empty(size, np.uint8)
        held = buffer[:size]
        weakref.finalize(held, self._free.append, buffer)  # torch holds it for as long as any view of the map lives
        batch, channels, *zyx = shape
        return torch.from_numpy(held).view(dtype).view(batch, *zyx, channels).permute(0, 4, 1, 2, 3)

    def forget(self) -> None:
        """Gives back what is free: the next maps have other sizes."""
        with self._taking:
            self._free.clear()


_MAPS = _Maps()


def forget_free_maps() -> None:
    """Gives back the memory that is held for further maps, before another network begins."""
    _MAPS.forget()


def _voxels(sample: Tensor) -> Tensor:
    """Maps (1, C, Z, Y, X) as (Z * Y * X, C), in the same memory where their channels lie last."""
    return sample.permute(0, 2, 3, 4, 1).reshape(-1, sample.shape[1])


def _is_last(sample: Tensor) -> bool:
    return sample.is_contiguous(memory_format=torch.channels_last_3d)


def _is_map(part: Tensor | Upsampled, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    return isinstance(part, Tensor) and part.shape == shape and part.dtype == dtype and _is_last(part)


def _pieces(rows: int, values_per_row: int, fewest: int = 1) -> Iterator[slice]:
    height = max(fewest, _PIECE_VALUES // values_per_row)
    return (slice(row, min(row + height, rows)) for row in range(0, rows, height))


def _batch(samples: list[Tensor]) -> Tensor:
    return samples[0] if len(samples) == 1 else torch.cat(samples)


def channel_moments(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance (C,) of maps (1, C, Z, Y, X), in float32.

    First of many sets of voxels (one for each x; in reduced precision fewer, which is faster), and then of all: a
    single sum over a million voxels would lose three digits.
    """
    sets = sample.shape[4] if sample.dtype is torch.float32 else math.gcd(sample.shape[4], 4)
    columns = _voxels(sample).reshape(-1, sets * sample.shape[1])
    zeros = torch.zeros(columns.shape[1])
    means, variances = torch.batch_norm_update_stats(columns, zeros, zeros + 1, 0.0)
    means, variances = (moments.view(sets, -1) for moments in (means, variances))
    mean = means.mean(dim=0)
    return mean, (variances + (means - mean).square()).mean(dim=0)


def decoder_step(up: nn.Module, block: nn.Module, running: Tensor, skip: list[Tensor]) -> Tensor:
    """One level of a U-Net decoder: `running` goes up, `skip` (given away) beside it, and both through the block."""
    if not isinstance(getattr(block, "convs", None), LeanSequence):
        return block(torch.cat((up(running), *skip), dim=1) if skip else up(running))
    parts = [Upsampled(running, up) if Upsampled.is_possible(up) else up(running), *skip]
    skip.clear()
    return block(parts)
