"""The data plan: spacing, patch, batch, intensity and folds, each with its reason in words.

Nothing is timed: what a machine can do comes from a table, so one machine always gives the same plan.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from unicon_pipeline.budget import TRAINING_PASSES, Costs, Machine, needed_gb, training_costs
from unicon_pipeline.contract import ZYX, Conventions, FoundationSpec, IntensityRule, SpacingZYX
from unicon_pipeline.dataset import Labels, Task
from unicon_pipeline.decisions import Decision, format_decisions
from unicon_pipeline.errors import PlanError
from unicon_pipeline.fingerprint import Fingerprint
from unicon_pipeline.folds import patient_folds
from unicon_pipeline.input_shape import (
    NO_OVERRIDES,
    InputShape,
    Overrides,
    checked,
    choose_batch,
    choose_shape,
    shown,
    shown_mm,
)
from unicon_pipeline.intensity import normalised_air, rules_for
from unicon_pipeline.records import sha256_json, to_dict
from unicon_pipeline.tables import enumerated

_FOLDS = 5
NOMINAL_STEPS = 1500  # of training, for the estimate; the extension plan sets the real number

_READ_VOXELS_PER_SECOND = 5e6  # decompressing, cropping, resizing there and back
_VIEW_REASONS = {
    "patch": "each voxel is labelled: sliding window at full detail",
    "volume": "one answer per case: the whole field of view is one input",
    "region": "one answer per case: the crop around what {} marks is one input; its mask and its figures go with it",
}


@dataclass(frozen=True)
class DataPlan:
    """How a task's cases become network input.

    `foundation` and `fingerprint_sha256` are digests of what the plan was made from. `view`: "patch" (sliding window)
    or "volume" (one input of `patch_shape_zyx` a case: the whole field of view, or the crop around its `region`, which
    that segmentation task of the same model finds). `labels`: of a segmentation task. `median_shape_zyx`: of the
    cropped cases, or of the crops around regions, at `spacing_zyx_mm`. `folds`: validation case ids per fold. Estimates
    are for the planning machine.
    """

    task: str
    task_type: str
    modalities: tuple[str, ...]
    labels: Labels | None
    foundation: str
    orientation: str | None
    spacing_zyx_mm: SpacingZYX
    view: str
    patch_shape_zyx: ZYX
    batch_size: int
    intensity: dict[str, IntensityRule]
    median_shape_zyx: ZYX
    folds: tuple[tuple[str, ...], ...]
    memory_gb: float
    estimated_memory_gb: float
    estimated_minutes_to_train: float
    estimated_seconds_per_case: float
    decisions: tuple[Decision, ...]
    fingerprint_sha256: str
    conventions: Conventions = Conventions()
    region: str | None = None
    schema_version: int = 1

    @property
    def air(self) -> tuple[float, ...]:
        """What lies outside an image, as network input, in the order of the modalities."""
        if self.conventions.padding == "zero":
            return (0.0,) * len(self.modalities)
        return tuple(normalised_air(self.intensity[name], name) for name in self.modalities)


def plan_task(
    task: Task,
    fingerprint: Fingerprint,
    spec: FoundationSpec,
    machine: Machine,
    overrides: Overrides = NO_OVERRIDES,
) -> DataPlan:
    """Plans a task.

    Args:
        fingerprint: of the same task, in the foundation's orientation.
        machine: what will train.
        overrides: go before the rules, and are recorded as set by the user.

    Raises:
        PlanError: no plan fits the memory or the contract, an override is invalid, or the targets allow no training.
    """
    overrides = checked(overrides, spec.input)
    _check_inputs(task, fingerprint, spec, machine)
    intensity = rules_for(task.modalities, spec.input, task.intensity)
    view = "patch" if task.task_type == "segmentation" else "volume"
    costs = training_costs(spec, task.modalities, view, machine)
    shape_by = fingerprint, spec.input, overrides, costs.budget, machine.on_cpu
    geometry = choose_shape(view, *shape_by, around_region=task.region is not None)
    batch, batch_reason = choose_batch(geometry, costs.budget, len(fingerprint.cases), overrides)
    memory, minutes, seconds, estimates = _estimates(geometry, batch, costs, fingerprint, view, machine, task.region)
    folds, folds_reason = _folds(task, fingerprint, overrides)
    return DataPlan(
        task=task.name,
        task_type=task.task_type,
        modalities=task.modalities,
        labels=task.labels if task.task_type == "segmentation" else None,
        foundation=contract_digest(spec),
        orientation=spec.input.orientation,
        spacing_zyx_mm=geometry.spacing,
        view=view,
        patch_shape_zyx=geometry.shape,
        batch_size=batch,
        intensity=intensity,
        median_shape_zyx=geometry.median,
        folds=folds,
        memory_gb=float(machine.memory_gb),
        estimated_memory_gb=memory,
        estimated_minutes_to_train=minutes,
        estimated_seconds_per_case=seconds,
        decisions=(
            *_data_decisions(task, fingerprint, spec, intensity),
            *_geometry_decisions(task, fingerprint, geometry, view),
            Decision("batch", str(batch), batch_reason),
            Decision("folds", str(len(folds)), folds_reason),
            *estimates,
        ),
        fingerprint_sha256=sha256_json(to_dict(fingerprint)),
        region=task.region,
    )


def contract_digest(spec: FoundationSpec) -> str:
    """Digest of what a plan depends on: the declaration without origin and licence."""
    declared = to_dict(spec)
    return sha256_json({key: declared[key] for key in declared.keys() - {"provenance", "licence", "load_report"}})


def format_plan(plan: DataPlan) -> str:
    """The plan's decisions as a table."""
    return format_decisions(f"Plan of {plan.task} ({plan.task_type})", plan.decisions)


def _check_inputs(task: Task, fingerprint: Fingerprint, spec: FoundationSpec, machine: Machine) -> None:
    if not (math.isfinite(machine.memory_gb) and machine.memory_gb > 0):
        raise PlanError(f"The memory must be a positive number of GB, found {machine.memory_gb}.")
    if fingerprint.task != task.name or fingerprint.orientation != spec.input.orientation:
        raise PlanError(
            f"The fingerprint is of {fingerprint.task} in orientation {fingerprint.orientation}; expected {task.name} "
            f"in {spec.input.orientation}. Make the fingerprint again."
        )
    if not fingerprint.cases:
        raise PlanError(f"{task.folder}: no usable case to plan with.")
    if task.region and not any(case.bulk_shape_zyx for case in fingerprint.cases):
        raise PlanError(
            f"{task.folder}: the task looks at what {task.region} marks, and no usable case shows any of it. Expected "
            f"labels in labelsTr/, or a model whose task {task.region} finds it. Else remove region from dataset.json."
        )
    if task.task_type == "prognosis" and task.targets is not None and "event" in task.targets.columns:
        usable = {case.case_id for case in fingerprint.cases}
        rows = zip(task.targets.case_ids, task.targets.columns["event"])
        if not any(event for case_id, event in rows if case_id in usable):
            raise PlanError(f"{task.folder / 'targets.csv'}: no usable case has an event, so no risk can be learned.")


def _folds(task: Task, fingerprint: Fingerprint, overrides: Overrides) -> tuple[tuple[tuple[str, ...], ...], str]:
    """Validation case ids of each fold, of the cases that can be used; and why so many."""
    usable = {case.case_id for case in fingerprint.cases}
    cases = tuple(case for case in task.cases if case.case_id in usable)
    folds = patient_folds(dataclasses.replace(task, cases=cases), overrides.folds or _FOLDS)
    reason = f"min({_FOLDS}, patients)"
    if overrides.folds:
        reason = "set by the user" + ("" if len(folds) == overrides.folds else f" to {overrides.folds}; one a patient")
    reason += "; a patient is never split"
    return folds, reason + ("" if task.targets is None else "; outcomes spread evenly")


def _estimates(
    geometry: InputShape,
    batch: int,
    costs: Costs,
    fingerprint: Fingerprint,
    view: str,
    machine: Machine,
    region: str | None,
) -> tuple[float, float, float, tuple[Decision, ...]]:
    """Memory in GB, minutes to train, seconds a case, and their rows; PlanError when the memory does not suffice."""
    voxels = math.prod(geometry.shape)
    memory, memory_gb = _rounded(needed_gb(costs, voxels, batch)), machine.memory_gb
    if memory > memory_gb:
        raise PlanError(
            f"Training on {shown(geometry.shape)} voxels in batches of {batch} needs about {memory:g} GB, and "
            f"{memory_gb:g} GB were allowed. Allow more memory, or choose a smaller patch, batch or a coarser spacing."
        )
    tiles = 1
    for size, edge in zip(geometry.median, geometry.shape):
        tiles *= math.ceil(max(0, size - edge) / (edge / 2)) + 1 if view == "patch" else 1
    pass_seconds = voxels * costs.macs * 2 / costs.flops
    original = statistics.median(math.prod(case.shape_zyx) for case in fingerprint.cases)
    minutes = _rounded(NOMINAL_STEPS * batch * pass_seconds * TRAINING_PASSES / 60)
    seconds = _rounded(tiles * pass_seconds + original / _READ_VOXELS_PER_SECOND)
    before = f"; what {region} takes to find the region comes on top" if region else ""
    speed = f"{costs.flops / 1e9:.0f} GFLOP/s expected of a {costs.machine}"
    return memory, minutes, seconds, (
        Decision("machine", f"{'CPU' if machine.on_cpu else 'GPU'}, {memory_gb:g} GB for training", machine.source),
        Decision("memory", f"{memory:g} of {memory_gb:g} GB", f"{costs.elements:.0f} feature maps per input voxel"),
        Decision("training time", f"{minutes:g} min", f"{NOMINAL_STEPS} steps, {speed}"),
        Decision("time per case", f"{seconds:g} s", f"{tiles} input{'s' * (tiles > 1)} and reading{before}"),
    )


def _data_decisions(
    task: Task, fingerprint: Fingerprint, spec: FoundationSpec, intensity: dict[str, IntensityRule]
) -> Iterator[Decision]:
    cases, failed = len(fingerprint.cases), fingerprint.failed
    left_out = f"left out: {', '.join(failed)}" if failed else "all usable"
    yield Decision("cases", f"{cases} of {cases + len(failed)}", left_out)
    odd = sum(bool(case.oddities) for case in fingerprint.cases)
    told = list(fingerprint.remarks) or ([] if odd else ["nothing about the cases is odd"])
    yield Decision("remarks", f"{odd} odd cases", "; ".join(told) or "each told above, and in fingerprint.json")
    if follow_up := fingerprint.follow_up:
        median = follow_up.median_follow_up_days
        seen = "" if median is None else f"; median follow-up {median:.0f} days"
        times = f"events from day {follow_up.event_days[0]:.0f} to {follow_up.event_days[-1]:.0f}"
        yield Decision("outcome", f"{follow_up.events} events of {follow_up.cases}", times + seen)
    names = dict.fromkeys(name for case in fingerprint.cases for name in case.label_voxels)
    unseen = [name for name in names if not any(case.label_voxels.get(name) for case in fingerprint.cases)]
    if unseen and task.task_type == "segmentation":
        yield Decision("labels", f"{len(unseen)} never seen", f"no case shows {', '.join(unseen)}: nothing to learn")
    yield Decision("orientation", spec.input.orientation or "as stored", "the foundation's")
    for modality, rule in intensity.items():
        source = "the foundation's rule" if modality in spec.input.intensity else "a fixed scale for all images"
        source = "declared; standardised per image" if rule.scheme == "zscore" else source
        found = fingerprint.intensity.get(modality)
        if found is not None and found.n:
            source += f"; foreground {found.percentile_00_5:.3g} to {found.percentile_99_5:.3g}"
            source += f", median {found.median:.3g}"
        yield Decision(modality, f"{rule.scheme}, {rule.unit}", source)


def _geometry_decisions(
    task: Task, fingerprint: Fingerprint, geometry: InputShape, view: str
) -> Iterator[Decision]:
    yield Decision("view", view, _VIEW_REASONS["region" if task.region else view].format(task.region))
    if task.region:
        without = [case.case_id for case in fingerprint.cases if not case.bulk_shape_zyx]
        cases = len(fingerprint.cases)
        told = "every case shows it"
        if without:
            told = f"the middle of the body is looked at, with no figures of a region, in {enumerated(without)}"
        yield Decision("region", f"{cases - len(without)} of {cases} cases", told)
    yield Decision("spacing z y x", shown_mm(geometry.spacing), geometry.spacing_reason)
    if not task.region:
        yield Decision("median shape", shown(geometry.median), "of the cases, cropped to the body, at this spacing")
    yield Decision("patch" if view == "patch" else "input", shown(geometry.shape), geometry.shape_reason)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
