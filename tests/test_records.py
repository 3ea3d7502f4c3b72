"""Records and atomic files: exact round trips, refusals by name, whole files or none."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import Any

import pytest

from unicon_pipeline.errors import CheckpointError, PlanError
from unicon_pipeline.records import (
    atomic_path,
    from_dict,
    read_json,
    read_record,
    sha256_file,
    sha256_json,
    to_dict,
    write_json,
    write_record,
)


@dataclass(frozen=True)
class Inner:
    pair: tuple[int, float]
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    inner: Inner
    several: tuple[Inner, ...]
    table: dict[str, float]
    perhaps: Inner | None = None
    flag: bool = False
    free: dict[str, Any] = field(default_factory=dict)
    schema_version: int = 2


OUTER = Outer(Inner((1, 2.5), ("a", "b")), (Inner((3, 4.0)),), {"x": 1.0})


def test_round_trip_is_exact(tmp_path):
    write_record(tmp_path / "r.json", OUTER)
    assert read_record(tmp_path / "r.json", Outer) == OUTER
    first = (tmp_path / "r.json").read_bytes()
    write_record(tmp_path / "r.json", OUTER)
    assert (tmp_path / "r.json").read_bytes() == first


@pytest.mark.parametrize(
    "change, message",
    [
        ({"colour": 1}, "unknown field colour; known are inner, several"),
        ({"flag": 1}, "r.json: flag: expected <class 'bool'>, found 1"),
        ({"table": {"x": "1"}}, r"table\['x'\]: expected <class 'float'>, found '1'"),
        ({"inner": {"pair": [1, 2, 3]}}, "inner: pair: expected"),
        ({"inner": {"pair": [True, 2.0]}}, r"pair\[0\]: expected <class 'int'>"),
        ({"several": [{"pair": [1, 2], "x": 0}]}, r"several\[0\]: unknown field x"),
        ({"several": {}}, "several: expected"),
        ({"schema_version": 3}, "schema version 3, this installation reads up to 2: upgrade"),
    ],
)
def test_what_does_not_belong_is_refused_by_name(change, message):
    with pytest.raises(PlanError, match=message):
        from_dict(Outer, {**to_dict(OUTER), **change}, "r.json", PlanError)


def test_missing_fields_are_named():
    payload = to_dict(OUTER)
    del payload["table"]
    with pytest.raises(CheckpointError, match="the field table is missing"):
        from_dict(Outer, payload, "r.json", CheckpointError)
    with pytest.raises(CheckpointError, match="expected an object with the fields of Outer, found list"):
        from_dict(Outer, [], "r.json", CheckpointError)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00"])
def test_what_is_no_json_is_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(PlanError, match=r"bad\.json is not valid JSON"):
        read_json(tmp_path / "bad.json", PlanError)
    with pytest.raises(PlanError, match=r"none\.json does not exist"):
        read_json(tmp_path / "none.json", PlanError)


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "new folder" / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(ValueError):
        write_json(path, {"new": float("nan")})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(path.parent) == ["x.json"]


def test_written_files_have_the_mode_that_the_umask_gives(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_path(tmp_path / "x") as aside:
        aside.write_text("x")
        aside.chmod(0o600)
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_digests(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 1_000_000)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
    assert sha256_json({"a": 1, "b": [1, 2]}) == sha256_json({"b": [1, 2], "a": 1})
    assert sha256_json({"a": 1, "b": [1, 2]}) != sha256_json({"a": 1, "b": [2, 1]})
