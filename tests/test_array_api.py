"""Prediction of arrays: the voxels that the command gives for the same images in files."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk

from unicon_pipeline import array_api
from unicon_pipeline.array_api import open_model, predict_array
from unicon_pipeline.errors import CheckpointError, DatasetError, PredictionError
from unicon_pipeline.geometry import Grid, Volume, onto_grid, orient, read_image, read_labels, write_image
from unicon_pipeline.nifti import read_nifti
from unicon_pipeline.predict import predict_folder
from unicon_pipeline.prediction_run import TaskRun
from unicon_pipeline.predictor import TaskResult

CHANNELS = {"CT": 0, "PET": 1}
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
CASES = ("as_made", "flipped", "oblique", "own_grids", "ct_only", "pet_only")


def oblique(volume):
    turned = sitk.VersorTransform((0.3, -0.5, 0.8), 0.4).GetMatrix()
    grid = volume.grid
    return Volume(volume.array_zyx, Grid(grid.shape_zyx, grid.spacing_zyx_mm, (-31.0, 17.0, 250.0), tuple(turned)))


def on_coarser_grid(volume):
    grid = volume.grid
    spacing, origin = (11.0, 9.5, 9.0), tuple(value + 3.7 for value in grid.origin_xyz_mm)
    return onto_grid(volume, Grid((27, 38, 40), spacing, origin, grid.direction), 0.0)


def from_file(path):
    """Array and affine as nibabel gives them, but z, y, x."""
    array, affine_lps = read_nifti(path)
    return array, TO_RAS @ affine_lps


def pair(folder, case, *modalities):
    return {name: from_file(folder / f"{case}_{CHANNELS[name]:04d}.nii.gz") for name in modalities or CHANNELS}


@pytest.fixture(scope="module")
def images(grown, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    made = grown.raw("CTPET") / "imagesTr"
    ct, pet = (read_image(made / f"phantom_0001_{number:04d}.nii.gz") for number in (0, 1))
    cases = {
        "flipped": (orient(ct, "PRS"), orient(pet, "PRS")),
        "oblique": (oblique(ct), oblique(pet)),
        "own_grids": (ct, on_coarser_grid(orient(pet, "RAI"))),
        "ct_only": (ct,),
        "pet_only": (None, pet),
    }
    for number in (0, 1):
        shutil.copy(made / f"phantom_0001_{number:04d}.nii.gz", folder / f"as_made_{number:04d}.nii.gz")
    for case, volumes in cases.items():
        for number, volume in enumerate(volumes):
            if volume is not None:
                write_image(folder / f"{case}_{number:04d}.nii.gz", volume.array_zyx, volume.grid)
    return folder


@pytest.fixture(scope="module")
def written(images, grown, tmp_path_factory):
    """What the command's own function writes for these files."""
    out = tmp_path_factory.mktemp("written")
    report = predict_folder(images, out, grown.model, device="cpu", save_probabilities=True)
    assert report.exit_code == 0
    return out


@pytest.fixture(scope="module")
def model(grown):
    with open_model(grown.model, device="cpu") as model:
        yield model


@pytest.mark.parametrize("case", CASES)
def test_the_voxels_are_those_of_the_command(images, written, model, case):
    modalities = {"ct_only": ("CT",), "pet_only": ("PET",)}.get(case, ("CT", "PET"))
    given = pair(images, case, *modalities)
    found = model.predict(given, probabilities=True)
    assert list(found) == (["CTPET"] if case == "pet_only" else ["CT", "CTPET"])
    first_array, first_affine = given[modalities[0]]
    for task, result in found.items():
        assert result.labels_zyx.shape == first_array.shape
        np.testing.assert_allclose(result.affine, first_affine, atol=1e-4)
        np.testing.assert_array_equal(result.labels_zyx, read_labels(written / task / f"{case}.nii.gz").array_zyx)
        assert list(result.probabilities) == ["background", "lesion"]
        for name, array in result.probabilities.items():
            file = written / task / "probabilities" / f"{case}_{name}.nii.gz"
            np.testing.assert_array_equal(array, read_image(file).array_zyx)
            assert type(array) is np.ndarray and array.flags.c_contiguous
        assert result.run.task == task and set(result.run.modalities) <= set(modalities)


def test_order_type_layout_and_read_only_arrays_change_nothing(images, written, model):
    """Neither the order in `images`, nor how numpy holds the numbers; and the arrays stay as they were."""
    given = pair(images, "own_grids")
    turned = {}
    for name in ("PET", "CT"):
        array, affine = given[name]
        turned[name] = np.asfortranarray(array.astype(">f8")), affine.tolist()
        turned[name][0].flags.writeable = False
    found = model.predict(turned)
    for task, result in found.items():
        np.testing.assert_array_equal(result.labels_zyx, read_labels(written / task / "own_grids.nii.gz").array_zyx)
        assert result.probabilities == {} and result.scores == {}
    for name, (array, _) in given.items():
        np.testing.assert_array_equal(turned[name][0], array)


def test_a_nibabel_image_goes_in_as_the_documentation_says(images, written, grown):
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.load(images / "oblique_0000.nii.gz")
    given = {"CT": (np.asarray(image.dataobj).T, image.affine)}
    with_pet = pair(images, "oblique", "PET") | given
    found = predict_array(with_pet, grown.model, tasks=["CT"], device="cpu", probabilities=True)
    assert list(found) == ["CT"] and found["CT"].run.modalities == ("CT",)
    lesion = read_image(written / "CT" / "probabilities" / "oblique_lesion.nii.gz").array_zyx
    np.testing.assert_array_equal(found["CT"].probabilities["lesion"], lesion)


def test_scores_of_whole_cases(images, grown, monkeypatch):
    class StandIn:
        tasks = ("Risk",)
        plans = {"Risk": SimpleNamespace(modalities=("CT",))}
        regions = {}

        def __init__(self, folder, tasks, options):
            assert options.precision == "fp32"

        def unusable(self, task, modalities):
            return None

        def predict(self, volumes, tasks, probabilities_in, beside):
            assert list(volumes) == ["CT"] and probabilities_in("Risk") is None
            assert beside.clinical == {"age": 61.0} and not beside.own
            yield TaskResult(TaskRun("Risk", ("CT",), 0.1, ("look at it",)), scores={"x": 0.25})

    monkeypatch.setattr(array_api, "Predictor", StandIn)
    found = predict_array(pair(images, "as_made"), grown.model, clinical={"age": 61.0}, precision="fp32")
    assert found["Risk"].scores == {"x": 0.25} and found["Risk"].labels_zyx is None
    assert found["Risk"].run.warnings == ("look at it",)


CT = np.linspace(-1000, 1000, 8 * 9 * 10, dtype=np.float32).reshape(8, 9, 10)
SHEARED = np.eye(4) + np.diag([0.3, 0, 0], 1)


@pytest.mark.parametrize(
    "image, words",
    [
        (CT, "must be a pair"),
        ((CT[0], np.eye(4)), "2 dimensions"),
        ((np.stack([CT, CT]), np.eye(4)), "4 dimensions"),
        ((CT[:0], np.eye(4)), "array of numbers"),
        ((CT > 0, np.eye(4)), "found bool"),
        ((CT.astype(complex), np.eye(4)), "found complex"),
        ((np.where(CT > 990, np.nan, CT), np.eye(4)), "NaN or infinite"),
        ((CT, np.eye(3)), "affine must be 4 x 4"),
        ((CT, np.ones((4, 4))), "last row 0 0 0 1"),
        ((CT, np.diag([1.0, 0.0, 1.0, 1.0])), "spacing"),
        ((CT, np.diag([1.0, np.nan, 1.0, 1.0])), "spacing"),
        ((CT, SHEARED), "right angles"),
        ((np.full_like(CT, 3.0), np.eye(4)), "image is empty"),
        ((CT / 1000 + 1, np.eye(4)), "not HU"),
    ],
)
def test_an_unusable_image_is_named_with_the_reason(model, image, words):
    with pytest.raises(DatasetError, match=words) as problem:
        model.predict({"CT": image})
    assert "images['CT']" in str(problem.value)


def test_a_pet_in_becquerel_and_one_of_another_patient_are_refused(images, model):
    given = pair(images, "as_made")
    pet, affine = given["PET"]
    with pytest.raises(DatasetError, match=r"images\['PET'\].*Bq/ml"):
        model.predict(given | {"PET": (pet * 4000.0, affine)})
    far = affine.copy()
    far[2, 3] += 5000.0
    with pytest.raises(DatasetError, match=r"images\['PET'\]: The fields of view do not overlap"):
        model.predict(given | {"PET": (pet, far)})


@pytest.mark.parametrize("images, words", [({}, "no image"), ({"Pet": (CT, np.eye(4))}, "'Pet'; name.* CT or PET")])
def test_what_is_not_an_image_of_the_model_is_refused(model, images, words):
    with pytest.raises(PredictionError, match=words):
        model.predict(images)


def test_a_task_that_cannot_do_with_the_images_says_what_it_needs(images, grown):
    with open_model(str(grown.model), tasks=["CT"], device="cpu") as model:
        with pytest.raises(PredictionError, match="CT needs CT, the case has PET"):
            model.predict(pair(images, "pet_only", "PET"))
    with pytest.raises(PredictionError, match="closed"):
        model.predict(pair(images, "as_made"))


def test_wrong_arguments_are_refused(grown, tmp_path):
    with pytest.raises(CheckpointError, match="no task 'Liver'"):
        open_model(grown.model, tasks=["Liver"], device="cpu")
    with pytest.raises(CheckpointError, match="no model folder"):
        open_model(tmp_path)
    with pytest.raises(TypeError, match="overlap"):
        open_model(grown.model, overlap=0.5)
