"""Records and atomic files: exact round trips, refusals by name, whole files or none."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
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
        ({"flag": 1}, "r.json: flag: expected bool, found 1"),
        ({"table": {"x": "1"}}, r"table\['x'\]: expected float, found '1'"),
        ({"inner": {"pair": [1, 2, 3]}}, "inner: pair: expected"),
        ({"inner": {"pair": [True, 2.0]}}, r"pair\[0\]: expected int"),
        ({"several": [{"pair": [1, 2], "x": 0}]}, r"several\[0\]: unknown field x"),
        ({"several": {}}, "several: expected"),
        ({"table": {"x": float("nan")}}, r"table\['x'\]: expected float, found nan"),
        ({"table": {"x": float("inf")}}, r"table\['x'\]: expected float, found inf"),
        ({"table": {"x": 10**400}}, r"table\['x'\]: expected float, found 1000"),
        ({"table": {"x": "long " * 10_000}}, r"table\['x'\]: expected float, found .{5,60}$"),
        ({"perhaps": 1}, "perhaps: expected an object with the fields of Inner, found int"),
        ({"free": None}, "free: expected"),
        ({"schema_version": "2"}, "schema_version: expected int, found '2'"),
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


def test_an_older_schema_version_and_fields_with_a_default_may_be_missing():
    payload = {**to_dict(OUTER), "schema_version": 1}
    del payload["free"], payload["flag"]
    assert from_dict(Outer, payload, "r.json") == replace(OUTER, schema_version=1)


def test_what_a_record_refuses_itself_is_an_error_with_its_place():
    @dataclass(frozen=True)
    class Positive:
        number: int

        def __post_init__(self):
            if self.number < 1:
                raise ValueError(f"{self.number} is too small.")

    with pytest.raises(PlanError, match=r"^r\.json: 0 is too small\.$"):
        from_dict(Positive, {"number": 0}, "r.json", PlanError)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00", "9" * 5000], ids=lambda text: text[:3])
def test_what_is_no_json_is_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(PlanError, match=r"bad\.json is not valid JSON"):
        read_json(tmp_path / "bad.json", PlanError)
    with pytest.raises(PlanError, match=r"none\.json does not exist"):
        read_json(tmp_path / "none.json", PlanError)


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(ValueError):
        write_json(path, {"new": float("nan")})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(path.parent) == ["x.json"]


def test_written_files_have_the_mode_that_the_umask_gives(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_path(tmp_path / "x") as aside:
        aside.write_text("x")
        aside.chmod(0o600)
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_old_file_stays_readable_while_the_new_one_is_written(tmp_path):
    (tmp_path / "x.nii.gz").write_text("old")
    with atomic_path(tmp_path / "x.nii.gz") as aside:
        aside.write_text("new")
        assert aside.parent == tmp_path and aside.name.endswith(".nii.gz")
        assert (tmp_path / "x.nii.gz").read_text() == "old"
    assert (tmp_path / "x.nii.gz").read_text() == "new"


def test_digests(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 1_000_000)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
    assert sha256_json({"a": 1, "b": [1, 2]}) == sha256_json({"b": [1, 2], "a": 1})
    assert sha256_json({"a": 1, "b": [1, 2]}) != sha256_json({"a": 1, "b": [2, 1]})
