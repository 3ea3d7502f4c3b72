"""One case, checked and measured: what a plan needs to know of it, how its values spread, and what is odd about it.

Voxels are counted as stored, some planes at a time, so a case costs little more memory than its images; figures along
the axes are in the foundation's orientation. What was measured can be kept in a file beside, and is used again
as long as the case's files, the labels' meaning and the orientation are the same.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy import ndimage

from unicon_pipeline.contract import ZYX, SpacingZYX
from unicon_pipeline.dataset import Case, Labels, check_labels, label_counts
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.geometry import (
    GRID_TOLERANCE_MM,
    Grid,
    Volume,
    fields_of_view_overlap,
    grids_differ_mm,
    onto_grid,
    orient,
)
from unicon_pipeline.histogram import Histogram, Moments, Tally
from unicon_pipeline.intensity import air_value, body_box, body_mask, read_in_units
from unicon_pipeline.records import atomic_path, from_dict, sha256_file, sha256_json, to_dict
from unicon_pipeline.region import REGION, Box, bulk_box, found_region

THUMBNAIL_EDGE = 8
_VERSION = 2  # of what is measured, and of the kept file
_SMALL_AXIS_VOXELS = 8
_LONG_VOXELS = 5.0  # times their width; thick slices are usual, thicker ones are worth a look
_SLAB_VOXELS = 1 << 20
_MOST_VOXELS_FOR_PARTS = 1 << 27  # one to two seconds
_TOUCHING = np.ones((3, 3, 3), bool)  # 26 neighbours: voxels that share a corner are one part
# Lowest and highest value that an image of a body part has; outside, it is odd, though not impossible.
_USUAL_LOWEST = {"CT": (-math.inf, -500.0, "no air"), "PET": (-1.0, math.inf, "negative uptake")}
_USUAL_HIGHEST = {"CT": (150.0, 35_000.0, "no bone, or not HU"), "PET": (1.5, 300.0, "is it SUV?")}


@dataclass(frozen=True)
class CaseFingerprint:
    """One case after orientation, z y x.

    `cropped_shape_zyx`: of the body box. `labelled_voxels`: of any output. Per output name (regions may overlap):
    `label_voxels`, `label_ml`, and `label_parts`, the number of pieces that do not touch at face, edge or corner (left
    out where the boxes of this and the outputs before it have more than 2^27 voxels). `oddities`: remarks in words.
    `images_sha256`: modality -> digest of the file; `labels_sha256` likewise. `bulk_shape_zyx`: of the `bulk_box` of
    all outputs, None where nothing is labelled. A mask that a model has found stands in for labels, as "region".
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
    labelled_voxels: int = 0
    label_ml: dict[str, float] = field(default_factory=dict)
    label_parts: dict[str, int] = field(default_factory=dict)
    bulk_shape_zyx: ZYX | None = None


@dataclass(frozen=True)
class Measured:
    """A case's figures, its foreground values per modality, and a thumbnail.

    Foreground: the voxels of any output, or of the body where nothing is labelled. `thumbnail_zyx`: float64
    (8, 8, 8), means over the blocks of the body box of the first image, as oriented.
    """

    record: CaseFingerprint
    histograms: dict[str, Histogram]
    thumbnail_zyx: np.ndarray


def measure_case(
    case: Case,
    modalities: Sequence[str],
    labels: Labels | None,
    orientation: str | None,
    kept: Path | None = None,
    regions: Mapping[str, Path] | None = None,
) -> Measured:
    """Reads, checks and measures one case.

    Args:
        modalities, labels: the task's.
        orientation: such as "LPS", see `InputContract`; None leaves images as stored.
        kept: folder in which measurements stay; one that still holds is returned without reading the images.
        regions: case id -> mask that a model has found of a case without labels.

    Raises:
        DatasetError: an image or the label map is unusable; the message names the file.
    """
    labels = labels if case.labels is not None else None
    found = (regions or {}).get(case.case_id) if labels is None else None
    marked = found if labels is None else case.labels
    images = {modality: sha256_file(path) for modality, path in case.images.items()}
    digests = images, None if marked is None else sha256_file(marked)
    declared = to_dict(labels) if labels is not None else None
    key = sha256_json([_VERSION, case.case_id, *digests, orientation, list(modalities), declared])
    path = None if kept is None else kept_file(kept, case.case_id)
    measured = None if path is None else _read_kept(path, key)
    if measured is None:
        measured = _measure(case, modalities, labels, orientation, digests, found)
        if path is not None:
            _keep(path, key, measured)
    return measured


def kept_file(folder: Path, case_id: str) -> Path:
    """Where the measurement of a case is kept."""
    return Path(folder) / f"{case_id}.safetensors"


def _measure(
    case: Case,
    modalities: Sequence[str],
    labels: Labels | None,
    orientation: str | None,
    digests: tuple[dict[str, str], str | None],
    mask: Path | None,
) -> Measured:
    images = _read(case)
    first = next(iter(images.values()))
    grid = first.grid
    box, found = body_box({"CT": first} if "CT" in images else images), None
    if labels is not None:
        found = _Found(check_labels(case, grid, labels).array_zyx, labels)
    elif mask is not None:
        found = _Found(found_region(mask, grid).array_zyx, REGION)
    bulk = found.bulk() if found else None
    voxel_ml = math.prod(grid.spacing_zyx_mm) / 1000
    oriented, cropped = _oriented(first, orientation), _oriented(_cropped(first, box), orientation)
    record = CaseFingerprint(
        case_id=case.case_id,
        modalities=tuple(images),
        shape_zyx=oriented.grid.shape_zyx,
        cropped_shape_zyx=cropped.grid.shape_zyx,
        spacing_zyx_mm=oriented.grid.spacing_zyx_mm,
        label_voxels=found.voxels if found else {},
        oddities=tuple(_oddities(images, modalities, box, found)),
        images_sha256=digests[0],
        labels_sha256=digests[1],
        labelled_voxels=found.labelled if found else 0,
        label_ml={name: voxels * voxel_ml for name, voxels in found.voxels.items()} if found else {},
        label_parts=found.parts() if found else {},
        bulk_shape_zyx=_oriented(_cropped(first, bulk), orientation).grid.shape_zyx if bulk else None,
    )
    histograms = _histograms(images, found, found.box if found and found.labelled else box)
    return Measured(record, histograms, _thumbnail(cropped.array_zyx))


def _cropped(volume: Volume, box: Box) -> Volume:
    """For its shape and orientation; where it lies is left as it was."""
    return Volume(volume.array_zyx[box], dataclasses.replace(volume.grid, shape_zyx=_shape_of(box)))


def _oriented(volume: Volume, orientation: str | None) -> Volume:
    return volume if orientation is None else orient(volume, orientation)


def _read(case: Case) -> dict[str, Volume]:
    """The images, in their units; beside a CT that comes first, which alone shows where the body is, each on its own
    grid, since only some of its voxels are wanted on the CT's; else all on the grid of the first."""
    if next(iter(case.images)) != "CT":
        return read_in_units(case)
    images: dict[str, Volume] = {}
    for modality, path in case.images.items():
        images |= read_in_units(dataclasses.replace(case, images={modality: path}))
        if not fields_of_view_overlap(images["CT"].grid, images[modality].grid):
            raise DatasetError(
                f"{path} shares no space with {case.images['CT']}. Are both from the same patient and examination, "
                "with their positions kept?"
            )
    return images


def _histograms(images: dict[str, Volume], found: _Found | None, region: Box) -> dict[str, Histogram]:
    """Of the foreground, all of which lies in `region` of the first image's grid."""
    grid = next(iter(images.values())).grid
    inside = {modality: _within(volume, grid, region, modality) for modality, volume in images.items()}
    tallies = {modality: Tally() for modality in images}
    for planes, mask in found.masks() if found and found.labelled else _body_masks(images, region):
        for modality, tally in tallies.items():
            tally.add(inside[modality][planes][mask])
    return {modality: tally.histogram for modality, tally in tallies.items()}


def _within(volume: Volume, grid: Grid, region: Box, modality: str) -> np.ndarray:
    """An image's voxels in a region of a grid."""
    if grids_differ_mm(volume.grid, grid) <= GRID_TOLERANCE_MM:
        return volume.array_zyx[region]
    start_xyz = [side.start for side in region[::-1]]
    corner = (grid.affine @ (*start_xyz, 1))[:3]
    part = dataclasses.replace(grid, shape_zyx=_shape_of(region), origin_xyz_mm=tuple(corner.tolist()))
    if not fields_of_view_overlap(volume.grid, part):
        return np.full(part.shape_zyx, air_value(modality), np.float32)
    return onto_grid(volume, part, air_value(modality)).array_zyx


class _Found:
    """What a label map shows of the declared outputs."""

    def __init__(self, array_zyx: np.ndarray, labels: Labels):
        self.array_zyx, self._outputs = array_zyx, dict(zip(labels.names, labels.values))
        self._wanted = sorted({value for values in labels.values for value in values})
        counts = label_counts(array_zyx)
        self.voxels = {name: _sum_of(counts, values) for name, values in self._outputs.items()}
        self.labelled = _sum_of(counts, self._wanted)
        self.box = _occupied(array_zyx) if self.labelled else tuple(slice(0, 0) for _ in range(3))

    def outside(self, box: Box) -> int:
        """Labelled voxels outside of a box."""
        both = tuple(slice(max(a.start, b.start), max(a.start, b.start, min(a.stop, b.stop)))
                     for a, b in zip(self.box, box))  # fmt: skip
        return 0 if both == self.box else self.labelled - _sum_of(label_counts(self.array_zyx[both]), self._wanted)

    def bulk(self) -> Box | None:
        """The `bulk_box` of all outputs."""
        inside = bulk_box(mask for _, mask in self.masks()) if self.labelled else None
        return inside and tuple(slice(a.start + b.start, a.start + b.stop) for a, b in zip(self.box, inside))

    def parts(self) -> dict[str, int]:
        """Connected components per output."""
        inside = self.array_zyx[self.box]
        objects = ndimage.find_objects(inside) if self.labelled else []
        counted, left = {}, _MOST_VOXELS_FOR_PARTS
        for name, values in self._outputs.items():
            boxes = [objects[value - 1] for value in values if value <= len(objects) and objects[value - 1]]
            region = tuple(slice(min(b[axis].start for b in boxes), max(b[axis].stop for b in boxes))
                           for axis in range(3)) if boxes else None  # fmt: skip
            left -= math.prod(_shape_of(region)) if region else 0
            if region is None:
                counted[name] = 0
            elif left >= 0:
                counted[name] = ndimage.label(np.isin(inside[region], values), _TOUCHING)[1]
        return counted

    def masks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """The voxels of any output in the box, slab by slab: planes of the box, and a mask of them."""
        inside = self.array_zyx[self.box]
        return ((planes, np.isin(inside[planes], self._wanted)) for planes in _slabs(inside.shape))


def _body_masks(images: dict[str, Volume], region: Box) -> Iterator[tuple[slice, np.ndarray]]:
    modality = "CT" if "CT" in images else next(iter(images))
    array_zyx, first = images[modality].array_zyx, region[0].start
    for planes in _slabs((region[0].stop - first, *array_zyx.shape[1:])):
        # The mask of a PET looks one voxel around, so it is made of one more plane on each side.
        start, stop = first + planes.start, first + planes.stop
        before = min(1, start)
        mask = body_mask(array_zyx[start - before : stop + 1], modality)
        yield planes, mask[(slice(before, before + stop - start), *region[1:])]


def _oddities(
    images: dict[str, Volume], modalities: Sequence[str], box: Box, found: _Found | None
) -> Iterator[str]:
    grid = next(iter(images.values())).grid
    missing = [modality for modality in modalities if modality not in images]
    if missing:
        yield f"no {', '.join(missing)}"
    if min(grid.shape_zyx) < _SMALL_AXIS_VOXELS:
        yield f"only {min(grid.shape_zyx)} voxels along an axis"
    if max(grid.spacing_zyx_mm) > _LONG_VOXELS * min(grid.spacing_zyx_mm):
        yield f"voxels {max(grid.spacing_zyx_mm) / min(grid.spacing_zyx_mm):.1f} times longer than wide"
    for modality, volume in images.items():
        for what, value, usual in (("lowest", volume.array_zyx.min(), _USUAL_LOWEST),
                                   ("highest", volume.array_zyx.max(), _USUAL_HIGHEST)):  # fmt: skip
            low, high, meaning = usual.get(modality, (-math.inf, math.inf, ""))
            if not low <= value <= high:
                yield f"the {what} value of the {modality} is {value:.4g}: {meaning}"
    if found is not None and not found.labelled:
        yield "nothing is labelled"
    outside = found.outside(box) if found is not None else 0
    if outside:
        yield f"{outside} labelled voxels lie outside the body, where a prediction does not look"


def _thumbnail(array_zyx: np.ndarray) -> np.ndarray:
    """Block means, float64 (8, 8, 8); along an axis of fewer voxels, the nearest ones."""
    starts = [np.arange(THUMBNAIL_EDGE) * size // THUMBNAIL_EDGE for size in array_zyx.shape]
    planes = np.zeros((len(array_zyx), THUMBNAIL_EDGE, THUMBNAIL_EDGE))
    for plane, out in zip(array_zyx, planes):
        rows = np.add.reduceat(plane, starts[1], axis=0, dtype=np.float64)
        out[:] = np.add.reduceat(rows, starts[2], axis=1)
    sums = np.add.reduceat(planes, starts[0], axis=0)
    z, y, x = (np.maximum(np.diff(start, append=size), 1) for start, size in zip(starts, array_zyx.shape))
    return sums / (z[:, None, None] * y[:, None] * x)


def _occupied(array_zyx: np.ndarray) -> Box:
    """The smallest box with everything that is not 0."""
    planes = np.flatnonzero([plane.any() for plane in array_zyx])
    z = slice(int(planes[0]), int(planes[-1]) + 1)
    seen = np.zeros(array_zyx.shape[1:], bool)
    for plane in array_zyx[z]:
        seen |= plane != 0
    y, x = (np.flatnonzero(seen.any(axis=axis)) for axis in (1, 0))
    return z, slice(int(y[0]), int(y[-1]) + 1), slice(int(x[0]), int(x[-1]) + 1)


def _slabs(shape_zyx: ZYX) -> Iterator[slice]:
    """All planes, about a million voxels at a time."""
    step = max(1, _SLAB_VOXELS // math.prod(shape_zyx[1:]))
    return (slice(z, min(z + step, shape_zyx[0])) for z in range(0, shape_zyx[0], step))


def _shape_of(box: Box) -> ZYX:
    z, y, x = (side.stop - side.start for side in box)
    return z, y, x


def _sum_of(counts: np.ndarray, values: Sequence[int]) -> int:
    return int(sum(counts[value] for value in values if value < len(counts)))


def _keep(path: Path, key: str, measured: Measured) -> None:
    tensors = {"thumbnail": measured.thumbnail_zyx}
    for modality, histogram in measured.histograms.items():
        tensors |= {f"{modality}.bins": histogram.bins, f"{modality}.counts": histogram.counts}
    moments = {modality: to_dict(histogram.moments) for modality, histogram in measured.histograms.items()}
    text = json.dumps({"key": key, "record": to_dict(measured.record), "moments": moments})
    with atomic_path(path) as aside:
        save_file(tensors, aside, {"measured": text})  # one entry: several are written in no certain order


def _read_kept(path: Path, key: str) -> Measured | None:
    """What was kept under this key; None where there is nothing, something else, or a damaged file."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "np") as file:
            told = json.loads(file.metadata()["measured"])
            if told["key"] != key:
                return None
            histograms = {
                name: Histogram(*(file.get_tensor(f"{name}.{what}") for what in ("bins", "counts")),
                                from_dict(Moments, moments, str(path), DatasetError))
                for name, moments in told["moments"].items()
            }  # fmt: skip
            record = from_dict(CaseFingerprint, told["record"], str(path), DatasetError)
            return Measured(record, histograms, file.get_tensor("thumbnail"))
    except (SafetensorError, DatasetError, ValueError, KeyError, TypeError):
        return None
