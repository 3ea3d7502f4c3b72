"""Training a case-level task end to end: adapter, new stems and head, in the memory of one case.

A loss over a set of cases (Cox's risk set, DeepHit's pairs) needs the logits of all of them, and so, in one pass, the
activations of all. Here each case is computed twice: without a graph for its logits; then, the derivative of the loss
by these being known, with its own graph alone. Gradients add up to those of one pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unicon_pipeline.case_fit import CaseLoss, CaseRows, FitOptions, fit_ensemble, fit_head, ridge
from unicon_pipeline.case_head import FusionEnsemble
from unicon_pipeline.device import autocast, one_thread
from unicon_pipeline.extension_plan import Schedule
from unicon_pipeline.loader import VolumeLoader, usual_workers
from unicon_pipeline.model import TaskModel
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.records import sha256_json, to_dict
from unicon_pipeline.training import Trainer, TrainingResult, drop_modalities
from unicon_pipeline.weights import canonical_state, load_exactly

# What `train_end_to_end` begins from: the linear model of the rows, all else near zero.
LINEAR = FitOptions(epochs=0)


@dataclass(frozen=True)
class CaseData:
    """The stored cases of a task, and what goes with their images, by case id.

    `targets`: as the loss takes them, (T,) or a number, NaN for blanks. `tabular`: (D,) rows, encoded by what was
    fitted on the training cases; None: the head takes none. `strata`: event or not, the class. `region`: whether the
    head gets the region's mask.
    """

    folder: Path
    plan: DataPlan
    targets: dict[str, np.ndarray]
    tabular: dict[str, np.ndarray] | None = None
    strata: dict[str, int] | None = None
    region: bool = False


@dataclass(frozen=True)
class Run:
    """Where and how a training runs. `precision`: of the encoder; heads and losses compute in float32.

    `checkpoint`: where it goes on from after a cut, if `fingerprint` (of whatever the other arguments of
    `train_end_to_end` do not show: the plan of the network, the loss) is the same. `workers`: None: as usual.
    """

    device: torch.device
    precision: torch.dtype
    checkpoint: Path
    fingerprint: str
    seed: int = 0
    workers: int | None = None

    @property
    def processes(self) -> int:
        return usual_workers() if self.workers is None else self.workers


def train_end_to_end(
    model: TaskModel,
    data: CaseData,
    case_ids: Sequence[str],
    loss: CaseLoss,
    schedule: Schedule,
    run: Run,
    begin: FitOptions = LINEAR,
) -> TrainingResult:
    """Trains in place what the task adds to the model; its head is one of the fusion heads.

    First the head is fitted on what the untrained encoder gives, then all is trained, in steps of
    `schedule.accumulate` cases (at most all), with an event in each if that is at least `cases_per_step`.

    Args:
        case_ids: to train on; the rest of `data` is not looked at.
        loss: (logits (B, outputs), targets (B, ...)), float32 on the CPU.
        begin: how the head is fitted first; its penalty stays on the linear part. With the epochs that suit the frozen
            encoder, less is left to be learned slowly.

    Raises:
        DatasetError: a case is not stored, damaged, or lacks a target or a row.
        UniconError: the loss stopped being a number.
    """
    model.to(run.device)
    size = min(schedule.accumulate, len(case_ids))
    digest = _digest(data, case_ids, schedule, run, begin)
    trainer = _CaseTrainer(model, loss, schedule, run, digest, region=data.region, penalty=begin.penalty)
    first_step = trainer.resume()
    if not first_step:
        _begin(model, data, case_ids, loss, run, begin)
    model.train()
    with VolumeLoader(
        data.folder, case_ids, data.plan, 1, run.seed, run.processes, first_step=first_step * size,
        targets=data.targets, tabular=data.tabular, strata=data.strata,
    ) as batches:  # fmt: skip
        result = trainer.run(_groups(batches, size))
    model.eval()
    return result


@torch.no_grad()
def predict_cases(model: TaskModel, data: CaseData, case_ids: Sequence[str], run: Run) -> Tensor:
    """Logits (n, outputs) of stored cases, float32 on the CPU; their targets are not looked at."""
    model.to(run.device).eval()
    return torch.cat([case_logits(model, batch, data.region, run) for batch in _each(data, case_ids, run)])


def case_logits(model: TaskModel, batch: dict[str, Any], region: bool, run: Run) -> Tensor:
    """Logits (B, outputs) of a batch of `VolumeLoader`, float32 on the CPU.

    The head runs in float32: half precision would round the figures that its linear part reads.
    """
    with autocast(run.device, run.precision):
        features = model.features(batch["data"].to(run.device), batch["present"].to(run.device))
    options = {"tabular_bd": batch["tabular"].to(run.device)} if "tabular" in batch else {}
    if region:
        options["region_bzyx"] = batch["region"].to(run.device)
    return model.head(features, **options).float().cpu()


def backward_by_case(
    forward: Callable[[Any], Tensor],
    cases: Sequence[Any],
    loss: Callable[[Tensor], Tensor],
    scale: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """The loss of all cases together; adds its exact gradients to those of the parameters, case by case.

    Args:
        forward: a case -> its logits (1, outputs), the same each time.
        cases: any number above 0; the last is computed once, the others twice.
        loss: logits (B, outputs), in the order of the cases -> scalar.
        scale: applied to the loss before the gradients.
    """
    *earlier, last = cases
    with torch.no_grad():
        logits = [forward(case) for case in earlier]
    logits_of_last = forward(last)
    together = torch.cat([*logits, logits_of_last.detach()]).requires_grad_()
    value = loss(together)
    *wanted, wanted_of_last = torch.autograd.grad(scale(value), together)[0].split(1)
    logits_of_last.backward(wanted_of_last)
    for case, gradient in zip(earlier, wanted, strict=True):
        forward(case).backward(gradient)
    return value.detach()


class _CaseTrainer(Trainer):
    """A step's batch is a group of batches of one case each."""

    def __init__(
        self, model: TaskModel, loss: CaseLoss, schedule: Schedule, run: Run, digest: str, *, region: bool,
        penalty: float,
    ):  # fmt: skip
        super().__init__(
            model.trained_state(), None, None, schedule, run.device, run.precision, run.checkpoint, digest
        )  # fmt: skip
        self.model, self.loss, self.case_run, self.region, self.penalty = model, loss, run, region, penalty

    def backward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """See the base."""
        run, rate = self.case_run, self.schedule.modality_dropout
        cases = [drop_modalities(case, rate, run.seed) if rate else case for case in batch["cases"]]
        targets = torch.cat([case["targets"] for case in cases])
        value = backward_by_case(
            lambda case: case_logits(self.model, case, self.region, run),
            cases,
            lambda logits: self.loss(logits, targets),
            lambda value: self.scaler.scale(value.to(run.device)),
        )
        shrinkage = ridge(self.model.head, self.penalty)
        if shrinkage.requires_grad:
            self.scaler.scale(shrinkage).backward()
        value = value + shrinkage.detach().cpu()
        return value, value.new_zeros(1)


def _begin(
    model: TaskModel, data: CaseData, case_ids: Sequence[str], loss: CaseLoss, run: Run, options: FitOptions
) -> None:
    """Fits the head on the features of the encoder as it is, on the CPU."""
    model.eval()
    features, rows, targets = [], [], []
    for batch in _each(data, case_ids, run, data.targets):
        with torch.no_grad(), autocast(run.device, run.precision):
            maps = model.features(batch["data"].to(run.device), batch["present"].to(run.device))
        with torch.no_grad():
            region = batch["region"].to(run.device) if data.region else None
            tokens = model.head.gather(maps, region)
        features.append({name: values[0].float().cpu() for name, values in tokens.items()})
        targets.append(batch["targets"])
        rows += [batch["tabular"]] if "tabular" in batch else []
    strata = torch.tensor([data.strata[case_id] if data.strata else 0 for case_id in case_ids])
    cohort = CaseRows.collate(features, torch.cat(rows) if rows else None, torch.cat(targets), strata)
    head = copy.deepcopy(model.head).cpu()
    fit = fit_ensemble if isinstance(head, FusionEnsemble) else fit_head
    with one_thread():
        fit(head, cohort, loss, options)
    load_exactly(canonical_state(model.head), canonical_state(head), "the head that was fitted first")


def _each(
    data: CaseData, case_ids: Sequence[str], run: Run, targets: dict[str, np.ndarray] | None = None
) -> Iterator[dict[str, Any]]:
    """Batches of one case, as stored, in the order asked for."""
    blank = dict.fromkeys(case_ids, np.zeros(1))
    in_order = {case_id: number for number, case_id in enumerate(case_ids)}  # each a stratum of its own
    with VolumeLoader(
        data.folder, case_ids, data.plan, 1, 0, 0, augment=False,
        targets=blank if targets is None else targets, tabular=data.tabular, strata=in_order,
    ) as batches:  # fmt: skip
        for _ in case_ids:
            yield next(batches)


def _groups(batches: VolumeLoader, size: int) -> Iterator[dict[str, Any]]:
    """Endless: the batches of `size` steps of the loader in one, as `cases`, each with its `step`."""
    while True:
        cases = [{"step": batches.step, **next(batches)} for _ in range(size)]
        yield {"cases": cases, "case_ids": [case_id for case in cases for case_id in case["case_ids"]]}


def _digest(data: CaseData, case_ids: Sequence[str], schedule: Schedule, run: Run, begin: FitOptions) -> str:
    """Of everything that must be equal for a cut run to go on."""
    cases = [
        [case_id, *(np.asarray(values.get(case_id), np.float64).tobytes().hex()
                    for values in (data.targets, data.tabular, data.strata) if values is not None)]
        for case_id in case_ids
    ]  # fmt: skip
    return sha256_json([run.fingerprint, run.seed, data.region, cases, *map(to_dict, (data.plan, schedule, begin))])
