"""Tiles of nothing but air: what may be left out, and that nothing of the body ever is."""

import numpy as np
import pytest

from unicon_pipeline.air import BodyHull
from unicon_pipeline.geometry import Grid, Volume

LINES = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def volume(array):
    return Volume(array, Grid(array.shape, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), LINES))


def whole(shape):
    return tuple(slice(0, size) for size in shape)


@pytest.fixture
def ct():
    """Air, with a hollow body (a lung) in the planes 10 to 29."""
    array = np.full((40, 50, 60), -1000, np.int16)
    array[10:30, 15:35, 20:40] = 40
    array[12:28, 18:32, 23:37] = -850
    return array


def test_air_around_the_body_and_none_within(ct):
    hull = BodyHull.of({"CT": volume(ct)}, whole(ct.shape), ct.shape)
    assert hull.is_air((slice(0, 7), slice(0, 50), slice(0, 60)))
    assert hull.is_air((slice(0, 40), slice(0, 12), slice(0, 60)))
    assert not hull.is_air((slice(18, 22), slice(24, 26), slice(29, 31))), "the lung is inside the body"
    assert not hull.is_air((slice(0, 10), slice(0, 50), slice(0, 60))), "a margin of two voxels"


@pytest.mark.parametrize("target", [(40, 50, 60), (13, 71, 33), (90, 20, 60)])
def test_no_tile_with_a_voxel_of_the_body_is_air_at_any_resolution(ct, target):
    box = (slice(3, 38), slice(5, 45), slice(2, 60))
    hull = BodyHull.of({"CT": volume(ct)}, box, target)
    body = np.argwhere(ct[box] > -600)
    scale = np.array(target) / np.array([side.stop - side.start for side in box])
    for voxel in body[:: max(1, len(body) // 400)]:
        low, high = np.floor(voxel * scale).astype(int), np.ceil((voxel + 1) * scale).astype(int)
        assert not hull.is_air([slice(a, max(b, a + 1)) for a, b in zip(low, high)])
    assert hull.is_air((slice(0, target[0]), slice(0, target[1]), slice(target[2] - 2, target[2])))


def test_a_pet_alone_and_an_image_without_a_body():
    pet = np.zeros((20, 20, 20), np.float32)
    assert BodyHull.of({"PET": volume(pet)}, whole(pet.shape), pet.shape) is None
    pet[5:15, 5:15, 5:15] = 1.0
    hull = BodyHull.of({"PET": volume(pet)}, whole(pet.shape), pet.shape)
    assert hull.is_air((slice(0, 20), slice(0, 2), slice(0, 20)))
    assert not hull.is_air((slice(9, 10), slice(9, 10), slice(9, 10)))


def test_modalities_without_ct_count_together():
    one, two = np.zeros((2, 12, 30, 30), np.float32)
    one[:, 5:10, 5:10], two[:, 20:25, 20:25] = 1.0, 1.0
    hull = BodyHull.of({"T1": volume(one), "T2": volume(two)}, whole(one.shape), one.shape)
    for place in (slice(6, 8), slice(21, 23)):
        assert not hull.is_air((slice(5, 6), place, place))
