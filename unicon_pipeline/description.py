"""What a task's `dataset.json` says, field by field; labels are in `label_spec`."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from unicon_pipeline.errors import DatasetError
from unicon_pipeline.geometry import IMAGE_ENDINGS

logger = logging.getLogger(__name__)

TASK_TYPES = ("segmentation", "classification", "prognosis")
KNOWN_MODALITIES = ("CT", "PET")
INTENSITY_SCHEMES = ("zscore",)
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-+]*")


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


def parse_task_type(description: dict, folder: Path, outcomes: Collection[str] | None) -> str:
    """What is declared, else what the folder holds: labels mean segmentation, else the targets decide.

    Args:
        outcomes: the columns of `targets.csv`, None without that file.
    """
    declared = description.get("task_type")
    if declared is not None and declared not in TASK_TYPES:
        raise DatasetError(f"dataset.json: task_type is {declared!r}; expected {' or '.join(TASK_TYPES)}")
    if declared:
        return declared
    by_outcomes = "prognosis" if {"time_days", "event"} <= set(outcomes or ()) else "classification"
    if (folder / "labelsTr").is_dir() and outcomes is not None:
        logger.warning(
            '%s has labelsTr/, so it is a segmentation task and targets.csv is left aside. If not, write "task_type": '
            '"%s" into dataset.json, and for a crop around what is labelled, "region": "<a segmentation task>".',
            folder, by_outcomes,
        )  # fmt: skip
    if (folder / "labelsTr").is_dir() or (outcomes is None and (folder / "labelsTs").is_dir()):
        return "segmentation"
    if outcomes is None:
        raise DatasetError("there is neither labelsTr/ (segmentation) nor targets.csv (other task types)")
    return by_outcomes


def parse_region(description: dict, task_type: str, source: Path) -> str | None:
    """The segmentation task whose findings a classification or prognosis task looks at, or None."""
    region = description.get("region")
    if region is None:
        if task_type != "segmentation" and (source.parent / "labelsTr").is_dir():
            logger.warning(
                '%s: labelsTr/ is left aside; "region": "<a segmentation task>" would use it.', source.parent
            )
        return None
    if not isinstance(region, str) or not is_safe_name(region):
        raise DatasetError(f"{source}: region is {region!r}; expected the name of a segmentation task of the model.")
    if task_type == "segmentation":
        raise DatasetError(
            f"{source}: only classification and prognosis look at a region, and this is a segmentation task. Write "
            '"task_type": "classification" or "prognosis", or remove region.'
        )
    if region == source.parent.resolve().name:
        raise DatasetError(f"{source}: region names this task itself; expected a segmentation task of the model.")
    return region


def parse_file_ending(description: dict, source: Path) -> str:
    """`file_ending`, .nii.gz if left out."""
    ending = description.get("file_ending", ".nii.gz")
    if ending not in IMAGE_ENDINGS:
        raise DatasetError(f"{source}: file_ending is {ending!r}; expected one of {', '.join(IMAGE_ENDINGS)}.")
    return ending


def parse_patients(description: dict, source: Path) -> dict[str, str]:
    """Case -> patient, of the cases that `patients` names."""
    patients = description.get("patients", {})
    if not isinstance(patients, dict) or not all(isinstance(patient, str | int) for patient in patients.values()):
        raise DatasetError(f'{source}: patients must name the patient of each case, such as {{"case1": "patient1"}}.')
    return {case_id: str(patient) for case_id, patient in patients.items()}


def parse_intensity(description: dict, modalities: tuple[str, ...], source: Path) -> dict[str, str]:
    """Modality -> scheme, of those that are neither CT nor PET."""
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


def is_safe_name(name: str) -> bool:
    """Whether a case, task or modality may be called so: letters, digits, _ . - +, no step out of a folder."""
    return _SAFE_NAME.fullmatch(name) is not None and ".." not in name
