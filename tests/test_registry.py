"""Registries and decision tables."""

import pytest

from unicon_pipeline.decisions import Decision, format_decisions
from unicon_pipeline.errors import UniconError
from unicon_pipeline.registry import Registry


def test_names_are_unique_and_unknown_ones_list_the_choices():
    parts = Registry("part")
    parts.register("b")(int)
    assert parts.register("a")(str) is str
    assert list(parts) == ["a", "b"] and parts["b"] is int
    with pytest.raises(ValueError, match="'a' is registered twice"):
        parts.register("a")(float)
    with pytest.raises(UniconError, match="Unknown part 'c'; this installation has: a, b"):
        parts["c"]


def test_a_table_of_decisions_keeps_every_word_within_120_columns():
    long = Decision("spacing", "1 x 2 x 3 mm", "because " + "of this and that " * 20)
    text = format_decisions("Plan", (Decision("cases", "3", "all usable"), long))
    lines = text.splitlines()
    assert lines[0] == "Plan" and max(map(len, lines)) <= 120
    assert " ".join(text.split()).count("of this and that") == 20
