"""Prediction of images in memory: the voxels that `unicon_predict` gives for the same images in files.

    with unicon.open_model("unicon_work/model") as model:
        image = nibabel.load("ct.nii.gz")
        found = model.predict({"CT": (np.asarray(image.dataobj).T, image.affine)})
        found["Lesions"].labels_zyx
        model.predict(images, clinical={"age": 61, "sex": "F"})["Survival"].scores["risk"]

An image is an array (z, y, x) and its affine as NIfTI and nibabel have it: 4 x 4, from voxel index (x, y, z) to mm in
patient axes in which right, anterior and superior increase. nibabel's own arrays are x, y, z: transpose them. CT is in
HU, PET in SUV.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike

from unicon_pipeline.case_prediction import Beside, with_own_grids
from unicon_pipeline.clinical import Row
from unicon_pipeline.errors import DatasetError, PredictionError
from unicon_pipeline.geometry import Volume, grid_of
from unicon_pipeline.intensity import check_units
from unicon_pipeline.model_folder import ModelFolder
from unicon_pipeline.nifti import check_size
from unicon_pipeline.prediction_run import TaskRun
from unicon_pipeline.predictor import Options, Predictor, TaskResult
from unicon_pipeline.voxels import ImageVoxels

logger = logging.getLogger(__name__)

Images = Mapping[str, tuple[ArrayLike, ArrayLike]]  # modality -> array (z, y, x) and affine
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class ArrayResult:
    """One task on one case: `labels_zyx` and `probabilities` of a segmentation, else `scores`.

    Args:
        run: what was used, how long it took, what to look at.
        labels_zyx: on the grid of the case's first image, in the order of the task's channels.
        affine: of that grid, as the images' own.
        probabilities: output -> float32 (z, y, x), where they were wanted.
        scores: output -> score of the whole case, as a row of predictions.csv; None where there is none.
    """

    run: TaskRun
    labels_zyx: np.ndarray | None = None
    affine: np.ndarray | None = None
    probabilities: dict[str, np.ndarray] = field(default_factory=dict)
    scores: dict[str, float | None] = field(default_factory=dict)


class OpenModel:
    """The networks of a model, loaded once, for any number of cases; see `open_model`."""

    def __init__(self, folder: ModelFolder, tasks: Sequence[str] | None, options: Options):
        self._predictor: Predictor | None = Predictor(folder, tasks, options)
        self.tasks = self._predictor.tasks
        wanted = (name for plan in self._predictor.plans.values() for name in plan.modalities)
        self._wanted = tuple(dict.fromkeys(wanted))
        every = (name for task in folder.tasks for name in folder.task_plan(task).data.modalities)
        self.modalities = tuple(dict.fromkeys(every))

    def predict(
        self, images: Images, *, probabilities: bool = False, clinical: Row | None = None
    ) -> dict[str, ArrayResult]:
        """Every task that the images allow.

        Images may lie on different grids: each is brought onto that of the first one, in the order of the tasks'
        channels (not of `images`). Modalities that only other tasks of the model know are left aside.

        Args:
            clinical: covariates by their column in clinical.csv, for the tasks that read them; None: all are unknown.

        Returns:
            task -> result, without the tasks that cannot do with these modalities (they are logged).

        Raises:
            DatasetError: an image is unusable, or in another unit than HU or SUV.
            PredictionError: a modality is unknown, no task can use the images, or the model is closed.
        """
        if self._predictor is None:
            raise PredictionError("This model is closed; open it again with open_model.")
        usable = self._usable(self._predictor, images)
        named = [(name, f"images[{name!r}]") for name in self._wanted if name in images]
        channels = ((name, where, _volume(images[name], where)) for name, where in named)
        volumes, own = with_own_grids(channels, keep=bool(self._predictor.regions))
        for name, where in named:
            check_units(volumes[name].array_zyx, name, where)
        with TemporaryDirectory(prefix="unicon_") as folder:

            def probabilities_in(task: str) -> Path | None:
                path = Path(folder) / task
                path.mkdir()
                return path if probabilities else None

            results = self._predictor.predict(volumes, usable, probabilities_in, Beside(own, clinical))
            return {result.run.task: _as_arrays(result) for result in results}

    def close(self) -> None:
        """Frees the networks' memory."""
        self._predictor = None

    def __enter__(self) -> OpenModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        self.close()

    def _usable(self, predictor: Predictor, images: Images) -> list[str]:
        unknown = [name for name in images if name not in self.modalities]
        if unknown or not images:
            named = f"has no task for {unknown[0]!r}" if unknown else "was given no image"
            raise PredictionError(f"The model {named}; name the images {' or '.join(self.modalities)}.")
        skipped = {task: reason for task in self.tasks if (reason := predictor.unusable(task, tuple(images)))}
        if len(skipped) == len(self.tasks):
            reasons = "; ".join(f"{task} {reason}" for task, reason in skipped.items())
            raise PredictionError(f"No task can use these images: {reasons}.")
        for task, reason in skipped.items():
            logger.info("%s is skipped: it %s", task, reason)
        return [task for task in self.tasks if task not in skipped]


def open_model(model: Path | str, *, tasks: Sequence[str] | None = None, **options: str | bool) -> OpenModel:
    """Loads a model folder to predict images in memory; use it in a `with` statement, or `close` it.

    Args:
        tasks: those that are wanted; None: all.
        options: fields of `Options`: device, precision, tta, compute_air, fast.

    Raises:
        CheckpointError: no sound model, or a wanted task is not in it.
    """
    return OpenModel(ModelFolder(Path(model)), tasks, Options(**options))


def predict_array(
    images: Images,
    model: Path | str,
    *,
    tasks: Sequence[str] | None = None,
    probabilities: bool = False,
    clinical: Row | None = None,
    **options: str | bool,
) -> dict[str, ArrayResult]:
    """One case by a model that is loaded for it; arguments and errors as `open_model` and `OpenModel.predict`."""
    with open_model(model, tasks=tasks, **options) as opened:
        return opened.predict(images, probabilities=probabilities, clinical=clinical)


def _volume(image: tuple[ArrayLike, ArrayLike], where: str) -> Volume:
    """An image as `geometry.read_image` would give it."""
    if not isinstance(image, tuple | list) or len(image) != 2:
        raise DatasetError(f"{where} must be a pair: an array (z, y, x), and its affine (4 x 4).")
    array, affine = (np.asarray(part) for part in image)
    if array.dtype.kind not in "iuf" or not array.size:
        raise DatasetError(f"{where}: expected an array of numbers, found {array.dtype} of shape {array.shape}.")
    check_size(array.shape[::-1], where)
    if affine.shape != (4, 4) or affine.dtype.kind not in "iuf" or not np.array_equal(affine[3], (0, 0, 0, 1)):
        raise DatasetError(
            f"{where}: the affine must be 4 x 4 numbers, the last row 0 0 0 1, as nibabel's image.affine; "
            f"found shape {affine.shape}."
        )
    voxels = ImageVoxels()
    array = voxels(array.astype(array.dtype.newbyteorder("="), copy=False))
    voxels.check(where)
    return Volume(array, grid_of(array.shape, _RAS_TO_LPS @ affine, where))


def _as_arrays(result: TaskResult) -> ArrayResult:
    for warning in result.run.warnings:
        logger.warning("%s: %s", result.run.task, warning)
    if result.labels is None:
        return ArrayResult(result.run, scores=result.scores)
    # Copies: the probabilities lie in files that go, and views of an oriented array would surprise.
    probabilities = {name: np.array(volume.array_zyx, order="C") for name, volume in result.probabilities.items()}
    labels, affine = np.ascontiguousarray(result.labels.array_zyx), _RAS_TO_LPS @ result.labels.grid.affine
    return ArrayResult(result.run, labels, affine, probabilities)
