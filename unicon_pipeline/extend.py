"""Extending the model by a task: plan, train only what is new, validate, add it to the model folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicon_pipeline.case_extend import CaseExtendResult, extend_case
from unicon_pipeline.dataset import read_task
from unicon_pipeline.device import choose_device, choose_precision, machine_facts
from unicon_pipeline.evidence import measure_shortcuts
from unicon_pipeline.extension_plan import (
    ExtensionPlan,
    Planned,
    Schedule,
    format_extension,
    load_planned,
    plan_extension,
    schedule_for,
)
from unicon_pipeline.fingerprint import Fingerprint
from unicon_pipeline.loader import PatchLoader, usual_workers
from unicon_pipeline.losses import SegmentationLoss, dice_of_counts
from unicon_pipeline.metrics import finite_or_none, format_summary, summarise
from unicon_pipeline.model import build_task_model
from unicon_pipeline.model_folder import ModelFolder, open_or_create
from unicon_pipeline.model_record import CHAIN_FILE, ChainEntry, TaskPlan, foundation_spec
from unicon_pipeline.records import read_record, sha256_json, to_dict
from unicon_pipeline.sliding_window import Window, window_maps
from unicon_pipeline.store import open_case, stored_case_ids
from unicon_pipeline.training import CHECKPOINT_FILE, Score, Trainer, TrainingResult, drop_modalities
from unicon_pipeline.verify import probe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExtendResult:
    """What an extension added."""

    plan: ExtensionPlan
    entry: ChainEntry
    training: TrainingResult
    validation: dict[str, Any] | None

    def summary(self) -> str:
        """One paragraph for a person."""
        text = (
            f"Added {self.entry.name}: {self.entry.trained_parameters:,} trained parameters, "
            f"{self.entry.added_bytes / 1e6:.1f} MB; "
            f"{self.training.steps} steps in {self.training.minutes:.1f} minutes."
        )
        if self.validation:
            text += f" Validation Dice {format_summary(self.validation)}."
        return text


def extend(
    task_folder: Path,
    work: Path,
    model: Path,
    *,
    fold: int | str = "all",
    schedule: Schedule | None = None,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    resume: bool = True,
) -> ExtendResult | CaseExtendResult:
    """Extends the model in `model` by the task in `task_folder`.

    A classification or prognosis task is fitted as `extend_case` does by default, where its options are; its number of
    epochs is chosen, not scheduled, its arithmetic float32, and nothing of it needs to be resumed.

    Args:
        work: where unicon_plan_and_preprocess put the task.
        model: a model folder; created from the embedded foundation where there is none.
        fold: the fold to hold out and validate on, or "all".
        schedule: how long to train, see `schedule_for`; None: the default number of epochs.
        resume: go on with a run of the same plan that was cut.

    Raises:
        PlanError: the task is not preprocessed for this model, or cannot be trained.
        CheckpointError: the model folder is damaged, or has the task already.
    """
    if read_task(task_folder).task_type != "segmentation":
        return extend_case(task_folder, work, model, fold=fold, device=device, seed=seed)
    planned, extension = plan_for(task_folder, work, model, fold=fold, schedule=schedule, seed=seed)
    logger.info("%s", format_extension(extension))
    return _Extension(open_or_create(model), planned, extension, choose_device(device), precision).run(resume)


def plan_for(
    task_folder: Path,
    work: Path,
    model: Path,
    *,
    fold: int | str = "all",
    schedule: Schedule | None = None,
    seed: int = 0,
) -> tuple[Planned, ExtensionPlan]:
    """What `extend` would do, without doing it; arguments and errors as there."""
    spec = foundation_spec(model)
    planned = load_planned(task_folder, work, spec)
    stems = {}
    if (Path(model) / CHAIN_FILE).exists():
        folder = ModelFolder(model)
        stems = folder.stem_plans()
        folder.check_new(planned.plan.task)
    stored = stored_case_ids(planned.cases)
    return planned, plan_extension(planned.plan, spec, stems, stored, schedule or schedule_for(None, None), fold, seed)


class _Extension:
    """One extension under way."""

    def __init__(
        self, folder: ModelFolder, planned: Planned, extension: ExtensionPlan, device: torch.device, precision: str
    ):
        self.folder, self.planned, self.extension = folder, planned, extension
        self.device, self.precision = device, choose_precision(precision, device)
        torch.manual_seed(extension.seed)
        foundation = folder.foundation()
        stems = {stem.modality: folder.stem(stem, foundation) for stem in extension.reused_stems}
        self.model = build_task_model(extension, foundation, stems).to(device)
        self.loss = SegmentationLoss(planned.plan.labels, self.model.head.supervised_strides).to(device)

    def run(self, resume: bool) -> ExtendResult:
        result = self._train(resume)
        self.model.eval()
        validation = self._validate()
        evidence = self._evidence()
        self.model.cpu()
        plan = TaskPlan(self.planned.plan, self.extension)
        entry = self.folder.add_task(plan, self.model, self._card(result, validation) | evidence)
        self._checkpoint.unlink(missing_ok=True)
        return ExtendResult(self.extension, entry, result, validation)

    @property
    def _checkpoint(self) -> Path:
        return self.planned.folder / CHECKPOINT_FILE

    def _train(self, resume: bool) -> TrainingResult:
        plan, extension = self.planned.plan, self.extension
        trainer = Trainer(
            self.model.trained_state(),
            self._step_loss,
            Score("Dice", dice_of_counts),
            extension.schedule,
            self.device,
            self.precision,
            self._checkpoint,
            sha256_json([to_dict(extension), to_dict(plan), self.folder.spec().provenance]),
        )
        first_step = trainer.resume() if resume else 0
        self.model.train()
        with PatchLoader(
            self.planned.cases, extension.training_cases, plan, plan.batch_size, extension.seed, usual_workers(),
            first_step=first_step,
        ) as batches:  # fmt: skip
            return trainer.run(batches)

    def _step_loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        batch = drop_modalities(batch, self.extension.schedule.modality_dropout, self.extension.seed)
        labels = batch["labels"].to(self.device)
        outputs = self.model(batch["data"].to(self.device), batch["present"].to(self.device), every_level=True)
        return self.loss(outputs, labels), self.loss.overlap(outputs[0], labels)

    def _validate(self) -> dict[str, Any] | None:
        """Dice of the held-out cases on the planned grid, by sliding window; mean over outputs, then cases."""
        if not self.extension.validation_cases:
            return None
        plan, model = self.planned.plan, self.model.merged()
        window = Window(plan.patch_shape_zyx, plan.air, self.precision)
        counter = SegmentationLoss(plan.labels)
        scores = {}
        for case_id in self.extension.validation_cases:
            case = open_case(self.planned.cases, case_id)
            present = tuple(name in case.present for name in plan.modalities)
            logits = window_maps(model, case.array[:], present, window)
            labels = torch.from_numpy(case.labels[:].astype("int64"))
            scores[case_id] = dice_of_counts(counter.overlap(logits[None], labels))
            logger.info("validation %s: Dice %.3f", case_id, scores[case_id])
        cases = {case_id: finite_or_none(score) for case_id, score in scores.items()}
        return {"metric": "Dice", **to_dict(summarise(list(scores.values()))), "cases": cases}

    def _evidence(self) -> dict[str, Any]:
        """What may be done faster, by cases that were held out where there are any."""
        case_ids = self.extension.validation_cases or self.extension.training_cases
        cases = (open_case(self.planned.cases, case_id) for case_id in case_ids)
        arrays = ((case.array[:], tuple(n in case.present for n in self.planned.plan.modalities)) for case in cases)
        contract = self.folder.spec().input
        return measure_shortcuts(self.model.merged(), self.planned.plan, contract, arrays, self.device)

    def _card(self, result: TrainingResult, validation: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "task": self.extension.task,
            "data_fingerprint": to_dict(read_record(self.planned.folder / "fingerprint.json", Fingerprint)),
            "training": {"steps": result.steps, "minutes": round(result.minutes, 2), "history": list(result.history)},
            "validation": validation,
            "seed": self.extension.seed,
            "machine": machine_facts(self.device),
            "precision": str(self.precision).removeprefix("torch."),
            "probe": probe(self.model, self.planned.plan),
        }
