"""Soft-tissue sarcoma, FDG-PET/CT -> task folders.

    python -m dataset_conversion.soft_tissue_sarcoma -i SRC -o WORK/raw

Source: Soft-tissue-Sarcoma collection of The Cancer Imaging Archive (Vallieres et al., Phys Med Biol 2015,
CC BY 3.0), as prepared in the IBSI data sets: SRC/STS_*/{CT,PET}_{image,mask}.nii.gz (PET in SUV), SRC/clinical.csv.

Makes, of the patients that SRC has:
- `STS_GTV_CT`, `STS_GTV_CTPET`: segmentation of the gross tumour volume, drawn on the CT; PET keeps its own grid.
- `STS_EFS`: event-free survival (event: recurrence or metastasis; time: days to it, else to the last follow-up).
- `STS_Grade`: high grade or not; unknown grades are blank.

Covariates are those known before treatment; treatment, status and outcome never enter `clinical.csv`.
Patients without a mask, or without a row in the clinical table, are left out of the tasks that need it, and named.
Where SRC has no mask at all, `STS_images` holds the images for `unicon_predict`.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from unicon_pipeline.errors import DatasetError, UniconError
from unicon_pipeline.records import atomic_path, write_json

MODALITIES = ("CT", "PET")
COVARIATES = ("age_years", "sex", "mskcc_type", "site", "grade")
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

    @property
    def outcome(self) -> tuple[float, int] | None:
        """(time in days, event), or None where the table does not tell."""
        if self.row is None:
            return None
        event = bool(self.row["outcome"].strip())
        days = self.row["days_to_outcome" if event else "days_to_last_follow_up"].strip()
        return (float(days), int(event)) if days else None

    @property
    def high_grade(self) -> int | None:
        """1 high, 0 intermediate or low, None unknown."""
        grade = self.row["grade"].strip().lower() if self.row else ""
        return int(grade == "high") if grade else None


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
    except UniconError as problem:
        print(problem, file=sys.stderr)
        return 2
    return 0


def convert(source: Path, out: Path, hold_out: Sequence[str] = ()) -> str:
    """Writes the task folders; safe to run again. Returns a summary for a person.

    Raises:
        DatasetError: no patient in `source`, or a patient to hold out is not there.
    """
    patients = read_patients(Path(source))
    unknown = sorted(set(hold_out) - {patient.name for patient in patients})
    if unknown:
        raise DatasetError(f"--hold-out: {source} has no patient {', '.join(unknown)}.")
    lines = []
    masked = [p for p in patients if p.file("CT", "image") and p.file("CT", "mask")]
    if not masked:
        folder = Path(out) / "STS_images"
        _write_images(folder, patients, MODALITIES)
        write_json(folder / "dataset.json", _description(MODALITIES, {}))
        return f"{folder}: images of {len(patients)} patients, for unicon_predict -i (no masks in {source})"
    for task, modalities in (("STS_GTV_CT", ("CT",)), ("STS_GTV_CTPET", MODALITIES)):
        folder = Path(out) / task
        for suffix, chosen in _split(masked, hold_out):
            _write_images(folder / f"images{suffix}", chosen, modalities)
            for patient in chosen:
                _copy(patient.file("CT", "mask"), folder / f"labels{suffix}" / f"{patient.name}.nii.gz")
        labels = {"labels": {"background": 0, "tumour": 1}, "task_type": "segmentation"}
        write_json(folder / "dataset.json", _description(modalities, labels))
        lines.append(_summary(folder, patients, masked, "a CT mask", hold_out))
    followed = [p for p in patients if p.outcome is not None]
    outcomes = {p.name: dict(zip(("time_days", "event"), p.outcome, strict=True)) for p in followed}
    lines.append(_write_table_task(Path(out) / "STS_EFS", "prognosis", patients, followed, outcomes, hold_out))
    rows = [p for p in patients if p.row is not None]
    grades = {p.name: {"high_grade": p.high_grade} for p in rows}
    lines.append(_write_table_task(Path(out) / "STS_Grade", "classification", patients, rows, grades, hold_out))
    return "\n".join(lines)


def read_patients(source: Path) -> tuple[Patient, ...]:
    """The patients of the source folder that have a CT or a PET."""
    rows = {}
    if (source / "clinical.csv").is_file():
        with open(source / "clinical.csv", newline="", encoding="utf-8-sig") as file:
            rows = {row["patient"]: row for row in csv.DictReader(file)}
    folders = sorted(path for path in source.glob("STS_*") if path.is_dir())
    patients = tuple(
        Patient(folder.name, folder, rows.get(folder.name))
        for folder in folders
        if any((folder / f"{modality}_image.nii.gz").is_file() for modality in MODALITIES)
    )
    if not patients:
        raise DatasetError(f"{source} holds no folder STS_*/ with CT_image.nii.gz or PET_image.nii.gz.")
    return patients


def _write_table_task(
    folder: Path, task_type: str, patients: Sequence[Patient], usable: Sequence[Patient],
    targets: dict[str, dict[str, object]], hold_out: Sequence[str],
) -> str:  # fmt: skip
    if not usable:
        return f"{folder.name}: not written, the source has no clinical table"
    for suffix, chosen in _split(usable, hold_out):
        _write_images(folder / f"images{suffix}", chosen, MODALITIES)
    extra = {"clinical": "covariates known before treatment", "task_type": task_type}
    write_json(folder / "dataset.json", _description(MODALITIES, extra))
    _write_csv(folder / "targets.csv", {p.name: targets[p.name] for p in usable})
    # The grade is what STS_Grade predicts, so it is no covariate there.
    covariates = [name for name in COVARIATES if task_type == "prognosis" or name != "grade"]
    _write_csv(folder / "clinical.csv", {p.name: {name: p.row[name] for name in covariates} for p in usable})
    return _summary(folder, patients, usable, "an outcome" if task_type == "prognosis" else "a clinical row", hold_out)


def _split(patients: Sequence[Patient], hold_out: Sequence[str]) -> Iterable[tuple[str, list[Patient]]]:
    yield "Tr", [p for p in patients if p.name not in hold_out]
    if hold_out:
        yield "Ts", [p for p in patients if p.name in hold_out]


def _write_images(folder: Path, patients: Iterable[Patient], modalities: Sequence[str]) -> None:
    for patient in patients:
        for number, modality in enumerate(modalities):
            if image := patient.file(modality, "image"):
                _copy(image, folder / f"{patient.name}_{number:04d}.nii.gz")


def _copy(source: Path, destination: Path) -> None:
    with atomic_path(destination) as aside:
        shutil.copyfile(source, aside)


def _description(modalities: Sequence[str], extra: dict[str, object]) -> dict[str, object]:
    channels = {str(number): modality for number, modality in enumerate(modalities)}
    return {"channel_names": channels, "file_ending": ".nii.gz", "reference": ORIGIN, **extra}


def _write_csv(path: Path, rows: dict[str, dict[str, object]]) -> None:
    with atomic_path(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case_id", *next(iter(rows.values()))])
        writer.writerows([name, *("" if v is None else v for v in row.values())] for name, row in rows.items())


def _summary(
    folder: Path, patients: Sequence[Patient], usable: Sequence[Patient], needed: str, hold_out: Sequence[str]
) -> str:
    left_out = [p.name for p in patients if p not in usable]
    held = sum(p.name in hold_out for p in usable)
    text = f"{folder.name}: {len(usable) - held} patients" + (f", {held} held out" if held else "")
    return text + (f"; without {needed}, so left out: {', '.join(left_out)}" if left_out else "")


if __name__ == "__main__":
    sys.exit(main())
