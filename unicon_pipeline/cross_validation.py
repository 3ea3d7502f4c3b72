"""Repeated cross-validation of cases, torch-free: everything that is fitted is fitted without the fold held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from unicon_pipeline.dataset import Task
from unicon_pipeline.errors import PlanError
from unicon_pipeline.folds import patient_folds

Folds = tuple[tuple[int, ...], ...]

# Fits on the cases of the first numbers, and predicts those of the second: (held out, ...).
FitAndPredict = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class OutOfFold:
    """Predictions of each case by models that never saw it (or its patient).

    `per_repeat` (repeats, n, ...); `folds`: of each repeat, the numbers of the cases held out.
    """

    per_repeat: np.ndarray
    folds: tuple[Folds, ...]

    @property
    def mean(self) -> np.ndarray:
        """(n, ...) over the repeats: what an ensemble of one model a repeat would say."""
        return self.per_repeat.mean(axis=0)


def folds_of(task: Task, k: int = 5, seed: int = 0) -> Callable[[int], Folds]:
    """Repeat -> its folds as numbers of `task.cases`: patients stay whole, events or classes are spread evenly."""
    number = {case.case_id: n for n, case in enumerate(task.cases)}

    def folds(repeat: int) -> Folds:
        named = patient_folds(task, k, seed + repeat)
        return tuple(tuple(number[name] for name in fold) for fold in named)

    return folds


def inner_folds(task: Task, training: Sequence[int], k: int = 5, seed: int = 0) -> Folds:
    """Folds of the training cases alone, as positions in `training`: for what has to be chosen inside a fold."""
    cases = tuple(task.cases[n] for n in training)
    return folds_of(dataclasses.replace(task, cases=cases), k, seed)(0)


def cross_validate(
    count: int, fit: FitAndPredict, folds: Callable[[int], Folds], repeats: int = 5, seed: int = 0
) -> OutOfFold:
    """Predicts each of `count` cases once a repeat.

    Args:
        fit: (numbers to train on, numbers held out, seed) -> predictions (held out, ...). All that is fitted must be
            fitted in it: encoders, time bins, the number of epochs.
        folds: of a repeat.

    Raises:
        PlanError: fewer than two folds, a case in none or in several, or another number of predictions than cases.
    """
    done, used = [], []
    for repeat in range(repeats):
        parts = folds(repeat)
        if len(parts) < 2 or sorted(chain(*parts)) != list(range(count)):
            raise PlanError(
                f"Cross-validation needs two folds or more with each of the {count} cases in exactly one; "
                f"repeat {repeat} has {len(parts)} folds with {sum(map(len, parts))} cases. Are there two patients?"
            )
        predicted = None
        for number, held in enumerate(np.asarray(part, np.intp) for part in parts):
            training = np.setdiff1d(np.arange(count), held)
            values = np.asarray(fit(training, held, seed + repeat * len(parts) + number), np.float64)
            if len(values) != len(held):
                raise PlanError(f"A fold of {len(held)} cases got {len(values)} predictions.")
            predicted = np.full((count, *values.shape[1:]), np.nan) if predicted is None else predicted
            predicted[held] = values
        done.append(predicted)
        used.append(parts)
    return OutOfFold(np.stack(done), tuple(used))
