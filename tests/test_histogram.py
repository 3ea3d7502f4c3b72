"""Histograms of voxel values: numpy's percentiles, exact where promised, the same in whatever parts they are made."""

import numpy as np
import pytest

from unicon_pipeline.histogram import Histogram, Moments, Tally, percentiles, together

WHICH = (0, 0.5, 1, 50, 99.5, 100)
RNG = np.random.default_rng(0)


def histogram(*parts) -> Histogram:
    tally = Tally()
    for part in parts:
        tally.add(np.asarray(part))
    return tally.histogram


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
def test_whole_numbers_are_exact(dtype):
    values = RNG.integers(0 if dtype == np.uint8 else -1024, 256 if dtype == np.uint8 else 4097, 9999).astype(dtype)
    assert percentiles(histogram(values), WHICH) == pytest.approx(np.percentile(values, WHICH), abs=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e5])
def test_other_values_are_near(scale):
    values = (RNG.normal(0, scale, 10_001) * RNG.gamma(1, 1, 10_001)).astype(np.float32)
    expected = np.percentile(values.astype(float), WHICH)
    np.testing.assert_allclose(percentiles(histogram(values), WHICH), expected, rtol=2.5e-4, atol=1e-12)


def test_moments_are_of_the_values_themselves():
    values = RNG.normal(40, 300, (30, 40, 50)).astype(np.float32)
    found = histogram(values).moments
    exact = values.astype(np.float64)
    assert (found.n, found.low, found.high) == (60_000, values.min(), values.max())
    assert (found.total, found.squares) == pytest.approx((exact.sum(), (exact**2).sum()), rel=1e-13)


def test_parts_add_up_in_any_order():
    parts = [RNG.normal(size=n).astype(np.float32) for n in (5, 1000, 0, 77)]
    whole = histogram(np.concatenate(parts))
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        tally = Tally()
        for number in order:
            tally.add_histogram(histogram(parts[number]))
        found = tally.histogram
        assert np.array_equal(found.bins, whole.bins) and np.array_equal(found.counts, whole.counts)
        assert found.moments == together([histogram(part).moments for part in parts])
    assert found.moments.total == pytest.approx(whole.moments.total)


def test_the_ends_of_the_scale():
    values = np.array([3.4e38, -3.4e38, 1e-45, -0.0, 0.0, -1e-45], np.float32)
    found = histogram(values)
    assert (np.diff(found.bins.astype(int)) > 0).all() and found.counts.sum() == 6
    assert percentiles(found, (0, 50, 100)) == (float(np.float32(-3.4e38)), 0.0, float(np.float32(3.4e38)))


def test_nothing():
    empty = histogram([])
    assert percentiles(empty, (0.5, 50)) == (0.0, 0.0)
    assert empty.moments == Moments(0, 0.0, 0.0, 0.0, 0.0)
