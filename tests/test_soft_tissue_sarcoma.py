"""The conversion of the sarcoma collection, on a made-up copy of its layout, and on the real one where it is there."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dataset_conversion.soft_tissue_sarcoma import convert, main
from unicon_pipeline.dataset import check_labels, prediction_cases, read_case, read_task
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.geometry import Grid, write_image, write_labels
from unicon_pipeline.label_spec import Labels

# A folder with `soft_tissue_sarcoma` in it, for who has the collection.
REAL = Path(os.environ.get("UNICON_REALDATA", "no such folder")) / "soft_tissue_sarcoma"
TUMOUR = Labels(("tumour",), ((1,),), False, (1,), None)
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
CT_GRID = Grid((6, 8, 8), (3.0, 1.0, 1.0), (0.0, 0.0, 0.0), IDENTITY)
# One slice shorter than the CT, as one patient's is.
PET_GRID = Grid((5, 3, 3), (3.0, 4.0, 4.0), (0.0, 0.0, 0.0), IDENTITY)
HEADER = (
    "patient,age_years,sex,histology,mskcc_type,site,grade,treatment,outcome,days_to_outcome,status,"
    "days_to_last_follow_up\n"
)
ROWS = {
    "STS_001": 'STS_001,59.0,Male,"liposarcoma, secret",Liposarcoma,left thigh,High,Chemo,Mets – lungs,266,D,845.0\n',
    "STS_002": "STS_002,61.0,Female,sarcoma,MFH,arm,Intermediate,Surgery,,,NED,501.0\n",
    "STS_003": "STS_003,,Female,sarcoma,MFH,arm,,Surgery,,,NED,756\n",
    "STS_004": "STS_004,40.0,Male,sarcoma,MFH,arm,Low,Surgery,Recurrence,,AWD,300\n",
}


@pytest.fixture
def source(tmp_path):
    """STS_001..004; 004 has no CT mask and no day of its outcome; 003 has no PET and no grade."""
    folder = tmp_path / "source folder"
    rng = np.random.default_rng(0)
    for name in ROWS:
        write_image(folder / name / "CT_image.nii.gz", rng.integers(-1000, 1000, CT_GRID.shape_zyx), CT_GRID)
        if name != "STS_003":
            write_image(folder / name / "PET_image.nii.gz", rng.uniform(0, 9, PET_GRID.shape_zyx), PET_GRID)
            write_labels(folder / name / "PET_mask.nii.gz", np.ones(PET_GRID.shape_zyx, int), PET_GRID)
        if name != "STS_004":
            mask = np.zeros(CT_GRID.shape_zyx, int)
            mask[2, 3, 4] = 1
            write_labels(folder / name / "CT_mask.nii.gz", mask, CT_GRID)
    (folder / "clinical.csv").write_text(HEADER + "".join(ROWS.values()), encoding="utf-8")
    return folder


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def line_of(summary, task):
    (line,) = [line for line in summary.splitlines() if line.startswith(f"{task}:")]
    return line


class TestTasks:
    def test_segmentation(self, source, tmp_path):
        summary = convert(source, tmp_path / "raw")
        ct, both = (read_task(tmp_path / "raw" / name) for name in ("STS_GTV_CT", "STS_GTV_CTPET"))
        assert (ct.modalities, both.modalities) == (("CT",), ("CT", "PET"))
        for task in (ct, both):
            assert task.task_type == "segmentation" and task.labels.names == ("tumour",)
            assert [case.case_id for case in task.cases] == ["STS_001", "STS_002", "STS_003"]
            assert json.loads((task.folder / "dataset.json").read_text())["numTraining"] == 3
            for case in task.cases:
                assert case.labels.read_bytes() == (source / case.case_id / "CT_mask.nii.gz").read_bytes()
                for modality, path in case.images.items():
                    assert path.read_bytes() == (source / case.case_id / f"{modality}_image.nii.gz").read_bytes()
            assert "without a CT with a mask, so left out: STS_004" in line_of(summary, task.name)
        assert [tuple(case.images) for case in both.cases] == [("CT", "PET"), ("CT", "PET"), ("CT",)]
        volumes = read_case(both.cases[0])
        assert volumes["PET"].grid == CT_GRID and (volumes["PET"].array_zyx[5] == 0).all()
        assert check_labels(both.cases[0], CT_GRID, both.labels).array_zyx.sum() == 1

    def test_survival(self, source, tmp_path):
        summary = convert(source, tmp_path / "raw")
        task = read_task(tmp_path / "raw" / "STS_EFS")
        assert (task.task_type, task.modalities, task.labels) == ("prognosis", ("CT", "PET"), TUMOUR)
        assert task.targets.case_ids == ("STS_001", "STS_002", "STS_003")
        # The first had an event on day 266 and was followed to day 845: the earlier one counts.
        assert task.targets.columns == {"time_days": (266.0, 501.0, 756.0), "event": (1.0, 0.0, 0.0)}
        assert "left out: STS_004; 1 events" in line_of(summary, "STS_EFS")

    def test_grade(self, source, tmp_path):
        summary = convert(source, tmp_path / "raw")
        task = read_task(tmp_path / "raw" / "STS_Grade")
        assert task.task_type == "classification"
        assert task.targets.columns == {"high_grade": (1.0, 0.0, None, 0.0)}
        assert len(task.cases) == 4
        assert "left blank: STS_003" in line_of(summary, "STS_Grade")

    @pytest.mark.parametrize("name", ["STS_EFS", "STS_Grade"])
    def test_the_tumour_is_the_region(self, source, tmp_path, name):
        convert(source, tmp_path / "raw")
        task = read_task(tmp_path / "raw" / name)
        assert (task.region, task.labels) == ("STS_GTV_CTPET", TUMOUR)
        for case in task.cases:
            mask = source / case.case_id / "CT_mask.nii.gz"
            assert (case.labels is None) == (case.case_id == "STS_004")
            assert case.labels is None or case.labels.read_bytes() == mask.read_bytes()

    def test_nothing_leaks_into_the_covariates(self, source, tmp_path):
        convert(source, tmp_path / "raw")
        known_before = {"case_id", "age_years", "sex", "mskcc_type", "site"}
        assert set(rows(tmp_path / "raw/STS_EFS/clinical.csv")[0]) == known_before | {"grade"}
        assert set(rows(tmp_path / "raw/STS_Grade/clinical.csv")[0]) == known_before
        for path in (tmp_path / "raw").rglob("*.csv"):
            text = path.read_text(encoding="utf-8")
            assert not any(word in text for word in ("Mets", "NED", "AWD", "Chemo", "845", "secret"))
        survival = rows(tmp_path / "raw/STS_EFS/clinical.csv")
        assert survival[2]["age_years"] == "" and [row["site"] for row in survival] == ["thigh", "arm", "arm"]


class TestHoldOut:
    def test_goes_to_the_test_folders(self, source, tmp_path):
        summary = convert(source, tmp_path / "raw", ["STS_002", "STS_004"])
        assert "2 patients, 1 held out" in line_of(summary, "STS_GTV_CTPET")
        for name in ("STS_GTV_CT", "STS_GTV_CTPET", "STS_EFS", "STS_Grade"):
            task = read_task(tmp_path / "raw" / name)
            assert [case.case_id for case in task.cases] == ["STS_001", "STS_003"]
            assert [case.case_id for case in task.held_out_cases][0] == "STS_002"
        assert names(tmp_path / "raw/STS_GTV_CT/labelsTs") == ["STS_002.nii.gz"]
        assert names(tmp_path / "raw/STS_Grade/imagesTs")[-1] == "STS_004_0001.nii.gz"
        images = tmp_path / "raw" / "STS_GTV_CTPET" / "imagesTs"
        (case,) = prediction_cases(images, {0: "PET"})
        assert tuple(case.images) == ("CT", "PET")

    def test_a_second_run_moves_patients_and_leaves_no_copy(self, source, tmp_path):
        folder = tmp_path / "raw" / "STS_GTV_CTPET"
        convert(source, tmp_path / "raw")
        before = {path: path.read_bytes() for path in (tmp_path / "raw").rglob("*") if path.is_file()}
        convert(source, tmp_path / "raw")
        assert before == {path: path.read_bytes() for path in (tmp_path / "raw").rglob("*") if path.is_file()}
        convert(source, tmp_path / "raw", ["STS_001"])
        assert names(folder / "labelsTr") == ["STS_002.nii.gz", "STS_003.nii.gz"]
        assert names(folder / "imagesTs") == ["STS_001_0000.nii.gz", "STS_001_0001.nii.gz"]
        convert(source, tmp_path / "raw", ["STS_002"])
        assert names(folder / "labelsTs") == ["STS_002.nii.gz"]
        assert len(read_task(folder).cases) == 2

    def test_unknown_patient(self, source, tmp_path):
        with pytest.raises(DatasetError, match="no patient STS_9"):
            convert(source, tmp_path / "raw", ["STS_9"])

    def test_all_of_them(self, source, tmp_path):
        convert(source, tmp_path / "raw", list(ROWS))
        task = read_task(tmp_path / "raw" / "STS_GTV_CT")
        assert (len(task.cases), len(task.held_out_cases)) == (0, 3)


class TestPartialSources:
    def test_images_alone_can_be_predicted(self, source, tmp_path):
        (source / "clinical.csv").unlink()
        for mask in source.rglob("*_mask.nii.gz"):
            mask.unlink()
        summary = convert(source, tmp_path / "raw")
        cases = prediction_cases(tmp_path / "raw" / "STS_images", {0: "CT", 1: "other"})
        assert [tuple(case.images) for case in cases] == [("CT", "PET")] * 2 + [("CT",), ("CT", "PET")]
        assert names(tmp_path / "raw") == ["STS_images"]
        assert summary.count("not written") == 4 and "images of 4 patients" in summary

    def test_a_mask_that_comes_later_moves_its_patient(self, source, tmp_path):
        convert(source, tmp_path / "raw")
        assert "STS_004_0000.nii.gz" in names(tmp_path / "raw" / "STS_images")
        shutil.copy(source / "STS_001" / "CT_mask.nii.gz", source / "STS_004" / "CT_mask.nii.gz")
        assert "STS_images" not in convert(source, tmp_path / "raw")
        assert names(tmp_path / "raw" / "STS_images") == ["dataset.json"]
        assert len(read_task(tmp_path / "raw" / "STS_GTV_CT").cases) == 4

    def test_without_masks_the_tables_still_make_tasks(self, source, tmp_path):
        for mask in source.rglob("*_mask.nii.gz"):
            mask.unlink()
        convert(source, tmp_path / "raw")
        assert names(tmp_path / "raw") == ["STS_EFS", "STS_Grade", "STS_images"]
        task = read_task(tmp_path / "raw" / "STS_EFS")
        assert len(task.cases) == 3 and task.region is None and task.labels is None

    def test_without_a_table_the_masks_still_make_tasks(self, source, tmp_path):
        (source / "clinical.csv").unlink()
        convert(source, tmp_path / "raw")
        assert names(tmp_path / "raw") == ["STS_GTV_CT", "STS_GTV_CTPET", "STS_images"]
        assert names(tmp_path / "raw" / "STS_images") == [
            "STS_004_0000.nii.gz", "STS_004_0001.nii.gz", "dataset.json",
        ]  # fmt: skip

    def test_a_table_without_some_patients_and_columns(self, source, tmp_path):
        (source / "clinical.csv").write_text("patient,grade\nSTS_002,High\nSTS_777,Low\n", encoding="utf-8")
        summary = convert(source, tmp_path / "raw")
        assert "left out: STS_001, STS_003, STS_004" in line_of(summary, "STS_Grade")
        assert "not written" in line_of(summary, "STS_EFS")

    @pytest.mark.parametrize("days", ["soon", "0", "-5", "nan", ""])
    def test_no_usable_time(self, source, tmp_path, days):
        text = (source / "clinical.csv").read_text(encoding="utf-8")
        (source / "clinical.csv").write_text(text.replace("501.0", days), encoding="utf-8")
        summary = convert(source, tmp_path / "raw")
        assert "left out: STS_002, STS_004" in line_of(summary, "STS_EFS")
        assert len(read_task(tmp_path / "raw" / "STS_EFS").cases) == 2

    @pytest.mark.parametrize(
        "text,words", [("name,grade\nSTS_002,High\n", "no column patient"), (HEADER + ROWS["STS_002"] * 2, "STS_002")]
    )
    def test_an_unusable_table(self, source, tmp_path, text, words):
        (source / "clinical.csv").write_text(text, encoding="utf-8")
        with pytest.raises(DatasetError, match=words):
            convert(source, tmp_path / "raw")


class TestMain:
    def test_prints_a_summary(self, source, tmp_path, capsys):
        assert main(["-i", str(source), "-o", str(tmp_path / "raw"), "--hold-out", "STS_001", "STS_002"]) == 0
        assert "STS_GTV_CT: 1 patients, 2 held out" in capsys.readouterr().out

    def test_no_patient(self, tmp_path, capsys):
        assert main(["-i", str(tmp_path), "-o", str(tmp_path / "raw")]) == 2
        assert "holds no folder STS_*/" in capsys.readouterr().err
        assert not (tmp_path / "raw").exists()


@pytest.mark.skipif(not REAL.is_dir(), reason="UNICON_REALDATA names no folder with soft_tissue_sarcoma")
def test_the_real_collection(tmp_path):
    """Two of its patients, linked; among them the one whose PET is a slice shorter."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("STS_002", "STS_041", "clinical.csv"):
        (source / name).symlink_to(REAL / name)
    convert(source, tmp_path / "raw", ["STS_041"])
    task = read_task(tmp_path / "raw" / "STS_GTV_CTPET")
    for case in (*task.cases, *task.held_out_cases):
        volumes = read_case(case)
        assert volumes["CT"].array_zyx.min() < -800 and 1 < volumes["PET"].array_zyx.max() < 60
        labels = check_labels(case, volumes["CT"].grid, task.labels).array_zyx == 1
        # The tumour takes up more than the rest of the body.
        assert volumes["PET"].array_zyx[labels].mean() > 2 * volumes["PET"].array_zyx.mean()
    assert (volumes["PET"].array_zyx[-1] == 0).all() and (volumes["PET"].array_zyx[-2] > 0).any()
    survival = read_task(tmp_path / "raw" / "STS_EFS")
    assert survival.targets.columns == {"time_days": (501.0, 458.0), "event": (0.0, 0.0)}
