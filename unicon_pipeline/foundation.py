"""Foundations: frozen encoders that every task of a model shares.

A foundation is an input projection (where modalities meet), then stages that give a feature pyramid.
What it declares in its `FoundationSpec` is all that stems, heads and planner know about it.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from unicon_pipeline.contract import CT_HU_RULE, ZYX, FeatureLevel, FoundationSpec, InputContract
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.registry import Registry


class Foundation(nn.Module, ABC):
    """Base of every family, which sets `spec` and implements `project` and `stages`."""

    spec: FoundationSpec

    @abstractmethod
    def project(self, native_bczyx: Tensor) -> Tensor:
        """Native channels, in the order of `spec.input.modalities`, to the projection level."""

    @abstractmethod
    def stages(self, projected: Tensor) -> list[Tensor]:
        """Projection level to feature pyramid, finest first, as declared in `spec.pyramid`."""

    def forward(self, native_bczyx: Tensor | None, native_present: Tensor | None, added: Tensor | None) -> list[Tensor]:
        """Features of a batch whose modalities may differ from case to case.

        Args:
            native_bczyx: native channels, absent ones zero; None when no case has any.
            native_present: (B,) 1.0 where a case has a native modality, else 0.0; None when all have.
            added: the gated sum of the stems' projections, or None.
        """
        fused = added
        if native_bczyx is not None:
            projected = self.project(native_bczyx)
            if native_present is not None:
                projected = projected * native_present.view(-1, 1, 1, 1, 1).to(projected.dtype)
            fused = projected if added is None else projected + added
        return self.stages(fused)


FOUNDATIONS: Registry[type[Foundation]] = Registry("foundation architecture")


@FOUNDATIONS.register("residual_encoder")
class ResidualEncoderFoundation(Foundation):
    """dynamic-network-architectures' ResidualEncoder with instance norm; its stem is the input projection."""

    def __init__(self, spec: FoundationSpec):
        super().__init__()
        self.spec = spec
        arguments = spec.arch_kwargs
        self.encoder = residual_encoder(
            len(spec.input.modalities),
            arguments["features_per_stage"],
            arguments["strides"],
            arguments["blocks_per_stage"],
        )

    def project(self, native_bczyx: Tensor) -> Tensor:
        return self.encoder.stem(native_bczyx)

    def stages(self, projected: Tensor) -> list[Tensor]:
        pyramid = []
        for stage in self.encoder.stages:
            projected = stage(projected)
            pyramid.append(projected)
        return pyramid


def residual_encoder(
    input_channels: int, features: Sequence[int], strides: Sequence[Sequence[int]], blocks: Sequence[int]
) -> ResidualEncoder:
    """3-D residual encoder with instance norm that returns the map of every stage; `strides` z, y, x per stage."""
    return ResidualEncoder(
        input_channels=input_channels,
        n_stages=len(features),
        features_per_stage=list(features),
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[list(stride) for stride in strides],
        n_blocks_per_stage=list(blocks),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        return_skips=True,
    )


def build_foundation(spec: FoundationSpec) -> Foundation:
    """The network that `spec` declares, with fresh weights.

    Raises:
        UniconError: this installation has no such architecture.
        CheckpointError: the architecture does not take these arguments.
    """
    family = FOUNDATIONS[spec.architecture]
    try:
        return family(spec)
    except (LookupError, TypeError, ValueError, AssertionError, RuntimeError) as problem:
        raise CheckpointError(
            f"foundation.json: {spec.architecture} cannot be built from {spec.arch_kwargs}: {problem}."
        ) from problem


def freeze(module: nn.Module) -> nn.Module:
    """No gradients, and evaluation mode (running statistics too)."""
    return module.requires_grad_(False).eval()


def new_residual_encoder_spec(
    licence: str,
    provenance: dict,
    features: Sequence[int] = (16, 32, 64, 96, 128),
    strides: Sequence[ZYX] = ((1, 1, 1), *((2, 2, 2),) * 4),
) -> FoundationSpec:
    """The declaration of a fresh CT foundation, by default that of `unicon_pretrain`: one residual block a stage."""
    blocks = [1] * len(features)
    pyramid, stride = [], (1, 1, 1)
    for channels, step, count in zip(features, strides, blocks, strict=True):
        stride = tuple(a * b for a, b in zip(stride, step))
        convolutions = 2 * count + (stride == (1, 1, 1))  # the input projection works at full resolution
        pyramid.append(FeatureLevel(stride, channels, channels * convolutions))
    spec = FoundationSpec(
        architecture="residual_encoder",
        arch_kwargs={
            "features_per_stage": list(features),
            "strides": [list(step) for step in strides],
            "blocks_per_stage": blocks,
        },
        input=InputContract(
            modalities=("CT",),
            orientation="LPS",
            spacing_zyx_mm=None,
            fixed_shape_zyx=None,
            divisible_by_zyx=stride,
            intensity={"CT": CT_HU_RULE},
        ),
        kind="pyramid",
        projection=FeatureLevel((1, 1, 1), features[0], features[0]),
        pyramid=tuple(pyramid),
        embedding_channels=features[-1],
        encoder_macs_per_voxel=0.0,
        licence=licence,
        provenance=provenance,
    )
    return dataclasses.replace(spec, encoder_macs_per_voxel=_macs_per_voxel(spec))


def _macs_per_voxel(spec: FoundationSpec) -> float:
    shape = tuple(4 * divisor for divisor in spec.input.divisible_by_zyx)
    with torch.device("meta"):
        foundation = build_foundation(spec)
        native = torch.empty((1, len(spec.input.modalities), *shape))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        foundation(native, None, None)
    return counter.get_total_flops() / 2 / native[0, 0].numel()
