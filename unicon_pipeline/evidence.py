"""Whether reduced precision changes what a task finds: measured on a few cases, kept on the task's card.

Mixed precision is about twice as fast, and for most networks as good; which ones these are is not for us to guess.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from unicon_pipeline.device import choose_precision
from unicon_pipeline.export import decide
from unicon_pipeline.inference_form import inference_form
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.records import to_dict
from unicon_pipeline.sliding_window import Window, window_maps

logger = logging.getLogger(__name__)

CARD_KEY = "reduced_precision"
CASES = 3  # on so many it is measured
ENOUGH = 0.995  # Dice of each of them, against float32; two experts' outlines agree far less


@dataclass(frozen=True)
class Evidence:
    """Labels in `precision` against those in float32, on the network's grid.

    `dice`: of each case in which anything was found. `changed`: largest share of a case's voxels whose label differs.
    """

    precision: str
    dice: tuple[float, ...]
    changed: float

    @property
    def is_enough(self) -> bool:
        """Whether this precision may be used unasked."""
        return bool(self.dice) and min(self.dice) >= ENOUGH


def reduced_precision_evidence(
    network: nn.Module, plan: DataPlan, cases: Iterable[tuple[np.ndarray, tuple[bool, ...]]], device: torch.device
) -> dict[str, Any]:
    """What goes on a task's card; empty where the device has no reduced precision of its own.

    Args:
        network: merged, in evaluation mode.
        cases: prepared arrays (C, Z, Y, X), and which channels each has; the first CASES are used.
    """
    precision = choose_precision("auto", device)
    if precision is torch.float32 or plan.labels is None or plan.view != "patch":
        return {}
    forms = {kind: inference_form(network, device, kind) for kind in (torch.float32, precision)}
    dice, changed = [], 0.0
    for (array_czyx, present), _ in zip(cases, range(CASES)):
        windows = {kind: Window(plan.patch_shape_zyx, plan.air, kind) for kind in forms}
        logits = (window_maps(form, array_czyx, present, windows[kind]) for kind, form in forms.items())
        exact, reduced = (decide(of_one.numpy(), plan.labels) for of_one in logits)
        found = int((exact > 0).sum() + (reduced > 0).sum())
        if found:
            dice.append(round(2 * int(((exact == reduced) & (exact > 0)).sum()) / found, 6))
        changed = max(changed, float((exact != reduced).mean()))
    evidence = Evidence(str(precision).removeprefix("torch."), tuple(dice), changed)
    logger.info("%s", described(evidence))
    return {CARD_KEY: to_dict(evidence)}


def trusted_precision(card: dict[str, Any], device: torch.device) -> torch.dtype:
    """The fastest precision that the device computes natively and that the card speaks for; else float32."""
    precision, evidence = choose_precision("auto", device), card.get(CARD_KEY)
    if precision is torch.float32 or evidence is None:
        return torch.float32
    measured = Evidence(evidence["precision"], tuple(evidence["dice"]), evidence["changed"])
    same = measured.precision == str(precision).removeprefix("torch.")
    return precision if same and measured.is_enough else torch.float32


def described(evidence: Evidence) -> str:
    """One line for people."""
    if not evidence.dice:
        return f"{evidence.precision} was not compared with float32: nothing was found in any case."
    verdict = "is used unless another is asked for" if evidence.is_enough else "is used only when asked for"
    return (
        f"{evidence.precision} against float32, n={len(evidence.dice)}: lowest Dice {min(evidence.dice):.4f}, at most "
        f"{evidence.changed:.2%} of the voxels change; it {verdict}."
    )
