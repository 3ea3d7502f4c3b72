"""Heads: what a task reads off the feature pyramid.

A head is built from the declared levels alone (`SkipLevel`), so any foundation and any set of stems
serves any head. A new kind of head is one registered class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from torch import Tensor, nn

from unicon_pipeline.contract import ZYX, FeatureLevel, FoundationSpec, filled_strides
from unicon_pipeline.errors import PlanError
from unicon_pipeline.registry import Registry

HEADS: Registry[type[nn.Module]] = Registry("head")

_FEWEST_DECODER_CHANNELS = 16
_MOST_DECODER_CHANNELS = 320


@dataclass(frozen=True)
class SkipLevel:
    """What is on offer at one stride: the foundation's channels (0: none) and each stem's, in a fixed order."""

    stride_zyx: ZYX
    backbone_channels: int
    stem_channels: tuple[tuple[str, int], ...] = ()

    @property
    def channels(self) -> int:
        return self.backbone_channels + sum(channels for _, channels in self.stem_channels)


@dataclass(frozen=True)
class Features:
    """A forward pass, as heads see it: the foundation's maps and each stem's maps, all finest first.

    `stems`: modality -> maps; a modality absent from the whole batch is missing here.
    """

    pyramid: list[Tensor]
    stems: dict[str, list[Tensor]]


def skip_levels(spec: FoundationSpec, stem_levels: dict[str, tuple[FeatureLevel, ...]]) -> tuple[SkipLevel, ...]:
    """All levels a head can read, finest first, from full resolution on.

    Strides that neither foundation nor stems offer are filled in with empty levels.
    """
    backbone = {level.stride_zyx: level.channels for level in spec.pyramid}
    parallel: dict[ZYX, list[tuple[str, int]]] = {}
    for modality, levels in sorted(stem_levels.items()):
        for level in levels:
            parallel.setdefault(level.stride_zyx, []).append((modality, level.channels))
    strides = filled_strides(set(backbone) | set(parallel))
    return tuple(SkipLevel(s, backbone.get(s, 0), tuple(parallel.get(s, ()))) for s in strides)


@HEADS.register("unet")
class UNetHead(nn.Module):
    """U-Net decoder: from the coarsest level up, transposed convolution, concatenated skips, two convolutions.

    Logits come at each of the `supervised_levels` finest levels, for deep supervision.
    """

    def __init__(self, levels: tuple[SkipLevel, ...], output_channels: int, supervised_levels: int = 3):
        """Raises PlanError: there is a single level, or none to supervise."""
        super().__init__()
        if len(levels) < 2 or supervised_levels < 1:
            raise PlanError(
                "A U-Net decoder needs features at two strides or more, and logits at one level or more; "
                f"there are {len(levels)} and {supervised_levels}."
            )
        self.levels = levels
        self.supervised_strides = tuple(level.stride_zyx for level in levels[:-1][:supervised_levels])
        width = levels[-1].channels
        self.up, self.blocks, self.logits = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for index in reversed(range(len(levels) - 1)):
            fine, coarse = levels[index], levels[index + 1]
            step = tuple(c // f for c, f in zip(coarse.stride_zyx, fine.stride_zyx, strict=True))
            own = min(max(fine.backbone_channels or width // 2, _FEWEST_DECODER_CHANNELS), _MOST_DECODER_CHANNELS)
            self.up.append(nn.ConvTranspose3d(width, own, step, step))
            self.blocks.append(_conv_block(own + fine.channels, own))
            supervised = index < len(self.supervised_strides)
            self.logits.append(nn.Conv3d(own, output_channels, 1) if supervised else nn.Identity())
            width = own

    def forward(self, features: Features, every_level: bool = False) -> list[Tensor]:
        """Logits (B, output_channels, Z, Y, X), finest first; the finest alone unless `every_level`."""
        skips = self._gather(features)
        running, outputs = skips.pop(), []
        for index, (up, block, logits) in enumerate(zip(self.up, self.blocks, self.logits, strict=True)):
            running = up(running)
            skip = skips.pop()
            running = block(running if skip is None else torch.cat((running, skip), dim=1))
            last = index == len(self.up) - 1
            if last or (every_level and not isinstance(logits, nn.Identity)):
                outputs.append(logits(running))
        return outputs[::-1]

    def _gather(self, features: Features) -> list[Tensor | None]:
        """One tensor per level, finest first; a stem that is absent gives zeros."""
        pyramid = list(features.pyramid)
        waiting = {modality: list(maps) for modality, maps in features.stems.items()}
        reference, full = pyramid[0], self._full_resolution(features)
        gathered: list[Tensor | None] = []
        for level in self.levels:
            maps = [pyramid.pop(0)] if level.backbone_channels else []
            shape = tuple(size // stride for size, stride in zip(full, level.stride_zyx, strict=True))
            for modality, channels in level.stem_channels:
                if modality in waiting:
                    maps.append(waiting[modality].pop(0).to(reference.dtype))
                else:
                    maps.append(reference.new_zeros((reference.shape[0], channels, *shape)))
            gathered.append(torch.cat(maps, dim=1) if len(maps) > 1 else (maps[0] if maps else None))
        return gathered

    def _full_resolution(self, features: Features) -> ZYX:
        finest = next(level for level in self.levels if level.backbone_channels)
        return tuple(n * s for n, s in zip(features.pyramid[0].shape[2:], finest.stride_zyx, strict=True))


@HEADS.register("pooled_linear")
class PooledLinearHead(nn.Module):
    """Mean of the foundation's coarsest map over all positions, then one linear layer: (B, output_channels) logits."""

    def __init__(self, levels: tuple[SkipLevel, ...], output_channels: int):
        super().__init__()
        coarsest = next(level for level in reversed(levels) if level.backbone_channels)
        self.linear = nn.Linear(coarsest.backbone_channels, output_channels)

    def forward(self, features: Features) -> Tensor:
        return self.linear(features.pyramid[-1].mean(dim=(2, 3, 4), dtype=self.linear.weight.dtype))


def _conv_block(channels_in: int, channels_out: int) -> nn.Module:
    return StackedConvBlocks(
        2, nn.Conv3d, channels_in, channels_out, 3, 1, True,
        nn.InstanceNorm3d, {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True},
    )  # fmt: skip
