"""Answers about whole cases against their outcomes: classes, findings, and time to an event; every figure with its n.

`predictions.csv` has one row per case and the columns that a prediction writes; those of another program may have the
same. What a case's outcome is stands in the task's `targets.csv`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unicon_pipeline.case_reading import class_name
from unicon_pipeline.class_metrics import Classification, Score, classification_scores
from unicon_pipeline.clinical import Row
from unicon_pipeline.dataset import Case, Task
from unicon_pipeline.errors import DatasetError, PredictionError
from unicon_pipeline.spreadsheet import Cell
from unicon_pipeline.survival_metrics import Censoring, Curves, Survival, SurvivalScore, horizons, survival_scores
from unicon_pipeline.tables import Table, enumerated, read_table

PREDICTIONS = "predictions.csv"

_CURVE = re.compile(r"survival_(\d+(?:\.\d+)?)")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaseEvaluation:
    """The record in `evaluation.json`, of a classification or a prognosis task; one of the two results is there.

    `cases`: those evaluated, `held_out` of them from the task's test folders. `missing`: cases with an outcome and
    without a prediction; `unmatched`: predictions without an outcome; `failed`: case -> why its prediction cannot be
    used. None of these three is in any number. `remarks`: how the figures were made, and what to mind.
    """

    task: str
    task_type: str
    seed: int
    patients: int
    held_out: int
    cases: tuple[str, ...]
    classification: Classification | None
    survival: Survival | None
    missing: tuple[str, ...]
    unmatched: tuple[str, ...]
    failed: dict[str, str]
    remarks: tuple[str, ...] = ()
    schema_version: int = 1


@dataclass(frozen=True)
class _Pair:
    """A case whose outcome and prediction are known: rows of the two tables."""

    case: Case
    held_out: bool
    target: Row
    predicted: Row


def evaluate_cases(
    task: Task, predictions: Path, case_ids: Sequence[str] | None, _tolerance: float, seed: int, *_: object
) -> CaseEvaluation:
    """See `evaluate.evaluate`; writes nothing.

    Raises:
        DatasetError: no outcomes, or none for one of `case_ids`.
        PredictionError: no predictions.csv, none of its rows has an outcome, or columns that do not fit the task.
    """
    references = _references(task, case_ids)
    path = predictions / PREDICTIONS
    if not path.is_file():
        raise PredictionError(f"{path} does not exist. Give the folder that unicon_predict wrote for {task.name}.")
    table = read_table(path)
    found = dict(zip(table.case_ids, table.rows_of(table.case_ids), strict=True))
    pairs = [_Pair(*reference, found[name]) for name, reference in references.items() if name in found]
    if not pairs:
        raise PredictionError(
            f"{path} has no row for any of the {len(references)} cases with an outcome. It has rows for "
            f"{enumerated(table.case_ids) or 'nothing'}; expected are rows such as {next(iter(references))}."
        )
    judge = _judge_survival if task.task_type == "prognosis" else _judge_classes
    usable, failed, result, remarks = judge(task, path, table, pairs, seed)
    for case_id, why in failed.items():
        _log.warning("%s could not be evaluated: %s", case_id, why)
    kinds, known = {pair.held_out for pair in pairs}, _references(task, None)
    return CaseEvaluation(
        task=task.name,
        task_type=task.task_type,
        seed=seed,
        patients=len({pair.case.patient for pair in usable}),
        held_out=sum(pair.held_out for pair in usable),
        cases=tuple(pair.case.case_id for pair in usable),
        classification=result if isinstance(result, Classification) else None,
        survival=result if isinstance(result, Survival) else None,
        missing=tuple(n for n, (_, held_out, _) in references.items() if n not in found and held_out in kinds),
        unmatched=tuple(name for name in table.case_ids if name not in known),
        failed=failed,
        remarks=tuple(remarks),
    )


def _references(task: Task, case_ids: Sequence[str] | None) -> dict[str, tuple[Case, bool, Row]]:
    """Case id -> (case, held out, row of targets.csv) of the cases that have an outcome, in the task's order."""
    if task.targets is None:
        raise DatasetError(f"{task.folder} has no targets.csv, so there is nothing to compare predictions with.")
    every = [(case, False) for case in task.cases] + [(case, True) for case in task.held_out_cases]
    rows = task.targets.rows_of(case.case_id for case, _ in every)
    known = {
        case.case_id: (case, held_out, row)
        for (case, held_out), row in zip(every, rows, strict=True)
        if row is not None and any(cell is not None for cell in row.values())
    }
    if case_ids is None:
        return known
    unknown = [name for name in case_ids if name not in known]
    if unknown:
        raise DatasetError(f"{task.folder / 'targets.csv'} has no outcome of {enumerated(unknown)}.")
    return {name: reference for name, reference in known.items() if name in set(case_ids)}


_Judged = tuple[list[_Pair], dict[str, str], Classification | Survival, list[str]]


def _judge_classes(task: Task, path: Path, table: Table, pairs: list[_Pair], seed: int) -> _Judged:
    targets = tuple(task.targets.columns)
    exclusive = len(targets) == 1 and not {targets[0], f"p_{targets[0]}"} & set(table.columns)
    if exclusive:
        names = tuple(name.removeprefix("p_") for name in table.columns if name.startswith("p_"))
        if len(names) < 2:
            raise PredictionError(f"{path}: expected a column p_<class> for each class, found {_columns(table)}.")
    else:
        names = tuple(name for name in targets if {name, f"p_{name}"} & set(table.columns))
        if not names:
            wanted = ", ".join(f"p_{name}" for name in targets)
            raise PredictionError(f"{path}: expected the columns {wanted}, found {_columns(table)}.")
    columns = [f"p_{name}" if f"p_{name}" in table.columns else name for name in names]
    failed = {}
    for pair in pairs:
        outside = [name for name in columns if not _within(pair.predicted[name], 0, 1)]
        kind = class_name(pair.target[targets[0]]) if exclusive else None
        if outside:
            failed[pair.case.case_id] = f"{outside[0]} is {_told(pair.predicted[outside[0]])}, no probability"
        elif exclusive and kind not in names:
            failed[pair.case.case_id] = f"it is {kind}, which the predictions do not know; they know {', '.join(names)}"
    usable = _usable(pairs, failed, path)
    if exclusive:
        wanted = np.array([names.index(class_name(pair.target[targets[0]])) for pair in usable], np.float64)
    else:
        wanted = np.array([[pair.target[name] for name in names] for pair in usable], np.float64)
    probabilities = np.array([[pair.predicted[name] for name in columns] for pair in usable], np.float64)
    patients = [pair.case.patient for pair in usable]
    result = classification_scores(probabilities, wanted, names, patients, seed=seed)
    unjudged = [name for name in targets if name not in names] if not exclusive else []
    remarks = [f"No column tells {', '.join(unjudged)}."] if unjudged else []
    if exclusive and len(names) == 2:
        remarks.append(f"Positive is {names[1]}, against {names[0]}.")
    return usable, failed, result, remarks


def _judge_survival(task: Task, path: Path, table: Table, pairs: list[_Pair], seed: int) -> _Judged:
    if "risk" not in table.columns:
        raise PredictionError(f"{path}: expected a column risk (higher = earlier event), found {_columns(table)}.")
    days = {float(match[1]): name for name in table.columns if (match := _CURVE.fullmatch(name))}
    failed = {}
    for pair in pairs:
        told = [name for name in days.values() if pair.predicted[name] is not None]
        outside = [name for name in told if not _within(pair.predicted[name], 0, 1)]
        if not _within(pair.predicted["risk"], -math.inf, math.inf):
            failed[pair.case.case_id] = f"risk is {_told(pair.predicted['risk'])}, no number"
        elif outside:
            failed[pair.case.case_id] = f"{outside[0]} is {_told(pair.predicted[outside[0]])}, no probability"
    usable = _usable(pairs, failed, path)
    known = [day for day in sorted(days) if day > 0 and all(p.predicted[days[day]] is not None for p in usable)]
    curves = None
    if known:
        curves = Curves(known, np.array([[pair.predicted[days[day]] for day in known] for pair in usable]))
    rows = [row for row in task.targets.rows_of(case.case_id for case in task.cases) if row is not None]
    training = _outcomes(rows or [pair.target for pair in usable])
    censoring, at = Censoring.fit(*training), horizons(*training)
    risk = np.array([pair.predicted["risk"] for pair in usable], np.float64)
    patients = [pair.case.patient for pair in usable]
    outcomes = _outcomes([pair.target for pair in usable])
    result = survival_scores(*outcomes, risk, censoring, at, curves, patients, seed=seed)
    source = f"the {len(rows)} training cases" if rows else "the evaluated cases, as there are no training cases"
    remarks = [
        f"Censoring is that of {source}; Uno's C counts events before day {censoring.tau_days:g} (tau), the last with "
        "a tenth of them still followed.",
        f"Horizons: {', '.join(f'day {day:g}' for day in at) or 'none, for want of an event'}.",
    ]
    if curves is None:
        remarks.append("No column survival_<day> tells a curve in every case, so there is no Brier score.")
    return usable, failed, result, remarks


def _outcomes(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Days and events (n,) each."""
    return tuple(np.array([row[name] for row in rows], np.float64) for name in ("time_days", "event"))


def _usable(pairs: Sequence[_Pair], failed: Mapping[str, str], path: Path) -> list[_Pair]:
    usable = [pair for pair in pairs if pair.case.case_id not in failed]
    if not usable:
        reasons = "\n".join(f"  {name}: {why}" for name, why in list(failed.items())[:5])
        raise PredictionError(f"{path}: none of the {len(pairs)} predictions can be evaluated:\n{reasons}")
    return usable


def _within(cell: Cell, low: float, high: float) -> bool:
    return isinstance(cell, float) and low <= cell <= high


def _told(cell: Cell) -> str:
    return "blank" if cell is None else repr(cell)


def _columns(table: Table) -> str:
    return enumerated(list(table.columns)) or "none"


def format_cases(evaluation: CaseEvaluation) -> str:
    """A table, one line a metric: value, 95 % interval, cases, and how many of them count as positive or events."""
    title = (
        f"{evaluation.task}: {len(evaluation.cases)} cases of {evaluation.patients} patients, "
        f"{evaluation.held_out} of them held out from training"
    )
    if evaluation.survival is not None:
        headings, rows = ("metric", "value", "95 % interval", "n", "events", ""), _survival_rows(evaluation.survival)
    else:
        headings = ("output", "metric", "value", "95 % interval", "n", "positives", "")
        rows = _class_rows(evaluation.classification)
    lines = [headings, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join([title, "", *table, "", *_calibration(evaluation), *_remarks(evaluation)])


def _class_rows(result: Classification) -> Iterator[tuple[str, ...]]:
    blocks = {name: output.scores for name, output in result.outputs.items()}
    if len(blocks) > 1:
        blocks["overall"] = result.overall
    for name, scores in blocks.items():
        for metric, score in scores.items():
            yield name, metric, *_cells(score), str(score.positives), score.remark


def _survival_rows(result: Survival) -> Iterator[tuple[str, ...]]:
    until = {"uno_c": result.tau_days, "integrated_brier": result.brier_days}
    blocks = [(result.scores, until), *((at.scores, dict.fromkeys(at.scores, at.days)) for at in result.horizons)]
    for scores, days in blocks:
        for metric, score in scores.items():
            name = metric if days.get(metric) is None else f"{metric} to day {days[metric]:g}"
            yield name, *_cells(score), str(score.events), score.remark


def _cells(score: Score | SurvivalScore) -> tuple[str, str, str]:
    value = "n/a" if score.value is None else f"{score.value:.3f}"
    interval = "n/a" if score.low is None else f"{score.low:.3f} to {score.high:.3f}"
    return value, interval, str(score.n)


def _calibration(evaluation: CaseEvaluation) -> Iterator[str]:
    """Predicted/observed, of groups of cases."""
    if evaluation.survival is not None:
        for at in evaluation.survival.horizons:
            pairs = [f"{point.predicted:.2f}/{_share(point.observed.value)}" for point in at.calibration]
            if pairs:
                yield f"Survival to day {at.days:g}, predicted/observed (Kaplan-Meier): {', '.join(pairs)}"
    else:
        for name, output in evaluation.classification.outputs.items():
            pairs = [f"{point.predicted:.2f}/{_share(point.observed)}" for point in output.calibration]
            if pairs:
                yield f"Probability of {name}, predicted/observed: {', '.join(pairs)}"


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


def _remarks(evaluation: CaseEvaluation) -> Iterator[str]:
    yield from evaluation.remarks
    trained = len(evaluation.cases) - evaluation.held_out
    if trained:
        cases = "1 case is a training case" if trained == 1 else f"{trained} cases are training cases"
        yield f"{cases}: unless predicted by models that had not seen them (out of fold), the figures flatter."
    for what, names in (
        ("outcome without prediction", evaluation.missing),
        ("prediction without outcome", evaluation.unmatched),
    ):
        if names:
            yield f"{len(names)} {what}: {enumerated(names)}."
    yield from (f"Failed: {case_id}: {why}" for case_id, why in evaluation.failed.items())
