"""Shared by the tests: a small model grown by two tasks on phantoms, once per run."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from unicon_pipeline.budget import PRESETS
from unicon_pipeline.extend import extend
from unicon_pipeline.extension_plan import Schedule
from unicon_pipeline.families import build_foundation
from unicon_pipeline.families.dna_encoders import new_residual_encoder_spec
from unicon_pipeline.model_folder import create_model
from unicon_pipeline.phantoms import write_phantom_task
from unicon_pipeline.predict import predict_folder
from unicon_pipeline.preprocess import plan_and_preprocess
from unicon_pipeline.weights import canonical_state

SMALL = {"shape_zyx": (32, 48, 48), "spacing_zyx_mm": (10.0, 8.0, 8.0)}
FEW_STEPS = Schedule(steps=3, minutes=None)


@pytest.fixture(autouse=True)
def _logging_as_at_the_start() -> None:
    # A command line configures the package's logger, once a process; here many run in one, some in fixtures of modules.
    package = logging.getLogger("unicon_pipeline")
    package.handlers[:] = []
    package.setLevel(logging.NOTSET)


@dataclasses.dataclass(frozen=True)
class Grown:
    """`work` with raw and preprocessed tasks; `model` grown by `CT` and then by `CTPET`; what CT gave before CTPET."""

    work: Path
    model: Path
    predictions_before: Path

    def raw(self, task: str) -> Path:
        return self.work / "raw" / task


@pytest.fixture(scope="session")
def grown(tmp_path_factory) -> Grown:
    work = tmp_path_factory.mktemp("work with a space")
    spec = new_residual_encoder_spec("Apache-2.0", {"made_by": "the tests"})
    torch.manual_seed(1)
    create_model(work / "model", spec, canonical_state(build_foundation(spec)))
    for task, modalities in (("CT", ("CT",)), ("CTPET", ("CT", "PET"))):
        write_phantom_task(work / "raw" / task, "lesions", 3, 5, modalities=modalities, **SMALL)
        _, failed = plan_and_preprocess(work / "raw" / task, work, spec, PRESETS["cpu"], processes=1)
        assert not failed
    extend(work / "raw" / "CT", work, work / "model", schedule=FEW_STEPS, device="cpu")
    images = work / "raw" / "CTPET" / "imagesTr"
    predict_folder(images, work / "before", work / "model", device="cpu", save_probabilities=True)
    extend(work / "raw" / "CTPET", work, work / "model", schedule=FEW_STEPS, fold=0, device="cpu")
    return Grown(work, work / "model", work / "before")
