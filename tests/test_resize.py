"""Resizing: scikit-image as reference, and nnU-Net's rules worked out by hand."""

import tracemalloc

import numpy as np
import pytest
from scipy import ndimage
from skimage.transform import resize as reference_resize

from unicon_pipeline import resize as module
from unicon_pipeline.resize import (
    axis_matrix,
    axis_orders,
    needs_separate_axis,
    resize,
    resize_stream,
    resized_shape,
    z_slabs,
)

PAIRS = [
    ((12, 14, 16), (12, 14, 16)),
    ((12, 14, 16), (24, 28, 32)),
    ((20, 22, 24), (10, 11, 12)),
    ((9, 17, 13), (14, 11, 20)),
    ((5, 40, 40), (5, 23, 31)),
    ((30, 8, 21), (7, 29, 21)),
    ((6, 33, 18), (17, 33, 40)),
    ((2, 10, 10), (9, 6, 6)),
    ((1, 12, 9), (4, 9, 12)),
    ((11, 1, 7), (3, 1, 15)),
    ((16, 16, 3), (5, 31, 2)),
    ((25, 19, 8), (26, 20, 9)),
    ((4, 5, 6), (1, 1, 1)),
]


def image(shape, seed=0):
    """Smooth structures, edges and noise, in HU."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(0, 400, shape), 1)
    return (smooth + np.where(rng.random(shape) > 0.9, 1000, -500)).astype(np.float32)


@pytest.fixture(params=[100, 1 << 20], ids=["slabs", "whole"])
def slab_voxels(request, monkeypatch):
    monkeypatch.setattr(module, "_SLAB_VOXELS", request.param)


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("order", [1, 3])
def test_as_scikit_image(source, target, order, slab_voxels):
    array = image(source)
    expected = reference_resize(array.astype(np.float64), target, order, mode="edge", anti_aliasing=False)
    found = resize(array[None], target, (order,) * 3)
    assert found.dtype == np.float32
    assert found.shape == (1, *target)
    assert np.abs(found[0] - expected).max() <= 1e-4 * np.ptp(array)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [4, 11, 8])
def test_a_coarse_axis_is_taken_from_the_nearest_slices(axis, size, slab_voxels):
    """nnU-Net resizes slice by slice, then picks slices: scikit-image in the plane, map_coordinates across it."""
    source, target = [13, 15, 17], [19, 10, 21]
    source[axis], target[axis] = 8, size
    array = image(source, seed=3)
    plane = tuple(n for i, n in enumerate(target) if i != axis)
    slices = [reference_resize(s.astype(float), plane, 3, mode="edge", anti_aliasing=False)
              for s in np.moveaxis(array, axis, 0)]  # fmt: skip
    stack = np.stack(slices, axis)
    places = [np.arange(n, dtype=float) for n in target]
    places[axis] = 8 / size * (np.arange(size) + 0.5) - 0.5
    expected = ndimage.map_coordinates(stack, np.meshgrid(*places, indexing="ij"), order=0, mode="nearest")
    orders = tuple(0 if i == axis else 3 for i in range(3))
    assert np.abs(resize(array[None], tuple(target), orders)[0] - expected).max() <= 1e-4 * np.ptp(array)


def test_channels_are_resized_and_clipped_each_for_itself():
    step = np.zeros((2, 4, 12, 12), np.float32)
    step[0, :, :, 6:] = 1
    step[1, :, :, 6:] = 1000
    clipped, raw = resize(step, (4, 12, 30)), resize(step, (4, 12, 30), clip=False)
    assert raw[0].max() > 1.01
    assert (clipped[0].min(), clipped[0].max()) == (0, 1)
    assert (clipped[1].min(), clipped[1].max()) == (0, 1000)


@pytest.mark.parametrize("shape", [(150, 40, 31), (40, 12, 90), (97, 24, 30)])
@pytest.mark.parametrize("height", [1, 7, 96])
def test_a_stream_of_slabs_of_any_height_gives_what_whole_matrices_give(shape, height):
    array = image((96, 24, 60), seed=4) / 1000
    matrices = [axis_matrix(n, m, 3) for n, m in zip(array.shape, shape)]
    expected = np.einsum("az,by,cx,zyx->abc", *matrices, array.astype(np.float64), optimize=True)
    found = np.full(shape, np.nan, np.float32)
    slabs = [array[start : start + height] for start in range(0, 96, height)]
    resize_stream(iter(slabs), array.shape, found, clip=False)
    assert np.abs(found - expected).max() < 3e-6
    resize_stream(iter(slabs), array.shape, found)
    assert found == pytest.approx(np.clip(expected, array.min(), array.max()), abs=3e-6)


def test_planes_of_which_nothing_is_made_count_for_the_range():
    array = np.zeros((200, 4, 4), np.float32)
    array[49:51] = 1  # an output plane lies at 49.5, where the spline is above 1; the other at 149.5
    array[100], array[199] = 9, -9  # no output plane is near
    for shape in [(2, 4, 4), (2, 5, 3)]:
        expected = reference_resize(array.astype(float), shape, 3, mode="edge", anti_aliasing=False)
        assert expected.max() > 1.01
        assert resize(array[None], shape)[0] == pytest.approx(expected, abs=1e-5)


def test_a_large_volume_needs_little_memory_besides_the_result(monkeypatch):
    monkeypatch.setattr(module, "_SLAB_VOXELS", 1 << 14)
    array = np.zeros((400, 128, 128), np.float32)
    tracemalloc.start()
    try:
        result = resize(array[None], (300, 160, 100)).nbytes
        assert result < tracemalloc.get_traced_memory()[1] < result + array.nbytes / 3
    finally:
        tracemalloc.stop()


def test_slabs_cover_every_plane_once(monkeypatch):
    monkeypatch.setattr(module, "_SLAB_VOXELS", 100)
    assert list(z_slabs((7, 5, 6))) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(z_slabs((2, 50, 60))) == [slice(0, 1), slice(1, 2)]


def test_the_input_is_left_alone_and_the_result_is_a_copy():
    array = image((4, 6, 8))[None]
    array.setflags(write=False)
    same = resize(array, (4, 6, 8))
    same[:] = 0
    assert array.any()
    resize(array, (5, 3, 9))
    strided = np.moveaxis(array, 1, 3)
    assert np.array_equal(resize(strided, (4, 5, 6)), resize(np.ascontiguousarray(strided), (4, 5, 6)))


def test_matrices_are_shared_and_read_only():
    first = axis_matrix(7, 11, 3)
    assert axis_matrix(7, 11, 3) is first
    assert not first.flags.writeable
    assert first.sum(axis=1) == pytest.approx(np.ones(11), abs=1e-5)


@pytest.mark.parametrize(
    ("current", "target", "axis"),
    [
        ((5.0, 1.0, 1.0), (1.0, 1.0, 1.0), 0),
        ((1.0, 1.0, 1.0), (1.0, 6.0, 1.0), 1),
        ((1.0, 1.0, 3.01), (9.0, 1.0, 1.0), 2),  # the present spacing is asked first
        ((3.0, 1.0, 1.0), (1.0, 1.0, 3.0), None),  # threefold is not yet more than threefold
        ((0.3, 1.25, 1.25), (1.0, 1.0, 1.0), None),  # two axes are coarse
        ((2.0, 2.0, 2.0), (1.0, 1.0, 1.0), None),
    ],
)
def test_the_axis_that_is_resampled_on_its_own(current, target, axis):
    assert needs_separate_axis(current, target) == axis
    assert axis_orders(current, target, 3) == tuple(0 if i == axis else 3 for i in range(3))


def test_shapes_are_rounded():
    assert resized_shape((60, 200, 201), (3.27, 0.98, 0.98), (3.27, 1.96, 1.5)) == (60, 100, 131)
    assert resized_shape((10, 10, 10), (1.0, 1.0, 1.0), (100.0, 4.0, 0.5)) == (1, 2, 20)  # 2.5 rounds to even
