"""CSV files as spreadsheet programs write them: the encoding, the separator, the decimal mark.

A comma-separated table has decimal points. A spreadsheet set to German, French or many other languages writes
semicolons and decimal commas without being asked; there a comma within a number can be nothing else, so it is read, and
said. Numbers that a person could read in two ways (1.234 after semicolons, "1,234" between commas) are refused: a
survival time that is wrong by a factor of 1000 would pass every later check.
"""

from __future__ import annotations

import codecs
import csv
import io
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from unicon_pipeline.errors import DatasetError

logger = logging.getLogger(__name__)

Cell = float | str | None

TWO_READINGS = (
    "cannot be read in one way only; write decimals as 61.5 in a comma-separated table and nothing between thousands"
)
_MOST_BYTES = 64 << 20
_MARKS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_GAPS = {"", "na", "n/a", "nan", "none", "null", "<na>", "#n/a", "#nv"}
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+(e[+-]?\d+)?", re.IGNORECASE)
_GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}([.,'’\s]\d{3})+([.,]\d+)?")  # 1.234 or 1 234,5: perhaps thousands
_DATE = re.compile(r"(\d{4}([-/.])\d{1,2}\2\d{1,2}|\d{1,2}([-/.])\d{1,2}\3(\d{4}|\d{2}))([ T]\d{1,2}:\d{2}.*)?")


def read_rows(path: Path, key: str) -> tuple[list[list[str]], str]:
    """All rows of a table that has a column `key`, and the mark that separates its cells: , or ; or a tab.

    UTF-8, or UTF-16 with its byte order mark. Cells are stripped; a blank line is an empty row, so that row n of the
    file is entry n - 1.

    Raises:
        DatasetError: unreadable, or no separator gives a column `key`.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DatasetError(f"{path} has {path.stat().st_size >> 20} MB; a table of cases has at most 64.")
        data = path.read_bytes()
        if data.startswith(b"PK\x03\x04"):
            raise DatasetError(f"{path} is a workbook, not a text file: save the sheet as CSV (UTF-8).")
        text = data.decode("utf-16" if data.startswith(_UTF16) else "utf-8-sig")
        readings: list[list[list[str]]] = []
        for mark in _MARKS:
            readings.append(_split(text, mark))
            if readings[-1] and key in readings[-1][0]:
                return readings[-1], mark
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise DatasetError(f"{path} cannot be read: {problem}. Expected comma-separated values in UTF-8.") from problem
    header = max((rows[0] for rows in readings if rows), key=len, default=[])
    raise DatasetError(f"{path} has no column {key} in its first row; found: {', '.join(header) or 'nothing'}.")


def parse_columns(
    texts: Mapping[str, Sequence[str]], mark: str, path: Path
) -> tuple[dict[str, tuple[Cell, ...]], dict[str, list[int]]]:
    """Columns of cells as written -> numbers where all filled cells of a column are numbers, else text; gaps are None.

    Decimal commas are read where `mark` is a semicolon or tab, and nothing speaks against them.

    Returns:
        The columns, and column -> positions of the cells whose number cannot be read in one way only.
    """
    filled = {name: tuple(None if cell.lower() in _GAPS else cell for cell in cells) for name, cells in texts.items()}
    meant = [name for name, cells in filled.items() if all(cell is None or _looks_numeric(cell) for cell in cells)]
    commas = [cell for name in meant for cell in filled[name] if cell is not None and _DECIMAL_COMMA.fullmatch(cell)]
    # After tabs, 1,234 may come from a spreadsheet in English that put a mark between thousands.
    certain = mark == ";" or (mark == "\t" and not all(_GROUPED.fullmatch(cell) for cell in commas))
    columns, unclear = dict(filled), {}
    for name in meant:
        numbers = _numbers(filled[name], bool(commas and certain), mark)
        wrong = [n for n, (cell, value) in enumerate(zip(filled[name], numbers)) if value is None and cell is not None]
        if wrong:
            unclear[name] = wrong
        else:
            columns[name] = numbers
    if mark != "," and not unclear:
        example = f" and decimal commas ({commas[0]} is {_to_point(commas[0])})" if commas else ""
        logger.warning("%s is read with %s between its cells%s.", path, _MARKS[mark], example)
    return columns, unclear


def _numbers(cells: Sequence[str | None], decimal_comma: bool, mark: str) -> tuple[float | None, ...]:
    """None for a gap, and for what could be two numbers."""
    texts = [_to_point(cell) if decimal_comma and cell else cell for cell in cells]
    pointed = [text for text in cells if text and "." in text]
    if mark != "," and pointed and all(_GROUPED.fullmatch(text) for text in pointed):
        # 1.234 and 2.345 alone, after semicolons: a German spreadsheet's thousands, or another program's decimals.
        texts = [None if cell in pointed else text for cell, text in zip(cells, texts)]
    return tuple(None if text is None else number(text) for text in texts)


def number(text: str) -> float | None:
    """The finite number that a text is, with a decimal point, or None."""
    # Python would read the code 1_2 as 12.
    if "_" in text:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def is_date(text: str) -> bool:
    """2024-05-17, 17.05.2024, 5/17/24 and the like, with or without a time of day."""
    return _DATE.fullmatch(text.strip()) is not None


def _split(text: str, mark: str) -> list[list[str]]:
    return [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text, newline=""), delimiter=mark)]


def _looks_numeric(cell: str) -> bool:
    return number(cell) is not None or bool(_DECIMAL_COMMA.fullmatch(cell) or _GROUPED.fullmatch(cell))


def _to_point(cell: str) -> str | None:
    """With a decimal point instead of the comma; None where there is a point as well."""
    return None if "." in cell else cell.replace(",", ".", 1)
