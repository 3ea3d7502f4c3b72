"""Soft-tissue sarcoma, FDG-PET/CT -> task folders.

    python -m dataset_conversion.soft_tissue_sarcoma -i SRC -o WORK/raw

Source: Soft-tissue-Sarcoma collection of The Cancer Imaging Archive (Vallieres et al., Phys Med Biol 2015,
CC BY 3.0), as prepared in the IBSI data sets: SRC/STS_*/{CT,PET}_{image,mask}.nii.gz (PET in SUV), SRC/clinical.csv.

Makes, of the patients that SRC has:
- `STS_GTV_CT`, `STS_GTV_CTPET`: segmentation of the gross tumour volume, drawn on the CT; PET keeps its own grid.
- `STS_EFS`: event-free survival (event: recurrence or metastasis; time: days to it, else to the last follow-up).
- `STS_Grade`: high grade or not; unknown grades are blank.
  Both look at the tumour: the masks are theirs as well, and `region` names the task that finds it where there is none.
- `STS_images`: only where patients lack a mask: their images, for `unicon_predict -i`.

Covariates are those known when the images were made: age, sex, type, site, and for `STS_EFS` the grade (from biopsy).
Treatment was chosen later and is left out, like status and outcome; so is the histology, whose free text is different
for almost every patient (`mskcc_type` groups it), and of the site its side. The table does not say from which day it
counts.
Patients without what a task needs are left out of it, and named. Files are copied byte for byte. A second run brings
the folders in line with its own input and `--hold-out`: files of patients that moved or went are removed.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from unicon_pipeline.errors import DatasetError, UniconError
from unicon_pipeline.records import atomic_path, write_json

MODALITIES = ("CT", "PET")
COVARIATES = ("age_years", "sex", "mskcc_type", "site", "grade")
REGION = "STS_GTV_CTPET"
LABELS = {"background": 0, "tumour": 1}
ORIGIN = "Soft-tissue-Sarcoma, The Cancer Imaging Archive (Vallieres et al., Phys Med Biol 2015), IBSI; CC BY 3.0"


@dataclass(frozen=True)
class Patient:
    """One folder of the source and its row in the clinical table (None: no row)."""

    name: str
    folder: Path
    row: dict[str, str] | None

    def file(self, modality: str, what: str) -> Path | None:
        """`what`: image or mask; None where there is no such file."""
        path = self.folder / f"{modality}_{what}.nii.gz"
        return path if path.is_file() else None

    def field(self, column: str) -> str:
        """A cell of the clinical table, stripped; empty where there is none."""
        return (self.row or {}).get(column, "").strip()

    @property
    def mask(self) -> Path | None:
        """Of the tumour, on the CT's grid; None without a CT."""
        return self.file("CT", "mask") if self.file("CT", "image") else None

    @property
    def covariates(self) -> dict[str, str]:
        """What was known when the images were made."""
        cells = {name: self.field(name) for name in COVARIATES}
        return cells | {"site": re.sub(r"(left|right)\s+", "", cells["site"], flags=re.IGNORECASE)}

    @property
    def outcome(self) -> tuple[float, int] | None:
        """(time in days, event), or None where the table does not tell."""
        event = bool(self.field("outcome"))
        days = self.field("days_to_outcome" if event else "days_to_last_follow_up")
        usable = re.fullmatch(r"\d+(\.\d*)?", days) and float(days) > 0
        return (float(days), int(event)) if usable else None

    @property
    def high_grade(self) -> int | None:
        """1 high, 0 intermediate or low, None unknown."""
        return {"high": 1, "intermediate": 0, "low": 0}.get(self.field("grade").lower())


def main(argv: Sequence[str] | None = None) -> int:
    """Console entry; 0 done, 2 nothing could be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", "--input", type=Path, required=True, help="the source folder with STS_* in it")
    parser.add_argument("-o", "--out", type=Path, required=True, help="where the task folders go, usually WORK/raw")
    parser.add_argument(
        "--hold-out", nargs="+", default=[], metavar="ID", help="patients for imagesTs and labelsTs, never trained on"
    )
    options = parser.parse_args(argv)
    try:
        print(convert(options.input, options.out, options.hold_out))
    except (UniconError, OSError) as problem:
        print(problem, file=sys.stderr)
        return 2
    return 0


def convert(source: Path, out: Path, hold_out: Sequence[str] = ()) -> str:
    """Writes the task folders; safe to run again. Returns a summary for a person.

    Raises:
        DatasetError: no patient in `source`, a patient to hold out is not there, or an unusable clinical table.
    """
    patients = read_patients(Path(source))
    unknown = sorted(set(hold_out) - {patient.name for patient in patients})
    if unknown:
        raise DatasetError(f"--hold-out: {source} has no patient {', '.join(unknown)}.")
    lines = []
    masked = [p for p in patients if p.mask]
    for task, modalities in (("STS_GTV_CT", ("CT",)), (REGION, MODALITIES)):
        if masked:
            folder = Path(out) / task
            _write_files(folder, masked, modalities, hold_out)
            extra = {"labels": LABELS, "task_type": "segmentation"}
            _write_description(folder, modalities, extra, masked, hold_out)
        lines.append(_summary(task, patients, masked, "a CT with a mask", hold_out))
    followed = [p for p in patients if p.outcome is not None]
    lines.append(_summary("STS_EFS", patients, followed, "a time of outcome or follow-up above 0 days", hold_out))
    if followed:
        outcomes = {p.name: dict(zip(("time_days", "event"), p.outcome, strict=True)) for p in followed}
        _write_table_task(Path(out) / "STS_EFS", "prognosis", followed, outcomes, hold_out)
        lines[-1] += f"; {sum(p.outcome[1] for p in followed)} events"
    graded = [p for p in patients if p.row is not None]
    lines.append(_summary("STS_Grade", patients, graded, "a row in the clinical table", hold_out))
    if graded:
        grades = {p.name: {"high_grade": p.high_grade} for p in graded}
        _write_table_task(Path(out) / "STS_Grade", "classification", graded, grades, hold_out)
        blank = [p.name for p in graded if p.high_grade is None]
        lines[-1] += f"; grade unknown, so left blank: {', '.join(blank)}" if blank else ""
    lines += _write_unmasked(Path(out) / "STS_images", [p for p in patients if p not in masked])
    return "\n".join(lines)


def read_patients(source: Path) -> tuple[Patient, ...]:
    """The patients of the source folder that have a CT or a PET.

    Raises:
        DatasetError: there is none, or the clinical table lacks its key column or names a patient twice.
    """
    rows = _clinical_rows(source / "clinical.csv")
    folders = sorted(path for path in source.glob("STS_*") if path.is_dir())
    patients = tuple(
        Patient(folder.name, folder, rows.get(folder.name))
        for folder in folders
        if any((folder / f"{modality}_image.nii.gz").is_file() for modality in MODALITIES)
    )
    if not patients:
        raise DatasetError(f"{source} holds no folder STS_*/ with CT_image.nii.gz or PET_image.nii.gz.")
    return patients


def _clinical_rows(path: Path) -> dict[str, dict[str, str]]:
    if not path.is_file():
        return {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, restval=""))
    except (UnicodeDecodeError, csv.Error) as problem:
        raise DatasetError(f"{path} cannot be read: {problem}. Expected comma-separated values in UTF-8.") from problem
    if rows and "patient" not in rows[0]:
        raise DatasetError(f"{path} has no column patient; found: {', '.join(map(str, rows[0]))}.")
    twice = [name for name, count in Counter(row["patient"] for row in rows).items() if count > 1]
    if twice:
        raise DatasetError(f"{path} has several rows for {', '.join(twice)}; keep one for each patient.")
    return {row["patient"]: row for row in rows}


def _write_table_task(
    folder: Path,
    task_type: str,
    patients: Sequence[Patient],
    targets: dict[str, dict[str, object]],
    hold_out: Sequence[str],
) -> None:
    _write_files(folder, patients, MODALITIES, hold_out)
    _write_csv(folder / "targets.csv", targets)
    # The grade is what STS_Grade predicts, so it is no covariate there.
    hidden = {"grade"} if task_type == "classification" else set()
    covariates = {p.name: {k: v for k, v in p.covariates.items() if k not in hidden} for p in patients}
    _write_csv(folder / "clinical.csv", covariates)
    # Without any mask nothing from here can teach a model to find the tumour.
    looks_at = {"region": REGION, "labels": LABELS} if any(p.mask for p in patients) else {}
    _write_description(folder, MODALITIES, {"task_type": task_type, **looks_at}, patients, hold_out)


def _write_unmasked(folder: Path, patients: Sequence[Patient]) -> list[str]:
    files = _images(patients, MODALITIES, folder)
    _copy_all(files)
    # Who has a mask by now belongs to the tasks.
    for stale in set(folder.glob("STS_*.nii.gz")) - set(files):
        stale.unlink()
    if not patients:
        return []
    write_json(folder / "dataset.json", _description(MODALITIES, {}))
    return [f"{folder.name}: images of {len(patients)} patients without a mask, for unicon_predict -i {folder}"]


def _write_files(folder: Path, patients: Sequence[Patient], modalities: Sequence[str], hold_out: Sequence[str]) -> None:
    files: dict[Path, Path] = {}
    for suffix, held in (("Tr", False), ("Ts", True)):
        chosen = [p for p in patients if (p.name in hold_out) == held]
        files |= _images(chosen, modalities, folder / f"images{suffix}")
        files |= {folder / f"labels{suffix}" / f"{p.name}.nii.gz": p.mask for p in chosen if p.mask}
    _copy_all(files)
    # A patient who was held out before and is not now, or the other way round, must not stay in both.
    for subfolder in ("imagesTr", "imagesTs", "labelsTr", "labelsTs"):
        for stale in set((folder / subfolder).glob("STS_*.nii.gz")) - set(files):
            stale.unlink()


def _images(patients: Iterable[Patient], modalities: Sequence[str], folder: Path) -> dict[Path, Path]:
    """Destination -> source."""
    return {
        folder / f"{patient.name}_{number:04d}.nii.gz": image
        for patient in patients
        for number, modality in enumerate(modalities)
        if (image := patient.file(modality, "image"))
    }


def _copy_all(files: dict[Path, Path]) -> None:
    for destination, source in files.items():
        with atomic_path(destination) as aside:
            shutil.copyfile(source, aside)


def _description(modalities: Sequence[str], extra: dict[str, object]) -> dict[str, object]:
    channels = {str(number): modality for number, modality in enumerate(modalities)}
    return {"channel_names": channels, "file_ending": ".nii.gz", "reference": ORIGIN, **extra}


def _write_description(
    folder: Path, modalities: Sequence[str], extra: dict[str, object], patients: Sequence[Patient],
    hold_out: Sequence[str],
) -> None:  # fmt: skip
    training = sum(p.name not in hold_out for p in patients)
    write_json(folder / "dataset.json", _description(modalities, {"numTraining": training, **extra}))


def _write_csv(path: Path, rows: dict[str, dict[str, object]]) -> None:
    with atomic_path(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case_id", *next(iter(rows.values()))])
        writer.writerows([name, *("" if v is None else v for v in row.values())] for name, row in rows.items())


def _summary(
    task: str, patients: Sequence[Patient], usable: Sequence[Patient], needed: str, hold_out: Sequence[str]
) -> str:
    if not usable:
        return f"{task}: not written, no patient has {needed}"
    left_out = [p.name for p in patients if p not in usable]
    held = sum(p.name in hold_out for p in usable)
    text = f"{task}: {len(usable) - held} patients" + (f", {held} held out" if held else "")
    return text + (f"; without {needed}, so left out: {', '.join(left_out)}" if left_out else "")


if __name__ == "__main__":
    sys.exit(main())
