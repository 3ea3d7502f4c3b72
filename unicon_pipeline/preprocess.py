"""A task's cases, checked, planned and preprocessed into the store; what is there and unchanged is kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from unicon_pipeline.budget import Machine
from unicon_pipeline.contract import FoundationSpec
from unicon_pipeline.dask_cluster import open_workers
from unicon_pipeline.dataset import Case, Labels, Task, check_labels, on_one_grid, read_case, read_task
from unicon_pipeline.descriptors import DESCRIPTORS, describe_region
from unicon_pipeline.errors import PlanError
from unicon_pipeline.fingerprint import Fingerprint, fingerprint_task
from unicon_pipeline.folder_lock import folder_lock
from unicon_pipeline.geometry import Volume, read_image
from unicon_pipeline.input_shape import NO_OVERRIDES, Overrides
from unicon_pipeline.nifti import declared_voxels
from unicon_pipeline.plan import DataPlan, plan_task
from unicon_pipeline.prepare import prepare_case
from unicon_pipeline.progress import progress_bar
from unicon_pipeline.records import sha256_json, to_dict, write_record
from unicon_pipeline.region import region_mask
from unicon_pipeline.resize import resized_shape
from unicon_pipeline.store import (
    forget_case,
    is_sound,
    read_meta,
    stored_case_ids,
    sweep_unfinished,
    write_case,
)
from unicon_pipeline.workers import Failure, Workers, usable_processes

logger = logging.getLogger(__name__)

_FOREGROUND_SAMPLES = 2000
_UNKNOWN_IMAGE_VOXELS = 100_000_000  # of formats whose header is not read beforehand
# Beside the channels of the result, all in float32, a case takes at most this many volumes of its larger grid.
_FURTHER_VOLUMES = 2
_EMPTY_PROCESS_MEGABYTES = 250.0


@dataclass(frozen=True)
class _Job:
    """A case, the digest of all that decides what is stored of it, what its labels mean, and the mask found of it."""

    case: Case
    made_from: str
    labels: Labels | None
    found: Path | None

    @property
    def case_id(self) -> str:
        return self.case.case_id


def preprocess_task(
    task: Task,
    fingerprint: Fingerprint,
    plan: DataPlan,
    destination: Path,
    workers: Workers,
    at_most: int | None = None,
    regions: Mapping[str, Path] | None = None,
) -> dict[str, str]:
    """Preprocesses every case of the fingerprint into the store; what is there and unchanged is kept.

    Where the plan names a region, the stored labels are its mask on the view's grid (1 = region; left out where there
    is none), and the case's meta holds `descriptors`: name -> figure, None where it cannot be known.

    Args:
        regions: as the fingerprint was made with.

    Returns:
        case id -> reason, for the cases that could not be preprocessed.
    """
    jobs = _jobs(task, fingerprint, plan, regions or {})
    for stale in set(stored_case_ids(destination)) - {job.case_id for job in jobs}:
        forget_case(destination, stale)
    failed: dict[str, str] = {}
    try:
        with closing(workers.each(_preprocess_case, jobs, plan, destination, at_most=at_most)) as done:
            for job, outcome in progress_bar(done, "preprocess", lambda pair: pair[0].case_id, len(jobs)):
                if isinstance(outcome, Failure):
                    failed[job.case_id] = str(outcome)
                    forget_case(destination, job.case_id)
                    logger.warning("%s cannot be preprocessed: %s", job.case_id, outcome)
                else:
                    logger.debug("%s: %s", job.case_id, outcome)
    finally:
        sweep_unfinished(destination)
    return {job.case_id: failed[job.case_id] for job in jobs if job.case_id in failed}


def plan_and_preprocess(
    task_folder: Path,
    work: Path,
    spec: FoundationSpec,
    machine: Machine,
    *,
    overrides: Overrides = NO_OVERRIDES,
    processes: int | None = None,
    dask: str | None = None,
    regions: Mapping[str, Path] | None = None,
) -> tuple[DataPlan, dict[str, str]]:
    """Checks, fingerprints, plans and preprocesses a task into `work`/preprocessed/<Task>/.

    Args:
        machine: what will train, such as `machine_for("auto")` or `PRESETS["gpu24"]`.
        overrides: spacing, patch, batch, folds, instead of the planned ones.
        processes: cases at a time; None: by cores and free memory.
        dask: address of a Dask scheduler, whose workers see the same folders and do the work.
        regions: of a task that looks at a region, case id -> label map in which the model's task has marked it (not 0),
            for cases without labels; on any grid.

    Returns:
        The plan, and case id -> reason for the cases that could not be used.

    Raises:
        DatasetError, PlanError: the folder is wrong, no case is usable, or no plan fits.
    """
    task = read_task(task_folder)
    if regions and task.region is None:
        raise PlanError(f"{task.name} looks at no region, but masks of {len(regions)} cases are given: leave them out.")
    folder = Path(work) / "preprocessed" / task.name
    local = processes or usable_processes(_megabytes_to_measure(task))
    with folder_lock(folder), open_workers(local, dask) as workers:
        fingerprint = fingerprint_task(task, spec.input.orientation, workers, folder / "measured", regions)
        write_record(folder / "fingerprint.json", fingerprint)
        plan = plan_task(task, fingerprint, spec, machine, overrides)
        write_record(folder / "plan.json", plan)
        at_most = processes or (usable_processes(_peak_megabytes(fingerprint, plan)) if workers.local else None)
        failed = preprocess_task(task, fingerprint, plan, folder / "cases", workers, at_most, regions)
    return plan, {**fingerprint.failed, **failed}


def _megabytes_to_measure(task: Task) -> float:
    """What measuring the largest case takes, by the headers of its files."""
    files = [path for case in task.cases for path in case.images.values()]
    voxels = max((declared_voxels(path) or _UNKNOWN_IMAGE_VOXELS for path in files), default=0)
    return _EMPTY_PROCESS_MEGABYTES + _FURTHER_VOLUMES * 4 * voxels / 2**20


def _peak_megabytes(fingerprint: Fingerprint, plan: DataPlan) -> float:
    """What preprocessing the largest case takes."""
    voxels = 0
    for case in fingerprint.cases:
        resized = resized_shape(case.cropped_shape_zyx, case.spacing_zyx_mm, plan.spacing_zyx_mm)
        voxels = max(voxels, math.prod(case.shape_zyx), math.prod(resized))
    view = math.prod(plan.patch_shape_zyx) if plan.view == "volume" else 0
    channels = len(plan.modalities)
    return _EMPTY_PROCESS_MEGABYTES + 4 * ((channels + _FURTHER_VOLUMES) * voxels + channels * view) / 2**20


def _recipe(plan: DataPlan) -> dict[str, Any]:
    """What of a plan decides the stored arrays."""
    whole = to_dict(plan)
    names = "modalities labels orientation spacing_zyx_mm view intensity patch_shape_zyx conventions"
    return {name: whole[name] for name in names.split()} | {"label_rule": "largest share"}


def _jobs(task: Task, fingerprint: Fingerprint, plan: DataPlan, regions: Mapping[str, Path]) -> list[_Job]:
    """The files' digests are those of the fingerprint: a file that changes after it is found by the next run."""
    cases, recipe = {case.case_id: case for case in task.cases}, _recipe(plan)
    if plan.region is not None:
        recipe["region"] = [None if task.labels is None else to_dict(task.labels), *DESCRIPTORS]
    jobs = []
    for seen in fingerprint.cases:
        made_from = sha256_json([recipe, seen.images_sha256, seen.labels_sha256])
        jobs.append(_Job(cases[seen.case_id], made_from, task.labels, regions.get(seen.case_id)))
    return jobs


def _preprocess_case(job: _Job, plan: DataPlan, destination: Path) -> str:
    """Worker: one case into the store, unless it is there already, made from the same files in the same way."""
    case, told = job.case, {}
    if is_sound(destination, case.case_id) and read_meta(destination, case.case_id).get("made_from") == job.made_from:
        return "unchanged"
    with threadpool_limits(1):  # the other cores have cases of their own, and the bits must not depend on their number
        if plan.region is not None:
            images, labels, descriptors = _around_region(job)
            told = {"descriptors": descriptors}
        else:
            images, labels = read_case(case), None  # its units were checked when it was measured
            if plan.labels is not None and case.labels is not None:
                labels = check_labels(case, next(iter(images.values())).grid, plan.labels)
        prepared = prepare_case(images, plan, labels)
    meta = {
        "made_from": job.made_from,
        "present": list(prepared.present),
        "geometry": to_dict(prepared.geometry),
        "foreground": _foreground(prepared.labels_zyx, plan.labels),
        **told,
    }
    write_case(destination, case.case_id, prepared.array_czyx, prepared.labels_zyx, meta, plan.patch_shape_zyx)
    return "stored"


def _around_region(job: _Job) -> tuple[dict[str, Volume], Volume | None, dict[str, float | None]]:
    """The images on one grid, the region's mask, and its descriptors, which want each image on its own grid."""
    own = {modality: read_image(path) for modality, path in job.case.images.items()}
    images = on_one_grid((modality, job.case.images[modality], volume) for modality, volume in own.items())
    mask = region_mask(job.case, next(iter(images.values())).grid, job.labels, job.found)
    figures = dict.fromkeys(DESCRIPTORS, math.nan) if mask is None else describe_region(mask, own)
    return images, mask, {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _foreground(labels_zyx: np.ndarray | None, labels: Labels | None) -> dict[str, list[list[int]]]:
    """Up to 2000 voxels (z, y, x) of each output, evenly picked; for oversampling."""
    if labels_zyx is None or labels is None:
        return {}
    picked = {}
    for name, values in zip(labels.names, labels.values, strict=True):
        voxels = np.flatnonzero(np.isin(labels_zyx, values))
        chosen = voxels[np.linspace(0, len(voxels) - 1, min(len(voxels), _FOREGROUND_SAMPLES)).astype(np.intp)]
        picked[name] = np.stack(np.unravel_index(chosen, labels_zyx.shape), axis=1).tolist() if len(voxels) else []
    return picked
