"""Runs of voxels become one array; what is wrong in any of them is counted over all."""

import numpy as np
import pytest

from unicon_pipeline import voxels
from unicon_pipeline.errors import DatasetError

SHAPE = (3, 4, 5)


def runs_of(array, size=7):
    flat = array.reshape(-1)
    return (flat[start : start + size] for start in range(0, flat.size, size))


def test_runs_are_put_together_in_order():
    array = np.arange(60, dtype=np.int16).reshape(SHAPE)
    np.testing.assert_array_equal(voxels.gather(SHAPE, runs_of(array)), array)
    doubled = voxels.gather(SHAPE, runs_of(array), lambda run: 2 * run.astype(np.float32))
    assert doubled.dtype == np.float32
    np.testing.assert_array_equal(doubled, 2 * array)


def test_a_run_may_reuse_the_memory_of_the_one_before():
    def runs():
        buffer = np.empty(20, np.int32)
        for start in (0, 20, 40):
            buffer[:] = np.arange(start, start + 20)
            yield buffer

    np.testing.assert_array_equal(voxels.gather(SHAPE, runs()).ravel(), np.arange(60))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "int32", "uint64", "float32", "float64"])
def test_small_integers_of_an_image_stay_as_they_are(dtype):
    array = np.arange(60).reshape(SHAPE).astype(dtype)
    convert = voxels.ImageVoxels()
    result = voxels.gather(SHAPE, runs_of(array), convert)
    assert result.dtype == (dtype if np.dtype(dtype).itemsize <= 2 else np.float32)
    np.testing.assert_array_equal(result, array)
    convert.check("image.nii")


def test_what_is_not_finite_is_counted_over_all_runs():
    array = np.zeros(SHAPE)
    array[0, 0, 0], array[1, 2, :2], array[2, 3, 4] = np.nan, np.inf, 1e300  # the last one is too large for float32
    convert = voxels.ImageVoxels()
    voxels.gather(SHAPE, runs_of(array), convert)
    with pytest.raises(DatasetError, match="image.nii has 4 voxels of 60"):
        convert.check("image.nii")


def refusal(array):
    convert = voxels.LabelVoxels()
    voxels.gather(array.shape, runs_of(array), convert)
    with pytest.raises(DatasetError) as caught:
        convert.check("labels.nii")
    return str(caught.value)


def test_wrong_labels_are_counted_over_all_runs_and_each_value_is_named_once():
    array = np.zeros(SHAPE, np.float32)
    array[0, 0, 0], array[1, 2, :3], array[2, 3, 4] = 2.5, 0.5, np.nan
    assert "labels.nii has 5 voxels that are fractional or not finite: 0.5, 2.5, nan." in refusal(array)
    array = np.zeros(SHAPE, np.int64)
    array[0, 0, 0], array[2, 3, 3:] = 1 << 40, -3
    assert "labels.nii has 3 voxels that are outside 0..32767: -3, 1.09951e+12." in refusal(array)


def test_few_values_are_listed_and_many_are_an_image():
    assert ": -3, -2, -1. Labels" in refusal(-np.arange(60).reshape(SHAPE) % 3 - 3)
    rng = np.random.default_rng(0)
    assert "looks like an image" in refusal(rng.random((10, 11, 12)))
    assert "looks like a CT image" in refusal(rng.integers(-1000, 1000, (10, 11, 12)))


def test_the_largest_label_is_known():
    convert = voxels.LabelVoxels()
    array = np.zeros(SHAPE, np.uint16)
    array[1, 1, 1] = 300
    assert voxels.gather(SHAPE, runs_of(array), convert).dtype == np.int16
    convert.check("labels.nii")
    assert convert.largest == 300
