"""The demonstration's own parts; `.ci/run` runs all of it."""

import shutil

import pytest

from unicon_pipeline import demo
from unicon_pipeline.errors import UniconError
from unicon_pipeline.geometry import read_image, write_image


def test_same_files_sees_one_voxel_and_a_missing_file(grown, tmp_path):
    before = grown.predictions_before / "CT"
    shutil.copytree(before, tmp_path / "now")
    assert demo._same_files(before, tmp_path / "now")
    path = tmp_path / "now" / "probabilities" / "phantom_0001_lesion.nii.gz"
    image = read_image(path)
    image.array_zyx[3, 4, 5] += 1e-6
    write_image(path, image.array_zyx, image.grid)
    assert not demo._same_files(before, tmp_path / "now")
    path.unlink()
    assert not demo._same_files(before, tmp_path / "now")


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "something").touch()
    with pytest.raises(UniconError, match="not empty"):
        demo.run_demo(tmp_path)
