"""Importing: an existing checkpoint becomes a model folder, which grows from there.

The family is told by the checkpoint itself. A converted network is built and its stored outputs (probes) are computed
before anything is written, so a model folder that exists also works.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from unicon_pipeline.checkpoint import Checkpoint, read_checkpoint
from unicon_pipeline.contract import NOT_STATED
from unicon_pipeline.dataset import is_safe_name, prediction_cases
from unicon_pipeline.device import choose_device
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.evidence import measure_shortcuts
from unicon_pipeline.families import build_foundation, build_native, family_module
from unicon_pipeline.families.nnunet import convert_folder, find_model_folder
from unicon_pipeline.foundation import Foundation, freeze
from unicon_pipeline.imported import Imported, ImportOptions, NativeTask
from unicon_pipeline.intensity import read_in_units
from unicon_pipeline.model_folder import ModelFolder, create_model
from unicon_pipeline.model_record import CHAIN_FILE
from unicon_pipeline.prepare import prepare_case
from unicon_pipeline.records import atomic_path
from unicon_pipeline.verify import probe, verify
from unicon_pipeline.weights import canonical_state, load_exactly

logger = logging.getLogger(__name__)

# Family -> its module, in the order in which they are asked whether they know a checkpoint.
FAMILIES = {
    "nnssl": "nnssl",
    "ctclip": "zero_shot",
    "inflated-resnet": "inflated_resnet",
    "monai": "monai_encoders",
}
NNUNET, OWN = "nnunet", "unicon"
FAMILY_NAMES = (NNUNET, *FAMILIES, OWN)

_ALWAYS_OF_USE = {"licence", "origin", "images"}
# What of ImportOptions a family can use, beside these.
_USES = {
    NNUNET: {"orientation", "modalities", "fold"},
    "nnssl": {"orientation", "modalities"},
    "ctclip": {"orientation", "text_encoder", "findings"},
    "inflated-resnet": {"orientation"},
    "monai": {"orientation"},
}


def import_checkpoint(
    source: str | Path, model: Path, *, family: str | None = None, options: ImportOptions | None = None
) -> ModelFolder:
    """Makes a model folder from a checkpoint file or folder, or from `astra` (the installed weights package).

    Args:
        model: a folder that holds no model yet.
        family: one of FAMILY_NAMES; None: what the checkpoint shows.

    Raises:
        CheckpointError: the checkpoint is damaged, hostile, unknown or not of its family; or `model` holds a model.
    """
    model, options = Path(model), options or ImportOptions()
    if (model / CHAIN_FILE).exists():
        raise CheckpointError(f"{model} already holds a model; choose another folder with -m.")
    if str(source) == "astra":
        source = family_module("inflated_resnet").astra_file()
    source = Path(source)
    if not source.exists():
        raise CheckpointError(f"{source} does not exist; expected a checkpoint file or folder, or the name astra.")
    if (source / CHAIN_FILE).is_file() and family in (None, OWN):
        return _copied(source, model)
    imported = _convert(source, family, options)
    if imported.spec.licence == NOT_STATED:
        logger.warning("%s does not state its licence. Find it out, and give it with --licence.", source)
    foundation = _loaded_foundation(imported)
    cards = [_card(task, foundation, options.images) for task in imported.tasks]
    folder = create_model(model, imported.spec, imported.weights)
    for task, card in zip(imported.tasks, cards, strict=True):
        folder.add_native(task.plan, task.weights, card)
    return folder


def _convert(source: Path, family: str | None, options: ImportOptions) -> Imported:
    trained = find_model_folder(source) if family in (None, NNUNET) else None
    if family == NNUNET and trained is None:
        raise CheckpointError(f"{source} is no trained nnU-Net model: it has no plans.json beside its folds.")
    checkpoint = None if trained is not None else read_checkpoint(source)
    family = NNUNET if trained is not None else family or _family_of(checkpoint)
    logger.info("%s is of the family %s.", source, family)
    if family not in (NNUNET, *FAMILIES):
        raise CheckpointError(f"{source} is no folder of the family {family}; known are {', '.join(FAMILY_NAMES)}.")
    given = {name for name, value in vars(options).items() if value is not None} - _ALWAYS_OF_USE
    if useless := sorted(given - _USES[family]):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in useless)
        raise CheckpointError(f"{names}: a checkpoint of the family {family} has no use for it. Leave it out.")
    try:
        if trained is not None:
            return convert_folder(trained, options)
        return family_module(FAMILIES[family]).convert(checkpoint, options)
    except CheckpointError as problem:
        if str(source) in str(problem):
            raise
        raise CheckpointError(f"{source}: {problem}") from problem
    except (LookupError, TypeError, ValueError, AssertionError, ArithmeticError, RuntimeError) as problem:
        what = f"{type(problem).__name__} {problem}"
        raise CheckpointError(f"{source} is not as the family {family} writes it: {what}.") from problem


def _family_of(checkpoint: Checkpoint) -> str:
    """The first family that knows the checkpoint."""
    for family, module in FAMILIES.items():
        if family_module(module).recognises(checkpoint):
            return family
    keys = ", ".join(list(checkpoint.payload)[:5])
    raise CheckpointError(
        f"{checkpoint.path} is of no family that is known here ({', '.join(FAMILY_NAMES)}); it begins with {keys}. "
        "If it is of one of them all the same, name it with -f."
    )


def _loaded_foundation(imported: Imported) -> Foundation:
    foundation = build_foundation(imported.spec)
    load_exactly(canonical_state(foundation), imported.weights, "the converted checkpoint")
    return freeze(foundation)


def _card(task: NativeTask, foundation: Foundation, images: Path | None) -> dict:
    name = task.plan.data.task
    if not is_safe_name(name):
        raise CheckpointError(f"The checkpoint's own task is named {name!r}, which cannot name a folder.")
    network = build_native(task.plan.native, foundation)
    load_exactly(network.own_state(), task.weights, f"the converted task {name}")
    evidence, plan = {}, task.plan.data
    if images is not None:
        cases = prediction_cases(images, dict(enumerate(plan.modalities)))
        prepared = (prepare_case(read_in_units(case), plan) for case in cases)
        arrays = ((case.array_czyx, tuple(name in case.present for name in plan.modalities)) for case in prepared)
        evidence = measure_shortcuts(freeze(network), plan, foundation.spec.input, arrays, choose_device("auto"))
    return {**task.card, **evidence, "probe": probe(freeze(network), plan)}


def _copied(source: Path, model: Path) -> ModelFolder:
    """A sound model folder, file by file; the chain comes last."""
    report = verify(source)
    if not report.ok:
        raise CheckpointError(f"{source} is not intact: {report.problems[0]}")
    for entry in ModelFolder(source).chain.entries:
        for file in entry.files:
            with atomic_path(model / file) as aside:
                shutil.copyfile(source / file, aside)
    with atomic_path(model / CHAIN_FILE) as aside:
        shutil.copyfile(source / CHAIN_FILE, aside)
    return ModelFolder(model)
