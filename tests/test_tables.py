"""Tables of cases: what is read, and which rows are blamed for what."""

import csv
import io

import numpy as np
import pytest

from unicon_pipeline import tables
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.tables import class_faults, outcome_faults, read_table, shown


def table_of(folder, text):
    path = folder / "t.csv"
    path.write_text(text, encoding="utf-8")
    return read_table(path)


def refused(read, *words):
    with pytest.raises(DatasetError) as caught:
        read()
    for word in words:
        assert word in str(caught.value), str(caught.value)


class TestReadTable:
    def test_what_spreadsheets_write(self, tmp_path):
        path = tmp_path / "t.csv"
        path.write_bytes('\ufeffcase_id , age,"site"\r\na, 61.5 ,"thigh, left"\r\n\r\nb,N/A,nan\r\n'.encode())
        table = read_table(path)
        assert table.case_ids == ("a", "b")
        assert table.columns == {"age": (61.5, None), "site": ("thigh, left", None)}

    @pytest.mark.parametrize(
        "text,words",
        [
            ("", ("no column case_id", "nothing")),
            ("id,x\na,1\n", ("no column case_id", "id, x")),
            ("case_id;x\na;1\n", ("semicolons", "comma-separated")),
            ("case_id\tx\na\t1\n", ("tabs", "comma-separated")),
            ("case_id,x,\na,1,2\n", ("column 3 has cells and no name",)),
            ("case_id,x,x\na,1,2\n", ("column x occurs more than once",)),
            ("case_id,x\na,1\nb\nc,1,2\n", ("row 3: 1 cells", "row 4: 3 cells")),
            ("case_id,x\n,1\na,2\nb,3\na,4\n", ("row 2: no case_id", "row 3: a occurs 2 times", "row 5: a occurs 2")),
        ],
    )
    def test_faults_name_the_rows(self, tmp_path, text, words):
        refused(lambda: table_of(tmp_path, text), "t.csv", *words)

    def test_another_encoding(self, tmp_path):
        (tmp_path / "t.csv").write_bytes("case_id,x\na,ü\n".encode("latin-1"))
        refused(lambda: read_table(tmp_path / "t.csv"), "UTF-8")

    def test_gaps_and_words_that_are_no_number(self, tmp_path):
        cells = ["", "NA", "n/a", "NaN", "None", "null", " "]
        rows = "".join(f"c{n},{cell}\n" for n, cell in enumerate([*cells, "1e3"]))
        table = table_of(tmp_path, "case_id,x\n" + rows)
        assert table.columns["x"] == (None,) * len(cells) + (1000.0,)
        for word in ("inf", "-inf", "1_2", "12a", "2024-05-17", "12 days"):
            assert table_of(tmp_path, f"case_id,x\na,{word}\nb,3\n").columns["x"] == (word, "3")

    def test_ids_stay_text(self, tmp_path):
        assert table_of(tmp_path, "x,case_id\n5,007\n6,1e3\n").case_ids == ("007", "1e3")

    def test_columns_without_a_name_and_cells_are_left_out(self, tmp_path):
        """Spreadsheets write them where a cell was cleared."""
        table = table_of(tmp_path, "case_id,x,,\na,1,,\nb,2,,\n,,,\n")
        assert (table.case_ids, table.columns) == (("a", "b"), {"x": (1.0, 2.0)})

    def test_no_rows(self, tmp_path):
        table = table_of(tmp_path, "case_id,x\n")
        assert (table.case_ids, table.columns) == ((), {"x": ()})

    def test_values_survive_a_writer(self, tmp_path):
        values = np.random.default_rng(0).normal(size=50).tolist()
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerows([["case_id", "a, b", "c"], *([f"c{n}", v, f'say "{n}"'] for n, v in enumerate(values))])
        table = table_of(tmp_path, text.getvalue())
        assert table.columns == {"a, b": tuple(values), "c": tuple(f'say "{n}"' for n in range(50))}

    def test_unreadable(self, tmp_path, monkeypatch):
        refused(lambda: read_table(tmp_path / "none.csv"), "none.csv", "cannot be read")
        refused(lambda: read_table(tmp_path), str(tmp_path), "cannot be read")
        refused(lambda: table_of(tmp_path, "case_id,x\na," + "9" * 200_000 + "\n"), "t.csv", "cannot be read")
        monkeypatch.setattr(tables, "_MOST_BYTES", 10)
        refused(lambda: table_of(tmp_path, "case_id,x\na,1\n"), "t.csv", "at most")


class TestOutcomes:
    def faults(self, tmp_path, rows):
        return outcome_faults(table_of(tmp_path, "case_id,time_days,event\n" + rows))

    def test_good(self, tmp_path):
        assert self.faults(tmp_path, "a,0.5,1\nb,4000,0\n") == []

    @pytest.mark.parametrize("time", ["0", "-1", "", "nan", "inf", "2024-05-17", "soon"])
    def test_bad_time(self, tmp_path, time):
        (fault,) = self.faults(tmp_path, f"a,{time},1\nb,10,0\n")
        assert fault.startswith("a: time_days is ") and "days above 0" in fault
        assert ("blank" if time in ("", "nan") else time) in fault

    @pytest.mark.parametrize("event", ["2", "-1", "0.5", "", "yes"])
    def test_bad_event(self, tmp_path, event):
        (fault,) = self.faults(tmp_path, f"a,5,1\nb,10,{event}\n")
        assert fault.startswith("b: event is ") and "1 (happened) or 0 (censored)" in fault

    def test_both_in_one_row(self, tmp_path):
        assert len(self.faults(tmp_path, "a,,\nb,10,0\n")) == 2

    def test_missing_columns(self, tmp_path):
        for header, absent in (("time_days", "event"), ("event", "time_days"), ("x", "time_days and event")):
            (fault,) = outcome_faults(table_of(tmp_path, f"case_id,{header}\na,1\n"))
            assert f"the column {absent} is missing" in fault


class TestClasses:
    def faults(self, tmp_path, text):
        return class_faults(table_of(tmp_path, text))

    def test_good(self, tmp_path):
        assert self.faults(tmp_path, "case_id,x\na,7\nb,\n") == []
        assert self.faults(tmp_path, "case_id,x\na,benign\nb,2\n") == []
        assert self.faults(tmp_path, "case_id,x,y\na,1,\nb,0,1\n") == []

    def test_codes_with_an_underscore_are_names(self, tmp_path):
        table = table_of(tmp_path, "case_id,x\na,1_1\nb,1_2\n")
        assert table.columns["x"] == ("1_1", "1_2") and class_faults(table) == []

    def test_bad(self, tmp_path):
        assert self.faults(tmp_path, "case_id\na\n") == ["there is no column beside case_id; classification needs one"]
        assert self.faults(tmp_path, "case_id,x,y\na,,1\nb,,0\n") == ["x has no value"]
        (fault,) = self.faults(tmp_path, "case_id,x\na,0.5\nb,1\n")
        assert fault.startswith("a: x is 0.5")
        (fault,) = self.faults(tmp_path, "case_id,x,y\na,1,0\nb,2,1\n")
        assert fault.startswith("b: x is 2.0")


def test_long_lists_are_cut():
    assert shown(["one", "two"]) == "  one\n  two"
    lines = shown([f"fault {n}" for n in range(25)]).splitlines()
    assert len(lines) == 11 and lines[-1] == "  and 15 more"
