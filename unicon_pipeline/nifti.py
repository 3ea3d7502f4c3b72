"""NIfTI-1 files: header checked before anything is allocated, every byte accounted for.

The common readers fill the missing part of a truncated file with zeros, fall back to another affine
where the first one is skewed, and print to stderr from C. Here each of these is an exception.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from isal import igzip, isal_zlib

from unicon_pipeline.errors import DatasetError
from unicon_pipeline.voxels import RUN_VOXELS, Convert, gather

HEADER_BYTES = 348
# A billion voxels are past any scanner; a whole-body CT at 512 x 512 x 2000 has half of that.
MAX_VOXELS = 1 << 30
# Deflate cannot shrink data further than this.
MAX_DEFLATE_RATIO = 1032
MAX_TRAILING_BYTES = 1 << 20

_DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_VECTOR_TYPES = {128: "RGB", 2304: "RGBA", 32: "complex", 1792: "complex", 2048: "complex"}
_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}


@dataclass(frozen=True)
class NiftiHeader:
    """`shape_xyz` in the file's order; `affine_lps` (4, 4): voxel index x, y, z to mm in ITK's patient axes."""

    shape_xyz: tuple[int, int, int]
    dtype: np.dtype
    data_offset: int
    slope: float
    intercept: float
    affine_lps: np.ndarray


def read_nifti(path: Path, convert: Convert | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Reads one 3-D image.

    Args:
        convert: what is kept of each run of voxels, see `voxels.gather`; None: all as it is.

    Returns:
        array_zyx in the stored type (rescaled to float where the header says so), and the 4 x 4 affine from
        voxel index (x, y, z) to mm in ITK's patient axes (left, posterior, superior increase).

    Raises:
        DatasetError: missing, not NIfTI-1, truncated, corrupt, not 3-D, colour or complex, or too large.
    """
    path = Path(path)
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with igzip.IGzipFile(fileobj=raw) if packed else raw as file:
                header = parse_header(_read_exactly(file, HEADER_BYTES), path)
                _check_length(header, path, packed)
                _read_exactly(file, header.data_offset - HEADER_BYTES)
                array = gather(header.shape_xyz[::-1], _runs(file, header), convert)
                # Reading to the end of a compressed stream verifies its checksum.
                file.read(MAX_TRAILING_BYTES)
    except (OSError, EOFError, isal_zlib.error) as problem:
        raise DatasetError(
            f"{path} is truncated or corrupt ({problem}). Copy it again from its origin, or leave the case out."
        ) from problem
    return array, header.affine_lps


def declared_voxels(path: Path) -> int | None:
    """How many voxels the header declares, without reading them; None where it cannot be told so."""
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with igzip.IGzipFile(fileobj=raw) if packed else raw as file:
                return math.prod(parse_header(_read_exactly(file, HEADER_BYTES), path).shape_xyz)
    except (OSError, EOFError, isal_zlib.error, DatasetError):
        return None  # reading it whole will tell why


def parse_header(block: bytes, path: Path) -> NiftiHeader:
    """Decodes and checks the 348 bytes of a NIfTI-1 header; see `read_nifti` for what is refused."""
    order = next((o for o in "<>" if struct.unpack(o + "i", block[:4])[0] == HEADER_BYTES), None)
    if order is None or block[344:347] != b"n+1":
        raise DatasetError(
            f"{path} is not a single-file NIfTI-1 image, in spite of its name. Convert it with SimpleITK or dcm2niix."
        )
    shape = _shape(struct.unpack(order + "8h", block[40:56]), path)
    (code,) = struct.unpack(order + "h", block[70:72])
    if code in _VECTOR_TYPES:
        raise DatasetError(f"{path} holds {_VECTOR_TYPES[code]} pixels; one number per voxel was expected.")
    if code not in _DTYPES:
        raise DatasetError(f"{path} has the NIfTI data type {code}, which is not supported; save it as float32.")
    offset, slope, intercept = struct.unpack(order + "3f", block[108:120])
    if not HEADER_BYTES <= offset <= 1 << 24:
        raise DatasetError(f"{path}: the header says that the voxels start at byte {offset:g}; the file is corrupt.")
    if not (np.isfinite(slope) and np.isfinite(intercept)) or slope == 0:
        slope, intercept = 1.0, 0.0
    return NiftiHeader(
        shape, np.dtype(order + _DTYPES[code]), int(offset), slope, intercept, _affine_lps(block, order, path)
    )


def _shape(dim: tuple[int, ...], path: Path) -> tuple[int, int, int]:
    if not 1 <= dim[0] <= 7 or any(n < 1 for n in dim[1 : dim[0] + 1]):
        raise DatasetError(f"{path}: the header's dimensions {dim} are not valid; the file is corrupt.")
    sizes = list(dim[1 : dim[0] + 1])
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    return check_size(sizes, path)


def check_size(sizes_xyz: list[int] | tuple[int, ...], path: Path) -> tuple[int, int, int]:
    """The size again, if it is that of one 3-D volume below MAX_VOXELS; DatasetError otherwise."""
    listed = " x ".join(str(n) for n in sizes_xyz)
    if len(sizes_xyz) > 3:
        raise DatasetError(
            f"{path} has {len(sizes_xyz)} dimensions ({listed}): a dynamic or multi-channel image. One 3-D volume was "
            "expected; choose one frame and save it as a file of its own."
        )
    if len(sizes_xyz) < 3:
        raise DatasetError(f"{path} has {len(sizes_xyz)} dimensions ({listed}); one 3-D volume was expected.")
    voxels = int(np.prod([int(n) for n in sizes_xyz], dtype=object))
    if voxels > MAX_VOXELS:
        raise DatasetError(f"{path} declares {listed} voxels, more than the limit of {MAX_VOXELS}; crop it.")
    x, y, z = (int(n) for n in sizes_xyz)
    return x, y, z


def inflated_bytes(path: Path, start: int, wanted: int) -> int:
    """How many bytes, counted up to `wanted`, the zlib or gzip stream at byte `start` holds; 0 where it is damaged."""
    stream, count = isal_zlib.decompressobj(wbits=47), 0
    with open(path, "rb") as file:
        file.seek(start)
        try:
            while count < wanted and not stream.eof:
                block = stream.unconsumed_tail or file.read(1 << 16)
                if not block:
                    break
                count += len(stream.decompress(block, 1 << 24))
        except isal_zlib.error:
            return 0
    return count


def _affine_lps(block: bytes, order: str, path: Path) -> np.ndarray:
    pixdim = struct.unpack(order + "8f", block[76:108])
    qform_code, sform_code = struct.unpack(order + "2h", block[252:256])
    quaternion = struct.unpack(order + "6f", block[256:280])
    affine = np.eye(4)
    if sform_code == 1 or (sform_code > 0 and qform_code <= 0):
        affine[:3] = np.array(struct.unpack(order + "12f", block[280:328])).reshape(3, 4)
        to_lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    elif qform_code > 0:
        with np.errstate(invalid="ignore"):
            affine[:3, :3] = _rotation(quaternion[:3]) * np.abs(pixdim[1:4])
        affine[:3, 2] *= -1.0 if pixdim[0] < 0 else 1.0
        affine[:3, 3] = quaternion[3:]
        to_lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    else:
        # No orientation stored: index axes are taken as patient axes, as ITK does.
        affine[:3, :3] = np.diag(np.abs(pixdim[1:4]))
        to_lps = np.eye(4)
    affine[:3] *= _MM_PER_UNIT.get(block[123] & 7, 1.0)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise DatasetError(f"{path}: the header's affine has no volume (zero spacing or NaN); restore it.")
    return to_lps @ affine


def _rotation(bcd: tuple[float, ...]) -> np.ndarray:
    b, c, d = bcd
    square = b * b + c * c + d * d
    if square > 1.0:
        b, c, d = np.array(bcd) / np.sqrt(square)
    a = np.sqrt(max(0.0, 1.0 - square))
    return np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
        ]
    )


def _check_length(header: NiftiHeader, path: Path, packed: bool) -> None:
    """Before anything is allocated: could a file of this size hold what its header promises?"""
    expected, there = math.prod(header.shape_xyz) * header.dtype.itemsize, path.stat().st_size
    if expected > there * (MAX_DEFLATE_RATIO if packed else 1):
        raise EOFError(f"the header promises {expected} bytes of voxels, the file has {there} bytes")


def _runs(file: BinaryIO, header: NiftiHeader) -> Iterator[np.ndarray]:
    total = math.prod(header.shape_xyz)
    buffer = np.empty(min(total, RUN_VOXELS), header.dtype)
    for start in range(0, total, RUN_VOXELS):
        run = buffer[: total - start]
        missing = run.nbytes - _fill(file, memoryview(run.view(np.uint8)))
        if missing:
            there = start * run.itemsize + run.nbytes - missing
            raise EOFError(f"{total * run.itemsize} bytes of voxels were expected, {there} are there")
        yield _rescaled(run, header)


def _read_exactly(file: BinaryIO, count: int) -> bytearray:
    data = bytearray(count)
    filled = _fill(file, memoryview(data))
    if filled < count:
        raise EOFError(f"{count} bytes were expected, {filled} are there")
    return data


def _fill(file: BinaryIO, view: memoryview) -> int:
    """Reads until the view is full or the file ends; how many bytes there were."""
    filled = 0
    while filled < len(view) and (got := file.readinto(view[filled:])):
        filled += got
    return filled


def _rescaled(run: np.ndarray, header: NiftiHeader) -> np.ndarray:
    native = run.astype(run.dtype.newbyteorder("="), copy=False)
    if header.slope == 1.0 and header.intercept == 0.0:
        return native
    exact_in_float32 = native.dtype.itemsize <= 2 or native.dtype == np.float32
    scaled = native.astype(np.float32 if exact_in_float32 else np.float64)
    # Values beyond the type become infinite, and are counted by the reader of the image.
    with np.errstate(over="ignore", invalid="ignore"):
        scaled *= header.slope
        scaled += header.intercept
    return scaled
