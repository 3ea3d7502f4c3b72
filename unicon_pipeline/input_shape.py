"""How large the network's input is: spacing, patch and batch, by nnU-Net's published rules.

What the foundation or the user fixes goes before the rules. Shapes and spacings (mm) are z, y, x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unicon_pipeline.budget import MIN_BATCH
from unicon_pipeline.contract import ZYX, InputContract, SpacingZYX
from unicon_pipeline.errors import PlanError
from unicon_pipeline.fingerprint import Fingerprint
from unicon_pipeline.resize import ANISOTROPY, resized_shape

REGION_MARGIN_MM = 10.0  # on each side of a region: what it borders on
_REGION_COVERED = 95  # percentile of the sides that a crop holds: one huge region must not make all the others coarse
_INITIAL_EDGE, _DATASET_SHARE, _COVERAGE, _COARSER = 256, 0.05, 0.25, 1.03  # nnU-Net's


@dataclass(frozen=True)
class InputShape:
    """`median`: the median shape at this spacing of what inputs are cut from: the cases, cropped, or the crops around
    their regions. The reasons are in words."""

    spacing: SpacingZYX
    spacing_reason: str
    shape: ZYX
    shape_reason: str
    median: ZYX


@dataclass(frozen=True)
class Overrides:
    """What the user fixes instead of the rules; None leaves it to them."""

    spacing_zyx_mm: SpacingZYX | None = None
    patch_shape_zyx: ZYX | None = None
    batch_size: int | None = None
    folds: int | None = None


NO_OVERRIDES = Overrides()


def checked(overrides: Overrides, contract: InputContract) -> Overrides:
    """The overrides as plain numbers.

    Raises:
        PlanError: one is no sensible value, or the foundation's contract says otherwise.
    """
    spacing, patch = overrides.spacing_zyx_mm, overrides.patch_shape_zyx
    if spacing is not None:
        spacing = tuple(float(value) for value in spacing)
        if len(spacing) != 3 or not all(math.isfinite(value) and value > 0 for value in spacing):
            raise PlanError(f"The spacing must be three positive numbers (z y x, mm), found {spacing}.")
        if contract.spacing_zyx_mm not in (None, spacing):
            raise PlanError(
                f"The foundation expects a spacing of {shown_mm(contract.spacing_zyx_mm)}, not {shown_mm(spacing)}. "
                "Leave the spacing out."
            )
    if patch is not None:
        patch = tuple(int(size) for size in patch)
        divisors = contract.divisible_by_zyx
        if len(patch) != 3 or any(size < 1 or size % by for size, by in zip(patch, divisors)):
            raise PlanError(f"The patch {patch} (z y x) must be positive multiples of {divisors}.")
        if contract.fixed_shape_zyx not in (None, patch):
            raise PlanError(f"The foundation works only on inputs of {contract.fixed_shape_zyx}. Leave the patch out.")
    if overrides.batch_size is not None and overrides.batch_size < 1:
        raise PlanError(f"The batch size must be at least 1, found {overrides.batch_size}.")
    if overrides.folds is not None and overrides.folds < 2:
        raise PlanError(f"There must be at least 2 folds, found {overrides.folds}.")
    return Overrides(spacing, patch, overrides.batch_size, overrides.folds)


def choose_shape(
    view: str,
    fingerprint: Fingerprint,
    contract: InputContract,
    overrides: Overrides,
    budget: float,
    on_cpu: bool,
    around_region: bool = False,
) -> InputShape:
    """Spacing and shape of one input.

    Args:
        view: "patch" or "volume", see `DataPlan`.
        around_region: a volume is the crop around a case's region; some case has one.
        budget: input voxels that each of two samples in a batch may have.
        on_cpu: the budget is one of time, for which the spacing may become coarser.
    """
    fixed = _Fixed(
        contract.spacing_zyx_mm or overrides.spacing_zyx_mm,
        "the foundation's own" if contract.spacing_zyx_mm else "set by the user",
        contract.fixed_shape_zyx or overrides.patch_shape_zyx,
        "the only shape that the foundation takes" if contract.fixed_shape_zyx else "set by the user",
    )
    choose = _region_view if around_region else _patch_view if view == "patch" else _volume_view
    return choose(fingerprint, contract.divisible_by_zyx, fixed, budget, on_cpu)


def choose_batch(shape: InputShape, budget: float, cases: int, overrides: Overrides) -> tuple[int, str]:
    """The batch size, and why; at least two, of which the budget is made."""
    if overrides.batch_size is not None:
        return overrides.batch_size, "set by the user"
    voxels = math.prod(shape.shape)
    room = int(budget * MIN_BATCH / voxels)
    share = round(_DATASET_SHARE * cases * math.prod(shape.median) / voxels)
    reason = f"at least {MIN_BATCH}; room for {room}; {_DATASET_SHARE:.0%} of all voxels are {share}"
    return max(MIN_BATCH, min(room, share)), reason


def shown_mm(spacing: SpacingZYX) -> str:
    """`3.27 x 0.98 x 0.98 mm`."""
    return " x ".join(f"{value:.2f}" for value in spacing) + " mm"


def shown(shape: ZYX) -> str:
    """`61 x 202 x 193`."""
    return " x ".join(str(size) for size in shape)


@dataclass(frozen=True)
class _Fixed:
    spacing: SpacingZYX | None
    spacing_reason: str
    shape: ZYX | None
    shape_reason: str


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
    return _two_positions(_shrunk(patch, median, fits, divisors), divisors)


def _shrunk(shape: Sequence[int], whole: ZYX, fits: float, divisors: ZYX) -> ZYX:
    """The shape, its axis that is the largest part of the `whole` shorter step by step until it fits."""
    edges = list(shape)
    while math.prod(edges) > fits:
        shrinkable = [axis for axis in range(3) if edges[axis] > divisors[axis]]
        if not shrinkable:
            break
        axis = max(shrinkable, key=lambda a: edges[a] / whole[a])
        edges[axis] -= divisors[axis]
    z, y, x = edges
    return z, y, x


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
    fingerprint: Fingerprint, divisors: ZYX, fixed: _Fixed, budget: float, on_cpu: bool
) -> InputShape:
    spacing, reason = (fixed.spacing, fixed.spacing_reason) if fixed.spacing else _target_spacing(fingerprint)
    median = _median_shape(fingerprint, spacing)
    patch = fixed.shape or _patch(spacing, median, budget, divisors)
    covered = math.prod(patch) / math.prod(median)
    if on_cpu and fixed.spacing is None and covered < _COVERAGE:
        reason = (
            f"{shown_mm(spacing)} is the {reason}, but a patch that a CPU can train would cover only {covered:.0%} of "
            f"a case ({shown(patch)} of {shown(median)}): the finer axes coarser in 3 % steps up to {_COVERAGE:.0%}"
        )
        while math.prod(patch) < _COVERAGE * math.prod(median):
            spacing = _coarsened(spacing)
            median = _median_shape(fingerprint, spacing)
            patch = fixed.shape or _patch(spacing, median, budget, divisors)
    limit = "a CPU trains in reasonable time" if on_cpu else "fits the memory"
    patch_reason = fixed.shape_reason if fixed.shape else f"the largest in the median's proportions that {limit}"
    return InputShape(spacing, reason, patch, patch_reason, median)


def _volume_view(
    fingerprint: Fingerprint, divisors: ZYX, fixed: _Fixed, budget: float, on_cpu: bool
) -> InputShape:
    sides = [np.multiply(case.cropped_shape_zyx, case.spacing_zyx_mm) for case in fingerprint.cases]
    field = _mm(np.median(sides, axis=0))
    if fixed.shape and not fixed.spacing:
        spacing, reason = _mm(np.divide(field, fixed.shape)), "the median field of view in that shape"
    else:
        spacing, reason = _spacing_of_field(fingerprint, field, "field of view", divisors, fixed, budget, on_cpu)
    shape_reason = fixed.shape_reason if fixed.shape else f"holds the median field of view, {_shown_field(field)}"
    shape = fixed.shape or _two_positions(_shape_of_field(field, spacing, divisors), divisors)
    return InputShape(spacing, reason, shape, shape_reason, _median_shape(fingerprint, spacing))


def _region_view(
    fingerprint: Fingerprint, divisors: ZYX, fixed: _Fixed, budget: float, on_cpu: bool
) -> InputShape:
    """A crop of one size in mm for all cases, so that a large region looks large."""
    seen = [case for case in fingerprint.cases if case.bulk_shape_zyx]
    sides = [np.multiply(case.bulk_shape_zyx, case.spacing_zyx_mm) for case in seen]
    covered = np.percentile(sides, _REGION_COVERED, axis=0, method="inverted_cdf")
    field = _mm(covered + 2 * REGION_MARGIN_MM)
    if fixed.shape and not fixed.spacing:
        median, _ = _target_spacing(fingerprint)
        spacing = _mm(np.maximum(np.divide(field, fixed.shape), median))
        reason = "the crop in that shape, but never finer than the median of the cases"
    else:
        spacing, reason = _spacing_of_field(fingerprint, field, "crop", divisors, fixed, budget, on_cpu)
    wanted = _shape_of_field(field, spacing, divisors)
    shape = fixed.shape or _two_positions(_shrunk(wanted, wanted, budget, divisors), divisors)
    shown_field = _mm(np.multiply(shape, spacing))
    whole = sum(bool((side <= shown_field).all()) for side in sides)
    shape_reason = f"{_shown_field(shown_field)} around the region, holding {whole} of {len(seen)} whole; "
    if fixed.shape:
        shape_reason += fixed.shape_reason
    elif np.less(shown_field, field).any():
        limit = "a CPU trains in reasonable time" if on_cpu else "fits the memory"
        shape_reason += f"wanted were {_shown_field(field)}, of which this {limit}"
    else:
        shape_reason += f"percentile {_REGION_COVERED} of the regions' sides and {REGION_MARGIN_MM:g} mm on each side"
    return InputShape(spacing, reason, shape, shape_reason, shape)


def _spacing_of_field(
    fingerprint: Fingerprint,
    field: SpacingZYX,
    name: str,
    divisors: ZYX,
    fixed: _Fixed,
    budget: float,
    on_cpu: bool,
) -> tuple[SpacingZYX, str]:
    """The spacing at which one input holds a field (mm), and why."""
    if fixed.spacing:
        return fixed.spacing, fixed.spacing_reason
    spacing, reason = _target_spacing(fingerprint)
    while (shape := _shape_of_field(field, spacing, divisors)) != tuple(divisors) and math.prod(shape) > budget:
        limit = f"a CPU trains the {name} in reasonable time" if on_cpu else f"the {name} fits the memory"
        spacing, reason = _coarsened(spacing), f"the finest in 3 % steps at which {limit}"
    return spacing, reason


def _shape_of_field(field: SpacingZYX, spacing: SpacingZYX, divisors: ZYX) -> ZYX:
    z, y, x = (_up(math.ceil(side / s - 1e-6), by) for side, s, by in zip(field, spacing, divisors))
    return z, y, x


def _shown_field(field: SpacingZYX) -> str:
    return " x ".join(f"{side:.0f}" for side in field) + " mm"


def _mm(values: np.ndarray) -> SpacingZYX:
    z, y, x = (float(value) for value in values)
    return z, y, x


def _up(size: int, multiple: int) -> int:
    return max(1, math.ceil(size / multiple)) * multiple
