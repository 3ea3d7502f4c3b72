"""Task folders: nnU-Net v2 raw datasets with a few optional additions, read and checked.

`dataset.json`, `imagesTr/<case>_0000.nii.gz` (channel 0) and so on, `labelsTr/<case>.nii.gz`; optional:
`task_type`, `patients`, `intensity` in `dataset.json`, `targets.csv`, `clinical.csv`, and held-out cases in
`imagesTs` and `labelsTs`. A case may lack any channel but must have one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unicon_pipeline.errors import DatasetError
from unicon_pipeline.geometry import (
    GRID_TOLERANCE_MM,
    IMAGE_ENDINGS,
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
from unicon_pipeline.tables import Table, class_faults, outcome_faults, read_table, shown

logger = logging.getLogger(__name__)

TASK_TYPES = ("segmentation", "classification", "prognosis")
KNOWN_MODALITIES = ("CT", "PET")
INTENSITY_SCHEMES = ("zscore",)
_FILL = {"CT": -1024.0}
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-+]*")
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
    faults: list[str] = []

    def attempt(read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except DatasetError as problem:
            faults.append(str(problem))
            return None

    name = folder.resolve().name
    if not is_safe_name(name):
        faults.append("a task's name may hold letters, digits and _ . - + only, and must start with a letter or digit")
    targets = attempt(_optional_table, folder / "targets.csv")
    clinical = attempt(_optional_table, folder / "clinical.csv")
    task_type = attempt(_task_type, description, folder, (folder / "targets.csv").is_file(), targets)
    channels = attempt(parse_channels, description, source)
    ending = attempt(_file_ending, description, source)
    patients = attempt(_patients, description, source)
    intensity = attempt(_declared_intensity, description, tuple((channels or {}).values()), source)
    labels = attempt(parse_labels, description, source) if task_type == "segmentation" else None
    if channels is None or ending is None or patients is None:
        raise DatasetError(f"{folder}:\n{shown(faults)}")
    cases, held_out = (
        _cases(folder / f"images{split}", folder / f"labels{split}", channels, ending, patients, faults)
        for split in ("Tr", "Ts")
    )
    modalities = tuple(channels.values())
    task = Task(name, folder, task_type, modalities, intensity, labels, ending, cases, held_out, targets, clinical)
    faults += _case_faults(task, patients)
    if task_type in ("classification", "prognosis") and not faults:
        faults += _table_faults(task)
    if faults:
        raise DatasetError(f"{folder}:\n{shown(faults)}")
    return task


def prediction_cases(source: Path, channel_names: Mapping[int, str]) -> tuple[Case, ...]:
    """The cases of a folder (or one image file) to predict.

    Files are `<case>_0000.nii.gz` and so on, of any supported ending; a file without a channel number is channel 0.
    The channel names of a `dataset.json` in the folder win over `channel_names`; for `imagesTr` and `imagesTs` also
    those of one in the folder above.

    Raises:
        DatasetError: nothing is there, no channel number has a name, or two files claim one channel of a case.
    """
    source = Path(source)
    if not source.exists():
        raise DatasetError(f"{source} does not exist; expected a folder of images, or one image.")
    folder = source if source.is_dir() else source.parent
    above = [folder.parent / "dataset.json"] if folder.name in ("imagesTr", "imagesTs") else []
    description = next((path for path in (folder / "dataset.json", *above) if path.is_file()), None)
    if description is not None:
        channel_names = parse_channels(read_json(description, DatasetError), description)
    files = [source] if source.is_file() else _visible_files(source)
    images = [path for path in files if image_ending(path)]
    found: dict[str, dict[int, Path]] = {}
    for path in images:
        case_id, number = split_channel(path)
        first = found.setdefault(case_id, {}).setdefault(number or 0, path)
        if first != path:
            raise DatasetError(f"{first} and {path.name} are both channel 0000 of {case_id}; remove or rename one.")
    if not found:
        there = ", ".join(path.name for path in files[:5]) or "nothing"
        raise DatasetError(
            f"{source} holds no image to predict; expected files such as case1_0000.nii.gz "
            f"(channel 0, {channel_names.get(0, 'CT')}). Found: {there}."
        )
    named = {case: {n: path for n, path in numbers.items() if n in channel_names} for case, numbers in found.items()}
    unknown = sorted({number for numbers in found.values() for number in numbers} - set(channel_names))
    if unknown:
        known = ", ".join(f"{number:04d} {name}" for number, name in channel_names.items())
        what = f"{source} has files of channel {unknown[0]:04d}; the channels that the wanted tasks know are {known}."
        if not any(named.values()):
            fix = 'Name the channels in a dataset.json beside the images: {"channel_names": {"0": "CT", "1": "PET"}}.'
            raise DatasetError(f"{what} {fix}")
        logger.warning("%s Its files are left aside.", what)
    found = {case: numbers for case, numbers in named.items() if numbers}
    return tuple(_case(case_id, numbers, channel_names, None, case_id) for case_id, numbers in sorted(found.items()))


def read_case(case: Case) -> dict[str, Volume]:
    """All channels of a case, brought onto the grid of the first one that is present.

    Returns:
        modality -> float32 volume in the file's units (HU, SUV), in channel order.

    Raises:
        DatasetError: a file is unusable, or the fields of view do not overlap.
    """
    return on_one_grid((modality, path, read_image(path)) for modality, path in case.images.items())


def on_one_grid(channels: Iterable[tuple[str, Path | str, Volume]]) -> dict[str, Volume]:
    """Channels (modality, what messages call it, volume) on the grid of the first; raises and gives as `read_case`."""
    volumes: dict[str, Volume] = {}
    for modality, name, volume in channels:
        reference = next(iter(volumes.values()), volume).grid
        if grids_differ_mm(reference, volume.grid) > GRID_TOLERANCE_MM:
            try:
                volume = onto_grid(volume, reference, _FILL.get(modality, 0.0))
            except DatasetError as problem:
                raise DatasetError(f"{name}: {problem}") from problem
        volumes[modality] = volume
    return volumes


def check_labels(case: Case, image_grid: Grid, labels: Labels) -> Volume:
    """A case's label map, of a small integer type, on the grid of its first image.

    Raises:
        DatasetError: no label file, another grid, or a value that `labels` does not name.
    """
    if case.labels is None:
        raise DatasetError(f"{case.case_id} has no label file.")
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
    wrong = sorted(set(np.flatnonzero(label_counts(volume.array_zyx)).tolist()) - known)
    if wrong:
        named = sorted(value for value in known if value is not None)
        raise DatasetError(f"{case.labels} holds the label values {wrong[:10]}; dataset.json names {named}.")
    return volume


def label_counts(array_zyx: np.ndarray) -> np.ndarray:
    """Voxels of each value from 0 to the largest, int64."""
    counts = np.zeros(int(array_zyx.max(initial=0)) + 1, np.int64)
    for plane in array_zyx:  # some at a time, since bincount makes 64-bit copies; rows of background are most of it
        counts += np.bincount(plane[plane.any(axis=1)].reshape(-1), minlength=len(counts))
    counts[0] += array_zyx.size - counts.sum()
    return counts


def parse_channels(description: Any, source: Path) -> dict[int, str]:
    """Channel number -> modality, from `channel_names`; CT and PET are recognised in any case."""
    named = description.get("channel_names") if isinstance(description, dict) else None
    if not isinstance(named, dict) or not named or not all(re.fullmatch("[0-9]{1,4}", key) for key in named):
        raise DatasetError(f'{source} needs channel_names, such as {{"0": "CT", "1": "PET"}}.')
    channels = {}
    for number, name in sorted((int(key), str(value)) for key, value in named.items()):
        channels[number] = name.upper() if name.upper() in KNOWN_MODALITIES else name
        if not is_safe_name(channels[number]) or "." in name:  # torch names a stem after its modality: no dots
            raise DatasetError(f"{source}: channel {number} is named {name!r}; use letters, digits and _ - + only.")
    if sorted(channels) != list(range(len(channels))) or len(set(channels.values())) != len(channels):
        raise DatasetError(f"{source}: channel_names must count from 0 without gaps and name each modality once.")
    return channels


def split_channel(path: Path) -> tuple[str, int | None]:
    """`case_0001.nii.gz` -> ("case", 1); without a channel number -> (name, None)."""
    stem = path.name.removesuffix(image_ending(path) or "")
    match = _CHANNEL_FILE.fullmatch(stem)
    return (match[1], int(match[2])) if match else (stem, None)


def is_safe_name(name: str) -> bool:
    """Whether a case, task or modality may be called so: letters, digits, _ . - +, no step out of a folder."""
    return _SAFE_NAME.fullmatch(name) is not None and ".." not in name


def _visible_files(folder: Path) -> list[Path]:
    # Hidden files are half-written ones, or what a file manager left behind (._case_0000.nii.gz).
    # A link whose target is gone counts as a file: reading it fails by name, where leaving it out would be silent.
    return sorted(path for path in folder.glob("*") if not path.is_dir() and not path.name.startswith("."))


def _cases(
    images: Path, labels: Path, channels: Mapping[int, str], ending: str, patients: Mapping[str, str], faults: list[str]
) -> tuple[Case, ...]:
    found: dict[str, dict[int, Path]] = {}
    for path in _visible_files(images):
        case_id, number = split_channel(path)
        if image_ending(path) != ending:
            continue
        if number is None:
            faults.append(f"{images.name}/{path.name} has no channel number; rename it to {case_id}_0000{ending}")
        elif number not in channels:
            known = ", ".join(f"{known:04d} {name}" for known, name in channels.items())
            faults.append(f"{images.name}/{path.name} is of channel {number:04d}; dataset.json names {known}")
        elif not is_safe_name(case_id):
            faults.append(f"{images.name}/{path.name}: a case's name may hold letters, digits and _ . - + only")
        else:
            found.setdefault(case_id, {})[number] = path
    annotated = {path.name.removesuffix(ending): path for path in _visible_files(labels) if path.name.endswith(ending)}
    faults += [f"{labels.name}/{path.name} has no image" for name, path in annotated.items() if name not in found]
    return tuple(
        _case(case_id, numbers, channels, annotated.get(case_id), patients.get(case_id, case_id))
        for case_id, numbers in found.items()
    )


def _case(
    case_id: str, numbers: Mapping[int, Path], channels: Mapping[int, str], labels: Path | None, patient: str
) -> Case:
    return Case(case_id, {channels[number]: numbers[number] for number in sorted(numbers)}, labels, patient)


def _task_type(description: dict, folder: Path, has_targets: bool, targets: Table | None) -> str | None:
    declared = description.get("task_type")
    if declared is not None and declared not in TASK_TYPES:
        raise DatasetError(f"dataset.json: task_type is {declared!r}; expected {' or '.join(TASK_TYPES)}")
    if declared:
        return declared
    if (folder / "labelsTr").is_dir() or (not has_targets and (folder / "labelsTs").is_dir()):
        return "segmentation"
    if not has_targets:
        raise DatasetError("there is neither labelsTr/ (segmentation) nor targets.csv (other task types)")
    if targets is None:
        return None
    return "prognosis" if {"time_days", "event"} <= set(targets.columns) else "classification"


def _optional_table(path: Path) -> Table | None:
    return read_table(path) if path.is_file() else None


def _file_ending(description: dict, source: Path) -> str:
    ending = description.get("file_ending", ".nii.gz")
    if ending not in IMAGE_ENDINGS:
        raise DatasetError(f"{source}: file_ending is {ending!r}; expected one of {', '.join(IMAGE_ENDINGS)}.")
    return ending


def _patients(description: dict, source: Path) -> dict[str, str]:
    patients = description.get("patients", {})
    if not isinstance(patients, dict) or not all(isinstance(patient, str | int) for patient in patients.values()):
        raise DatasetError(f'{source}: patients must name the patient of each case, such as {{"case1": "patient1"}}.')
    return {case_id: str(patient) for case_id, patient in patients.items()}


def _declared_intensity(description: dict, modalities: tuple[str, ...], source: Path) -> dict[str, str]:
    declared = description.get("intensity", {})
    if not isinstance(declared, dict):
        raise DatasetError(f'{source}: intensity must name the scheme of each modality, such as {{"T1": "zscore"}}.')
    others = [name for name in modalities if name not in KNOWN_MODALITIES]
    silent = [name for name in others if name not in declared]
    if silent:
        raise DatasetError(
            f"{source}: {silent[0]} is neither CT nor PET, so its intensity scheme must be declared: "
            f'"intensity": {{"{silent[0]}": "zscore"}}.'
        )
    foreign = [name for name in others if declared[name] not in INTENSITY_SCHEMES]
    if foreign:
        found = f"{declared[foreign[0]]!r}; expected {' or '.join(INTENSITY_SCHEMES)}"
        raise DatasetError(f"{source}: the intensity of {foreign[0]} is {found}.")
    return {name: declared[name] for name in others}


def _case_faults(task: Task, patients: Mapping[str, str]) -> Iterable[str]:
    if not task.cases and not task.held_out_cases:
        files = [path.name for path in _visible_files(task.folder / "imagesTr")][:5]
        yield (
            f"no case found: imagesTr/ needs files such as case1_0000{task.file_ending} "
            f"(channel 0, {task.modalities[0]}); it holds {', '.join(files) or 'nothing'}"
        )
    if task.task_type == "segmentation":
        for case in task.cases:
            if case.labels is None:
                yield f"{case.case_id} has images but no labelsTr/{case.case_id}{task.file_ending}"
    training, held_out = {case.case_id for case in task.cases}, {case.case_id for case in task.held_out_cases}
    both = training & held_out
    yield from (f"{name} is in imagesTr and in imagesTs; keep it in one" for name in sorted(both))
    shared = {case.patient for case in task.cases} & {case.patient for case in task.held_out_cases}
    yield from (f"patient {name} has cases in imagesTr and in imagesTs" for name in sorted(shared - both))
    unknown = sorted(set(patients) - training - held_out)
    if unknown:
        yield f"dataset.json: patients names cases without images: {', '.join(unknown[:5])}"


def _table_faults(task: Task) -> Iterable[str]:
    if task.targets is None:
        yield f"a {task.task_type} task needs targets.csv"
        return
    known = {case.case_id for case in (*task.cases, *task.held_out_cases)}
    missing = [case.case_id for case in task.cases if case.case_id not in set(task.targets.case_ids)]
    strangers = {
        table_name: [case_id for case_id in table.case_ids if case_id not in known]
        for table_name, table in (("targets.csv", task.targets), ("clinical.csv", task.clinical)) if table is not None
    }  # fmt: skip
    for table_name, case_ids in strangers.items():
        if case_ids:
            listed = ", ".join(case_ids[:10]) + (", ..." if len(case_ids) > 10 else "")
            logger.warning("%s: rows without images: %s", task.folder / table_name, listed)
    if missing:
        others = f" (it has rows without images: {', '.join(strangers['targets.csv'][:5])})"
        yield f"targets.csv has no row for {', '.join(missing[:5])}{others if strangers['targets.csv'] else ''}"
    faults = outcome_faults if task.task_type == "prognosis" else class_faults
    yield from (f"targets.csv: {fault}" for fault in faults(task.targets))
