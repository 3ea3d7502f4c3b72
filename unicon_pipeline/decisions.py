"""Decisions: what a plan chose and why, and the table that shows it."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _WIDEST_NAME, _WIDEST_VALUE, _GAPS = 120, 30, 40, 4


@dataclass(frozen=True)
class Decision:
    """One row of a plan: what was decided and why."""

    name: str
    value: str
    reason: str


def format_decisions(title: str, decisions: Sequence[Decision]) -> str:
    """A table of 120 columns at most: decision, value, reason."""
    rows = [("decision", "value", "reason"), *((d.name, d.value, d.reason) for d in decisions)]
    first = min(_WIDEST_NAME, max(len(name) for name, _, _ in rows))
    second = min(_WIDEST_VALUE, max(len(value) for _, value, _ in rows))
    widths = (first, second, _WIDTH - _GAPS - first - second)
    lines = [title]
    for index, row in enumerate(rows):
        wrapped = [textwrap.wrap(text, width) for text, width in zip(row, widths)]
        for cells in itertools.zip_longest(*wrapped, fillvalue=""):
            lines.append(f"{cells[0]:<{first}}  {cells[1]:<{second}}  {cells[2]}".rstrip())
        if index == 0:
            lines.append("-" * first + "  " + "-" * second + "  " + "-" * 6)
    return "\n".join(lines)
