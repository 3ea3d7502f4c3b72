"""nnU-Net v2 trained-model folders (TotalSegmentator's too): the encoder becomes the foundation, its task comes along.

A folder `{trainer}__{plans}__{configuration}` holds `plans.json`, `dataset.json` and `fold_*/checkpoint_final.pth`.
The task keeps its decoders, one per fold, and everything that nnU-Net does to an image before and after.
Source of the format: nnU-Net 2.8.1 (Isensee et al., Nature Methods 2021).
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import Tensor, nn

from unicon_pipeline.checkpoint import Checkpoint, read_checkpoint, tensors_under, without_wrappers
from unicon_pipeline.contract import NOT_STATED, FoundationSpec, InputContract
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.families.dna_encoders import dna_encoder_kwargs, total_stride
from unicon_pipeline.families.nnunet_plans import Configuration, read_configuration
from unicon_pipeline.foundation import FOUNDATIONS, Foundation, declare, freeze
from unicon_pipeline.imported import Imported, ImportOptions, NativeTask
from unicon_pipeline.lean_blocks import decoder_step
from unicon_pipeline.model_record import NativePlan, TaskPlan
from unicon_pipeline.native import NATIVES, NativeModel
from unicon_pipeline.weights import take_state

logger = logging.getLogger(__name__)

PLANS_FILE, DATASET_FILE = "plans.json", "dataset.json"
_CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth")  # nnU-Net predicts with the first


@NATIVES.register("nnunet")
class NnUNet(NativeModel):
    """The mean of all folds' logits. `foundation` is the first fold's encoder.

    Options: `output_channels`, `convs_per_stage` (of the decoder, coarse to fine), `nonlin_first`, `folds` (names).
    """

    def __init__(self, foundation: Foundation, options: dict[str, Any]):
        super().__init__(foundation, options)
        self._last_layers_dropped = False
        further = len(options["folds"]) - 1
        self.encoders = nn.ModuleList(freeze(type(foundation)(foundation.spec)) for _ in range(further))
        self.decoders = nn.ModuleList(_decoder(foundation.encoder, options) for _ in options["folds"])

    def forward(self, images_bczyx: Tensor, present_bc: Tensor) -> list[Tensor]:
        networks = zip((self.foundation, *self.encoders), self.decoders, strict=True)
        outputs = [_decoded(decoder, encoder(images_bczyx, None, None)) for encoder, decoder in networks]
        return [torch.cat(outputs, dim=1) if self._last_layers_dropped else sum(outputs) / len(outputs)]

    def last_layers(self) -> list[nn.Module]:
        return [decoder.seg_layers[-1] for decoder in self.decoders]

    def drop_last_layers(self) -> None:
        self._last_layers_dropped = True
        for decoder in self.decoders:
            decoder.seg_layers[-1] = nn.Identity()


def _decoded(decoder: UNetDecoder, skips: list[Tensor]) -> Tensor:
    """Logits of a decoder; `skips` (finest first) are taken out of their list, so that each can go once it is used."""
    running = skips.pop()
    for up, block in zip(decoder.transpconvs, decoder.stages, strict=True):
        running = decoder_step(up, block, running, [skips.pop()])
    return decoder.seg_layers[-1](running)


def find_model_folder(path: Path) -> Path | None:
    """The trained-model folder that `path` is, lies in (a checkpoint file), or holds as its only 3-D one; else None.

    Raises:
        CheckpointError: `path` holds several; they are listed.
    """
    near = (path, *path.parents[:2])
    if found := next((folder for folder in near if (folder / PLANS_FILE).is_file()), None):
        return found
    inside = [plans.parent for plans in sorted(path.glob(f"*/{PLANS_FILE}"))] if path.is_dir() else []
    volumetric = [folder for folder in inside if not folder.name.endswith("__2d")]
    if len(volumetric) > 1:
        names = ", ".join(folder.name for folder in volumetric)
        raise CheckpointError(f"{path} holds several trained models: {names}. Give one of these folders.")
    return next(iter(volumetric or inside), None)


def convert_folder(folder: Path, options: ImportOptions) -> Imported:
    """Converts a trained-model folder.

    Raises:
        CheckpointError: the folder is incomplete, a 2-D or cascade configuration, or of a network that is not nnU-Net's
            own; or what nnU-Net did to its images cannot be done here.
    """
    folds = _folds(folder, options.fold)
    checkpoints = [read_checkpoint(file) for file in folds.values()]
    trained_as = _trained_as(checkpoints[0], folder)
    configuration = read_configuration(folder / PLANS_FILE, folder / DATASET_FILE, trained_as, options)
    names = ", ".join(folds)
    provenance = {
        "family": "nnunet",
        "source": options.origin or f"nnU-Net model {configuration.dataset}, {folder.name}",
        "file": str(next(iter(folds.values())).relative_to(folder)),
        "sha256": checkpoints[0].sha256,
        "fold": next(iter(folds)),
    }
    spec = _declare(configuration, options.licence or NOT_STATED, provenance)
    parts = [_Parts.of(checkpoint, folder) for checkpoint in checkpoints]
    encoder = _network(spec)
    source = str(checkpoints[0].path)
    weights, report = take_state(encoder, parts[0].encoder, source)
    spec = dataclasses.replace(spec, load_report={**report, "left_out": {"decoder": len(parts[0].decoder)}})
    native = NativePlan(
        kind="nnunet",
        options={
            "output_channels": configuration.labels.output_channels,
            "convs_per_stage": configuration.decoder_convs,
            "nonlin_first": configuration.nonlin_first,
            "folds": list(folds),
        },
        outputs=configuration.labels.names,
        origin=f"nnU-Net {checkpoints[0].payload.get('trainer_name', '')}, {trained_as}, mean of folds {names}",
    )
    own = _own_weights(native, encoder, parts, [str(checkpoint.path) for checkpoint in checkpoints])
    mirror_axes = checkpoints[0].payload.get("inference_allowed_mirroring_axes")
    plan = configuration.data_plan(spec, tuple(int(axis) for axis in mirror_axes or ()))
    card = {
        "schema_version": 1,
        "task": configuration.dataset,
        "folds": {name: checkpoint.sha256 for name, checkpoint in zip(folds, checkpoints, strict=True)},
    }
    return Imported(spec, weights, (NativeTask(TaskPlan(plan, None, native), own, card),))


@dataclass(frozen=True)
class _Parts:
    """A checkpoint's weights, under the names that the parts have here."""

    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor]

    @classmethod
    def of(cls, checkpoint: Checkpoint, folder: Path) -> _Parts:
        state = without_wrappers(tensors_under(checkpoint.payload, "network_weights"))
        encoder = {key: value for key, value in state.items() if key.startswith("encoder.")}
        # decoder.encoder is the encoder again, under a second name.
        rest = {key: value for key, value in state.items() if not key.startswith(("encoder.", "decoder.encoder."))}
        if foreign := sorted(key for key in rest if not key.startswith("decoder.")):
            raise CheckpointError(
                f"{checkpoint.path}: {len(foreign)} weights belong to neither encoder nor decoder, such as "
                f"{foreign[0]}: the trainer of {folder.name} built another network than nnU-Net's own."
            )
        return cls(encoder, {key.removeprefix("decoder."): value for key, value in rest.items()})


def _folds(folder: Path, first: int | None) -> dict[str, Path]:
    """Fold -> checkpoint, as nnU-Net chooses them: all numbered ones, or else `fold_all`; `first` comes first."""
    found = {}
    for path in sorted(folder.glob("fold_*")):
        file = next((path / name for name in _CHECKPOINTS if (path / name).is_file()), None)
        if file is not None:
            found[path.name.removeprefix("fold_")] = file
            if file.name != _CHECKPOINTS[0]:
                logger.warning("%s has no %s; its %s is taken.", path, _CHECKPOINTS[0], file.name)
    if len(found) > 1:
        found.pop("all", None)
    if not found:
        raise CheckpointError(f"{folder} has no fold_*/{_CHECKPOINTS[0]}: it was not trained, or not copied whole.")
    if first is not None and str(first) not in found:
        raise CheckpointError(f"{folder} has no fold {first}; it has {', '.join(found)}.")
    return dict(sorted(found.items(), key=lambda pair: pair[0] != str(first))) if first is not None else found


def _trained_as(checkpoint: Checkpoint, folder: Path) -> str:
    arguments = checkpoint.payload.get("init_args")
    named = arguments.get("configuration") if isinstance(arguments, dict) else None
    return str(named or folder.name.rpartition("__")[2])


def _declare(configuration: Configuration, licence: str, provenance: dict[str, Any]) -> FoundationSpec:
    architecture, arch_kwargs = dna_encoder_kwargs(configuration.network, configuration.arch_kwargs)
    contract = InputContract(
        modalities=configuration.modalities,
        orientation=configuration.orientation,
        spacing_zyx_mm=configuration.spacing_zyx_mm,
        fixed_shape_zyx=None,
        divisible_by_zyx=total_stride(arch_kwargs["strides"]),
        intensity=configuration.intensity,
    )
    return declare(architecture, arch_kwargs, contract, "pyramid", licence, provenance)


def _network(spec: FoundationSpec) -> Foundation:
    return FOUNDATIONS[spec.architecture](spec)


def _decoder(encoder: nn.Module, options: dict[str, Any]) -> UNetDecoder:
    decoder = UNetDecoder(
        encoder,
        options["output_channels"],
        tuple(options["convs_per_stage"]),
        deep_supervision=False,
        nonlin_first=options["nonlin_first"],
    )
    del decoder.encoder  # it only asks the encoder for its shapes, but would hold its weights a second time
    return decoder


def _own_weights(
    native: NativePlan, encoder: Foundation, parts: list[_Parts], sources: list[str]
) -> dict[str, Tensor]:
    """What the native network adds to the foundation, under the names of `NativeModel.own_state`."""
    network = NnUNet(encoder, native.options)
    own = {}
    for index, (part, source) in enumerate(zip(parts, sources, strict=True)):
        state, _ = take_state(network.decoders[index], part.decoder, source)
        own.update({f"decoders.{index}.{key}": value for key, value in state.items()})
        if index:
            state, _ = take_state(network.encoders[index - 1], part.encoder, source)
            own.update({f"encoders.{index - 1}.{key}": value for key, value in state.items()})
    return own
