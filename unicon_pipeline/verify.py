"""Is the model what it was? Digests of all files, the chain, and each task's probe."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unicon_pipeline.case_head import FusionEnsemble, FusionHead
from unicon_pipeline.device import machine_facts
from unicon_pipeline.errors import UniconError
from unicon_pipeline.model import TaskModel
from unicon_pipeline.model_folder import ModelFolder
from unicon_pipeline.model_record import CHAIN_FILE, file_problem
from unicon_pipeline.native import NativeModel
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.records import canonical_json, read_json

_PROBE_SEED, _PROBE_SAMPLES = 2508, 64
_CLOSE = 2e-3  # of the stored samples' largest magnitude; other processors sum in another order


@dataclass(frozen=True)
class VerifyReport:
    """`checked`: one line per file and probe that is as it should be; `problems`: one per fault."""

    ok: bool
    problems: tuple[str, ...]
    checked: tuple[str, ...]


def verify(path: Path) -> VerifyReport:
    """Checks a model folder; probes run on the CPU in float32, where they were stored.

    Raises:
        CheckpointError: the folder holds no model at all.
    """
    path = Path(path)
    try:
        model = ModelFolder(path)
    except UniconError as problem:
        if not (path / CHAIN_FILE).is_file():
            raise
        return VerifyReport(False, (str(problem),), ())
    problems, checked = [], []
    if (path / CHAIN_FILE).read_text(encoding="utf-8") != canonical_json(read_json(path / CHAIN_FILE)):
        problems.append(f"{path / CHAIN_FILE} is not as it was written (formatting differs).")
    for entry in model.chain.entries:
        for file, digest in entry.files.items():
            problem = file_problem(path, file, digest)
            (problems.append if problem else checked.append)(problem or f"{file}: unchanged")
    if not problems:
        foundation = model.foundation()
        for task in model.tasks:
            stored = model.card(task)["probe"]
            outcome = compare_probes(stored, probe(model.task_model(task, foundation), model.task_plan(task).data))
            (checked if outcome in ("identical", "close") else problems).append(f"{task}: probe output is {outcome}")
    return VerifyReport(not problems, tuple(problems), tuple(checked))


@torch.no_grad()
def probe(model: TaskModel | NativeModel, plan: DataPlan) -> dict[str, Any]:
    """A fixed input's output: its digest, samples of it, and the machine that computed it."""
    model = model.merged()
    shape = plan.patch_shape_zyx
    if plan.view == "patch":  # a small one is enough
        divisors = model.foundation.spec.input.divisible_by_zyx
        shape = tuple(min(size, 2 * divisor) for size, divisor in zip(shape, divisors, strict=True))
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    images = torch.randn((1, len(plan.modalities), *shape), generator=generator)
    given = _given_to_head(getattr(model, "head", None), plan, generator)
    output = model(images, torch.ones((1, len(plan.modalities)), dtype=torch.bool), **given)
    output = output if isinstance(output, Tensor) else output[0]
    picks = torch.linspace(0, output.numel() - 1, _PROBE_SAMPLES).long()
    return {
        "sha256": hashlib.sha256(output.contiguous().numpy().tobytes()).hexdigest(),
        "samples": [round(value, 6) for value in output.flatten()[picks].tolist()],
        "machine": machine_facts(torch.device("cpu")),
    }


def _given_to_head(head: nn.Module | None, plan: DataPlan, generator: torch.Generator) -> dict[str, Tensor]:
    """What a head that judges whole cases takes beside the maps: a row of figures, and a region in the middle."""
    if not isinstance(head, FusionHead | FusionEnsemble):
        return {}
    one, given = head.members[0] if isinstance(head, FusionEnsemble) else head, {}
    if one.skip is not None:
        given["tabular_bd"] = torch.randn((1, one.skip.in_features), generator=generator)
    if plan.region is not None:
        region = torch.zeros((1, *plan.patch_shape_zyx))
        region[(0, *(slice(size // 4, size - size // 4) for size in plan.patch_shape_zyx))] = 1
        given["region_bzyx"] = region
    return given


def compare_probes(stored: dict[str, Any], now: dict[str, Any]) -> str:
    """`identical`, or on another machine `close`, else in words what differs."""
    if stored["sha256"] == now["sha256"]:
        return "identical"
    if stored["machine"] == now["machine"]:
        return "different on the machine that stored it: its files or its libraries have changed"
    largest = max(abs(value) for value in stored["samples"])
    difference = max(abs(a - b) for a, b in zip(stored["samples"], now["samples"], strict=True))
    if difference <= _CLOSE * max(largest, 1.0):
        return "close"
    return f"different: by up to {difference:.2g} on outputs of up to {largest:.2g}"
