"""The cases of a task side by side: how they spread, what is rare, how outcomes and covariates lie, what is odd."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from unicon_pipeline.contract import SpacingZYX
from unicon_pipeline.dataset import Labels, Task
from unicon_pipeline.measure import CaseFingerprint, Measured
from unicon_pipeline.tables import Cell, Table

_SHOWN = 10
_MOST_LEVELS = 30
_OUTLYING_SPACING, _OUTLYING_SIDE = 2.0, 3.0  # times the median, or the median times
_ALIKE = 0.999  # correlation of thumbnails
_MOSTLY_MISSING = 0.5
_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class Spread:
    """Per axis, z y x: lowest, median and highest of the cases."""

    low: tuple[float, float, float]
    median: tuple[float, float, float]
    high: tuple[float, float, float]


@dataclass(frozen=True)
class LabelFrequency:
    """One output: how many cases show it, its share of all labelled voxels, and medians of the cases that show it."""

    cases: int
    share: float
    median_ml: float
    median_parts: float


@dataclass(frozen=True)
class FollowUp:
    """Of a prognosis task.

    `median_follow_up_days`: by reverse Kaplan-Meier (being censored is the event), None where that curve stays above
    one half. `event_days`: lowest, quartiles and highest time of the events.
    """

    cases: int
    events: int
    event_rate: float
    median_follow_up_days: float | None
    event_days: tuple[float, ...]


@dataclass(frozen=True)
class Covariate:
    """A column of `clinical.csv` over the usable cases; `missing`: without a value, or without a row.

    Numeric: `low`, `median` and `high`; else `levels`: the commonest 30 -> cases.
    """

    numeric: bool
    missing: int
    low: float | None = None
    median: float | None = None
    high: float | None = None
    levels: dict[str, int] = field(default_factory=dict)


def spread(values: Sequence[Sequence[float]]) -> Spread:
    """Of one z, y, x triple per case."""
    low, median, high = np.quantile(np.asarray(values, float), (0, 0.5, 1), axis=0).tolist()
    return Spread(tuple(low), tuple(median), tuple(high))


def label_frequencies(cases: Sequence[CaseFingerprint], labels: Labels | None) -> dict[str, LabelFrequency]:
    """Per output of a segmentation task."""
    labelled = sum(case.labelled_voxels for case in cases)
    found = {}
    for name in () if labels is None else labels.names:
        showing = [case for case in cases if case.label_voxels.get(name)]
        parts = [case.label_parts[name] for case in showing if name in case.label_parts]
        found[name] = LabelFrequency(
            len(showing),
            sum(case.label_voxels[name] for case in showing) / labelled if showing else 0.0,
            float(np.median([case.label_ml[name] for case in showing])) if showing else 0.0,
            float(np.median(parts)) if parts else 0.0,
        )
    return found


def follow_up(task: Task, case_ids: Sequence[str]) -> FollowUp | None:
    """Of a prognosis task's usable cases, else None."""
    if task.task_type != "prognosis" or task.targets is None:
        return None
    days = np.array(_cells(task.targets, "time_days", case_ids), float)
    events = np.array(_cells(task.targets, "event", case_ids), float) == 1
    happened = np.quantile(days[events], (0, 0.25, 0.5, 0.75, 1)).tolist() if events.any() else []
    return FollowUp(len(days), int(events.sum()), float(events.mean()), _median_time(days, ~events), tuple(happened))


def class_counts(task: Task, case_ids: Sequence[str]) -> dict[str, dict[str, int]]:
    """Column -> class -> usable cases, of a classification task; cases that are not annotated do not count."""
    if task.task_type != "classification" or task.targets is None:
        return {}
    return {name: _levels(_cells(task.targets, name, case_ids)) for name in task.targets.columns}


def covariates(task: Task, case_ids: Sequence[str]) -> dict[str, Covariate]:
    """Per column of `clinical.csv`."""
    found = {}
    for name in () if task.clinical is None else task.clinical.columns:
        cells = _cells(task.clinical, name, case_ids)
        filled = [cell for cell in cells if cell is not None]
        missing = len(cells) - len(filled)
        # A table's column is numbers throughout, or text throughout.
        if filled and all(isinstance(cell, float) for cell in filled):
            found[name] = Covariate(True, missing, min(filled), float(np.median(filled)), max(filled))
        else:
            levels = dict(list(_levels(filled).items())[:_MOST_LEVELS])
            found[name] = Covariate(False, missing, levels=levels)
    return found


def remarks(task: Task, measured: Sequence[Measured]) -> Iterator[str]:
    """What is odd about the cases together, in words; what is odd about one alone is in its `oddities`."""
    cases = [one.record for one in measured]
    yield from _outliers(
        "voxel size", "mm", _OUTLYING_SPACING, {case.case_id: case.spacing_zyx_mm for case in cases}
    )
    sides = {case.case_id: tuple(np.multiply(case.shape_zyx, case.spacing_zyx_mm)) for case in cases}
    yield from _outliers("field of view", "mm", _OUTLYING_SIDE, sides)
    for oddity, names in _shared_oddities(cases).items():
        yield f"{_counted(len(names))}: {oddity}: {_listed(names)}"
    patients = {case.case_id: case.patient for case in task.cases}
    by_patient: dict[str, list[str]] = {}
    for case in cases:
        by_patient.setdefault(patients[case.case_id], []).append(case.case_id)
    several = [f"{patient} ({', '.join(names[:_SHOWN])})" for patient, names in by_patient.items() if len(names) > 1]
    if several:
        yield f"patients with several cases, which no fold separates: {_listed(several)}"
    yield from _look_alikes(measured, patients)
    for name, covariate in covariates(task, [case.case_id for case in cases]).items():
        if covariate.missing > _MOSTLY_MISSING * len(cases):
            yield f"the covariate {name} is missing in {covariate.missing} of {len(cases)} cases"


def _shared_oddities(cases: Sequence[CaseFingerprint]) -> dict[str, list[str]]:
    shared: dict[str, list[str]] = {}
    for case in cases:
        for oddity in case.oddities:
            shared.setdefault(oddity, []).append(case.case_id)
    return {oddity: names for oddity, names in shared.items() if len(names) > 1 or oddity == "nothing is labelled"}


def _outliers(what: str, unit: str, factor: float, sizes: dict[str, SpacingZYX]) -> Iterator[str]:
    middle = np.median(list(sizes.values()), axis=0)
    far = [
        f"{name} ({' x '.join(f'{value:.3g}' for value in size)})"
        for name, size in sizes.items()
        if (np.maximum(size / middle, middle / size) > factor).any()
    ]
    if far:
        median = " x ".join(f"{value:.3g}" for value in middle)
        yield f"{what} more than {factor:g} times off the median, {median} {unit} (z y x): {_listed(far)}"


def _look_alikes(measured: Sequence[Measured], patients: dict[str, str]) -> Iterator[str]:
    same, near, leaks = [], [], []
    for one, other, identical in _similar_pairs(measured):
        pair = f"{one} and {other}"
        if patients[one] != patients[other]:
            leaks.append(f"{pair} ({'the same' if identical else 'nearly the same'})")
        else:
            (same if identical else near).append(pair)
    if leaks:
        yield (
            f"images that look alike under different patients: {_listed(leaks)}. One would be trained on and the other "
            "validated with: remove one, or name their patient under `patients` in dataset.json"
        )
    if same:
        yield f"the same image twice: {_listed(same)}"
    if near:
        yield f"nearly the same image twice: {_listed(near)}"


def _similar_pairs(measured: Sequence[Measured]) -> Iterator[tuple[str, str, bool]]:
    """Cases of one shape whose first images correlate above 0.999, and whether all block means are equal."""
    groups: dict[tuple, list[Measured]] = {}
    for one in measured:
        groups.setdefault((one.record.modalities[0], one.record.shape_zyx), []).append(one)
    for group in groups.values():
        blocks = np.stack([one.thumbnail_zyx.reshape(-1) for one in group])
        centred = blocks - blocks.mean(axis=1, keepdims=True)
        centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
        for start in range(0, len(group), _ROWS_AT_A_TIME):
            alike = centred[start : start + _ROWS_AT_A_TIME] @ centred.T > _ALIKE
            for row, column in zip(*np.nonzero(np.triu(alike, start + 1))):
                first, second = int(row) + start, int(column)
                identical = bool(np.array_equal(blocks[first], blocks[second]))
                yield group[first].record.case_id, group[second].record.case_id, identical


def _median_time(days: np.ndarray, ended: np.ndarray) -> float | None:
    """The first time at which the Kaplan-Meier curve of `ended` is at one half or below."""
    left = 1.0
    for day in np.unique(days[ended]):
        left *= 1 - (ended & (days == day)).sum() / (days >= day).sum()
        if left <= 0.5:
            return float(day)
    return None


def _cells(table: Table, column: str, case_ids: Sequence[str]) -> list[Cell]:
    """One per case, None for those that the table does not have."""
    cells = dict(zip(table.case_ids, table.columns[column]))
    return [cells.get(case_id) for case_id in case_ids]


def _levels(cells: Sequence[Cell]) -> dict[str, int]:
    """The commonest first, then by name."""
    counts = Counter(f"{cell:g}" if isinstance(cell, float) else cell for cell in cells if cell is not None)
    return dict(sorted(counts.items(), key=lambda level: (-level[1], level[0])))


def _counted(number: int) -> str:
    return f"{number} case{'s' * (number != 1)}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
