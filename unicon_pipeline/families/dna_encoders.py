"""The encoders of nnU-Net and of what grew from it: dynamic-network-architectures' residual and plain encoder.

Configurations in the wild name classes by import path. Here such a path is looked up in a closed list by its last
part; nothing that a file names is ever imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from torch import Tensor, nn

from unicon_pipeline.contract import CT_HU_RULE, ZYX, FoundationSpec, InputContract
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.foundation import FOUNDATIONS, Foundation, declare
from unicon_pipeline.lean_blocks import in_turn

_NORMS = {"InstanceNorm3d": nn.InstanceNorm3d, "BatchNorm3d": nn.BatchNorm3d}
_ACTIVATIONS = {"LeakyReLU": nn.LeakyReLU, "ReLU": nn.ReLU}
_BLOCKS = {"BasicBlockD": BasicBlockD, "BottleneckD": BottleneckD}
_NUMBERS = {
    "norm_op_kwargs": ("eps", "affine", "momentum", "track_running_stats"),
    "dropout_op_kwargs": ("p", "inplace"),
    "nonlin_kwargs": ("inplace", "negative_slope"),
}
# What an nnU-Net `arch_kwargs` may say about an encoder; what else it says is refused, but for the decoder's part.
_SHARED = ("features_per_stage", "kernel_sizes", "strides", "conv_bias", "norm_op", "dropout_op", "nonlin", *_NUMBERS)
_OWN = {
    "PlainConvUNet": ("plain_encoder", "n_conv_per_stage", ("nonlin_first",)),
    "ResidualEncoderUNet": (
        "residual_encoder",
        "n_blocks_per_stage",
        ("block", "bottleneck_channels", "stem_channels", "squeeze_excitation", "squeeze_excitation_reduction_ratio"),
    ),
}
_NOT_OF_THE_ENCODER = {
    "n_stages", "conv_op", "n_conv_per_stage_decoder", "deep_supervision", "num_classes", "input_channels",
    "stochastic_depth_p",
}  # fmt: skip
_MOST_STAGES, _MOST_BLOCKS, _WIDEST, _LARGEST_STEP = 12, 64, 8192, 15


@FOUNDATIONS.register("residual_encoder")
class ResidualEncoderFoundation(Foundation):
    """Residual encoder; modalities are fused behind its stem (convolution, norm, activation)."""

    def __init__(self, spec: FoundationSpec):
        super().__init__(spec)
        self.encoder = residual_encoder(len(spec.input.modalities), **spec.arch_kwargs)

    def project(self, native_bczyx: Tensor) -> Tensor:
        return self.encoder.stem(native_bczyx)

    def stages(self, projected: Tensor) -> list[Tensor]:
        return _stage_by_stage(self.encoder.stages, projected)


@FOUNDATIONS.register("plain_encoder")
class PlainEncoderFoundation(Foundation):
    """Plain convolutional encoder; modalities are fused in its first convolution, which is linear in them."""

    def __init__(self, spec: FoundationSpec):
        super().__init__(spec)
        self.encoder = plain_encoder(len(spec.input.modalities), **spec.arch_kwargs)

    def project(self, native_bczyx: Tensor) -> Tensor:
        return self.encoder.stages[0][-1].convs[0].conv(native_bczyx)

    def stages(self, projected: Tensor) -> list[Tensor]:
        first, *later = self.encoder.stages[0][-1].convs
        whole = in_turn((*first.all_modules[1:], *later), [projected])
        return [whole, *_stage_by_stage(self.encoder.stages[1:], whole)]


def residual_encoder(
    input_channels: int,
    features_per_stage: Sequence[int],
    strides: Sequence[Sequence[int]],
    blocks_per_stage: Sequence[int],
    **options: Any,
) -> ResidualEncoder:
    """3-D residual encoder that returns the map of every stage; `strides` z, y, x per stage.

    Args:
        options: as in nnU-Net's `arch_kwargs`; by default 3x3x3 kernels with bias, instance norm, leaky ReLU.
    """
    return ResidualEncoder(
        n_blocks_per_stage=_counted(blocks_per_stage),
        **_common(input_channels, features_per_stage, strides, options),
    )


def plain_encoder(
    input_channels: int,
    features_per_stage: Sequence[int],
    strides: Sequence[Sequence[int]],
    blocks_per_stage: Sequence[int],
    **options: Any,
) -> PlainConvEncoder:
    """3-D convolutional encoder that returns the map of every stage; see `residual_encoder`."""
    return PlainConvEncoder(
        n_conv_per_stage=_counted(blocks_per_stage), **_common(input_channels, features_per_stage, strides, options)
    )


def dna_encoder_kwargs(network_class_name: str, arch_kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """An nnU-Net `architecture` entry as the foundation's architecture key and its `arch_kwargs` (JSON values).

    Raises:
        CheckpointError: another class, a 2-D network, or an option that is not known here.
    """
    name = str(network_class_name).rpartition(".")[2]
    if name not in _OWN:
        raise CheckpointError(
            f"The network is a {name}, and only the encoders of {' and '.join(_OWN)} can be imported here."
        )
    if _last_part(arch_kwargs.get("conv_op", "Conv3d")) != "Conv3d":
        raise CheckpointError("This is a 2-D configuration; a foundation is 3-D. Import the 3d_fullres configuration.")
    architecture, blocks, own = _OWN[name]
    known = {*_SHARED, *own, blocks}
    if unknown := sorted(set(arch_kwargs) - known - _NOT_OF_THE_ENCODER):
        raise CheckpointError(f"The architecture has an option that is not known here: {', '.join(unknown)}.")
    stages = len(arch_kwargs["strides"]) if isinstance(arch_kwargs.get("strides"), list) else arch_kwargs["n_stages"]
    options = {key: _plain(key, value) for key, value in arch_kwargs.items() if key in known and value is not None}
    return architecture, {
        "features_per_stage": _per_stage(options.pop("features_per_stage"), stages),
        "strides": _triples(options.pop("strides", 1), stages),
        "blocks_per_stage": _per_stage(options.pop(blocks), stages),
        "kernel_sizes": _triples(options.pop("kernel_sizes", 3), stages),
        "conv_bias": bool(options.pop("conv_bias", False)),
        **options,
    }


def new_residual_encoder_spec(
    licence: str,
    provenance: dict,
    features: Sequence[int] = (16, 32, 64, 96, 128),
    strides: Sequence[ZYX] = ((1, 1, 1), *((2, 2, 2),) * 4),
) -> FoundationSpec:
    """The declaration of a fresh CT foundation, by default that of `unicon_pretrain`: one residual block a stage."""
    arch_kwargs = {
        "features_per_stage": list(features),
        "strides": [list(step) for step in strides],
        "blocks_per_stage": [1] * len(features),
    }
    contract = InputContract(("CT",), "LPS", None, None, total_stride(strides), {"CT": CT_HU_RULE})
    return declare("residual_encoder", arch_kwargs, contract, "pyramid", licence, provenance)


def total_stride(strides: Iterable[Sequence[int]]) -> ZYX:
    """Input voxels per voxel of the coarsest map."""
    z, y, x = 1, 1, 1
    for step in strides:
        z, y, x = z * step[0], y * step[1], x * step[2]
    return z, y, x


def _stage_by_stage(stages: Iterable[nn.Module], running: Tensor) -> list[Tensor]:
    pyramid = []
    for stage in stages:
        running = stage(running)
        pyramid.append(running)
    return pyramid


def _common(
    input_channels: int, features: Sequence[int], strides: Sequence[Sequence[int]], options: dict[str, Any]
) -> dict[str, Any]:
    """The arguments that both encoders of the library take, with names of classes resolved from the closed lists."""
    _check_sizes(features, strides, options.get("kernel_sizes", 3))
    options = dict(options)
    dropout = options.pop("dropout_op", None)
    norm = options.pop("norm_op", "InstanceNorm3d")
    default_norm = {"eps": 1e-5, "affine": True}
    arguments = {
        "input_channels": input_channels,
        "n_stages": len(features),
        "features_per_stage": list(features),
        "conv_op": nn.Conv3d,
        "kernel_sizes": options.pop("kernel_sizes", 3),
        "strides": [list(stride) for stride in strides],
        "conv_bias": options.pop("conv_bias", True),
        "norm_op": _NORMS[norm],
        "norm_op_kwargs": options.pop("norm_op_kwargs", default_norm),
        "dropout_op": nn.Dropout3d if dropout else None,
        "dropout_op_kwargs": options.pop("dropout_op_kwargs", {"p": 0.0}) if dropout else None,
        "nonlin": _ACTIVATIONS[options.pop("nonlin", "LeakyReLU")],
        "nonlin_kwargs": options.pop("nonlin_kwargs", {"inplace": True}),
        "return_skips": True,
    }
    if "block" in options:
        options["block"] = _BLOCKS[options["block"]]
    return {**arguments, **options}


def _counted(blocks: Sequence[int]) -> list[int]:
    if not all(1 <= count <= _MOST_BLOCKS for count in blocks):
        raise ValueError(f"blocks per stage of {list(blocks)}; from 1 to {_MOST_BLOCKS} are possible")
    return list(blocks)


def _check_sizes(features: Sequence[int], strides: Sequence[Sequence[int]], kernel_sizes: Any) -> None:
    """A declaration from elsewhere must not make the network larger than any encoder is."""
    kernels = [size for row in _triples(kernel_sizes, len(strides)) for size in row]
    steps = [step for stride in strides for step in stride]
    if not 1 <= len(features) == len(strides) <= _MOST_STAGES:
        raise ValueError(f"{len(features)} features and {len(strides)} strides for 1 to {_MOST_STAGES} stages")
    usual = all(1 <= width <= _WIDEST for width in features) and all(1 <= n <= _LARGEST_STEP for n in kernels + steps)
    if not usual:
        raise ValueError(f"features {list(features)}, strides {list(strides)} and kernels out of any usual range")


def _plain(key: str, value: Any) -> Any:
    """A class path as its last part, checked against what is known; options as numbers."""
    known = {"norm_op": _NORMS, "nonlin": _ACTIVATIONS, "block": _BLOCKS, "dropout_op": {"Dropout3d": nn.Dropout3d}}
    if key in known:
        name = _last_part(value)
        if name not in known[key]:
            raise CheckpointError(f"The architecture's {key} is {name}; known are {', '.join(known[key])}.")
        return name
    if key in _NUMBERS:
        unknown = set(value) - set(_NUMBERS[key])
        if unknown or not all(isinstance(number, bool | int | float) for number in value.values()):
            raise CheckpointError(f"The architecture's {key} {value} hold more than {', '.join(_NUMBERS[key])}.")
        return dict(value)
    return value


def _last_part(path: Any) -> str:
    return str(path).rpartition(".")[2]


def _per_stage(value: Any, stages: int) -> list[int]:
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)] * stages


def _triples(value: Any, stages: int) -> list[list[int]]:
    rows = list(value) if isinstance(value, list | tuple) else [value] * stages
    triples = [[int(v) for v in row] if isinstance(row, list | tuple) else [int(row)] * 3 for row in rows]
    if len(triples) != stages or any(len(row) != 3 for row in triples):
        raise CheckpointError(f"Kernels and strides need three numbers (z, y, x) for each of {stages} stages: {value}.")
    return triples
