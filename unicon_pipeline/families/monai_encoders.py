"""Encoders made of MONAI's parts: SegResNets (CT-FM, VISTA3D, SuPreM) and Swin transformers (SuPreM, VoCo, NVIDIA).

MONAI is an extra: it is imported where such a network is built, not to recognise a checkpoint.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from unicon_pipeline.checkpoint import Checkpoint, tensors_under, without_wrappers
from unicon_pipeline.contract import NOT_STATED, FoundationSpec, InputContract, IntensityRule, SpacingZYX
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.foundation import FOUNDATIONS, Foundation, declare
from unicon_pipeline.imported import Imported, ImportOptions
from unicon_pipeline.weights import take_state

_MOST_LEVELS = 6
_MOST_BLOCKS = 64
_MOST_CHANNELS = 1024  # of the finest level; the real ones are 16 to 192

_NORMS = {"batch": "batch", "instance": "instance", "group": ("group", {"num_groups": 8})}

_WINDOW = (7, 7, 7)
_SWIN_LEVELS = 4
# Of the eight voxels that patch merging joins, MONAI before 1.5 took two twice and left two out. All releases were
# trained that way, and nothing in their weights tells; later versions of MONAI load them without a word.
_MERGED_ZYX = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))


@FOUNDATIONS.register("segres_encoder")
class SegResEncoderFoundation(Foundation):
    """MONAI's SegResEncoder; modalities are fused in the first convolution, which is linear in them.

    arch_kwargs: `init_filters` (channels of the finest level), `blocks_down` (residual blocks of each level), `norm`.
    Channels double and strides double from level to level, from stride 1.
    """

    def __init__(self, spec: FoundationSpec):
        super().__init__(spec)
        init_filters, blocks_down, norm = _segres_arguments(**spec.arch_kwargs)
        encoder = _monai("nets.segresnet_ds").SegResEncoder(
            in_channels=len(spec.input.modalities), init_filters=init_filters, blocks_down=blocks_down, norm=norm
        )
        self.conv_init, self.layers = encoder.conv_init, encoder.layers

    def project(self, native_bczyx: Tensor) -> Tensor:
        return self.conv_init(native_bczyx)

    def stages(self, projected: Tensor) -> list[Tensor]:
        pyramid, running = [], projected
        for level in self.layers:
            pyramid.append(level["blocks"](running))
            running = level["downsample"](pyramid[-1])
        return pyramid


@FOUNDATIONS.register("swin_unetr")
class SwinFoundation(Foundation):
    """The Swin transformer of MONAI's SwinUNETR, without the convolutions that SwinUNETR puts behind its maps.

    arch_kwargs: `feature_size` (channels at stride 2), `depths` and `heads` of the four stages, `convolutions` (the
    residual block before each stage, "use_v2" in MONAI).
    Maps at the strides 2, 4, 8, 16, 32, with 1, 2, 4, 8, 16 times the channels, each normalised over the channels as
    SwinUNETR reads them. Modalities are fused in the patch embedding, which is linear in them.
    """

    def __init__(self, spec: FoundationSpec):
        super().__init__(spec)
        width, depths, heads, convolutions = _swin_arguments(**spec.arch_kwargs)
        blocks, swin = _monai("blocks"), _monai("nets.swin_unetr")
        self.patch_embed = blocks.PatchEmbed(2, len(spec.input.modalities), width, norm_layer=None)
        self.stage_names = [f"layers{number}" for number in range(1, _SWIN_LEVELS + 1)]
        for name, depth, own_heads in zip(self.stage_names, depths, heads, strict=True):
            if convolutions:
                block = blocks.UnetrBasicBlock(3, width, width, 3, 1, "instance", res_block=True)
                self.add_module(f"{name}c", nn.ModuleList([block]))
            stage = swin.BasicLayer(
                width, depth, own_heads, _WINDOW, drop_path=[0.0] * depth, qkv_bias=True, downsample=_PatchMerging
            )
            self.add_module(name, nn.ModuleList([stage]))
            width *= 2
        self.convolutions = convolutions

    def project(self, native_bczyx: Tensor) -> Tensor:
        return self.patch_embed(native_bczyx)

    def stages(self, projected: Tensor) -> list[Tensor]:
        pyramid, running = [_normalised(projected)], projected
        for name in self.stage_names:
            if self.convolutions:
                running = self.get_submodule(f"{name}c.0")(running.contiguous())
            running = self.get_submodule(f"{name}.0")(running.contiguous())
            pyramid.append(_normalised(running))
        return pyramid


class _PatchMerging(nn.Module):
    """Joins 2 x 2 x 2 neighbours as MONAI did before 1.5; (B, Z, Y, X, C) to half the size and twice the channels."""

    def __init__(self, dim: int, norm_layer: type[nn.LayerNorm], spatial_dims: int):
        super().__init__()
        self.norm = norm_layer(2**spatial_dims * dim)
        self.reduction = nn.Linear(2**spatial_dims * dim, 2 * dim, bias=False)

    def forward(self, features_bzyxc: Tensor) -> Tensor:
        neighbours = [features_bzyxc[:, z::2, y::2, x::2] for z, y, x in _MERGED_ZYX]
        return self.reduction(self.norm(torch.cat(neighbours, dim=-1)))


def _normalised(features_bczyx: Tensor) -> Tensor:
    channels_last = features_bczyx.movedim(1, -1)
    return functional.layer_norm(channels_last, channels_last.shape[-1:]).movedim(-1, 1)


def _monai(module: str) -> ModuleType:
    try:
        import_module("einops")  # MONAI's Swin transformer fails late without it
        return import_module(f"monai.networks.{module}")
    except ImportError as problem:
        install = 'pip install "unicon-pipeline[monai]"'
        raise CheckpointError(f"This foundation is made of MONAI's parts: {install} ({problem}).") from problem


def _segres_arguments(init_filters: int, blocks_down: list[int], norm: str) -> tuple[int, list[int], Any]:
    _check_counts("init_filters", [init_filters], _MOST_CHANNELS)
    _check_counts("blocks_down", blocks_down, _MOST_BLOCKS)
    if not 1 <= len(blocks_down) <= _MOST_LEVELS:
        raise ValueError(f"blocks_down has 1 to {_MOST_LEVELS} levels, not {len(blocks_down)}")
    return init_filters, blocks_down, _NORMS[norm]


def _swin_arguments(
    feature_size: int, depths: list[int], heads: list[int], convolutions: bool
) -> tuple[int, list[int], list[int], bool]:
    _check_counts("feature_size", [feature_size], _MOST_CHANNELS)
    _check_counts("depths", depths, _MOST_BLOCKS)
    _check_counts("heads", heads, _MOST_CHANNELS)
    if len(depths) != _SWIN_LEVELS or len(heads) != _SWIN_LEVELS:
        raise ValueError(f"depths and heads have {_SWIN_LEVELS} stages, not {len(depths)} and {len(heads)}")
    if any(feature_size * 2**stage % own_heads for stage, own_heads in enumerate(heads)):
        raise ValueError(f"heads {heads} must divide the channels of their stages, which double from {feature_size}")
    return feature_size, depths, heads, convolutions is True


def _check_counts(name: str, counts: list[int], most: int) -> None:
    for count in counts:
        if type(count) is not int or not 1 <= count <= most:
            raise ValueError(f"{name} is made of integers from 1 to {most}, not {count!r}")


@dataclass(frozen=True)
class _Release:
    """What was published, and how its network was fed; MONAI's (R, A, S) arrays are z, y, x here, so "SAR"."""

    source: str
    licence: str
    window_hu: tuple[float, float]
    spacing_zyx_mm: SpacingZYX | None
    orientation: str = "SAR"


_ISOTROPIC = (1.5, 1.5, 1.5)
_ABDOMEN_HU = (-175.0, 250.0)
_CT_FM = _Release(
    # Pretrained at 3 x 1 x 1 mm, but published to be applied at any spacing.
    "CT-FM, project-lighter on Hugging Face", "Apache-2.0", (-1024.0, 2048.0), None, "LPS"
)  # fmt: skip
_VISTA3D = _Release(
    "VISTA3D, nvidia/NV-Segment-CT on Hugging Face (or NV-Segment-CTMR, which has the same keys)",
    "NVIDIA Open Model License (NV-Segment-CTMR: NVIDIA OneWay Noncommercial License)",
    (-963.8247715525971, 1053.678477684517),
    _ISOTROPIC,
)
# The CLIP-driven Universal Model, from which SuPreM's code came, wraps its Swin UNETR alike.
_SUPREM = _Release("SuPreM, MrGiovanni/SuPreM on Hugging Face", "CC-BY-NC-ND-4.0", _ABDOMEN_HU, _ISOTROPIC)
_VOCO = _Release("VoCo, Luffy503/VoCo on Hugging Face", "Apache-2.0", _ABDOMEN_HU, _ISOTROPIC)
_NVIDIA_PRETRAINED = {  # by what stands before the keys; both were fed alike
    "": "Swin UNETR, pretrained by NVIDIA on 5050 CTs (model_swinvit)",
    "encoder.": "Swin UNETR, pretrained by NVIDIA as a disruptive autoencoder on CT and MRI",
}
_NVIDIA_BTCV = _Release("Swin UNETR, trained by NVIDIA on BTCV", NOT_STATED, _ABDOMEN_HU, (1.5, 1.5, 2.0))
_BTCV_CLASSES = 14


def _segresnet_renamed(key: str) -> str:
    """SegResNet's encoder is a SegResEncoder under other names: level i begins with the strided convolution to it."""
    place = re.match(r"down_layers\.(\d+)\.(\d+)\.(.+)", key)
    if place is None:
        return key.replace("convInit.conv.", "conv_init.")
    level, index, rest = int(place[1]), int(place[2]), re.sub(r"\bconv\.", "", place[3])
    return f"layers.{level}.blocks.{index - 1}.{rest}" if index else f"layers.{level - 1}.downsample.{rest}"


def _swin_renamed(key: str) -> str:
    """NVIDIA's pretraining wrapped each stage once more, and called the layers of a perceptron fc1 and fc2."""
    key = re.sub(r"^(layers\d\.0)\.0\.", r"\1.", key)
    return re.sub(r"\.mlp\.fc([12])\.", r".mlp.linear\1.", key)


@dataclass(frozen=True)
class _Layout:
    """How files name an encoder: its first convolution, what all its keys start with, and their names here."""

    architecture: str
    first: str
    starts: tuple[str, ...]
    renamed: Callable[[str], str] = str


_SEGRES_ENCODER = _Layout("segres_encoder", "conv_init.weight", ("conv_init.", "layers."))
_SEGRESNET = _Layout("segres_encoder", "convInit.conv.weight", ("convInit.", "down_layers."), _segresnet_renamed)
_SWIN = _Layout(
    "swin_unetr", "patch_embed.proj.weight", ("patch_embed.", *(f"layers{i}" for i in range(1, 5))), _swin_renamed
)
_LAYOUTS = (_SEGRES_ENCODER, _SEGRESNET, _SWIN)
_UNET3D_KEY = "down_tr64.ops.0.bn1.weight"


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of a SegResNet, a Swin UNETR or SuPreM's U-Net (which `convert` refuses)."""
    try:
        tensors = _tensors(checkpoint)
    except CheckpointError:
        return False
    return any(_prefixes(tensors, layout) for layout in _LAYOUTS) or any(key.endswith(_UNET3D_KEY) for key in tensors)


def convert(checkpoint: Checkpoint, options: ImportOptions) -> Imported:
    """The encoder alone; decoders, heads and the convolutions of SwinUNETR behind the transformer's maps are left out.

    Raises:
        CheckpointError: no release that this module knows, or an incomplete one; SuPreM's U-Net; MONAI is missing.
    """
    tensors = _tensors(checkpoint)
    layout, prefix = _located(checkpoint, tensors)
    starts = tuple(prefix + start for start in layout.starts)
    inside = {key: layout.renamed(key.removeprefix(prefix)) for key in tensors if key.startswith(starts)}
    found = {name: tensors[key] for key, name in inside.items()}
    if layout is _SWIN:
        release, arch_kwargs = _swin_release(checkpoint, prefix, tensors), _swin_kwargs(checkpoint, found)
        divisor = 2 ** (1 + _SWIN_LEVELS)
    else:
        norm = _segres_norm(checkpoint, layout, found)
        release, arch_kwargs = _segres_release(checkpoint, prefix, norm), _segres_kwargs(found, norm)
        divisor = 2 ** (len(arch_kwargs["blocks_down"]) - 1)
    contract = InputContract(
        modalities=("CT",),
        orientation=options.orientation or release.orientation,
        spacing_zyx_mm=release.spacing_zyx_mm,
        fixed_shape_zyx=None,
        divisible_by_zyx=(divisor,) * 3,
        intensity={"CT": IntensityRule("piecewise", "HU", release.window_hu, (0.0, 1.0))},
    )
    provenance = {
        "family": layout.architecture,
        "source": options.origin or release.source,
        "file": checkpoint.path.name,
        "sha256": checkpoint.sha256,
    }
    try:
        spec = declare(
            layout.architecture, arch_kwargs, contract, "pyramid", options.licence or release.licence, provenance
        )
    except ValueError as problem:
        raise CheckpointError(f"{checkpoint.path} holds no encoder that can be built: {problem}.") from problem
    with torch.device("meta"):
        network = FOUNDATIONS[layout.architecture](spec)
    weights, report = take_state(network, found, str(checkpoint.path))
    report["left_out"] = dict(sorted(Counter(_part(key, prefix) for key in tensors.keys() - inside.keys()).items()))
    return Imported(dataclasses.replace(spec, load_report=report), weights)


def _tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return without_wrappers(tensors_under(checkpoint.payload, "state_dict", "net", "model", "network_weights", ""))


def _prefixes(tensors: dict[str, Tensor], layout: _Layout) -> list[str]:
    """What stands before the keys of each encoder of this layout."""
    firsts = [key for key in tensors if f".{key}".endswith(f".{layout.first}") and tensors[key].dim() == 5]
    prefixes = [key.removesuffix(layout.first) for key in firsts]
    return [prefix for prefix in prefixes if any(key.startswith(prefix + layout.starts[1]) for key in tensors)]


def _located(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> tuple[_Layout, str]:
    if any(key.endswith(_UNET3D_KEY) for key in tensors):
        raise CheckpointError(
            f"{checkpoint.path} holds SuPreM's U-Net, whose batch normalisation uses the statistics of the batch at "
            "hand even after training, so that a case's features would depend on what lies beside it. Import SuPreM's "
            "SegResNet or Swin UNETR."
        )
    located = [(layout, prefix) for layout in _LAYOUTS for prefix in _prefixes(tensors, layout)]
    if len(located) != 1:
        names = ", ".join(f"{prefix}{layout.first}" for layout, prefix in located) or "none"
        raise CheckpointError(
            f"{checkpoint.path}: expected one SegResNet or Swin UNETR, found {names}. Save the state of one alone."
        )
    layout, prefix = located[0]
    channels = tensors[prefix + layout.first].shape[1]
    if channels != 1:
        raise CheckpointError(
            f"{checkpoint.path}: the encoder takes {channels} channels, and the file does not say which; "
            "expected one of the releases for CT alone, which take 1."
        )
    return layout, prefix


def _segres_norm(checkpoint: Checkpoint, layout: _Layout, found: dict[str, Tensor]) -> str:
    if layout is _SEGRESNET:
        return "group"
    norm = "batch" if any(key.endswith(".running_mean") for key in found) else "instance"
    config = checkpoint.payload.get("config")
    for name, expected in (("norm", norm), ("act", "relu")):
        stated = config.get(name, expected) if isinstance(config, dict) else expected
        stated = stated[0] if isinstance(stated, list) and stated else stated
        if str(stated).lower() != expected:
            raise CheckpointError(
                f"{checkpoint.path}: config.json says {name} {stated!r}, but the weights are those of {expected!r} as "
                "CT-FM has it. Download both again."
            )
    return norm


def _segres_release(checkpoint: Checkpoint, prefix: str, norm: str) -> _Release:
    if prefix.endswith("image_encoder.encoder.") and norm == "instance":
        return _VISTA3D
    if norm == "batch":
        return _CT_FM
    if norm == "group" and "net" in checkpoint.payload:
        return _SUPREM
    raise _of_no_release(
        checkpoint,
        "SegResNet, but not that of CT-FM (batch norm), VISTA3D (under image_encoder.) or SuPreM (under net)",
    )


def _segres_kwargs(found: dict[str, Tensor], norm: str) -> dict[str, Any]:
    """Distinct block numbers are counted, so that a file cannot ask for more than it holds."""
    blocks = {tuple(key.split(".")[1:4:2]) for key in found if ".blocks." in key}
    levels = Counter(level for level, *_ in blocks)
    blocks_down = [levels[str(level)] for level in range(len(levels))]
    return {"init_filters": len(found["conv_init.weight"]), "blocks_down": blocks_down, "norm": norm}


def _swin_release(checkpoint: Checkpoint, prefix: str, tensors: dict[str, Tensor]) -> _Release:
    """The releases share their architecture, so that the wrapping has to tell."""
    if any(key.startswith(f"{prefix}layers1c.") for key in tensors):
        return _VOCO
    if "net" in checkpoint.payload:
        return _SUPREM
    if prefix in _NVIDIA_PRETRAINED:
        return _Release(_NVIDIA_PRETRAINED[prefix], NOT_STATED, (-1000.0, 1000.0), None)
    if len(tensors.get("out.conv.conv.weight", ())) == _BTCV_CLASSES:
        return _NVIDIA_BTCV
    raise _of_no_release(
        checkpoint,
        "Swin UNETR, but not that of SuPreM (under net), VoCo (use_v2) or NVIDIA (model_swinvit; or trained on BTCV)",
    )


def _of_no_release(checkpoint: Checkpoint, what: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path} holds a {what}, so it is not known which axes, spacing and HU window it was trained with."
    )


def _swin_kwargs(checkpoint: Checkpoint, found: dict[str, Tensor]) -> dict[str, Any]:
    """Each block has one table of relative positions, with a column for each head."""
    tables = {key: table for key, table in found.items() if key.endswith(".relative_position_bias_table")}
    stages = [[tables[key] for key in tables if key.startswith(f"layers{stage}.")] for stage in range(1, 5)]
    if any(not stage or stage[0].dim() != 2 for stage in stages):
        raise CheckpointError(
            f"{checkpoint.path}: a stage of the Swin transformer lacks its relative_position_bias_table. Expected "
            "layers1 to layers4, all of them; download the checkpoint again."
        )
    return {
        "feature_size": len(found["patch_embed.proj.weight"]),
        "depths": [len(stage) for stage in stages],
        "heads": [stage[0].shape[1] for stage in stages],
        "convolutions": any(key.startswith("layers1c.") for key in found),
    }


def _part(key: str, prefix: str) -> str:
    """The first name on the way to `key` that is not on the way to the encoder."""
    names, way = key.split("."), prefix.split(".")
    shared = next((i for i, (name, step) in enumerate(zip(names, way)) if name != step), 0)
    return ".".join(names[: shared + 1])
