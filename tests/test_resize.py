"""Resizing: scikit-image for images, batchgenerators for labels, and nnU-Net's rules worked out by hand."""

import numpy as np
import pytest
from batchgenerators.augmentations.utils import resize_segmentation
from scipy import ndimage
from skimage.transform import resize as reference_resize

from unicon_pipeline.resize import axis_matrix, axis_orders, needs_separate_axis, resize, resize_labels, resized_shape

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


def blobs(shape, values, seed=0):
    rng = np.random.default_rng(seed)
    scores = np.stack([ndimage.gaussian_filter(rng.normal(0, 1, shape), 1.2, mode="wrap") for _ in values])
    return np.array(values, np.int16)[scores.argmax(0)]


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("order", [1, 3])
def test_as_scikit_image(source, target, order):
    array = image(source)
    expected = reference_resize(array.astype(np.float64), target, order, mode="edge", anti_aliasing=False)
    found = resize(array[None], target, (order,) * 3)
    assert found.dtype == np.float32
    assert found.shape == (1, *target)
    assert np.abs(found[0] - expected).max() <= 1e-4 * np.ptp(array)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [4, 11, 8])
def test_a_coarse_axis_is_taken_from_the_nearest_slices(axis, size):
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


def undecided(labels, target):
    """Where the two largest shares of a voxel are equal up to rounding, which the reference settles by rounding."""
    shares = [reference_resize((labels == v).astype(float), target, 1, mode="edge", anti_aliasing=False)
              for v in np.unique(labels)]  # fmt: skip
    return np.ptp(np.sort(shares, axis=0)[-2:], axis=0) < 1e-6 if len(shares) > 1 else np.zeros(target, bool)


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("values", [(0, 1), (0, 1, 2, 7), (3, 4, 5)])
def test_labels_as_batchgenerators(source, target, values):
    labels = blobs(source, values, seed=sum(source))
    expected = labels if source == target else resize_segmentation(labels, target, order=1)
    found = resize_labels(labels, target, (1, 1, 1))
    assert found.dtype == np.int16
    decided = ~undecided(labels, target)
    assert decided.mean() > 0.85
    assert np.array_equal(found[decided], expected[decided])


def test_labels_of_a_coarse_axis_are_resized_slice_by_slice():
    labels = blobs((6, 20, 24), (0, 1, 2), seed=5)
    planes = np.stack([resize_segmentation(plane, (31, 17), order=1) for plane in labels])
    decided = np.stack([~undecided(plane, (31, 17)) for plane in labels])
    nearest = np.floor(6 / 13 * (np.arange(13) + 0.5)).astype(int)
    found = resize_labels(labels, (13, 31, 17), (0, 1, 1))
    assert np.array_equal(found[decided[nearest]], planes[nearest][decided[nearest]])


def test_equal_shares_go_to_the_nearest_label_whatever_its_value():
    lines = np.array([[0, 0, 3, 3, 3, 0], [5, 5, 2, 2, 2, 5]], np.int16)[:, None]
    # 6 -> 4 voxels of 1.5: the second one's centre is at 1.75, 0.25 from voxel 2; the third at 3.25.
    assert resize_labels(lines, (2, 1, 4), (1, 1, 1)).tolist() == [[[0, 3, 3, 0]], [[5, 2, 2, 5]]]
    # 2 -> 1: the centre is half-way, and rounds up.
    for pair in ([0, 4], [4, 0], [6, 4]):
        assert resize_labels(np.array([[pair]], np.int16), (1, 1, 1), (1, 1, 1)).item() == pair[1]


def test_no_background_appears_where_three_labels_meet():
    labels = blobs((12, 12, 12), (1, 2, 3), seed=1)
    assert (resize_labels(labels, (20, 7, 31), (1, 1, 1)) > 0).all()


def test_a_label_between_the_samples_of_a_coarser_grid_is_lost_without_a_crash():
    labels = np.zeros((9, 9, 9), np.int16)
    labels[0, 0, 0] = 2
    assert not resize_labels(labels, (3, 3, 3), (1, 1, 1)).any()


def test_a_label_that_fills_the_image_or_is_absent():
    assert (resize_labels(np.full((4, 4, 4), 3, np.int16), (7, 2, 5), (1, 1, 1)) == 3).all()
    assert not resize_labels(np.zeros((4, 4, 4), np.int16), (7, 2, 5), (1, 1, 1)).any()


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
