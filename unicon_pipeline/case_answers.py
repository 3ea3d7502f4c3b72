"""A network's logits of a case as the answers that a person reads: probabilities, risk, survival."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unicon_pipeline.case_reading import CLASSES, SURVIVAL, Outcome
from unicon_pipeline.survival import BaselineHazard, median_survival_days, risk_of, survival_curve
from unicon_pipeline.survival_metrics import Curves


def answers(outcome: Outcome, logits: Tensor) -> dict[str, float | None]:
    """Column of predictions.csv -> value, in the order of `outcome.outputs`, of one case's logits (K,).

    Classes and findings: `p_<name>`, calibrated. Survival: `risk`, higher = earlier event, comparable within the task
    only; `median_survival_days`, None where the curve does not come down to one half; `survival_<day>`, the
    probability of no event up to that day.
    """
    logits = logits.detach().double().cpu()
    if outcome.kind == SURVIVAL:
        return _survival(outcome, logits[None])
    tempered = logits / outcome.temperature
    probabilities = tempered.softmax(0) if outcome.kind == CLASSES else tempered.sigmoid()
    return dict(zip(outcome.outputs, probabilities.tolist(), strict=True))


def _survival(outcome: Outcome, logits: Tensor) -> dict[str, float | None]:
    told = outcome.days
    if outcome.baseline is None:
        days, baseline = outcome.edges_days, None
        curve = survival_curve(outcome.loss, logits, days)
        at_days = torch.from_numpy(Curves(days, curve.numpy()).at(told))
    else:  # steps at every event of the training cases
        days, baseline = outcome.baseline.days, BaselineHazard(outcome.baseline.days, outcome.baseline.log_cumulative)
        curve = survival_curve(outcome.loss, logits, days, baseline)
        at_days = survival_curve(outcome.loss, logits, told, baseline)
    median = float(median_survival_days(curve, days)) if days else math.inf
    values = (float(risk_of(outcome.loss, logits, outcome.edges_days)), median, *at_days[0].tolist())
    found = dict(zip(outcome.outputs, values, strict=True))
    return {name: value if math.isfinite(value) else None for name, value in found.items()}
