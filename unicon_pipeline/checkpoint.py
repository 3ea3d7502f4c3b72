"""Checkpoints of others: read without running what they carry, and without allocating what they claim.

A torch file is a zip archive with a pickle, a small program that names what it wants to call. Before torch reads it
(with `weights_only`), the archive's sizes are held against the file, and the program is followed symbolically:
anything that plain weights do not need is refused by name. Tensors stay on disk (mapped, copy on write) until used.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.records import read_json, sha256_file

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"  # the Hugging Face layout
LARGEST_PICKLE = 64 << 20  # bytes; one scalar an epoch and class for thousands of epochs stays below
LARGEST_HEADER = 16 << 20  # bytes of names and sizes: safetensors header, zip directory, config.json
MOST_OPERATIONS, MOST_VALUES = 8_000_000, 1_500_000  # of a pickle: bounds minutes and memory of a hostile one
LONGEST_KEY = 512

AGAIN = "Download or copy it again."
PLAIN = (
    "Where you trust its source, load it with the software that wrote it and save the state dict alone, "
    "or ask for a safetensors file."
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was found, before any family makes sense of it.

    `payload`: torch file: its top-level dict, NumPy numbers as Python numbers; safetensors: `state_dict` and
    `metadata` (strings); Hugging Face folder: `state_dict` and `config`. `sha256`: of the file with the weights.
    """

    path: Path
    payload: dict[str, Any]
    sha256: str


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a torch or safetensors file (told apart by content), or a folder with config.json and model.safetensors.

    Raises:
        CheckpointError: it is missing, cut off, something else, too large where it should be small, or wants to
            run or build what plain weights do not need (the message names it; nothing of it was run).
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _read_folder(path)
        if not path.is_file():
            fault = "is no regular file" if path.exists() else "does not exist"
            raise CheckpointError(f"{path} {fault}. Give a checkpoint file, or a folder that holds one.")
        return Checkpoint(path, _read_file(path), sha256_file(path))
    except OSError as problem:
        reason = problem.strerror or problem
        raise CheckpointError(f"{path} cannot be read: {reason}. Check the path and its permissions.") from problem


def tensors_under(payload: Mapping[str, Any], *keys: str) -> dict[str, Tensor]:
    """The state dict under the first of `keys` that holds tensors ("" is the top level), without its other entries.

    Sparse, quantised and other than CPU tensors count as other entries. What is returned needs no gradient.

    Raises:
        CheckpointError: none of the keys holds tensors, or a tensor's name is no printable string of sane length.
    """
    for key in keys:
        found = payload if key == "" else payload.get(key)
        tensors = _plain_tensors(found) if isinstance(found, Mapping) else {}
        if tensors:
            return tensors
    places = " or ".join("the top level" if key == "" else key for key in keys)
    raise CheckpointError(f"The checkpoint holds no tensors under {places}; at its top level are {_listed(payload)}.")


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes what DistributedDataParallel ("module." in front) and torch.compile ("_orig_mod.") add to names.

    Raises:
        CheckpointError: two tensors get the same name.
    """
    bare = {}
    for name, tensor in state.items():
        short = re.sub(r"^(module\.)+", "", re.sub(r"(^|(?<=\.))_orig_mod\.", "", name))
        if short in bare:
            raise CheckpointError(f"The checkpoint holds two tensors for {short}, one of them as {name}.")
        bare[short] = tensor
    return bare


def _plain_tensors(found: Mapping) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_quantized:
            continue
        if tensor.device.type != "cpu":
            continue
        if not isinstance(name, str) or len(name) > LONGEST_KEY or not name.isprintable():
            raise CheckpointError(f"The checkpoint names a tensor {_short(name)}, which is no parameter's name.")
        tensors[name] = tensor.detach()
    return tensors


def _read_folder(path: Path) -> Checkpoint:
    config, weights = path / CONFIG_FILE, path / WEIGHTS_FILE
    if not (config.is_file() and weights.is_file()):
        raise CheckpointError(
            f"{path} is no checkpoint folder: one from Hugging Face holds {CONFIG_FILE} and {WEIGHTS_FILE}, one of "
            "nnU-Net plans.json, dataset.json and fold_*, a model of this package model.json; this one holds "
            f"{_listed(sorted(entry.name for entry in path.iterdir()))}. Give the right folder or the checkpoint file."
        )
    if config.stat().st_size > LARGEST_HEADER:
        raise CheckpointError(f"{config} is too large for a configuration. {AGAIN}")
    settings = read_json(config, CheckpointError)
    if not isinstance(settings, dict):
        raise CheckpointError(f"{config}: expected an object, found {type(settings).__name__}.")
    return Checkpoint(path, {**_read_file(weights), "config": settings}, sha256_file(weights))


def _read_file(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
        if head.startswith(b"PK\x03\x04"):
            return _read_torch(path, size)
        header = int.from_bytes(head[:8], "little")
        if head[8:9] == b"{" and header <= min(size - 8, LARGEST_HEADER):
            return _read_safetensors(path)
        raise CheckpointError(f"{path} {_fault_of_other(file, head)}")


_OTHERS = {
    b"version https://git-lfs": "is a git-lfs pointer, the file itself was not fetched. Run `git lfs pull` beside it.",
    b"<!doctype": f"is a web page. {AGAIN} Its link may need a login.",
    b"<html": f"is a web page. {AGAIN} Its link may need a login.",
    b"\x1f\x8b": "is a gzip archive. Unpack it and give the checkpoint inside.",
}
_LEGACY_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"


def _fault_of_other(file: BinaryIO, head: bytes) -> str:
    """What a file is that is neither a zip archive nor safetensors, and what to do."""
    if not head:
        return f"is empty. {AGAIN}"
    start = head.lstrip().lower()
    for beginning, fault in _OTHERS.items():
        if start.startswith(beginning):
            return fault
    legacy = _LEGACY_MAGIC in head[:32]
    file.seek(0)
    pickles = io.BytesIO(file.read(LARGEST_PICKLE))
    try:
        foreign = _foreign_names(pickles)
        while not foreign and legacy:
            foreign = _foreign_names(pickles)  # after the magic number: version, system, content, list of storages
    except (ValueError, LookupError):
        foreign = []
    if foreign:
        return _refusal(foreign)
    if legacy:
        return (
            "is in torch's old format (before 1.6), whose sizes cannot be checked. Save it anew: "
            "torch.save(torch.load(OLD, map_location='cpu', weights_only=True), NEW)."
        )
    if head.startswith(b"\x80"):
        return f"is a bare pickle, no torch file. {PLAIN}"
    if head[8:9] == b"{":
        return f"is cut off or damaged: its safetensors header claims more bytes than it can have. {AGAIN}"
    return f"is neither a torch nor a safetensors file, it begins with {_short(head[:40])}. {AGAIN}"


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return {"state_dict": tensors, "metadata": file.metadata() or {}}
    except (SafetensorError, OSError, RuntimeError, ValueError) as problem:
        raise CheckpointError(f"{path} cannot be read as safetensors: {_first_line(problem)}. {AGAIN}") from problem


def _read_torch(path: Path, size: int) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is a torch file by its content. Rename it to .pth.")
    try:
        with _SmallReads(path) as file, zipfile.ZipFile(file) as archive:
            pickle_entry, record_sizes = _checked_entries(archive, path, size)
            with archive.open(pickle_entry) as stream:
                program = b"".join(iter(lambda: stream.read(1 << 20), b""))
        foreign = _foreign_names(io.BytesIO(program))
        if foreign:
            raise CheckpointError(f"{path} {_refusal(foreign)}")
        if program[:2] != b"\x80\x02":
            raise CheckpointError(f"{path} has an unusual pickle protocol. Save it with torch's default one.")
        with torch.serialization.safe_globals(_STAND_INS):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        payload = _Plain(record_sizes)(loaded)
    except CheckpointError:
        raise
    except Exception as problem:  # a damaged pickle can make its reader fail in any way
        raise CheckpointError(f"{path} is damaged or cut off: {_first_line(problem)}. {AGAIN}") from problem
    if not isinstance(payload, dict):
        raise CheckpointError(f"{path} holds a {type(payload).__name__}, expected a state dict. {PLAIN}")
    return payload


class _SmallReads(io.FileIO):
    """A file of which nothing large is read at once: zipfile reads a directory of any claimed size whole."""

    def read(self, size: int = -1) -> bytes:
        if size > LARGEST_HEADER:
            raise zipfile.BadZipFile(f"{size} bytes of directory")
        return super().read(size)


def _checked_entries(archive: zipfile.ZipFile, path: Path, size: int) -> tuple[zipfile.ZipInfo, set[int]]:
    """The entry of the pickle, and the sizes in bytes of the storages beside it."""
    entries = {entry.filename: entry for entry in archive.infolist()}
    root = next(iter(entries), "").partition("/")[0]
    if f"{root}/constants.pkl" in entries or any(name.startswith(f"{root}/code/") for name in entries):
        raise CheckpointError(f"{path} is a TorchScript program, which is not run here. {PLAIN}")
    if f"{root}/data.pkl" not in entries:
        raise CheckpointError(
            f"{path} is a zip archive, but not torch's (it has no data.pkl). "
            "Unpack it and give the checkpoint or the folder inside."
        )
    fault = None
    if len(entries) < len(archive.infolist()):
        fault = "names an entry twice"
    elif any(entry.compress_type or entry.compress_size != entry.file_size for entry in entries.values()):
        fault = "has compressed entries"
    elif sum(entry.file_size for entry in entries.values()) > size:
        fault = "claims more bytes than it has"
    elif entries[f"{root}/data.pkl"].file_size > LARGEST_PICKLE:
        fault = f"has a pickle of more than {LARGEST_PICKLE >> 20} MiB"
    if fault:
        raise CheckpointError(f"{path} {fault}, unlike what torch.save writes for weights. {AGAIN}")
    records = {entry.file_size for name, entry in entries.items() if name.startswith(f"{root}/data/")}
    return entries[f"{root}/data.pkl"], records


class _Called(str):
    """The name of something that a pickle gets by import."""


_ENCODE, _ORDERED = "_codecs.encode", "collections.OrderedDict"
_STORAGES = "Float Double Half BFloat16 Byte Char Short Int Long Bool ComplexFloat ComplexDouble".split()
_NUMPY_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_OLD_MODULES = {"__builtin__": "builtins", "commands": "subprocess", "copy_reg": "copyreg"}  # as in Python 2
_NATIVE = {_ENCODE, _ORDERED, "numpy.dtype", *_NUMPY_SCALARS, "torch.device"}
_NATIVE |= {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"}
_NATIVE |= {f"torch.{kind}Storage" for kind in _STORAGES}
_NATIVE |= {str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}


def _foreign_names(pickled: BinaryIO) -> list[str]:
    """What the next pickle in a stream imports or does beyond plain weights; its stack is followed symbolically.

    On the stack are strings, integers, names of imports, and tuples of these; None stands for all else.

    Raises:
        ValueError, LookupError: it is no pickle, or no sane one.
    """
    foreign, stack, marks, memo = [], [], [], {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
        if count > MOST_OPERATIONS:
            raise ValueError(f"more than {MOST_OPERATIONS} operations in a pickle")
        name, needs = opcode.name, opcode.stack_before
        if name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        else:
            marked = pickletools.markobject in needs
            start = marks.pop() - needs.index(pickletools.markobject) if marked else len(stack) - len(needs)
            if start < 0:
                raise ValueError("the pickle takes more from its stack than is there")
            taken, stack[start:] = stack[start:], []
            made = _result(name, argument, taken)
            foreign += _faults(name, taken, made)
            stack += [made] * len(opcode.stack_after)
    return foreign


def _result(name: str, argument: Any, taken: list) -> Any:
    if name in ("GLOBAL", "INST"):
        module, _, attribute = argument.partition(" ")
        return _Called(f"{_OLD_MODULES.get(module, module)}.{attribute}")
    if name == "STACK_GLOBAL":
        return _Called(".".join(part if isinstance(part, str) else "?" for part in taken))
    if name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"):
        return tuple(taken)
    return argument if isinstance(argument, str | int) else None


def _faults(name: str, taken: list, made: Any) -> list[str]:
    """Imports that weights do not need, and uses of the others that could take for ever."""
    if isinstance(made, _Called) and made not in _NATIVE:
        return [made]
    if name == "REDUCE":
        function, arguments = taken
        text, codec = arguments if isinstance(arguments, tuple) and len(arguments) == 2 else (None, None)
        if function == _ENCODE and not (type(text) is str and codec == "latin1"):
            return [_ENCODE]  # other codecs let a pickle grow without end
        if function == _ORDERED and arguments != ():
            return [_ORDERED]
    if name in ("SETITEM", "SETITEMS") and not all(map(_is_cheap_key, taken[1::2])):
        raise ValueError("a dictionary with tuples or huge integers as keys")
    return []


def _is_cheap_key(key: Any) -> bool:
    """Not so for deep tuples, which overflow the stack when hashed, and for integers chosen to have equal hashes."""
    return not isinstance(key, tuple) and not (isinstance(key, int) and key.bit_length() > 64)


class _NumberType:
    """Stands in for numpy.dtype, whose own way back from a pickle trusts what it finds."""

    def __init__(self, code: str, *_: Any):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def _number(kind: _NumberType, raw: bytes) -> bool | int | float:
    """Stands in for NumPy's scalar."""
    if not re.fullmatch(r"b1|[iu][1248]|f[248]", kind.code):
        raise ValueError(f"a NumPy number of type {kind.code}")
    (number,) = np.frombuffer(raw, np.dtype(kind.code).newbyteorder(kind.order))
    return number.item()


_STAND_INS = [(_NumberType, "numpy.dtype"), *((_number, name) for name in _NUMPY_SCALARS)]


class _Plain:
    """Rebuilds a payload from plain dictionaries, lists and tuples, and holds each tensor against the file.

    An OrderedDict from a pickle may have had its methods replaced, and a list may contain itself.
    """

    def __init__(self, record_sizes: set[int]):
        self.record_sizes, self.left = record_sizes, MOST_VALUES

    def __call__(self, value: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError("its values contain each other without end")
        if isinstance(value, dict):
            return {key: self(item) for key, item in dict.items(value)}
        if isinstance(value, list | tuple):
            return type(value)(self(item) for item in value)
        if isinstance(value, Tensor):
            stored = value.untyped_storage().nbytes()
            if stored not in self.record_sizes or value.numel() * value.element_size() > stored:
                raise ValueError(f"a tensor of shape {tuple(value.shape)} is larger than what is stored of it")
        return value


def _refusal(foreign: Iterable[str]) -> str:
    names = _listed(dict.fromkeys(foreign))
    return f"asks for {names}, which plain weights do not need; nothing of it was run. {PLAIN}"


def _short(value: Any) -> str:
    """For a message: no control characters, no great length."""
    return ascii(value[:80] if isinstance(value, str | bytes) else value)[:200]


def _listed(names: Iterable[Any]) -> str:
    names = [str(name) for name in names]
    more = [f"{len(names) - 8} more"] if len(names) > 8 else []
    return ", ".join([*map(_short, names[:8]), *more]) or "nothing"


def _first_line(problem: Exception) -> str:
    """Of torch's message, what its unpickler said, without the advice around it."""
    lines = str(problem).rpartition("WeightsUnpickler error: ")[2].strip().splitlines()
    line = lines[0][:200] if lines else type(problem).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in line).rstrip(".")
