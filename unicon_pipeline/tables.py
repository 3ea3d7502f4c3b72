"""Tables of cases: `targets.csv` (what to predict) and `clinical.csv` (covariates)."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unicon_pipeline.errors import DatasetError
from unicon_pipeline.records import atomic_path
from unicon_pipeline.spreadsheet import TWO_READINGS, Cell, is_date, number, parse_columns, read_rows

KEY_COLUMN = "case_id"
_SHOWN_ROWS = 10
_LONGEST_DAYS = 36_525  # a century; the number that a spreadsheet keeps for a date since 2000 is larger


@dataclass(frozen=True)
class Table:
    """`columns`: name -> one value per case of `case_ids`; numbers are floats, a gap is None.

    `rows`: of the file, as a spreadsheet counts them; empty for a table that comes from no file.
    """

    case_ids: tuple[str, ...]
    columns: dict[str, tuple[Cell, ...]]
    rows: tuple[int, ...] = field(default=(), compare=False)

    def rows_of(self, case_ids: Iterable[str]) -> list[dict[str, Cell] | None]:
        """Column -> cell of each case; None for a case without a row."""
        at = {case_id: position for position, case_id in enumerate(self.case_ids)}
        return [
            {name: cells[at[case_id]] for name, cells in self.columns.items()} if case_id in at else None
            for case_id in case_ids
        ]

    def place(self, position: int) -> str:
        """What messages call a row."""
        return f"row {self.rows[position]} ({self.case_ids[position]})" if self.rows else self.case_ids[position]


def read_table(path: Path) -> Table:
    """Reads a table with the key column `case_id`, as `scan_table`.

    Raises:
        DatasetError: also for what `scan_table` returns as faults.
    """
    table, faults = scan_table(path)
    if faults:
        raise DatasetError(f"{path}:\n" + shown(faults))
    return table


def scan_table(path: Path) -> tuple[Table, list[str]]:
    """Reads a table with the key column `case_id`, separated by commas, semicolons or tabs.

    A column is numeric if all its filled cells are numbers; else it is text.

    Returns:
        The rows that have a `case_id`, and what is wrong: ragged rows, missing or duplicate ids, numbers that can be
        read in two ways.

    Raises:
        DatasetError: unreadable, no `case_id` column, or a column without a name or with another's.
    """
    rows, mark = read_rows(path, KEY_COLUMN)
    header = rows[0]
    unnamed = [position for position, name in enumerate(header) if not name]
    if any(row[position] for row in rows[1:] for position in unnamed if position < len(row)):
        raise DatasetError(f"{path}: column {unnamed[0] + 1} has cells and no name; name it or clear it.")
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        raise DatasetError(f"{path}: the column {', '.join(twice)} occurs more than once.")
    body = [(place, row) for place, row in enumerate(rows[1:], start=2) if any(row)]
    width = 1 + max(position for position, name in enumerate(header) if name)
    key = header.index(KEY_COLUMN)
    count = Counter(row[key] for _, row in body if len(row) > key)
    faults, kept = [], []
    for place, row in body:
        case_id = row[key] if len(row) > key else ""
        if len(row) < width or any(row[width:]):
            faults.append(f"row {place}: {len(row)} cells, expected {width}")
        elif not case_id:
            faults.append(f"row {place}: no {KEY_COLUMN}")
        elif count[case_id] > 1:
            faults.append(f"row {place}: {case_id} occurs {count[case_id]} times")
        if case_id:
            kept.append((place, row + [""] * (width - len(row))))
    texts = {
        name: [row[position] for _, row in kept] for position, name in enumerate(header) if name and position != key
    }
    columns, unclear = parse_columns(texts, mark, path)
    table = Table(tuple(row[key] for _, row in kept), columns, tuple(place for place, _ in kept))
    for name, positions in unclear.items():
        cells = [f"{table.place(position)} is {texts[name][position]!r}" for position in positions]
        faults.append(f"{name}: {enumerated(cells)}, which {TWO_READINGS}")
    return table, faults


def write_table(path: Path, columns: Sequence[str], rows: Mapping[str, Sequence[float | str]]) -> None:
    """Writes a CSV table of `case_id` and `columns`, one row per case; whole or not at all."""
    with atomic_path(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("case_id", *columns))
        writer.writerows((case_id, *row) for case_id, row in rows.items())


def outcome_faults(table: Table) -> list[str]:
    """What is wrong with `time_days` (days, above 0) and `event` (0 or 1): one line per column, with its rows."""
    absent = [name for name in ("time_days", "event") if name not in table.columns]
    if absent:
        return [f"the column {' and '.join(absent)} is missing; prognosis needs it"]
    days = "a number of days above 0, from the day of the images to the event or the last follow-up"
    return [
        *_wrong_cells(table, "time_days", days, lambda cell: 0 < (_as_number(cell) or 0) < _LONGEST_DAYS),
        *_wrong_cells(table, "event", "1 (happened) or 0 (censored)", _is_binary),
    ]


def class_faults(table: Table) -> list[str]:
    """What is wrong with the targets of a classification task: one line per column, with its rows.

    One column: names, or whole numbers. Several columns: 0 or 1 each. A blank is "not annotated".
    """
    if not table.columns:
        return ["there is no column beside case_id; classification needs one"]
    faults = [f"{name} has no value" for name, cells in table.columns.items() if all(cell is None for cell in cells)]
    for name in table.columns:
        if len(table.columns) > 1:
            expected = "1, 0 or blank (several columns: findings)"
            faults += _wrong_cells(table, name, expected, lambda cell: cell is None or _is_binary(cell))
        else:
            expected = "a class: a name or a whole number"
            faults += _wrong_cells(table, name, expected, _is_class)
    return faults


def shown(faults: Sequence[str]) -> str:
    """The first faults, one a line, and how many more there are."""
    lines = [f"  {fault}" for fault in faults[:_SHOWN_ROWS]]
    more = len(faults) - _SHOWN_ROWS
    return "\n".join([*lines, f"  and {more} more"] if more > 0 else lines)


def enumerated(items: Sequence[str]) -> str:
    """The first ones in a sentence, and how many more there are."""
    more = len(items) - _SHOWN_ROWS
    return ", ".join(items[:_SHOWN_ROWS]) + (f" and {more} more" if more > 0 else "")


def _wrong_cells(table: Table, name: str, expected: str, is_right: Callable[[Cell], bool]) -> list[str]:
    cells = enumerate(table.columns[name])
    found = [f"{table.place(position)} is {_told(cell)}" for position, cell in cells if not is_right(cell)]
    return [f"{name} must be {expected}: {enumerated(found)}"] if found else []


def _is_binary(cell: Cell) -> bool:
    return _as_number(cell) in (0.0, 1.0)


def _is_class(cell: Cell) -> bool:
    return not is_date(cell) if isinstance(cell, str) else cell is None or cell.is_integer()


def _as_number(cell: Cell) -> float | None:
    # One word makes a whole column text; its other cells are still numbers, and no fault.
    return number(cell) if isinstance(cell, str) else cell


def _told(cell: Cell) -> str:
    if cell is None:
        return "blank"
    if isinstance(cell, float):
        return f"{cell:g}" + (" (a date, as spreadsheets keep it?)" if cell >= _LONGEST_DAYS else "")
    return f"the date {cell!r}" if is_date(cell) else repr(cell)
