"""Fits of heads on some cases of a cohort, and their predictions of the others in terms that mean the same everywhere.

Whatever is fitted (encoders of figures and covariates, time bins, class weights, the number of epochs) is fitted on the
training cases alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unicon_pipeline.case_fit import (
    CaseLoss,
    CaseRows,
    ClassLoss,
    FitOptions,
    choose_epochs,
    fit_ensemble,
    fit_head,
    of_survival,
    predict_rows,
)
from unicon_pipeline.case_head import FusionHead
from unicon_pipeline.case_plan import CaseOptions, Cohort, fit_reading, output_channels
from unicon_pipeline.case_reading import CLASSES, SURVIVAL, CaseReading, Hazard, Outcome
from unicon_pipeline.cross_validation import inner_folds
from unicon_pipeline.device import one_thread
from unicon_pipeline.levels import SkipLevels
from unicon_pipeline.losses import MultiLabelLoss
from unicon_pipeline.model import TaskModel
from unicon_pipeline.survival import SURVIVAL_LOSSES, BaselineHazard, breslow_baseline, risk_of, survival_curve
from unicon_pipeline.survival_metrics import Curves

_INNER_FOLDS = 5


@dataclass(frozen=True, eq=False)
class Whole:
    """The fit that is shipped. `epochs`: of the head; `steps` and `history`: of the training, as on the card.

    `logits`: of all cases (n, outputs). `inner`: of the training cases, by models that never saw them; None: unknown.
    """

    epochs: int
    steps: int
    history: tuple[dict[str, float | None], ...]
    logits: Tensor
    inner: Tensor | None


@dataclass(frozen=True, eq=False)
class Fits:
    """`features`: of each case of the cohort, what the encoder gave; {} without image. `sizes`: the head's options.

    `days`: of the survival curves that are predicted.
    """

    cohort: Cohort
    features: Sequence[dict[str, Tensor]]
    skips: SkipLevels
    sizes: dict[str, int]
    inputs: tuple[str, ...]
    options: CaseOptions
    days: tuple[float, ...]

    def reading(self, training: np.ndarray) -> CaseReading:
        """Fitted on these cases."""
        return fit_reading(self.cohort, training, self.inputs, self.options)

    def rows(self, reading: CaseReading) -> CaseRows:
        """Of all cases, as this reading encodes them."""
        cohort, tabular = self.cohort, None
        if reading.names:
            pairs = zip(cohort.clinical, cohort.descriptors, strict=True)
            tabular = torch.from_numpy(np.stack([reading.tabular(*pair) for pair in pairs]))
        targets, strata = torch.from_numpy(cohort.targets).float(), torch.from_numpy(cohort.strata)
        return CaseRows.collate(self.features, tabular, targets, strata)

    def loss(self, reading: CaseReading, training: np.ndarray) -> CaseLoss:
        """What is minimised on these cases."""
        outcome = reading.outcome
        if outcome.kind == SURVIVAL:
            return of_survival(SURVIVAL_LOSSES[outcome.loss](outcome.edges_days))
        if outcome.kind == CLASSES:
            return ClassLoss.balanced(torch.from_numpy(self.cohort.targets[training]), len(outcome.names))
        return MultiLabelLoss()

    def head(self, reading: CaseReading) -> FusionHead:
        """A fresh one."""
        sizes = {name: size for name, size in self.sizes.items() if name != "members"}
        return FusionHead(self.skips, output_channels(reading.outcome), **sizes | reading.row_sizes)

    @one_thread()
    def inner(self, reading: CaseReading, training: np.ndarray, seed: int) -> tuple[int, Tensor | None]:
        """How many epochs inner folds of the training cases call for, and these cases' logits, each by the inner fold
        that held it out; None where there is one patient."""
        rows, loss = self.rows(reading), self.loss(reading, training)
        fits = []
        parts = inner_folds(self.cohort.task, training, _INNER_FOLDS, seed)
        if len(parts) < 2:
            return 0, None
        for number, part in enumerate(parts):
            held = training[list(part)]
            torch.manual_seed(seed + number)
            options = FitOptions(epochs=self.options.epochs, seed=seed + number)
            kept = rows.take(np.setdiff1d(training, held))
            fits.append(fit_head(self.head(reading), kept, loss, options, rows.take(held)))
        epochs = choose_epochs(fits)
        logits = torch.cat([fit.logits[epochs] for fit in fits])
        return epochs, logits[np.concatenate(parts).argsort()]

    @one_thread()
    def fold(self, training: np.ndarray, held: np.ndarray, seed: int) -> np.ndarray:
        """Fits on the first, predicts the second: as `told`."""
        reading = self.reading(training)
        (epochs, _), rows = self.inner(reading, training, seed), self.rows(reading)
        torch.manual_seed(seed)
        head, options = self.head(reading), FitOptions(epochs=epochs, seed=seed)
        fit_head(head, rows.take(training), self.loss(reading, training), options)
        return self.told(reading.outcome, training, predict_rows(head, rows))[held]

    @one_thread()
    def whole(self, model: TaskModel, reading: CaseReading, training: np.ndarray, seed: int) -> Whole:
        """Fits all members of the model's head in place."""
        (epochs, inner), rows = self.inner(reading, training, seed), self.rows(reading)
        options = FitOptions(epochs=epochs, seed=seed)
        fit_ensemble(model.head, rows.take(training), self.loss(reading, training), options)
        return Whole(epochs, epochs, (), predict_rows(model.head, rows), inner)

    def told(self, outcome: Outcome, training: np.ndarray, logits: Tensor) -> np.ndarray:
        """All cases' predictions (n, ...) in terms that mean the same in each fold, from all cases' logits.

        Logits of classes or findings. Survival: the risk, then survival at `days`. The risk of one fold's model has
        its own zero, which is lowest where those held out fare worst: it is told relative to the training cases' mean;
        and minus a mean survival time as a share of the time covered, which differs between folds.
        """
        if outcome.kind != SURVIVAL:
            return logits.numpy()
        risk = risk_of(outcome.loss, logits, outcome.edges_days)
        if outcome.loss == "cox":
            hazard = hazard_of(logits[training], self.cohort.targets[training])
            baseline = BaselineHazard(hazard.days, hazard.log_cumulative)
            survival = survival_curve("cox", logits, self.days, baseline).numpy()
        else:
            risk = risk / outcome.edges_days[-1]
            curve = survival_curve(outcome.loss, logits, outcome.edges_days).numpy()
            survival = Curves(outcome.edges_days, curve).at(self.days)
        return np.column_stack([(risk - risk[training].mean()).numpy(), survival])


def hazard_of(logits: Tensor, targets: np.ndarray) -> Hazard:
    """The baseline hazard of a Cox model from its training cases' logits (n, 1) and targets (n, 2)."""
    days, seen = torch.from_numpy(targets).T
    found = breslow_baseline(logits, days, seen)
    return Hazard(found.days, found.log_cumulative)
