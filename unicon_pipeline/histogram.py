"""Values of many voxels as a sparse histogram: small to keep, exact to add up.

A value's bin is its float32 rounded to 12 significant bits: whole numbers up to 4096 (most HU) are exact, others are
within 0.025 %. Number, sum, sum of squares, lowest and highest are of the values themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 1 << 20
_SIGN, _DROPPED_BITS = np.uint32(BINS >> 1), 12
_AT_A_TIME = 1 << 16  # so that temporaries stay in the cache


@dataclass(frozen=True)
class Moments:
    """Of `n` values; sums in float64."""

    n: int
    total: float
    squares: float
    low: float
    high: float


@dataclass(frozen=True)
class Histogram:
    """`bins` (K,) uint32: those that are not empty, ascending as their values do; `counts` (K,) int64."""

    bins: np.ndarray
    counts: np.ndarray
    moments: Moments


class Tally:
    """Counts values, some at a time."""

    def __init__(self) -> None:
        self._counts = np.zeros(BINS, np.int64)
        self._moments: list[Moments] = []

    def add(self, values: np.ndarray) -> None:
        """Of any real type and shape, all finite."""
        flat = values.reshape(-1)
        for start in range(0, flat.size, _AT_A_TIME):
            part = flat[start : start + _AT_A_TIME].astype(np.float32)
            np.add.at(self._counts, _bins_of(part), 1)
            total, squares = part.sum(dtype=np.float64), np.square(part, dtype=np.float64).sum()
            moments = Moments(part.size, float(total), float(squares), float(part.min()), float(part.max()))
            self._moments.append(moments)

    def add_histogram(self, histogram: Histogram) -> None:
        """As if its values were added."""
        self._counts[histogram.bins] += histogram.counts
        self._moments.append(histogram.moments)

    @property
    def histogram(self) -> Histogram:
        """Of all values so far."""
        bins = np.flatnonzero(self._counts)
        return Histogram(bins.astype(np.uint32), self._counts[bins], together(self._moments))


def together(parts: Sequence[Moments]) -> Moments:
    """Of all their values, whatever the order of the parts. Without any value, all figures are 0."""
    parts = [part for part in parts if part.n]
    if not parts:
        return Moments(0, 0.0, 0.0, 0.0, 0.0)
    return Moments(
        sum(part.n for part in parts),
        math.fsum(part.total for part in parts),
        math.fsum(part.squares for part in parts),
        min(part.low for part in parts),
        max(part.high for part in parts),
    )


def percentiles(histogram: Histogram, which: Sequence[float]) -> tuple[float, ...]:
    """As `numpy.percentile` of the values, each taken as the middle of its bin; 0 without any value."""
    if histogram.moments.n == 0:
        return (0.0,) * len(which)
    values = np.clip(_values_of(histogram.bins), histogram.moments.low, histogram.moments.high)
    ranks = np.cumsum(histogram.counts)  # a bin holds the sorted values before this position
    found = []
    for percentile in which:
        position = percentile / 100 * (histogram.moments.n - 1)
        below = int(position)
        around = np.searchsorted(ranks, (below, min(below + 1, histogram.moments.n - 1)), side="right")
        low, high = (float(value) for value in values[around])
        found.append(low + (high - low) * (position - below))
    return tuple(found)


def _bins_of(values: np.ndarray) -> np.ndarray:
    """float32 -> uint32 below BINS, ascending as the values do."""
    bins = (values + np.float32(0)).view(np.uint32)  # -0 becomes 0
    bins += np.uint32(1 << (_DROPPED_BITS - 1))  # to the nearest: the bits of a float32 ascend with its size
    bins >>= np.uint32(_DROPPED_BITS)
    flips = bins >> np.uint32(19)  # 1 where negative
    flips *= _SIGN - np.uint32(1)
    flips += _SIGN
    bins ^= flips  # negative ones descend, and come first
    return bins


def _values_of(bins: np.ndarray) -> np.ndarray:
    """uint32 -> float64, the middle of each bin."""
    bits = np.where(bins & _SIGN, bins ^ _SIGN, bins ^ np.uint32(BINS - 1))
    return (bits << np.uint32(_DROPPED_BITS)).view(np.float32).astype(np.float64)
