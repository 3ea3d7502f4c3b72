"""What a model can do, and where each part of it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unicon_pipeline.metrics import format_summary
from unicon_pipeline.model_folder import ModelFolder
from unicon_pipeline.records import to_dict

_SHOWN_PROVENANCE = ("made_by", "task", "training_cases", "validation")


def describe(path: Path) -> dict[str, Any]:
    """The model as plain JSON values.

    Raises:
        CheckpointError: no sound model in `path`.
    """
    model = ModelFolder(path)
    spec = model.spec()
    tasks = []
    for entry in model.chain.entries:
        if entry.kind != "task":
            continue
        plan, card = model.task_plan(entry.name), model.card(entry.name)
        tasks.append(
            {
                "name": entry.name,
                "task_type": plan.data.task_type,
                "modalities": list(plan.data.modalities),
                "outputs": list(plan.data.labels.names),
                "spacing_zyx_mm": list(plan.data.spacing_zyx_mm),
                "patch_shape_zyx": list(plan.data.patch_shape_zyx),
                "brought_stems": list(entry.stems),
                "trained_parameters": entry.trained_parameters,
                "added_bytes": entry.added_bytes,
                "training_cases": len(plan.extension.training_cases),
                "training_minutes": card["training"]["minutes"],
                "validation": card["validation"],
            }
        )
    foundation = {"added_bytes": model.chain.entries[0].added_bytes, **to_dict(spec)}
    return {"model": str(path), "digest": model.head, "foundation": foundation, "tasks": tasks}


def format_description(description: dict[str, Any]) -> str:
    """The same for a person."""
    foundation = description["foundation"]
    provenance = foundation["provenance"]
    lines = [
        f"{description['model']}  (digest {description['digest'][:12]})",
        f"foundation  {foundation['architecture']}, takes {', '.join(foundation['input']['modalities'])}, "
        f"{foundation['added_bytes'] / 1e6:.1f} MB, licence: {foundation['licence']}",
        *(f"            {key}: {provenance[key]}" for key in _SHOWN_PROVENANCE if key in provenance),
    ]
    for task in description["tasks"]:
        stems = f", brought the stem for {', '.join(task['brought_stems'])}" if task["brought_stems"] else ""
        lines += [
            f"task        {task['name']}: {task['task_type']} of {', '.join(task['outputs'])} "
            f"from {' and/or '.join(task['modalities'])}{stems}",
            f"            {task['trained_parameters']:,} trained parameters, {task['added_bytes'] / 1e6:.1f} MB, "
            f"{task['training_cases']} cases, {task['training_minutes']:g} minutes of training",
        ]
        if task["validation"]:
            lines.append(f"            validation Dice {format_summary(task['validation'])}")
    return "\n".join(lines if description["tasks"] else [*lines, "no task yet: add one with unicon_extend"])
