"""What a task may do faster without finding anything else: measured on a few cases, kept on the task's card.

Mixed precision is about twice as fast, and half-overlapping tiles compute each voxel about five times. For most tasks
neither is needed; for which ones is not for us to guess.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from unicon_pipeline.contract import ZYX, InputContract
from unicon_pipeline.device import choose_precision
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.export import decide
from unicon_pipeline.inference_form import inference_form
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.records import from_dict, to_dict
from unicon_pipeline.sliding_window import Window, tile_count, window_maps

logger = logging.getLogger(__name__)

CASES = 3  # on so many it is measured
ENOUGH = 0.995  # Dice of each of them between the labels of two precisions; two experts' outlines agree far less
FAST_ENOUGH = 0.99  # and with fewer or larger tiles, which are used only when asked for
_PRECISION, _FAST = "reduced_precision", "fast"  # keys of the card
Prepared = tuple[np.ndarray, tuple[bool, ...]]  # a case's array (C, Z, Y, X), and which channels it has
_STEPS, _LARGER = (0.75, 1.0), 1.5


@dataclass(frozen=True)
class PrecisionEvidence:
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


@dataclass(frozen=True)
class FastEvidence:
    """The fastest window whose labels are near the usual one's. `dice`: as above; `times_faster`: of all cases."""

    tile_zyx: ZYX
    step: float
    dice: tuple[float, ...]
    times_faster: float


def measure_shortcuts(
    network: nn.Module,
    plan: DataPlan,
    contract: InputContract,
    cases: Iterable[Prepared],
    device: torch.device,
) -> dict[str, Any]:
    """What goes on a task's card; empty for tasks that judge whole cases.

    Args:
        network: merged, in evaluation mode.
        cases: the first CASES are used.
    """
    if plan.labels is None or plan.view != "patch":
        return {}
    used = list(itertools.islice(cases, CASES))
    if not used:
        return {}
    precision = choose_precision("auto", device)
    usual = _Labelling(network, plan, used, device, Window(plan.patch_shape_zyx, plan.air, torch.float32))
    card = {}
    if precision is not torch.float32:
        reduced = _Labelling(network, plan, used, device, Window(plan.patch_shape_zyx, plan.air, precision))
        changed = max(float((a != b).mean()) for a, b in zip(usual.labels, reduced.labels, strict=True))
        evidence = PrecisionEvidence(_name(precision), reduced.dice(usual), changed)
        card[_PRECISION] = to_dict(evidence)
        logger.info("%s", _described(evidence))
        usual = reduced if evidence.is_enough else usual
    fast = _fastest(network, plan, contract, used, device, usual)
    if fast is not None:
        card[_FAST] = to_dict(fast)
        logger.info(
            "--fast: tiles of %s, steps of %g, %.1f times faster, lowest Dice against the usual ones %.4f (n=%d).",
            " x ".join(map(str, fast.tile_zyx)), fast.step, fast.times_faster, min(fast.dice), len(fast.dice),
        )  # fmt: skip
    return card


def trusted_precision(card: dict[str, Any], device: torch.device) -> torch.dtype:
    """The fastest precision that the device computes natively and that the card speaks for; else float32."""
    precision = choose_precision("auto", device)
    if precision is torch.float32 or _PRECISION not in card:
        return torch.float32
    evidence = from_dict(PrecisionEvidence, card[_PRECISION], "the task's card", CheckpointError)
    return precision if evidence.precision == _name(precision) and evidence.is_enough else torch.float32


def fast_window(card: dict[str, Any]) -> FastEvidence | None:
    """The card's faster window, if it has one."""
    return from_dict(FastEvidence, card[_FAST], "the task's card", CheckpointError) if _FAST in card else None


class _Labelling:
    """The labels of some cases in one way of computing them, and the seconds that it took."""

    def __init__(
        self, network: nn.Module, plan: DataPlan, cases: list[Prepared], device: torch.device, way: Window
    ):
        form = inference_form(network, device, way.precision)
        window_maps(form, np.zeros((len(way.air), *way.tile_zyx), np.float32), cases[0][1], way)  # not timed: the first
        started = time.perf_counter()
        logits = (window_maps(form, array_czyx, present, way).numpy() for array_czyx, present in cases)
        self.labels = [decide(of_one, plan.labels) for of_one in logits]
        self.seconds, self.way = time.perf_counter() - started, way

    def dice(self, usual: _Labelling) -> tuple[float, ...]:
        """Against another labelling, over all labels at once; cases in which neither finds anything say nothing."""
        scores = []
        for own, other in zip(self.labels, usual.labels, strict=True):
            found = int((own > 0).sum() + (other > 0).sum())
            if found:
                scores.append(round(2 * int(((own == other) & (own > 0)).sum()) / found, 6))
        return tuple(scores)


def _fastest(
    network: nn.Module,
    plan: DataPlan,
    contract: InputContract,
    cases: list[Prepared],
    device: torch.device,
    usual: _Labelling,
) -> FastEvidence | None:
    best = None
    tiles = [tile_count(array_czyx.shape[1:], usual.way.tile_zyx) for array_czyx, _ in cases]
    for tile, step in _windows(plan.patch_shape_zyx, contract):
        if [tile_count(array_czyx.shape[1:], tile, step) for array_czyx, _ in cases] == tiles:
            continue
        tried = _Labelling(network, plan, cases, device, Window(tile, plan.air, usual.way.precision, step=step))
        dice, times_faster = tried.dice(usual), round(usual.seconds / tried.seconds, 2)
        good = dice and min(dice) >= FAST_ENOUGH and times_faster > 1
        if good and (best is None or times_faster > best.times_faster):
            best = FastEvidence(tile, step, dice, times_faster)
    return best


def _windows(patch: ZYX, contract: InputContract) -> Iterator[tuple[ZYX, float]]:
    """Fewer tiles, and larger ones where the foundation takes any size."""
    yield from ((patch, step) for step in _STEPS)
    if contract.fixed_shape_zyx is None:
        divisors = contract.divisible_by_zyx
        z, y, x = (math.ceil(_LARGER * size / by) * by for size, by in zip(patch, divisors, strict=True))
        yield from (((z, y, x), step) for step in _STEPS)


def _name(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")


def _described(evidence: PrecisionEvidence) -> str:
    if not evidence.dice:
        return f"{evidence.precision} is not used unasked: nothing was found in the cases that it was measured on."
    verdict = "is used unless another is asked for" if evidence.is_enough else "is used only when asked for"
    return (
        f"{evidence.precision} against float32: lowest Dice {min(evidence.dice):.4f} (n={len(evidence.dice)}), at most "
        f"{evidence.changed:.2%} of the voxels change; it {verdict}."
    )
