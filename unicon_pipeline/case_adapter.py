"""Fits of case-level tasks that go on end to end, with an adapter in the encoder, where those of the head end."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unicon_pipeline.adapters import ADAPTERS
from unicon_pipeline.case_fit import FitOptions
from unicon_pipeline.case_folds import Fits, Whole
from unicon_pipeline.case_plan import schedule_of
from unicon_pipeline.case_reading import REGION, CaseReading
from unicon_pipeline.case_training import CaseData, Run, predict_cases, train_end_to_end
from unicon_pipeline.extension_plan import ExtensionPlan, Planned
from unicon_pipeline.model import TaskModel
from unicon_pipeline.records import sha256_json, to_dict
from unicon_pipeline.training import TrainingResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class AdaptedFits(Fits):
    """As `Fits`, whose features are those of the encoder without adapter; each fit trains an adapter of its own.

    `encoder`: its frozen parts are shared by all fits. `run`: its checkpoint is the folder of all; a fit that is done
    leaves its own there, so that a cut cross-validation goes on.
    """

    encoder: TaskModel
    extension: ExtensionPlan
    planned: Planned
    run: Run

    def fold(self, training: np.ndarray, held: np.ndarray, seed: int) -> np.ndarray:
        """See the base."""
        logger.info("End to end without %d cases that are held out (seed %d).", len(held), seed)
        reading, encoder, plan = self.reading(training), self.encoder, self.extension.adapter
        epochs, _ = self.inner(reading, training, seed)
        torch.manual_seed(seed)
        adapter = ADAPTERS[plan.kind](encoder.foundation, plan.rank, plan.alpha)
        stems, head = dict(encoder.stems), self.head(reading)
        model = TaskModel(encoder.foundation, encoder.modalities, stems, (), adapter, head)
        logits, _ = self._trained(model, reading, training, epochs, seed, f"fold_{seed}")
        return self.told(reading.outcome, training, logits)[held]

    def whole(self, model: TaskModel, reading: CaseReading, training: np.ndarray, seed: int) -> Whole:
        """Trains the adapter and all members of the head in place; `inner` is unknown of what is trained end to end."""
        logger.info("End to end on all %d training cases.", len(training))
        epochs, _ = self.inner(reading, training, seed)
        logits, done = self._trained(model, reading, training, epochs, seed, "whole")
        model.cpu()
        return Whole(epochs, done.steps, done.history, logits, None)

    def _trained(
        self, model: TaskModel, reading: CaseReading, training: np.ndarray, epochs: int, seed: int, name: str
    ) -> tuple[Tensor, TrainingResult]:
        """All cases' logits (n, outputs), once the model is trained."""
        cohort, names = self.cohort, self.cohort.case_ids
        rows = self.rows(reading).tabular
        data = CaseData(
            self.planned.cases,
            self.planned.plan,
            dict(zip(names, cohort.targets, strict=True)),
            None if rows is None else dict(zip(names, rows.numpy(), strict=True)),
            dict(zip(names, cohort.strata.astype(int).tolist(), strict=True)),
            region=REGION in self.inputs,
        )
        run = dataclasses.replace(
            self.run,
            checkpoint=self.run.checkpoint / f"{name}.safetensors",
            fingerprint=sha256_json([self.run.fingerprint, to_dict(reading)]),
            seed=seed,
        )
        schedule = schedule_of(cohort.strata[training], self.options, self.extension.schedule.minutes)
        begin, loss = FitOptions(epochs=epochs, seed=seed), self.loss(reading, training)
        done = train_end_to_end(model, data, [names[n] for n in training], loss, schedule, run, begin)
        return predict_cases(model, data, names, run), done
