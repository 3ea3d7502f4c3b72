"""Voxel values: how each modality becomes network input, whether its unit is right, where the body is.

CT is in HU and PET in SUV, on scales that are the same for every image; only modalities without a
physical unit are standardised image by image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from scipy import ndimage

from unicon_pipeline.contract import CT_HU_RULE, PET_SUV_RULE, InputContract, IntensityRule
from unicon_pipeline.dataset import Case, read_case
from unicon_pipeline.errors import DatasetError, PlanError
from unicon_pipeline.geometry import Volume

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
    _check_rule(rule, "intensity rule")
    if rule.scheme != "piecewise":
        return _WHOLE_IMAGE[rule.scheme](array_zyx, nonzero_zyx)
    result = np.empty(array_zyx.shape, dtype=np.float32)
    for plane, out in zip(array_zyx, result, strict=True):  # plane by plane: the temporaries stay in the cache
        _piecewise(np.asarray(plane, dtype=np.float32), rule, out)
    return result


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
        return array_zyx > BODY_HU
    if modality == "PET":
        # The mean over 3 x 3 x 3 voxels, so that single noisy voxels in air do not count as body.
        return ndimage.uniform_filter(array_zyx.astype(np.float32, copy=False), 3, mode="nearest") > BODY_SUV
    return array_zyx != 0


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
    (shape,) = shapes
    deciding = ["CT"] if "CT" in volumes else list(volumes)
    occupied = [np.zeros(size, dtype=bool) for size in shape]
    for modality in deciding:
        mask = body_mask(volumes[modality].array_zyx, modality)
        planes = mask.any(axis=0)
        occupied[0] |= mask.any(axis=(1, 2))
        occupied[1] |= planes.any(axis=1)
        occupied[2] |= planes.any(axis=0)
    z, y, x = (_extent(line) for line in occupied)
    return z, y, x


def nonzero_region(volumes: Mapping[str, Volume]) -> np.ndarray:
    """Where any of the images is not 0, holes filled (bool, z y x): nnU-Net's region to crop and standardise."""
    region = np.logical_or.reduce([volume.array_zyx != 0 for volume in volumes.values()])
    return ndimage.binary_fill_holes(region)


def box_of(mask_zyx: np.ndarray) -> tuple[slice, slice, slice]:
    """The smallest box (z, y, x slices) that holds the mask; where it is empty, the whole image."""
    lines = (mask_zyx.any(axis=(1, 2)), mask_zyx.any(axis=(0, 2)), mask_zyx.any(axis=(0, 1)))
    z, y, x = (_extent(line, margin=0) for line in lines)
    return z, y, x


def _extent(line: np.ndarray, margin: int = BODY_MARGIN_VOXELS) -> slice:
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


def _piecewise(values: np.ndarray, rule: IntensityRule, out: np.ndarray) -> None:
    """Each segment adds its slope times the part of the value that lies within it."""
    knots, levels = rule.knots_in, rule.knots_out
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


def _standardised(array_zyx: np.ndarray) -> np.ndarray:
    mean = float(array_zyx.mean(dtype=np.float64))
    result = array_zyx.astype(np.float32) - np.float32(mean)
    deviation = math.sqrt(float(np.square(result).mean(dtype=np.float64)))
    if deviation <= 1e-6 * max(1.0, abs(mean)):
        return np.zeros_like(result)
    result /= np.float32(deviation)
    return result


def _standardised_inside(array_zyx: np.ndarray, nonzero_zyx: np.ndarray) -> np.ndarray:
    result = np.zeros(array_zyx.shape, np.float32)
    result[nonzero_zyx] = _standardised(array_zyx[nonzero_zyx])
    return result


def _scaled_to_one(array_zyx: np.ndarray) -> np.ndarray:
    result = array_zyx.astype(np.float32) - np.float32(array_zyx.min())
    return result / max(float(result.max()), 1e-8)


_WHOLE_IMAGE = {
    "zscore": lambda array_zyx, _: _standardised(array_zyx),
    "zscore_nonzero": _standardised_inside,
    "minmax": lambda array_zyx, _: _scaled_to_one(array_zyx),
    "identity": lambda array_zyx, _: array_zyx.astype(np.float32),
}


def _sample(array_zyx: np.ndarray) -> np.ndarray:
    flat = array_zyx.reshape(-1)
    return flat[:: max(1, flat.size // _SAMPLES)]


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
            "need the rescale slope of the DICOM header."
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
