"""Primus (arXiv 2503.01835): a plain transformer over 8x8x8 patches, with learned and rotary position embeddings.

The layers are dynamic-network-architectures' own. Position embeddings are made for the grid at hand: the rotary one
counts tokens, as the library does when it builds Primus for another patch; the learned one is stretched over the grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from dynamic_network_architectures.building_blocks.eva import Eva
from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchEmbed
from timm.layers import RotaryEmbeddingCat
from torch import Tensor
from torch.nn import functional

from unicon_pipeline.contract import ZYX, FoundationSpec
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.foundation import FOUNDATIONS, Foundation
from unicon_pipeline.records import from_dict

_LARGEST = {"embed_dim": 4096, "depth": 128, "heads": 128}
_LARGEST_PATCH, _MOST_TOKENS = 64, 128**3


@dataclass(frozen=True)
class PrimusSize:
    """The `arch_kwargs`.

    `pretraining_grid_zyx`: tokens along each axis for which the learned position embedding was trained.
    `hidden_layers`: the blocks, counted from 1, whose outputs are the features; the last one is the last block.
    `token_axes`: the order of z, y, x (0, 1, 2) in which tokens are counted, slowest first.
    `init_values`: of the scale that each block's residual branches have, or None: they have none.
    `scale_attn_inner`: a norm between the attention and its output projection.
    """

    embed_dim: int
    depth: int
    heads: int
    patch_embed_size: ZYX
    pretraining_grid_zyx: ZYX
    hidden_layers: tuple[int, ...]
    token_axes: ZYX = (0, 1, 2)
    init_values: float | None = None
    scale_attn_inner: bool = False

    def __post_init__(self) -> None:
        sizes = (self.embed_dim, self.depth, self.heads, *self.patch_embed_size, *self.pretraining_grid_zyx)
        small = all(getattr(self, name) <= limit for name, limit in _LARGEST.items())
        small = small and max(self.patch_embed_size) <= _LARGEST_PATCH
        if min(sizes) < 1 or not small or math.prod(self.pretraining_grid_zyx) > _MOST_TOKENS:
            raise ValueError(
                f"sizes from 1 to {_LARGEST}, patches to {_LARGEST_PATCH} and {_MOST_TOKENS} tokens are possible."
            )
        if self.embed_dim % (6 * self.heads):
            raise ValueError(f"embed_dim must be a multiple of 6 x heads, and {self.embed_dim} is none.")
        layers = self.hidden_layers
        if not layers or sorted({*layers, self.depth}) != list(layers) or layers[0] < 1:
            raise ValueError(f"hidden_layers must rise from 1 or more to the depth, {self.depth}.")
        if sorted(self.token_axes) != [0, 1, 2]:
            raise ValueError(f"token_axes must name 0, 1 and 2, not {self.token_axes}.")


@FOUNDATIONS.register("primus")
class PrimusFoundation(Foundation):
    """Patch embedding and transformer of Primus; modalities are fused in the patch embedding, which is linear in them.

    All features lie at the stride of the patches; the last one has passed the final norm, as Primus hands it on.
    """

    def __init__(self, spec: FoundationSpec):
        super().__init__(spec)
        size = from_dict(PrimusSize, spec.arch_kwargs, "arch_kwargs", CheckpointError)
        self.size = size
        self.down_projection = PatchEmbed(size.patch_embed_size, len(spec.input.modalities), size.embed_dim)
        self.eva = Eva(
            embed_dim=size.embed_dim,
            depth=size.depth,
            num_heads=size.heads,
            ref_feat_shape=_counted(size.pretraining_grid_zyx, size),
            init_values=size.init_values,
            scale_attn_inner=size.scale_attn_inner,
        )

    def project(self, native_bczyx: Tensor) -> Tensor:
        return self.down_projection(native_bczyx)

    def stages(self, projected: Tensor) -> list[Tensor]:
        size, eva = self.size, self.eva
        counted_bczyx = projected.permute(0, 1, *(2 + axis for axis in size.token_axes))
        grid = counted_bczyx.shape[2:]
        tokens_bnc = counted_bczyx.flatten(2).transpose(1, 2) + self._learned_positions(grid)
        rotary = self._rotary_positions(grid, projected.device)
        hidden = []
        for number, block in enumerate(eva.blocks, 1):
            tokens_bnc = block(tokens_bnc, rope=rotary)
            if number in size.hidden_layers:
                hidden.append(tokens_bnc)
        hidden[-1] = eva.norm(hidden[-1])
        back = (0, 1, *(2 + size.token_axes.index(axis) for axis in range(3)))
        return [tokens.transpose(1, 2).unflatten(2, grid).permute(back) for tokens in hidden]

    def _learned_positions(self, grid: ZYX) -> Tensor:
        """(1, N, C) for a grid of N tokens; as trained where the grid is the pretraining one."""
        trained_grid = _counted(self.size.pretraining_grid_zyx, self.size)
        if grid == trained_grid:
            return self.eva.pos_embed
        map_bczyx = self.eva.pos_embed.transpose(1, 2).unflatten(2, trained_grid)
        return functional.interpolate(map_bczyx, grid, mode="trilinear").flatten(2).transpose(1, 2)

    def _rotary_positions(self, grid: ZYX, device: torch.device) -> Tensor:
        """(N, C) sines and cosines for a grid of N tokens."""
        counts = list(grid)
        rotary = RotaryEmbeddingCat(
            self.eva.rope.dim, in_pixels=False, feat_shape=counts, ref_feat_shape=counts, device=device
        )
        return rotary.get_embed()


def _counted(grid_zyx: ZYX, size: PrimusSize) -> ZYX:
    slow, middle, fast = (grid_zyx[axis] for axis in size.token_axes)
    return slow, middle, fast
