"""From a case's images to network input: orientation, crop, intensity, spacing; and a task's cases to the store.

`prepare_case` is what training and prediction share, so both see a case in the same way.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unicon_pipeline.contract import ZYX, FoundationSpec, SpacingZYX
from unicon_pipeline.dataset import Case, Labels, Task, check_labels, read_task
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.fingerprint import Fingerprint, fingerprint_task, is_current
from unicon_pipeline.geometry import Grid, Volume, orient
from unicon_pipeline.intensity import body_box, box_of, nonzero_region, normalise, read_in_units
from unicon_pipeline.plan import DataPlan, plan_task
from unicon_pipeline.progress import progress_bar
from unicon_pipeline.records import read_record, sha256_file, sha256_json, to_dict, write_record
from unicon_pipeline.resize import axis_orders, resize, resize_labels, resized_shape
from unicon_pipeline.store import (
    folder_lock,
    forget_case,
    is_sound,
    read_meta,
    stored_case_ids,
    sweep_unfinished,
    write_case,
)
from unicon_pipeline.workers import Failure, each, usable_processes

logger = logging.getLogger(__name__)

IMAGE_ORDER, LABEL_ORDER = 3, 1  # nnU-Net's: cubic for images, linear per class for labels
_FOREGROUND_SAMPLES = 2000
_CPU_MEMORY_GB = 2.0  # a CPU's limit is time, not memory
_GPU_MEMORY_GB = 8.0
_MEGABYTES_PER_PROCESS = 2500.0  # while nothing is known of the images yet
# Measured peak of one case, CT+PET of 512 x 512 x 150 to 300: 11 to 13.5 float32 volumes of its larger grid.
_PEAK_VOLUMES = 13.5
_EMPTY_PROCESS_MEGABYTES = 300.0


@dataclass(frozen=True)
class CaseGeometry:
    """The way back from network input to the image: the crop (voxels of the oriented grid), and the network's grid."""

    original: Grid
    oriented: Grid
    crop_start_zyx: ZYX
    crop_stop_zyx: ZYX
    resized_shape_zyx: ZYX
    network_spacing_zyx_mm: SpacingZYX


@dataclass(frozen=True)
class PreparedCase:
    """Network input: float32 (C, Z, Y, X), channels in the plan's order, absent ones zero; labels int16 in step."""

    array_czyx: np.ndarray
    present: tuple[str, ...]
    labels_zyx: np.ndarray | None
    geometry: CaseGeometry


def prepare_case(images: dict[str, Volume], plan: DataPlan, labels: Volume | None = None) -> PreparedCase:
    """Orients, crops to the body, normalises and resamples one case.

    Args:
        images: modality -> volume in HU or SUV, all on one grid.
        labels: on the same grid; the crop is widened to hold all of them.

    Raises:
        DatasetError: none of the plan's modalities is there.
    """
    present = tuple(name for name in plan.modalities if name in images)
    if not present:
        raise DatasetError(f"{plan.task} needs {' or '.join(plan.modalities)}; the case has {', '.join(images)}.")
    original = images[present[0]].grid
    turned = {name: _oriented(images[name], plan.orientation) for name in present}
    turned_labels = None if labels is None else _oriented(labels, plan.orientation)
    oriented = turned[present[0]].grid
    nonzero = nonzero_region(turned) if _needs_nonzero(plan) else None
    box = _with_labels(_crop_box(turned, nonzero, plan.conventions.crop), turned_labels)
    cropped: ZYX = tuple(side.stop - side.start for side in box)
    shape = resized_shape(cropped, oriented.spacing_zyx_mm, plan.spacing_zyx_mm)
    array_czyx = np.zeros((len(plan.modalities), *shape), np.float32)
    orders = axis_orders(oriented.spacing_zyx_mm, plan.spacing_zyx_mm, IMAGE_ORDER)
    for name in present:
        inside = None if nonzero is None else nonzero[box]
        network_values = normalise(turned[name].array_zyx[box], plan.intensity[name], inside)
        array_czyx[plan.modalities.index(name)] = resize(network_values[None], shape, orders)[0]
    labels_zyx = None
    if turned_labels is not None:
        label_orders = axis_orders(oriented.spacing_zyx_mm, plan.spacing_zyx_mm, LABEL_ORDER)
        labels_zyx = resize_labels(turned_labels.array_zyx[box], shape, label_orders)
    geometry = CaseGeometry(
        original=original,
        oriented=oriented,
        crop_start_zyx=tuple(side.start for side in box),
        crop_stop_zyx=tuple(side.stop for side in box),
        resized_shape_zyx=shape,
        network_spacing_zyx_mm=plan.spacing_zyx_mm,
    )
    prepared = PreparedCase(array_czyx, present, labels_zyx, geometry)
    return _whole_view(prepared, plan) if plan.view == "volume" else prepared


def preprocess_task(task: Task, plan: DataPlan, destination: Path, processes: int) -> dict[str, str]:
    """Preprocesses every case into the store; what is there and unchanged is kept.

    Returns:
        case id -> reason, for the cases that could not be preprocessed.
    """
    wanted = {case.case_id: case for case in task.cases}
    for stale in set(stored_case_ids(destination)) - set(wanted):
        forget_case(destination, stale)
    recipe = _recipe(plan)
    failed: dict[str, str] = {}
    try:
        with closing(each(_preprocess_case, list(wanted.values()), processes, plan, destination, recipe)) as done:
            for case, outcome in progress_bar(done, "preprocess", lambda pair: pair[0].case_id, len(wanted)):
                if isinstance(outcome, Failure):
                    failed[case.case_id] = str(outcome)
                    forget_case(destination, case.case_id)
                    logger.warning("%s cannot be preprocessed: %s", case.case_id, outcome)
                else:
                    logger.debug("%s: %s", case.case_id, outcome)
    finally:
        sweep_unfinished(destination)
    return {case_id: failed[case_id] for case_id in wanted if case_id in failed}


def plan_and_preprocess(
    task_folder: Path,
    work: Path,
    spec: FoundationSpec,
    *,
    memory_gb: float | None = None,
    on_cpu: bool = True,
    processes: int | None = None,
    spacing_zyx_mm: SpacingZYX | None = None,
    patch_shape_zyx: ZYX | None = None,
    batch_size: int | None = None,
) -> tuple[DataPlan, dict[str, str]]:
    """Checks, fingerprints, plans and preprocesses a task into `work`/preprocessed/<Task>/.

    Args:
        memory_gb: what training may use; None: 2 GB on a CPU (its limit is time), 8 GB on a GPU.
        processes: cases at a time; None: by cores and free memory.
        spacing_zyx_mm, patch_shape_zyx, batch_size: instead of the planned ones.

    Returns:
        The plan, and case id -> reason for the cases that could not be used.

    Raises:
        DatasetError, PlanError: the folder is wrong, no case is usable, or no plan fits.
    """
    task = read_task(task_folder)
    folder = Path(work) / "preprocessed" / task.name
    readers = processes or usable_processes(_MEGABYTES_PER_PROCESS)
    memory_gb = memory_gb or (_CPU_MEMORY_GB if on_cpu else _GPU_MEMORY_GB)
    with folder_lock(folder):
        fingerprint = _fingerprint(task, spec.input.orientation, readers, folder / "fingerprint.json")
        plan = plan_task(task, fingerprint, spec, memory_gb, on_cpu, spacing_zyx_mm, patch_shape_zyx, batch_size)
        write_record(folder / "plan.json", plan)
        unusable = set(fingerprint.failed)
        usable = tuple(case for case in task.cases if case.case_id not in unusable)
        processes = processes or usable_processes(_peak_megabytes(fingerprint, plan))
        failed = preprocess_task(dataclasses.replace(task, cases=usable), plan, folder / "cases", processes)
    return plan, {**fingerprint.failed, **failed}


def _fingerprint(task: Task, orientation: str | None, processes: int, path: Path) -> Fingerprint:
    """The stored fingerprint if no file has changed, else a new one, which is stored."""
    if path.is_file():
        try:
            stored = read_record(path, Fingerprint, DatasetError)
        except DatasetError as problem:  # of another version, or damaged
            logger.info("%s The fingerprint is made again.", problem)
        else:
            if is_current(stored, task, orientation):
                return stored
    fingerprint = fingerprint_task(task, orientation, processes)
    write_record(path, fingerprint)
    return fingerprint


def _peak_megabytes(fingerprint: Fingerprint, plan: DataPlan) -> float:
    """What preprocessing the largest case takes."""
    voxels = 0
    for case in fingerprint.cases:
        resized = resized_shape(case.cropped_shape_zyx, case.spacing_zyx_mm, plan.spacing_zyx_mm)
        voxels = max(voxels, math.prod(case.shape_zyx), math.prod(resized))
    return _EMPTY_PROCESS_MEGABYTES + _PEAK_VOLUMES * 4 * voxels / 2**20


def _oriented(volume: Volume, orientation: str | None) -> Volume:
    return volume if orientation is None else orient(volume, orientation)


def _needs_nonzero(plan: DataPlan) -> bool:
    standardised = any(rule.scheme == "zscore_nonzero" for rule in plan.intensity.values())
    return standardised or plan.conventions.crop == "nonzero"


def _crop_box(images: dict[str, Volume], nonzero_zyx: np.ndarray | None, crop: str) -> tuple[slice, ...]:
    if crop == "nonzero":
        return box_of(nonzero_zyx)
    if crop == "none":
        return tuple(slice(0, size) for size in next(iter(images.values())).array_zyx.shape)
    return body_box(images)


def _with_labels(box: tuple[slice, ...], labels: Volume | None) -> tuple[slice, ...]:
    """The box, widened to hold all labels."""
    if labels is None or not labels.array_zyx.any():
        return box
    widened = []
    for axis, side in enumerate(box):
        others = tuple(other for other in range(3) if other != axis)
        labelled = np.flatnonzero(labels.array_zyx.any(axis=others))
        widened.append(slice(min(side.start, int(labelled[0])), max(side.stop, int(labelled[-1]) + 1)))
    return tuple(widened)


def _whole_view(case: PreparedCase, plan: DataPlan) -> PreparedCase:
    """The case centred in the plan's fixed shape: cut where it is larger, air where it is smaller."""
    source, target = case.array_czyx.shape[1:], plan.patch_shape_zyx
    if source == tuple(target):
        return case
    air = [value if name in case.present else 0.0 for name, value in zip(plan.modalities, plan.air, strict=True)]
    fixed = np.empty((len(air), *target), np.float32)
    fixed[:] = np.array(air, np.float32).reshape(-1, 1, 1, 1)
    into, out_of = [slice(None)], [slice(None)]
    for have, want in zip(source, target, strict=True):
        size = min(have, want)
        into.append(slice((want - size) // 2, (want - size) // 2 + size))
        out_of.append(slice((have - size) // 2, (have - size) // 2 + size))
    fixed[tuple(into)] = case.array_czyx[tuple(out_of)]
    return PreparedCase(fixed, case.present, None, case.geometry)


def _recipe(plan: DataPlan) -> dict[str, Any]:
    """What of a plan decides the stored arrays."""
    whole = to_dict(plan)
    names = ["modalities", "labels", "orientation", "spacing_zyx_mm", "view", "intensity", "patch_shape_zyx"]
    recipe = {name: whole[name] for name in names}
    return recipe if plan.labels is None else recipe | {"label_rule": "largest share"}


def _preprocess_case(case: Case, plan: DataPlan, destination: Path, recipe: dict[str, Any]) -> str:
    """Worker: one case into the store, unless it is there already, made from the same files in the same way."""
    files = {name: sha256_file(path) for name, path in case.images.items()}
    with_labels = plan.labels is not None and case.labels is not None
    digest = sha256_json([recipe, files, sha256_file(case.labels) if with_labels else None])
    if is_sound(destination, case.case_id) and read_meta(destination, case.case_id).get("made_from") == digest:
        return "unchanged"
    images = read_in_units(case)
    labels = check_labels(case, next(iter(images.values())).grid, plan.labels) if with_labels else None
    prepared = prepare_case(images, plan, labels)
    meta = {
        "made_from": digest,
        "present": list(prepared.present),
        "geometry": to_dict(prepared.geometry),
        "foreground": _foreground(prepared.labels_zyx, plan.labels),
    }
    write_case(destination, case.case_id, prepared.array_czyx, prepared.labels_zyx, meta, plan.patch_shape_zyx)
    return "stored"


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
