"""What a model can do, and where each part of it came from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unicon_pipeline.metrics import format_summary
from unicon_pipeline.model_record import ChainEntry, ModelRecord, TaskPlan
from unicon_pipeline.records import to_dict

_SHOWN_PROVENANCE = ("family", "source", "file", "sha256", "fold", "made_by", "task", "training_cases", "validation")
_MOST_OUTPUTS = 10
_METRICS = {"harrell_c": "Harrell's C", "auc": "AUC"}


def describe(path: Path) -> dict[str, Any]:
    """The model as plain JSON values.

    Raises:
        CheckpointError: no sound model in `path`.
    """
    model = ModelRecord(path)
    spec = model.spec()
    tasks = []
    for entry in model.chain.entries:
        if entry.kind != "task":
            continue
        tasks.append(_task(entry, model.task_plan(entry.name), model.card(entry.name)))
    foundation = {"added_bytes": model.chain.entries[0].added_bytes, **to_dict(spec)}
    return {"model": str(path), "digest": model.head, "foundation": foundation, "tasks": tasks}


def _task(entry: ChainEntry, plan: TaskPlan, card: dict[str, Any]) -> dict[str, Any]:
    common = {
        "name": entry.name,
        "task_type": plan.data.task_type,
        "modalities": list(plan.data.modalities),
        "outputs": list(_outputs(plan)),
        "spacing_zyx_mm": list(plan.data.spacing_zyx_mm),
        "patch_shape_zyx": list(plan.data.patch_shape_zyx),
        "added_bytes": entry.added_bytes,
    }
    if plan.native is not None:
        return common | {"origin": plan.native.origin}
    if plan.case is not None:
        common |= {"inputs": list(plan.case.inputs), "region": plan.data.region, "figures": list(plan.case.names)}
    return common | {
        "brought_stems": list(entry.stems),
        "trained_parameters": entry.trained_parameters,
        "training_cases": len(plan.extension.training_cases),
        "training_minutes": card["training"]["minutes"],
        "validation": card["validation"],
    }


def _outputs(plan: TaskPlan) -> tuple[str, ...]:
    if plan.data.labels:
        return plan.data.labels.names
    return plan.native.outputs if plan.native else plan.case.outputs


def format_description(description: dict[str, Any]) -> str:
    """The same for a person."""
    lines = [
        f"{description['model']}  (digest {description['digest'][:12]})",
        *_told_foundation(description["foundation"]),
    ]
    for task in description["tasks"]:
        lines += _told_task(task)
    return "\n".join(lines if description["tasks"] else [*lines, "no task yet: add one with unicon_extend"])


def _told_foundation(foundation: dict[str, Any]) -> Iterator[str]:
    contract, provenance, report = foundation["input"], foundation["provenance"], foundation["load_report"]
    yield (
        f"foundation  {foundation['architecture']}, takes {', '.join(contract['modalities'])}, "
        f"{foundation['added_bytes'] / 1e6:.1f} MB, licence: {foundation['licence']}"
    )
    spacing = contract["spacing_zyx_mm"]
    spacing = "any spacing" if spacing is None else " x ".join(f"{side:g}" for side in spacing) + " mm (z y x)"
    yield f"            input: {contract['orientation'] or 'axes as stored'}, {spacing}; {_told_levels(foundation)}"
    yield from (f"            {key}: {provenance[key]}" for key in _SHOWN_PROVENANCE if key in provenance)
    if report:
        left_out = ", ".join(f"{count} of {part}" for part, count in report.get("left_out", {}).items())
        yield (
            f"            {report['tensors']} tensors taken ({report['parameters']:,} numbers)"
            + (f", left out: {left_out}" if left_out else "")
        )


def _told_levels(foundation: dict[str, Any]) -> str:
    levels = [f"{'x'.join(map(str, level['stride_zyx']))}: {level['channels']}" for level in foundation["pyramid"]]
    return f"{foundation['kind']}, channels at strides {', '.join(levels)}"


def _told_task(task: dict[str, Any]) -> Iterator[str]:
    sources = " and/or " if "origin" not in task else " and "
    brought = task.get("brought_stems")
    stems = f", brought the stem for {', '.join(brought)}" if brought else ""
    outputs = ", ".join(task["outputs"][:_MOST_OUTPUTS])
    if len(task["outputs"]) > _MOST_OUTPUTS:
        outputs += f" and {len(task['outputs']) - _MOST_OUTPUTS} more"
    yield f"task        {task['name']}: {task['task_type']} of {outputs} from {sources.join(task['modalities'])}{stems}"
    if "origin" in task:
        yield f"            came with the foundation, {task['added_bytes'] / 1e6:.1f} MB: {task['origin']}"
        return
    yield (
        f"            {task['trained_parameters']:,} trained parameters, {task['added_bytes'] / 1e6:.1f} MB, "
        f"{task['training_cases']} cases, {task['training_minutes']:g} minutes of training"
    )
    if "inputs" in task:
        around = f" around {task['region']}" if task["region"] else ""
        yield f"            reads {', '.join(task['inputs'])}{around}; {len(task['figures'])} figures beside the image"
    if found := task["validation"]:
        metric = _METRICS.get(found["metric"], found["metric"])
        how = f"; {found['how']}" if "how" in found else ""
        yield f"            validation {metric} {format_summary(found)}{how}"
        yield from [f"            {found['verdict']}"] if "verdict" in found else []
