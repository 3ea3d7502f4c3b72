"""What a task's data look like: the figures that a plan is made from, each case's oddities, and digests.

Every image is read once, here, so bad files are found before anything is trained. Labels and images are checked,
turned to the foundation's orientation and measured; arrays and spacings are z, y, x.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from unicon_pipeline.contract import ZYX, SpacingZYX
from unicon_pipeline.dataset import Case, Labels, Task, check_labels
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.geometry import Volume, orient
from unicon_pipeline.intensity import body_box, body_mask, read_in_units
from unicon_pipeline.progress import progress_bar
from unicon_pipeline.records import sha256_file
from unicon_pipeline.resize import ANISOTROPY
from unicon_pipeline.workers import Failure, Workers

SAMPLES_PER_CASE = 10_000
SMALL_AXIS_VOXELS = 8

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChannelStatistics:
    """Foreground values of one modality over all cases, in its unit (HU, SUV, ...); `n` values were sampled."""

    mean: float
    std: float
    min: float
    max: float
    percentile_00_5: float
    median: float
    percentile_99_5: float
    n: int


@dataclass(frozen=True)
class CaseFingerprint:
    """One case after orientation, z y x.

    `cropped_shape_zyx`: of the body box. `label_voxels`: voxels per output name (regions may overlap).
    `oddities`: remarks in words. `images_sha256`: modality -> digest of the file; `labels_sha256` likewise.
    """

    case_id: str
    modalities: tuple[str, ...]
    shape_zyx: ZYX
    cropped_shape_zyx: ZYX
    spacing_zyx_mm: SpacingZYX
    label_voxels: dict[str, int]
    oddities: tuple[str, ...]
    images_sha256: dict[str, str]
    labels_sha256: str | None


@dataclass(frozen=True)
class Fingerprint:
    """All readable cases in the task's order; `failed`: case id -> why the case could not be used.

    `modalities` and `labels`: the task's, as they were.
    """

    task: str
    orientation: str | None
    cases: tuple[CaseFingerprint, ...]
    intensity: dict[str, ChannelStatistics]
    failed: dict[str, str]
    modalities: tuple[str, ...] = ()
    labels: Labels | None = None
    schema_version: int = 1


def fingerprint_case(
    case: Case, task: Task, orientation: str | None
) -> tuple[CaseFingerprint, dict[str, np.ndarray]]:
    """Reads, checks and measures one case.

    Args:
        orientation: such as "LPS", see `InputContract`; None leaves images as stored.

    Returns:
        The fingerprint, and per modality up to 10 000 values (float32) of the same foreground voxels: of all labels,
        or of the body where the case has none. The choice depends on the case's name alone.

    Raises:
        DatasetError: an image or the label map is unusable; the message names the file.
    """
    images = read_in_units(case)
    labels = None
    if task.labels is not None and case.labels is not None:
        labels = check_labels(case, next(iter(images.values())).grid, task.labels)
    if orientation is not None:
        images = {modality: orient(volume, orientation) for modality, volume in images.items()}
        labels = orient(labels, orientation) if labels is not None else None
    grid = next(iter(images.values())).grid
    box = body_box(images)
    voxels = _label_voxels(labels, task.labels)
    images_sha256, labels_sha256 = _digests(case, task)
    record = CaseFingerprint(
        case_id=case.case_id,
        modalities=tuple(images),
        shape_zyx=grid.shape_zyx,
        cropped_shape_zyx=tuple(side.stop - side.start for side in box),
        spacing_zyx_mm=grid.spacing_zyx_mm,
        label_voxels=voxels,
        oddities=tuple(_oddities(images, task, box, labels, voxels)),
        images_sha256=images_sha256,
        labels_sha256=labels_sha256,
    )
    return record, _foreground_values(case.case_id, images, labels, task.labels)


def fingerprint_task(task: Task, orientation: str | None, workers: Workers) -> Fingerprint:
    """Fingerprints every case; a case that cannot be used is recorded in `failed` and does not stop the others.

    Args:
        orientation: as in `fingerprint_case`.

    The result does not depend on the `workers`.

    Raises:
        DatasetError: no case is usable; lists the reasons.
    """
    results: dict[str, tuple[CaseFingerprint, dict[str, np.ndarray]]] = {}
    failed: dict[str, str] = {}
    done = workers.each(fingerprint_case, task.cases, task, orientation)
    for case, outcome in progress_bar(done, "fingerprint", lambda pair: pair[0].case_id, len(task.cases)):
        if isinstance(outcome, Failure):
            failed[case.case_id] = str(outcome)
            _log.warning("%s: %s cannot be used: %s", task.name, case.case_id, outcome)
        else:
            results[case.case_id] = outcome
    order = [case.case_id for case in task.cases]
    failed = {case_id: failed[case_id] for case_id in order if case_id in failed}
    if not results:
        reasons = "\n".join(f"  {case_id}: {reason}" for case_id, reason in failed.items())
        raise DatasetError(f"{task.folder}: no usable case among {len(order)}.\n{reasons}")
    usable = [results[case_id] for case_id in order if case_id in results]
    statistics = {}
    for modality in task.modalities:
        values = [samples[modality] for _, samples in usable if modality in samples]
        if values:
            statistics[modality] = _statistics(np.concatenate(values))
    records = tuple(record for record, _ in usable)
    return Fingerprint(task.name, orientation, records, statistics, failed, task.modalities, task.labels)


def is_current(fingerprint: Fingerprint, task: Task, orientation: str | None) -> bool:
    """Whether a fingerprint would come out the same: same task, same files by their digests, and none that failed."""
    described = (fingerprint.task, fingerprint.orientation, fingerprint.modalities, fingerprint.labels)
    if described != (task.name, orientation, task.modalities, task.labels):
        return False
    found = [(record.case_id, record.images_sha256, record.labels_sha256) for record in fingerprint.cases]
    if [case_id for case_id, _, _ in found] != [case.case_id for case in task.cases]:
        return False
    return all(_digests(case, task) == tuple(digests) for case, (_, *digests) in zip(task.cases, found))


def _digests(case: Case, task: Task) -> tuple[dict[str, str], str | None]:
    labelled = task.labels is not None and case.labels is not None
    images = {modality: sha256_file(path) for modality, path in case.images.items()}
    return images, sha256_file(case.labels) if labelled else None


def _label_voxels(labels: Volume | None, declared: Labels | None) -> dict[str, int]:
    if labels is None or declared is None:
        return {}
    counts = np.bincount(labels.array_zyx.reshape(-1))
    return {
        name: int(sum(counts[value] for value in values if value < len(counts)))
        for name, values in zip(declared.names, declared.values)
    }


def _foreground(labels: Volume | None, declared: Labels | None) -> np.ndarray | None:
    """Voxels of any output as a mask, or None where there are none."""
    if labels is None or declared is None:
        return None
    wanted = sorted({value for values in declared.values for value in values})
    mask = np.isin(labels.array_zyx, wanted)
    return mask if mask.any() else None


def _oddities(
    images: dict[str, Volume],
    task: Task,
    box: tuple[slice, slice, slice],
    labels: Volume | None,
    voxels: dict[str, int],
) -> Iterator[str]:
    grid = next(iter(images.values())).grid
    missing = [modality for modality in task.modalities if modality not in images]
    if missing:
        yield f"no {', '.join(missing)}"
    if min(grid.shape_zyx) < SMALL_AXIS_VOXELS:
        yield f"only {min(grid.shape_zyx)} voxels along an axis"
    if max(grid.spacing_zyx_mm) > ANISOTROPY * min(grid.spacing_zyx_mm):
        yield f"voxels {max(grid.spacing_zyx_mm) / min(grid.spacing_zyx_mm):.1f} times longer than wide"
    if task.labels is not None and labels is None:
        yield "no label file"
    if voxels and not any(voxels.values()):
        yield "nothing is labelled"
    mask = _foreground(labels, task.labels)
    if mask is not None:
        outside = int(mask.sum() - mask[box].sum())
        if outside:
            yield f"{outside} labelled voxels lie outside the body, where a prediction does not look"


def _foreground_values(
    case_id: str, images: dict[str, Volume], labels: Volume | None, declared: Labels | None
) -> dict[str, np.ndarray]:
    mask = _foreground(labels, declared)
    if mask is None:
        modality = "CT" if "CT" in images else next(iter(images))
        mask = body_mask(images[modality].array_zyx, modality)
    rng = np.random.default_rng(zlib.crc32(case_id.encode("utf-8")))
    chosen = _chosen_voxels(mask.reshape(-1), rng)
    return {modality: volume.array_zyx.reshape(-1)[chosen] for modality, volume in images.items()}


def _chosen_voxels(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Up to 10 000 distinct positions of true voxels in a flat mask, without listing all of a large body."""
    drawn = np.unique(rng.integers(0, mask.size, 20 * SAMPLES_PER_CASE))
    hits = drawn[mask[drawn]]
    if len(hits) < SAMPLES_PER_CASE:
        hits = np.flatnonzero(mask)
    if len(hits) > SAMPLES_PER_CASE:
        hits = np.sort(rng.choice(hits, SAMPLES_PER_CASE, replace=False))
    return hits


def _statistics(values: np.ndarray) -> ChannelStatistics:
    if values.size == 0:
        return ChannelStatistics(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)
    low, median, high = (float(value) for value in np.percentile(values, (0.5, 50, 99.5)))
    return ChannelStatistics(
        mean=float(values.mean(dtype=np.float64)),
        std=float(values.std(dtype=np.float64)),
        min=float(values.min()),
        max=float(values.max()),
        percentile_00_5=low,
        median=median,
        percentile_99_5=high,
        n=int(values.size),
    )
