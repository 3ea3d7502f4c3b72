"""Case-level tasks, from a task folder to a grown model: through the command lines, on phantoms."""

import csv
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL

from unicon_pipeline.case_answers import answers
from unicon_pipeline.case_extend import extend_case, plan_case
from unicon_pipeline.case_plan import CaseOptions
from unicon_pipeline.case_regions import find_regions
from unicon_pipeline.cli import main_extend, main_info, main_plan_and_preprocess, main_verify
from unicon_pipeline.dataset import read_task
from unicon_pipeline.errors import PlanError
from unicon_pipeline.model_folder import ModelFolder
from unicon_pipeline.phantoms import write_phantom_task
from unicon_pipeline.store import open_case
from unicon_pipeline.training import Trainer
from unicon_pipeline.verify import verify

CASES = 16
QUICK = CaseOptions(repeats=1, epochs=2)
UNLABELLED = "phantom_0002"


@pytest.fixture(scope="module")
def work(grown, tmp_path_factory):
    """The grown model, and a prognosis task (one case without labels) and a classification task, preprocessed."""
    work = tmp_path_factory.mktemp("case level") / "work"
    shutil.copytree(grown.work / "model", work / "model")
    write_phantom_task(work / "raw/Surv", "survival", CASES, 3, modalities=("CT", "PET"), region="CTPET", **SMALL)
    (work / f"raw/Surv/labelsTr/{UNLABELLED}.nii.gz").unlink()
    write_phantom_task(work / "raw/Finds", "findings", CASES, 4, **SMALL)
    tasks = ("-t", "Surv", "Finds")
    assert main_plan_and_preprocess([*tasks, "-w", str(work), "--device", "cpu", "--folds", "3", "--quiet"]) == 0
    return work


@pytest.fixture
def copy(work, tmp_path):
    shutil.copytree(work, tmp_path / "work")
    return tmp_path / "work"


def run(work, task, *more):
    given = ("-t", task, "-w", str(work), "--device", "cpu", "--quiet", "--repeats", "1", "--epochs", "2", *more)
    return main_extend(list(given))


def test_two_tasks_join_the_model_and_change_nothing_of_it(copy, capsys):
    files = [path for path in (copy / "model").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files if path.name not in ("model.json", ".lock")}
    assert run(copy, "Surv") == 0
    shown = capsys.readouterr().out
    assert "Harrell's C" in shown and "volume_suv" in shown and "best simple model" in shown
    assert run(copy, "Finds", "--fold", "0") == 0
    assert "calib. error" in capsys.readouterr().out
    assert all(path.read_bytes() == data for path, data in before.items())
    assert verify(copy / "model").ok and main_verify(["-w", str(copy)]) == 0
    assert main_info(["-w", str(copy)]) == 0
    assert "reads image, region, clinical around CTPET" in capsys.readouterr().out
    with open(copy / "model/tasks/Surv/out_of_fold.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == CASES and {"case_id", "risk"} <= set(rows[0])
    assert (copy / "preprocessed/Surv/out_of_fold.csv").is_file()


def test_what_is_kept_gives_the_answers_of_the_whole_model(copy):
    extend_case(copy / "raw/Surv", copy, copy / "model", options=QUICK, device="cpu")
    folder = ModelFolder(copy / "model")
    plan, model = folder.task_plan("Surv"), folder.task_model("Surv", folder.foundation())
    case, task = open_case(copy / "preprocessed/Surv/cases", "phantom_0001"), read_task(copy / "raw/Surv")
    (row,) = task.clinical.rows_of(["phantom_0001"])
    tabular = torch.from_numpy(plan.case.tabular(row, case.meta["descriptors"]))[None]
    region = torch.from_numpy(case.labels[:])[None]
    image, present = torch.from_numpy(case.array[:])[None], torch.ones(1, 2, dtype=torch.bool)
    logits = model(image, present, tabular_bd=tabular, region_bzyx=region)
    found = answers(plan.case.outcome, logits[0].detach())
    assert tuple(found) == plan.case.outputs and found["risk"] is not None
    assert [stem.modality for stem in plan.extension.reused_stems] == ["PET"] and not plan.extension.new_stems
    survival = [value for name, value in found.items() if name.startswith("survival_")]
    assert np.all(np.diff(survival) <= 0) and 0 <= min(survival) <= max(survival) <= 1


@pytest.mark.parametrize("loss", ["cox", "deephit"])
def test_other_losses(copy, loss):
    options = CaseOptions(loss=loss, epochs=1)
    result = extend_case(copy / "raw/Surv", copy, copy / "model", options=options, fold=1, device="cpu")
    outcome = ModelFolder(copy / "model").task_plan("Surv").case.outcome
    assert outcome.loss == loss and (outcome.baseline is not None) == (loss == "cox")
    assert result.validation["how"] == "fold 1" and result.validation["n"] == len(result.plan.validation_cases)


def test_without_the_image_the_encoder_is_not_asked(copy, monkeypatch):
    monkeypatch.setattr("unicon_pipeline.model.TaskModel.features", lambda *_: pytest.fail("it was asked"))
    monkeypatch.setattr("unicon_pipeline.case_extend.probe", lambda *_: {})
    options = CaseOptions(inputs=("clinical",), epochs=1)
    result = extend_case(copy / "raw/Surv", copy, copy / "model", options=options, fold=0, device="cpu")
    assert result.plan.head.options["image"] == 0 and result.plan.stems == ()


def test_held_out_cases_do_not_change_what_is_learned(copy):
    """The same training cases, other outcomes of those held out: the same weights."""
    weights = []
    for name, flip in (("one", False), ("two", True)):
        shutil.copytree(copy / "model", copy / name)
        if flip:
            *_, extension, _ = plan_case(copy / "raw/Surv", copy, copy / name, options=QUICK, fold=0, seed=0)
            path = copy / "raw/Surv/targets.csv"
            held, lines = extension.validation_cases, path.read_text().splitlines()
            changed = [line.split(",")[0] + ",77.0,1" if line.startswith(held) else line for line in lines]
            path.write_text("\n".join(changed))
        extend_case(copy / "raw/Surv", copy, copy / name, options=QUICK, fold=0, device="cpu")
        weights.append((copy / name / "tasks/Surv/weights.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_with_an_adapter_all_is_trained_end_to_end_and_a_cut_run_goes_on(copy, monkeypatch):
    few = {"modalities": ("CT", "PET"), "region": "CTPET", "shape_zyx": (16, 32, 32), "spacing_zyx_mm": (20, 12, 12)}
    write_phantom_task(copy / "raw/Few", "survival", 9, 3, **few)
    given = ("-t", "Few", "-w", str(copy), "--device", "cpu", "--folds", "3", "--quiet")
    assert main_plan_and_preprocess(given) == 0
    kept = {path: path.read_bytes() for path in (copy / "model").rglob("*.safetensors")}
    options = CaseOptions(epochs=1, adapter_rank=2, adapter_epochs=1)
    how = {"options": options, "device": "cpu", "precision": "fp32"}
    trained, train = [], Trainer._train_step

    def step(trainer, batch, fraction):
        trained.append(batch["case_ids"])
        if len(trained) == 2:  # in the second fold
            raise KeyboardInterrupt
        return train(trainer, batch, fraction)

    monkeypatch.setattr(Trainer, "_train_step", step)
    monkeypatch.setattr("unicon_pipeline.case_training.usual_workers", lambda: 0)
    with pytest.raises(KeyboardInterrupt):
        extend_case(copy / "raw/Few", copy, copy / "model", **how)
    result = extend_case(copy / "raw/Few", copy, copy / "model", **how)
    assert [len(step) for step in trained] == [6, 6, 6, 6, result.plan.schedule.accumulate], "none is trained twice"
    assert (result.plan.adapter.rank, result.plan.adapter.alpha, result.plan.schedule.learning_rate) == (2, 32.0, 3e-4)
    assert result.validation["how"] == "1 x 3 folds, out of fold" and result.validation["n"] == 9
    assert all(path.read_bytes() == data for path, data in kept.items())
    folder = ModelFolder(copy / "model")
    model = folder.task_model("Few", folder.foundation())
    assert any(bool(up.any()) for up in model.adapter.up) and verify(copy / "model").ok
    assert not (copy / "preprocessed/Few/trainings").exists()


def test_an_adapter_needs_an_image_and_its_plan_tells_the_cost(copy, capsys):
    more = ("--adapter-rank", "2", "--dry-run")
    assert run(copy, "Surv", *more, "--inputs", "clinical") == 2
    assert "judged without one" in capsys.readouterr().err
    assert run(copy, "Surv", *more, "--minutes", "8") == 0
    shown = capsys.readouterr().out
    assert "rank 2, alpha 32" in shown and "4 trainings that compute 96 cases, cut at 8 minutes" in shown


def test_held_out_cases_do_not_change_the_temperature(copy):
    shutil.copytree(copy / "model", copy / "other")
    how = {"options": QUICK, "fold": 0, "device": "cpu"}
    result = extend_case(copy / "raw/Finds", copy, copy / "model", **how)
    path, swapped = copy / "raw/Finds/targets.csv", {"0": "1", "1": "0"}
    lines = [line.split(",") for line in path.read_text().splitlines()]
    held = result.plan.validation_cases
    changed = [[c, *(swapped[v] for v in values)] if c in held else [c, *values] for c, *values in lines]
    path.write_text("\n".join(map(",".join, changed)))
    extend_case(copy / "raw/Finds", copy, copy / "other", **how)
    one, two = (ModelFolder(copy / name).task_plan("Finds").case.outcome for name in ("model", "other"))
    assert changed != lines and one.temperature == two.temperature != 1.0


def test_a_modality_that_the_model_cannot_read_is_left_out_and_told(copy, tmp_path, capsys):
    assert run(copy, "Surv", "-m", str(tmp_path / "new"), "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "image of PET" in shown and "left out" in shown and not (tmp_path / "new").exists()


def test_a_region_without_labels_needs_the_task_that_finds_it(copy, tmp_path):
    task = read_task(copy / "raw/Surv")
    assert list(find_regions(task, copy, copy / "model", "cpu")) == [UNLABELLED]
    with pytest.raises(PlanError, match=r"1 of its cases have no labels.*no task CTPET.*none yet"):
        find_regions(task, copy, tmp_path / "empty")


@pytest.mark.parametrize(
    "task, more, message",
    [
        ("Finds", ("--inputs", "clinical"), "clinical.csv has no row"),
        ("Finds", ("--inputs", "region"), "names no region"),
        ("Surv", ("--fold", "9"), "folds 0 to 2"),
    ],
)
def test_what_cannot_be_done_is_told(work, capsys, task, more, message):
    assert run(work, task, *more) == 2
    assert message in capsys.readouterr().err
