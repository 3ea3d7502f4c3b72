"""The data plan: spacing, patch, batch, intensity and folds, each with its reason in words.

The rules are nnU-Net's published ones, applied to the foundation's declared feature maps, within its input contract.
Nothing is timed: what a machine can do comes from a table, so one machine always gives the same plan.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from unicon_pipeline.budget import MIN_BATCH, TRAINING_PASSES, Costs, needed_gb, training_costs
from unicon_pipeline.contract import ZYX, Conventions, FoundationSpec, IntensityRule, SpacingZYX
from unicon_pipeline.dataset import Labels, Task, patient_folds
from unicon_pipeline.decisions import Decision, format_decisions
from unicon_pipeline.errors import PlanError
from unicon_pipeline.fingerprint import Fingerprint
from unicon_pipeline.intensity import normalised_air, rules_for
from unicon_pipeline.records import sha256_json, to_dict
from unicon_pipeline.resize import ANISOTROPY, resized_shape

NOMINAL_STEPS = 1500  # of training, for the estimate; the extension plan sets the real number

_INITIAL_EDGE, _DATASET_SHARE, _COVERAGE, _COARSER = 256, 0.05, 0.25, 1.03  # nnU-Net's
_READ_VOXELS_PER_SECOND = 5e6  # decompressing, cropping, resizing there and back
_VIEW_REASONS = {
    "patch": "each voxel is labelled: sliding window at full detail",
    "volume": "one answer per case: the whole field of view is one input",
}


@dataclass(frozen=True)
class DataPlan:
    """How a task's cases become network input.

    `foundation` and `fingerprint_sha256` are digests of what the plan was made from. `view`: "patch" (sliding window)
    or "volume" (the whole field of view is one input of `patch_shape_zyx`). `median_shape_zyx`: of the cropped cases
    at `spacing_zyx_mm`. `folds`: validation case ids per fold. Estimates are for the planning machine.
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
    schema_version: int = 1

    @property
    def air(self) -> tuple[float, ...]:
        """What lies outside an image, as network input, in the order of the modalities."""
        if self.conventions.padding == "zero":
            return (0.0,) * len(self.modalities)
        return tuple(normalised_air(self.intensity[name], name) for name in self.modalities)


@dataclass(frozen=True)
class _Geometry:
    spacing: SpacingZYX
    spacing_reason: str
    shape: ZYX
    shape_reason: str
    median: ZYX


@dataclass(frozen=True)
class _Wishes:
    """What the foundation or the user fixed, and who did; None leaves it to the rules."""

    spacing: SpacingZYX | None
    spacing_reason: str
    shape: ZYX | None
    shape_reason: str
    batch: int | None


def plan_task(
    task: Task,
    fingerprint: Fingerprint,
    spec: FoundationSpec,
    memory_gb: float,
    on_cpu: bool,
    spacing_zyx_mm: SpacingZYX | None = None,
    patch_shape_zyx: ZYX | None = None,
    batch_size: int | None = None,
) -> DataPlan:
    """Plans a task.

    Args:
        fingerprint: of the same task, in the foundation's orientation.
        memory_gb: memory for training, in GB.
        on_cpu: plan for a CPU, where time is the limit.
        spacing_zyx_mm, patch_shape_zyx, batch_size: override the rules, and are recorded as set by the user.

    Raises:
        PlanError: no plan fits the memory or the contract, an override is invalid, or the targets allow no training.
    """
    wishes = _wishes(spec, memory_gb, spacing_zyx_mm, patch_shape_zyx, batch_size)
    _check_inputs(task, fingerprint, spec)
    intensity = rules_for(task.modalities, spec.input, task.intensity)
    view = "patch" if task.task_type == "segmentation" else "volume"
    costs = training_costs(spec, task.modalities, view, memory_gb, on_cpu)
    choose = _patch_view if view == "patch" else _volume_view
    geometry = choose(fingerprint, spec.input.divisible_by_zyx, wishes, costs.budget, on_cpu)
    batch, batch_reason = _batch(geometry, costs.budget, len(fingerprint.cases), wishes)
    memory, minutes, seconds, estimates = _estimates(geometry, batch, costs, fingerprint, view, memory_gb)
    usable = {case.case_id for case in fingerprint.cases}
    folds = patient_folds(dataclasses.replace(task, cases=tuple(c for c in task.cases if c.case_id in usable)))
    return DataPlan(
        task=task.name,
        task_type=task.task_type,
        modalities=task.modalities,
        labels=task.labels,
        foundation=contract_digest(spec),
        orientation=spec.input.orientation,
        spacing_zyx_mm=geometry.spacing,
        view=view,
        patch_shape_zyx=geometry.shape,
        batch_size=batch,
        intensity=intensity,
        median_shape_zyx=geometry.median,
        folds=folds,
        memory_gb=float(memory_gb),
        estimated_memory_gb=memory,
        estimated_minutes_to_train=minutes,
        estimated_seconds_per_case=seconds,
        decisions=(
            *_data_decisions(fingerprint, spec, intensity),
            *_geometry_decisions(geometry, view),
            Decision("batch", str(batch), batch_reason),
            Decision("folds", str(len(folds)), "min(5, patients); a patient is never split"),
            *estimates,
        ),
        fingerprint_sha256=sha256_json(to_dict(fingerprint)),
    )


def contract_digest(spec: FoundationSpec) -> str:
    """Digest of what a plan depends on: the declaration without origin and licence."""
    declared = to_dict(spec)
    return sha256_json({key: declared[key] for key in declared.keys() - {"provenance", "licence", "load_report"}})


def format_plan(plan: DataPlan) -> str:
    """The plan's decisions as a table."""
    return format_decisions(f"Plan of {plan.task} ({plan.task_type})", plan.decisions)


def _wishes(
    spec: FoundationSpec, memory_gb: float, spacing: SpacingZYX | None, patch: ZYX | None, batch: int | None
) -> _Wishes:
    contract = spec.input
    if not (math.isfinite(memory_gb) and memory_gb > 0):
        raise PlanError(f"The memory must be a positive number of GB, found {memory_gb}.")
    if spacing is not None:
        spacing = tuple(float(value) for value in spacing)
        if len(spacing) != 3 or not all(math.isfinite(value) and value > 0 for value in spacing):
            raise PlanError(f"The spacing must be three positive numbers (z y x, mm), found {spacing}.")
        if contract.spacing_zyx_mm not in (None, spacing):
            raise PlanError(
                f"The foundation expects a spacing of {_mm(contract.spacing_zyx_mm)}, not {_mm(spacing)}. "
                "Leave the spacing out."
            )
    if patch is not None:
        patch = tuple(int(size) for size in patch)
        divisors = contract.divisible_by_zyx
        if len(patch) != 3 or any(size < 1 or size % by for size, by in zip(patch, divisors)):
            raise PlanError(f"The patch {patch} (z y x) must be positive multiples of {divisors}.")
        if contract.fixed_shape_zyx not in (None, patch):
            raise PlanError(f"The foundation works only on inputs of {contract.fixed_shape_zyx}. Leave the patch out.")
    if batch is not None and batch < 1:
        raise PlanError(f"The batch size must be at least 1, found {batch}.")
    spacing_reason = "the foundation's own" if contract.spacing_zyx_mm else "set by the user"
    shape_reason = "the only shape that the foundation takes" if contract.fixed_shape_zyx else "set by the user"
    return _Wishes(
        contract.spacing_zyx_mm or spacing, spacing_reason, contract.fixed_shape_zyx or patch, shape_reason, batch
    )


def _check_inputs(task: Task, fingerprint: Fingerprint, spec: FoundationSpec) -> None:
    if fingerprint.task != task.name or fingerprint.orientation != spec.input.orientation:
        raise PlanError(
            f"The fingerprint is of {fingerprint.task} in orientation {fingerprint.orientation}; expected {task.name} "
            f"in {spec.input.orientation}. Make the fingerprint again."
        )
    if not fingerprint.cases:
        raise PlanError(f"{task.folder}: no usable case to plan with.")
    if task.task_type == "prognosis" and task.targets is not None and "event" in task.targets.columns:
        usable = {case.case_id for case in fingerprint.cases}
        rows = zip(task.targets.case_ids, task.targets.columns["event"])
        if not any(event for case_id, event in rows if case_id in usable):
            raise PlanError(f"{task.folder / 'targets.csv'}: no usable case has an event, so no risk can be learned.")


def _target_spacing(fingerprint: Fingerprint) -> tuple[SpacingZYX, str]:
    """nnU-Net's: the median, but the 10th percentile on an axis that is far coarser and has far fewer voxels."""
    spacings = np.array([case.spacing_zyx_mm for case in fingerprint.cases])
    shapes = np.array([case.cropped_shape_zyx for case in fingerprint.cases])
    target, size = np.median(spacings, axis=0), np.median(shapes, axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    coarse = target[worst] > ANISOTROPY * target[others].max()
    reason = f"median of {len(spacings)} cases"
    if coarse and size[worst] * ANISOTROPY < size[others].min():
        target[worst] = max(np.percentile(spacings[:, worst], 10), target[others].max())
        reason += f"; 10th percentile on the coarse axis {'zyx'[worst]}"
    z, y, x = (float(value) for value in target)
    return (z, y, x), reason


def _median_shape(fingerprint: Fingerprint, spacing: SpacingZYX) -> ZYX:
    shapes = [resized_shape(case.cropped_shape_zyx, case.spacing_zyx_mm, spacing) for case in fingerprint.cases]
    z, y, x = (int(round(value)) for value in np.median(shapes, axis=0))
    return z, y, x


def _patch(spacing: SpacingZYX, median: ZYX, fits: float, divisors: ZYX) -> ZYX:
    """nnU-Net's: cubic in mm, at most the median shape, then the relatively largest axis shrinks until it fits."""
    scale = _INITIAL_EDGE * math.prod(spacing) ** (1 / 3)
    patch = [_up(min(round(scale / s), size), by) for s, size, by in zip(spacing, median, divisors)]
    while math.prod(patch) > fits:
        shrinkable = [axis for axis in range(3) if patch[axis] > divisors[axis]]
        if not shrinkable:
            break
        axis = max(shrinkable, key=lambda a: patch[a] / median[a])
        patch[axis] -= divisors[axis]
    return _two_positions(patch, divisors)


def _two_positions(shape: Sequence[int], divisors: ZYX) -> ZYX:
    """The shape, doubled along x if its coarsest feature map had a single position, over which no norm is defined."""
    z, y, x = shape
    return (z, y, 2 * x) if tuple(shape) == tuple(divisors) else (z, y, x)


def _coarsened(spacing: SpacingZYX) -> SpacingZYX:
    """One step of 3 %: the finer axes up to the coarsest one; once all are equal, all of them."""
    coarsest = max(spacing)
    if min(spacing) == coarsest:
        coarsest *= _COARSER
    z, y, x = (min(coarsest, value * _COARSER) for value in spacing)
    return z, y, x


def _patch_view(
    fingerprint: Fingerprint, divisors: ZYX, wishes: _Wishes, budget: float, on_cpu: bool
) -> _Geometry:
    spacing, reason = (wishes.spacing, wishes.spacing_reason) if wishes.spacing else _target_spacing(fingerprint)
    median = _median_shape(fingerprint, spacing)
    patch = wishes.shape or _patch(spacing, median, budget, divisors)
    covered = math.prod(patch) / math.prod(median)
    if on_cpu and wishes.spacing is None and covered < _COVERAGE:
        reason = (
            f"{_mm(spacing)} is the {reason}, but a patch that a CPU can train would cover only {covered:.0%} of a "
            f"case ({_shape(patch)} of {_shape(median)}): the finer axes coarser in 3 % steps up to {_COVERAGE:.0%}"
        )
        while math.prod(patch) < _COVERAGE * math.prod(median):
            spacing = _coarsened(spacing)
            median = _median_shape(fingerprint, spacing)
            patch = wishes.shape or _patch(spacing, median, budget, divisors)
    limit = "a CPU trains in reasonable time" if on_cpu else "fits the memory"
    patch_reason = wishes.shape_reason if wishes.shape else f"the largest in the median's proportions that {limit}"
    return _Geometry(spacing, reason, patch, patch_reason, median)


def _volume_view(
    fingerprint: Fingerprint, divisors: ZYX, wishes: _Wishes, budget: float, on_cpu: bool
) -> _Geometry:
    sides = [np.multiply(case.cropped_shape_zyx, case.spacing_zyx_mm) for case in fingerprint.cases]
    field = [float(side) for side in np.median(sides, axis=0)]

    def shape_at(spacing: SpacingZYX) -> ZYX:
        z, y, x = (_up(math.ceil(side / s - 1e-6), by) for side, s, by in zip(field, spacing, divisors))
        return z, y, x

    if wishes.spacing:
        spacing, reason = wishes.spacing, wishes.spacing_reason
    elif wishes.shape:
        z, y, x = (side / size for side, size in zip(field, wishes.shape))
        spacing, reason = (z, y, x), "the median field of view in that shape"
    else:
        spacing, reason = _target_spacing(fingerprint)
        while math.prod(shape_at(spacing)) > budget and shape_at(spacing) != tuple(divisors):
            spacing, reason = _coarsened(spacing), ""
        limit = "a CPU trains the field of view in reasonable time" if on_cpu else "the field of view fits the memory"
        reason = reason or f"the finest in 3 % steps at which {limit}"
    field_of_view = " x ".join(f"{side:.0f}" for side in field)
    shape_reason = wishes.shape_reason if wishes.shape else f"holds the median field of view, {field_of_view} mm"
    shape, median = wishes.shape or _two_positions(shape_at(spacing), divisors), _median_shape(fingerprint, spacing)
    return _Geometry(spacing, reason, shape, shape_reason, median)


def _batch(geometry: _Geometry, budget: float, cases: int, wishes: _Wishes) -> tuple[int, str]:
    if wishes.batch is not None:
        return wishes.batch, "set by the user"
    voxels = math.prod(geometry.shape)
    room = int(budget * MIN_BATCH / voxels)
    share = round(_DATASET_SHARE * cases * math.prod(geometry.median) / voxels)
    reason = f"at least {MIN_BATCH}; room for {room}; {_DATASET_SHARE:.0%} of all voxels are {share}"
    return max(MIN_BATCH, min(room, share)), reason


def _estimates(
    geometry: _Geometry, batch: int, costs: Costs, fingerprint: Fingerprint, view: str, memory_gb: float
) -> tuple[float, float, float, tuple[Decision, ...]]:
    """Memory in GB, minutes to train, seconds a case, and their rows; PlanError when the memory does not suffice."""
    voxels = math.prod(geometry.shape)
    memory = _rounded(needed_gb(costs, voxels, batch))
    if memory > memory_gb:
        raise PlanError(
            f"Training on {_shape(geometry.shape)} voxels in batches of {batch} needs about {memory:g} GB, and "
            f"{memory_gb:g} GB were allowed. Allow more memory, or choose a smaller patch, batch or a coarser spacing."
        )
    tiles = 1
    for size, edge in zip(geometry.median, geometry.shape):
        tiles *= math.ceil(max(0, size - edge) / (edge / 2)) + 1 if view == "patch" else 1
    pass_seconds = voxels * costs.macs * 2 / costs.flops
    original = float(np.median([math.prod(case.shape_zyx) for case in fingerprint.cases]))
    minutes = _rounded(NOMINAL_STEPS * batch * pass_seconds * TRAINING_PASSES / 60)
    seconds = _rounded(tiles * pass_seconds + original / _READ_VOXELS_PER_SECOND)
    speed = f"{costs.flops / 1e9:.0f} GFLOP/s expected of a {costs.machine}"
    return memory, minutes, seconds, (
        Decision("memory", f"{memory:g} of {memory_gb:g} GB", f"{costs.elements:.0f} feature maps per input voxel"),
        Decision("training time", f"{minutes:g} min", f"{NOMINAL_STEPS} steps, {speed}"),
        Decision("time per case", f"{seconds:g} s", f"{tiles} input{'s' * (tiles > 1)} and reading"),
    )


def _data_decisions(
    fingerprint: Fingerprint, spec: FoundationSpec, intensity: dict[str, IntensityRule]
) -> Iterator[Decision]:
    cases, failed = len(fingerprint.cases), fingerprint.failed
    left_out = f"left out: {', '.join(failed)}" if failed else "all usable"
    yield Decision("cases", f"{cases} of {cases + len(failed)}", left_out)
    remarks = Counter(remark for case in fingerprint.cases for remark in case.oddities)
    if remarks:
        most = "; ".join(f"{remark} ({count})" for remark, count in remarks.most_common(4))
        odd = sum(bool(case.oddities) for case in fingerprint.cases)
        yield Decision("remarks", f"{odd} cases", most + ("; ..." if len(remarks) > 4 else ""))
    names = dict.fromkeys(name for case in fingerprint.cases for name in case.label_voxels)
    unseen = [name for name in names if not any(case.label_voxels.get(name) for case in fingerprint.cases)]
    if unseen:
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


def _geometry_decisions(geometry: _Geometry, view: str) -> Iterator[Decision]:
    yield Decision("view", view, _VIEW_REASONS[view])
    yield Decision("spacing z y x", _mm(geometry.spacing), geometry.spacing_reason)
    yield Decision("median shape", _shape(geometry.median), "of the cases, cropped to the body, at this spacing")
    yield Decision("patch" if view == "patch" else "input", _shape(geometry.shape), geometry.shape_reason)


def _up(size: int, multiple: int) -> int:
    return max(1, math.ceil(size / multiple)) * multiple


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _mm(spacing: SpacingZYX) -> str:
    return " x ".join(f"{value:.2f}" for value in spacing) + " mm"


def _shape(shape: ZYX) -> str:
    return " x ".join(str(size) for size in shape)
