"""Volumes in patient space: reading, writing, orienting, resampling, comparing grids.

Arrays are z, y, x; spacings are z, y, x in mm. Origin and direction are ITK's: x, y, z in mm, patient
axes in which left, posterior and superior increase; the direction's columns are the index axes x, y, z.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from unicon_pipeline.contract import ZYX, SpacingZYX
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.nifti import MAX_DEFLATE_RATIO, check_size, inflated_bytes, read_nifti
from unicon_pipeline.records import atomic_path
from unicon_pipeline.voxels import RUN_VOXELS, Convert, ImageVoxels, LabelVoxels, gather

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")

# Headers round to about 1e-4 mm; half of the smallest voxel is never as small as this.
GRID_TOLERANCE_MM = 0.01

# Axes further from a right angle than this are a tilted gantry or a broken header, not rounding.
MAX_SKEW_DEGREES = 0.5
_NOTED_SKEW_DEGREES = 0.01

_LETTERS = ("RL", "AP", "IS")
_HEADER_TEXT_BYTES = 1 << 16
_SLAB_VOXELS = 1 << 22

# ITK reports every problem twice, as an exception and on stderr; the exception is enough.
sitk.ProcessObject.SetGlobalWarningDisplay(False)

_log = logging.getLogger(__name__)

Direction = tuple[float, float, float, float, float, float, float, float, float]


@dataclass(frozen=True)
class Grid:
    """Where voxels lie. `origin_xyz_mm` is the centre of voxel 0; `direction` is ITK's, row by row."""

    shape_zyx: ZYX
    spacing_zyx_mm: SpacingZYX
    origin_xyz_mm: tuple[float, float, float]
    direction: Direction

    @property
    def affine(self) -> np.ndarray:
        """(4, 4): voxel index x, y, z to mm."""
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(self.direction, (3, 3)) * np.array(self.spacing_zyx_mm[::-1])
        affine[:3, 3] = self.origin_xyz_mm
        return affine


@dataclass(frozen=True)
class Volume:
    """`array_zyx`: 8- or 16-bit integers as they were stored, else float32; labels uint8 or int16. It may be a view."""

    array_zyx: np.ndarray
    grid: Grid


def read_image(path: Path) -> Volume:
    """Reads a 3-D image in the file's own unit (HU, SUV, ...): small integers as they are, all else as float32.

    Raises:
        DatasetError: missing, truncated, corrupt, not 3-D, several numbers per voxel, too large, NaN or
            infinite voxels, or axes that are not at right angles.
    """
    voxels = ImageVoxels()
    volume = _read(path, voxels)
    voxels.check(path)
    return volume


def read_labels(path: Path) -> Volume:
    """Reads a label map as uint8 where its values fit, else as int16.

    Raises:
        DatasetError: as `read_image`; also values that are fractional, negative or above 32767.
    """
    voxels = LabelVoxels()
    volume = _read(path, voxels)
    voxels.check(path)
    dtype = np.uint8 if voxels.largest <= np.iinfo(np.uint8).max else np.int16
    return Volume(volume.array_zyx.astype(dtype, copy=False), volume.grid)


def write_labels(path: Path, array_zyx: np.ndarray, grid: Grid) -> None:
    """Writes a label map in the smallest unsigned type that holds it, compressed; whole or not at all."""
    if array_zyx.dtype.kind not in "iub" or (array_zyx.size and array_zyx.min() < 0):
        raise DatasetError(f"{path}: labels must be integers from 0 upwards, found {array_zyx.dtype}.")
    top = int(array_zyx.max()) if array_zyx.size else 0
    dtype = np.uint8 if top < 1 << 8 else np.uint16 if top < 1 << 16 else np.uint32
    _write(path, array_zyx.astype(dtype, copy=False), grid)


def write_image(path: Path, array_zyx: np.ndarray, grid: Grid) -> None:
    """Writes an image as float32, compressed; whole or not at all."""
    _write(path, array_zyx.astype(np.float32, copy=False), grid)


def orientation_code(grid: Grid) -> str:
    """The patient directions in which the index axes x, y, z increase, such as "LPS"; nearest for oblique axes."""
    return _code_of(np.reshape(grid.direction, (3, 3)))


def orient(volume: Volume, code: str) -> Volume:
    """Permutes and flips axes, as a view of the same voxels; no value changes, so it can be undone.

    Args:
        code: what `orientation_code` gives then, such as "LPS"; or "xyz", "yzx"...: the stored index axes, permuted.

    Raises:
        ValueError: `code` does not name each axis once.
    """
    current, wanted = orientation_code(volume.grid), code.upper()
    if sorted(wanted) == ["X", "Y", "Z"]:
        wanted = "".join(current["XYZ".index(axis)] for axis in wanted)
    permutation, flips = _steps(current, wanted)
    if current == wanted:
        return volume
    spacing_xyz = volume.grid.spacing_zyx_mm[::-1]
    size_xyz = volume.grid.shape_zyx[::-1]
    direction = np.reshape(volume.grid.direction, (3, 3))
    origin = np.array(volume.grid.origin_xyz_mm)
    columns = []
    for axis, flip in zip(permutation, flips):
        column = direction[:, axis]
        if flip:
            origin = origin + column * spacing_xyz[axis] * (size_xyz[axis] - 1)
            column = -column
        columns.append(column)
    # Array axes are z, y, x: the last array axis is index axis x.
    array = volume.array_zyx.transpose([2 - axis for axis in permutation[::-1]])
    array = array[tuple(slice(None, None, -1 if flip else 1) for flip in flips[::-1])]
    grid = Grid(
        shape_zyx=tuple(int(n) for n in array.shape),
        spacing_zyx_mm=tuple(float(spacing_xyz[axis]) for axis in permutation[::-1]),
        origin_xyz_mm=tuple(float(value) for value in origin),
        direction=tuple(float(value) for value in np.stack(columns, axis=1).ravel()),
    )
    return Volume(array, grid)


def onto_grid(volume: Volume, grid: Grid, fill: float, nearest: bool = False) -> Volume:
    """Resamples `volume` to the voxels of `grid` through both affines: linear as float32, or nearest for labels.

    This aligns grids, not patients: it is no registration. Points outside of the volume get `fill`.

    Raises:
        DatasetError: the two fields of view do not overlap at all.
    """
    if grids_differ_mm(volume.grid, grid) <= 1e-6:
        return Volume(volume.array_zyx, grid)
    if not fields_of_view_overlap(volume.grid, grid):
        raise DatasetError(
            f"The fields of view do not overlap: one spans {_extent(volume.grid)}, the other {_extent(grid)} "
            "(x, y, z in mm). Are both from the same patient and examination, with their positions kept?"
        )
    source = _to_itk(volume.array_zyx, volume.grid)
    if not nearest:
        source = sitk.Cast(source, sitk.sitkFloat32)  # ITK would round to the integers of its input
    resampler = sitk.ResampleImageFilter()
    resampler.SetOutputSpacing([float(value) for value in grid.spacing_zyx_mm[::-1]])
    resampler.SetOutputDirection([float(value) for value in grid.direction])
    resampler.SetInterpolator(sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear)
    resampler.SetDefaultPixelValue(float(fill))
    array = np.empty(grid.shape_zyx, volume.array_zyx.dtype if nearest else np.float32)
    depth, height, width = (int(n) for n in grid.shape_zyx)
    slab = max(1, _SLAB_VOXELS // (height * width))  # a result of ITK is copied once: a slab of it at a time
    for start in range(0, depth, slab):
        resampler.SetSize([width, height, min(slab, depth - start)])
        resampler.SetOutputOrigin([float(value) for value in (grid.affine @ (0, 0, start, 1))[:3]])
        moved = resampler.Execute(source)
        array[start : start + slab] = sitk.GetArrayViewFromImage(moved)
    return Volume(array, grid)


def grids_differ_mm(a: Grid, b: Grid) -> float:
    """Largest distance between corresponding corners of the two voxel boxes; infinite when the shapes differ."""
    if tuple(a.shape_zyx) != tuple(b.shape_zyx):
        return float("inf")
    return float(np.linalg.norm(_corners(a) - _corners(b), axis=1).max())


def fields_of_view_overlap(a: Grid, b: Grid) -> bool:
    """Whether the two boxes of voxels share any space (separating planes along the faces of each)."""
    for box, other in ((a, b), (b, a)):
        index = (np.linalg.inv(box.affine) @ np.c_[_corners(other), np.ones(8)].T)[:3]
        if (index.max(axis=1) <= -0.5).any() or (index.min(axis=1) >= np.array(box.shape_zyx[::-1]) - 0.5).any():
            return False
    return True


def image_ending(path: Path | str) -> str | None:
    """The supported image ending of a file name, such as ".nii.gz"; None where there is none."""
    name = Path(path).name
    return next((ending for ending in IMAGE_ENDINGS if name.endswith(ending) and name != ending), None)


def _corners(grid: Grid) -> np.ndarray:
    ends = [(-0.5, n - 0.5) for n in grid.shape_zyx[::-1]]
    index = np.array([(*corner, 1.0) for corner in itertools.product(*ends)])
    return (index @ grid.affine.T)[:, :3]


def _extent(grid: Grid) -> str:
    corners = _corners(grid)
    return ", ".join(f"{low:.0f}..{high:.0f}" for low, high in zip(corners.min(axis=0), corners.max(axis=0)))


def _code_of(direction: np.ndarray) -> str:
    """Each index axis gets the patient axis that it is nearest to, so that the sum of cosines is largest.

    The ranking is made of quantities in patient order that no permutation or flip of the index axes
    changes, so that oblique grids, at 45 degrees too, come back from `orient` as they went in.
    """

    def closeness(axes: tuple[int, ...]) -> tuple[float, ...]:
        total = sum(abs(direction[world, axes[world]]) for world in range(3))
        products = (direction[world, axes[world]] * direction[(world + 1) % 3, axes[world]] for world in range(3))
        return (round(total, 6), *(round(product, 6) for product in products))

    axis_of_world = max(itertools.permutations(range(3)), key=closeness)
    letters = [""] * 3
    for world, axis in enumerate(axis_of_world):
        letters[axis] = _LETTERS[world][int(direction[world, axis] > 0)]
    return "".join(letters)


def _steps(current: str, wanted: str) -> tuple[list[int], list[bool]]:
    """For each wanted index axis: the current axis it comes from, and whether that one is flipped."""
    permutation, flips = [], []
    for letter in wanted:
        pair = next((pair for pair in _LETTERS if letter in pair), None)
        if pair is None:
            break
        axis = next(i for i, candidate in enumerate(current) if candidate in pair)
        permutation.append(axis)
        flips.append(current[axis] != letter)
    if len(wanted) != 3 or sorted(permutation) != [0, 1, 2]:
        raise ValueError(f'"{wanted}" is no orientation: one letter of R/L, one of A/P, one of I/S is expected.')
    return permutation, flips


def _read(path: Path, convert: Convert) -> Volume:
    path = Path(path)
    if path.is_dir():
        raise DatasetError(f"{path} is a folder. For a DICOM series, make one NIfTI file of it first (dcm2niix).")
    if not path.is_file():
        raise DatasetError(f"{path} does not exist.")
    ending = image_ending(path)
    if ending is None:
        raise DatasetError(f"{path}: expected an image ending in {', '.join(IMAGE_ENDINGS)}; convert it.")
    array, affine = read_nifti(path, convert) if ending.startswith(".nii") else _read_with_itk(path, ending, convert)
    return Volume(array, grid_of(array.shape, affine, path))


def _read_with_itk(path: Path, ending: str, convert: Convert) -> tuple[np.ndarray, np.ndarray]:
    header = _nrrd_header(path) if ending == ".nrrd" else _mha_header(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if ending == ".nrrd" else "MetaImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        size = check_size(reader.GetSize(), path)
        components = reader.GetNumberOfComponents()
        if components != 1 or sitk.GetPixelIDValueAsString(reader.GetPixelID()).startswith("complex"):
            raise DatasetError(f"{path} holds {components} numbers per voxel; one was expected.")
        width = sitk.Image([1, 1, 1], reader.GetPixelID()).GetSizeOfPixelComponent()
        _check_length(path, ending, header, math.prod(size) * width)
        image = reader.Execute()
    except RuntimeError as problem:
        reason = str(problem).strip().splitlines()[-1].strip()
        raise DatasetError(f"{path} cannot be read; it may be truncated or corrupt ({reason}).") from problem
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    view = sitk.GetArrayViewFromImage(image)
    flat = view.reshape(-1)
    runs = (flat[start : start + RUN_VOXELS] for start in range(0, flat.size, RUN_VOXELS))
    return gather(view.shape, runs, convert), affine


def _nrrd_header(path: Path) -> bytes:
    """The bytes before the voxels; refuses headers that point to other files (they could name any)."""
    block = _first_bytes(path)
    end = re.search(rb"\r?\n\r?\n", block)
    header = block[: end.end()] if end else b""
    if not header.startswith(b"NRRD") or re.search(rb"data ?file:", header.lower()):
        raise DatasetError(f"{path} is truncated, or not one whole NRRD file (header and voxels together).")
    return header


def _mha_header(path: Path) -> bytes:
    """As `_nrrd_header`; also refuses dimensions at which ITK would print."""
    block = _first_bytes(path)
    # The first mention counts, in a comment too: ITK and this check must not find different lines.
    before, key, after = block.partition(b"ElementDataFile")
    local = re.match(rb"[ \t]*[=:][ \t]*LOCAL[ \t\r]*\n", after)
    number = re.search(rb"(?m)^NDims[ \t]*[=:][ \t]*(\d{1,2})[ \t\r]*$", before)
    sizes = re.search(rb"(?m)^DimSize[ \t]*[=:]((?:[ \t]*\b\d{1,9}\b)+)[ \t\r]*$", before)
    if not (local and number and sizes) or before[-1:] != b"\n" or len(sizes[1].split()) != int(number[1]):
        raise DatasetError(f"{path} is truncated, or not one whole MetaImage file (header and voxels together).")
    check_size([int(size) for size in sizes[1].split()], path)
    return before + key + local[0]


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_HEADER_TEXT_BYTES)


def _check_length(path: Path, ending: str, header: bytes, expected: int) -> None:
    """Refuses short files before anything is allocated; ITK fills what is missing with zeros, or prints."""
    there = path.stat().st_size - len(header)
    if ending == ".mha" and re.search(rb"(?m)^CompressedData[ \t]*[=:][ \t]*[Tt1]", header):
        there = inflated_bytes(path, len(header), expected)
    elif ending == ".nrrd" and not re.search(rb"(?mi)^encoding:[ \t]*raw", header):
        there *= MAX_DEFLATE_RATIO
    if there < expected:
        raise DatasetError(f"{path} is truncated or corrupt: its header promises {expected} bytes of voxels.")


def grid_of(shape_zyx: tuple[int, ...], affine: np.ndarray, path: Path | str) -> Grid:
    """The grid of an affine (4, 4: voxel index x, y, z to mm in ITK's patient axes), its axes made right-angled.

    Raises:
        DatasetError: the affine has no volume, or its axes are too far off right angles; names `path`.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or (spacing <= 0).any():
        raise DatasetError(f"{path}: spacing {spacing.tolist()} mm (x, y, z) is not valid; correct the header.")
    direction = affine[:3, :3] / spacing
    cosines = np.abs(direction.T @ direction - np.eye(3))
    skew = float(np.degrees(np.arcsin(min(1.0, cosines.max()))))
    if skew > MAX_SKEW_DEGREES:
        raise DatasetError(
            f"{path}: the image axes are {skew:.2f} degrees away from right angles (at most {MAX_SKEW_DEGREES} is "
            "repaired). This is a tilted gantry or a damaged header: convert the DICOM series again with tilt "
            "correction (dcm2niix does it), or resample the image to a rectangular grid."
        )
    if skew > _NOTED_SKEW_DEGREES:
        _log.warning("%s: axes %.3f degrees off right angles; the nearest right-angled ones are used.", path, skew)
    if cosines.max() > 1e-6:
        left, _, right = np.linalg.svd(direction)
        direction = left @ right
    return Grid(
        shape_zyx=tuple(int(n) for n in shape_zyx),
        spacing_zyx_mm=tuple(float(value) for value in spacing[::-1]),
        origin_xyz_mm=tuple(float(value) for value in affine[:3, 3]),
        direction=tuple(float(value) for value in direction.ravel() + 0.0),
    )


def _to_itk(array_zyx: np.ndarray, grid: Grid) -> sitk.Image:
    image = sitk.GetImageFromArray(array_zyx)
    image.SetSpacing([float(value) for value in grid.spacing_zyx_mm[::-1]])
    image.SetOrigin([float(value) for value in grid.origin_xyz_mm])
    image.SetDirection([float(value) for value in grid.direction])
    return image


def _write(path: Path, array_zyx: np.ndarray, grid: Grid) -> None:
    path = Path(path)
    if tuple(array_zyx.shape) != tuple(grid.shape_zyx):
        raise DatasetError(f"{path}: an array of shape {array_zyx.shape} does not fit a grid of {grid.shape_zyx}.")
    if image_ending(path) is None:
        raise DatasetError(f"{path}: the name must end in one of {', '.join(IMAGE_ENDINGS)}.")
    with atomic_path(path) as aside:
        try:
            sitk.WriteImage(_to_itk(array_zyx, grid), str(aside), useCompression=True)
        except RuntimeError as problem:
            raise DatasetError(f"{path} could not be written: is the disk full? ({problem})") from problem
