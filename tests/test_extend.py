"""Extending: what is trained and what is not, the errors that a user meets, resuming, validation."""

import json
import shutil

import pytest
import torch

from unicon_pipeline.budget import PRESETS
from unicon_pipeline.errors import DatasetError, PlanError
from unicon_pipeline.extend import extend, plan_for
from unicon_pipeline.extension_plan import Schedule
from unicon_pipeline.model_folder import ModelFolder
from unicon_pipeline.phantoms import write_phantom_task
from unicon_pipeline.preprocess import plan_and_preprocess

FEW_STEPS = Schedule(steps=3, minutes=None)


@pytest.fixture
def copy(grown, tmp_path):
    """A work folder of its own: the grown model, and its tasks under new names to add."""
    shutil.copytree(grown.work, tmp_path / "work", ignore=shutil.ignore_patterns("before"))
    work = tmp_path / "work"
    for kind in ("raw", "preprocessed"):
        (work / kind / "CTPET").rename(work / kind / "Again")
    plan = work / "preprocessed" / "Again" / "plan.json"
    plan.write_text(plan.read_text().replace('"task": "CTPET"', '"task": "Again"'))
    return work


def test_the_foundation_and_older_stems_are_not_trained(copy):
    weights = {path: path.read_bytes() for path in (copy / "model").rglob("*.safetensors")}
    result = extend(copy / "raw" / "Again", copy, copy / "model", schedule=FEW_STEPS, device="cpu")
    assert all(path.read_bytes() == before for path, before in weights.items())
    assert result.entry.stems == () and [stem.modality for stem in result.plan.reused_stems] == ["PET"]
    folder = ModelFolder(copy / "model")
    assert folder.tasks == ("CT", "CTPET", "Again")
    plan = folder.task_plan("Again")
    assert plan.extension.reused_stems == folder.task_plan("CTPET").extension.new_stems
    assert not (copy / "preprocessed" / "Again" / "training.safetensors").exists()


def test_training_moves_every_new_part(grown):
    folder = ModelFolder(grown.model)
    trained = folder.task_model("CTPET", folder.foundation())
    assert trained.stems["PET"].gate.abs().max() > 0
    assert all(up.abs().max() > 0 for up in trained.adapter.up)
    card = folder.card("CTPET")
    assert card["training"]["steps"] == 3 and card["validation"]["n"] <= 1
    assert card["data_fingerprint"]["cases"] and card["machine"]["torch"] == torch.__version__


def test_the_same_seed_gives_the_same_bytes(copy):
    heads = []
    for name in ("one", "two"):
        shutil.copytree(copy / "model", copy / name)
        extend(copy / "raw" / "Again", copy, copy / name, schedule=FEW_STEPS, device="cpu", seed=3)
        heads.append((copy / name / "tasks" / "Again" / "weights.safetensors").read_bytes())
    assert heads[0] == heads[1]


def test_a_failure_after_the_training_does_not_cost_it(copy, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(ModelFolder, "add_task", fail)
        with pytest.raises(OSError, match="no space left"):
            extend(copy / "raw" / "Again", copy, copy / "model", schedule=FEW_STEPS, device="cpu")
    monkeypatch.setattr("unicon_pipeline.training.Trainer._train_step", lambda *_: pytest.fail("trained again"))
    assert extend(copy / "raw" / "Again", copy, copy / "model", schedule=FEW_STEPS, device="cpu").training.steps == 3


def test_a_task_is_added_once(grown):
    with pytest.raises(PlanError, match="has the task CT already"):
        extend(grown.raw("CT"), grown.work, grown.model, schedule=FEW_STEPS, device="cpu")


def test_a_task_that_is_not_planned_says_what_to_run(grown, tmp_path):
    with pytest.raises(PlanError, match="Run: unicon_plan_and_preprocess -t CT"):
        extend(grown.raw("CT"), tmp_path, grown.model, schedule=FEW_STEPS)
    with pytest.raises(DatasetError, match="does not exist"):
        extend(tmp_path / "nothing", tmp_path, grown.model, schedule=FEW_STEPS)


def test_a_task_that_changed_since_it_was_planned_is_refused(copy):
    source = copy / "raw" / "Again" / "dataset.json"
    description = json.loads(source.read_text())
    description["labels"]["another"] = 2
    source.write_text(json.dumps(description))
    with pytest.raises(PlanError, match="has changed since Again was planned"):
        plan_for(copy / "raw" / "Again", copy, copy / "model")


def test_another_contract_is_refused(copy):
    path = copy / "preprocessed" / "Again" / "plan.json"
    plan = json.loads(path.read_text())
    plan["foundation"] = "0" * 64
    path.write_text(json.dumps(plan))
    with pytest.raises(PlanError, match="foundation with another contract"):
        plan_for(copy / "raw" / "Again", copy, copy / "model")


def test_a_fold_that_does_not_exist_is_refused(copy):
    with pytest.raises(PlanError, match="folds 0 to 2, or 'all'"):
        plan_for(copy / "raw" / "Again", copy, copy / "model", fold=7)


def test_a_classification_task_is_planned_in_another_way(grown, tmp_path):
    folder = write_phantom_task(tmp_path / "raw" / "Findings", "findings", 3, 1, shape_zyx=(16, 32, 32))
    plan_and_preprocess(folder, tmp_path, ModelFolder(grown.model).spec(), PRESETS["cpu"], processes=1)
    with pytest.raises(PlanError, match="plan_case_extension plans it"):
        plan_for(folder, tmp_path, grown.model)
