"""Stems: how a modality that the foundation has never met enters it.

A stem is a small encoder of its own. Its map at the foundation's projection level is added there, behind
a gate that starts at zero, so that on the day a stem arrives nothing changes for the inputs known before.
All its other maps are also offered to heads as parallel skips (PEMMA, arXiv 2404.13704): a frozen CT encoder
alone would hide the new modality from a decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unicon_pipeline.contract import ZYX, FeatureLevel
from unicon_pipeline.families.dna_encoders import residual_encoder
from unicon_pipeline.levels import residual_levels
from unicon_pipeline.registry import Registry

STEMS: Registry[type[nn.Module]] = Registry("stem")


class _Stem(nn.Module):
    """What every stem has: residual blocks at `strides_zyx`, and the gate.

    `levels` declares the maps it offers to heads, finest first; the first stride is (1, 1, 1).
    """

    def __init__(self, projection: FeatureLevel, strides_zyx: tuple[ZYX, ...], features: tuple[int, ...]):
        super().__init__()
        self.levels = residual_levels(strides_zyx, features)
        self.encoder = residual_path(1, self.levels)
        self.gate = nn.Parameter(torch.zeros(projection.channels))


@STEMS.register("residual_stem")
class ResidualStem(_Stem):
    """Its map at the foundation's projection stride, which is among `strides_zyx`, is what enters there."""

    def __init__(self, projection: FeatureLevel, strides_zyx: tuple[ZYX, ...], features: tuple[int, ...]):
        super().__init__(projection, strides_zyx, features)
        self._projection_level = strides_zyx.index(projection.stride_zyx)
        self.to_projection = nn.Conv3d(features[self._projection_level], projection.channels, 1)

    def forward(self, modality_b1zyx: Tensor) -> tuple[Tensor, list[Tensor]]:
        """One modality -> (gated map at the foundation's projection level, maps for the heads)."""
        skips = self.encoder(modality_b1zyx)
        return _gated(self.to_projection(skips[self._projection_level]), self.gate), skips


@STEMS.register("patch_embedding")
class PatchEmbeddingStem(_Stem):
    """For a backbone of tokens: a patch embedding like its own enters; all `strides_zyx` are finer than it."""

    def __init__(self, projection: FeatureLevel, strides_zyx: tuple[ZYX, ...], features: tuple[int, ...]):
        super().__init__(projection, strides_zyx, features)
        self.to_projection = nn.Conv3d(1, projection.channels, projection.stride_zyx, projection.stride_zyx)
        self.norm = nn.LayerNorm(projection.channels)

    def forward(self, modality_b1zyx: Tensor) -> tuple[Tensor, list[Tensor]]:
        """One modality -> (gated tokens as a map at the foundation's projection level, maps for the heads)."""
        tokens = self.norm(self.to_projection(modality_b1zyx).movedim(1, -1))  # (B, z, y, x, C)
        return _gated(tokens.movedim(-1, 1), self.gate), self.encoder(modality_b1zyx)


def residual_path(input_channels: int, levels: tuple[FeatureLevel, ...]) -> nn.Module:
    """A small trainable encoder, full resolution first: one residual block a level, the map of each comes out."""
    strides = [level.stride_zyx for level in levels]
    steps = [
        tuple(c // f for c, f in zip(coarser, finer, strict=True))
        for finer, coarser in zip(((1, 1, 1), *strides), strides)
    ]
    return residual_encoder(input_channels, [level.channels for level in levels], steps, [1] * len(levels))


def masked(tensor: Tensor, present_b: Tensor | None) -> Tensor:
    """Zeros for the cases of the batch that are not `present_b`; None: all are."""
    return tensor if present_b is None else tensor * present_b.view(-1, 1, 1, 1, 1).to(tensor.dtype)


def _gated(projected: Tensor, gate: Tensor) -> Tensor:
    return projected * gate.view(1, -1, 1, 1, 1).to(projected.dtype)
