"""The table of decisions: every word, in three columns, within 120 characters."""

import pytest

from unicon_pipeline.decisions import Decision, format_decisions


def test_a_short_table_to_the_letter():
    text = format_decisions("Plan", (Decision("cases", "3", "all usable"), Decision("patch", "8 x 8 x 8", "")))
    assert text.splitlines() == [
        "Plan",
        "decision  value      reason",
        "--------  ---------  ------",
        "cases     3          all usable",
        "patch     8 x 8 x 8",
    ]


@pytest.mark.parametrize("column", range(3), ids=["name", "value", "reason"])
@pytest.mark.parametrize("words", ["of this and that " * 20, "x" * 300], ids=["words", "one word"])
def test_a_long_cell_wraps_and_loses_nothing(column, words):
    cells = ["spacing", "1 x 2 x 3 mm", "because"]
    cells[column] = words
    lines = format_decisions("Plan", (Decision(*cells),)).splitlines()
    assert max(map(len, lines)) <= 120
    first, second, _ = map(len, lines[2].split())
    columns = (slice(0, first), slice(first + 2, first + 2 + second), slice(first + second + 4, None))
    for cell, place in zip(cells, columns):
        assert "".join("".join(line[place] for line in lines[3:]).split()) == "".join(cell.split())


def test_no_decision_is_still_a_table():
    assert format_decisions("Plan", ()).splitlines()[0] == "Plan"
