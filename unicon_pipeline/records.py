"""Files on disk: frozen dataclasses as JSON, atomic writes, digests.

A file written here appears whole or not at all: it is written beside its destination, synced, and
renamed over it. A record read here has exactly the declared fields, each of the declared type.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import reprlib
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from unicon_pipeline.errors import UniconError

Record = TypeVar("Record")


@contextmanager
def atomic_path(destination: Path, durable: bool = True) -> Iterator[Path]:
    """Gives a temporary path beside `destination`; on success it is synced and renamed to it.

    `durable`: waits until the disk has it; without, a power failure soon afterwards may leave a damaged file.

    The temporary name keeps the destination's suffixes, since image writers choose a format by them.
    On an exception the temporary file is removed and the destination is left as it was.
    """
    destination = Path(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside = destination.with_name(f".{os.getpid()}.partial.{destination.name}")
    try:
        aside.touch()
        mode = aside.stat().st_mode  # as the umask wants it; some writers (safetensors) would make it private
        yield aside
        aside.chmod(mode)
        if durable:
            with open(aside, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(aside, destination)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, payload: Any, durable: bool = True) -> None:
    """Writes `payload` (JSON scalars, lists, dicts) with stable formatting; NaN is refused. `durable`: as above."""
    with atomic_path(path, durable) as aside:
        aside.write_text(canonical_json(payload), encoding="utf-8")


def canonical_json(payload: Any) -> str:
    """The one text that `write_json` gives a value."""
    return json.dumps(payload, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path, error: type[UniconError] = UniconError) -> Any:
    """Reads JSON.

    Raises:
        error: the file is missing, unreadable, or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise error(f"{path} does not exist.") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path} cannot be read: {problem}.") from problem
    except (ValueError, RecursionError) as problem:  # also a number of thousands of digits
        raise error(f"{path} is not valid JSON: {problem}. Correct it or restore it from a copy.") from problem


def sha256_file(path: Path) -> str:
    """Digest of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(payload: Any) -> str:
    """Digest of a JSON value, independent of key order and formatting."""
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def to_dict(record: Any) -> dict[str, Any]:
    """A frozen dataclass as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(record), allow_nan=False))


def write_record(path: Path, record: Any) -> None:
    """Writes a dataclass as JSON."""
    write_json(path, to_dict(record))


def read_record(path: Path, cls: type[Record], error: type[UniconError] = UniconError) -> Record:
    """Reads JSON into the frozen dataclass `cls`; unknown, missing or mistyped fields are refused."""
    return from_dict(cls, read_json(path, error), str(path), error)


def from_dict(cls: type[Record], payload: Any, source: str, error: type[UniconError] = UniconError) -> Record:
    """Builds the frozen dataclass `cls` from plain JSON values.

    Args:
        source: where the values come from, for the message.

    Raises:
        error: a field is unknown, missing or of the wrong type (the message names it), or the record's own
            `__post_init__` refuses the values with a `ValueError`.
    """
    if not isinstance(payload, dict):
        raise error(f"{source}: expected an object with the fields of {cls.__name__}, found {type(payload).__name__}.")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    _check_version(fields, payload, source, error)
    unknown = sorted(set(payload) - set(fields))
    if unknown:
        raise error(f"{source}: unknown field {', '.join(unknown)}; known are {', '.join(fields)}.")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name in payload:
            values[name] = _convert(hints[name], payload[name], f"{source}: {name}", error)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise error(f"{source}: the field {name} is missing.")
    try:
        return cls(**values)
    except ValueError as problem:
        raise error(f"{source}: {problem}") from problem


def _check_version(fields: dict, payload: dict, source: str, error: type[UniconError]) -> None:
    field = fields.get("schema_version")
    found = payload.get("schema_version")
    if field is not None and isinstance(found, int) and found > field.default:
        raise error(
            f"{source} has schema version {found}, this installation reads up to {field.default}: "
            "upgrade unicon_pipeline."
        )


def _convert(hint: Any, value: Any, where: str, error: type[UniconError]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        return _convert(inner, value, where, error)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where, error)
    if origin is tuple and isinstance(value, list | tuple):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(arguments[0], item, f"{where}[{i}]", error) for i, item in enumerate(value))
        if len(arguments) == len(value):
            pairs = zip(arguments, value, strict=True)
            return tuple(_convert(inner, item, f"{where}[{i}]", error) for i, (inner, item) in enumerate(pairs))
    elif origin is dict and isinstance(value, dict):
        return {key: _convert(arguments[1], item, f"{where}[{key!r}]", error) for key, item in value.items()}
    elif hint is float and _is_finite_number(value):
        return float(value)
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif hint in (str, bool) and isinstance(value, hint):
        return value
    expected = hint.__name__ if origin is None else hint
    raise error(f"{where}: expected {expected}, found {reprlib.repr(value)}.")


def _is_finite_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)  # Python's JSON reader accepts NaN, Infinity and integers beyond any float
    except OverflowError:
        return False
