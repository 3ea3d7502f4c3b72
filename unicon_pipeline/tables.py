"""Tables of cases: `targets.csv` (what to predict) and `clinical.csv` (covariates)."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unicon_pipeline.errors import DatasetError
from unicon_pipeline.records import atomic_path

KEY_COLUMN = "case_id"
_MOST_BYTES = 64 << 20
_GAPS = {"", "na", "n/a", "nan", "none", "null"}
_SHOWN_ROWS = 10
_OTHER_MARKS = {";": "semicolons", "\t": "tabs"}

Cell = float | str | None


@dataclass(frozen=True)
class Table:
    """`columns`: name -> one value per case of `case_ids`; numbers are floats, a gap is None."""

    case_ids: tuple[str, ...]
    columns: dict[str, tuple[Cell, ...]]


def read_table(path: Path) -> Table:
    """Reads a comma-separated table with the key column `case_id`.

    A column is numeric if all its filled cells are numbers; else it is text.

    Raises:
        DatasetError: unreadable, no `case_id` column, ragged rows, empty or duplicate ids; lists the rows.
    """
    rows = _rows(path)
    header = [name.strip() for name in rows[0]] if rows else []
    if KEY_COLUMN not in header:
        other = next((word for mark, word in _OTHER_MARKS.items() if any(mark in name for name in header)), None)
        hint = f" It looks separated by {other}: save it as comma-separated." if other else ""
        raise DatasetError(f"{path} has no column {KEY_COLUMN}; found: {', '.join(header) or 'nothing'}.{hint}")
    unnamed = [position for position, name in enumerate(header) if not name]
    if any(row[position].strip() for row in rows[1:] for position in unnamed if position < len(row)):
        raise DatasetError(f"{path}: column {unnamed[0] + 1} has cells and no name; name it or clear it.")
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        raise DatasetError(f"{path}: the column {', '.join(twice)} occurs more than once.")
    body = [(number, row) for number, row in enumerate(rows[1:], start=2) if any(cell.strip() for cell in row)]
    ids = [row[header.index(KEY_COLUMN)].strip() if len(row) == len(header) else "" for _, row in body]
    count = Counter(ids)
    faults = [
        f"row {number}: {len(row)} cells, expected {len(header)}" if len(row) != len(header)
        else f"row {number}: no {KEY_COLUMN}" if not case_id
        else f"row {number}: {case_id} occurs {count[case_id]} times"
        for (number, row), case_id in zip(body, ids, strict=True)
        if len(row) != len(header) or not case_id or count[case_id] > 1
    ]  # fmt: skip
    if faults:
        raise DatasetError(f"{path}:\n" + shown(faults))
    columns = {
        name: _column([row[position].strip() for _, row in body])
        for position, name in enumerate(header)
        if name and name != KEY_COLUMN
    }
    return Table(tuple(ids), columns)


def write_table(path: Path, columns: Sequence[str], rows: Mapping[str, Sequence[float | str]]) -> None:
    """Writes a CSV table of `case_id` and `columns`, one row per case; whole or not at all."""
    with atomic_path(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("case_id", *columns))
        writer.writerows((case_id, *row) for case_id, row in rows.items())


def outcome_faults(table: Table) -> list[str]:
    """What is wrong with `time_days` (days, above 0) and `event` (0 or 1), one line per case."""
    absent = [name for name in ("time_days", "event") if name not in table.columns]
    if absent:
        return [f"the column {' and '.join(absent)} is missing; prognosis needs it"]
    faults = []
    for case_id, time, event in zip(table.case_ids, table.columns["time_days"], table.columns["event"], strict=True):
        days = _as_number(time)
        if days is None or days <= 0:
            faults.append(f"{case_id}: time_days is {_told(time)}, expected a number of days above 0")
        if _as_number(event) not in (0.0, 1.0):
            faults.append(f"{case_id}: event is {_told(event)}, expected 1 (happened) or 0 (censored)")
    return faults


def class_faults(table: Table) -> list[str]:
    """What is wrong with the targets of a classification task, one line per case or column.

    One column: names, or whole numbers. Several columns: 0 or 1 each. A blank is "not annotated".
    """
    if not table.columns:
        return ["there is no column beside case_id; classification needs one"]
    faults = [f"{name} has no value" for name, cells in table.columns.items() if all(cell is None for cell in cells)]
    for name, cells in table.columns.items():
        for case_id, cell in zip(table.case_ids, cells, strict=True):
            if len(table.columns) > 1 and cell is not None and _as_number(cell) not in (0.0, 1.0):
                faults.append(f"{case_id}: {name} is {_told(cell)}, expected 1, 0 or blank (several columns: findings)")
            elif isinstance(cell, float) and not cell.is_integer():
                faults.append(f"{case_id}: {name} is {_told(cell)}, expected a class: a name or a whole number")
    return faults


def _as_number(cell: Cell) -> float | None:
    # One word makes a whole column text; its other cells are still numbers, and no fault.
    return _number(cell) if isinstance(cell, str) else cell


def _told(cell: Cell) -> str:
    return "blank" if cell is None else repr(cell)


def shown(faults: list[str]) -> str:
    """The first faults, one a line, and how many more there are."""
    lines = [f"  {fault}" for fault in faults[:_SHOWN_ROWS]]
    more = len(faults) - _SHOWN_ROWS
    return "\n".join([*lines, f"  and {more} more"] if more > 0 else lines)


def _rows(path: Path) -> list[list[str]]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DatasetError(f"{path} has {path.stat().st_size >> 20} MB; a table of cases has at most 64.")
        with open(path, newline="", encoding="utf-8-sig") as file:
            return list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise DatasetError(f"{path} cannot be read: {problem}. Expected comma-separated values in UTF-8.") from problem


def _column(cells: list[str]) -> tuple[Cell, ...]:
    values = [None if cell.lower() in _GAPS else cell for cell in cells]
    numbers = [None if value is None else _number(value) for value in values]
    numeric = all((number is None) == (value is None) for number, value in zip(numbers, values, strict=True))
    return tuple(numbers if numeric else values)


def _number(cell: str) -> float | None:
    # Python would read the code 1_2 as 12.
    if "_" in cell:
        return None
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
