"""Preprocessed cases on disk: compressed arrays of which a random patch can be read without the rest.

A case is a folder: `image.b2nd` (float32; channel, z, y, x), `labels.b2nd` (smallest integer type; z, y, x; absent
for a case without labels) and `meta.json`. The meta file is written last and removed first, so a case
is complete exactly when its meta file is there. Nothing waits for the disk, which would take longer than all the rest:
what a power failure damages is told by its size or checksum, and made again.

Arrays are blosc2. A *block* is what is decompressed at once, a *chunk* is a group of blocks of one
channel. Blocks have a quarter of the patch's edge on every axis, so a patch at a random place touches
at most (5/4)^3, about twice, its own voxels; much smaller blocks cost more calls than they save and
blocks of a whole patch decompress up to eight times as much. Chunks have the patch's size. Measured on
real CT+PET (three cases, patch 32 x 96 x 96, one thread): ms to read a patch, and the share of the bytes
that is stored, of images at their own spacing and of resampled ones (tests/benchmarks/store_reading.py
compares with nnU-Net's store):

                               own spacing       resampled
    LZ4 level 1               1.1 ms  76 %     0.5 ms  93 %
    LZ4 level 1, shuffle      1.0 ms  72 %     1.0 ms  78 %
    LZ4 level 1, bitshuffle   1.1 ms  73 %     1.1 ms  80 %
    LZ4HC level 5, shuffle    0.9 ms  66 %     0.8 ms  73 %     written five times as slowly, or more
    Zstandard 1, shuffle      3.8 ms  60 %     2.4 ms  70 %

The data loader reads far more often than anything is written, and most images are resampled: LZ4 and no
filter. What does not compress is stored as it is, and reading it is copying.
"""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from isal import isal_zlib

from unicon_pipeline.contract import ZYX
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.records import atomic_path, read_json, write_json

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
IMAGE_FILE = "image.b2nd"
LABELS_FILE = "labels.b2nd"
META_FILE = "meta.json"
BLOCKS_PER_PATCH_EDGE = 4
MAX_CHUNK_BYTES = 64 << 20  # a chunk is compressed in memory at once, and blosc2 allows less than 2 GB

_CASE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-+]*")


@dataclass(frozen=True)
class StoredCase:
    """One stored case; nothing is read until an array is indexed.

    `array`: float32, (channel, z, y, x); `labels`: integers, (z, y, x), or None. Both are read-only
    memory-mapped blosc2 arrays: `case.array[:, 4:36, 0:96, 0:96]` gives a numpy array of that patch.
    `meta`: see `write_case`.
    """

    case_id: str
    array: blosc2.NDArray
    labels: blosc2.NDArray | None
    meta: dict[str, Any]

    @property
    def present(self) -> tuple[str, ...]:
        """The modalities that the case has; the channels of the others are zero."""
        return tuple(self.meta["present"])

    @property
    def foreground(self) -> dict[str, list[list[int]]]:
        """Sampled z, y, x voxel indices of each label output (empty where a case has none of it)."""
        return self.meta["foreground"]


def write_case(
    folder: Path,
    case_id: str,
    array_czyx: np.ndarray,
    labels_zyx: np.ndarray | None,
    meta: dict[str, Any],
    patch_shape_zyx: ZYX | None = None,
) -> None:
    """Stores a case, replacing an older one of that name; it becomes visible when all of it is on the disk.

    Args:
        folder: the folder of all cases.
        array_czyx: float32, (channel, z, y, x).
        labels_zyx: integers, the same z, y, x shape, or None.
        meta: JSON values. `present` (list of modalities) and `foreground` (output name -> list of z, y, x)
            are required; the names, sizes and digests of the stored files are added.
        patch_shape_zyx: how large the patches are that will be read; None: the whole case is.

    Raises:
        DatasetError: the arrays or the meta do not belong together, or the disk refuses (full, read-only).
    """
    case_folder = _case_folder(folder, case_id)
    _check_arrays(case_id, array_czyx, labels_zyx, meta)
    files = {IMAGE_FILE: np.ascontiguousarray(array_czyx, dtype=np.float32)}
    if labels_zyx is not None:
        files[LABELS_FILE] = smallest_integers(labels_zyx)
    try:
        forget_case(folder, case_id)
        stored = {}
        for name, values in files.items():
            with atomic_path(case_folder / name, durable=False) as aside:
                _write_chunks(aside, values, patch_shape_zyx or array_czyx.shape[1:])
                stored[name] = {"bytes": aside.stat().st_size, "crc32": _crc32(aside)}
        shape = list(array_czyx.shape)
        payload = {"schema_version": SCHEMA_VERSION, **meta, "case_id": case_id, "shape_czyx": shape, "stored": stored}
        write_json(case_folder / META_FILE, payload, durable=False)
    except OSError as problem:
        raise DatasetError(
            f"The preprocessed case {case_id} cannot be written to {case_folder}: {problem}. "
            "Free some space or choose another work folder, then run again: finished cases are kept."
        ) from problem


def open_case(folder: Path, case_id: str) -> StoredCase:
    """Opens a stored case for reading, memory-mapped; decompression uses one thread (loaders have several workers).

    Raises:
        DatasetError: the case is not complete, or its files are not those that its meta file describes.
    """
    case_folder = _case_folder(folder, case_id)
    meta = read_meta(folder, case_id)
    if meta is None:
        raise DatasetError(f"{case_folder} holds no complete preprocessed case: run unicon_plan_and_preprocess again.")
    arrays = {}
    for name, entry in meta["stored"].items():
        path = case_folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise _damaged(path, f"{found}, {entry['bytes']} were written")
        try:
            arrays[name] = blosc2.open(str(path), mode="r", mmap_mode="r", dparams=blosc2.DParams(nthreads=1))
        except (RuntimeError, ValueError, OSError) as problem:
            raise _damaged(path, f"cannot be opened ({problem})") from problem
    array, labels = arrays[IMAGE_FILE], arrays.get(LABELS_FILE)
    shape = tuple(meta["shape_czyx"])
    if array.shape != shape or array.dtype != np.float32:
        raise _damaged(case_folder / IMAGE_FILE, f"holds {array.dtype} {array.shape}, expected float32 {shape}")
    if labels is not None and (labels.shape != shape[1:] or labels.dtype.kind not in "ui"):
        raise _damaged(case_folder / LABELS_FILE, f"holds {labels.dtype} {labels.shape}, expected integers {shape[1:]}")
    return StoredCase(case_id, array, labels, meta)


def read_meta(folder: Path, case_id: str) -> dict[str, Any] | None:
    """The meta file of a case, or None where the case is not (completely) stored.

    Raises:
        DatasetError: the file is there but is not a meta file of this version.
    """
    path = _case_folder(folder, case_id) / META_FILE
    if not path.is_file():
        return None
    meta = read_json(path, DatasetError)
    if not isinstance(meta, dict) or meta.get("schema_version") != SCHEMA_VERSION:
        raise _damaged(path, f"is not a meta file of version {SCHEMA_VERSION}")
    stored, shape = meta.get("stored"), meta.get("shape_czyx")
    well_formed = (
        meta.get("case_id") == case_id
        and isinstance(meta.get("present"), list)
        and isinstance(meta.get("foreground"), dict)
        and isinstance(shape, list)
        and len(shape) == 4
        and isinstance(stored, dict)
        and IMAGE_FILE in stored
        and set(stored) <= {IMAGE_FILE, LABELS_FILE}
        and all(isinstance(entry, dict) and {"bytes", "crc32"} <= set(entry) for entry in stored.values())
    )
    if not well_formed:
        raise _damaged(path, "lacks fields or holds another case")
    return meta


def is_sound(folder: Path, case_id: str) -> bool:
    """Whether a case is complete and every stored byte is the one that was written (reads all of it)."""
    try:
        meta = read_meta(folder, case_id)
    except DatasetError as problem:
        logger.warning("%s", problem)
        return False
    if meta is None:
        return False
    case_folder = _case_folder(folder, case_id)
    for name, entry in meta["stored"].items():
        path = case_folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or _crc32(path) != entry["crc32"]:
            logger.warning("%s is damaged or missing.", path)
            return False
    return True


def stored_case_ids(folder: Path) -> tuple[str, ...]:
    """The names of all complete cases, sorted."""
    found = (path.parent.name for path in Path(folder).glob(f"*/{META_FILE}"))
    return tuple(sorted(name for name in found if _CASE_ID.fullmatch(name)))


def forget_case(folder: Path, case_id: str) -> None:
    """Removes a case's files, the meta file first, and whatever an interrupted write left."""
    case_folder = _case_folder(folder, case_id)
    for name in (META_FILE, LABELS_FILE, IMAGE_FILE):
        (case_folder / name).unlink(missing_ok=True)
    _sweep(case_folder)


def sweep_unfinished(folder: Path) -> None:
    """Removes what killed writers left, for a caller that holds the folder and whose own writers have ended."""
    for case_folder in Path(folder).glob("*"):
        _sweep(case_folder)


def smallest_integers(labels_zyx: np.ndarray) -> np.ndarray:
    """Labels (any integers, not negative) as uint8 where they fit, else int16, else int32."""
    largest = int(labels_zyx.max(initial=0))
    dtype = np.uint8 if largest < 1 << 8 else np.int16 if largest < 1 << 15 else np.int32
    return np.ascontiguousarray(labels_zyx, dtype=dtype)


def chunks_and_blocks(shape: tuple[int, ...], patch_shape_zyx: ZYX, itemsize: int) -> tuple[tuple, tuple]:
    """Chunk and block shapes for an array whose last three axes are z, y, x; a leading axis is split singly."""
    edges = [min(size, patch) for size, patch in zip(shape[-3:], patch_shape_zyx, strict=True)]
    blocks = [-(-edge // BLOCKS_PER_PATCH_EDGE) for edge in edges]
    chunks = [min(size, BLOCKS_PER_PATCH_EDGE * block) for size, block in zip(shape[-3:], blocks, strict=True)]
    while itemsize * int(np.prod(chunks)) > MAX_CHUNK_BYTES:
        longest = int(np.argmax([chunk / block for chunk, block in zip(chunks, blocks, strict=True)]))
        if chunks[longest] <= blocks[longest]:
            blocks = [-(-block // 2) for block in blocks]
            continue
        chunks[longest] = max(blocks[longest], chunks[longest] // 2)
    leading = (1,) * (len(shape) - 3)
    return leading + tuple(chunks), leading + tuple(blocks)


def _write_chunks(path: Path, values: np.ndarray, patch_shape_zyx: ZYX) -> None:
    """One chunk after the other, so that memory holds no second copy of the case."""
    chunks, blocks = chunks_and_blocks(values.shape, patch_shape_zyx, values.itemsize)
    # One thread: cases are written by several processes side by side.
    parameters = blosc2.CParams(codec=blosc2.Codec.LZ4, clevel=1, filters=[blosc2.Filter.NOFILTER], nthreads=1)
    try:
        blosc2.asarray(values, chunks=chunks, blocks=blocks, cparams=parameters, urlpath=str(path), mode="w")
    except RuntimeError as problem:  # blosc2 does not hand on what the system said
        free = shutil.disk_usage(path.parent).free
        needed = f"{values.nbytes / 1e6:.1f} MB before compression"
        raise OSError(f"{problem}; {free / 1e6:.1f} MB are free there, the array has {needed}") from problem


def _crc32(path: Path) -> int:
    """Against damage, not against malice: at a tenth of the time that a cryptographic digest takes."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum = isal_zlib.crc32(block, checksum)
    return checksum


def _case_folder(folder: Path, case_id: str) -> Path:
    if not _CASE_ID.fullmatch(case_id):
        raise DatasetError(
            f"The case name {case_id!r} cannot be used as a folder name: letters, digits and _ . - + are allowed, "
            "a letter or digit first. Rename the case."
        )
    return Path(folder) / case_id


def _sweep(case_folder: Path) -> None:
    if case_folder.is_dir():
        for leftover in case_folder.glob(".*.partial.*"):
            leftover.unlink(missing_ok=True)
        if not any(case_folder.iterdir()):
            case_folder.rmdir()


def _check_arrays(case_id: str, array_czyx: np.ndarray, labels_zyx: np.ndarray | None, meta: dict[str, Any]) -> None:
    problems = []
    if array_czyx.ndim != 4 or 0 in array_czyx.shape:
        problems.append(f"the image has shape {array_czyx.shape}, expected channel, z, y, x, none of them empty")
    if labels_zyx is not None:
        if labels_zyx.shape != array_czyx.shape[1:]:
            problems.append(f"the labels have shape {labels_zyx.shape}, the image {array_czyx.shape[1:]}")
        elif labels_zyx.dtype.kind not in "ui" or labels_zyx.min(initial=0) < 0:
            problems.append(f"the labels must be integers and not negative, found {labels_zyx.dtype}")
    problems += [f"the meta lacks {name!r}" for name in ("present", "foreground") if name not in meta]
    if problems:
        raise DatasetError(f"Case {case_id} cannot be stored: {'; '.join(problems)}.")


def _damaged(path: Path, what: str) -> DatasetError:
    return DatasetError(f"{path} {what}. Run unicon_plan_and_preprocess again: damaged cases are made anew.")
