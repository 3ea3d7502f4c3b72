"""The training loop: one loop for every task, ended by steps or by the clock, and safe to cut.

The learning rate follows how much of the budget is used, in steps or in minutes, whichever is further, so
a schedule always ends where the training does. A checkpoint holds the trained tensors, the optimiser's
moments, the step and the minutes used; the loader gives the batch of any step, so a cut run goes on as if
nothing had happened.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicon_pipeline.device import autocast, keep_freed_pages
from unicon_pipeline.errors import UniconError
from unicon_pipeline.extension_plan import STEPS_PER_EPOCH, Schedule
from unicon_pipeline.metrics import finite_or_none
from unicon_pipeline.weights import load_exactly, load_weights, read_metadata, save_weights

logger = logging.getLogger(__name__)

CHECKPOINT_FILE = "training.safetensors"  # beside the preprocessed cases, until the result is in the model folder
_CHECKPOINT_SECONDS = 60.0
_DECAY_EXPONENT = 0.9  # nnU-Net's


@dataclass(frozen=True)
class Score:
    """The figure shown beside the loss, made of the counts that the steps of an epoch add up."""

    name: str
    of_counts: Callable[[Tensor], float]


@dataclass(frozen=True)
class TrainingResult:
    """`history`: one record per epoch with step, loss, score (None where undefined) and minutes."""

    steps: int
    minutes: float
    history: tuple[dict[str, float | None], ...]


class Trainer:
    """Trains tensors against a loss under a schedule.

    Args:
        trained: the tensors to train, by name.
        step_loss: batch (with its `step`) -> (loss, counts): a scalar to minimise, and counts to sum over an epoch.
            None: of a subclass with a `backward` of its own.
        score: of the training data itself, with its augmentation, so a sign of progress and no more; None: no figure.
        checkpoint: a file; where it holds a cut run with the same `fingerprint`, that run goes on.
        fingerprint: digest of everything that must be equal for a run to go on.
    """

    def __init__(
        self,
        trained: dict[str, Tensor],
        step_loss: Callable[[dict[str, Any]], tuple[Tensor, Tensor]] | None,
        score: Score | None,
        schedule: Schedule,
        device: torch.device,
        precision: torch.dtype,
        checkpoint: Path,
        fingerprint: str,
    ):
        self.trained = trained
        self.step_loss, self.score = step_loss, score
        self.schedule, self.device, self.precision = schedule, device, precision
        self.checkpoint, self.fingerprint = checkpoint, fingerprint
        if device.type == "cpu":
            keep_freed_pages()
        parameters = [tensor for tensor in trained.values() if tensor.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
        self.step, self.minutes_before, self.history = 0, 0.0, []

    def resume(self) -> int:
        """Takes up a cut run if there is one; the step to go on from."""
        if not self.checkpoint.is_file():
            return 0
        stored = json.loads(read_metadata(self.checkpoint).get("training", "{}"))
        if stored.get("fingerprint") != self.fingerprint:
            logger.warning("%s is of another plan or seed; training starts anew.", self.checkpoint)
            return 0
        tensors = load_weights(self.checkpoint)
        load_exactly(self.trained, _part(tensors, "trained."), str(self.checkpoint))
        self._restore_moments(tensors, stored["step"])
        self.step, self.minutes_before, self.history = stored["step"], stored["minutes"], stored["history"]
        logger.info("Going on from step %d, after %.1f minutes.", self.step, self.minutes_before)
        return self.step

    def run(self, batches: Iterator[dict[str, Any]]) -> TrainingResult:
        """Trains to the end of the schedule; a cut (Ctrl-C) writes the checkpoint first.

        Raises:
            UniconError: the loss stopped being a number.
        """
        started = saved = time.monotonic()
        losses, counts = [], None
        try:
            while (fraction := self._used(started)) < 1.0:
                loss, step_counts = self._train_step(next(batches), fraction)
                losses.append(loss)
                counts = step_counts if counts is None else counts + step_counts
                self.step += 1
                if len(losses) == STEPS_PER_EPOCH or self._used(started) >= 1.0:
                    self._report(losses, counts, started)
                    losses, counts = [], None
                if time.monotonic() - saved > _CHECKPOINT_SECONDS:
                    self._save(started)
                    saved = time.monotonic()
            self._save(started)  # what comes after (validation, writing) may fail, and must not cost the training
        except KeyboardInterrupt:
            self._save(started)
            logger.warning("Cut at step %d; the same command goes on from there.", self.step)
            raise
        return TrainingResult(self.step, self._minutes(started), tuple(self.history))

    def _train_step(self, batch: dict[str, Any], fraction: float) -> tuple[float, Tensor]:
        warmup = min(1.0, (self.step + 1) / max(1, self.schedule.warmup_steps))
        rate = self.schedule.learning_rate * warmup * (1.0 - fraction) ** _DECAY_EXPONENT
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss, counts = self.backward({**batch, "step": self.step})
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UniconError(
                f"The loss became {value} at step {self.step} (cases {', '.join(batch['case_ids'])}). "
                "Check these cases' intensities and labels, or train with --precision fp32."
            )
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(
            [parameter for group in self.optimizer.param_groups for parameter in group["params"]],
            self.schedule.gradient_norm,
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return value, counts.detach().cpu()

    def backward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What `step_loss` says of the batch; adds the gradients, scaled by `scaler`, to those of the parameters."""
        with autocast(self.device, self.precision):
            loss, counts = self.step_loss(batch)
        self.scaler.scale(loss).backward()
        return loss, counts

    def _minutes(self, started: float) -> float:
        return self.minutes_before + (time.monotonic() - started) / 60.0

    def _used(self, started: float) -> float:
        """The share of the budget that is used, 0 to 1."""
        by_steps = self.step / self.schedule.steps
        by_clock = self._minutes(started) / self.schedule.minutes if self.schedule.minutes else 0.0
        return min(1.0, max(by_steps, by_clock))

    def _report(self, losses: list[float], counts: Tensor, started: float) -> None:
        minutes, used = self._minutes(started), self._used(started)
        loss = sum(losses) / len(losses)
        score = None if self.score is None else finite_or_none(self.score.of_counts(counts))
        self.history.append({"step": self.step, "loss": loss, "score": score, "minutes": round(minutes, 3)})
        logger.info(
            "step %5d  loss %.3f%s  %.1f min, %.1f min left", self.step, loss,
            "" if self.score is None else f"  training {self.score.name} {'n/a' if score is None else f'{score:.3f}'}",
            minutes, minutes * (1.0 - used) / max(used, 1e-6),
        )  # fmt: skip

    def _save(self, started: float) -> None:
        stored = {
            "fingerprint": self.fingerprint,
            "step": self.step,
            "minutes": self._minutes(started),
            "history": self.history,
        }
        tensors = {f"trained.{name}": tensor for name, tensor in self.trained.items()}
        for name, tensor in self.trained.items():
            for key in ("exp_avg", "exp_avg_sq"):
                if key in self.optimizer.state.get(tensor, {}):
                    tensors[f"{key}.{name}"] = self.optimizer.state[tensor][key]
        save_weights(self.checkpoint, tensors, {"training": json.dumps(stored)})

    def _restore_moments(self, tensors: dict[str, Tensor], step: int) -> None:
        for name, tensor in self.trained.items():
            if f"exp_avg.{name}" in tensors:
                self.optimizer.state[tensor] = {
                    "step": torch.tensor(float(step), device=tensor.device),
                    **{key: tensors[f"{key}.{name}"].to(tensor.device) for key in ("exp_avg", "exp_avg_sq")},
                }


def drop_modalities(batch: dict[str, Any], probability: float, seed: int) -> dict[str, Any]:
    """The batch with some modalities gone from some cases (zeros, and not present).

    Each case with several modalities keeps, with `probability`, a random non-empty part of them. What a batch loses
    depends on its `step` and the seed alone.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + batch["step"])
    present = batch["present"].clone()
    for row in present:
        channels = row.nonzero().flatten()
        if len(channels) > 1 and torch.rand((), generator=generator) < probability:
            kept = int(torch.randint(1, len(channels), (), generator=generator))
            order = torch.randperm(len(channels), generator=generator)
            row[channels[order[kept:]]] = False
    return {**batch, "data": batch["data"] * present[:, :, None, None, None], "present": present}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
