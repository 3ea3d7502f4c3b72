"""How good a case-level task is beside what simple models reach on the same folds; and whether it is better at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unicon_pipeline.baselines import baseline_predictions
from unicon_pipeline.case_reading import CLASSES, FINDINGS, SURVIVAL, Outcome
from unicon_pipeline.class_metrics import classification_scores
from unicon_pipeline.clinical import ClinicalEncoder
from unicon_pipeline.survival_metrics import Censoring, Curves, survival_scores

MODEL = "model"
MAIN = {SURVIVAL: "harrell_c", CLASSES: "auc", FINDINGS: "auc"}
_SHOWN = {
    "harrell_c": "Harrell's C", "uno_c": "Uno's C", "integrated_brier": "int. Brier", "auc": "AUC",
    "average_precision": "avg. precision", "balanced_accuracy": "bal. accuracy", "brier": "Brier",
    "calibration_error": "calib. error",
}  # fmt: skip
_RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Judged:
    """The cases that are judged, each array or sequence in one order.

    `targets`: as `Outcome.targets`. `censoring`: of survival, that of the training cases.
    """

    outcome: Outcome
    targets: np.ndarray
    patients: Sequence[str]
    censoring: Censoring | None
    seed: int


def scores_of(judged: Judged, predicted: np.ndarray, curves: Curves | None = None) -> dict[str, dict[str, Any]]:
    """Metric -> value, low, high, n, events or positives, remark; those of a horizon are named `auc_365`.

    Args:
        predicted: risk (n,), higher = earlier event; or probabilities (n, classes or findings).
    """
    if judged.outcome.kind != SURVIVAL:
        found = classification_scores(
            predicted, judged.targets, judged.outcome.names, judged.patients, _RESAMPLES, judged.seed
        )
        return {name: vars(score) for name, score in found.overall.items()}
    times, seen = judged.targets.T
    horizons = judged.outcome.horizons_days
    found = survival_scores(
        times, seen, predicted, judged.censoring, horizons, curves, judged.patients, _RESAMPLES, judged.seed
    )
    each = {name: vars(score) for name, score in found.scores.items()}
    for horizon in found.horizons:
        each |= {f"{name}_{horizon.days:g}": vars(score) for name, score in horizon.scores.items()}
    return each


def baselines(
    judged: Judged,
    folds: Sequence[Sequence[Sequence[int]]],
    descriptors: Sequence[Mapping[str, float | None] | None],
    clinical: Sequence[Mapping[str, Any] | None] | None,
) -> dict[str, np.ndarray]:
    """Baseline -> predictions, the mean over the repeats, as `scores_of` takes them.

    Args:
        folds: of each repeat, the numbers of the cases held out.
        descriptors: of each case's region.
        clinical: rows of clinical.csv; None: there is none.
    """
    figures = [{k: math.nan if v is None else v for k, v in (row or {}).items()} for row in descriptors]
    figures = figures if any(figures) else ()
    kind, done = judged.outcome.kind, []

    def encoded(training: np.ndarray) -> np.ndarray:
        encoder = ClinicalEncoder.fit([clinical[n] for n in training])
        return np.stack([encoder.encode(row) for row in clinical])

    columns = encoded if clinical is not None else None
    for repeat in folds:
        done.append(baseline_predictions(judged.targets, repeat, kind, figures, columns))
    return {name: np.mean([each[name] for each in done], axis=0) for name in done[0]}


def verdict(judged: Judged, predictions: Mapping[str, np.ndarray], models: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether the model is better than the best simple one, in words; the difference is paired over patients."""
    main = MAIN[judged.outcome.kind]
    own, rest = models[MODEL][main]["value"], {n: m[main]["value"] for n, m in models.items() if n != MODEL}
    rest = {name: value for name, value in rest.items() if value is not None}
    if own is None or not rest:
        return f"{_SHOWN[main]} cannot be computed: {models[MODEL][main]['remark']}."
    best = max(rest, key=rest.get)
    low, high = ranking_difference(judged, predictions[MODEL], predictions[best])
    told = f"{own - rest[best]:+.3f} of {_SHOWN[main]} (95 % interval {low:+.3f} to {high:+.3f}, paired)"
    if low > 0:
        return f"Better than the best simple model, {best}: {told}."
    how = "below" if own < rest[best] else "not shown to be better than"
    return f"It is {how} the best simple model, {best}: {told}. These cases are no reason to prefer it."


def ranking_difference(judged: Judged, one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Percentile interval, over resampled patients, of the share of pairs that `one` orders rightly minus `other`'s.

    Pairs: as in Harrell's C, or of a positive and a negative case (ROC AUC), mean over classes or findings.
    """
    labels = {label: number for number, label in enumerate(dict.fromkeys(judged.patients))}
    member = np.array([labels[label] for label in judged.patients])
    generator = np.random.default_rng(judged.seed)
    drawn = generator.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), _RESAMPLES)[:, member]
    differences = []
    for column, pairs in _pairs(judged):
        shares = []
        for predicted in (one, other):
            score = predicted if predicted.ndim == 1 else predicted[:, column]
            right = pairs * ((score[:, None] > score) + 0.5 * (score[:, None] == score))
            shares.append(((drawn @ right) * drawn).sum(1) / np.maximum(((drawn @ pairs) * drawn).sum(1), 1e-12))
        differences.append(shares[0] - shares[1])
    low, high = np.quantile(np.mean(differences, axis=0), (0.025, 0.975))
    return float(low), float(high)


def format_models(title: str, models: Mapping[str, Mapping[str, Any]], main: str) -> str:
    """A table: one row a model, one column a metric; the main one with its interval."""
    columns = list(models[MODEL])
    first = models[MODEL][main]
    of = "events" if "events" in first else "positives"
    head = ["", *(_named(name) for name in columns)]
    rows = [[name, *(_cell(scores.get(c), c == main) for c in columns)] for name, scores in models.items()]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows]]
    return "\n".join([f"{title} (n = {first['n']}, {first[of]} {of}):", *lines])


def _pairs(judged: Judged) -> list[tuple[int, np.ndarray]]:
    """Column of the predictions, and (n, n): 1 where the row's case should be ranked above the column's."""
    targets = judged.targets
    if judged.outcome.kind == SURVIVAL:
        times, seen = targets[:, 0], targets[:, 1] > 0
        later = (times > times[:, None]) | ((times == times[:, None]) & ~seen)
        return [(0, (seen[:, None] & later).astype(np.float64))]
    if judged.outcome.kind == CLASSES:
        targets = np.where(np.isnan(targets)[:, None], np.nan, targets[:, None] == np.arange(len(judged.outcome.names)))
    columns = range(targets.shape[1]) if targets.shape[1] != 2 or judged.outcome.kind == FINDINGS else (1,)
    pairs = [(c, np.outer(targets[:, c] == 1, targets[:, c] == 0).astype(np.float64)) for c in columns]
    return [(c, matrix) for c, matrix in pairs if matrix.any()]


def _named(metric: str) -> str:
    name, _, day = metric.rpartition("_")
    return f"{_SHOWN.get(name, name)} {day} d" if day.isdigit() else _SHOWN.get(metric, metric)


def _cell(score: Mapping[str, Any] | None, interval: bool) -> str:
    if score is None or score["value"] is None:
        return "-"
    bounds = f" ({score['low']:.2f} to {score['high']:.2f})" if interval and score["low"] is not None else ""
    return f"{score['value']:.3f}{bounds}"
