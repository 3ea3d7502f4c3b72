"""What a case-level task makes of one case: its region's figures and covariates beside the prepared view -> logits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from unicon_pipeline.case_reading import CLINICAL, IMAGE, REGION, CaseReading, Figures
from unicon_pipeline.clinical import Row
from unicon_pipeline.dataset import on_one_grid
from unicon_pipeline.descriptors import describe_region
from unicon_pipeline.device import autocast
from unicon_pipeline.geometry import Volume
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.prepare import PreparedCase
from unicon_pipeline.region import as_region

_UNSEEN = "the middle of the body is looked at, and the region's figures are taken as unknown"


@dataclass(frozen=True)
class Beside:
    """What only case-level tasks read of a case.

    `own`: modality -> volume in HU or SUV on the grid that it came on, where that is another than the common one.
    `clinical`: its row of clinical.csv; None: it has none.
    """

    own: dict[str, Volume] = field(default_factory=dict)
    clinical: Row | None = None


@dataclass(frozen=True)
class Region:
    """What a segmentation task found of a case: `mask` (uint8, 1 = region) on the common grid, None where it was not
    looked for; its descriptors, None where unknown; and what to tell."""

    mask: Volume | None
    figures: Figures | None
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, task: str, found: Volume | None, images: Mapping[str, Volume], why_not: str | None) -> Region:
        """Of the labels that `task` found, and the images, each best on its own grid.

        Args:
            why_not: the reason where it found none because it could not look.
        """
        if found is None:
            return cls(None, None, (f"{task} {why_not}; {_UNSEEN}",))
        mask = as_region(found, found.grid)
        figures = describe_region(mask, images)
        told = () if mask.array_zyx.any() else (f"{task} found nothing; {_UNSEEN}",)
        return cls(mask, {name: value if math.isfinite(value) else None for name, value in figures.items()}, told)


def with_own_grids(
    channels: Iterable[tuple[str, Path | str, Volume]], keep: bool
) -> tuple[dict[str, Volume], dict[str, Volume]]:
    """As `on_one_grid`; and, where wanted, the volumes that came on another grid, for `Beside`."""
    given: dict[str, Volume] = {}

    def passed() -> Iterator[tuple[str, Path | str, Volume]]:
        for modality, name, volume in channels:
            if keep:
                given[modality] = volume
            yield modality, name, volume

    images = on_one_grid(passed())
    return images, {modality: volume for modality, volume in given.items() if volume is not images[modality]}


def oddities(reading: CaseReading, plan: DataPlan, present: tuple[str, ...], clinical: Row | None) -> Iterator[str]:
    """What a person should know of an answer: what the case lacks, and what is odd about its covariates."""
    absent = [name for name in plan.modalities if name not in present]
    if absent and reading.inputs != (CLINICAL,):
        yield f"the case has no {' and no '.join(absent)}; what that would tell is unknown"
    if reading.clinical is not None:
        yield from reading.clinical.oddities(clinical)


@torch.inference_mode()
def case_logits(
    network: nn.Module,
    reading: CaseReading,
    plan: DataPlan,
    prepared: PreparedCase,
    given: tuple[Row | None, Figures | None],
    precision: torch.dtype,
) -> Tensor:
    """Logits (outputs,), float32 on the CPU.

    Args:
        network: a merged `TaskModel`, its encoder in the form in which it predicts, its head in float32: that is small,
            and covariates in bfloat16 would be rounded to three digits.
        given: the covariates, and the region's figures; None where unknown.
        precision: of the encoder.

    Raises:
        UniconError: nothing that the task reads is there.
    """
    device = next(network.head.parameters()).device
    row = reading.tabular(*given)
    tabular = None if row is None else torch.from_numpy(row)[None].to(device)
    tokens = {}
    if IMAGE in reading.inputs:
        images = torch.from_numpy(prepared.array_czyx)[None].to(device)
        present = torch.tensor([[name in prepared.present for name in plan.modalities]], device=device)
        with autocast(device, precision):
            features = network.features(images, present)
        mask = prepared.labels_zyx if REGION in reading.inputs else None
        tokens = network.head.gather(features, None if mask is None else torch.from_numpy(mask)[None].to(device))
    return network.head.fuse(tokens, tabular)[0].float().cpu()
