"""A foundation from scratch: targets, the model folder it makes, and the faults of targets.csv."""

import shutil

import numpy as np
import pytest

from unicon_pipeline.dataset import read_task
from unicon_pipeline.errors import CheckpointError, DatasetError
from unicon_pipeline.model_folder import ModelFolder
from unicon_pipeline.phantoms import write_phantom_task
from unicon_pipeline.pretrain import finding_targets, pretrain


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    raw = tmp_path_factory.mktemp("work") / "raw" / "Findings"
    return write_phantom_task(raw, "findings", 5, 2, shape_zyx=(16, 32, 32), spacing_zyx_mm=(20.0, 12.0, 12.0))


def test_pretraining_makes_a_model_folder_that_says_where_it_came_from(task, monkeypatch):
    monkeypatch.setattr("unicon_pipeline.extension_plan.STEPS_PER_EPOCH", 2)
    work = task.parent.parent
    model = pretrain(task, work, work / "model", epochs=1, device="cpu", licence="CC0")
    folder = ModelFolder(model)
    spec = folder.spec()
    assert folder.tasks == () and spec.licence == "CC0"
    assert spec.provenance["training_cases"] == 4 and spec.provenance["steps"] == 2
    assert spec.provenance["validation"]["n"] == 1
    assert all(parameter.isfinite().all() for parameter in folder.foundation().parameters())
    with pytest.raises(CheckpointError, match="already holds a model"):
        pretrain(task, work, work / "model", epochs=1, device="cpu")


def test_targets_are_zero_one_or_blank(task):
    findings, targets = finding_targets(read_task(task))
    assert len(findings) == 7 and len(targets) == 5
    values = np.stack(list(targets.values()))
    assert set(np.unique(values[~np.isnan(values)])) <= {0.0, 1.0}


def test_names_instead_of_zero_and_one_are_refused(task, tmp_path):
    copy = tmp_path / "Findings"
    shutil.copytree(task, copy)
    ids = [line.split(",")[0] for line in (copy / "targets.csv").read_text().splitlines()[1:]]
    rows = [f"{case_id},{'benign' if number % 2 else 'malignant'}" for number, case_id in enumerate(ids)]
    (copy / "targets.csv").write_text("\n".join(["case_id,kind", *rows]))
    with pytest.raises(DatasetError, match=r"column kind holds benign, malignant; .*expects 0, 1 or blank"):
        finding_targets(read_task(copy))
