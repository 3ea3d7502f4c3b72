"""The extension plan: what a task adds to the model, and how it is trained, each with its reason in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unicon_pipeline.contract import ZYX, FoundationSpec
from unicon_pipeline.dataset import Task, read_task
from unicon_pipeline.decisions import Decision, format_decisions
from unicon_pipeline.errors import PlanError
from unicon_pipeline.levels import TOKENS, new_stem_levels, skip_levels
from unicon_pipeline.plan import DataPlan, contract_digest
from unicon_pipeline.records import read_record

STEPS_PER_EPOCH = 50
DEFAULT_EPOCHS = 250
_RANK, _ALPHA = 8, 16.0
_SUPERVISED_LEVELS = 3
_DROPOUT = 0.3


@dataclass(frozen=True)
class StemPlan:
    """A stem for a modality that the model has not met: strides and features of its levels, finest first."""

    modality: str
    kind: str
    strides_zyx: tuple[ZYX, ...]
    features: tuple[int, ...]


@dataclass(frozen=True)
class AdapterPlan:
    """`kind` is a key of the adapter registry; updates are scaled by alpha / rank."""

    kind: str
    rank: int
    alpha: float


@dataclass(frozen=True)
class HeadPlan:
    """`kind` is a key of the head registry. `options`: further integers that the kind takes."""

    kind: str
    output_channels: int
    options: dict[str, int]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. Training ends at `steps` or after `minutes`, whichever comes first; the
    learning rate reaches zero there (polynomial decay, exponent 0.9, after `warmup_steps`). `accumulate`: batches in
    a step."""

    steps: int
    minutes: float | None
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup_steps: int = 50
    gradient_norm: float = 1.0
    modality_dropout: float = 0.0
    accumulate: int = 1


@dataclass(frozen=True)
class ExtensionPlan:
    """What the task adds. `reused_stems` came with earlier tasks and stay frozen."""

    task: str
    modalities: tuple[str, ...]
    new_stems: tuple[StemPlan, ...]
    reused_stems: tuple[StemPlan, ...]
    adapter: AdapterPlan | None
    head: HeadPlan
    schedule: Schedule
    training_cases: tuple[str, ...]
    validation_cases: tuple[str, ...]
    seed: int
    decisions: tuple[Decision, ...]
    schema_version: int = 1

    @property
    def stems(self) -> tuple[StemPlan, ...]:
        """All stems that the task reads, in the order of its modalities."""
        return tuple(sorted(self.new_stems + self.reused_stems, key=lambda stem: self.modalities.index(stem.modality)))


@dataclass(frozen=True)
class Planned:
    """A task that is planned and preprocessed, and the folder that holds it."""

    task: Task
    plan: DataPlan
    folder: Path

    @property
    def cases(self) -> Path:
        return self.folder / "cases"


def load_planned(task_folder: Path, work: Path, spec: FoundationSpec) -> Planned:
    """The preprocessed task of a task folder.

    Raises:
        PlanError: it is not there, was made for another foundation, or the task has changed since.
    """
    task = read_task(task_folder)
    folder = Path(work) / "preprocessed" / task.name
    again = f"Run: unicon_plan_and_preprocess -t {task.name}"
    if not (folder / "plan.json").is_file():
        raise PlanError(f"{task.name} is not planned yet: {folder / 'plan.json'} does not exist. {again}")
    plan = read_record(folder / "plan.json", DataPlan, PlanError)
    if plan.foundation != contract_digest(spec):
        raise PlanError(f"{folder / 'plan.json'} was made for a foundation with another contract. {again}")
    check_trainable(task, plan)
    return Planned(task, plan, folder)


def plan_extension(
    plan: DataPlan,
    spec: FoundationSpec,
    known_stems: dict[str, StemPlan],
    stored_cases: tuple[str, ...],
    schedule: Schedule,
    fold: int | str,
    seed: int,
) -> ExtensionPlan:
    """Plans the extension of a model by a segmentation task.

    Args:
        known_stems: the stems that the model has, by modality.
        stored_cases: the cases that are preprocessed.
        schedule: how long to train; its modality dropout is decided here.
        fold: which of the plan's folds is held out for validation, or "all" to train on every case.

    Raises:
        PlanError: the task judges whole cases, the fold does not exist or leaves nothing to train on, or a
            modality's name cannot name a stem.
    """
    if plan.labels is None:
        raise PlanError(f"{plan.task} is a {plan.task_type} task: case_plan.plan_case_extension plans it.")
    validation = held_out_cases(plan, fold)
    training = tuple(case for case in stored_cases if case not in validation)
    if not training:
        raise PlanError(f"{plan.task}: fold {fold} leaves no preprocessed case to train on.")
    unknown = [name for name in plan.modalities if name not in spec.input.modalities]
    new = tuple(_new_stem(name, spec) for name in unknown if name not in known_stems)
    reused = tuple(known_stems[name] for name in unknown if name in known_stems)
    extension = ExtensionPlan(
        task=plan.task,
        modalities=plan.modalities,
        new_stems=new,
        reused_stems=reused,
        adapter=AdapterPlan("low_rank", _RANK, _ALPHA),
        head=HeadPlan(
            "unetr" if spec.kind == TOKENS else "unet",
            plan.labels.output_channels,
            {"supervised_levels": _SUPERVISED_LEVELS},
        ),
        schedule=dataclasses.replace(schedule, modality_dropout=_DROPOUT if len(plan.modalities) > 1 else 0.0),
        training_cases=training,
        validation_cases=tuple(case for case in stored_cases if case in validation),
        seed=seed,
        decisions=(),
    )
    decisions = (*_part_decisions(extension, spec, plan.labels.regions), *_training_decisions(extension, fold))
    return dataclasses.replace(extension, decisions=decisions)


def schedule_for(minutes: float | None, epochs: int | None) -> Schedule:
    """The schedule for a time budget, a number of epochs, both, or (neither given) the default epochs."""
    if epochs is None:
        epochs = DEFAULT_EPOCHS if minutes is None else 100 * DEFAULT_EPOCHS  # the clock ends it
    return Schedule(steps=epochs * STEPS_PER_EPOCH, minutes=minutes)


def format_extension(extension: ExtensionPlan) -> str:
    """The plan as a short table."""
    return format_decisions(f"Extension of the model by {extension.task}", extension.decisions)


def check_trainable(task: Task, plan: DataPlan) -> None:
    """The preprocessed data must still be those of the task.

    Raises:
        PlanError: the task's type, channels, labels or region changed since it was planned.
    """
    labels = task.labels if task.task_type == "segmentation" else None
    wanted = (task.task_type, task.modalities, labels, task.region)
    if wanted != (plan.task_type, plan.modalities, plan.labels, plan.region):
        raise PlanError(
            f"{task.folder / 'dataset.json'} has changed since {task.name} was planned "
            "(type, channels, labels or region differ): run unicon_plan_and_preprocess again."
        )


def held_out_cases(plan: DataPlan, fold: int | str) -> frozenset[str]:
    """The cases of a fold of the plan; none for "all".

    Raises:
        PlanError: there is no such fold.
    """
    if fold == "all":
        return frozenset()
    if fold not in range(len(plan.folds)):
        raise PlanError(f"--fold {fold}: {plan.task} has folds 0 to {len(plan.folds) - 1}, or 'all'.")
    return frozenset(plan.folds[fold])


def _new_stem(modality: str, spec: FoundationSpec) -> StemPlan:
    from torch import nn  # only here: planning needs no network

    # Stems are entries of an nn.ModuleDict under their modality: its own attributes and a dot, which ends a name in
    # the weights' keys, cannot name one.
    if "." in modality or hasattr(nn.ModuleDict(), modality):
        why = "without the dot " if "." in modality else ""
        raise PlanError(f"The modality {modality} cannot have a stem: rename it {why}in dataset.json.")
    levels = new_stem_levels(spec)
    kind = "patch_embedding" if spec.kind == TOKENS else "residual_stem"
    return StemPlan(
        modality, kind, tuple(level.stride_zyx for level in levels), tuple(level.channels for level in levels)
    )


def _part_decisions(extension: ExtensionPlan, spec: FoundationSpec, regions: bool) -> Iterator[Decision]:
    tokens = spec.kind == TOKENS
    for stem in extension.new_stems:
        how = "a patch embedding beside the foundation's, " if tokens else ""
        yield Decision(f"stem {stem.modality}", "new", f"the model has never met {stem.modality}; {how}gated at zero")
    for stem in extension.reused_stems:
        yield Decision(f"stem {stem.modality}", "reused, frozen", "an earlier task brought it")
    layers = "linear layer" if tokens else "convolution"
    where = f"every {layers}, and norm scales: UNICON's rank for segmentation; the foundation itself stays frozen"
    yield Decision("adapter", f"rank {extension.adapter.rank}, alpha {extension.adapter.alpha:g}", where)
    decoder = "UNETR" if tokens else "U-Net"
    kind = "regions overlap: one sigmoid each" if regions else "exclusive labels: softmax with background"
    yield Decision("head", f"{decoder} decoder, {extension.head.output_channels} channels", kind)
    if tokens:
        reason = "the foundation's layers all lie at one stride: transposed convolutions bring them to finer ones"
        yield Decision("neck", f"{len(spec.pyramid)} hidden layers", reason)
    if detail := skip_levels(spec, {}).detail:
        finest = " x ".join(str(step) for step in spec.pyramid[0].stride_zyx)
        reason = f"the foundation's finest map has {finest} voxels a position: the head sees the image itself as well"
        yield Decision("detail path", f"{', '.join(str(level.channels) for level in detail)} features", reason)
    yield Decision("loss", "Dice + cross-entropy", f"nnU-Net's, supervised at {_SUPERVISED_LEVELS} levels")


def _training_decisions(extension: ExtensionPlan, fold: int | str) -> Iterator[Decision]:
    schedule = extension.schedule
    epochs = f"{schedule.steps // STEPS_PER_EPOCH} epochs"
    length = epochs if schedule.minutes is None else f"{schedule.minutes:g} minutes"
    yield Decision("training", length, f"AdamW {schedule.learning_rate:g}, the rate falls to zero at the end")
    if schedule.modality_dropout:
        reason = "each case also trains with fewer modalities, so any subset is a valid input"
        yield Decision("modality dropout", f"{schedule.modality_dropout:g}", reason)
    held_out = extension.validation_cases
    held = f"{len(held_out)} held out (fold {fold})" if held_out else "none held out"
    reason = "validated after training" if held_out else "every case trains; judge on cases that are kept elsewhere"
    yield Decision("cases", f"{len(extension.training_cases)}, {held}", reason)
