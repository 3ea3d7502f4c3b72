"""What nnU-Net's `plans.json` and `dataset.json` say about a trained model: its input, its labels, its network.

Plans of the first v2 releases describe the network in another way (`UNet_class_name`, ...); both are read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unicon_pipeline.contract import ZYX, Conventions, FoundationSpec, IntensityRule, SpacingZYX
from unicon_pipeline.dataset import parse_channels
from unicon_pipeline.errors import CheckpointError, DatasetError
from unicon_pipeline.imported import ImportOptions, plan_as_trained
from unicon_pipeline.label_spec import Labels, parse_labels
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.records import read_json, sha256_json

_STORED_XYZ = "xyz"
_REORIENTING_READERS = {"NibabelIOWithReorient": "RAS"}
_UNITS = {"CT": "HU", "PET": "SUV"}
# The rules of resize.py; they have been nnU-Net's defaults since its version 2.
_RESAMPLING = {
    "data": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
    "probabilities": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
}


@dataclass(frozen=True)
class Configuration:
    """One configuration of a trained model; tuples are in the order of the network's axes (z, y, x of its input)."""

    dataset: str
    name: str
    modalities: tuple[str, ...]
    labels: Labels
    orientation: str | None
    spacing_zyx_mm: SpacingZYX
    patch_shape_zyx: ZYX
    median_shape_zyx: ZYX
    batch_size: int
    intensity: dict[str, IntensityRule]
    network: str
    arch_kwargs: dict[str, Any]
    digest: str

    @property
    def decoder_convs(self) -> list[int]:
        """Convolutions per stage of the decoder, coarse to fine."""
        convs, stages = self.arch_kwargs["n_conv_per_stage_decoder"], len(self.arch_kwargs["strides"])
        return [int(count) for count in convs] if isinstance(convs, list) else [int(convs)] * (stages - 1)

    @property
    def nonlin_first(self) -> bool:
        """Whether an activation comes before the norm."""
        return bool(self.arch_kwargs.get("nonlin_first", False))

    def data_plan(self, spec: FoundationSpec, mirror_axes: tuple[int, ...]) -> DataPlan:
        """The plan that treats an image as nnU-Net does."""
        return plan_as_trained(
            spec,
            f"nnU-Net's {self.name}",
            task=self.dataset,
            task_type="segmentation",
            labels=self.labels,
            view="patch",
            patch_shape_zyx=self.patch_shape_zyx,
            batch_size=self.batch_size,
            median_shape_zyx=self.median_shape_zyx,
            fingerprint_sha256=self.digest,
            conventions=Conventions("nonzero", "zero", mirror_axes),
        )


def turned(transpose_forward: Sequence[int], given: str | None, reader: str, source: Path) -> str | None:
    """How a stored image is turned: to the given orientation (or the reader's), then transposed; see InputContract.

    Raises:
        CheckpointError: `transpose_forward` is no order of the axes z, y, x (0, 1, 2).
    """
    if sorted(transpose_forward) != [0, 1, 2]:
        raise CheckpointError(f"{source}: transpose_forward {transpose_forward} is no order of the axes 0, 1, 2.")
    letters_zyx = (given or _REORIENTING_READERS.get(reader, _STORED_XYZ))[::-1]
    code = "".join(letters_zyx[axis] for axis in transpose_forward)[::-1]
    return None if code == _STORED_XYZ else code


def read_configuration(plans_file: Path, dataset_file: Path, name: str, options: ImportOptions) -> Configuration:
    """Reads one configuration of a trained model.

    Raises:
        CheckpointError: a file is missing or damaged, or the configuration is 2-D, a cascade's second stage, or treats
            images in a way that is not known here.
    """
    plans, dataset = read_json(plans_file, CheckpointError), read_json(dataset_file, CheckpointError)
    try:
        found = _inherited(plans, name, plans_file)
        _refuse(found, plans_file, name)
        transpose = plans.get("transpose_forward", [0, 1, 2])
        modalities = _modalities(dataset, options.modalities, dataset_file)
        network, arch_kwargs = _architecture(found)
        return Configuration(
            dataset=str(plans["dataset_name"]),
            name=name,
            modalities=modalities,
            labels=_labels(dataset, dataset_file),
            orientation=turned(transpose, options.orientation, str(plans.get("image_reader_writer")), plans_file),
            spacing_zyx_mm=_three(found["spacing"], float),
            patch_shape_zyx=_three(found["patch_size"], int),
            median_shape_zyx=_three(found.get("median_image_size_in_voxels", found["patch_size"]), round),
            batch_size=int(found["batch_size"]),
            intensity=_intensity(found, plans, modalities, plans_file),
            network=network,
            arch_kwargs=arch_kwargs,
            digest=sha256_json([plans, dataset]),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as problem:
        what = f"{type(problem).__name__} {problem}"
        raise CheckpointError(f"{plans_file} is not as nnU-Net writes it: {what}.") from problem


def _inherited(plans: dict[str, Any], name: str, source: Path) -> dict[str, Any]:
    """A configuration with what it inherits; a circle of inheritance is refused."""
    chain, merged = [], {}
    while name is not None:
        if name not in plans["configurations"] or name in chain:
            known = ", ".join(plans["configurations"])
            raise CheckpointError(f"{source} has no sound configuration {name!r}; it has {known}.")
        chain.append(name)
        merged = {**plans["configurations"][name], **merged}
        name = plans["configurations"][name].get("inherits_from")
    return merged


def _refuse(found: dict[str, Any], source: Path, name: str) -> None:
    if len(found["patch_size"]) != 3:
        raise CheckpointError(f"{source}: {name} is 2-D; a foundation is 3-D. Import a 3d_fullres or 3d_lowres model.")
    if found.get("previous_stage"):
        raise CheckpointError(
            f"{source}: {name} is the second stage of a cascade and needs the labels of {found['previous_stage']} as "
            "input. Import the 3d_fullres or 3d_lowres model."
        )
    for what, expected in _RESAMPLING.items():
        function = found.get(f"resampling_fn_{what}", "resample_data_or_seg_to_shape")
        options = {**expected, **found.get(f"resampling_fn_{what}_kwargs", {})}
        if function != "resample_data_or_seg_to_shape" or options != expected:
            how = f"{function} {options}"
            raise CheckpointError(f"{source}: {name} resamples {what} by {how}, which is not known here.")
    preprocessor = found.get("preprocessor_name", "DefaultPreprocessor")
    if preprocessor != "DefaultPreprocessor":
        raise CheckpointError(f"{source}: {name} was preprocessed by {preprocessor}, which is not known here.")


def _modalities(dataset: dict[str, Any], given: tuple[str, ...] | None, source: Path) -> tuple[str, ...]:
    """Names of the input channels: those given, else those of the dataset."""
    named = dataset.get("channel_names", dataset.get("modality"))
    if given is not None:
        if len(given) != len(named):
            raise CheckpointError(f"{source} has {len(named)} channels ({named}); --modalities gave {len(given)}.")
        named = dict(enumerate(given))
    try:
        return tuple(parse_channels({"channel_names": {str(k): v for k, v in named.items()}}, source).values())
    except DatasetError as problem:
        raise CheckpointError(f"{problem} Name them with --modalities, such as --modalities CT PET.") from problem


def _labels(dataset: dict[str, Any], source: Path) -> Labels:
    """nnU-Net's channels follow the label values, or for regions the order of the file."""
    try:
        labels = parse_labels(dataset, source)
    except DatasetError as problem:
        raise CheckpointError(str(problem)) from problem
    if labels.regions:
        return labels
    order = sorted(range(len(labels.names)), key=lambda index: labels.values[index])
    names, values, written = (tuple(row[i] for i in order) for row in (labels.names, labels.values, labels.written))
    return Labels(names, values, False, written, labels.ignore)


def _architecture(found: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if "architecture" in found:
        return found["architecture"]["network_class_name"], found["architecture"]["arch_kwargs"]
    stages = len(found["n_conv_per_stage_encoder"])
    base, largest = found["UNet_base_num_features"], found["unet_max_num_features"]
    residual = found["UNet_class_name"] == "ResidualEncoderUNet"
    return found["UNet_class_name"], {
        "n_stages": stages,
        "features_per_stage": [min(base * 2**stage, largest) for stage in range(stages)],
        "kernel_sizes": found["conv_kernel_sizes"],
        "strides": found["pool_op_kernel_sizes"],
        "n_blocks_per_stage" if residual else "n_conv_per_stage": found["n_conv_per_stage_encoder"],
        "n_conv_per_stage_decoder": found["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op": "InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def _intensity(
    found: dict[str, Any], plans: dict[str, Any], modalities: tuple[str, ...], source: Path
) -> dict[str, IntensityRule]:
    rules = {}
    masked = found.get("use_mask_for_norm") or [False] * len(modalities)
    for index, (name, scheme) in enumerate(zip(modalities, found["normalization_schemes"], strict=True)):
        if scheme == "CTNormalization":
            rules[name] = _ct_rule(plans["foreground_intensity_properties_per_channel"][str(index)], _UNITS.get(name))
        elif scheme == "ZScoreNormalization":
            rules[name] = IntensityRule("zscore_nonzero" if masked[index] else "zscore", "none")
        elif scheme == "NoNormalization":
            rules[name] = IntensityRule("identity", _UNITS.get(name, "none"))
        elif scheme == "RescaleTo01Normalization":
            rules[name] = IntensityRule("minmax", "none")
        else:
            raise CheckpointError(f"{source}: channel {name} is normalised by {scheme}, which is not known here.")
    return rules


def _ct_rule(properties: dict[str, float], unit: str | None) -> IntensityRule:
    low, high = float(properties["percentile_00_5"]), float(properties["percentile_99_5"])
    mean, deviation = float(properties["mean"]), max(float(properties["std"]), 1e-8)
    if not (math.isfinite(mean + deviation) and low < high):
        raise ValueError(f"foreground intensities {properties} are no range")
    network_values = ((low - mean) / deviation, (high - mean) / deviation)
    return IntensityRule("piecewise", unit or "none", (low, high), network_values)


def _three(values: list[Any], convert: type) -> tuple[Any, Any, Any]:
    z, y, x = (convert(value) for value in values)
    return z, y, x
