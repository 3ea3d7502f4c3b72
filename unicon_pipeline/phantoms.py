"""Made-up chests: CT and PET volumes and whole task folders, for the demonstration and the tests.

A scene is drawn first (`phantom_scene`: numbers only), then rendered. The same seed gives the same arrays
on every call. CT is in HU, PET in SUV on its own coarser grid. Every finding has a visible correlate in the CT.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unicon_pipeline.contract import ZYX, SpacingZYX
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.geometry import Volume, onto_grid, write_image, write_labels
from unicon_pipeline.phantom_render import render
from unicon_pipeline.phantom_scene import draw_scene, generators
from unicon_pipeline.records import atomic_path, write_json

DEFAULT_SHAPE_ZYX: ZYX = (64, 96, 96)
DEFAULT_SPACING_ZYX_MM: SpacingZYX = (5.0, 4.0, 4.0)
MODALITIES = ("CT", "PET")
TASK_TYPES = {"lesions": "segmentation", "findings": "classification", "survival": "prognosis"}

_BLANK_SHARE = 0.04


@dataclass(frozen=True)
class Phantom:
    """A rendered scene.

    `ct`: HU, whole numbers in float32. `pet`: SUV on its own grid. `lesions`: 1 = lesion, on the CT's grid.
    `organs`: values of `ORGANS`, on the CT's grid. `findings`: 0 or 1 each. `clinical`: None is a gap.
    `time_days` to the event (`event` 1) or to the last visit (`event` 0).
    """

    ct: Volume
    pet: Volume
    lesions: Volume
    organs: Volume
    findings: dict[str, int]
    clinical: dict[str, float | str | None]
    time_days: float
    event: int
    log_hazard: float


def make_phantom(
    seed: int, *, shape_zyx: ZYX = DEFAULT_SHAPE_ZYX, spacing_zyx_mm: SpacingZYX = DEFAULT_SPACING_ZYX_MM
) -> Phantom:
    """Draws and renders one phantom; all of it is determined by `seed`, the grid only samples it.

    Args:
        shape_zyx, spacing_zyx_mm: the CT's grid. Below 320 x 300 x 384 mm (z, y, x) the body shrinks with the
            field of view, and its lesions with it.

    Raises:
        DatasetError: the grid has fewer than 8 voxels along an axis or a spacing that is not positive.
    """
    if len(shape_zyx) != 3 or min(shape_zyx) < 8 or len(spacing_zyx_mm) != 3 or not min(spacing_zyx_mm) > 0:
        raise DatasetError(
            f"No phantom fits a grid of {shape_zyx} voxels (z, y, x) of {spacing_zyx_mm} mm: "
            "use at least 8 voxels along each axis and positive spacings."
        )
    scene = draw_scene(seed)
    ct, pet, lesions, organs = render(scene, tuple(map(int, shape_zyx)), tuple(map(float, spacing_zyx_mm)))
    truth = (scene.findings, scene.clinical, scene.time_days, scene.event, scene.log_hazard)
    return Phantom(ct, pet, lesions, organs, *truth)


def case_seed(seed: int, index: int) -> int:
    """The phantom seed of case `index` of a task made with `seed`; other tasks' cases are other patients."""
    return int(np.random.SeedSequence([int(seed), int(index)]).generate_state(1)[0])


def write_phantom_task(
    folder: Path,
    kind: str,
    n: int,
    seed: int,
    *,
    shape_zyx: ZYX = DEFAULT_SHAPE_ZYX,
    spacing_zyx_mm: SpacingZYX = DEFAULT_SPACING_ZYX_MM,
    modalities: Sequence[str] = ("CT",),
    region: str | None = None,
) -> Path:
    """Writes a complete task folder of `n` phantoms, `phantom_0001` and so on; returns `folder`.

    Args:
        kind: "lesions" (segmentation, label 1), "findings" (multi-label, some cells blank = not annotated)
            or "survival" (`time_days`, `event`, and `clinical.csv` with gaps).
        modalities: the channels in order, each image on its own grid; labels lie on the first one's grid.
        region: of findings and survival, the segmentation task that finds what they look at; lesions are labelled.

    Raises:
        DatasetError: unknown kind or modality, no cases asked for, or a region of a segmentation task.
    """
    folder = Path(folder)
    _check_modalities(modalities, modalities)
    if kind not in TASK_TYPES or n < 1:
        raise DatasetError(f"Cannot make {n} cases of kind {kind!r}: choose one of {', '.join(TASK_TYPES)}, n >= 1.")
    if region is not None and kind == "lesions":
        raise DatasetError(f"The region {region} is for findings and survival; lesions are a segmentation task.")
    targets, clinical = {}, {}
    for index in range(n):
        case_id = f"phantom_{index + 1:04d}"
        phantom = make_phantom(case_seed(seed, index), shape_zyx=shape_zyx, spacing_zyx_mm=spacing_zyx_mm)
        _write_channels(folder / "imagesTr", case_id, phantom, modalities, modalities)
        if kind == "lesions" or region is not None:
            grid = _image(phantom, modalities[0]).grid
            labels = phantom.lesions if modalities[0] == "CT" else onto_grid(phantom.lesions, grid, 0.0, nearest=True)
            write_labels(folder / "labelsTr" / f"{case_id}.nii.gz", labels.array_zyx, grid)
        if kind == "findings":
            (for_blanks,) = generators(case_seed(seed, index), "blanks", 1)
            blank = for_blanks.random(len(phantom.findings)) < _BLANK_SHARE
            targets[case_id] = {k: "" if b else v for (k, v), b in zip(phantom.findings.items(), blank, strict=True)}
        elif kind == "survival":
            targets[case_id] = {"time_days": phantom.time_days, "event": phantom.event}
            clinical[case_id] = phantom.clinical
    for name, rows in (("targets.csv", targets), ("clinical.csv", clinical)):
        if rows:
            _write_table(folder / name, rows)
    description = _description(modalities) | {"numTraining": n, "task_type": TASK_TYPES[kind]}
    if kind == "lesions" or region is not None:
        description["labels"] = {"background": 0, "lesion": 1}
    if region is not None:
        description["region"] = region
    write_json(folder / "dataset.json", description)
    return folder


def write_phantom_images(
    folder: Path,
    seeds: Iterable[int],
    modalities: Sequence[str] = MODALITIES,
    *,
    channels: Sequence[str] = MODALITIES,
    prefix: str = "phantom",
    shape_zyx: ZYX = DEFAULT_SHAPE_ZYX,
    spacing_zyx_mm: SpacingZYX = DEFAULT_SPACING_ZYX_MM,
) -> dict[str, Phantom]:
    """Writes images alone, as for a prediction, with `dataset.json` (channel names) and `clinical.csv` beside them.

    Args:
        seeds: of `make_phantom`, one a case: `<prefix>_0001` and so on in this order.
        modalities: the images to write; a subset of `channels`, whose order gives the file numbers.

    Returns:
        Case -> its phantom, the truth to compare a prediction with.

    Raises:
        DatasetError: an unknown modality or one that is not among the channels.
    """
    folder = Path(folder)
    _check_modalities(modalities, channels)
    phantoms: dict[str, Phantom] = {}
    for number, seed in enumerate(seeds, start=1):
        case_id = f"{prefix}_{number:04d}"
        phantoms[case_id] = make_phantom(seed, shape_zyx=shape_zyx, spacing_zyx_mm=spacing_zyx_mm)
        _write_channels(folder, case_id, phantoms[case_id], modalities, channels)
    _write_table(folder / "clinical.csv", {case_id: phantom.clinical for case_id, phantom in phantoms.items()})
    write_json(folder / "dataset.json", _description(channels))
    return phantoms


def _check_modalities(modalities: Sequence[str], channels: Sequence[str]) -> None:
    wrong = [name for name in (*modalities, *channels) if name not in MODALITIES]
    if wrong or not modalities or len(set(channels)) != len(channels) or not set(modalities) <= set(channels):
        raise DatasetError(
            f"Phantoms cannot be written as {list(modalities)} in the channels {list(channels)}: "
            f"choose among {', '.join(MODALITIES)}, each once, and images only of the channels."
        )


def _description(channels: Sequence[str]) -> dict[str, Any]:
    return {"channel_names": {str(i): name for i, name in enumerate(channels)}, "file_ending": ".nii.gz"}


def _image(phantom: Phantom, modality: str) -> Volume:
    return phantom.ct if modality == "CT" else phantom.pet


def _write_channels(
    folder: Path, case_id: str, phantom: Phantom, modalities: Sequence[str], channels: Sequence[str]
) -> None:
    for modality in modalities:
        image = _image(phantom, modality)
        path = folder / f"{case_id}_{list(channels).index(modality):04d}.nii.gz"
        write_image(path, image.array_zyx, image.grid)


def _write_table(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    with atomic_path(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["case_id", *columns])
        writer.writeheader()
        writer.writerows({"case_id": case_id, **row} for case_id, row in rows.items())  # None is written as a gap
