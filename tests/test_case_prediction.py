"""Case-level tasks at prediction: their region, figures and covariates; what is missing is told and changes no more."""

import csv
import dataclasses
import shutil

import numpy as np
import pytest
import torch

from unicon_pipeline.array_api import predict_array
from unicon_pipeline.case_answers import answers
from unicon_pipeline.case_fit import case_features
from unicon_pipeline.case_prediction import Region, with_own_grids
from unicon_pipeline.case_reading import CaseReading, DescriptorEncoder, Outcome
from unicon_pipeline.clinical import ClinicalEncoder
from unicon_pipeline.dataset import prediction_cases, read_case
from unicon_pipeline.descriptors import describe_region
from unicon_pipeline.extension_plan import HeadPlan
from unicon_pipeline.geometry import Grid, Volume, onto_grid, read_image, read_labels
from unicon_pipeline.model import build_task_model
from unicon_pipeline.model_folder import ModelFolder
from unicon_pipeline.model_record import TaskPlan
from unicon_pipeline.nifti import read_nifti
from unicon_pipeline.predict import predict_folder
from unicon_pipeline.prediction_run import RunReport
from unicon_pipeline.predictor import Options, Predictor, WantedTasks
from unicon_pipeline.prepare import prepare_case
from unicon_pipeline.records import read_record
from unicon_pipeline.verify import compare_probes, probe, verify

FP32 = {"device": "cpu", "precision": "fp32"}
CHANNELS = {0: "CT", 1: "PET"}
ROWS = [{"age": float(age), "sex": sex} for age, sex in zip((40, 50, 60, 70, 80, 55), "MFMFMF")]
FIGURES = [{"volume_ml": 2.0 * n + 1, "suv_max": 3.0 + n, "sphericity": 0.5 + n / 20} for n in range(6)]
OPTIONS = {"units": 8, "attention": 0, "members": 2}


def reading(outcome, inputs=("image", "region", "clinical")):
    return CaseReading(inputs, ClinicalEncoder.fit(ROWS), DescriptorEncoder.fit(FIGURES), outcome)


def add(folder, name, task_type, case, region, logits):
    like, foundation = folder.task_plan("CTPET"), folder.foundation()
    data = dataclasses.replace(
        like.data, task=name, task_type=task_type, labels=None, view="volume", patch_shape_zyx=(16, 32, 32),
        region=region,
    )  # fmt: skip
    head = HeadPlan("fusion_ensemble", logits, OPTIONS | {"columns": len(case.names)})
    extension = dataclasses.replace(
        like.extension, task=name, new_stems=(), reused_stems=like.extension.stems, adapter=None, head=head
    )
    torch.manual_seed(len(name))
    stems = {stem.modality: folder.stem(stem, foundation) for stem in extension.stems}
    model = build_task_model(extension, foundation, stems).eval()
    for weight in model.head.parameters():  # the logits begin near zero
        torch.nn.init.normal_(weight, std=0.3)
    folder.add_task(TaskPlan(data, extension, case=case), model, {"probe": probe(model, data)})


@pytest.fixture(scope="module")
def model(grown, tmp_path_factory):
    path = tmp_path_factory.mktemp("judging") / "model"
    shutil.copytree(grown.model, path)
    folder = ModelFolder(path)
    survival = Outcome("survival", loss="mtlr", edges_days=(100.0, 400.0), horizons_days=(365.0,))
    add(folder, "Risk", "prognosis", reading(survival), "CT", 2)
    grade = Outcome("classes", ("low", "high"), temperature=2.0)
    case = CaseReading(("image", "clinical"), ClinicalEncoder.fit(ROWS), None, grade)
    add(folder, "Grade", "classification", case, None, 2)
    return path


@pytest.fixture(scope="module")
def source(grown, tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    images = grown.raw("CTPET") / "imagesTr"
    for case, channels in (("both", (0, 1)), ("ct", (0,)), ("pet", (1,))):
        for channel in channels:
            shutil.copy(images / f"phantom_0001_{channel:04d}.nii.gz", folder / f"{case}_{channel:04d}.nii.gz")
    (folder / "clinical.csv").write_text("case_id,age,sex\nboth,61,F\npet,200,X\n")
    return folder


@pytest.fixture(scope="module")
def whole(model, source, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, predict_folder(source, out, model, tasks=["CT", "Risk", "Grade"], **FP32)


def rows(out, task):
    with open(out / task / "predictions.csv", newline="") as file:
        return {row.pop("case_id"): row for row in csv.DictReader(file)}


def told(report, case_id, task):
    case = next(case for case in report.cases if case.case_id == case_id)
    return next(" | ".join(run.warnings) for run in case.done if run.task == task)


def test_answers_are_those_of_the_parts_by_hand(model, source, whole):
    out, report = whole
    assert report.exit_code == 0
    case = next(case for case in prediction_cases(source, CHANNELS) if case.case_id == "both")
    folder = ModelFolder(model)
    plan, network = folder.task_plan("Risk"), folder.task_model("Risk", folder.foundation())
    mask = read_labels(out / "CT" / "both.nii.gz")
    assert mask.array_zyx.any()
    images = read_case(case)
    figures = describe_region(mask, {name: read_image(path) for name, path in case.images.items()})
    prepared = prepare_case(dict(images), plan.data, mask)
    assert prepared.labels_zyx.any()
    view, region = torch.from_numpy(prepared.array_czyx), torch.from_numpy(prepared.labels_zyx)
    tokens = case_features(network, view, torch.tensor([True, True]), region)
    row = torch.from_numpy(plan.case.tabular({"age": 61.0, "sex": "F"}, figures))
    logits = network.head.fuse({name: values[None] for name, values in tokens.items()}, row[None])[0]
    expected = answers(plan.case.outcome, logits)
    found = rows(out, "Risk")["both"]
    assert list(found) == list(expected) == list(plan.case.outputs)
    for name, value in expected.items():
        if value is None:
            assert found[name] == ""
        else:
            assert float(found[name]) == pytest.approx(value, rel=1e-3, abs=1e-6)
    grades = rows(out, "Grade")
    assert list(grades) == ["both", "ct", "pet"]
    assert all(float(row["p_low"]) + float(row["p_high"]) == pytest.approx(1, abs=2e-6) for row in grades.values())


def test_the_region_is_found_once_or_unseen_and_the_answers_are_the_same(model, source, whole, tmp_path, monkeypatch):
    out, _ = whole
    labelled, usual = [], Predictor._label
    monkeypatch.setattr(Predictor, "_label", lambda self, *given: labelled.append(given[0]) or usual(self, *given))
    (tmp_path / "CT").mkdir()
    (tmp_path / "CT" / "both.nii.gz").write_text("of another run")
    report = predict_folder(source, tmp_path, model, tasks=["Risk"], **FP32)
    assert labelled == ["CT", "CT"]  # not of the PET alone
    assert rows(tmp_path, "Risk") == rows(out, "Risk")
    assert [[run.task for run in case.done] for case in report.cases] == [["Risk"]] * 3
    assert (tmp_path / "CT" / "both.nii.gz").read_text() == "of another run"
    labelled.clear()
    predictor = Predictor(ModelFolder(model), ["Risk", "CT"], Options(**FP32))
    case = next(case for case in prediction_cases(source, CHANNELS) if case.case_id == "both")
    order = [result.run.task for result in predictor.predict(read_case(case), predictor.tasks, lambda task: None)]
    assert order == ["CT", "Risk"] and labelled == ["CT"]


def test_what_is_missing_is_told_and_changes_nothing_else(grown, model, source, whole, tmp_path):
    out, report = whole
    assert told(report, "both", "Risk") == ""
    assert "no PET" in told(report, "ct", "Risk") and "no row in clinical.csv" in told(report, "ct", "Risk")
    assert "CT needs CT, the case has PET; the middle of the body" in told(report, "pet", "Risk")
    assert "age is 200" in told(report, "pet", "Risk") and "sex is 'x'" in told(report, "pet", "Risk")
    inputs = tmp_path / "in"
    shutil.copytree(source, inputs)
    (inputs / "clinical.csv").unlink()
    second = predict_folder(inputs, tmp_path / "out", model, tasks=["CT", "Risk", "Grade"], **FP32)
    assert second.exit_code == 0 and "no row in clinical.csv" in told(second, "both", "Risk")
    assert rows(tmp_path / "out", "Risk")["both"] != rows(out, "Risk")["both"]
    assert rows(tmp_path / "out", "Risk")["ct"] == rows(out, "Risk")["ct"]
    assert rows(tmp_path / "out", "Grade")["ct"] == rows(out, "Grade")["ct"]
    for path in sorted(out.rglob("*.nii.gz")):
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(out)).read_bytes()


def test_resume_sees_a_changed_row_and_a_lost_table(model, source, tmp_path):
    inputs, out, how = tmp_path / "in", tmp_path / "out", {"tasks": ["Grade"], "resume": True, **FP32}
    shutil.copytree(source, inputs)
    predict_folder(inputs, out, model, part=(0, 2), **how)
    predict_folder(inputs, out, model, part=(1, 2), **how)
    before = rows(out, "Grade")
    assert list(before) == ["both", "ct", "pet"]
    done = read_record(out / "run.json", RunReport).cases
    (inputs / "clinical.csv").write_text("case_id,age,sex\nboth,41,M\npet,200,X\n")
    again = predict_folder(inputs, out, model, **how)
    assert [now == then for now, then in zip(again.cases, done, strict=True)] == [False, True, True]
    after = rows(out, "Grade")
    assert {name for name in after if after[name] != before[name]} == {"both"}
    (out / "Grade" / "predictions.csv").unlink()
    predict_folder(inputs, out, model, **how)
    assert rows(out, "Grade") == after


def test_arrays_give_the_same(model, source, whole):
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    given = {}
    for number, name in CHANNELS.items():
        array, affine = read_nifti(source / f"both_{number:04d}.nii.gz")
        given[name] = (array, to_ras @ affine)
    found = predict_array(given, model, tasks=["Risk"], clinical={"age": 61, "sex": "F"}, **FP32)
    expected = rows(whole[0], "Risk")["both"]
    scores = found["Risk"].scores
    assert {name: "" if value is None else str(round(value, 6)) for name, value in scores.items()} == expected


def test_an_empty_region_is_told_and_leaves_the_middle(model, source, whole, tmp_path, monkeypatch):
    usual = Predictor._label

    def nothing(self, *given):
        result = usual(self, *given)
        empty = Volume(np.zeros_like(result.labels.array_zyx), result.labels.grid)
        return dataclasses.replace(result, labels=empty)

    monkeypatch.setattr(Predictor, "_label", nothing)
    report = predict_folder(source / "both_0000.nii.gz", tmp_path, model, tasks=["Risk"], **FP32)
    assert "CT found nothing; the middle of the body" in told(report, "both", "Risk")
    assert report.exit_code == 0 and rows(tmp_path, "Risk")["both"]["risk"] != rows(whole[0], "Risk")["ct"]["risk"]


def test_figures_are_taken_on_the_grid_that_an_image_came_on(tmp_path):
    grid = Grid((20, 24, 24), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0), tuple(np.eye(3).ravel()))
    coarse = Grid((10, 12, 12), (4.0, 4.0, 4.0), (1.0, 1.0, 1.0), grid.direction)
    ct = Volume(np.random.default_rng(1).normal(0, 50, grid.shape_zyx).astype(np.float32), grid)
    pet = Volume(np.random.default_rng(2).uniform(0, 9, coarse.shape_zyx).astype(np.float32), coarse)
    channels = (("CT", "ct", ct), ("PET", "pet", pet))
    images, own = with_own_grids(channels, keep=True)
    assert own == {"PET": pet} and np.array_equal(images["PET"].array_zyx, onto_grid(pet, grid, 0.0).array_zyx)
    assert with_own_grids(channels, keep=False)[1] == {}
    mask = Volume(np.zeros(grid.shape_zyx, np.uint8), grid)
    mask.array_zyx[4:14, 4:16, 6:18] = 3
    region = Region.of("Tumour", mask, images | own, None)
    assert region.figures["suv_max"] == describe_region(mask, {"PET": pet})["suv_max"]
    assert region.warnings == () and set(np.unique(region.mask.array_zyx)) == {0, 1}
    without = Region.of("Tumour", mask, {"CT": ct}, None)
    assert without.figures["suv_max"] is None and without.figures["volume_ml"] == pytest.approx(11.52)


def test_low_precision_leaves_the_head_in_float32(model):
    predictor = Predictor(ModelFolder(model), ["Risk"], Options("cpu", "bf16"))
    head = predictor._networks["Risk"].head
    assert {tensor.dtype for tensor in head.state_dict().values()} == {torch.float32}
    assert predictor.regions == {"Risk": "CT"} and set(predictor.plans) == {"Risk", "CT"}


def test_a_region_that_no_task_of_the_model_finds_is_told(model, monkeypatch):
    monkeypatch.setattr(ModelFolder, "tasks", ("Risk",))
    wanted = WantedTasks(ModelFolder(model), None)
    assert set(wanted.plans) == {"Risk"} and wanted.alike() == [("Risk",)]
    assert wanted.unusable("CT", ("CT",)) == "is no task of this model" and wanted.unusable("Risk", ("CT",)) is None


def test_the_model_is_verified_with_them_and_a_probe_sees_the_head(model):
    report = verify(model)
    assert report.ok, report.problems
    assert {"Risk: probe output is identical", "CT: probe output is identical"} <= set(report.checked)
    folder = ModelFolder(model)
    network, stored = folder.task_model("Risk", folder.foundation()), folder.card("Risk")["probe"]
    network.head.members[1].skip.weight.add_(0.01)
    assert compare_probes(stored, probe(network, folder.task_plan("Risk").data)).startswith("different")
