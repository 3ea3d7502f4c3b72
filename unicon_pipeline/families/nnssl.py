"""Checkpoints of nnssl: encoders pretrained on unlabelled volumes (OpenMind, The Missing Piece, nnFoundation).

A file holds the weights of the whole pretraining network and an adaptation plan, which says what the encoder is and
where it lies among them. What the plan leaves out:

- Modalities. All releases take one channel; an option names others. nnFoundation's saw CT, MRI and PET alike and is
  used for CT here, OpenMind is brain MRI, and what is neither is taken for CT.
- How a Primus was built: whether its blocks have scales and inner norms is read off the weights.
- The order of its tokens. nnssl's masked autoencoder counts them y, z, x, all else z, y, x. What was trained is kept.

Volumes were cropped to what is not zero, and standardised as a whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicon_pipeline.checkpoint import Checkpoint, tensors_under, without_wrappers
from unicon_pipeline.contract import NOT_STATED, ZYX, InputContract, IntensityRule, SpacingZYX
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.families import build_foundation
from unicon_pipeline.families.dna_encoders import dna_encoder_kwargs, total_stride
from unicon_pipeline.families.nnunet_plans import turned
from unicon_pipeline.families.primus import PrimusSize
from unicon_pipeline.foundation import declare
from unicon_pipeline.imported import Imported, ImportOptions
from unicon_pipeline.records import from_dict, to_dict
from unicon_pipeline.weights import take_state

_RESENC_L = {
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "strides": [[1, 1, 1], *[[2, 2, 2]] * 5],
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "conv_bias": True,
}
# Names under which plans know networks -> class, arguments where the name alone says them (NoSkip is the decoder's).
_CONVOLUTIONAL = {
    "ResEncL": ("ResidualEncoderUNet", _RESENC_L),
    "NoSkipResEncL": ("ResidualEncoderUNet", _RESENC_L),
    "ResidualEncoderUNet": ("ResidualEncoderUNet", None),
    "PlainConvUNet": ("PlainConvUNet", None),
}
# Where the plan's stem and encoder belong in the foundation.
_PLACES = {
    "residual_encoder": ("encoder.stem", "encoder.stages"),
    "plain_encoder": ("encoder.stages.0", "encoder.stages"),
    "primus": ("down_projection", "eva"),
}
_RULES = {
    ("ZScoreNormalization", False): IntensityRule("zscore", "none"),
    ("ZScoreNormalization", True): IntensityRule("zscore_nonzero", "none"),
    ("RescaleTo01", False): IntensityRule("minmax", "none"),
    ("NoNormalization", False): IntensityRule("identity", "none"),
}


@dataclass(frozen=True)
class _Release:
    source: str
    modality: str
    licence: str


_NNFOUNDATION = _Release("nnFoundation, arXiv 2609.26924", "CT", "CC-BY-SA-4.0")
_OPENMIND = _Release("OpenMind, arXiv 2412.17041", "MRI", "CC-BY-4.0")
_OTHER = _Release("nnssl", "CT", NOT_STATED)


@dataclass(frozen=True)
class _Plan:
    """What matters here of an adaptation plan, its architecture, its pretraining plan and that one's configuration."""

    arch_class_name: str
    pretrain_num_input_channels: int
    key_to_encoder: str
    key_to_stem: str
    arch_kwargs: dict[str, Any] | None = None
    recommended_downstream_patchsize: ZYX | None = None
    pretrain_patch_size: ZYX | None = None
    patch_size: ZYX | None = None
    spacing: SpacingZYX | None = None
    normalization_schemes: tuple[str, ...] = ("ZScoreNormalization",)
    use_mask_for_norm: Any = False
    transpose_forward: ZYX = (0, 1, 2)
    image_reader_writer: str = ""
    dataset_name: str = ""


@dataclass(frozen=True)
class _MaeKwargs:
    """What matters here of the arguments of nnssl's masked autoencoder, under the names they have there."""

    embed_dim: int
    encoder_eva_depth: int
    encoder_eva_numheads: int
    patch_embed_size: ZYX = (8, 8, 8)
    input_shape: ZYX | None = None

    def __post_init__(self) -> None:
        if min(self.patch_embed_size) < 1:
            raise ValueError(f"patches of {self.patch_embed_size} voxels are impossible.")


_PRIMUS = {
    "PrimusS": _MaeKwargs(396, 12, 6),
    "PrimusB": _MaeKwargs(792, 12, 12),
    "PrimusM": _MaeKwargs(864, 16, 12),
    "PrimusL": _MaeKwargs(1056, 24, 16),
    "PrimusX": None,
}


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the file holds weights and an adaptation plan."""
    payload = checkpoint.payload
    return all(isinstance(payload.get(key), Mapping) for key in ("network_weights", "nnssl_adaptation_plan"))


def convert(checkpoint: Checkpoint, options: ImportOptions) -> Imported:
    """The pretrained encoder as a foundation.

    Raises:
        CheckpointError: the plan is missing or incomplete, names a network or a normalisation that is not known here,
            or does not fit the weights; or several input channels are there, which no plan names, and no option does.
    """
    plan = _read_plan(checkpoint)
    path, trainer = checkpoint.path, str(checkpoint.payload.get("trainer_name") or "")
    release = _release(plan, f"{trainer} {checkpoint.payload.get('citations')}")
    modalities = options.modalities or (release.modality,)
    if len(modalities) != plan.pretrain_num_input_channels:
        raise CheckpointError(
            f"{path} was pretrained with {plan.pretrain_num_input_channels} channels, and its plan does not say which "
            f"modalities they are; {len(modalities)} known: {', '.join(modalities)}. Name them all with --modalities."
        )
    state = without_wrappers(tensors_under(checkpoint.payload, "network_weights"))
    architecture, arch_kwargs = _architecture(plan, state, path)
    patches = architecture == "primus"
    provenance = {
        "family": "nnssl",
        "source": options.origin or release.source,
        "file": path.name,
        "sha256": checkpoint.sha256,
        "network": plan.arch_class_name,
        "trainer": trainer,
        "dataset": plan.dataset_name,
        "recommended_patch_zyx": list(plan.recommended_downstream_patchsize or ()),
    }
    spec = declare(
        architecture,
        arch_kwargs,
        InputContract(
            modalities=modalities,
            orientation=turned(plan.transpose_forward, options.orientation, plan.image_reader_writer, path),
            spacing_zyx_mm=plan.spacing,
            fixed_shape_zyx=None,
            divisible_by_zyx=total_stride([arch_kwargs["patch_embed_size"]] if patches else arch_kwargs["strides"]),
            intensity={name: _intensity(plan, channel, path) for channel, name in enumerate(modalities)},
        ),
        "tokens" if patches else "pyramid",
        options.licence or release.licence,
        provenance,
    )
    found, left_out = _encoder_tensors(state, plan, architecture)
    with torch.device("meta"):
        network = build_foundation(spec)
    weights, report = take_state(network, found, str(path))
    return Imported(dataclasses.replace(spec, load_report={**report, "left_out": left_out}), weights)


def _read_plan(checkpoint: Checkpoint) -> _Plan:
    if not recognises(checkpoint):
        raise CheckpointError(
            f"{checkpoint.path} is no nnssl checkpoint: it needs network_weights and nnssl_adaptation_plan. "
            "nnssl's add_adaptation_plan writes the plan into older files."
        )
    plan = checkpoint.payload["nnssl_adaptation_plan"]
    try:
        configuration, *_ = plan["pretrain_plan"]["configurations"].values()
        everything = {**configuration, **plan["pretrain_plan"], **plan["architecture_plans"], **plan}
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise CheckpointError(
            f"{checkpoint.path}: the nnssl_adaptation_plan needs architecture_plans and a pretrain_plan with a "
            f"configuration ({problem!r}). nnssl's add_adaptation_plan writes a whole one."
        ) from problem
    read = _picked(_Plan, everything, f"{checkpoint.path}: nnssl_adaptation_plan")
    return read


def _picked(record: type, payload: Mapping[str, Any], source: str) -> Any:
    """The record from those of its fields that are there and not null."""
    names = [field.name for field in dataclasses.fields(record)]
    present = {name: payload[name] for name in names if payload.get(name) is not None}
    return from_dict(record, present, source, CheckpointError)


def _release(plan: _Plan, trainer_and_citations: str) -> _Release:
    """By the trainer and the papers to cite, or the name of the dataset (OpenMind's images come from OpenNeuro)."""
    if "nnFoundation" in trainer_and_citations:
        return _NNFOUNDATION
    return _OPENMIND if any(name in plan.dataset_name for name in ("OpenMind", "OpenNeuro")) else _OTHER


def _architecture(plan: _Plan, state: dict[str, Tensor], path: Path) -> tuple[str, dict[str, Any]]:
    name = plan.arch_class_name.rpartition(".")[2]
    if name in _PRIMUS:
        return "primus", _primus_kwargs(name, plan, state, path)
    if name not in _CONVOLUTIONAL:
        raise CheckpointError(
            f"{path} holds a {name}; of nnssl's networks these can be imported: "
            f"{', '.join((*_CONVOLUTIONAL, *_PRIMUS))}."
        )
    network_class, arguments = _CONVOLUTIONAL[name]
    arguments = arguments or plan.arch_kwargs
    if not arguments:
        raise CheckpointError(f"{path}: the nnssl_adaptation_plan needs arch_kwargs for a {name}.")
    return dna_encoder_kwargs(network_class, arguments)


def _primus_kwargs(name: str, plan: _Plan, state: dict[str, Tensor], path: Path) -> dict[str, Any]:
    where = f"{path}: arch_kwargs of the nnssl_adaptation_plan"
    size = _PRIMUS[name] or _picked(_MaeKwargs, plan.arch_kwargs or {}, where)
    block, depth = f"{plan.key_to_encoder}.blocks.0", size.encoder_eva_depth
    grid = _pretraining_grid(plan, size, state, path)
    autoencoder = name == "PrimusX" or any(key.startswith("decoder.blocks.") for key in state)
    if autoencoder and grid[0] != grid[1]:
        raise CheckpointError(
            f"{path}: masked pretraining on {grid} tokens mixed up the positions along z and y, which are "
            "as many in all releases. Such an encoder cannot be imported."
        )
    arguments = {
        "embed_dim": size.embed_dim,
        "depth": depth,
        "heads": size.encoder_eva_numheads,
        "patch_embed_size": size.patch_embed_size,
        "pretraining_grid_zyx": grid,
        "hidden_layers": sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3, 4)}),
        "token_axes": (1, 0, 2) if autoencoder else (0, 1, 2),
        "init_values": 0.1 if f"{block}.gamma_1" in state else None,
        "scale_attn_inner": f"{block}.attn.norm.weight" in state,
    }
    return to_dict(from_dict(PrimusSize, arguments, where, CheckpointError))


def _pretraining_grid(plan: _Plan, size: _MaeKwargs, state: dict[str, Tensor], path: Path) -> ZYX:
    """The tokens along z, y, x: of the first patch the plan names that has as many as the position embedding."""
    positions = state.get(f"{plan.key_to_encoder}.pos_embed")
    tokens = positions.shape[1] if positions is not None and positions.dim() == 3 else 0
    side = round(tokens ** (1 / 3))
    patches = (plan.pretrain_patch_size, size.input_shape, plan.patch_size, plan.recommended_downstream_patchsize)
    grids = [tuple(n // m for n, m in zip(patch, size.patch_embed_size)) for patch in patches if patch is not None]
    for grid in (*grids, (side, side, side)):
        if tokens and math.prod(grid) == tokens:
            return grid
    raise CheckpointError(
        f"{path}: {plan.key_to_encoder}.pos_embed should be a position embedding of one of the grids "
        f"{grids} or of a cube, and has {tokens} tokens."
    )


def _intensity(plan: _Plan, channel: int, path: Path) -> IntensityRule:
    schemes, masks = plan.normalization_schemes, plan.use_mask_for_norm
    scheme = schemes[channel] if channel < len(schemes) else None
    inside = masks[channel] if isinstance(masks, list | tuple) and channel < len(masks) else masks
    rule = _RULES.get((scheme, inside is True))
    if rule is None:
        known = ", ".join(sorted({name for name, _ in _RULES}))
        raise CheckpointError(
            f"{path}: the normalisation {plan.normalization_schemes} (use_mask_for_norm "
            f"{plan.use_mask_for_norm}) is not known here; known are {known}."
        )
    return rule


def _encoder_tensors(
    state: dict[str, Tensor], plan: _Plan, architecture: str
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The encoder's tensors under the foundation's names; and how many were left out, by the first part of a name."""
    moves = dict(zip((plan.key_to_stem, plan.key_to_encoder), _PLACES[architecture]))
    found, left_out = {}, Counter()
    for key, tensor in state.items():
        origin = next((prefix for prefix in moves if key.startswith(f"{prefix}.")), None)
        if origin is None:
            left_out[key.partition(".")[0]] += 1
        else:
            found[moves[origin] + key.removeprefix(origin)] = tensor
    return found, dict(left_out)
