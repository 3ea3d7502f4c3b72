"""Adapters: a task's low-rank update of the frozen encoder.

An adapter never touches the encoder. It holds, per adapted weight, two small matrices whose product is
added to that weight; the encoder is called with the sums in place of its own weights
(`torch.func.functional_call`). In weight space every geometry is the same case: any kernel, stride,
dilation, padding mode or groups of a convolution, and `Linear`.

One weight can be reachable under several names (in dynamic-network-architectures `convs.0.conv` is
`convs.0.all_modules.0`). Everything here goes by identity: a weight is adapted once, and put into each
distinct slot of a distinct module once. (By its default `functional_call` would visit a slot once per
name, and restore the adapted weight instead of the frozen one.)

Low-rank update: Hu et al., LoRA, arXiv 2106.09685. `up` starts at zero, so a new adapter changes nothing.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

from unicon_pipeline.errors import PlanError
from unicon_pipeline.registry import Registry

ADAPTERS: Registry[type[nn.Module]] = Registry("adapter")
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@ADAPTERS.register("low_rank")
class LowRankAdapter(nn.Module):
    """Low-rank updates of all `Linear` and `Conv` weights, free updates of all norm scales and shifts.

    Norm scales and shifts are vectors, for which a low rank means nothing; they are few and adapt a
    frozen encoder to a new intensity distribution at almost no cost.
    """

    def __init__(self, encoder: nn.Module, rank: int, alpha: float):
        """Raises PlanError: the encoder has nothing to adapt, or the rank is below 1."""
        super().__init__()
        if rank < 1:
            raise PlanError(f"The rank of an adapter is at least 1, not {rank}.")
        matrices, vectors = adapted_parameters(encoder)
        if not matrices:
            raise PlanError("The adapter found no Linear or Conv weight in this foundation; plan it without adapters.")
        self.scale = alpha / rank
        self.matrix_names = tuple(matrices)
        self.vector_names = tuple(vectors)
        self.down = nn.ParameterList()
        self.up = nn.ParameterList()
        for weight in matrices.values():
            out_features, in_features = weight.shape[0], weight[0].numel()
            width = min(rank, out_features, in_features)
            bound = math.sqrt(3.0 / in_features)
            self.down.append(nn.Parameter(torch.empty(width, in_features).uniform_(-bound, bound)))
            self.up.append(nn.Parameter(torch.zeros(out_features, width)))
        self.shift = nn.ParameterList(nn.Parameter(torch.zeros_like(vector)) for vector in vectors.values())

    def forward(self, encoder: nn.Module, *inputs: Tensor | None):
        """The encoder's output with the updates applied; the encoder itself is left as it is."""
        return functional_call(encoder, self._by_slot(encoder), inputs, tie_weights=False)

    @torch.no_grad()
    def merged(self, encoder: nn.Module) -> nn.Module:
        """A copy of `encoder` with the updates in its weights; `encoder` itself is left as it is."""
        adapted = self.effective(encoder)
        merged = copy.deepcopy(encoder)
        for name, parameter in merged.named_parameters():
            if name in adapted:
                parameter.copy_(adapted[name])
        return merged

    def effective(self, encoder: nn.Module) -> dict[str, Tensor]:
        """The adapted parameters by first name: frozen value plus update in float32, differentiable in the update."""
        frozen = dict(encoder.named_parameters())
        adapted = {}
        with torch.autocast(next(encoder.parameters()).device.type, enabled=False):
            for name, down, up in zip(self.matrix_names, self.down, self.up, strict=True):
                adapted[name] = frozen[name] + self.scale * (up @ down).view_as(frozen[name])
            for name, shift in zip(self.vector_names, self.shift, strict=True):
                adapted[name] = frozen[name] + shift
        return adapted

    def _by_slot(self, encoder: nn.Module) -> dict[str, Tensor]:
        first_name = {id(parameter): name for name, parameter in encoder.named_parameters()}
        adapted = self.effective(encoder)
        slots = {}
        for module_name, module in encoder.named_modules():
            for own_name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                name = first_name[id(parameter)]
                if name in adapted:
                    slots[f"{module_name}.{own_name}" if module_name else own_name] = adapted[name]
        return slots


def adapted_parameters(encoder: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder's Linear/Conv weights, and its norm scales and shifts, each once under its first name."""
    first_name = {id(parameter): name for name, parameter in encoder.named_parameters()}
    matrices, vectors = {}, {}
    for module in encoder.modules():
        if isinstance(module, _WEIGHTED):
            matrices[first_name[id(module.weight)]] = module.weight
        elif isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() == 1:
            for parameter in module.parameters(recurse=False):
                vectors[first_name[id(parameter)]] = parameter
    return matrices, vectors
