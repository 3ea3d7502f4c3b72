"""Voxel values: how each modality becomes network input, whether its unit is right, where the body is.

CT is in HU and PET in SUV, on scales that are the same for every image; only modalities without a
physical unit are standardised image by image.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from scipy import ndimage

from unicon_pipeline.contract import CT_HU_RULE, PET_SUV_RULE, ZYX, InputContract, IntensityRule
from unicon_pipeline.dataset import Case, read_case
from unicon_pipeline.errors import DatasetError, PlanError
from unicon_pipeline.geometry import Volume
from unicon_pipeline.resize import z_slabs

BODY_HU = -600.0  # between air and lung on one side, skin and fat on the other, partial volume included
BODY_SUV = 0.1  # legs and fat at the late phase of a scan still exceed this; scanner noise in air seldom does
BODY_MARGIN_VOXELS = 3

_BUILT_IN = {"CT": CT_HU_RULE, "PET": PET_SUV_RULE}
_ZSCORE = IntensityRule("zscore", "none")

_SAMPLES = 200_000
_LARGEST_SUV_P99 = 100.0
_LARGEST_HU_P99 = 5000.0
_LEAST_NEGATIVE_HU = -100.0
_LOWEST_MEDIAN_HU = -4000.0  # some scanners pad with -3024


def rules_for(
    modalities: Iterable[str], contract: InputContract, declared: Mapping[str, str]
) -> dict[str, IntensityRule]:
    """One rule per modality: the foundation's own if it has one, else the built-in of CT and PET, else as declared.

    Args:
        declared: modality -> scheme, from `dataset.json`; the only scheme to declare is "zscore".

    Raises:
        PlanError: a modality has no rule, or declares an unknown scheme.
    """
    rules = {}
    for modality in modalities:
        if modality in contract.intensity:
            rule = contract.intensity[modality]
        elif modality in _BUILT_IN:
            rule = _BUILT_IN[modality]
        elif declared.get(modality) == "zscore":
            rule = _ZSCORE
        else:
            raise PlanError(
                f"Modality {modality}: no intensity scheme is known (declared: {declared.get(modality)!r}). "
                f'Expected CT, PET, or in dataset.json "intensity": {{"{modality}": "zscore"}}.'
            )
        _check_rule(rule, modality)
        rules[modality] = rule
    return rules


def normalise(array_zyx: np.ndarray, rule: IntensityRule, nonzero_zyx: np.ndarray | None = None) -> np.ndarray:
    """The values as network input: a new float32 array of the same shape; the input is left alone.

    A constant image becomes 0 under `zscore` and `minmax`.

    Args:
        nonzero_zyx: bool, what `nonzero_region` gives; only `zscore_nonzero` reads it.

    Raises:
        PlanError: the rule's scheme is unknown or its knots do not increase.
    """
    planes = normaliser(array_zyx, rule, nonzero_zyx)
    result = np.empty(array_zyx.shape, np.float32)
    for rows in z_slabs(array_zyx.shape):
        result[rows] = planes(rows)
    return result


def normaliser(
    array_zyx: np.ndarray, rule: IntensityRule, nonzero_zyx: np.ndarray | None = None
) -> Callable[[slice], np.ndarray]:
    """As `normalise`, of some planes at a time: a function from a range of planes to contiguous float32 (planes, y, x).

    What a scheme needs to know of the whole image is computed here, once and in float64.
    """
    _check_rule(rule, "intensity rule")
    if rule.scheme == "piecewise":
        return lambda rows: _piecewise(array_zyx[rows], rule)
    inside = nonzero_zyx if rule.scheme == "zscore_nonzero" else None
    offset, divisor = _WHOLE_IMAGE[rule.scheme](array_zyx, inside)

    def planes(rows: slice) -> np.ndarray:
        values = array_zyx[rows].astype(np.float32, order="C")
        values -= np.float32(offset)
        values /= np.float32(divisor)
        if inside is not None:
            values[~inside[rows]] = 0
        return values

    return planes


def air_value(modality: str) -> float:
    """What lies outside an image of this modality, in its own unit: -1024 HU for CT, else 0."""
    return -1024.0 if modality == "CT" else 0.0


def normalised_air(rule: IntensityRule, modality: str) -> float:
    """What lies outside an image, as network input (the mean, 0, for standardised modalities)."""
    return normalise(np.full((1, 1, 1), air_value(modality), np.float32), rule).item()


def read_in_units(case: Case) -> dict[str, Volume]:
    """`dataset.read_case`, each channel in its right unit (HU, SUV).

    Raises:
        DatasetError: as `read_case` and `check_units`; the message names the file.
    """
    volumes = read_case(case)
    for modality, volume in volumes.items():
        check_units(volume.array_zyx, modality, case.images[modality])
    return volumes


def check_units(array_zyx: np.ndarray, modality: str, path: Path | str) -> None:
    """Refuses images whose values cannot be in the modality's unit (CT: HU, PET: SUV).

    Raises:
        DatasetError: wrong unit, or an image without content (all voxels equal); says how to convert.
    """
    low, high = float(array_zyx.min()), float(array_zyx.max())
    if low == high:
        raise DatasetError(f"{path}: every voxel is {low:g}, so the image is empty. Export it again or leave it out.")
    if modality == "PET":
        _check_suv(array_zyx, low, high, path)
    elif modality == "CT":
        _check_hu(array_zyx, low, high, path)


def body_mask(array_zyx: np.ndarray, modality: str) -> np.ndarray:
    """Voxels that may belong to the patient (bool, z y x): CT above -600 HU, PET above 0.1 SUV, others not 0."""
    if modality == "CT":
        return array_zyx > (BODY_HU if array_zyx.dtype.kind == "f" else int(BODY_HU))
    if modality == "PET":
        # The mean over 3 x 3 x 3 voxels, so that single noisy voxels in air do not count as body.
        return ndimage.uniform_filter(array_zyx.astype(np.float32, copy=False), 3, mode="nearest") > BODY_SUV
    return array_zyx != 0


def body_slabs(array_zyx: np.ndarray, modality: str) -> Iterator[tuple[slice, np.ndarray]]:
    """`body_mask` of some planes after the other: (range of planes, mask of these planes)."""
    reach = 1 if modality == "PET" else 0  # what the mean takes from the neighbours
    for rows in z_slabs(array_zyx.shape):
        start = max(0, rows.start - reach)
        mask = body_mask(array_zyx[start : rows.stop + reach], modality)
        yield rows, mask[rows.start - start :][: rows.stop - rows.start]


def body_box(volumes: Mapping[str, Volume]) -> tuple[slice, slice, slice]:
    """The box (z, y, x slices) that holds the whole body and a margin of 3 voxels, clipped to the image.

    The volumes lie on one grid. CT alone decides where it is present, so that a PET beside it does not move the
    box; otherwise the box holds what every modality shows. Where nothing is found, it is the whole image.
    Training and prediction use this same box.

    Raises:
        DatasetError: there is no volume, or the volumes have different shapes.
    """
    shapes = {volume.array_zyx.shape for volume in volumes.values()}
    if len(shapes) != 1:
        raise DatasetError(
            f"The images of one case must share one grid to be cropped; found shapes {sorted(shapes)} "
            f"for {', '.join(volumes) or 'no image'}."
        )
    deciding = ["CT"] if "CT" in volumes else list(volumes)
    masks = (body_slabs(volumes[modality].array_zyx, modality) for modality in deciding)
    return _box(shapes.pop(), itertools.chain.from_iterable(masks), BODY_MARGIN_VOXELS)


def nonzero_region(volumes: Mapping[str, Volume]) -> np.ndarray:
    """Where any of the images is not 0, holes filled (bool, z y x): nnU-Net's region to crop and standardise."""
    arrays = [volume.array_zyx for volume in volumes.values()]
    region = np.zeros(arrays[0].shape, bool)
    for rows in z_slabs(region.shape):
        for array in arrays:
            region[rows] |= array[rows] != 0
    box = box_of(region)  # all holes lie within
    region[box] = ndimage.binary_fill_holes(region[box])
    return region


def box_of(array_zyx: np.ndarray) -> tuple[slice, slice, slice]:
    """The smallest box (z, y, x slices) that holds all that is not 0; where there is nothing, the whole image."""
    slabs = ((rows, array_zyx[rows] != 0) for rows in z_slabs(array_zyx.shape))
    return _box(array_zyx.shape, slabs, margin=0)


def _box(shape_zyx: ZYX, masks: Iterable[tuple[slice, np.ndarray]], margin: int) -> tuple[slice, slice, slice]:
    """Around all that is true in any of the masks, each of some planes."""
    occupied = [np.zeros(size, bool) for size in shape_zyx]
    for rows, mask in masks:
        flat = mask.any(axis=0)
        occupied[0][rows] |= mask.any(axis=(1, 2))
        occupied[1] |= flat.any(axis=1)
        occupied[2] |= flat.any(axis=0)
    z, y, x = (_extent(line, margin) for line in occupied)
    return z, y, x


def _extent(line: np.ndarray, margin: int) -> slice:
    indices = np.flatnonzero(line)
    if len(indices) == 0:
        return slice(0, len(line))
    start = max(0, int(indices[0]) - margin)
    return slice(start, min(len(line), int(indices[-1]) + 1 + margin))


def _check_rule(rule: IntensityRule, name: str) -> None:
    if rule.scheme in _WHOLE_IMAGE:
        return
    if rule.scheme != "piecewise":
        known = ", ".join(("piecewise", *_WHOLE_IMAGE))
        raise PlanError(f"{name}: unknown intensity scheme {rule.scheme!r}; known are {known}.")
    knots, values = rule.knots_in, rule.knots_out
    increasing = all(a < b for a, b in zip(knots, knots[1:], strict=False))
    if len(knots) < 2 or len(knots) != len(values) or not increasing or not all(map(math.isfinite, knots + values)):
        raise PlanError(
            f"{name}: a piecewise rule needs at least two increasing finite knots and as many values; "
            f"found knots {knots} and values {values}."
        )


def _piecewise(array_zyx: np.ndarray, rule: IntensityRule) -> np.ndarray:
    """Each segment adds its slope times the part of the value that lies within it."""
    knots, levels = rule.knots_in, rule.knots_out
    result = np.empty(array_zyx.shape, np.float32)
    for plane, out in zip(array_zyx, result, strict=True):  # plane by plane: the temporaries stay in the cache
        values = plane.astype(np.float32, copy=False)
        part = np.empty_like(out)
        for index in range(len(knots) - 1):
            target = out if index == 0 else part
            slope = (levels[index + 1] - levels[index]) / (knots[index + 1] - knots[index])
            np.clip(values, knots[index], knots[index + 1], out=target)
            target -= np.float32(knots[index])
            target *= np.float32(slope)
            if index == 0:
                target += np.float32(levels[0])
            else:
                out += part
    return result


def _mean_and_deviation(array_zyx: np.ndarray, inside_zyx: np.ndarray | None) -> tuple[float, float]:
    """Of all voxels, or of those inside; an infinite deviation where they are all equal."""

    def values() -> Iterator[np.ndarray]:
        for rows in z_slabs(array_zyx.shape):
            yield array_zyx[rows] if inside_zyx is None else array_zyx[rows][inside_zyx[rows]]

    number = array_zyx.size if inside_zyx is None else int(np.count_nonzero(inside_zyx))
    if number == 0:
        return 0.0, math.inf
    mean = math.fsum(float(some.sum(dtype=np.float64)) for some in values()) / number
    squares = (np.square(some - np.float32(mean), dtype=np.float32).sum(dtype=np.float64) for some in values())
    deviation = math.sqrt(math.fsum(map(float, squares)) / number)
    return mean, deviation if deviation > 1e-6 * max(1.0, abs(mean)) else math.inf


def _least_and_range(array_zyx: np.ndarray, _: np.ndarray | None) -> tuple[float, float]:
    low, high = np.float32(array_zyx.min()), np.float32(array_zyx.max())
    return float(low), max(float(high - low), 1e-8)


# Scheme -> what to subtract, and what to divide by then.
_WHOLE_IMAGE = {
    "zscore": _mean_and_deviation,
    "zscore_nonzero": _mean_and_deviation,
    "minmax": _least_and_range,
    "identity": lambda array_zyx, _: (0.0, 1.0),
}


def _sample(array_zyx: np.ndarray) -> np.ndarray:
    return array_zyx.flat[:: max(1, array_zyx.size // _SAMPLES)]


def _check_suv(array_zyx: np.ndarray, low: float, high: float, path: Path | str) -> None:
    typical = float(np.percentile(_sample(array_zyx), 99))
    if low < -50:
        raise DatasetError(
            f"{path}: the lowest value is {low:g}; SUV is not negative, this looks like HU. Expected the PET in SUV. "
            "Check which file is which channel."
        )
    if typical > _LARGEST_SUV_P99 or high > 10_000:
        raise DatasetError(
            f"{path}: the values are not SUV: 99 % lie below {typical:g} and the largest is {high:g}; in SUV 99 % "
            f"would lie below {_LARGEST_SUV_P99:g}. This looks like Bq/ml or counts. Convert it: SUV = activity in "
            "Bq/ml x body weight in g / injected dose in Bq, the dose decay-corrected to the start of the scan "
            "(dose x 0.5^(minutes between injection and scan / half-life in minutes); 18F: 109.8); counts first "
            "need the rescale slope of the DICOM header. For a file in Bq/ml, python -m dataset_conversion.suv does it."
        )


def _check_hu(array_zyx: np.ndarray, low: float, high: float, path: Path | str) -> None:
    if low > _LEAST_NEGATIVE_HU:
        if low >= 0 and high > 300:
            hint = "These look like stored values: HU = value x RescaleSlope + RescaleIntercept (mostly 1 and -1024)."
        else:
            hint = "This looks like an image that was already scaled; give the original one."
        raise DatasetError(
            f"{path}: values from {low:g} to {high:g} are not HU: a CT shows air near -1000 and fat near -100. {hint}"
        )
    sample = _sample(array_zyx)
    middle, typical = float(np.median(sample)), float(np.percentile(sample, 99))
    if typical > _LARGEST_HU_P99 or middle < _LOWEST_MEDIAN_HU:
        raise DatasetError(
            f"{path}: values from {low:g} to {high:g} (median {middle:g}, 99 % below {typical:g}) are not HU, where "
            "air is -1000, water 0 and bone below 3000. Apply HU = value x RescaleSlope + RescaleIntercept."
        )
