"""From logits to the input's grid: against scikit-image, slab by slab the same as at once, regions in their order."""

import numpy as np
import pytest
from skimage.transform import resize

from unicon_pipeline import export
from unicon_pipeline.export import CaseExport, decide
from unicon_pipeline.geometry import Grid
from unicon_pipeline.label_spec import Labels
from unicon_pipeline.prepare import CaseGeometry

TWO = Labels(("a", "b"), ((1,), (3,)), False, (1, 3), None)
REGIONS = Labels(("whole", "core"), ((1, 2), (2,)), True, (1, 2), None)


def geometry(shape=(20, 30, 25), crop=((2, 3, 4), (18, 27, 25)), small=(8, 16, 14)):
    grid = Grid(shape, (2.0, 1.5, 1.5), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    return CaseGeometry(grid, grid, *crop, small, tuple(2 * s for s in grid.spacing_zyx_mm))


def exported(logits, labels, geometry, folder=None, steps=(8,), last_layer=None):
    export, start = CaseExport(labels, geometry, last_layer, folder), 0
    for rows in steps:
        export.add(logits[:, start : start + rows], None, rows)
        start += rows
    return export.result()


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(3, 8, 16, 14)).astype(np.float32)


def test_resized_like_scikit_image_and_background_outside_the_crop(logits, tmp_path):
    labels, probabilities = exported(logits, TWO, geometry(), tmp_path)
    expected = np.stack([resize(c, (16, 24, 21), order=1, mode="edge", anti_aliasing=False) for c in logits])
    inside = np.array([0, 1, 3])[expected.argmax(0)]
    top = np.sort(expected, axis=0)
    clear = top[-1] - top[-2] > 1e-4
    crop = (slice(2, 18), slice(3, 27), slice(4, 25))
    assert np.array_equal(labels.array_zyx[crop][clear], inside[clear])
    outside = np.ones(labels.array_zyx.shape, bool)
    outside[crop] = False
    assert not labels.array_zyx[outside].any()
    assert (probabilities["background"].array_zyx[outside] == 1).all()
    total = sum(volume.array_zyx for volume in probabilities.values())
    np.testing.assert_allclose(total, 1.0, atol=1e-5)
    exponential = np.exp(expected)
    np.testing.assert_allclose(
        probabilities["b"].array_zyx[crop], exponential[2] / exponential.sum(0), atol=1e-4
    )


@pytest.mark.parametrize("steps", [(8,), (3, 5), (1,) * 8])
@pytest.mark.parametrize("small", [(8, 16, 14), (8, 40, 10)])
def test_slabs_make_no_difference(steps, small, monkeypatch):
    logits = np.random.default_rng(0).normal(size=(3, *small)).astype(np.float32)
    whole, _ = exported(logits, TWO, geometry(small=small))
    monkeypatch.setattr(export, "_SLAB_BYTES", 1)
    slabs, _ = exported(logits, TWO, geometry(small=small), steps=steps)
    assert np.array_equal(whole.array_zyx, slabs.array_zyx)


def test_a_last_layer_after_resizing_gives_what_it_gives_before(logits, tmp_path):
    rng = np.random.default_rng(1)
    weight, bias = rng.normal(size=(3, 2)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    maps = logits[:2]
    before = np.einsum("ck,kzyx->czyx", weight, maps) + bias.reshape(-1, 1, 1, 1)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    _, expected = exported(before, TWO, geometry(), tmp_path / "a")
    _, found = exported(maps, TWO, geometry(), tmp_path / "b", (2, 2, 4), (weight, bias))
    for name, volume in expected.items():
        np.testing.assert_allclose(found[name].array_zyx, volume.array_zyx, atol=1e-5)


def test_where_the_network_was_not_asked_is_background(tmp_path):
    logits = np.zeros((3, 8, 16, 14), np.float32)
    logits[1] = 5.0
    seen = np.zeros((4, 16, 14), bool)
    seen[:, 4:8] = True
    export = CaseExport(TWO, geometry(), None, tmp_path)
    export.add(None, None, 2)
    export.add(logits[:, 2:6], seen, 4)
    export.add(None, None, 2)
    labels, probabilities = export.result()
    crop = labels.array_zyx[2:18, 3:27, 4:25]
    assert (crop[4:12, 6:12] == 1).all() and not crop[:4].any() and not crop[:, :6].any() and not crop[:, 12:].any()
    assert (probabilities["background"].array_zyx[labels.array_zyx == 0] == 1).all()


def test_later_regions_are_written_over_earlier_ones():
    logits = np.array([[-1, 1, 1, -1], [-1, -1, 1, 1]], np.float32).reshape(2, 1, 1, 4)
    assert decide(logits, REGIONS).ravel().tolist() == [0, 1, 2, 2]


def test_region_probabilities_overlap(tmp_path):
    logits = np.full((2, 8, 16, 14), 2.0, np.float32)
    labels, probabilities = exported(logits, REGIONS, geometry(), tmp_path)
    assert set(probabilities) == {"whole", "core"}
    assert probabilities["core"].array_zyx.max() == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-5)
    assert probabilities["core"].array_zyx[0, 0, 0] == 0
    assert labels.array_zyx.max() == 2
