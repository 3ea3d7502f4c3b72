"""Foundations in miniature: one that begins coarser than its input, and one of tokens; no family is needed."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from unicon_pipeline.contract import CT_HU_RULE, ZYX, FoundationSpec, InputContract
from unicon_pipeline.foundation import FOUNDATIONS, Foundation, declare


@FOUNDATIONS.register("tiny_strided")
class TinyStrided(Foundation):
    """One strided convolution and norm per stage; fused behind the first convolution."""

    def __init__(self, spec: FoundationSpec):
        super().__init__(spec)
        self.stages_list = nn.ModuleList()
        width = len(spec.input.modalities)
        for own, step in zip(spec.arch_kwargs["features"], spec.arch_kwargs["steps"]):
            self.stages_list.append(nn.ModuleDict({"conv": nn.Conv3d(width, own, 3, step, 1), "norm": norm(own)}))
            width = own

    def project(self, native_bczyx: Tensor) -> Tensor:
        return self.stages_list[0]["conv"](native_bczyx)

    def stages(self, projected: Tensor) -> list[Tensor]:
        first, *later = self.stages_list
        pyramid = [functional.relu(first["norm"](projected))]
        for stage in later:
            pyramid.append(functional.relu(stage["norm"](stage["conv"](pyramid[-1]))))
        return pyramid


@FOUNDATIONS.register("tiny_tokens")
class TinyTokens(Foundation):
    """A patch embedding, then layers that add to the tokens: all at one stride."""

    def __init__(self, spec: FoundationSpec):
        super().__init__(spec)
        patch, width, layers = (spec.arch_kwargs[key] for key in ("patch", "width", "layers"))
        self.embedding = nn.Conv3d(len(spec.input.modalities), width, patch, patch)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(layers)
        )

    def project(self, native_bczyx: Tensor) -> Tensor:
        return self.embedding(native_bczyx)

    def stages(self, projected: Tensor) -> list[Tensor]:
        tokens, hidden = projected.movedim(1, -1), []  # (B, z, y, x, C)
        for layer in self.layers:
            # The mean mixes positions, as attention does.
            tokens = tokens + layer(tokens + tokens.mean(dim=(1, 2, 3), keepdim=True))
            hidden.append(tokens.movedim(-1, 1))
        return hidden


def norm(channels: int) -> nn.Module:
    return nn.InstanceNorm3d(channels, affine=True)


def strided_spec(features: tuple[int, ...], steps: tuple[ZYX, ...], modalities: tuple[str, ...] = ("CT",)):
    total = tuple(torch.tensor(steps).prod(dim=0).tolist())
    kwargs = {"features": list(features), "steps": [list(step) for step in steps]}
    return declare("tiny_strided", kwargs, contract(total, modalities), "pyramid", "none", {})


def tokens_spec(patch: ZYX, width: int = 6, layers: int = 3, modalities: tuple[str, ...] = ("CT",)):
    kwargs = {"patch": list(patch), "width": width, "layers": layers}
    return declare("tiny_tokens", kwargs, contract(patch, modalities), "tokens", "none", {})


def contract(divisible_by_zyx: ZYX, modalities: tuple[str, ...]) -> InputContract:
    return InputContract(modalities, "LPS", None, None, divisible_by_zyx, dict.fromkeys(modalities, CT_HU_RULE))
