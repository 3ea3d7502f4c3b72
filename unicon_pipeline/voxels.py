"""Voxel values on their way from a file to an array: checked and converted in short runs.

A run fits into the processor's cache, so memory is needed for the result alone, and each step finds its
input at hand. What is wrong is counted on the way and told when all of the file was read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from unicon_pipeline.errors import DatasetError

RUN_VOXELS = 1 << 17  # at most 1 MB
MAX_LABEL = np.iinfo(np.int16).max

# A label map does not have as many wrong values as this; an image has.
_VALUES_TOLD_APART = 100

Convert = Callable[[np.ndarray], np.ndarray]


def gather(shape_zyx: tuple[int, ...], runs: Iterable[np.ndarray], convert: Convert | None = None) -> np.ndarray:
    """One array from runs of its voxels in order.

    Args:
        runs: 1-D; each may be overwritten when the next is asked for.
        convert: called with each run; gives as many voxels, always of one type, which is the type of the result.
    """
    array, filled = None, 0
    for run in runs if convert is None else map(convert, runs):
        if array is None:
            array = np.empty(math.prod(shape_zyx), run.dtype)
        array[filled : filled + run.size] = run
        filled += run.size
    return array.reshape(shape_zyx)


class ImageVoxels:
    """Converts the voxels of an image: integers of 8 or 16 bits as they are, all others to float32."""

    def __init__(self):
        self._count = self._bad = 0

    def __call__(self, run: np.ndarray) -> np.ndarray:
        self._count += run.size
        if run.dtype.kind in "iu" and run.itemsize <= 2:
            return run
        with np.errstate(over="ignore"):
            run = run.astype(np.float32, copy=False)
        self._bad += run.size - np.count_nonzero(np.isfinite(run))
        return run

    def check(self, path: Path) -> None:
        """Raises the DatasetError for what was found, if anything was."""
        if self._bad:
            raise DatasetError(
                f"{path} has {self._bad} voxels of {self._count} that are NaN or infinite. Replace them at the source "
                "(air is -1024 HU in a CT, 0 in a PET) or leave the case out."
            )


class LabelVoxels:
    """Converts the voxels of a label map: uint8 as it is, all others to int16; `largest` counts those."""

    def __init__(self):
        self.largest = 0
        self._fractional = _Offenders("fractional or not finite")
        self._outside = _Offenders(f"outside 0..{MAX_LABEL}")

    def __call__(self, run: np.ndarray) -> np.ndarray:
        if run.dtype == np.uint8:
            return run
        if run.dtype.kind == "f":
            whole = np.isfinite(run) & (run == np.rint(run))
            run = self._fractional.without(run, ~whole)
        run = self._outside.without(run, (run < 0) | (run > MAX_LABEL)).astype(np.int16)
        self.largest = max(self.largest, int(run.max(initial=0)))
        return run

    def check(self, path: Path) -> None:
        """Raises the DatasetError for what was found, if anything was."""
        self._fractional.check(path)
        self._outside.check(path)


class _Offenders:
    """How many voxels are wrong, and their values as far as a message needs them."""

    def __init__(self, what: str):
        self._what, self._count, self._values = what, 0, np.empty(0)

    def without(self, run: np.ndarray, wrong: np.ndarray) -> np.ndarray:
        """The run with zeros in the place of what is wrong, which is noted."""
        found = run[wrong]
        if not found.size:
            return run
        self._count += found.size
        if self._values.size <= _VALUES_TOLD_APART:
            self._values = np.unique(np.concatenate([self._values, found]))
        return np.where(wrong, 0, run)

    def check(self, path: Path) -> None:
        if not self._count:
            return
        many = self._values.size > 8
        listed = ", ".join(f"{value:g}" for value in self._values[:8]) + (", ..." if many else "")
        advice = "Correct the file, or write it again with nearest-neighbour interpolation."
        if many and self._values[0] < -200:
            advice = "This looks like a CT image, not labels: is a file in the wrong folder?"
        elif self._values.size > _VALUES_TOLD_APART:
            advice = "This looks like an image, not labels: is a file in the wrong folder?"
        raise DatasetError(
            f"{path} has {self._count} voxels that are {self._what}: {listed}. "
            f"Labels are integers from 0 upwards. {advice}"
        )
