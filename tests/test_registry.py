"""Registries: one name, one part."""

import pytest

from unicon_pipeline.errors import UniconError
from unicon_pipeline.registry import Registry


def test_names_are_unique_and_unknown_ones_list_the_choices():
    parts = Registry("part")
    parts.register("b")(int)
    assert parts.register("a")(str) is str
    assert list(parts) == ["a", "b"] and parts["b"] is int and "c" not in parts
    with pytest.raises(ValueError, match="'a' is registered twice"):
        parts.register("a")(float)
    assert parts["a"] is str
    with pytest.raises(UniconError, match="Unknown part 'c'; this installation has: a, b"):
        parts["c"]


def test_registries_do_not_share_their_parts():
    one, other = Registry("one"), Registry("other")
    one.register("a")(int)
    assert list(one) == ["a"] and not list(other)
