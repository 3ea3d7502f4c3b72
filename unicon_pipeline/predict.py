"""Prediction: every wanted task that a case's modalities allow, back on the case's own grid.

One bad case is named with its reason and the others go on. What an earlier run left for a case is removed
before the case is tried, so that a failure cannot look like a result.
"""

from __future__ import annotations

import dataclasses
import glob
import logging
import re
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
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
from unicon_pipeline.prediction_run import Arithmetic, CaseRun, RunReport, TaskRun
from unicon_pipeline.prepare import PreparedCase, prepare_case
from unicon_pipeline.progress import progress_bar
from unicon_pipeline.records import write_record
from unicon_pipeline.sliding_window import sliding_window_logits, whole_logits
from unicon_pipeline.tables import write_table
from unicon_pipeline.workers import Failure, Workers

logger = logging.getLogger(__name__)

_NOTHING_FOUND = "nothing was found; if that surprises, check orientation, units (HU, SUV) and field of view"


@dataclass(frozen=True)
class TaskResult:
    """One task on one case: `labels` and `probabilities` on the case's grid, or `scores` per output of a whole case."""

    run: TaskRun
    labels: Volume | None = None
    probabilities: dict[str, Volume] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _How:
    """What a prediction is asked for, as the command line has it. `head`: digest of the model that is meant."""

    head: str
    tasks: tuple[str, ...]
    device: str
    precision: str
    tta: bool
    save_probabilities: bool


@dataclass(frozen=True)
class _Outcome:
    """A case's run; task -> output -> score of the tasks that judge a whole case; None: no predictor was there."""

    run: CaseRun
    scores: dict[str, dict[str, float]]
    arithmetic: Arithmetic | None


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
    workers: Workers | None = None,
) -> RunReport:
    """Predicts a folder of images (or one image file) and writes `OUT/<Task>/` and `OUT/run.json`.

    Args:
        workers: what predicts, each of its processes with a model of its own; None: this process, case by case.

    Raises:
        CheckpointError: no sound model, or a wanted task is not in it.
        PredictionError, DatasetError: no case could be found, or what the channels are is ambiguous.
    """
    folder, out, workers = ModelFolder(model), Path(out), workers or Workers()
    wanted = WantedTasks(folder, tasks)
    how = _How(folder.head, wanted.tasks, device, precision, tta, save_probabilities)
    try:
        if workers.in_process:
            _predictor(folder.path, how)  # what is wrong with the model is wrong for all cases
        cases = prediction_cases(Path(source), wanted.channel_names())
        outcomes = _predict_cases(cases, folder.path, how, _Output(out, wanted.plans), workers)
    finally:
        _load.cache_clear()
    arithmetic = _distinct([outcome.arithmetic for outcome in outcomes]) or [Arithmetic("unknown", {})]
    if len(arithmetic) > 1:
        logger.warning("The cases were predicted on machines that differ; last digits may. OUT/run.json says how.")
    report = RunReport(
        model=folder.head,
        tasks=wanted.tasks,
        cases=tuple(outcome.run for outcome in outcomes),
        precision=arithmetic[0].precision,
        tta=tta,
        machine=arithmetic[0].machine,
        versions={name: version(name) for name in ("unicon-pipeline", "torch", "numpy", "SimpleITK")},
        other_machines=tuple(arithmetic[1:]),
    )
    write_record(out / "run.json", report)
    return report


def _predict_cases(cases: Sequence[Case], model: Path, how: _How, output: _Output, workers: Workers) -> list[_Outcome]:
    """The outcomes in the order of the cases; their files and tables are written."""
    outcomes: dict[str, _Outcome] = {}
    scores: dict[str, dict[str, dict[str, float]]] = {}
    output.remove_tables()
    with closing(workers.each(_predict_case, cases, model, how, output.folder)) as done:
        for case, outcome in progress_bar(done, "predict", lambda pair: pair[0].case_id, len(cases)):
            if isinstance(outcome, Failure):
                output.clear(case.case_id, half_written=True)
                outcome = _Outcome(CaseRun(case.case_id, tuple(case.images), (), {}, str(outcome)), {}, None)
            outcomes[case.case_id] = outcome
            _log(outcome.run)
            for task, of_case in outcome.scores.items():
                rows = scores.setdefault(task, {})
                rows[case.case_id] = of_case
                output.write_table(task, {one.case_id: rows[one.case_id] for one in cases if one.case_id in rows})
    return [outcomes[case.case_id] for case in cases]


def _log(run: CaseRun) -> None:
    for task, reason in run.skipped.items():
        logger.info("%s: %s is skipped: it %s", run.case_id, task, reason)
    for task_run in run.done:
        for warning in task_run.warnings:
            logger.warning("%s, %s: %s", run.case_id, task_run.task, warning)
    if run.failure:
        logger.error("%s failed: %s", run.case_id, run.failure)


def _distinct(values: list[Arithmetic | None]) -> list[Arithmetic]:
    known = [value for value in values if value is not None]
    return [value for index, value in enumerate(known) if value not in known[:index]]


class WantedTasks:
    """The wanted tasks of a model, and what they say of their input."""

    def __init__(self, folder: ModelFolder, tasks: Sequence[str] | None):
        self.tasks = tuple(dict.fromkeys(tasks)) if tasks else folder.tasks
        if not self.tasks:
            raise CheckpointError(f"{folder.path} has no task yet. Add one with unicon_extend.")
        self._task_plans: dict[str, TaskPlan] = {task: folder.task_plan(task) for task in self.tasks}
        self.plans: dict[str, DataPlan] = {task: plan.data for task, plan in self._task_plans.items()}

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


class Predictor(WantedTasks):
    """The wanted tasks of a model, loaded once and ready for any number of cases."""

    def __init__(self, folder: ModelFolder, tasks: Sequence[str] | None, device: str, precision: str, tta: bool):
        super().__init__(folder, tasks)
        self.device = choose_device(device)
        self.precision, self.tta = choose_precision(precision, self.device), tta
        foundation = folder.foundation()
        self._models = {task: folder.task_model(task, foundation).merged().to(self.device) for task in self.tasks}

    def arithmetic(self) -> Arithmetic:
        """What decides the bits of its results, besides the model."""
        return Arithmetic(str(self.precision).removeprefix("torch."), machine_facts(self.device))

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


class _Output:
    """`OUT/<Task>/`: label maps and probability maps per case, or one `predictions.csv` that grows case by case."""

    def __init__(self, folder: Path, plans: dict[str, DataPlan]):
        self.folder, self._plans = folder, plans

    def clear(self, case_id: str, half_written: bool = False) -> None:
        """Removes what an earlier run left for a case, and on demand what a killed process had half written."""
        for task, plan in self._plans.items():
            if plan.labels is None:
                continue
            for path in _outputs(self.folder / task, case_id, plan):
                path.unlink(missing_ok=True)
                if half_written:
                    for aside in path.parent.glob(f".*.partial.{glob.escape(path.name)}"):
                        aside.unlink(missing_ok=True)

    def write(self, task: str, case_id: str, result: TaskResult) -> None:
        """A case's label map and its probability maps."""
        for name, volume in result.probabilities.items():
            write_image(_probability_path(self.folder / task, case_id, name), volume.array_zyx, volume.grid)
        write_labels(self.folder / task / f"{case_id}.nii.gz", result.labels.array_zyx, result.labels.grid)

    def remove_tables(self) -> None:
        """Removes an earlier run's."""
        for task, plan in self._plans.items():
            if plan.labels is None:
                self._table(task).unlink(missing_ok=True)

    def write_table(self, task: str, scores: dict[str, dict[str, float]]) -> None:
        """The whole table as it now is: case -> output -> score."""
        columns = next(iter(scores.values()))
        rows = {case_id: [round(of[name], 6) for name in columns] for case_id, of in scores.items()}
        write_table(self._table(task), tuple(columns), rows)

    def _table(self, task: str) -> Path:
        return self.folder / task / "predictions.csv"


_LOADING = threading.Lock()  # else two threads of a Dask worker would each load the model


def _predictor(model: Path, how: _How) -> Predictor:
    with _LOADING:
        return _load(model, how)


@lru_cache(maxsize=1)
def _load(model: Path, how: _How) -> Predictor:
    folder = ModelFolder(model)
    if folder.head != how.head:
        raise CheckpointError(f"{model} is not the model that this run began with: it was extended. Run again.")
    return Predictor(folder, how.tasks, how.device, how.precision, how.tta)


def _predict_case(case: Case, model: Path, how: _How, out: Path) -> _Outcome:
    """Worker: one case, with its files written."""
    predictor = _predictor(model, how)
    output, scores = _Output(out, predictor.plans), {}
    run = CaseRun(case.case_id, tuple(case.images), (), {}, None)
    output.clear(case.case_id)
    try:
        images = read_in_units(case)
        for task in predictor.tasks:
            if reason := predictor.unusable(task, case.images):
                run = dataclasses.replace(run, skipped={**run.skipped, task: reason})
                continue
            result = predictor.predict(task, images, how.save_probabilities)
            if result.labels is None:
                scores[task] = result.scores
            else:
                output.write(task, case.case_id, result)
            run = dataclasses.replace(run, done=(*run.done, result.run))
    except (UniconError, OSError, RuntimeError, MemoryError) as problem:
        logger.debug("%s", case.case_id, exc_info=True)
        run = dataclasses.replace(run, failure=str(problem) or type(problem).__name__)
    return _Outcome(run, scores, predictor.arithmetic())


def _outputs(folder: Path, case_id: str, plan: DataPlan) -> list[Path]:
    names = ("background", *plan.labels.names)
    return [folder / f"{case_id}.nii.gz", *(_probability_path(folder, case_id, name) for name in names)]


def _probability_path(folder: Path, case_id: str, name: str) -> Path:
    return folder / "probabilities" / f"{case_id}_{re.sub(r'[^A-Za-z0-9]+', '_', name)}.nii.gz"
