"""What a task's data look like: the figures that a plan is made from, what is odd, and digests.

Every image is read once, so bad files are found before anything is trained, and one line per case says so. Arrays and
spacings are z, y, x, turned to the foundation's orientation.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Set
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from unicon_pipeline.cohort import (
    Covariate,
    FollowUp,
    LabelFrequency,
    Spread,
    class_counts,
    covariates,
    follow_up,
    label_frequencies,
    remarks,
    spread,
)
from unicon_pipeline.dataset import Labels, Task
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.histogram import Histogram, Tally, percentiles
from unicon_pipeline.measure import CaseFingerprint, Measured, kept_file, measure_case
from unicon_pipeline.progress import progress_bar
from unicon_pipeline.workers import Failure, Workers

_SHOWN_OUTPUTS = 4

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChannelStatistics:
    """All `n` foreground values of one modality over all cases, in its unit (HU, SUV, ...).

    Mean, standard deviation, lowest and highest are exact, and so are percentiles that are whole numbers up to 4096;
    other percentiles are within 0.025 %.
    """

    mean: float
    std: float
    min: float
    max: float
    percentile_00_5: float
    median: float
    percentile_99_5: float
    n: int


@dataclass(frozen=True)
class Fingerprint:
    """All readable cases in the task's order; `failed`: case id -> why the case could not be used.

    `modalities` and `labels`: the task's, as they were. `spacing_spread_mm` and `shape_spread` (voxels, uncropped): of
    the cases. `follow_up`: of prognosis; `class_counts`: of classification. `remarks`: what is odd about the cases
    together, in words.
    """

    task: str
    orientation: str | None
    cases: tuple[CaseFingerprint, ...]
    intensity: dict[str, ChannelStatistics]
    failed: dict[str, str]
    modalities: tuple[str, ...] = ()
    labels: Labels | None = None
    spacing_spread_mm: Spread | None = None
    shape_spread: Spread | None = None
    label_frequencies: dict[str, LabelFrequency] = field(default_factory=dict)
    follow_up: FollowUp | None = None
    class_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    covariates: dict[str, Covariate] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    schema_version: int = 2


def fingerprint_task(
    task: Task,
    orientation: str | None,
    workers: Workers,
    kept: Path | None = None,
    regions: Mapping[str, Path] | None = None,
) -> Fingerprint:
    """Fingerprints every case; a case that cannot be used is recorded in `failed` and does not stop the others.

    Args:
        orientation: as in `measure_case`.
        kept: folder for the cases' measurements. Those of unchanged files are used again; nothing else stays there.
        regions: as in `measure_case`.

    The result depends neither on the `workers` nor on what was kept.

    Raises:
        DatasetError: no case is usable; lists the reasons.
    """
    results: dict[str, Measured] = {}
    failed: dict[str, str] = {}
    pooled = {modality: Tally() for modality in task.modalities}
    shared = task.modalities, task.labels, orientation, kept, regions
    with closing(workers.each(measure_case, task.cases, *shared)) as done:
        for case, outcome in progress_bar(done, "fingerprint", lambda pair: pair[0].case_id, len(task.cases)):
            if isinstance(outcome, Failure):
                failed[case.case_id] = str(outcome)
                _log.warning("%s: %s cannot be used: %s", task.name, case.case_id, outcome)
                continue
            for modality, histogram in outcome.histograms.items():
                pooled[modality].add_histogram(histogram)
            results[case.case_id] = dataclasses.replace(outcome, histograms={})
            _log.info("%s", described(outcome.record))
    if kept is not None:
        _sweep(kept, results.keys())
    order = [case.case_id for case in task.cases]
    failed = {case_id: failed[case_id] for case_id in order if case_id in failed}
    if not results:
        reasons = "\n".join(f"  {case_id}: {reason}" for case_id, reason in failed.items())
        raise DatasetError(f"{task.folder}: no usable case among {len(order)}.\n{reasons}")
    measured = [results[case_id] for case_id in order if case_id in results]
    histograms = {modality: tally.histogram for modality, tally in pooled.items()}
    return _fingerprint(task, orientation, measured, histograms, failed)


def _fingerprint(
    task: Task,
    orientation: str | None,
    measured: list[Measured],
    histograms: dict[str, Histogram],
    failed: dict[str, str],
) -> Fingerprint:
    cases = tuple(one.record for one in measured)
    case_ids = [case.case_id for case in cases]
    seen = {modality for case in cases for modality in case.modalities}
    return Fingerprint(
        task=task.name,
        orientation=orientation,
        cases=cases,
        intensity={name: _statistics(histogram) for name, histogram in histograms.items() if name in seen},
        failed=failed,
        modalities=task.modalities,
        labels=task.labels,
        spacing_spread_mm=spread([case.spacing_zyx_mm for case in cases]),
        shape_spread=spread([case.shape_zyx for case in cases]),
        label_frequencies=label_frequencies(cases, task.labels),
        follow_up=follow_up(task, case_ids),
        class_counts=class_counts(task, case_ids),
        covariates=covariates(task, case_ids),
        remarks=tuple(remarks(task, measured)),
    )


def described(case: CaseFingerprint) -> str:
    """One line for a person: what a case is, and whether it is odd."""
    shape = " x ".join(str(size) for size in case.shape_zyx)
    spacing = " x ".join(f"{size:.3g}" for size in case.spacing_zyx_mm)
    shown = [_volume(name, ml, case.label_parts.get(name)) for name, ml in case.label_ml.items() if ml]
    more = len(shown) - _SHOWN_OUTPUTS
    shown = shown[:_SHOWN_OUTPUTS] + ([f"{more} more"] if more > 0 else [])
    verdict = f"odd: {'; '.join(case.oddities)}" if case.oddities else "ok"
    return "  ".join(
        [case.case_id, verdict, "+".join(case.modalities), shape, f"{spacing} mm", *filter(None, [", ".join(shown)])]
    )


def _volume(name: str, ml: float, parts: int | None) -> str:
    text = f"{name} {ml:.1f} ml" if ml >= 1 else f"{name} {ml:.2g} ml"
    return text if parts is None else f"{text} in {parts} part{'s' * (parts != 1)}"


def _sweep(kept: Path, case_ids: Set[str]) -> None:
    """Removes what is of no usable case, and what a killed process left half-written."""
    wanted = {kept_file(kept, case_id) for case_id in case_ids}
    for path in set(Path(kept).glob("*")) - wanted:
        path.unlink()


def _statistics(histogram: Histogram) -> ChannelStatistics:
    moments, (low, median, high) = histogram.moments, percentiles(histogram, (0.5, 50, 99.5))
    mean = moments.total / max(1, moments.n)
    return ChannelStatistics(
        mean=mean,
        std=math.sqrt(max(0.0, moments.squares / max(1, moments.n) - mean * mean)),
        min=moments.low,
        max=moments.high,
        percentile_00_5=low,
        median=median,
        percentile_99_5=high,
        n=moments.n,
    )
