"""SUV from activity: a case computed by hand, values in the wrong unit, and the command that converts an image."""

import numpy as np
import pytest

from dataset_conversion.suv import main, seconds_between
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.geometry import Grid, read_image, write_image
from unicon_pipeline.suv import suv_factor

GRID = Grid((4, 6, 5), (3.0, 4.0, 4.0), (-10.0, 5.0, 7.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
FLUORINE = 109.77 * 60
GIVEN = ["--weight-kg", "70", "--dose-mbq", "370", "--half-life-min", "109.77", "--injected", "10:12"]


def test_by_hand():
    # 70 kg, 400 MBq; after one half-life 200 MBq in 70 000 g are 2857.14 Bq/g: SUV 1.
    assert suv_factor(70, 400e6, FLUORINE, FLUORINE) * 2857.142857 == pytest.approx(1)
    assert suv_factor(70, 400e6, FLUORINE, 0) == pytest.approx(70_000 / 400e6)
    # 63 min: 2^(-63/109.77) = 0.67178 are left.
    assert suv_factor(80, 350e6, FLUORINE, 63 * 60) == pytest.approx(80_000 / (350e6 * 0.67178), rel=1e-5)


@pytest.mark.parametrize(
    "values, words",
    [
        ((70_000, 370e6, FLUORINE, 3600), "body weight is 70000 kg.*in g"),
        ((0, 370e6, FLUORINE, 3600), "body weight is 0 kg"),
        ((70, 370, FLUORINE, 3600), "dose is 370 Bq.*MBq"),
        ((70, 370e6, 1.83, 3600), "half-life is 1.83 s.*minutes or hours"),
        ((70, 370e6, 109.77, 3600), "32.8 half-lives"),
        ((70, 370e6, FLUORINE, -60), "-60 s after the injection.*swapped"),
        ((float("nan"), 370e6, FLUORINE, 60), "body weight is nan"),
        ((70, 370e6, FLUORINE, float("nan")), "nan s after"),
    ],
)
def test_nonsense(values, words):
    with pytest.raises(DatasetError, match=words):
        suv_factor(*values)


def test_times():
    assert seconds_between("10:12", "11:15") == 63 * 60
    assert seconds_between("10:12:30", "11:15") == 62.5 * 60
    assert seconds_between("2024-05-31T23:40", "2024-06-01 00:40:00") == 3600


@pytest.mark.parametrize(
    "times, words",
    [
        (("11:15", "10:12"), "swapped.*with their dates"),
        (("noon", "11:15"), "'noon' is not a time"),
        (("10:12", "2024-06-01T11:15"), "both times with their dates"),
        (("10:12+02:00", "11:15"), "time zones"),
    ],
)
def test_times_that_tell_nothing(times, words):
    with pytest.raises(DatasetError, match=words):
        seconds_between(*times)


@pytest.fixture
def activity(tmp_path):
    """In Bq/ml: 1 to 12 in SUV for a patient of 70 kg and 370 MBq, 63 minutes before."""
    suv = np.random.default_rng(0).uniform(1, 12, GRID.shape_zyx)
    path = tmp_path / "pet.nii.gz"
    write_image(path, suv / (70_000 / (370e6 * 2 ** (-63 / 109.77))), GRID)
    return path, suv


def test_the_command_converts_an_image(activity, tmp_path, capsys):
    path, suv = activity
    out = tmp_path / "out" / "suv.nii.gz"
    assert main(["-i", str(path), "-o", str(out), *GIVEN, "--scanned", "11:15"]) == 0
    assert "SUV = 0.0002816" in capsys.readouterr().out
    found = read_image(out)
    np.testing.assert_allclose(found.array_zyx, suv, rtol=1e-5)
    assert found.grid == read_image(path).grid
    assert main(["-i", str(path), "-o", str(out), "--factor", "0.0001"]) == 0
    np.testing.assert_allclose(read_image(out).array_zyx, read_image(path).array_zyx * 1e-4, rtol=1e-6)


def test_what_is_suv_already_or_not_after_it_is_left_alone(activity, tmp_path, capsys):
    path, suv = activity
    out = tmp_path / "suv.nii.gz"
    assert main(["-i", str(path), "-o", str(out), "--factor", "0.5"]) == 2
    assert "is not SUV" in capsys.readouterr().err
    write_image(path, suv, GRID)
    assert main(["-i", str(path), "-o", str(out), *GIVEN, "--scanned", "11:15"]) == 2
    assert "is in SUV already" in capsys.readouterr().err
    assert main(["-i", str(path), "-o", str(out), "--factor", "nan"]) == 2
    assert not out.exists()


def test_half_of_the_options(capsys):
    for options in (GIVEN, [*GIVEN, "--scanned", "11:15", "--factor", "1"]):
        with pytest.raises(SystemExit):
            main(["-i", "pet.nii.gz", "-o", "suv.nii.gz", *options])
        assert "give either --factor, or all of --weight-kg, --dose-mbq" in capsys.readouterr().err
