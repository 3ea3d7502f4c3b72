"""Cross-validation folds: a patient is never split, and outcomes are spread as evenly as they can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from unicon_pipeline.dataset import Task
from unicon_pipeline.tables import Cell


def patient_folds(task: Task, k: int = 5, seed: int = 0) -> tuple[tuple[str, ...], ...]:
    """Validation case ids of each fold; min(k, patients) folds, none splits a patient.

    Prognosis: the patients with an event differ by at most one between folds, so none is without where there are
    enough. Classification by one column: so do the patients of each class. Other tasks: by chance alone.
    """
    patients: dict[str, list[str]] = {}
    for case in task.cases:
        patients.setdefault(case.patient, []).append(case.case_id)
    order = sorted(patients)
    np.random.default_rng(seed).shuffle(order)
    strata = _strata(task, patients)
    order.sort(key=lambda patient: strata.get(patient, ""))  # stable: by chance within a stratum
    count = min(k, len(order))
    # Dealt like cards, so each stratum, and the whole, differs by at most one between folds.
    return tuple(tuple(sorted(c for p in order[fold::count] for c in patients[p])) for fold in range(count))


def _strata(task: Task, patients: dict[str, list[str]]) -> dict[str, str]:
    """Patient -> what the folds should have equally many of; nothing where there is nothing to spread."""
    columns = {} if task.targets is None else task.targets.columns
    if task.task_type == "prognosis" and "event" in columns:
        events = dict(zip(task.targets.case_ids, columns["event"]))
        return {patient: str(any(events.get(name) for name in names)) for patient, names in patients.items()}
    if task.task_type != "classification" or len(columns) != 1:
        return {}
    classes = dict(zip(task.targets.case_ids, *columns.values()))
    return {patient: _commonest(classes.get(name) for name in names) for patient, names in patients.items()}


def _commonest(found: Iterable[Cell]) -> str:
    counts = Counter(str(value) for value in found if value is not None)
    return min(counts, key=lambda value: (-counts[value], value), default="")
