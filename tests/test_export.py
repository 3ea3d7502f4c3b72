"""From logits to the input's grid: against scikit-image, slab by slab the same as at once, regions in their order."""

import numpy as np
import pytest
from skimage.transform import resize

from unicon_pipeline import export
from unicon_pipeline.export import decide, export_case
from unicon_pipeline.geometry import Grid
from unicon_pipeline.label_spec import Labels
from unicon_pipeline.prepare import CaseGeometry

TWO = Labels(("a", "b"), ((1,), (3,)), False, (1, 3), None)
REGIONS = Labels(("whole", "core"), ((1, 2), (2,)), True, (1, 2), None)


def geometry(shape=(20, 30, 25), crop=((2, 3, 4), (18, 27, 25)), small=(8, 16, 14)):
    grid = Grid(shape, (2.0, 1.5, 1.5), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    return CaseGeometry(grid, grid, *crop, small, tuple(2 * s for s in grid.spacing_zyx_mm))


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(3, 8, 16, 14)).astype(np.float32)


def test_resized_like_scikit_image_and_background_outside_the_crop(logits):
    labels, probabilities = export_case(logits, TWO, geometry(), True)
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


def test_slabs_make_no_difference(logits, monkeypatch):
    whole, _ = export_case(logits, TWO, geometry(), False)
    monkeypatch.setattr(export, "_SLAB_BYTES", 1)
    slabs, _ = export_case(logits, TWO, geometry(), False)
    assert np.array_equal(whole.array_zyx, slabs.array_zyx)


def test_later_regions_are_written_over_earlier_ones():
    logits = np.array([[-1, 1, 1, -1], [-1, -1, 1, 1]], np.float32).reshape(2, 1, 1, 4)
    assert decide(logits, REGIONS).ravel().tolist() == [0, 1, 2, 2]


def test_region_probabilities_overlap():
    logits = np.full((2, 8, 16, 14), 2.0, np.float32)
    labels, probabilities = export_case(logits, REGIONS, geometry(), True)
    assert set(probabilities) == {"whole", "core"}
    assert probabilities["core"].array_zyx.max() == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-5)
    assert probabilities["core"].array_zyx[0, 0, 0] == 0
    assert labels.array_zyx.max() == 2
