"""A network in the form in which it predicts: other layouts and types, the same function.

In reduced precision a CPU convolves maps fastest with channels last; torch's instance norm would bring every such map
back to the usual layout, so it is replaced by one that does not.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

_WEIGHTED = (nn.Conv3d, nn.ConvTranspose3d, nn.Linear)


def inference_form(network: nn.Module, device: torch.device, precision: torch.dtype) -> nn.Module:
    """A copy of a merged network on `device`, to be called under `autocast(device, precision)`.

    In float32 it is the same layer by layer, since there every bit counts: the norm below sums over all voxels one
    after the other, which costs digits that reduced precision does not have anyway.
    """
    form = copy.deepcopy(network).to(device)
    if precision is torch.float32 or device.type != "cpu":
        return form
    replaced: dict[int, nn.Module] = {}  # a layer may be reachable under several names
    for module in form.modules():
        for name, child in module.named_children():
            if type(child) is nn.InstanceNorm3d and child.affine and not child.track_running_stats:
                setattr(module, name, replaced.setdefault(id(child), _InstanceNormChannelsLast(child)))
    for module in form.modules():
        if isinstance(module, _WEIGHTED):
            module.to(precision)  # autocast would do it again at every call
    return form.to(memory_format=torch.channels_last_3d)


class _InstanceNormChannelsLast(nn.Module):
    """Instance norm of maps (B, C, Z, Y, X) whose channels lie last in memory: batch norm over one sample's voxels."""

    def __init__(self, norm: nn.InstanceNorm3d):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, maps: Tensor) -> Tensor:
        samples = []
        for sample in maps.permute(0, 2, 3, 4, 1):
            voxels = sample.reshape(-1, sample.shape[-1])
            normed = torch.batch_norm(voxels, self.weight, self.bias, None, None, True, 0.0, self.eps, False)
            samples.append(normed.view(sample.shape))
        whole = samples[0][None] if len(samples) == 1 else torch.stack(samples)
        return whole.permute(0, 4, 1, 2, 3)
