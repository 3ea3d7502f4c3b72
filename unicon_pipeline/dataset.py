"""Task folders: nnU-Net v2 raw datasets with a few optional additions, read and checked.

`dataset.json`, `imagesTr/<case>_0000.nii.gz` (channel 0) and so on, `labelsTr/<case>.nii.gz`; optional:
`task_type`, `patients`, `intensity` in `dataset.json`, `targets.csv`, `clinical.csv`, and held-out cases in
`imagesTs` and `labelsTs`. A case may lack any channel but must have one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unicon_pipeline.errors import DatasetError
from unicon_pipeline.geometry import (
    GRID_TOLERANCE_MM,
    Grid,
    Volume,
    grids_differ_mm,
    image_ending,
    onto_grid,
    read_image,
    read_labels,
)
from unicon_pipeline.label_spec import Labels, parse_labels
from unicon_pipeline.records import read_json
from unicon_pipeline.tables import Table, outcome_faults, read_table, shown

TASK_TYPES = ("segmentation", "classification", "prognosis")
KNOWN_MODALITIES = ("CT", "PET")
_FILL = {"CT": -1024.0}
_CASE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-+]*")
_CHANNEL_FILE = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class Case:
    """`images`: modality -> file, in channel order, only those that exist."""

    case_id: str
    images: dict[str, Path]
    labels: Path | None
    patient: str


@dataclass(frozen=True)
class Task:
    """A task folder. `modalities`: in channel order. `intensity`: declared schemes of modalities other than CT, PET.

    `held_out_cases` (imagesTs, labelsTs) are never trained on.
    """

    name: str
    folder: Path
    task_type: str
    modalities: tuple[str, ...]
    intensity: dict[str, str]
    labels: Labels | None
    file_ending: str
    cases: tuple[Case, ...]
    held_out_cases: tuple[Case, ...]
    targets: Table | None
    clinical: Table | None


def resolve_task(task: str, work: Path) -> Path:
    """The folder of a task: a name under `work`/raw, or a path.

    Raises:
        DatasetError: there is no such folder; lists the tasks that there are.
    """
    raw = Path(work) / "raw"
    for folder in (raw / task, Path(task)):
        if (folder / "dataset.json").is_file():
            return folder
    known = sorted(path.parent.name for path in raw.glob("*/dataset.json"))
    raise DatasetError(
        f"No task {task!r}: neither {raw / task} nor {task} holds a dataset.json. "
        f"Tasks in {raw}: {', '.join(known) or 'none'}."
    )


def read_task(folder: Path) -> Task:
    """Reads and checks a task folder; images themselves are checked when they are read.

    Raises:
        DatasetError: lists everything that is wrong with the folder.
    """
    folder = Path(folder)
    source = folder / "dataset.json"
    description = read_json(source, DatasetError)
    if not isinstance(description, dict):
        raise DatasetError(f"{source} must hold an object with channel_names, labels and file_ending.")
    if not _CASE_ID.fullmatch(folder.resolve().name):
        raise DatasetError(f"{folder}: a task's name may hold letters, digits and _ . - + only.")
    modalities = tuple(parse_channels(description, source).values())
    targets = read_table(folder / "targets.csv") if (folder / "targets.csv").is_file() else None
    clinical = read_table(folder / "clinical.csv") if (folder / "clinical.csv").is_file() else None
    task_type = _task_type(description, folder, targets)
    ending = str(description.get("file_ending", ".nii.gz"))
    patients = description.get("patients", {})
    channels = dict(enumerate(modalities))
    cases = _cases(folder / "imagesTr", folder / "labelsTr", channels, ending, patients)
    held_out = _cases(folder / "imagesTs", folder / "labelsTs", channels, ending, patients)
    task = Task(
        name=folder.resolve().name,
        folder=folder,
        task_type=task_type,
        modalities=modalities,
        intensity=_declared_intensity(description, modalities, source),
        labels=parse_labels(description, source) if task_type == "segmentation" else None,
        file_ending=ending,
        cases=cases,
        held_out_cases=held_out,
        targets=targets,
        clinical=clinical,
    )
    faults = list(_faults(task))
    if faults:
        raise DatasetError(f"{folder}:\n{shown(faults)}")
    return task


def prediction_cases(source: Path, channel_names: Mapping[int, str], file_ending: str) -> tuple[Case, ...]:
    """The cases of a folder (or one image file) to predict.

    Files are `<case>_0000.nii.gz` and so on; a file without a channel number is channel 0. The channel names of a
    `dataset.json` in the folder win over `channel_names`.

    Raises:
        DatasetError: nothing is there, or a channel number has no name.
    """
    source = Path(source)
    folder = source if source.is_dir() else source.parent
    description = folder / "dataset.json"
    if description.is_file():
        channel_names = parse_channels(read_json(description, DatasetError), description)
    files = [source] if source.is_file() else sorted(path for path in source.glob("*") if path.is_file())
    images = [path for path in files if image_ending(path) == (file_ending if source.is_dir() else image_ending(path))]
    found: dict[str, dict[int, Path]] = {}
    for path in images:
        case_id, number = split_channel(path)
        found.setdefault(case_id, {})[number or 0] = path
    if not found or image_ending(images[0]) is None:
        there = ", ".join(path.name for path in files[:5]) or "nothing"
        raise DatasetError(
            f"{source} holds no image to predict; expected files such as case1_0000{file_ending} "
            f"(channel 0, {channel_names.get(0, 'CT')}). Found: {there}."
        )
    unknown = sorted({number for numbers in found.values() for number in numbers} - set(channel_names))
    if unknown:
        names = ", ".join(f"{number:04d} {name}" for number, name in channel_names.items())
        raise DatasetError(
            f"{source} has files of channel {unknown[0]:04d}, such as "
            f"{next(n[unknown[0]].name for n in found.values() if unknown[0] in n)}; known channels are {names}. "
            'Name the channels in a dataset.json beside the images: {"channel_names": {"0": "CT", "1": "PET"}}.'
        )
    return tuple(_case(case_id, numbers, channel_names, None, case_id) for case_id, numbers in sorted(found.items()))


def read_case(case: Case) -> dict[str, Volume]:
    """All channels of a case, brought onto the grid of the first one that is present.

    Returns:
        modality -> float32 volume in the file's units (HU, SUV), in channel order.

    Raises:
        DatasetError: a file is unusable, or the fields of view do not overlap.
    """
    volumes: dict[str, Volume] = {}
    reference: Grid | None = None
    for modality, path in case.images.items():
        volume = read_image(path)
        if reference is None:
            reference = volume.grid
        elif grids_differ_mm(reference, volume.grid) > GRID_TOLERANCE_MM:
            try:
                volume = onto_grid(volume, reference, _FILL.get(modality, 0.0))
            except DatasetError as problem:
                raise DatasetError(f"{path}: {problem}") from problem
        volumes[modality] = volume
    return volumes


def check_labels(case: Case, image_grid: Grid, labels: Labels) -> Volume:
    """A case's label map, int16, on the grid of its first image.

    Raises:
        DatasetError: another grid, or a value that `labels` does not name.
    """
    volume = read_labels(case.labels)
    image = next(iter(case.images.values()))
    difference = grids_differ_mm(image_grid, volume.grid)
    if difference > GRID_TOLERANCE_MM:
        shapes = f"{volume.grid.shape_zyx} voxels (z, y, x) and {image_grid.shape_zyx}"
        raise DatasetError(
            f"{case.labels} and {image} are not on one grid: {shapes}, corners up to {difference:.3g} mm apart. "
            "Resample the labels onto the image."
        )
    known = {0, labels.ignore, *(value for values in labels.values for value in values)}
    wrong = sorted(set(np.unique(volume.array_zyx).tolist()) - known)
    if wrong:
        named = sorted(value for value in known if value is not None)
        raise DatasetError(f"{case.labels} holds the label values {wrong[:10]}; dataset.json names {named}.")
    return volume


def patient_folds(task: Task, k: int = 5, seed: int = 0) -> tuple[tuple[str, ...], ...]:
    """Validation case ids of each fold; min(k, patients) folds, none splits a patient."""
    patients: dict[str, list[str]] = {}
    for case in task.cases:
        patients.setdefault(case.patient, []).append(case.case_id)
    order = sorted(patients)
    np.random.default_rng(seed).shuffle(order)
    count = min(k, len(order))
    return tuple(tuple(sorted(c for p in order[fold::count] for c in patients[p])) for fold in range(count))


def parse_channels(description: Any, source: Path) -> dict[int, str]:
    """Channel number -> modality, from `channel_names`; CT and PET are recognised in any case."""
    named = description.get("channel_names") if isinstance(description, dict) else None
    if not isinstance(named, dict) or not named or not all(str(key).isdigit() for key in named):
        raise DatasetError(f'{source} needs channel_names, such as {{"0": "CT", "1": "PET"}}.')
    channels = {}
    for number, name in sorted((int(key), str(value)) for key, value in named.items()):
        channels[number] = name.upper() if name.upper() in KNOWN_MODALITIES else name
        if not _CASE_ID.fullmatch(channels[number]):
            raise DatasetError(f"{source}: channel {number} is named {name!r}; use letters, digits and _ . - + only.")
    if sorted(channels) != list(range(len(channels))) or len(set(channels.values())) != len(channels):
        raise DatasetError(f"{source}: channel_names must count from 0 without gaps and name each modality once.")
    return channels


def split_channel(path: Path) -> tuple[str, int | None]:
    """`case_0001.nii.gz` -> ("case", 1); without a channel number -> (name, None)."""
    stem = path.name.removesuffix(image_ending(path) or "")
    match = _CHANNEL_FILE.fullmatch(stem)
    return (match[1], int(match[2])) if match else (stem, None)


def _cases(
    images: Path, labels: Path, channels: Mapping[int, str], ending: str, patients: Mapping[str, str]
) -> tuple[Case, ...]:
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(images.glob(f"*{ending}")) if images.is_dir() else ():
        case_id, number = split_channel(path)
        if number in channels and _CASE_ID.fullmatch(case_id):
            found.setdefault(case_id, {})[number] = path
    return tuple(
        _case(case_id, numbers, channels, label if (label := labels / f"{case_id}{ending}").is_file() else None,
              str(patients.get(case_id, case_id)))
        for case_id, numbers in found.items()
    )  # fmt: skip


def _case(
    case_id: str, numbers: Mapping[int, Path], channels: Mapping[int, str], labels: Path | None, patient: str
) -> Case:
    return Case(case_id, {channels[number]: numbers[number] for number in sorted(numbers)}, labels, patient)


def _task_type(description: dict, folder: Path, targets: Table | None) -> str:
    declared = description.get("task_type")
    if declared is not None and declared not in TASK_TYPES:
        raise DatasetError(f"{folder / 'dataset.json'}: task_type {declared!r}; expected {' or '.join(TASK_TYPES)}.")
    if declared:
        return declared
    if (folder / "labelsTr").is_dir():
        return "segmentation"
    if targets is None:
        raise DatasetError(f"{folder} has neither labelsTr/ (segmentation) nor targets.csv (other task types).")
    return "prognosis" if {"time_days", "event"} <= set(targets.columns) else "classification"


def _declared_intensity(description: dict, modalities: tuple[str, ...], source: Path) -> dict[str, str]:
    declared = {str(key): str(value) for key, value in dict(description.get("intensity", {})).items()}
    silent = [name for name in modalities if name not in KNOWN_MODALITIES and name not in declared]
    if silent:
        raise DatasetError(
            f"{source}: {silent[0]} is neither CT nor PET, so its intensity scheme must be declared: "
            f'"intensity": {{"{silent[0]}": "zscore"}}.'
        )
    return {name: declared[name] for name in modalities if name in declared}


def _faults(task: Task) -> Iterable[str]:
    if not task.cases:
        files = sorted(path.name for path in (task.folder / "imagesTr").glob("*"))[:5]
        yield (
            f"no case found: imagesTr/ needs files such as case1_0000{task.file_ending} "
            f"(channel 0, {task.modalities[0]}); it holds {', '.join(files) or 'nothing'}"
        )
    if task.labels is not None:
        for case in task.cases:
            if case.labels is None:
                yield f"{case.case_id} has images but no labelsTr/{case.case_id}{task.file_ending}"
        return
    if task.targets is None:
        yield f"a {task.task_type} task needs targets.csv"
        return
    known = {case.case_id for case in task.cases}
    missing = sorted(known - set(task.targets.case_ids))
    if missing:
        yield f"targets.csv has no row for {', '.join(missing[:5])}"
    if task.task_type == "prognosis":
        absent = {"time_days", "event"} - set(task.targets.columns)
        if absent:
            yield f"targets.csv lacks the column {', '.join(sorted(absent))}, which prognosis needs"
        else:
            yield from (f"targets.csv: {fault}" for fault in outcome_faults(task.targets))
