"""Tables of cases: what is read, and which rows are blamed for what."""

import csv
import io
import logging

import numpy as np
import pytest

from unicon_pipeline import spreadsheet
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.tables import Table, class_faults, enumerated, outcome_faults, read_table, scan_table, shown


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
            ("id;x\na;1\n", ("no column case_id", "id, x")),
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
        monkeypatch.setattr(spreadsheet, "_MOST_BYTES", 10)
        refused(lambda: table_of(tmp_path, "case_id,x\na,1\n"), "t.csv", "at most")

    def test_a_workbook(self, tmp_path):
        (tmp_path / "t.csv").write_bytes(b"PK\x03\x04 and so on")
        refused(lambda: read_table(tmp_path / "t.csv"), "t.csv is a workbook", "save the sheet as CSV")

    def test_rows_are_counted_as_a_spreadsheet_does(self, tmp_path):
        table = table_of(tmp_path, 'case_id,x\n\na,"two\nlines"\n,\nb,1\n')
        assert [table.place(n) for n in range(2)] == ["row 3 (a)", "row 5 (b)"]
        assert Table(("a",), {}).place(0) == "a"

    def test_what_can_be_read_comes_with_what_is_wrong(self, tmp_path):
        (tmp_path / "t.csv").write_text("case_id,x,y\na,1,2\n,1,2\nb,1\na,3,4\nc,5,6,7\n")
        table, faults = scan_table(tmp_path / "t.csv")
        assert table.case_ids == ("a", "b", "a", "c") and table.columns["x"] == (1.0, 1.0, 3.0, 5.0)
        assert [fault.split(":")[0] for fault in faults] == ["row 2", "row 3", "row 4", "row 5", "row 6"]

    def test_rows_of_cases(self):
        table = Table(("a", "b"), {"x": (1.0, None), "y": ("u", "v")})
        assert table.rows_of(["b", "z"]) == [{"x": None, "y": "v"}, None]
        assert Table(("a",), {}).rows_of(["a", "b"]) == [{}, None]


class TestSpreadsheets:
    """What German and French spreadsheet programs write, and numbers that could be two."""

    GERMAN = "case_id;alter;suv_max;ort\na;61,5;12,345;Oberschenkel, links\nb;;-3,1E+01;\nc;70;1,5;\n"
    WANTED = {
        "alter": (61.5, None, 70.0), "suv_max": (12.345, -31.0, 1.5), "ort": ("Oberschenkel, links", None, None)
    }  # fmt: skip

    def test_semicolons_and_decimal_commas_are_read_and_said_once(self, tmp_path, caplog):
        with caplog.at_level(logging.WARNING):
            assert table_of(tmp_path, self.GERMAN).columns == self.WANTED
        (record,) = caplog.records
        assert "t.csv is read with semicolons" in record.message and "(61,5 is 61.5)" in record.message

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
    @pytest.mark.parametrize("mark", [";", "\t"])
    def test_encodings(self, tmp_path, encoding, mark):
        text = self.GERMAN.replace(";", mark).replace("Ober", "Öber").replace("\n", "\r\n")
        sign = "\ufeff" if encoding.endswith("e") else ""
        (tmp_path / "t.csv").write_bytes((sign + text).encode(encoding))
        table = read_table(tmp_path / "t.csv")
        assert table.columns["ort"][0] == "Öberschenkel, links" and table.columns["alter"] == self.WANTED["alter"]

    def test_decimal_points_between_semicolons(self, tmp_path):
        """Other programs write them."""
        assert table_of(tmp_path, "case_id;x\na;1.5\nb;2.125\n").columns == {"x": (1.5, 2.125)}

    def test_separators_that_are_no_separators(self, tmp_path, caplog):
        with caplog.at_level(logging.WARNING):
            assert table_of(tmp_path, "case_id,a;b\nx,1;2\n").columns == {"a;b": ("1;2",)}
            assert table_of(tmp_path, 'case_id,site,x\na,"thigh, left",1.234\n').columns["x"] == (1.234,)
            assert table_of(tmp_path, "case_id\na\n").case_ids == ("a",)
        assert not caplog.records

    @pytest.mark.parametrize("trail", ["", ",", ",,,"])
    def test_trailing_empty_columns(self, tmp_path, trail):
        text = f"case_id,x{trail}\na,1\nb,2,\nc,3,,,\n"
        assert table_of(tmp_path, text).columns == {"x": (1.0, 2.0, 3.0)}
        refused(lambda: table_of(tmp_path, text + "d,4,5\n"), "column 3 has cells" if trail else "row 5: 3 cells")

    @pytest.mark.parametrize(
        "text, blamed",
        [
            ('case_id,x\na,"61,5"\nb,12\n', ["row 2 (a) is '61,5'"]),
            ('case_id,x\na,"1,234"\nb,12\n', ["row 2 (a) is '1,234'"]),
            ("case_id;x\na;1.234\nb;845\n", ["row 2 (a) is '1.234'"]),
            ("case_id;x;y\na;1.5;1,5\nb;2;3\n", ["row 2 (a) is '1.5'"]),
            ("case_id;x;y\na;1.234;1,5\nb;2;3\n", ["row 2 (a) is '1.234'"]),
            ("case_id;x\na;1.234,5\nb;2,25\n", ["row 2 (a) is '1.234,5'"]),
            ("case_id;x\na;1 234,5\nb;2\n", ["row 2 (a) is '1 234,5'"]),
            ("case_id;x\na;1\u202f234\nb;2\n", ["row 2 (a) is '1\\u202f234'"]),
            ("case_id;x\na;1'234\nb;2\n", ["""row 2 (a) is "1'234\""""]),
            ('case_id\tx\na\t"1,234"\nb\t2\n', ["row 2 (a) is '1,234'"]),
            ("case_id;x\na;1,5\nb;2.5\nc;3.5\n", ["row 3 (b) is '2.5'", "row 4 (c) is '3.5'"]),
        ],
    )
    def test_two_readings_are_refused(self, tmp_path, text, blamed):
        refused(lambda: table_of(tmp_path, text), "x: " + ", ".join(blamed) + ", which cannot be read in one way only")

    def test_codes_and_dates_are_text(self, tmp_path):
        for word in ("17.05.2024", "1,2,3", "1.2.3", "1,5 cm", "C49.2"):
            assert table_of(tmp_path, f"case_id;x\na;{word}\nb;2\n").columns["x"] == (word, "2")

    def test_as_pandas_reads_them(self, tmp_path):
        pandas = pytest.importorskip("pandas")
        values = np.random.default_rng(0).normal(0, 1e3, (40, 3))
        values[::7, 1] = np.nan
        frame = pandas.DataFrame(values, columns=["x", "y", "z"], index=[f"c{n}" for n in range(40)])
        frame.to_csv(tmp_path / "t.csv", sep=";", decimal=",", index_label="case_id")
        table = read_table(tmp_path / "t.csv")
        for name in frame:
            np.testing.assert_array_equal(np.array(table.columns[name], float), frame[name])


class TestOutcomes:
    def faults(self, tmp_path, rows):
        return outcome_faults(table_of(tmp_path, "case_id,time_days,event\n" + rows))

    def test_good(self, tmp_path):
        assert self.faults(tmp_path, "a,0.5,1\nb,4000,0\n") == []

    @pytest.mark.parametrize("time", ["0", "-1", "", "nan", "inf", "2024-05-17", "soon"])
    def test_bad_time(self, tmp_path, time):
        (fault,) = self.faults(tmp_path, f"a,{time},1\nb,10,0\n")
        assert fault.startswith("time_days must be a number of days above 0") and fault.count("row ") == 1
        told = {"": "blank", "nan": "blank", "2024-05-17": "the date '2024-05-17'"}.get(time, time)
        assert "row 2 (a) is " + (repr(told) if told in ("inf", "soon") else told) in fault

    @pytest.mark.parametrize("event", ["2", "-1", "0.5", "", "yes"])
    def test_bad_event(self, tmp_path, event):
        (fault,) = self.faults(tmp_path, f"a,5,1\nb,10,{event}\n")
        assert fault.startswith("event must be 1 (happened) or 0 (censored): row 3 (b) is ")

    def test_both_in_one_row(self, tmp_path):
        assert len(self.faults(tmp_path, "a,,\nb,10,0\n")) == 2

    def test_dates(self, tmp_path):
        for date in ("2024-05-17", "17.05.2024", "5/17/24", "2024-05-17 08:30", "17/5/2024 08:30:00"):
            (fault,) = self.faults(tmp_path, f"a,{date},1\nb,10,0\n")
            assert f"row 2 (a) is the date {date!r}" in fault
        (fault,) = self.faults(tmp_path, "a,45429,1\nb,10,0\n")
        assert "row 2 (a) is 45429 (a date, as spreadsheets keep it?)" in fault

    def test_all_rows_in_one_line(self, tmp_path):
        (fault,) = self.faults(tmp_path, "".join(f"c{n},{-n},1\n" for n in range(25)))
        assert "row 2 (c0) is 0, row 3 (c1) is -1, " in fault and fault.endswith("row 11 (c9) is -9 and 15 more")

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
        assert fault == "x must be a class: a name or a whole number: row 2 (a) is 0.5"
        (fault,) = self.faults(tmp_path, "case_id,x,y\na,1,0\nb,2,1\n")
        assert fault.startswith("x must be 1, 0 or blank") and fault.endswith("row 3 (b) is 2")
        (fault,) = self.faults(tmp_path, "case_id,x\na,17.05.2024\nb,2\n")
        assert fault.endswith("row 2 (a) is the date '17.05.2024'")


def test_long_lists_are_cut():
    assert shown(["one", "two"]) == "  one\n  two"
    lines = shown([f"fault {n}" for n in range(25)]).splitlines()
    assert len(lines) == 11 and lines[-1] == "  and 15 more"
    assert enumerated(["a", "b"]) == "a, b" and enumerated(["x"] * 12).endswith("x and 2 more")
