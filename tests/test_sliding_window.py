"""Sliding window: nnU-Net's positions and weights, exact for a network whose output does not depend on the tile."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from unicon_pipeline import sliding_window
from unicon_pipeline.sliding_window import (
    Window,
    gaussian_weights,
    tile_count,
    tile_starts,
    window_maps,
    window_slabs,
)


@pytest.mark.parametrize(
    "size, tile, expected",
    [
        (64, 64, (0,)),
        (65, 64, (0, 1)),
        (96, 64, (0, 32)),
        (97, 64, (0, 16, 33)),  # np.round takes 16.5 to the even 16
        (110, 64, (0, 23, 46)),  # nnU-Net's own example
        (200, 64, (0, 27, 54, 82, 109, 136)),
        (4, 1, (0, 1, 2, 3)),
    ],
)
def test_tile_positions(size, tile, expected):
    assert tile_starts((size, tile, tile), (tile, tile, tile))[0] == expected


def test_weights_are_a_gaussian_that_is_nowhere_zero():
    tile = (16, 24, 64)
    impulse = np.zeros(tile)
    impulse[8, 12, 32] = 1
    expected = gaussian_filter(impulse, [2, 3, 8], mode="constant")
    expected /= expected.max()
    weights = gaussian_weights(tile).numpy()
    seen = expected > 0
    np.testing.assert_allclose(weights[seen], expected[seen], rtol=1e-5)
    assert weights.min() > 0 and weights.max() == 1


class Pointwise(torch.nn.Module):
    """Two output channels, each a function of its own voxel: any tiling must give the same."""

    def forward(self, images, present):
        return [torch.cat((images[:, :1] * 2, images[:, 1:] - 1), dim=1)]


@pytest.mark.parametrize("shape", [(20, 30, 40), (16, 16, 16), (9, 50, 12)])
@pytest.mark.parametrize("mirror_axes", [(), (2,), (0, 1, 2)])
def test_pointwise_network_is_reproduced(shape, mirror_axes):
    array = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    window = Window((16, 16, 16), (-1.0, 0.0), torch.float32, mirror_axes)
    logits = window_maps(Pointwise(), array, (True, True), window)
    np.testing.assert_allclose(logits.numpy(), np.stack((array[0] * 2, array[1] - 1)), atol=2e-6)


def test_volumes_smaller_than_a_tile_are_padded_with_air():
    seen = []

    class Spy(Pointwise):
        def forward(self, images, present):
            seen.append(images)
            return super().forward(images, present)

    array = np.ones((2, 4, 16, 16), np.float32)
    window_maps(Spy(), array, (True, True), Window((16, 16, 16), (-3.0, 0.5), torch.float32))
    (tile,) = seen
    assert tile.shape == (1, 2, 16, 16, 16)
    assert torch.equal(tile[0, :, 6:10], torch.ones(2, 4, 16, 16))
    assert (tile[0, 0, :6] == -3).all() and (tile[0, 1, 10:] == 0.5).all()


def test_tile_count():
    assert tile_count((20, 30, 40), (16, 16, 16)) == 2 * 3 * 4
    assert tile_count((4, 4, 4), (16, 16, 16)) == 1


class Counting(Pointwise):
    """Counts its passes, and fails where the batch is larger than what there is memory for."""

    def __init__(self, room=100):
        super().__init__()
        self.room, self.passes = room, 0

    def forward(self, images, present):
        if len(images) > self.room:
            raise torch.OutOfMemoryError("no memory")
        self.passes += 1
        return super().forward(images, present)


def test_tiles_of_air_are_left_out_and_what_only_they_cover_is_not_seen():
    array = np.random.default_rng(0).normal(size=(2, 40, 16, 48)).astype(np.float32)
    window, network = Window((16, 16, 16), (0.0, 0.0), torch.float32), Counting()
    slabs = list(window_slabs(network, array, (True, True), window, is_air=lambda t: t[2].start < 24 or t[0].start < 8))
    assert network.passes == sum(slab.tiles for slab in slabs) < tile_count(array.shape[1:], (16, 16, 16))
    assert sum(slab.tiles + slab.air_tiles for slab in slabs) == tile_count(array.shape[1:], (16, 16, 16))
    assert slabs[0].maps_kzyx is None
    for slab in slabs[1:]:
        assert slab.seen_zyx[:, :, 24:].all() and not slab.seen_zyx[:, :, :24].any()
        expected = np.stack((array[0] * 2, array[1] - 1))[:, slab.rows, :, 24:]
        np.testing.assert_allclose(slab.maps_kzyx[..., 24:].numpy(), expected, atol=2e-6)
    assert [slab.rows.start for slab in slabs[1:]] == [slab.rows.stop for slab in slabs[:-1]]


def test_more_tiles_at_a_time_give_the_same():
    array = np.random.default_rng(0).normal(size=(2, 20, 30, 40)).astype(np.float32)
    one, many = (
        window_maps(Pointwise(), array, (True, True), Window((16, 16, 16), (0.0, 0.0), torch.float32, batch=batch))
        for batch in (1, 5)
    )
    assert torch.equal(one, many)


def test_without_memory_on_a_gpu_it_goes_on_with_less(monkeypatch, caplog):
    network, array = Counting(room=2), np.ones((2, 16, 16, 80), np.float32)
    window = Window((16, 16, 16), (0.0, 0.0), torch.float32, batch=8)
    with pytest.raises(torch.OutOfMemoryError):  # a CPU has nothing to fall back to
        window_maps(network, array, (True, True), window)
    monkeypatch.setattr(sliding_window, "_device", lambda network: SimpleNamespace(type="cuda"))
    monkeypatch.setattr(sliding_window._Passes, "_forward", lambda self, images: network(images, None)[0])
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_: tensor)
    maps = window_maps(network, array, (True, True), window)
    assert torch.equal(maps[0], torch.full((16, 16, 80), 2.0))
    assert [record.args for record in caplog.records] == [(4,), (2,)]
