"""Stems: how a modality that the foundation has never met enters it.

A stem is a small encoder of its own. Its map at the foundation's projection level is added there, behind
a gate that starts at zero, so that on the day a stem arrives nothing changes for the inputs known before.
All its maps are also offered to heads as parallel skips (PEMMA, arXiv 2404.13704): a frozen CT encoder
alone would hide the new modality from a decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unicon_pipeline.contract import ZYX, FeatureLevel
from unicon_pipeline.foundation import residual_encoder
from unicon_pipeline.registry import Registry

STEMS: Registry[type[nn.Module]] = Registry("stem")


@STEMS.register("residual_stem")
class ResidualStem(nn.Module):
    """Residual blocks at `strides_zyx` (finest first, the foundation's projection stride among them).

    `levels` declares the maps it offers to heads, finest first; the first stride is (1, 1, 1).
    """

    def __init__(self, projection: FeatureLevel, strides_zyx: tuple[ZYX, ...], features: tuple[int, ...]):
        super().__init__()
        steps = [strides_zyx[0]]
        for finer, coarser in zip(strides_zyx, strides_zyx[1:], strict=False):
            steps.append(tuple(c // f for c, f in zip(coarser, finer, strict=True)))
        convolutions = (3, *(2,) * (len(features) - 1))  # the first level also takes the input in
        self.levels = tuple(
            FeatureLevel(s, c, n * c) for s, c, n in zip(strides_zyx, features, convolutions, strict=True)
        )
        self._projection_level = strides_zyx.index(projection.stride_zyx)
        self.encoder = residual_encoder(1, features, steps, [1] * len(features))
        self.to_projection = nn.Conv3d(features[self._projection_level], projection.channels, 1)
        self.gate = nn.Parameter(torch.zeros(projection.channels))

    def forward(self, modality_b1zyx: Tensor) -> tuple[Tensor, list[Tensor]]:
        """One modality -> (gated map at the foundation's projection level, maps for the heads)."""
        skips = self.encoder(modality_b1zyx)
        projected = self.to_projection(skips[self._projection_level])
        return projected * self.gate.view(1, -1, 1, 1, 1).to(projected.dtype), skips
