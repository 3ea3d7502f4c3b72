"""Foundations: frozen encoders that every task of a model shares.

A foundation is an input projection (where modalities meet), then stages that give a feature pyramid.
What it declares in its `FoundationSpec` is all that stems, heads and planner know about it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from unicon_pipeline.contract import ZYX, FeatureLevel, FoundationSpec, InputContract
from unicon_pipeline.registry import Registry


class Foundation(nn.Module, ABC):
    """Base of every family, which implements `project` and `stages`.

    It is built from `spec.architecture`, `spec.arch_kwargs` and `spec.input` alone.
    """

    def __init__(self, spec: FoundationSpec):
        super().__init__()
        self.spec = spec

    @abstractmethod
    def project(self, native_bczyx: Tensor) -> Tensor:
        """Native channels, in the order of `spec.input.modalities`, to the projection level."""

    @abstractmethod
    def stages(self, projected: Tensor) -> list[Tensor]:
        """Projection level to the maps (B, C, Z, Y, X) that `spec.pyramid` declares: finest or shallowest first."""

    def forward(self, native_bczyx: Tensor | None, native_present: Tensor | None, added: Tensor | None) -> list[Tensor]:
        """Features of a batch whose modalities may differ from case to case.

        Args:
            native_bczyx: native channels, absent ones zero; None when no case has any.
            native_present: (B,) 1.0 where a case has a native modality, else 0.0; None when all have.
            added: the gated sum of the stems' projections, or None.
        """
        return self.stages(self._fused(native_bczyx, native_present, added))  # no name holds it while they run

    def _fused(self, native_bczyx: Tensor | None, native_present: Tensor | None, added: Tensor | None) -> Tensor:
        if native_bczyx is None:
            return added
        projected = self.project(native_bczyx)
        if native_present is not None:
            projected = projected * native_present.view(-1, 1, 1, 1, 1).to(projected.dtype)
        return projected if added is None else projected + added


FOUNDATIONS: Registry[type[Foundation]] = Registry("foundation architecture")


def freeze(module: nn.Module) -> nn.Module:
    """No gradients, and evaluation mode (running statistics too)."""
    return module.requires_grad_(False).eval()

_USUAL_EDGE = 128  # attention's share of the costs depends on the size of the input
_SHORTCUT = re.compile(r"\b(skip|downsample)\b")  # as dynamic-network-architectures and torchvision name them


def declare(
    architecture: str,
    arch_kwargs: dict[str, Any],
    contract: InputContract,
    kind: str,
    licence: str,
    provenance: dict[str, Any],
) -> FoundationSpec:
    """The declaration of a network: its levels and costs are read off one forward pass without data (meta device)."""
    from torch.utils.flop_counter import FlopCounterMode  # 70 MB of compilers come with it

    provisional = FeatureLevel((1, 1, 1), 1, 1)
    spec = FoundationSpec(
        architecture, arch_kwargs, contract, kind, provisional, (provisional,), 1, 0.0, licence, provenance
    )
    shape = contract.fixed_shape_zyx or tuple(max(4, -(-_USUAL_EDGE // by)) * by for by in contract.divisible_by_zyx)
    with torch.device("meta"):
        foundation = freeze(FOUNDATIONS[architecture](spec))
        native = torch.empty((1, len(contract.modalities), *shape))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, _KeptOutputs(foundation) as kept:
        projected = foundation.project(native)
        of_projection = len(kept.outputs)
        pyramid = foundation.stages(projected)
    strides = [_stride(shape, level) for level in pyramid]
    at_projection = _stride(shape, projected)
    maps = _maps_by_stride(kept.outputs, shape, [*strides, at_projection])
    projection_maps = sum(_maps_by_stride(kept.outputs[:of_projection], shape, [at_projection]).values())
    levels = [FeatureLevel(at, level.shape[1], maps.pop(at, 0)) for at, level in zip(strides, pyramid, strict=True)]
    return dataclasses.replace(
        spec,
        projection=FeatureLevel(at_projection, projected.shape[1], projection_maps),
        pyramid=tuple(levels),
        embedding_channels=levels[-1].channels,
        encoder_macs_per_voxel=counter.get_total_flops() / 2 / math.prod(shape),
    )


class _KeptOutputs:
    """Records what a backward pass keeps of a forward pass: outputs of layers with weights, and attention maps.

    `outputs`: (positions, channels) of each. The 1x1x1 shortcuts of residual blocks are left out.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.outputs: list[tuple[int, int]] = []

    def __enter__(self) -> _KeptOutputs:
        kept = [m for name, m in self.module.named_modules() if _keeps_its_output(name, m)]
        self._hooks = [module.register_forward_hook(self._record) for module in kept]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _record(self, module: nn.Module, _: object, output: Tensor) -> None:
        if isinstance(module, nn.Conv3d):
            channels = output.shape[1]
        elif isinstance(module, nn.Linear):
            channels = output.shape[-1]
        else:  # (windows, heads, queries, keys)
            channels = output.shape[1] * output.shape[3]
        self.outputs.append((output.numel() // channels, channels))


def _keeps_its_output(name: str, module: nn.Module) -> bool:
    if isinstance(module, nn.Conv3d):
        return math.prod(module.kernel_size) > 1 or _SHORTCUT.search(name) is None
    return isinstance(module, nn.Linear | nn.Softmax)


def _maps_by_stride(outputs: list[tuple[int, int]], shape_zyx: ZYX, strides: list[ZYX]) -> dict[ZYX, int]:
    """Channels of `outputs` summed at the stride they lie at; positions between two strides count at the nearer one."""
    voxels, maps = math.prod(shape_zyx), {}
    for positions, channels in outputs:
        reduction = voxels / positions
        nearest = min(strides, key=lambda stride: abs(math.log(math.prod(stride) / reduction)))
        maps[nearest] = maps.get(nearest, 0.0) + math.prod(nearest) / reduction * channels
    return {stride: math.ceil(count) for stride, count in maps.items()}


def _stride(shape_zyx: ZYX, level: Tensor) -> ZYX:
    z, y, x = (n // m for n, m in zip(shape_zyx, level.shape[2:], strict=True))
    return z, y, x
