"""What an importer takes and gives: options of the user in, a foundation and the tasks it came with out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unicon_pipeline.contract import FoundationSpec
from unicon_pipeline.decisions import Decision
from unicon_pipeline.model_record import TaskPlan
from unicon_pipeline.plan import DataPlan, contract_digest


@dataclass(frozen=True)
class ImportOptions:
    """What a checkpoint does not say about itself.

    `orientation`: how images were turned before the network saw them. `modalities`: what its input channels are.
    `fold`: whose encoder becomes the foundation.
    `text_encoder`: a folder with the tokenizer of the checkpoint's text encoder; `findings`: ready text latents.
    `images`: a few cases of the checkpoint's own task, to measure reduced precision on.
    """

    orientation: str | None = None
    modalities: tuple[str, ...] | None = None
    licence: str | None = None
    origin: str | None = None
    fold: int | None = None
    text_encoder: Path | None = None
    findings: Path | None = None
    images: Path | None = None


@dataclass(frozen=True)
class NativeTask:
    """A task that a checkpoint was trained for: it comes along with its own network."""

    plan: TaskPlan
    weights: dict[str, Tensor]
    card: dict[str, Any]


@dataclass(frozen=True)
class Imported:
    """A converted checkpoint. `weights`: of the foundation, in the file's number types."""

    spec: FoundationSpec
    weights: dict[str, Tensor]
    tasks: tuple[NativeTask, ...] = ()


def plan_as_trained(spec: FoundationSpec, whose: str, **fields: Any) -> DataPlan:
    """The data plan of a native task: `fields` say how it sees an image; nothing is estimated, as nothing is trained.

    Args:
        whose: "nnU-Net's 3d_fullres", for the plan's one decision.
    """
    return DataPlan(
        modalities=spec.input.modalities,
        foundation=contract_digest(spec),
        orientation=spec.input.orientation,
        spacing_zyx_mm=spec.input.spacing_zyx_mm,
        intensity=spec.input.intensity,
        folds=(),
        memory_gb=0.0,
        estimated_memory_gb=0.0,
        estimated_minutes_to_train=0.0,
        estimated_seconds_per_case=0.0,
        decisions=(Decision("plan", whose, "as the model was trained"),),
        **fields,
    )
