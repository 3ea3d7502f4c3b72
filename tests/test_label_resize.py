"""Resizing label maps: batchgenerators as reference where shares differ, and the rule for ties by hand."""

import tracemalloc

import numpy as np
import pytest
from batchgenerators.augmentations.utils import resize_segmentation
from scipy import ndimage
from skimage.transform import resize as reference_resize
from test_resize import PAIRS

from unicon_pipeline import label_resize
from unicon_pipeline import resize as image_resize
from unicon_pipeline.label_resize import resize_labels
from unicon_pipeline.resize import resize


def blobs(shape, values, seed=0):
    rng = np.random.default_rng(seed)
    scores = np.stack([ndimage.gaussian_filter(rng.normal(0, 1, shape), 1.2, mode="wrap") for _ in values])
    return np.array(values, np.int16)[scores.argmax(0)]


@pytest.fixture(params=[100, 1 << 20], ids=["slabs", "whole"])
def slab_voxels(request, monkeypatch):
    monkeypatch.setattr(image_resize, "_SLAB_VOXELS", request.param)


def undecided(labels, target):
    """Where the two largest shares of a voxel are equal up to rounding, which the reference settles by rounding."""
    shares = [reference_resize((labels == v).astype(float), target, 1, mode="edge", anti_aliasing=False)
              for v in np.unique(labels)]  # fmt: skip
    return np.ptp(np.sort(shares, axis=0)[-2:], axis=0) < 1e-6 if len(shares) > 1 else np.zeros(target, bool)


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("values", [(0, 1), (0, 1, 2, 7), (3, 4, 5)])
def test_labels_as_batchgenerators(source, target, values, slab_voxels):
    labels = blobs(source, values, seed=sum(source))
    expected = labels if source == target else resize_segmentation(labels, target, order=1)
    found = resize_labels(labels, target, (1, 1, 1))
    assert found.dtype == labels.dtype
    decided = ~undecided(labels, target)
    assert decided.mean() > 0.85
    assert np.array_equal(found[decided], expected[decided])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
@pytest.mark.parametrize("many", [0.0, 1.0], ids=["all", "where labels meet"])
@pytest.mark.parametrize("orders", [(1, 1, 1), (0, 1, 1), (1, 0, 1)])
def test_many_labels_and_noise(dtype, many, orders, monkeypatch):
    monkeypatch.setattr(label_resize, "_MANY", many)
    monkeypatch.setattr(label_resize, "_AT_ONCE", 500)
    source, target = (14, 20, 18), (19, 13, 23)
    for labels in (np.random.default_rng(0).integers(0, 41, source).astype(dtype), blobs(source, range(41)), None):
        if labels is None:
            labels = (np.random.default_rng(1).random(source) > 0.6).astype(dtype)
        labels = labels.astype(dtype)
        shares = np.stack([resize((labels == v)[None], target, orders)[0] for v in range(42)])
        largest = np.sort(shares, axis=0)
        decided = largest[-1] - largest[-2] > 1e-5
        found = resize_labels(labels, target, orders)
        assert found.dtype == dtype
        assert decided.mean() > 0.7
        assert np.array_equal(found[decided], shares.argmax(axis=0)[decided])
        # A tie goes to one of those that are equal.
        assert (np.take_along_axis(shares, found[None].astype(int), 0)[0] >= largest[-1] - 1e-5).all()


def test_labels_that_need_no_resizing_stay_the_array_they_are():
    labels = blobs((5, 6, 7), (0, 1))[:, ::-1]
    assert resize_labels(labels, (5, 6, 7), (1, 1, 1)) is labels
    assert np.array_equal(resize_labels(labels, (9, 4, 7), (1, 1, 1)),
                          resize_labels(labels.copy(), (9, 4, 7), (1, 1, 1)))  # fmt: skip


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


def test_a_large_map_needs_little_memory_besides_the_result(monkeypatch):
    monkeypatch.setattr(image_resize, "_SLAB_VOXELS", 1 << 14)
    labels = np.zeros((400, 128, 128), np.uint8)
    labels[40:340, 20:60, 20:60] = np.arange(300)[:, None, None] % 3
    tracemalloc.start()
    try:
        result = resize_labels(labels, (300, 160, 100), (1, 1, 1)).nbytes
        assert result < tracemalloc.get_traced_memory()[1] < result + labels.nbytes
    finally:
        tracemalloc.stop()
