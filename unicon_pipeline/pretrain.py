"""A foundation from scratch: multi-label classification of whole volumes.

Only the encoder becomes the foundation. Which findings it learned, on how many cases, and how well it told
them apart on cases it was not trained on, stays in its provenance.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unicon_pipeline.contract import NOT_STATED
from unicon_pipeline.dataset import Task, read_task
from unicon_pipeline.device import choose_device, choose_precision, machine_facts
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.extension_plan import Schedule, schedule_for
from unicon_pipeline.families import build_foundation
from unicon_pipeline.families.dna_encoders import new_residual_encoder_spec
from unicon_pipeline.foundation import Foundation
from unicon_pipeline.heads import Features, PooledLinearHead
from unicon_pipeline.levels import skip_levels
from unicon_pipeline.loader import VolumeLoader, usual_workers
from unicon_pipeline.losses import MultiLabelLoss
from unicon_pipeline.machine import machine_for
from unicon_pipeline.metrics import area_under_curve, bootstrap_statistic
from unicon_pipeline.model_folder import create_model
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.preprocess import plan_and_preprocess
from unicon_pipeline.records import sha256_json, to_dict
from unicon_pipeline.store import stored_case_ids
from unicon_pipeline.training import CHECKPOINT_FILE, Score, Trainer
from unicon_pipeline.weights import canonical_state

logger = logging.getLogger(__name__)

_VALIDATION_FOLD = 0


def pretrain(
    task_folder: Path,
    work: Path,
    model: Path,
    *,
    minutes: float | None = None,
    epochs: int | None = None,
    device: str = "auto",
    seed: int = 0,
    licence: str = NOT_STATED,
) -> Path:
    """Trains a foundation on a classification task and makes it a new model folder.

    Raises:
        DatasetError: the task has no 0/1 columns to learn from, or too few cases were readable.
        CheckpointError: `model` holds a model already.
    """
    task = read_task(task_folder)
    findings, targets = finding_targets(task)
    chosen = choose_device(device)
    spec = new_residual_encoder_spec(licence, {})
    plan, failed = plan_and_preprocess(task_folder, work, spec, machine_for(device))
    for case_id, reason in failed.items():
        logger.error("case %s failed: %s", case_id, reason)
    torch.manual_seed(seed)
    classifier = _Classifier(build_foundation(spec), len(findings)).to(chosen)
    folder = Path(work) / "preprocessed" / task.name
    stored = stored_case_ids(folder / "cases")
    held_out = set(plan.folds[_VALIDATION_FOLD]) if len(plan.folds) > 1 else set()
    training = [case for case in stored if case not in held_out]
    steps = _train(classifier, plan, folder, training, targets, schedule_for(minutes, epochs), chosen, seed)
    # Half precision as stored: half the bytes, and what is validated below is what is written.
    classifier.half().float().eval().cpu()
    weights = {name: tensor.half() for name, tensor in canonical_state(classifier.foundation).items()}
    validation = _validate(classifier, plan, folder / "cases", [c for c in stored if c in held_out], targets, findings)
    provenance = {
        "made_by": "unicon_pretrain",
        "task": task.name,
        "findings": list(findings),
        "training_cases": len(training),
        "steps": steps,
        "seed": seed,
        "validation": validation,
        "machine": machine_facts(chosen),
    }
    create_model(model, dataclasses.replace(spec, provenance=provenance), weights)
    (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
    return Path(model)


def finding_targets(task: Task) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """The findings, and case -> float32 vector of 0, 1 or NaN (not annotated).

    Raises:
        DatasetError: no targets.csv, or a column with other values.
    """
    if task.targets is None:
        raise DatasetError(f"{task.folder} has no targets.csv; expected case_id and one 0/1 column per finding.")
    findings = tuple(task.targets.columns)
    columns = []
    for name in findings:
        values = task.targets.columns[name]
        wrong = sorted({str(value) for value in values if value not in (None, 0.0, 1.0)})
        if wrong:
            raise DatasetError(
                f"{task.folder / 'targets.csv'}: column {name} holds {', '.join(wrong[:3])}; "
                "unicon_pretrain expects 0, 1 or blank (not annotated)."
            )
        columns.append([np.nan if value is None else value for value in values])
    vectors = np.array(columns, dtype=np.float32).T
    return findings, dict(zip(task.targets.case_ids, vectors, strict=True))


class _Classifier(nn.Module):
    def __init__(self, foundation: Foundation, outputs: int):
        super().__init__()
        self.foundation = foundation
        self.head = PooledLinearHead(skip_levels(foundation.spec, {}), outputs)

    def forward(self, images_bczyx: Tensor) -> Tensor:
        return self.head(Features(self.foundation(images_bczyx, None, None), {}))


def _train(
    classifier: _Classifier, plan: DataPlan, folder: Path, training: list[str], targets: dict[str, np.ndarray],
    schedule: Schedule, device: torch.device, seed: int,
) -> int:  # fmt: skip
    loss = MultiLabelLoss()

    def step_loss(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        wanted = batch["targets"].to(device)
        logits = classifier(batch["data"].to(device))
        known = ~torch.isnan(wanted)
        right = ((logits > 0) == (wanted > 0.5)) & known
        return loss(logits, wanted), torch.stack((right.sum(), known.sum()))

    accuracy = Score("accuracy", lambda counts: float(counts[0] / counts[1]))
    fingerprint = sha256_json([to_dict(plan), to_dict(schedule), seed])
    trainer = Trainer(
        canonical_state(classifier), step_loss, accuracy, schedule, device, choose_precision("auto", device),
        folder / CHECKPOINT_FILE, fingerprint,
    )  # fmt: skip
    first_step = trainer.resume()
    classifier.train()
    with VolumeLoader(
        folder / "cases", training, plan, plan.batch_size, seed, usual_workers(), first_step=first_step, targets=targets
    ) as batches:
        result = trainer.run(batches)
    return result.steps


@torch.inference_mode()
def _validate(
    classifier: _Classifier, plan: DataPlan, cases: Path, case_ids: list[str], targets: dict[str, np.ndarray],
    findings: tuple[str, ...],
) -> dict[str, Any] | None:  # fmt: skip
    """AUC of each finding on held-out cases, and their mean with a bootstrap interval over cases."""
    if not case_ids:
        return None
    with VolumeLoader(cases, case_ids, plan, 1, 0, 0, augment=False, targets=targets) as batches:
        drawn = {}
        for _ in case_ids:
            batch = next(batches)
            drawn[batch["case_ids"][0]] = classifier(batch["data"])[0].numpy()
    scores, wanted = np.stack([drawn[c] for c in case_ids]), np.stack([targets[c] for c in case_ids])

    def mean_auc(rows: np.ndarray) -> float:
        each = [area_under_curve(s, w) for s, w in zip(scores[rows].T, wanted[rows].T, strict=True)]
        defined = [value for value in each if not np.isnan(value)]
        return sum(defined) / len(defined) if defined else np.nan

    low, high = bootstrap_statistic(mean_auc, len(case_ids))
    each = {name: area_under_curve(s, w) for name, s, w in zip(findings, scores.T, wanted.T, strict=True)}
    mean = mean_auc(np.arange(len(case_ids)))
    logger.info("validation: mean AUC %.3f (%.3f to %.3f, n = %d)", mean, low, high, len(case_ids))
    return {
        "mean_auc": _rounded(mean),
        "interval_95": [_rounded(low), _rounded(high)],
        "n": len(case_ids),
        "auc": {name: _rounded(value) for name, value in each.items()},
    }


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 4)
