"""Extending the model by a classification or prognosis task: fitted on a frozen encoder, judged by cross-validation.

Every case goes through the encoder once; all fits are of the head, on what is kept of that. With an adapter, each fit
goes on from there end to end. Whatever is fitted in a fold (encoders of figures and covariates, time bins, class
weights, the number of epochs, the adapter) is fitted without the cases held out. What is shipped is fitted on all
training cases in the same way.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit, softmax
from torch import Tensor

from unicon_pipeline.case_adapter import AdaptedFits
from unicon_pipeline.case_fit import FeatureCache
from unicon_pipeline.case_folds import Fits, Whole, hazard_of
from unicon_pipeline.case_plan import CaseOptions, Cohort, plan_case_extension, read_cohort
from unicon_pipeline.case_reading import CLASSES, IMAGE, REGION, SURVIVAL, CaseReading, Outcome
from unicon_pipeline.case_report import MAIN, MODEL, Judged, baselines, format_models, scores_of, verdict
from unicon_pipeline.case_training import Run
from unicon_pipeline.class_metrics import temperature
from unicon_pipeline.cross_validation import Folds, cross_validate, folds_of
from unicon_pipeline.decisions import Decision
from unicon_pipeline.device import choose_device, choose_precision, machine_facts
from unicon_pipeline.extension_plan import ExtensionPlan, Planned, format_extension, load_planned
from unicon_pipeline.fingerprint import Fingerprint
from unicon_pipeline.levels import skip_levels
from unicon_pipeline.model import build_task_model
from unicon_pipeline.model_folder import ModelFolder, open_or_create
from unicon_pipeline.model_record import CHAIN_FILE, ChainEntry, ModelRecord, TaskPlan, foundation_spec
from unicon_pipeline.progress import progress_bar
from unicon_pipeline.records import read_record, sha256_json, to_dict
from unicon_pipeline.store import open_case
from unicon_pipeline.survival_metrics import Censoring, Curves
from unicon_pipeline.tables import write_table
from unicon_pipeline.verify import probe

logger = logging.getLogger(__name__)

OUT_OF_FOLD = "out_of_fold.csv"  # beside the preprocessed cases, and beside the task's card
TRAININGS = "trainings"  # beside the preprocessed cases, until the task is in the model: the cut ones of the folds
USUAL = CaseOptions()


@dataclass(frozen=True)
class CaseExtendResult:
    """What an extension added, and how good it is: `validation` as on the task's card."""

    plan: ExtensionPlan
    entry: ChainEntry
    validation: dict[str, Any] | None
    table: str

    def summary(self) -> str:
        """A paragraph and a table for a person."""
        added = (
            f"Added {self.entry.name}: {self.entry.trained_parameters:,} trained parameters, "
            f"{self.entry.added_bytes / 1e6:.1f} MB, {len(self.plan.training_cases)} cases."
        )
        return "\n".join([added, self.table, self.validation["verdict"]] if self.validation else [added])


def extend_case(
    task_folder: Path,
    work: Path,
    model: Path,
    *,
    options: CaseOptions = USUAL,
    fold: int | str = "all",
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    resume: bool = True,
) -> CaseExtendResult:
    """Extends the model in `model` by the classification or prognosis task in `task_folder`.

    Args:
        work: where unicon_plan_and_preprocess put the task.
        model: a model folder; created from the embedded foundation where there is none.
        fold: "all": repeated cross-validation judges, then all cases train; or the number of a fold of the plan, which
            is held out and judged on.
        precision: of the encoder where it is trained; frozen, it computes in float32.
        resume: go on with trainings end to end of the same plan that were cut.

    Raises:
        PlanError: the task is not preprocessed for this model, or cannot be trained.
        CheckpointError: the model folder is damaged, or has the task already.
    """
    planned, cohort, extension, reading = plan_case(task_folder, work, model, options=options, fold=fold, seed=seed)
    logger.info("%s", format_extension(extension))
    how = choose_device(device), precision
    return _CaseExtension(open_or_create(model), planned, cohort, extension, reading, options, *how).run(fold, resume)


def plan_case(
    task_folder: Path, work: Path, model: Path, *, options: CaseOptions, fold: int | str, seed: int
) -> tuple[Planned, Cohort, ExtensionPlan, CaseReading]:
    """What `extend_case` would do, without doing it; arguments and errors as there."""
    spec = foundation_spec(model)
    planned, stems = load_planned(task_folder, work, spec), {}
    if (Path(model) / CHAIN_FILE).exists():
        folder = ModelRecord(model)
        stems = folder.stem_plans()
        folder.check_new(planned.plan.task)
        if planned.plan.region is not None and planned.plan.region not in folder.tasks:
            logger.warning(
                "%s looks at what %s finds, which this model has not: it can be predicted only where labels are given.",
                planned.plan.task, planned.plan.region,
            )  # fmt: skip
    cohort = read_cohort(planned)
    extension, reading = plan_case_extension(planned, cohort, spec, stems, options, fold, seed)
    return planned, cohort, extension, reading


class _CaseExtension:
    """One extension under way."""

    def __init__(
        self,
        folder: ModelFolder,
        planned: Planned,
        cohort: Cohort,
        extension: ExtensionPlan,
        reading: CaseReading,
        options: CaseOptions,
        device: torch.device,
        precision: str,
    ):
        self.folder, self.planned, self.cohort, self.extension = folder, planned, cohort, extension
        self.reading, self.options, self.device = reading, options, device
        self.precision = choose_precision(precision, device) if extension.adapter else torch.float32
        torch.manual_seed(extension.seed)
        foundation = folder.foundation()
        stems = {stem.modality: folder.stem(stem, foundation) for stem in extension.reused_stems}
        self.model = build_task_model(dataclasses.replace(extension, adapter=None), foundation, stems)
        skips = skip_levels(foundation.spec, {modality: stem.levels for modality, stem in stems.items()})
        sizes, outcome = extension.head.options, reading.outcome
        days = tuple(sorted({*outcome.edges_days, *outcome.horizons_days}))
        given = cohort, self._features(), skips, sizes, reading.inputs, options, days
        self.fits = Fits(*given)
        if extension.adapter:
            fingerprint = sha256_json([to_dict(extension), folder.spec().provenance])
            run = Run(device, self.precision, self._checkpoints, fingerprint)
            self.fits = AdaptedFits(*given, self.model, extension, planned, run)
            self.model = build_task_model(extension, foundation, stems)

    def run(self, fold: int | str, resume: bool) -> CaseExtendResult:
        started, validation, table, files = time.monotonic(), None, "", ()
        if not resume:
            shutil.rmtree(self._checkpoints, ignore_errors=True)
        training = self.cohort.numbers(self.extension.training_cases)
        predicted, folds, held = self._cross_validated() if fold == "all" else (None, (), None)
        fitted = self.fits.whole(self.model, self.reading, training, self.extension.seed)
        outcome = self._calibrated(training, fitted, predicted)
        if predicted is None and self.extension.validation_cases:
            held = self.cohort.numbers(self.extension.validation_cases)
            predicted = self.fits.told(outcome, training, fitted.logits)
            folds = ((tuple(held.tolist()), tuple(training.tolist())),)
        if predicted is not None:
            validation, table, answered = self._judged(predicted, folds, held, fold, outcome.temperature)
            files = (self._written(answered, held),)
        extension = _with_epochs(self.extension, fitted.epochs, self.options.epochs)
        card = self._card(fitted, (time.monotonic() - started) / 60, validation)
        plan = TaskPlan(self.planned.plan, extension, case=dataclasses.replace(self.reading, outcome=outcome))
        entry = self.folder.add_task(plan, self.model, card, files)
        shutil.rmtree(self._checkpoints, ignore_errors=True)
        return CaseExtendResult(extension, entry, validation, table)

    @property
    def _checkpoints(self) -> Path:
        return self.planned.folder / TRAININGS

    def _cross_validated(self) -> tuple[np.ndarray, tuple[Folds, ...], np.ndarray]:
        """The predictions of each case by models that never saw it, the folds of each repeat, and all cases."""
        cohort, seed, count = self.cohort, self.extension.seed, len(self.cohort)
        parts = folds_of(cohort.task, max(len(self.planned.plan.folds), 2), seed)
        found = cross_validate(count, self.fits.fold, parts, self.options.rounds, seed)
        return found.mean, found.folds, np.arange(count)

    def _features(self) -> list[dict[str, Tensor]]:
        """Of each case, what the head reads of the encoder."""
        if IMAGE not in self.reading.inputs:
            return [{} for _ in self.cohort.case_ids]
        cache = FeatureCache(self.model.to(self.device), self.planned.folder / "embeddings")
        found, names = [], self.cohort.case_ids
        for case_id in progress_bar(names, "embed", str, len(names)):
            case = open_case(self.planned.cases, case_id)
            array = torch.from_numpy(case.array[:])
            present = torch.tensor([name in case.present for name in self.planned.plan.modalities])
            looked_at = case.labels is not None and REGION in self.reading.inputs
            found.append(cache(array, present, torch.from_numpy(case.labels[:]) if looked_at else None))
        self.model.cpu()
        return found

    def _judged(
        self, predicted: np.ndarray, folds: tuple[Folds, ...], held: np.ndarray, fold: int | str, usual: float
    ) -> tuple[dict[str, Any], str, dict[str, np.ndarray]]:
        """What goes on the card, the table, and the columns of the answers, of the cases that were held out.

        Args:
            usual: the temperature of cases that are in no fold of the cross-validation.
        """
        cohort, outcome, targets = self.cohort, self.reading.outcome, self.cohort.targets
        patients, censoring, curves = [cohort.patients[n] for n in held], None, None
        if outcome.kind == SURVIVAL:
            censoring = Censoring.fit(*targets[cohort.numbers(self.extension.training_cases)].T)
            reached = np.isfinite(predicted[:, 1:]).all(axis=0)
            days = [day for day, known in zip(self.fits.days, reached) if known]
            curves = Curves(days, predicted[held][:, 1:][:, reached]) if days else None
            own = predicted[:, 0]
            columns = dict(zip((f"survival_{day:.10g}" for day in days), curves.survival.T)) if days else {}
            columns = {"risk": own[held], **columns}
        else:
            own = self._probabilities(predicted, folds[0] if fold == "all" else (), usual)
            columns = dict(zip(outcome.outputs, own[held].T, strict=True))
        judged = Judged(outcome, targets[held], patients, censoring, self.extension.seed)
        whole = dataclasses.replace(judged, targets=targets)
        clinical = cohort.clinical if any(row is not None for row in cohort.clinical) else None
        simple = baselines(whole, folds, cohort.descriptors, clinical)
        predictions = {MODEL: own[held], **{name: values[held] for name, values in simple.items()}}
        models = {n: scores_of(judged, p, curves if n == MODEL else None) for n, p in predictions.items()}
        main, told = MAIN[outcome.kind], verdict(judged, predictions, models)
        how = f"{self.options.rounds} x {len(folds[0])} folds, out of fold" if fold == "all" else f"fold {fold}"
        table = format_models(f"{self.extension.task}, {how}", models, main)
        first = models[MODEL][main]
        card = {"metric": main, "how": how, "mean": first["value"], "low": first["low"], "high": first["high"]}
        return {**card, "n": first["n"], "models": models, "verdict": told}, table, columns

    def _probabilities(self, logits: np.ndarray, folds: Folds | tuple[()], usual: float) -> np.ndarray:
        """Of all cases; each fold's are tempered by what the other folds call for."""
        link = expit if self.reading.outcome.kind != CLASSES else lambda values: softmax(values, axis=1)
        tempered = logits / usual
        for part in (list(part) for part in folds):
            others = np.setdiff1d(np.arange(len(logits)), part)
            tempered[part] = logits[part] / temperature(logits[others], self.cohort.targets[others])
        return link(tempered)

    def _calibrated(self, training: np.ndarray, fitted: Whole, out_of_fold: np.ndarray | None) -> Outcome:
        """The outcome with what the finished fit adds: Cox's baseline hazard, or the temperature.

        Args:
            out_of_fold: of all cases; None: inner folds of the training cases decide, so that those held out do not.
        """
        outcome, targets = self.reading.outcome, self.cohort.targets
        if outcome.kind == SURVIVAL:
            baseline = hazard_of(fitted.logits[training], targets[training]) if outcome.loss == "cox" else None
            return dataclasses.replace(outcome, baseline=baseline)
        if out_of_fold is None and fitted.inner is None:
            return outcome
        known = (fitted.inner.numpy(), targets[training]) if out_of_fold is None else (out_of_fold, targets)
        return dataclasses.replace(outcome, temperature=temperature(*known))

    def _written(self, columns: dict[str, np.ndarray], held: np.ndarray) -> Path:
        path = self.planned.folder / OUT_OF_FOLD
        rows = np.round(np.column_stack(list(columns.values())), 6).tolist()
        write_table(path, list(columns), {self.cohort.case_ids[n]: row for n, row in zip(held, rows, strict=True)})
        return path

    def _card(self, fitted: Whole, minutes: float, validation: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "task": self.extension.task,
            "data_fingerprint": to_dict(read_record(self.planned.folder / "fingerprint.json", Fingerprint)),
            "training": {"steps": fitted.steps, "minutes": round(minutes, 2), "history": list(fitted.history)},
            "validation": validation,
            "seed": self.extension.seed,
            "machine": machine_facts(self.device),
            "precision": str(self.precision).removeprefix("torch."),
            "probe": probe(self.model.eval(), self.planned.plan),
        }


def _with_epochs(extension: ExtensionPlan, epochs: int, most: int) -> ExtensionPlan:
    """The plan with the number that was chosen."""
    told = "the linear part alone is best" if epochs == 0 else "beyond the linear part"
    chosen = Decision("epochs", str(epochs), f"of 0 to {most}, by inner folds of the training cases: {told}")
    decisions = tuple(chosen if decision.name == "epochs" else decision for decision in extension.decisions)
    logger.info("Epochs: %s (%s).", chosen.value, chosen.reason)
    schedule = extension.schedule if extension.adapter else dataclasses.replace(extension.schedule, steps=epochs)
    return dataclasses.replace(extension, schedule=schedule, decisions=decisions)
