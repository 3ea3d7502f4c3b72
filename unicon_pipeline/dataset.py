"""Task folders: nnU-Net v2 raw datasets with a few optional additions, read and checked.

`dataset.json`, `imagesTr/<case>_0000.nii.gz` (channel 0) and so on, `labelsTr/<case>.nii.gz`; optional:
`task_type`, `region`, `patients`, `intensity` in `dataset.json`, `targets.csv`, `clinical.csv`, and held-out cases in
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

from unicon_pipeline.description import (
    is_safe_name,
    parse_channels,
    parse_file_ending,
    parse_intensity,
    parse_patients,
    parse_region,
    parse_task_type,
)
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
from unicon_pipeline.tables import Table, class_faults, enumerated, outcome_faults, read_table, scan_table, shown

logger = logging.getLogger(__name__)

_FILL = {"CT": -1024.0}
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

    `held_out_cases` (imagesTs, labelsTs) are never trained on. `region`: of a classification or prognosis task, the
    segmentation task of the same model that finds what is looked at; `labels` then names the values of the label maps
    that mark it, None where there are none.
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
    region: str | None = None


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
    targets = attempt(_optional_table, folder / "targets.csv", faults)
    clinical = attempt(_optional_table, folder / "clinical.csv", faults)
    outcomes = (folder / "targets.csv").is_file()
    task_type = attempt(parse_task_type, description, folder, targets.columns if targets else () if outcomes else None)
    region = attempt(parse_region, description, task_type, source)
    channels = attempt(parse_channels, description, source)
    ending = attempt(parse_file_ending, description, source)
    patients = attempt(parse_patients, description, source)
    intensity = attempt(parse_intensity, description, tuple((channels or {}).values()), source)
    labelled = any((folder / f"labels{split}").is_dir() for split in ("Tr", "Ts"))
    labels = None
    if task_type == "segmentation" or (region and labelled):
        labels = attempt(parse_labels, description, source)
    if channels is None or ending is None or patients is None:
        raise DatasetError(f"{folder}:\n{shown(faults)}")
    cases, held_out = (
        _cases(folder / f"images{split}", folder / f"labels{split}", channels, ending, patients, faults)
        for split in ("Tr", "Ts")
    )
    modalities = tuple(channels.values())
    parts = (intensity, labels, ending, cases, held_out, targets, clinical, region)
    task = Task(name, folder, task_type, modalities, *parts)
    faults += _case_faults(task, patients)
    if task_type in ("classification", "prognosis"):
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
    description = _beside(source, "dataset.json")
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


def prediction_clinical(source: Path) -> Table | None:
    """The `clinical.csv` beside the images of a prediction (above them in a task folder), or None.

    Cases without a row are told: their covariates are unknown. So are rows without images where the table lies beside
    the images of a folder.

    Raises:
        DatasetError: there is one that cannot be used; lists its rows.
    """
    source = Path(source)
    path = _beside(source, "clinical.csv")
    if path is None:
        return None
    table = read_table(path)
    files = [source] if source.is_file() else _visible_files(source)
    case_ids = {split_channel(file)[0] for file in files if image_ending(file)}
    missing = sorted(case_ids - set(table.case_ids))
    if missing:
        logger.warning("%s has no row for %s: what it would say is unknown there.", path, enumerated(missing))
    strangers = [case_id for case_id in table.case_ids if case_id not in case_ids]
    if strangers and path.parent == source:
        logger.warning("%s: rows without images: %s", path, enumerated(strangers))
    return table


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


def split_channel(path: Path) -> tuple[str, int | None]:
    """`case_0001.nii.gz` -> ("case", 1); without a channel number -> (name, None)."""
    stem = path.name.removesuffix(image_ending(path) or "")
    match = _CHANNEL_FILE.fullmatch(stem)
    return (match[1], int(match[2])) if match else (stem, None)


def _beside(source: Path, name: str) -> Path | None:
    """A file beside the images of `source` (a folder or an image), or above them in a task folder."""
    folder = source if source.is_dir() else source.parent
    places = (folder, folder.parent) if folder.name in ("imagesTr", "imagesTs") else (folder,)
    return next((place / name for place in places if (place / name).is_file()), None)


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


def _optional_table(path: Path, faults: list[str]) -> Table | None:
    if not path.is_file():
        return None
    table, wrong = scan_table(path)
    faults += [f"{path.name}: {fault}" for fault in wrong]
    return table


def _table_faults(task: Task) -> Iterable[str]:
    known = {case.case_id for case in (*task.cases, *task.held_out_cases)}
    strangers = {
        name: [table.place(at) for at, case_id in enumerate(table.case_ids) if case_id not in known]
        for name, table in (("targets.csv", task.targets), ("clinical.csv", task.clinical)) if table is not None
    }  # fmt: skip
    for name, places in strangers.items():
        if places:
            logger.warning("%s: rows without images: %s", task.folder / name, enumerated(places))
    if task.targets is None:
        if not (task.folder / "targets.csv").is_file():
            yield f"a {task.task_type} task needs targets.csv"
        return
    missing = [case.case_id for case in task.cases if case.case_id not in set(task.targets.case_ids)]
    if missing:
        others = f"; it has rows without images: {enumerated(strangers['targets.csv'])}"
        alike = {_loosely(case_id): case_id for case_id in missing}
        pairs = [f"{row} for {alike[_loosely(row)]}" for row in task.targets.case_ids if _loosely(row) in alike]
        hint = f". Perhaps {enumerated(pairs)}: spreadsheets drop leading zeros, names must agree" if pairs else ""
        yield f"targets.csv has no row for {enumerated(missing)}{others if strangers['targets.csv'] else ''}{hint}"
    faults = outcome_faults if task.task_type == "prognosis" else class_faults
    yield from (f"targets.csv: {fault}" for fault in faults(task.targets))


def _loosely(case_id: str) -> str:
    """The same for names that differ in case, in leading zeros, or in what follows the case's name in a file's."""
    stem = split_channel(Path(case_id))[0]
    return re.sub(r"(?<!\d)0+(?=\d)", "", stem.casefold())
