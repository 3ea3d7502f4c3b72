"""Regions of the training cases that have no labels: what the model's own segmentation task finds."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from unicon_pipeline.dataset import Case, Task
from unicon_pipeline.errors import PlanError
from unicon_pipeline.model_record import CHAIN_FILE, ModelRecord
from unicon_pipeline.predict import predict_folder
from unicon_pipeline.records import write_json
from unicon_pipeline.tables import enumerated

logger = logging.getLogger(__name__)


def find_regions(task: Task, work: Path, model: Path, device: str = "auto") -> dict[str, Path]:
    """Case id -> label map, of the cases of a task with a region that have no labels; predicted where they are not yet.

    The label maps lie in `work`/preprocessed/<Task>/regions/<region>/.

    Raises:
        PlanError: there are such cases, and the model has no task that finds the region.
    """
    without = [case for case in task.cases if case.labels is None]
    if task.region is None or not without:
        return {}
    tasks = ModelRecord(model).tasks if (Path(model) / CHAIN_FILE).exists() else ()
    if task.region not in tasks:
        raise PlanError(
            f"{task.name} looks at what {task.region} finds. {len(without)} of its cases have no labels "
            f"({enumerated([case.case_id for case in without])}), and {model} has no task {task.region} to find it; "
            f"it has: {', '.join(tasks) or 'none yet'}. Add that task first, or labels in labelsTr/."
        )
    out = Path(work) / "preprocessed" / task.name / "regions"
    _link(task, without, out / "images")
    logger.info("%s: %s is looked for in %d cases without labels.", task.name, task.region, len(without))
    report = predict_folder(out / "images", out, model, tasks=[task.region], resume=True, device=device)
    if report.exit_code:
        logger.warning("%s: %s", task.name, report.summary())
    found = {case.case_id: out / task.region / f"{case.case_id}.nii.gz" for case in without}
    return {case_id: path for case_id, path in found.items() if path.is_file()}


def _link(task: Task, cases: list[Case], folder: Path) -> None:
    """A folder with the images of these cases alone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in (path for case in cases for path in case.images.values()):
        (folder / path.name).symlink_to(path.resolve())
    write_json(folder / "dataset.json", {"channel_names": {str(n): name for n, name in enumerate(task.modalities)}})
