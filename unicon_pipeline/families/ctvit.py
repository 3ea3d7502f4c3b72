"""CT-CLIP's image encoder CTViT (arXiv 2403.17834): attention within each slab of slices, then along z.

A new implementation that keeps the names and shapes of the published weights. Where it departs from a plain
transformer: only queries are normed, not keys and values; attention is a scaled cosine similarity; a depth-wise
convolution, causal along its first axis, tells tokens their neighbourhood. In the temporal stack that first axis is y:
the original reads tokens stored as (y, x, z) as if they were (z, y, x). On its cubic token grid this only renames
axes, and these are the axes used here on every grid.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from unicon_pipeline.checkpoint import Checkpoint, tensors_under, without_wrappers
from unicon_pipeline.contract import ZYX, FoundationSpec, InputContract, IntensityRule
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.foundation import FOUNDATIONS, Foundation, declare
from unicon_pipeline.imported import Imported, ImportOptions
from unicon_pipeline.records import from_dict
from unicon_pipeline.weights import take_state

_COSINE_SCALE = 8.0
_LARGEST = {"dim": 4096, "heads": 128, "dim_head": 1024, "feed_forward": 32768}
_LARGEST_DEPTH = 128

# The published loader hands the network the stored axes of a NIfTI file as (k, i, j), without looking at its header.
# Its training files keep DICOM's raster, i towards the patient's left, j towards the back, slices towards the head
# (the publisher's own repair of their headers sets ITK's identity direction): so z = S, y = L, x = P.
_ORIENTATION = "PLS"
_SPACING_ZYX_MM = (1.5, 0.75, 0.75)
_HU_RULE = IntensityRule("piecewise", "HU", (-1000.0, 1000.0), (-1.0, 1.0))

_SOURCE = "CT-CLIP, ibrahimhamamci/CT-RATE on Hugging Face"
_LICENCE = "CC-BY-NC-SA-4.0"
_ENCODER = "visual_transformer."
_LAST_NORM = f"{_ENCODER}enc_temporal_transformer.norm_out.gamma"
# The autoencoder's codebook and decoder, and what no forward pass of the encoder reads.
_UNUSED = re.compile(r"(?:enc_\w+\.layers\.\d+\.1\.)?(vq|to_pixels\w*|to_patch_emb_first_frame|context_norm|null_kv)\b")


@dataclass(frozen=True)
class CTViTSize:
    """The `arch_kwargs`. `feed_forward`: width behind the gate. `patch_zyx`: voxels per token.

    `hidden_layers`: the layers, counted from 1 through the spatial and then the temporal stack, whose outputs are the
    features; the last one is the last layer.
    """

    dim: int
    spatial_depth: int
    temporal_depth: int
    heads: int
    dim_head: int
    feed_forward: int
    patch_zyx: ZYX
    hidden_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = (*(getattr(self, name) for name in _LARGEST), *self.patch_zyx, self.spatial_depth, self.temporal_depth)
        small = all(getattr(self, name) <= limit for name, limit in _LARGEST.items())
        depth = self.spatial_depth + self.temporal_depth
        if min(sizes) < 1 or not small or max(self.patch_zyx) > 64 or depth > _LARGEST_DEPTH:
            raise ValueError(f"sizes from 1 to {_LARGEST}, {_LARGEST_DEPTH} layers and patches of 64 are possible.")
        layers = self.hidden_layers
        if not layers or sorted({*layers, depth}) != list(layers) or layers[0] < 1:
            raise ValueError(f"hidden_layers must rise from 1 or more to the depth, {depth}.")


@FOUNDATIONS.register("ctvit")
class CTViT(Foundation):
    """Patch embedding (norm, linear map, norm), spatial stack, temporal stack.

    All features lie at the stride of the patches. The last layer of each stack has passed that stack's final norm: the
    last feature is what CT-CLIP hands on. There are no absolute positions, so any grid of whole patches works.
    Parameters keep the published names, but for norms, whose gamma and beta are a weight and a bias here.
    """

    def __init__(self, spec: FoundationSpec):
        super().__init__(spec)
        size = from_dict(CTViTSize, spec.arch_kwargs, "arch_kwargs", CheckpointError)
        self.size = size
        patch = len(spec.input.modalities) * math.prod(size.patch_zyx)
        self.to_patch_emb = nn.Sequential(
            _Patches(size.patch_zyx), nn.LayerNorm(patch), nn.Linear(patch, size.dim), nn.LayerNorm(size.dim)
        )
        self.spatial_rel_pos_bias = _RelativePositionBias(size.dim, size.heads)
        self.enc_spatial_transformer = _Stack(size, size.spatial_depth, sequence_axes=2)
        self.enc_temporal_transformer = _Stack(size, size.temporal_depth, sequence_axes=1)

    def project(self, native_bczyx: Tensor) -> Tensor:
        grid = [voxels // edge for voxels, edge in zip(native_bczyx.shape[2:], self.size.patch_zyx)]
        tokens = self.to_patch_emb(native_bczyx)
        return tokens.view(len(native_bczyx), *grid, self.size.dim).permute(0, 4, 1, 2, 3)

    def stages(self, projected: Tensor) -> list[Tensor]:
        bias = self.spatial_rel_pos_bias(*projected.shape[3:])
        spatial = self.enc_spatial_transformer(projected.permute(0, 2, 3, 4, 1), bias)
        temporal = self.enc_temporal_transformer(spatial[-1].permute(0, 2, 3, 1, 4))
        maps = [*(b_zyx_c.permute(0, 4, 1, 2, 3) for b_zyx_c in spatial)]
        maps += [b_yxz_c.permute(0, 4, 3, 1, 2) for b_yxz_c in temporal]
        return [maps[number - 1] for number in self.size.hidden_layers]


class _Patches(nn.Module):
    """(B, C, Z, Y, X) to (tokens of the whole batch, voxels of a patch), both in the order C, z, y, x."""

    def __init__(self, patch_zyx: ZYX):
        super().__init__()
        self.patch_zyx = patch_zyx

    def forward(self, volume: Tensor) -> Tensor:
        for axis, edge in zip((4, 3, 2), self.patch_zyx[::-1]):
            volume = volume.unflatten(axis, (-1, edge))
        b, c, z, in_z, y, in_y, x, in_x = range(8)
        return volume.permute(b, z, y, x, c, in_z, in_y, in_x).flatten(4).flatten(0, 3)


class _RelativePositionBias(nn.Module):
    """A small network gives each offset between two tokens of a slab its bias per head, on a logarithmic scale."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(2, dim), nn.LeakyReLU(0.1)),
            nn.Sequential(nn.Linear(dim, dim), nn.LeakyReLU(0.1)),
            nn.Linear(dim, heads),
        )

    def forward(self, height: int, width: int) -> Tensor:
        """(1, heads, N, N) for N = height x width tokens: of the row's token towards the column's."""
        weight = self.net[-1].weight
        rows, columns = (torch.arange(n, device=weight.device) for n in (height, width))
        # There are far fewer offsets than pairs of tokens; each goes through the network once.
        offsets = torch.cartesian_prod(*(torch.arange(1 - n, n, device=weight.device) for n in (height, width)))
        by_offset = self.net((offsets.sign() * offsets.abs().log1p()).to(weight.dtype))
        down = rows[:, None, None, None] - rows[None, None, :, None] + height - 1
        right = columns[None, :, None, None] - columns[None, None, None, :] + width - 1
        index = (down * (2 * width - 1) + right).view(height * width, height * width)
        return by_offset[index].permute(2, 0, 1)[None]


class _Stack(nn.Module):
    """Layers whose sequences run over the last `sequence_axes` axes of the token grid, then a norm."""

    def __init__(self, size: CTViTSize, depth: int, sequence_axes: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([_Neighbourhood(size.dim), _CosineAttention(size), nn.Identity(), _feed_forward(size)])
            for _ in range(depth)
        )
        self.norm_out = nn.LayerNorm(size.dim)
        self._sequence_axes = sequence_axes

    def forward(self, grid: Tensor, bias: Tensor | None = None) -> list[Tensor]:
        """(B, I, J, K, C), and what is added to the attention's logits, to the output of each layer."""
        shape, outputs = grid.shape, []
        for neighbourhood, attention, _, feed_forward in self.layers:
            grid = grid + neighbourhood(grid)
            sequences = grid.reshape(-1, math.prod(shape[4 - self._sequence_axes : 4]), shape[4])
            sequences = sequences + attention(sequences, bias)
            sequences = sequences + feed_forward(sequences)
            grid = sequences.view(shape)
            outputs.append(grid)
        outputs[-1] = self.norm_out(grid)
        return outputs


class _Neighbourhood(nn.Module):
    """Depth-wise 3x3x3 convolution over (B, I, J, K, C) that does not look ahead along I."""

    def __init__(self, dim: int):
        super().__init__()
        self.dsconv = nn.Conv3d(dim, dim, 3, padding=(2, 1, 1), groups=dim)

    def forward(self, grid: Tensor) -> Tensor:
        return self.dsconv(grid.permute(0, 4, 1, 2, 3))[:, :, : grid.shape[1]].permute(0, 2, 3, 4, 1)


class _CosineAttention(nn.Module):
    """Attention whose logits are cosine similarities, scaled per channel and by a constant, plus a bias."""

    def __init__(self, size: CTViTSize):
        super().__init__()
        inner = size.heads * size.dim_head
        self.heads = size.heads
        self.norm = nn.LayerNorm(size.dim)
        self.to_q = nn.Linear(size.dim, inner, bias=False)
        self.to_kv = nn.Linear(size.dim, 2 * inner, bias=False)
        self.q_scale = nn.Parameter(torch.ones(size.dim_head))
        self.k_scale = nn.Parameter(torch.ones(size.dim_head))
        self.to_out = nn.Linear(inner, size.dim, bias=False)

    def forward(self, sequences: Tensor, bias: Tensor | None) -> Tensor:
        """(B, N, C), and (1, heads, N, N), to (B, N, C)."""
        projected = (self.to_q(self.norm(sequences)), *self.to_kv(sequences).chunk(2, dim=-1))
        q, k, v = (tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2) for tensor in projected)
        q = functional.normalize(q, dim=-1) * self.q_scale
        k = functional.normalize(k, dim=-1) * self.k_scale
        mixed = functional.scaled_dot_product_attention(q, k, v, bias, scale=_COSINE_SCALE)
        return self.to_out(mixed.transpose(1, 2).flatten(2))


class _GatedGELU(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        values, gate = tokens.chunk(2, dim=-1)
        return values * functional.gelu(gate)


def _feed_forward(size: CTViTSize) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(size.dim),
        nn.Linear(size.dim, 2 * size.feed_forward, bias=False),
        _GatedGELU(),
        nn.Identity(),
        nn.Linear(size.feed_forward, size.dim, bias=False),
    )


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the keys are CT-CLIP's, alone or within a larger model."""
    try:
        return bool(ctclip_tensors(checkpoint))
    except CheckpointError:
        return False


def convert(checkpoint: Checkpoint, options: ImportOptions) -> Imported:
    """The image encoder alone; `zero_shot.zero_shot_parts` gives the task it was trained for.

    Raises:
        CheckpointError: it is not CT-CLIP's, or not complete.
    """
    tensors, source = ctclip_tensors(checkpoint), str(checkpoint.path)
    found, left_out = _encoder_and_rest(tensors)
    provenance = {
        "family": "ctclip",
        "source": options.origin or _SOURCE,
        "file": checkpoint.path.name,
        "sha256": checkpoint.sha256,
    }
    if options.text_encoder is None and options.findings is None:
        provenance["own_task"] = "left out: it needs the text encoder's tokenizer, or ready latents of findings"
    arch_kwargs = _arch_kwargs(tensors, source)
    contract = InputContract(
        modalities=("CT",),
        orientation=options.orientation or _ORIENTATION,
        spacing_zyx_mm=_SPACING_ZYX_MM,
        fixed_shape_zyx=None,
        divisible_by_zyx=tuple(arch_kwargs["patch_zyx"]),
        intensity={"CT": _HU_RULE},
    )
    spec = declare("ctvit", arch_kwargs, contract, "tokens", options.licence or _LICENCE, provenance)
    with torch.device("meta"):
        network = CTViT(spec)
    weights, report = take_state(network, found, source)
    return Imported(dataclasses.replace(spec, load_report={**report, "left_out": left_out}), weights)


def ctclip_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors, by CT-CLIP's own names; what stands before them (wrappers, a larger model's name) is removed.

    Raises:
        CheckpointError: it is no CT-CLIP.
    """
    tensors = without_wrappers(tensors_under(checkpoint.payload, "state_dict", "model", ""))
    before = next((key.removesuffix(_LAST_NORM) for key in tensors if key.endswith(_LAST_NORM)), None)
    if before is None:
        raise CheckpointError(f"{checkpoint.path} is no CT-CLIP: it has no {_LAST_NORM}. Import its CT-CLIP_v2.pt.")
    return {key.removeprefix(before): tensor for key, tensor in tensors.items()}


def _encoder_and_rest(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The encoder's tensors by the names they have here, and how many of each other part there are."""
    found, left_out = {}, Counter()
    for key, tensor in tensors.items():
        name = key.removeprefix(_ENCODER)
        unused = _UNUSED.match(name)
        if name == key:
            left_out[key.split(".")[0]] += 1
        elif unused and not (unused[1] == "null_kv" and tensor.numel()):  # used ones would have to be attended to
            left_out[_ENCODER + unused[1]] += 1
        else:
            found[name.replace(".gamma", ".weight").replace(".beta", ".bias")] = tensor
    return found, dict(sorted(left_out.items()))


def _arch_kwargs(tensors: dict[str, Tensor], source: str) -> dict[str, Any]:
    """Read off the shapes."""
    layer = f"{_ENCODER}enc_spatial_transformer.layers.0."
    try:
        in_plane = math.isqrt(len(tensors[f"{_ENCODER}to_patch_emb_first_frame.1.weight"]))
        inner, dim = tensors[f"{layer}1.to_q.weight"].shape
        dim_head = len(tensors[f"{layer}1.q_scale"])
        feed_forward = tensors[f"{layer}3.4.weight"].shape[1]
        patch_zyx = [len(tensors[f"{_ENCODER}to_patch_emb.1.weight"]) // in_plane**2, in_plane, in_plane]
        heads = inner // dim_head
    except KeyError as missing:
        raise CheckpointError(f"{source} is not complete: {missing.args[0]} is missing. Download it again.") from None
    except (IndexError, TypeError, ValueError, ZeroDivisionError) as problem:
        raise CheckpointError(f"{source}: its image encoder has tensors of impossible shapes ({problem}).") from problem
    spatial, temporal = (_depth(tensors, stack) for stack in ("enc_spatial_transformer", "enc_temporal_transformer"))
    hidden = {(spatial + 1) // 2, spatial, spatial + (temporal + 1) // 2, spatial + temporal}
    return {
        "dim": dim,
        "spatial_depth": spatial,
        "temporal_depth": temporal,
        "heads": heads,
        "dim_head": dim_head,
        "feed_forward": feed_forward,
        "patch_zyx": patch_zyx,
        "hidden_layers": sorted(hidden),
    }


def _depth(tensors: dict[str, Tensor], stack: str) -> int:
    """Distinct layer numbers, so that a file cannot ask for more than it holds."""
    layers = f"{_ENCODER}{stack}.layers."
    return len({key.removeprefix(layers).split(".")[0] for key in tensors if key.startswith(layers)})
