"""Predictions against references: per case, per output, and over the patients with intervals.

Each task type has one evaluator (`EVALUATORS`); a new one is one function and one line there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from unicon_pipeline.case_evaluate import CaseEvaluation, evaluate_cases, format_cases
from unicon_pipeline.contract import SpacingZYX
from unicon_pipeline.dataset import Case, Labels, Task
from unicon_pipeline.errors import DatasetError, PredictionError, UniconError
from unicon_pipeline.geometry import GRID_TOLERANCE_MM, Volume, grids_differ_mm, onto_grid, read_labels
from unicon_pipeline.metrics import Summary, dice, finite_or_none, summarise, surface_scores, volume_ml
from unicon_pipeline.progress import progress_bar
from unicon_pipeline.records import write_record
from unicon_pipeline.workers import Failure, Workers

RESULT_FILE = "evaluation.json"
SUFFIX = ".nii.gz"
METRICS = ("dice", "nsd", "hd95_mm")
NAMES_SHOWN = 5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputScores:
    """One output (a class or a region) in one case; None where a metric is undefined.

    Both empty: Dice, NSD and HD95 undefined. One empty: Dice 0, NSD 0, HD95 undefined.
    """

    dice: float | None
    nsd: float | None
    hd95_mm: float | None
    reference_ml: float
    prediction_ml: float


@dataclass(frozen=True)
class CaseScores:
    """`held_out`: the case is from the task's test folders, never seen in training."""

    case_id: str
    patient: str
    held_out: bool
    outputs: dict[str, OutputScores]


@dataclass(frozen=True)
class Evaluation:
    """The record in `evaluation.json`.

    `outputs`: output name -> metric (`dice`, `nsd`, `hd95_mm`) -> summary over the cases. `overall`: the
    same over each case's mean of its defined outputs. `missing`: references without a prediction;
    `unmatched`: predictions without a reference; `failed`: case -> why it could not be evaluated. None
    of these three is in any number. `resampled`: predictions on other grids were brought onto the references'.
    """

    task: str
    task_type: str
    tolerance_mm: float
    seed: int
    patients: int
    cases: tuple[CaseScores, ...]
    outputs: dict[str, dict[str, Summary]]
    overall: dict[str, Summary]
    missing: tuple[str, ...]
    unmatched: tuple[str, ...]
    failed: dict[str, str]
    resampled: bool = False
    schema_version: int = 1


@dataclass(frozen=True)
class _Job:
    """What one case needs, small enough to send to a worker process."""

    case: Case
    held_out: bool
    prediction: Path
    labels: Labels
    tolerance_mm: float
    resample: bool


def evaluate(
    task: Task,
    predictions: Path,
    case_ids: Sequence[str] | None = None,
    tolerance_mm: float = 2.0,
    seed: int = 0,
    processes: int = 1,
    resample: bool = False,
) -> Evaluation | CaseEvaluation:
    """Compares predictions with the task's references and writes `<predictions>/evaluation.json`.

    References are the labels or outcomes of the task's cases and of its held-out cases. A case that cannot be
    evaluated is listed in `failed`, and the others are evaluated.

    Args:
        predictions: folder with `<case>.nii.gz`, or of a classification or prognosis task with `predictions.csv`.
        case_ids: the cases to evaluate; None: all that have a prediction.
        tolerance_mm: of the normalised surface distance.
        seed: of the bootstrap.
        processes: cases evaluated at the same time.
        resample: bring predictions on another grid onto the reference's (nearest voxel), such as those of a
            PET alone against labels drawn on the CT; without it another grid is an error.

    Raises:
        DatasetError: this version has no metrics for the task's type, or a case id has no reference.
        PredictionError: no prediction was found, or none could be evaluated.
        UniconError: the tolerance is not a finite number of mm, at least 0.
    """
    evaluator = EVALUATORS.get(task.task_type)
    if evaluator is None:
        raise DatasetError(
            f"{task.name} is a {task.task_type} task, and this version evaluates only {', '.join(EVALUATORS)} tasks."
        )
    if not 0 <= tolerance_mm < math.inf:
        raise UniconError(f"The tolerance must be a finite number of mm, at least 0, not {tolerance_mm}.")
    predictions = Path(predictions)
    if not predictions.is_dir():
        raise PredictionError(f"{predictions} is not a folder. Give the folder that holds {task.name}'s predictions.")
    result = evaluator(task, predictions, case_ids, tolerance_mm, seed, processes, resample)
    write_record(predictions / RESULT_FILE, result)
    return result


def evaluate_segmentation(
    task: Task,
    predictions: Path,
    case_ids: Sequence[str] | None,
    tolerance_mm: float,
    seed: int,
    processes: int,
    resample: bool,
) -> Evaluation:
    """Dice, normalised surface distance, HD95 and volumes; see `evaluate`. Writes nothing."""
    if task.labels is None:
        raise DatasetError(f"{task.folder}: the task declares no labels, so there is nothing to evaluate.")
    references = _references(task, case_ids)
    # What a killed prediction left half written has a name with a dot in front.
    files = {path.name.removesuffix(SUFFIX): path for path in sorted(predictions.glob(f"[!.]*{SUFFIX}"))}
    jobs = [
        _Job(case, held_out, files[case_id], task.labels, tolerance_mm, resample)
        for case_id, (case, held_out) in references.items()
        if case_id in files
    ]
    if not jobs:
        raise PredictionError(_nothing_found(predictions, sorted(references), list(files)))
    results: dict[str, CaseScores | Failure] = {}
    with Workers(processes) as workers:
        done = workers.each(_score_case, jobs)
        for job, result in progress_bar(done, "evaluate", lambda pair: pair[0].case.case_id, len(jobs)):
            results[job.case.case_id] = result
            if isinstance(result, Failure):
                _log.warning("%s could not be evaluated: %s", job.case.case_id, result)
    ordered = [(job.case.case_id, results[job.case.case_id]) for job in jobs]
    scored = [result for _, result in ordered if isinstance(result, CaseScores)]
    failed = {case_id: str(result) for case_id, result in ordered if isinstance(result, Failure)}
    if not scored:
        reasons = "\n".join(f"  {case_id}: {why}" for case_id, why in failed.items())
        raise PredictionError(f"None of the {len(jobs)} predictions in {predictions} could be evaluated:\n{reasons}")
    known = _references(task, None)
    outputs, overall = _summaries(scored, task.labels.names, seed)
    return Evaluation(
        task=task.name,
        task_type=task.task_type,
        tolerance_mm=float(tolerance_mm),
        seed=seed,
        patients=len({case.patient for case in scored}),
        cases=tuple(scored),
        outputs=outputs,
        overall=overall,
        missing=_missing(references, files),
        unmatched=tuple(case_id for case_id in files if case_id not in known),
        failed=failed,
        resampled=resample,
    )


# task type -> (task, predictions, case_ids, tolerance_mm, seed, processes, resample) -> the record to write.
EVALUATORS: dict[str, Callable[..., Evaluation | CaseEvaluation]] = {
    "segmentation": evaluate_segmentation,
    "classification": evaluate_cases,
    "prognosis": evaluate_cases,
}


def _references(task: Task, case_ids: Sequence[str] | None) -> dict[str, tuple[Case, bool]]:
    """Case id -> (case, held out) of the cases that have labels, in the task's order."""
    every = {case.case_id: (case, False) for case in task.cases if case.labels is not None}
    every |= {case.case_id: (case, True) for case in task.held_out_cases if case.labels is not None}
    if case_ids is None:
        return every
    unknown = [case_id for case_id in case_ids if case_id not in every]
    if unknown:
        raise DatasetError(
            f"{task.folder} has no reference labels for {_some(unknown)}. "
            f"It has them for {len(every)} cases: {_some(list(every))}."
        )
    wanted = set(case_ids)
    return {case_id: entry for case_id, entry in every.items() if case_id in wanted}


def _missing(references: dict[str, tuple[Case, bool]], files: Mapping[str, Path]) -> tuple[str, ...]:
    """References without a prediction; where only held-out cases were predicted, of these alone."""
    kinds = {held_out for case_id, (_, held_out) in references.items() if case_id in files}
    return tuple(case_id for case_id, (_, held_out) in references.items() if case_id not in files and held_out in kinds)


def _nothing_found(predictions: Path, wanted: list[str], found: list[str]) -> str:
    there = f"It holds {_some([name + SUFFIX for name in found])}" if found else f"It holds no {SUFFIX} file"
    example = f", such as {wanted[0]}{SUFFIX}" if wanted else ""
    return (
        f"{predictions} holds no prediction for any of the {len(wanted)} cases that have reference labels. "
        f"{there}; expected are files named <case>{SUFFIX}{example}."
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return f"{shown} and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else shown


def _score_case(job: _Job) -> CaseScores:
    reference, prediction = read_labels(job.case.labels), read_labels(job.prediction)
    if job.resample:
        prediction = onto_grid(prediction, reference.grid, 0.0, nearest=True)
    _check_grids(job, reference, prediction)
    labels = job.labels
    target, guess = reference.array_zyx, prediction.array_zyx
    if labels.ignore is not None:
        # Unannotated voxels count for neither side.
        annotated = target != labels.ignore
        target, guess = np.where(annotated, target, 0), np.where(annotated, guess, 0)
    boxes = (ndimage.find_objects(target), ndimage.find_objects(guess))
    for side, path in zip(boxes, (job.case.labels, job.prediction)):
        _check_values([value for value, box in enumerate(side, start=1) if box is not None], labels, path)
    spacing = reference.grid.spacing_zyx_mm
    outputs = {
        name: _score_output(target, guess, values, boxes, spacing, job.tolerance_mm)
        for name, values in zip(labels.names, labels.values)
    }
    return CaseScores(job.case.case_id, job.case.patient, job.held_out, outputs)


def _check_grids(job: _Job, reference: Volume, prediction: Volume) -> None:
    distance = grids_differ_mm(reference.grid, prediction.grid)
    if distance <= GRID_TOLERANCE_MM:
        return
    shapes = f"{prediction.grid.shape_zyx} and {reference.grid.shape_zyx}"
    how = f"their corners lie up to {distance:.3g} mm apart" if math.isfinite(distance) else "their shapes differ"
    raise PredictionError(
        f"{job.prediction} is not on the grid of its reference {job.case.labels}: {how} "
        f"(shapes z, y, x {shapes}; allowed {GRID_TOLERANCE_MM} mm). "
        "Predict on the image that the reference was drawn on, or evaluate with --resample."
    )


def _check_values(present: list[int], labels: Labels, path: Path) -> None:
    unknown = sorted(set(present).difference(*labels.values))
    if unknown:
        expected = "; ".join(f"{name} = {', '.join(map(str, v))}" for name, v in zip(labels.names, labels.values))
        ignored = "" if labels.ignore is None else f" ({labels.ignore}, ignore, only where the reference has it)"
        raise DatasetError(
            f"{path} holds the label values {unknown}, which dataset.json does not declare. "
            f"Known are 0 and {expected}{ignored}. Is it a file of this task?"
        )


def _score_output(
    target: np.ndarray,
    guess: np.ndarray,
    values: tuple[int, ...],
    boxes: tuple[list, list],
    spacing: SpacingZYX,
    tolerance_mm: float,
) -> OutputScores:
    """Compares the union of `values` inside the box around it: the same numbers, far less to compute."""
    found = [side[value - 1] for side in boxes for value in values if value <= len(side)]
    found = [box for box in found if box is not None]
    if not found:
        return OutputScores(None, None, None, 0.0, 0.0)
    box = tuple(slice(min(b[axis].start for b in found), max(b[axis].stop for b in found)) for axis in range(3))
    reference, prediction = np.isin(target[box], values), np.isin(guess[box], values)
    nsd, hd95_mm = surface_scores(prediction, reference, spacing, tolerance_mm)
    return OutputScores(
        dice=finite_or_none(dice(prediction, reference)),
        nsd=finite_or_none(nsd),
        hd95_mm=finite_or_none(hd95_mm),
        reference_ml=volume_ml(reference, spacing),
        prediction_ml=volume_ml(prediction, spacing),
    )


def _summaries(
    cases: list[CaseScores], names: tuple[str, ...], seed: int
) -> tuple[dict[str, dict[str, Summary]], dict[str, Summary]]:
    patients = [case.patient for case in cases]
    outputs = {
        name: {
            metric: summarise([getattr(case.outputs[name], metric) for case in cases], patients, seed)
            for metric in METRICS
        }
        for name in names
    }
    overall = {metric: summarise([_mean_of(case, metric) for case in cases], patients, seed) for metric in METRICS}
    return outputs, overall


def _mean_of(case: CaseScores, metric: str) -> float | None:
    defined = [value for scores in case.outputs.values() if (value := getattr(scores, metric)) is not None]
    return sum(defined) / len(defined) if defined else None


def format_evaluation(evaluation: Evaluation | CaseEvaluation) -> str:
    """A table, one line an output: each metric's mean, interval of the mean, median and count of cases.

    Of whole cases: one line a metric.
    """
    if isinstance(evaluation, CaseEvaluation):
        return format_cases(evaluation)
    headings = ("output", "Dice", f"NSD at {evaluation.tolerance_mm:g} mm", "HD95 mm")
    rows = [("", *["mean (95 % interval) median n"] * len(METRICS))]
    for name, summaries in evaluation.outputs.items():
        rows.append((name, *[_cell(summaries[metric], metric) for metric in METRICS]))
    if len(evaluation.outputs) > 1:
        rows.append(("overall", *[_cell(evaluation.overall[metric], metric) for metric in METRICS]))
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings))]
    table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (headings, *rows)]
    return "\n".join([_title(evaluation), "", *table, *_remarks(evaluation)])


def _cell(summary: Summary, metric: str) -> str:
    if summary.mean is None:
        return "n/a 0"
    places = 1 if metric == "hd95_mm" else 3
    interval = "n/a" if summary.low is None else f"{summary.low:.{places}f}-{summary.high:.{places}f}"
    return f"{summary.mean:.{places}f} ({interval}) {summary.median:.{places}f} {summary.n}"


def _title(evaluation: Evaluation) -> str:
    held_out = sum(case.held_out for case in evaluation.cases)
    return (
        f"{evaluation.task}: {len(evaluation.cases)} cases of {evaluation.patients} patients, "
        f"{held_out} of them held out from training"
    )


def _remarks(evaluation: Evaluation) -> list[str]:
    lines = []
    if evaluation.resampled:
        lines.append("Predictions on other grids were brought onto their references' (nearest voxel).")
    undefined = {
        metric: sum(summaries[metric].n_undefined for summaries in evaluation.outputs.values()) for metric in METRICS
    }
    if any(undefined.values()):
        counts = ", ".join(f"{metric} {count}" for metric, count in undefined.items())
        lines.append(f"Undefined and left out (an empty reference or prediction): {counts}.")
    if 0 < sum(case.held_out for case in evaluation.cases) < len(evaluation.cases):
        lines.append("Training and held-out cases are mixed: name the cases of one kind for an unbiased figure.")
    for what, names in (
        ("reference without prediction", evaluation.missing),
        ("prediction without reference", evaluation.unmatched),
    ):
        if names:
            lines.append(f"{len(names)} {what}: {_some(names)}.")
    lines += [f"Failed: {case_id}: {why}" for case_id, why in evaluation.failed.items()]
    return ["", *lines] if lines else []
