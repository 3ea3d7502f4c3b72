"""A network in the form in which it predicts: other layouts, types and blocks, the same function."""

from __future__ import annotations

import copy
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from torch import nn

from unicon_pipeline.lean_blocks import InstanceNormChannelsLast, LeanBlock, LeanSequence

_WEIGHTED = (nn.Conv3d, nn.ConvTranspose3d, nn.Linear)


def inference_form(
    network: nn.Module, device: torch.device, precision: torch.dtype, shared: dict[int, Any] | None = None
) -> nn.Module:
    """A copy of a merged network on `device`, to be called under `autocast(device, precision)`.

    On a CPU maps have their channels last, which convolutions are fastest with, and are held once (`lean_blocks`).

    Args:
        shared: forms made before, by what they were made of: pass one dict for all networks that have parts in common.
            Those they were made of must live as long as it is used.
    """
    on_cpu, made = device.type == "cpu", {} if shared is None else shared
    for module in network.modules():
        if on_cpu and isinstance(module, _WEIGHTED):
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in made:  # autocast would convert it again at every call
                    made[id(parameter)] = _converted(parameter, precision)
    form = copy.deepcopy(network, made)
    return _lean(form) if on_cpu else form.to(device)


def _converted(parameter: nn.Parameter, precision: torch.dtype) -> nn.Parameter:
    layout = torch.channels_last_3d if parameter.dim() == 5 else torch.contiguous_format
    return nn.Parameter(parameter.detach().to(precision, memory_format=layout, copy=True), requires_grad=False)


def _lean(form: nn.Module) -> nn.Module:
    replaced: dict[nn.Module, nn.Module] = {}  # a layer may be reachable under several names
    for kind in (LeanBlock, InstanceNormChannelsLast):
        for module in list(form.modules()):
            for name, child in module.named_children():
                if child not in replaced and kind.can_replace(child):
                    replaced[child] = kind(child)
                setattr(module, name, replaced.get(child, child))
    for module in form.modules():
        if isinstance(module, StackedConvBlocks) and all(isinstance(block, LeanBlock) for block in module.convs):
            module.convs = LeanSequence(*module.convs)
    return form
