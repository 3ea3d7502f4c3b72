"""From a case's images to network input: orientation, crop, intensity, spacing.

Training and prediction share it, so both see a case in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unicon_pipeline.air import BodyHull
from unicon_pipeline.contract import ZYX, IntensityRule, SpacingZYX
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.geometry import Grid, Volume, orient
from unicon_pipeline.intensity import body_box, box_of, nonzero_region, normaliser
from unicon_pipeline.label_resize import resize_labels
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.region import bulk_box
from unicon_pipeline.resize import axis_orders, resize_stream, resized_shape, z_slabs

IMAGE_ORDER, LABEL_ORDER = 3, 1  # nnU-Net's: cubic for images, linear per class for labels


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
    """Network input: float32 (C, Z, Y, X), channels in the plan's order, absent ones zero; labels in step.

    In a "volume" view the labels are a mask, uint8: 1 = region; all 0 where the region is empty.
    `body`: where more than air is, on the network's grid; None where that is everywhere, or not known.
    """

    array_czyx: np.ndarray
    present: tuple[str, ...]
    labels_zyx: np.ndarray | None
    geometry: CaseGeometry
    body: BodyHull | None = None


def prepare_case(images: dict[str, Volume], plan: DataPlan, labels: Volume | None = None) -> PreparedCase:
    """Orients, crops to the body, normalises and resamples one case.

    Beside the images, the labels and the result, memory holds a few planes only.

    Args:
        images: modality -> volume in HU or SUV, all on one grid. It is emptied, so that no image stays in memory
            longer than it is needed: hand over `dict(images)` to keep them.
        labels: on the same grid; the crop is widened to hold all of them. A "volume" view takes them as a mask (not 0
            is region) and is centred on its `bulk_box`; without a region, on the middle of the crop.

    Raises:
        DatasetError: none of the plan's modalities is there.
    """
    present = tuple(name for name in plan.modalities if name in images)
    if not present:
        raise DatasetError(f"{plan.task} needs {' or '.join(plan.modalities)}; the case has {', '.join(images)}.")
    original = images[present[0]].grid
    turned = {name: _oriented(images[name], plan.orientation) for name in present}
    images.clear()
    turned_labels = None if labels is None else _oriented(labels, plan.orientation)
    oriented = turned[present[0]].grid
    nonzero = nonzero_region(turned) if _needs_nonzero(plan) else None
    box = _with_labels(_crop_box(turned, nonzero, plan.conventions.crop), turned_labels)
    cropped: ZYX = tuple(side.stop - side.start for side in box)
    shape = resized_shape(cropped, oriented.spacing_zyx_mm, plan.spacing_zyx_mm)
    body = BodyHull.of(turned, box, shape) if labels is None and plan.view == "patch" else None  # only to predict
    array_czyx = np.zeros((len(plan.modalities), *shape), np.float32)
    orders = axis_orders(oriented.spacing_zyx_mm, plan.spacing_zyx_mm, IMAGE_ORDER)
    for name in sorted(present, key=lambda name: -turned[name].array_zyx.nbytes):  # the largest is freed first
        channel, inside = array_czyx[plan.modalities.index(name)], None if nonzero is None else nonzero[box]
        _fill(channel, turned.pop(name).array_zyx[box], plan.intensity[name], inside, orders)
    labels_zyx = None
    if turned_labels is not None:
        label_orders = axis_orders(oriented.spacing_zyx_mm, plan.spacing_zyx_mm, LABEL_ORDER)
        resized = _resized_mask if plan.view == "volume" else resize_labels
        labels_zyx = np.ascontiguousarray(resized(turned_labels.array_zyx[box], shape, label_orders))
    geometry = CaseGeometry(
        original=original,
        oriented=oriented,
        crop_start_zyx=tuple(side.start for side in box),
        crop_stop_zyx=tuple(side.stop for side in box),
        resized_shape_zyx=shape,
        network_spacing_zyx_mm=plan.spacing_zyx_mm,
    )
    prepared = PreparedCase(array_czyx, present, labels_zyx, geometry, body)
    return _whole_view(prepared, plan) if plan.view == "volume" else prepared


def _fill(
    out_zyx: np.ndarray, array_zyx: np.ndarray, rule: IntensityRule, nonzero_zyx: np.ndarray | None, orders: ZYX
) -> None:
    """A cropped image into its channel, normalised first and resampled then, as nnU-Net does."""
    planes = normaliser(array_zyx, rule, nonzero_zyx)
    resize_stream(map(planes, z_slabs(array_zyx.shape)), array_zyx.shape, out_zyx, orders)


def _resized_mask(array_zyx: np.ndarray, shape_zyx: ZYX, orders: ZYX) -> np.ndarray:
    """Where it is not 0, as 0 and 1 (uint8). A region that no voxel holds a larger share of keeps those it touches."""
    mask = (array_zyx != 0).view(np.uint8)
    resized = resize_labels(mask, shape_zyx, orders)
    if not resized.any():
        touched = np.argwhere(mask) * shape_zyx // mask.shape
        resized[tuple(touched.T)] = 1
    return resized


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
    labelled = box_of(labels.array_zyx)
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(box, labelled, strict=True))


def _whole_view(case: PreparedCase, plan: DataPlan) -> PreparedCase:
    """The plan's fixed shape about the region's middle, else the case's: cut where there is more, air where less."""
    mask, target = case.labels_zyx, plan.patch_shape_zyx
    box = None if mask is None else bulk_box([mask])
    if box is None:
        starts = [int((have - want) / 2) for have, want in zip(case.array_czyx.shape[1:], target, strict=True)]
    else:
        starts = [(side.start + side.stop - want) // 2 for side, want in zip(box, target, strict=True)]
    air = [value if name in case.present else 0.0 for name, value in zip(plan.modalities, plan.air, strict=True)]
    array_czyx = _cut(case.array_czyx, starts, target, np.array(air, np.float32).reshape(-1, 1, 1, 1))
    mask = None if mask is None else _cut(mask, starts, target, 0)
    return PreparedCase(array_czyx, case.present, mask, case.geometry)


def _cut(array: np.ndarray, starts: Sequence[int], shape_zyx: ZYX, fill: np.ndarray | int) -> np.ndarray:
    """(..., Z, Y, X) from `starts` on, `fill` where that lies outside."""
    have = array.shape[-3:]
    if not any(starts) and have == tuple(shape_zyx):
        return array
    result = np.empty((*array.shape[:-3], *shape_zyx), array.dtype)
    result[...] = fill
    into, out_of = [], []
    for start, want, size in zip(starts, shape_zyx, have, strict=True):
        low, high = max(start, 0), min(start + want, size)
        into.append(slice(low - start, high - start))
        out_of.append(slice(low, high))
    result[(..., *into)] = array[(..., *out_of)]
    return result
