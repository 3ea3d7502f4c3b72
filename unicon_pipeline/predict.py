"""Prediction: every wanted task that a case's modalities allow, back on the case's own grid.

One bad case is named with its reason and the others go on. What an earlier run left for a case is removed
before the case is tried, so that a failure cannot look like a result.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from unicon_pipeline.dataset import Case, prediction_cases
from unicon_pipeline.device import choose_device, choose_precision, machine_facts
from unicon_pipeline.errors import CheckpointError, PredictionError, UniconError
from unicon_pipeline.export import export_case
from unicon_pipeline.geometry import Volume, write_image, write_labels
from unicon_pipeline.intensity import read_in_units
from unicon_pipeline.model_folder import ModelFolder, TaskPlan
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.prepare import PreparedCase, prepare_case
from unicon_pipeline.progress import progress_bar
from unicon_pipeline.records import write_record
from unicon_pipeline.sliding_window import sliding_window_logits, whole_logits
from unicon_pipeline.tables import write_table

logger = logging.getLogger(__name__)

_NOTHING_FOUND = "nothing was found; if that surprises, check orientation, units (HU, SUV) and field of view"

DONE, SOME_FAILED, NOTHING_DONE = 0, 1, 2


@dataclass(frozen=True)
class TaskRun:
    """One task on one case. `modalities`: those that were used. `warnings`: what a person should look at."""

    task: str
    modalities: tuple[str, ...]
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class TaskResult:
    """One task on one case: `labels` and `probabilities` on the case's grid, or `scores` per output of a whole case."""

    run: TaskRun
    labels: Volume | None = None
    probabilities: dict[str, Volume] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CaseRun:
    """One case. `skipped`: task -> why it could not use this input. `failure`: the reason, or None."""

    case_id: str
    modalities: tuple[str, ...]
    done: tuple[TaskRun, ...]
    skipped: dict[str, str]
    failure: str | None


@dataclass(frozen=True)
class RunReport:
    """`run.json`. `model` is the digest of the whole model, so of everything that decides a result."""

    model: str
    tasks: tuple[str, ...]
    cases: tuple[CaseRun, ...]
    precision: str
    tta: bool
    machine: dict[str, str | int | bool]
    versions: dict[str, str]
    schema_version: int = 1

    @property
    def exit_code(self) -> int:
        """0: all done; 1: some cases failed; 2: nothing could be done."""
        if not any(case.done for case in self.cases):
            return NOTHING_DONE
        return SOME_FAILED if any(case.failure for case in self.cases) else DONE

    def summary(self) -> str:
        """One line per failure, then one for the run."""
        failed = [case for case in self.cases if case.failure]
        lines = [f"{case.case_id} FAILED: {case.failure}" for case in failed]
        seconds = sum(run.seconds for case in self.cases for run in case.done)
        results = sum(len(case.done) for case in self.cases)
        lines.append(f"{results} results from {len(self.cases)} cases in {seconds:.1f} s; {len(failed)} cases failed.")
        return "\n".join(lines)


def predict_folder(
    source: Path,
    out: Path,
    model: Path,
    *,
    tasks: Sequence[str] | None = None,
    device: str = "auto",
    precision: str = "auto",
    save_probabilities: bool = False,
    tta: bool = False,
) -> RunReport:
    """Predicts a folder of images (or one image file) and writes `OUT/<Task>/` and `OUT/run.json`.

    Raises:
        CheckpointError: no sound model, or a wanted task is not in it.
        PredictionError, DatasetError: no case could be found, or what the channels are is ambiguous.
    """
    folder = ModelFolder(model)
    predictor = Predictor(folder, tasks, device, precision, tta)
    cases = prediction_cases(Path(source), predictor.channel_names())
    runs, writer = [], _Writer(Path(out), predictor, save_probabilities)
    for case in progress_bar(cases, "predict", lambda case: case.case_id, len(cases)):
        runs.append(_run_case(predictor, case, writer))
        if runs[-1].failure:
            logger.error("%s failed: %s", case.case_id, runs[-1].failure)
    report = RunReport(
        model=folder.head,
        tasks=predictor.tasks,
        cases=tuple(runs),
        precision=str(predictor.precision).removeprefix("torch."),
        tta=tta,
        machine=machine_facts(predictor.device),
        versions={name: version(name) for name in ("unicon-pipeline", "torch", "numpy", "SimpleITK")},
    )
    write_record(Path(out) / "run.json", report)
    return report


class Predictor:
    """The wanted tasks of a model, loaded once and ready for any number of cases."""

    def __init__(
        self, folder: ModelFolder, tasks: Sequence[str] | None, device: str, precision: str, tta: bool
    ):
        self.tasks = tuple(dict.fromkeys(tasks)) if tasks else folder.tasks
        if not self.tasks:
            raise CheckpointError(f"{folder.path} has no task yet. Add one with unicon_extend.")
        self.device = choose_device(device)
        self.precision, self.tta = choose_precision(precision, self.device), tta
        self._task_plans: dict[str, TaskPlan] = {task: folder.task_plan(task) for task in self.tasks}
        self.plans: dict[str, DataPlan] = {task: plan.data for task, plan in self._task_plans.items()}
        foundation = folder.foundation()
        self._models = {task: folder.task_model(task, foundation).merged().to(self.device) for task in self.tasks}

    def channel_names(self) -> dict[int, str]:
        """Channel number -> modality, as the tasks agree on it.

        Raises:
            PredictionError: two tasks number their channels differently.
        """
        names: dict[int, str] = {}
        for task, plan in self.plans.items():
            for number, name in enumerate(plan.modalities):
                if names.setdefault(number, name) != name:
                    raise PredictionError(
                        f"Channel {number:04d} is {names[number]} in one of the tasks and {name} in {task}. "
                        'Say what the files are in a dataset.json beside them: {"channel_names": {"0": "CT"}}, '
                        "or predict these tasks one by one with -t."
                    )
        return names

    def unusable(self, task: str, modalities: Sequence[str]) -> str | None:
        """Why a task cannot use an input with these modalities; None if it can."""
        wanted = self.plans[task].modalities
        native = self._task_plans[task].native is not None  # it never learned to do without one
        if (all if native else any)(name in modalities for name in wanted):
            return None
        return f"needs {(' and ' if native else ' or ').join(wanted)}, the case has {', '.join(modalities)}"

    def predict(self, task: str, images: dict[str, Volume], with_probabilities: bool = False) -> TaskResult:
        """One task on one case.

        Args:
            images: modality -> volume in HU or SUV, all on one grid.
        """
        started = time.monotonic()
        plan = self.plans[task]
        prepared = prepare_case({name: image for name, image in images.items() if name in plan.modalities}, plan)
        logits = self._logits(task, prepared)
        if not bool(torch.isfinite(logits).all()):
            raise PredictionError(f"{task} gave values that are not numbers; try --precision fp32.")

        def run(*warnings: str) -> TaskRun:
            return TaskRun(task, prepared.present, round(time.monotonic() - started, 3), warnings)

        if plan.labels is None:
            outputs = self._task_plans[task].native.outputs
            return TaskResult(run(), scores=dict(zip(outputs, logits.sigmoid().tolist(), strict=True)))
        labels, probabilities = export_case(logits.numpy(), plan.labels, prepared.geometry, with_probabilities)
        done = run() if labels.array_zyx.any() else run(_NOTHING_FOUND)
        return TaskResult(done, labels, probabilities)

    def _logits(self, task: str, prepared: PreparedCase) -> Tensor:
        plan = self.plans[task]
        present = tuple(name in prepared.present for name in plan.modalities)
        if plan.view == "volume":
            return whole_logits(self._models[task], prepared.array_czyx, present, self.device, self.precision)
        return sliding_window_logits(
            self._models[task],
            prepared.array_czyx,
            present,
            plan.air,
            plan.patch_shape_zyx,
            self.device,
            self.precision,
            plan.conventions.mirror_axes if self.tta else (),
        )


class _Writer:
    """`OUT/<Task>/`: label maps and probability maps per case, or one `predictions.csv` that grows case by case."""

    def __init__(self, out: Path, predictor: Predictor, save_probabilities: bool):
        self.out, self.plans, self.save_probabilities = out, predictor.plans, save_probabilities
        self._rows: dict[str, dict[str, list[float]]] = {}
        for task, plan in self.plans.items():
            if plan.labels is None:
                self._table(task).unlink(missing_ok=True)

    def clear(self, case_id: str) -> None:
        """Removes what an earlier run left for a case."""
        for task, plan in self.plans.items():
            if plan.labels is not None:
                for path in _outputs(self.out / task, case_id, plan):
                    path.unlink(missing_ok=True)

    def write(self, task: str, case_id: str, result: TaskResult) -> None:
        if result.labels is None:
            rows = self._rows.setdefault(task, {})
            rows[case_id] = [round(score, 6) for score in result.scores.values()]
            write_table(self._table(task), tuple(result.scores), rows)
            return
        for name, volume in result.probabilities.items():
            write_image(_probability_path(self.out / task, case_id, name), volume.array_zyx, volume.grid)
        write_labels(self.out / task / f"{case_id}.nii.gz", result.labels.array_zyx, result.labels.grid)

    def _table(self, task: str) -> Path:
        return self.out / task / "predictions.csv"


def _run_case(predictor: Predictor, case: Case, writer: _Writer) -> CaseRun:
    run = CaseRun(case.case_id, tuple(case.images), (), {}, None)
    writer.clear(case.case_id)
    try:
        images = read_in_units(case)
        for task in predictor.tasks:
            if reason := predictor.unusable(task, case.images):
                run = dataclasses.replace(run, skipped={**run.skipped, task: reason})
                logger.info("%s: %s is skipped: it %s", case.case_id, task, reason)
                continue
            result = predictor.predict(task, images, writer.save_probabilities)
            writer.write(task, case.case_id, result)
            for warning in result.run.warnings:
                logger.warning("%s, %s: %s", case.case_id, task, warning)
            run = dataclasses.replace(run, done=(*run.done, result.run))
    except (UniconError, OSError, RuntimeError, MemoryError) as problem:
        logger.debug("%s", case.case_id, exc_info=True)
        return dataclasses.replace(run, failure=str(problem) or type(problem).__name__)
    return run


def _outputs(folder: Path, case_id: str, plan: DataPlan) -> list[Path]:
    names = ("background", *plan.labels.names)
    return [folder / f"{case_id}.nii.gz", *(_probability_path(folder, case_id, name) for name in names)]


def _probability_path(folder: Path, case_id: str, name: str) -> Path:
    return folder / "probabilities" / f"{case_id}_{re.sub(r'[^A-Za-z0-9]+', '_', name)}.nii.gz"
