"""Heads: what a task reads off the feature pyramid.

A head is built from the declared levels alone (`SkipLevels`), so any foundation and any set of stems
serves any head. A new kind of head is one registered class.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from torch import Tensor, nn

from unicon_pipeline.contract import ZYX
from unicon_pipeline.errors import PlanError
from unicon_pipeline.lean_blocks import decoder_step
from unicon_pipeline.levels import DETAIL, TOKENS, SkipLevel, SkipLevels
from unicon_pipeline.registry import Registry
from unicon_pipeline.stems import masked, residual_path

HEADS: Registry[type[nn.Module]] = Registry("head")


@dataclass(frozen=True)
class Features:
    """A forward pass, as heads see it: the foundation's maps and each stem's maps, all finest first.

    `stems`: modality -> maps; a modality absent from the whole batch is missing here.
    `native`: the images (B, native channels, Z, Y, X), absent channels zero; None when no case has any.
    `native_present`: (B,) whether a case has a native modality; None when all have.
    """

    pyramid: list[Tensor]
    stems: dict[str, list[Tensor]]
    native: Tensor | None = None
    native_present: Tensor | None = None


@HEADS.register("unet")
class UNetHead(nn.Module):
    """U-Net decoder: from the coarsest level up, transposed convolution, concatenated skips, two convolutions.

    Logits come at each of the `supervised_levels` finest levels, for deep supervision.
    """

    reads_tokens = False

    def __init__(self, skips: SkipLevels, output_channels: int, supervised_levels: int = 3):
        """Raises PlanError: another kind of foundation, a single level, or none to supervise."""
        super().__init__()
        levels = skips.levels
        if (skips.kind == TOKENS) != self.reads_tokens:
            fitting = "unetr" if skips.kind == TOKENS else "unet"
            raise PlanError(f"The decoder for a foundation of kind {skips.kind} is {fitting}, and no other.")
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
            fine, own = levels[index], skips.decoder_channels[index]
            step = _step(levels[index + 1], fine)
            self.up.append(nn.ConvTranspose3d(width, own, step, step))
            self.blocks.append(_conv_block(own + fine.channels, own))
            supervised = index < len(self.supervised_strides)
            self.logits.append(nn.Conv3d(own, output_channels, 1) if supervised else nn.Identity())
            width = own
        self.detail = residual_path(skips.native_channels, skips.detail) if skips.detail else None

    def forward(self, features: Features, every_level: bool = False) -> list[Tensor]:
        """Logits (B, output_channels, Z, Y, X), finest first; the finest alone unless `every_level`.

        It empties `features`.
        """
        skips = self._gather(features)
        running, outputs = torch.cat(skips.pop(), dim=1), []
        for index, (up, block, logits) in enumerate(zip(self.up, self.blocks, self.logits, strict=True)):
            running = decoder_step(up, block, running, skips.pop())
            last = index == len(self.up) - 1
            if last or (every_level and not isinstance(logits, nn.Identity)):
                outputs.append(logits(running))
        return outputs[::-1]

    @property
    def last_layer(self) -> nn.Module:
        """What gives the finest logits, one voxel at a time."""
        return self.logits[-1]

    def drop_last_layer(self) -> None:
        """Takes it away: from now on `forward` gives what it would get."""
        self.logits[-1] = nn.Identity()

    def _gather(self, features: Features) -> list[list[Tensor]]:
        """The maps of each level, finest first; a stem that is absent gives zeros, and so does the detail path.

        They are taken out of `features`, so that each can go once it is used.
        """
        reference, full = features.pyramid[0], self._full_resolution(features)
        if self.detail is not None and features.native is not None:
            features.stems[DETAIL] = [masked(maps, features.native_present) for maps in self.detail(features.native)]
        gathered: list[list[Tensor]] = []
        for level in self.levels:
            maps = [features.pyramid.pop(0)] if level.backbone_channels else []
            shape = tuple(size // stride for size, stride in zip(full, level.stride_zyx, strict=True))
            for name, channels in level.side_channels:
                if name in features.stems:
                    maps.append(features.stems[name].pop(0).to(reference.dtype))
                else:
                    maps.append(reference.new_zeros((reference.shape[0], channels, *shape)))
            gathered.append(maps)
        return gathered

    def _full_resolution(self, features: Features) -> ZYX:
        finest = next(level for level in self.levels if level.backbone_channels)
        return tuple(n * s for n, s in zip(features.pyramid[0].shape[2:], finest.stride_zyx, strict=True))


@HEADS.register("unetr")
class UNETRHead(UNetHead):
    """The same decoder for a backbone of tokens, whose hidden layers all lie at one stride (UNETR, arXiv 2103.10504).

    The deepest is the bottleneck; transposed convolutions bring shallower ones to the finer levels.
    """

    reads_tokens = True

    def __init__(self, skips: SkipLevels, output_channels: int, supervised_levels: int = 3):
        """Raises PlanError: as the U-Net decoder."""
        super().__init__(skips, output_channels, supervised_levels)
        self.sources = tuple(source for source, _ in skips.neck)
        at_tokens = skips.levels[len(skips.detail)]
        self.neck = nn.ModuleList(
            _upsampling(skips.hidden_channels[source], (at_tokens, *path)) for source, path in skips.neck
        )

    def forward(self, features: Features, every_level: bool = False) -> list[Tensor]:
        """As the U-Net decoder; `features.pyramid` holds the hidden layers, shallowest first."""
        hidden = features.pyramid
        pyramid = [up(hidden[source]) for source, up in zip(self.sources, self.neck, strict=True)]
        return super().forward(dataclasses.replace(features, pyramid=pyramid), every_level)


@HEADS.register("pooled_linear")
class PooledLinearHead(nn.Module):
    """Mean of the foundation's coarsest map over all positions, then one linear layer: (B, output_channels) logits."""

    def __init__(self, skips: SkipLevels, output_channels: int):
        super().__init__()
        self.linear = nn.Linear(skips.hidden_channels[-1], output_channels)

    def forward(self, features: Features) -> Tensor:
        return self.linear(features.pyramid[-1].mean(dim=(2, 3, 4), dtype=self.linear.weight.dtype))


def _upsampling(width: int, levels: tuple[SkipLevel, ...]) -> nn.Module:
    """From the first of `levels` to the last, which may be the same, one step at a time."""
    layers = []
    for coarse, fine in zip(levels, levels[1:]):
        step, own = _step(coarse, fine), fine.backbone_channels
        layers += [
            nn.ConvTranspose3d(width, own, step, step, bias=False),
            nn.InstanceNorm3d(own, eps=1e-5, affine=True),
            nn.LeakyReLU(inplace=True),
        ]
        width = own
    return nn.Sequential(*layers)


def _step(coarse: SkipLevel, fine: SkipLevel) -> ZYX:
    z, y, x = (c // f for c, f in zip(coarse.stride_zyx, fine.stride_zyx, strict=True))
    return z, y, x


def _conv_block(channels_in: int, channels_out: int) -> nn.Module:
    return StackedConvBlocks(
        2, nn.Conv3d, channels_in, channels_out, 3, 1, True,
        nn.InstanceNorm3d, {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True},
    )  # fmt: skip
