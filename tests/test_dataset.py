"""Task folders, their tables and labels, cases to predict."""

import json
import logging

import numpy as np
import pytest
import SimpleITK as sitk

from unicon_pipeline.dataset import (
    Case,
    Labels,
    check_labels,
    is_safe_name,
    parse_channels,
    prediction_cases,
    prediction_clinical,
    read_case,
    read_task,
    resolve_task,
)
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.geometry import Grid, read_image, write_image, write_labels

SHAPE = (4, 5, 6)
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
GRID = Grid(SHAPE, (3.0, 2.0, 1.0), (10.0, -20.0, 30.0), IDENTITY)
TUMOUR = Labels(("tumour",), ((1,),), False, (1,), None)
SURVIVAL = "case_id,time_days,event\na,10,1\nb,20,0\n"


def touch(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def make_task(folder, cases=("a", "b"), channels=("CT", "PET"), labelled=True, tables=None, **description):
    """Files are empty: reading a task looks at no image."""
    for case_id in cases:
        for number in range(len(channels)):
            touch(folder / "imagesTr" / f"{case_id}_{number:04d}.nii.gz")
        if labelled:
            touch(folder / "labelsTr" / f"{case_id}.nii.gz")
    for name, text in (tables or {}).items():
        touch(folder / name, text)
    described = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": {"background": 0, "tumour": 1},
        "file_ending": ".nii.gz",
        **description,
    }
    touch(folder / "dataset.json", json.dumps({key: value for key, value in described.items() if value is not None}))
    return folder


def refused(read, *words):
    with pytest.raises(DatasetError) as caught:
        read()
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return str(caught.value)


class TestReadTask:
    def test_segmentation(self, tmp_path):
        folder = make_task(tmp_path / "Dataset001_Lesion", channels=("ct", "Pet"), patients={"a": "p1", "b": 7})
        touch(folder / "imagesTs" / "c_0000.nii.gz")
        touch(folder / "labelsTs" / "c.nii.gz")
        (folder / "imagesTr" / "b_0000.nii.gz").unlink()
        for hidden in ("._a_0000.nii.gz", ".12.partial.a_0000.nii.gz"):
            touch(folder / "imagesTr" / hidden)
        task = read_task(folder)
        assert (task.name, task.folder, task.task_type) == ("Dataset001_Lesion", folder, "segmentation")
        assert (task.modalities, task.labels, task.intensity) == (("CT", "PET"), TUMOUR, {})
        assert (task.targets, task.clinical) == (None, None)
        images = folder / "imagesTr"
        assert task.cases == (
            Case(
                "a",
                {"CT": images / "a_0000.nii.gz", "PET": images / "a_0001.nii.gz"},
                folder / "labelsTr" / "a.nii.gz",
                "p1",
            ),
            Case("b", {"PET": images / "b_0001.nii.gz"}, folder / "labelsTr" / "b.nii.gz", "7"),
        )
        (held_out,) = task.held_out_cases
        assert held_out == Case("c", {"CT": folder / "imagesTs" / "c_0000.nii.gz"}, folder / "labelsTs/c.nii.gz", "c")

    def test_the_type_is_read_from_what_is_there(self, tmp_path):
        survival = make_task(tmp_path / "A", labelled=False, tables={"targets.csv": SURVIVAL}, labels=None)
        task = read_task(survival)
        assert (task.task_type, task.labels) == ("prognosis", None)
        assert task.targets.columns == {"time_days": (10.0, 20.0), "event": (1.0, 0.0)}
        classes = {"targets.csv": "case_id,grade\na,high\nb,\n", "clinical.csv": "case_id,age,sex\na,61,F\n"}
        task = read_task(make_task(tmp_path / "B", labelled=False, tables=classes, labels=None))
        assert task.task_type == "classification"
        assert task.targets.columns == {"grade": ("high", None)}
        assert (task.clinical.case_ids, task.clinical.columns) == (("a",), {"age": (61.0,), "sex": ("F",)})
        declared = make_task(tmp_path / "C", tables={"targets.csv": SURVIVAL}, task_type="prognosis")
        assert read_task(declared).task_type == "prognosis"
        assert read_task(make_task(tmp_path / "D", tables={"targets.csv": SURVIVAL})).task_type == "segmentation"
        refused(lambda: read_task(make_task(tmp_path / "E", labelled=False)), "labelsTr/", "targets.csv")
        refused(lambda: read_task(make_task(tmp_path / "F", task_type="detection")), "'detection'", "prognosis")

    def test_everything_wrong_is_said_at_once(self, tmp_path):
        folder = make_task(tmp_path / "A task", cases=("a", "b", "c"), patients={"b": "p", "t": "p", "x": "q"})
        (folder / "labelsTr" / "a.nii.gz").unlink()
        for name in ("imagesTr/d.nii.gz", "imagesTr/e_0007.nii.gz", "imagesTr/f g_0000.nii.gz", "labelsTr/h.nii.gz"):
            touch(folder / name)
        for name in ("imagesTs/c_0000.nii.gz", "imagesTs/t_0000.nii.gz"):
            touch(folder / name)
        refused(
            lambda: read_task(folder),
            "a task's name may hold",
            "a has images but no labelsTr/a.nii.gz",
            "imagesTr/d.nii.gz has no channel number; rename it to d_0000.nii.gz",
            "imagesTr/e_0007.nii.gz is of channel 0007; dataset.json names 0000 CT, 0001 PET",
            "imagesTr/f g_0000.nii.gz: a case's name",
            "labelsTr/h.nii.gz has no image",
            "c is in imagesTr and in imagesTs",
            "patient p has cases in imagesTr and in imagesTs",
            "cases without images: x",
        )

    def test_a_patient_named_like_a_training_case_is_not_split(self, tmp_path):
        folder = make_task(tmp_path / "Task", patients={"later": "a"})
        touch(folder / "imagesTs" / "later_0000.nii.gz")
        refused(lambda: read_task(folder), "patient a has cases in imagesTr and in imagesTs")

    def test_a_link_to_nowhere_is_a_missing_file_and_no_missing_channel(self, tmp_path):
        folder = make_task(tmp_path / "Task")
        link = folder / "imagesTr" / "a_0001.nii.gz"
        link.unlink()
        link.symlink_to(tmp_path / "gone.nii.gz")
        case = read_task(folder).cases[0]
        assert tuple(case.images) == ("CT", "PET")
        refused(lambda: read_image(case.images["PET"]), "a_0001.nii.gz does not exist")

    @pytest.mark.parametrize("case_id", ["..", "a..b", ".a", "-a", "a b", "a;b", "ä"])
    def test_names_that_could_leave_a_folder_or_break_a_line(self, tmp_path, case_id):
        assert not is_safe_name(case_id) and is_safe_name("Case-1.2_x+y")
        for name in ("a/b", "a\\b", "", "a\n"):
            assert not is_safe_name(name)
        if not case_id.startswith("."):
            folder = make_task(tmp_path / "Task", cases=(case_id,))
            refused(lambda: read_task(folder), "a case's name may hold letters, digits")

    def test_regions_and_ignore(self, tmp_path):
        named = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
        task = read_task(make_task(tmp_path / "a folder" / "Task", labels=named, regions_class_order=[1, 2]))
        assert task.labels == Labels(("whole", "core"), ((1, 2), (2,)), True, (1, 2), 3)

    def test_wrong_parts_of_dataset_json_are_listed_together(self, tmp_path):
        folder = make_task(
            tmp_path / "Task", channels=("T1",), file_ending="/../*", patients=["a"], intensity={"T1": "guess"},
            labels={"background": 0, "tumour": "1"},
        )  # fmt: skip
        text = refused(lambda: read_task(folder), "file_ending is '/../*'", "patients must", "T1 is 'guess'", "'1'")
        assert len(text.splitlines()) == 5

    def test_no_case(self, tmp_path):
        folder = make_task(tmp_path / "Task", cases=())
        touch(folder / "imagesTr" / "scan.mha")
        touch(folder / "labelsTr" / "readme.txt")
        refused(lambda: read_task(folder), "no case found", "case1_0000.nii.gz", "scan.mha")

    def test_held_out_cases_alone_are_a_task(self, tmp_path):
        folder = make_task(tmp_path / "Task", cases=())
        touch(folder / "imagesTs" / "c_0000.nii.gz")
        touch(folder / "labelsTs" / "c.nii.gz")
        task = read_task(folder)
        assert (task.cases, [case.case_id for case in task.held_out_cases]) == ((), ["c"])

    @pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
    def test_foreign_json(self, tmp_path, text):
        folder = make_task(tmp_path / "Task")
        touch(folder / "dataset.json", text)
        refused(lambda: read_task(folder), "dataset.json")

    def test_another_modality_must_say_its_intensity(self, tmp_path):
        refused(lambda: read_task(make_task(tmp_path / "A", channels=("CT", "T1"))), 'T1": "zscore"')
        task = read_task(make_task(tmp_path / "B", channels=("CT", "T1"), intensity={"T1": "zscore"}))
        assert task.intensity == {"T1": "zscore"}

    @pytest.mark.parametrize(
        "names",
        [None, {}, ["CT"], {"CT": 0}, {"1": "CT"}, {"0": "CT", "2": "PET"}, {"0": "CT", "1": "ct"}]
        + [{"0": "../x"}, {"0": ".."}, {"0": "a..b"}],
    )
    def test_channel_names(self, tmp_path, names):
        refused(lambda: parse_channels({"channel_names": names}, tmp_path / "dataset.json"), "dataset.json", "channel")

    def test_resolve(self, tmp_path):
        named = make_task(tmp_path / "work" / "raw" / "One")
        make_task(tmp_path / "work" / "raw" / "Two")
        other = make_task(tmp_path / "else where" / "Three")
        assert resolve_task("One", tmp_path / "work") == named
        assert resolve_task(str(other), tmp_path / "work") == other
        refused(lambda: resolve_task("Four", tmp_path / "work"), "'Four'", "One, Two")


class TestRegion:
    def task(self, folder, **changes):
        given = {"tables": {"targets.csv": SURVIVAL}, "task_type": "prognosis", "region": "Lesions"} | changes
        return read_task(make_task(folder, **given))

    def test_a_case_level_task_keeps_the_labels_of_its_region(self, tmp_path):
        task = self.task(tmp_path / "Task")
        assert (task.task_type, task.region, task.labels) == ("prognosis", "Lesions", TUMOUR)
        assert [case.labels.name for case in task.cases] == ["a.nii.gz", "b.nii.gz"]

    def test_some_cases_or_all_may_lack_labels(self, tmp_path):
        make_task(tmp_path / "Task")
        (tmp_path / "Task" / "labelsTr" / "a.nii.gz").unlink()
        task = self.task(tmp_path / "Task", labelled=False)
        assert [case.labels is None for case in task.cases] == [True, False] and task.labels == TUMOUR
        task = self.task(tmp_path / "Other", labelled=False, labels=None, task_type=None)
        assert (task.task_type, task.region, task.labels) == ("prognosis", "Lesions", None)

    def test_labels_must_be_named(self, tmp_path):
        refused(lambda: self.task(tmp_path / "Task", labels=None), "dataset.json needs labels")

    @pytest.mark.parametrize("region", [1, ["Lesions"], "", "../Lesions", "a b", True])
    def test_no_name(self, tmp_path, region):
        refused(lambda: self.task(tmp_path / "Task", region=region), f"region is {region!r}", "segmentation task")

    def test_a_segmentation_task_has_none(self, tmp_path):
        for number, changes in enumerate(({"task_type": "segmentation"}, {"task_type": None})):
            words = "only classification and prognosis look at a region", '"task_type": "classification" or "prognosis"'
            refused(lambda changes=changes, number=number: self.task(tmp_path / f"{number}", **changes), *words)

    def test_itself(self, tmp_path):
        refused(lambda: self.task(tmp_path / "Lesions"), "region names this task itself")

    def test_labels_beside_targets_are_told(self, tmp_path, caplog):
        with caplog.at_level(logging.WARNING):
            assert self.task(tmp_path / "A", task_type=None, region=None).task_type == "segmentation"
        assert "A has labelsTr/, so it is a segmentation task and targets.csv is left aside" in caplog.text
        assert '"task_type": "prognosis"' in caplog.text
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert self.task(tmp_path / "B", region=None).labels is None
        assert "B: labelsTr/ is left aside" in caplog.text
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            self.task(tmp_path / "C")
            read_task(make_task(tmp_path / "D"))
        assert not caplog.records


class TestTargets:
    def task(self, tmp_path, targets, clinical=None, **extra):
        tables = {"targets.csv": targets} | ({"clinical.csv": clinical} if clinical else {})
        return lambda: read_task(make_task(tmp_path / "Task", labelled=False, tables=tables, **extra))

    @pytest.mark.parametrize("word", ["", "h,soon,1\n"])
    def test_bad_outcomes_are_listed_by_case(self, tmp_path, word):
        rows = "a,,1\nb,nan,0\nc,-3,1\nd,0,1\ne,12,2\nf,12,\ng,13.5,1\n" + word
        cases = tuple(line[0] for line in rows.splitlines())
        read = self.task(tmp_path, "case_id,time_days,event\n" + rows, cases=cases, task_type="prognosis")
        text = refused(read, "number of days above 0")
        times, events = (line.strip() for line in text.splitlines()[1:] if "targets.csv: " in line and "must" in line)
        found = "row 2 (a) is blank, row 3 (b) is blank, row 4 (c) is -3, row 5 (d) is 0" if not word else (
            "row 2 (a) is blank, row 3 (b) is blank, row 4 (c) is '-3', row 5 (d) is '0', row 9 (h) is 'soon'"
        )  # fmt: skip
        assert times.startswith("targets.csv: time_days must be") and times.endswith(": " + found)
        assert events.endswith("0 (censored): row 6 (e) is 2, row 7 (f) is blank")

    def test_all_faults_of_a_table_come_in_one_message(self, tmp_path):
        rows = "a,10,1\na,20,0\n,5,1\nc,2024-05-17,1\nd,-3,7\ne,12\nf,,0\nz,5,1\n"
        read = self.task(tmp_path, "case_id,time_days,event\n" + rows, cases=tuple("abcdef"), clinical="case_id,x\na\n")
        text = refused(
            read,
            "targets.csv: row 2: a occurs 2 times", "row 3: a occurs 2 times", "row 4: no case_id",
            "row 7: 2 cells, expected 3", "no row for b", "rows without images: row 9 (z)",
            "row 5 (c) is the date '2024-05-17'", "row 6 (d) is '-3'", "row 8 (f) is blank", "event must be 1",
            "clinical.csv: row 2: 1 cells, expected 2",
        )  # fmt: skip
        assert len(text.splitlines()) == 9

    def test_a_table_from_a_german_spreadsheet(self, tmp_path):
        task = self.task(tmp_path, "case_id;time_days;event;\na;10,5;1;\nb;20;0;\n", clinical="case_id\tx\na\t1,5\n")()
        assert (task.task_type, task.targets.columns["time_days"]) == ("prognosis", (10.5, 20.0))
        assert task.clinical.columns == {"x": (1.5,)}

    @pytest.mark.parametrize("row, case", [("7", "007"), ("CASE_7", "case_007"), ("p1_0000.nii.gz", "p1")])
    def test_names_that_almost_agree(self, tmp_path, row, case):
        read = self.task(tmp_path, f"case_id,time_days,event\n{row},10,1\n", cases=(case,))
        refused(read, f"no row for {case}", f"rows without images: row 2 ({row})", f"Perhaps {row} for {case}")

    def test_infinite_time(self, tmp_path):
        refused(self.task(tmp_path, SURVIVAL.replace("20", "inf")), "row 3 (b) is 'inf'")

    def test_missing_columns_and_table(self, tmp_path):
        refused(self.task(tmp_path, "case_id,event\na,1\nb,0\n", task_type="prognosis"), "time_days is missing")
        (tmp_path / "Task" / "targets.csv").unlink()
        refused(lambda: read_task(tmp_path / "Task"), "a prognosis task needs targets.csv")

    def test_rows_that_do_not_match_the_images(self, tmp_path, caplog):
        refused(
            self.task(tmp_path, SURVIVAL.replace("b,", "case_b,")),
            "no row for b",
            "rows without images: row 3 (case_b)",
        )
        with caplog.at_level(logging.WARNING):
            task = self.task(tmp_path, SURVIVAL + "z,5,1\n", clinical="case_id,age\na,1\ny,2\n")()
        assert len(task.cases) == 2
        assert "targets.csv: rows without images: row 4 (z)" in caplog.text
        assert "clinical.csv: rows without images: row 3 (y)" in caplog.text

    def test_held_out_cases_need_no_row(self, tmp_path):
        touch(tmp_path / "Task" / "imagesTs" / "c_0000.nii.gz")
        assert self.task(tmp_path, SURVIVAL)().held_out_cases[0].case_id == "c"

    @pytest.mark.parametrize(
        "text,words",
        [
            ("case_id\na\nb\n", "classification needs one"),
            ("case_id,x\na,\nb,\n", "x has no value"),
            ("case_id,x\na,0.5\nb,1\n", "row 2 (a) is 0.5"),
            ("case_id,x,y\na,1,0\nb,2,\n", "row 3 (b) is 2"),
            ("case_id,x,y\na,1,yes\nb,0,1\n", "row 2 (a) is 'yes'"),
        ],
    )
    def test_bad_classes(self, tmp_path, text, words):
        assert len(refused(self.task(tmp_path, text), words).splitlines()) == 2

    @pytest.mark.parametrize(
        "text,columns",
        [
            ("case_id,x\na,3\nb,\n", {"x": (3.0, None)}),
            ("case_id,x\na,low\nb,2\n", {"x": ("low", "2")}),
            ("case_id,x,y\na,1,NA\nb,0,1\n", {"x": (1.0, 0.0), "y": (None, 1.0)}),
        ],
    )
    def test_good_classes(self, tmp_path, text, columns):
        task = self.task(tmp_path, text)()
        assert (task.task_type, task.targets.columns) == ("classification", columns)


class TestPredictionCases:
    NAMES = {0: "CT", 1: "PET"}

    def cases(self, source, names=None):
        return {
            case.case_id: {modality: path.name for modality, path in case.images.items()}
            for case in prediction_cases(source, names or self.NAMES)
        }

    def test_a_folder(self, tmp_path):
        folder = tmp_path / "with a space"
        for name in ("b_0001.nii.gz", "a_0000.nii.gz", "a_0001.nii.gz", "plain.nii.gz", "._a_0000.nii.gz", "x.csv"):
            touch(folder / name)
        assert self.cases(folder) == {
            "a": {"CT": "a_0000.nii.gz", "PET": "a_0001.nii.gz"},
            "b": {"PET": "b_0001.nii.gz"},
            "plain": {"CT": "plain.nii.gz"},
        }
        (case, *_) = prediction_cases(folder, self.NAMES)
        assert (case.labels, case.patient) == (None, "a")

    def test_one_file(self, tmp_path):
        for name in ("a_0001.nii.gz", "a_0000.nii.gz", "scan.mha"):
            touch(tmp_path / name)
        assert self.cases(tmp_path / "a_0001.nii.gz") == {"a": {"PET": "a_0001.nii.gz"}}
        assert self.cases(tmp_path / "scan.mha") == {"scan": {"CT": "scan.mha"}}

    @pytest.mark.parametrize("place", ["", "imagesTs"])
    def test_names_beside_the_images_win(self, tmp_path, place):
        touch(tmp_path / place / "a_0000.nii.gz")
        touch(tmp_path / "dataset.json", '{"channel_names": {"0": "pet"}}')
        assert self.cases(tmp_path / place) == {"a": {"PET": "a_0000.nii.gz"}}

    @pytest.mark.parametrize("text", ["{", "[]", '{"channel_names": {"0": "../x"}}'])
    def test_a_wrong_description_beside_the_images(self, tmp_path, text):
        touch(tmp_path / "a_0000.nii.gz")
        touch(tmp_path / "dataset.json", text)
        refused(lambda: self.cases(tmp_path), "dataset.json")

    def test_any_supported_ending_is_taken_and_another_shows_what_is_there(self, tmp_path):
        touch(tmp_path / "scan.nii")
        assert self.cases(tmp_path)
        (tmp_path / "scan.nii").rename(tmp_path / "scan.dcm")
        refused(lambda: self.cases(tmp_path), "case1_0000.nii.gz", "CT", "Found: scan.dcm")

    def test_nothing_there(self, tmp_path):
        touch(tmp_path / "scan.dcm")
        refused(lambda: self.cases(tmp_path), "case1_0000.nii.gz", "scan.dcm")
        refused(lambda: self.cases(tmp_path / "scan.dcm"), "case1_0000.nii.gz")
        refused(lambda: self.cases(tmp_path / "nowhere"), "does not exist")

    def test_unknown_channels(self, tmp_path, caplog):
        touch(tmp_path / "a_0002.nii.gz")
        refused(lambda: self.cases(tmp_path), "0002", "0000 CT, 0001 PET", "channel_names")
        touch(tmp_path / "b_0000.nii.gz")
        with caplog.at_level(logging.WARNING):
            assert self.cases(tmp_path) == {"b": {"CT": "b_0000.nii.gz"}}
        assert "0002" in caplog.text

    def test_two_files_for_one_channel(self, tmp_path):
        touch(tmp_path / "a.nii.gz")
        touch(tmp_path / "a_0000.nii.gz")
        refused(lambda: self.cases(tmp_path), "both channel 0000 of a")


class TestPredictionClinical:
    TABLE = "case_id,age\na,61\nz,70\n"

    def images(self, folder):
        for name in ("a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "notes.txt"):
            touch(folder / name)

    def test_beside_the_images(self, tmp_path, caplog):
        self.images(tmp_path)
        assert prediction_clinical(tmp_path) is None
        touch(tmp_path / "clinical.csv", self.TABLE)
        with caplog.at_level(logging.WARNING):
            table = prediction_clinical(tmp_path)
        assert table.rows_of(["b", "a"]) == [None, {"age": 61.0}]
        assert [record.message.split("clinical.csv")[1] for record in caplog.records] == [
            " has no row for b: what it would say is unknown there.", ": rows without images: z"
        ]  # fmt: skip

    def test_above_them_in_a_task_folder(self, tmp_path, caplog):
        self.images(tmp_path / "imagesTs")
        self.images(tmp_path / "images")
        touch(tmp_path / "clinical.csv", self.TABLE + "b,5\n")
        with caplog.at_level(logging.WARNING):
            assert prediction_clinical(tmp_path / "imagesTs").case_ids == ("a", "z", "b")
        assert not caplog.records
        assert prediction_clinical(tmp_path / "images") is None

    def test_one_image(self, tmp_path, caplog):
        self.images(tmp_path)
        touch(tmp_path / "clinical.csv", self.TABLE)
        with caplog.at_level(logging.WARNING):
            assert prediction_clinical(tmp_path / "a_0000.nii.gz").case_ids == ("a", "z")
        assert not caplog.records

    def test_faults(self, tmp_path):
        self.images(tmp_path)
        touch(tmp_path / "clinical.csv", self.TABLE + "a,5\n")
        refused(lambda: prediction_clinical(tmp_path), "clinical.csv", "row 2: a occurs 2 times", "row 4")


class TestReadCase:
    PET_GRID = Grid((3, 3, 4), (3.0, 4.0, 2.0), (10.0, -20.0, 30.0), IDENTITY)

    def case(self, tmp_path, images):
        paths = {}
        for modality, (array, grid) in images.items():
            paths[modality] = tmp_path / f"{modality}.nii.gz"
            write_image(paths[modality], array, grid)
        return Case("a", paths, None, "a")

    def test_each_comes_to_the_grid_of_the_first(self, tmp_path):
        pet = np.full((3, 3, 4), 5.0)
        volumes = read_case(self.case(tmp_path, {"CT": (np.zeros(SHAPE), GRID), "PET": (pet, self.PET_GRID)}))
        assert list(volumes) == ["CT", "PET"]
        assert volumes["PET"].grid == volumes["CT"].grid == GRID
        # The PET ends one slice before the CT: no uptake is known there.
        assert (volumes["PET"].array_zyx[:3] == 5.0).all() and (volumes["PET"].array_zyx[3] == 0.0).all()

    def test_air_fills_a_ct(self, tmp_path):
        ct = np.full((3, 3, 4), 40.0)
        volumes = read_case(self.case(tmp_path, {"PET": (np.zeros(SHAPE), GRID), "CT": (ct, self.PET_GRID)}))
        assert (volumes["CT"].array_zyx[3] == -1024.0).all()

    def test_three_grids_and_a_spot(self, tmp_path):
        """Channels are resampled through the affines: what is at one place in the patient stays there."""
        index = np.indices(SHAPE).transpose(1, 2, 3, 0)[..., ::-1]
        ct = (index * (1.0, 2.0, 3.0) + GRID.origin_xyz_mm) @ (1.0, 2.0, 3.0)
        images = {"CT": (ct, GRID)}
        for name, origin in (("PET", (8.5, -22.5, 27.0)), ("T1", (9.25, -23.0, 28.5))):
            grid = Grid((9, 9, 9), (2.5, 2.25, 1.75), origin, IDENTITY)
            index = np.indices(grid.shape_zyx).transpose(1, 2, 3, 0)[..., ::-1]
            images[name] = (index * grid.spacing_zyx_mm[::-1] + origin) @ (1.0, 2.0, 3.0), grid
        volumes = read_case(self.case(tmp_path, images))
        assert list(volumes) == ["CT", "PET", "T1"]
        for name in ("PET", "T1"):
            np.testing.assert_allclose(volumes[name].array_zyx, ct, atol=1e-3)

    def test_a_missing_channel_leaves_the_grid_to_the_next(self, tmp_path):
        volumes = read_case(self.case(tmp_path, {"PET": (np.full((3, 3, 4), 5.0), self.PET_GRID)}))
        assert list(volumes) == ["PET"] and volumes["PET"].grid == self.PET_GRID

    @pytest.mark.parametrize("damage", ["truncated", "nan", "4-D"])
    def test_a_bad_channel_is_named(self, tmp_path, damage):
        case = self.case(tmp_path, {"CT": (np.zeros(SHAPE), GRID), "PET": (np.ones((3, 3, 4)), self.PET_GRID)})
        path = case.images["PET"]
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-20])
        elif damage == "nan":
            write_image(path, np.full((3, 3, 4), np.nan), self.PET_GRID)
        else:
            sitk.WriteImage(sitk.Image([4, 3, 3, 2], sitk.sitkFloat32), str(path))
        words = {"truncated": "truncated", "nan": "36 voxels of 36", "4-D": "4 x 3 x 3 x 2"}
        refused(lambda: read_case(case), "PET.nii.gz", words[damage])

    def test_another_patient(self, tmp_path):
        far = Grid((3, 3, 3), (3.0, 4.0, 2.0), (10.0, -20.0, 900.0), IDENTITY)
        case = self.case(tmp_path, {"CT": (np.zeros(SHAPE), GRID), "PET": (np.zeros((3, 3, 3)), far)})
        refused(lambda: read_case(case), "PET.nii.gz", "do not overlap")


class TestCheckLabels:
    def case(self, tmp_path, array, grid=GRID):
        write_labels(tmp_path / "labels.nii.gz", array, grid)
        return Case("a", {"CT": tmp_path / "a_0000.nii.gz"}, tmp_path / "labels.nii.gz", "a")

    def test_known_values(self, tmp_path):
        array = np.random.default_rng(0).choice([0, 1, 3], SHAPE)
        labels = Labels(("tumour",), ((1,),), False, (1,), 3)
        volume = check_labels(self.case(tmp_path, array), GRID, labels)
        assert volume.array_zyx.dtype in (np.uint8, np.int16)
        np.testing.assert_array_equal(volume.array_zyx, array)
        refused(lambda: check_labels(self.case(tmp_path, array), GRID, TUMOUR), "[3]", "[0, 1]", "labels.nii.gz")

    def test_rounding_passes_one_voxel_does_not(self, tmp_path):
        for shift, passes in ((1e-6, True), (1.0, False)):
            grid = Grid(SHAPE, GRID.spacing_zyx_mm, (10.0 + shift, -20.0, 30.0), IDENTITY)
            case = self.case(tmp_path, np.ones(SHAPE, int), grid)
            if passes:
                check_labels(case, GRID, TUMOUR)
            else:
                refused(lambda case=case: check_labels(case, GRID, TUMOUR), "labels.nii.gz", "a_0000.nii.gz", "1 mm")

    def test_an_image_in_labels_tr(self, tmp_path):
        case = self.case(tmp_path, np.ones(SHAPE, int))
        write_image(case.labels, np.random.default_rng(0).integers(-1000, 1000, SHAPE), GRID)
        refused(lambda: check_labels(case, GRID, TUMOUR), "labels.nii.gz", "looks like a CT image, not labels")

    def test_fractions_and_255(self, tmp_path):
        case = self.case(tmp_path, np.ones(SHAPE, int))
        for value, words in ((0.5, "0.5"), (255.0, "[255]")):
            write_image(case.labels, np.full(SHAPE, value), GRID)
            refused(lambda: check_labels(case, GRID, TUMOUR), "labels.nii.gz", words)
        write_image(case.labels, np.full(SHAPE, 1.0), GRID)
        assert (check_labels(case, GRID, TUMOUR).array_zyx == 1).all()

    def test_regions_know_their_members(self, tmp_path):
        regions = Labels(("whole", "core"), ((1, 2), (2,)), True, (1, 2), 3)
        array = np.random.default_rng(0).choice([0, 1, 2, 3], SHAPE)
        np.testing.assert_array_equal(check_labels(self.case(tmp_path, array), GRID, regions).array_zyx, array)
        refused(lambda: check_labels(self.case(tmp_path, array + 1), GRID, regions), "[4]", "[0, 1, 2, 3]")

    def test_another_shape(self, tmp_path):
        grid = Grid((4, 5, 7), GRID.spacing_zyx_mm, GRID.origin_xyz_mm, IDENTITY)
        case = self.case(tmp_path, np.ones((4, 5, 7), int), grid)
        refused(lambda: check_labels(case, GRID, TUMOUR), "(4, 5, 7)", "(4, 5, 6)", "a_0000.nii.gz")

    def test_none(self):
        refused(lambda: check_labels(Case("a", {}, None, "a"), GRID, TUMOUR), "a has no label file")


def test_a_modality_has_no_dot_in_its_name(tmp_path):
    """torch could not name its stem; better said when the folder is read than when it is trained."""
    path = tmp_path / "dataset.json"
    with pytest.raises(DatasetError, match=r"channel 0 is named 'T1\.5'; use letters, digits and _ - \+ only"):
        parse_channels({"channel_names": {"0": "T1.5"}}, path)
