"""Prediction: the input's grid, any allowed modalities, old tasks bit for bit, one bad case costs itself only."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk

from unicon_pipeline.errors import CheckpointError, PredictionError
from unicon_pipeline.geometry import read_image
from unicon_pipeline.predict import predict_folder
from unicon_pipeline.prediction_run import Arithmetic, CaseRun, RunRecord, RunReport, TaskRun
from unicon_pipeline.predictor import Options, Predictor, TaskResult, WantedTasks
from unicon_pipeline.records import read_record
from unicon_pipeline.workers import Failure, Workers

predict_module = sys.modules["unicon_pipeline.predict"]  # the package's attribute of that name is callable


def pixels(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.fixture(scope="module")
def after(grown, tmp_path_factory):
    out = tmp_path_factory.mktemp("after")
    images = grown.raw("CTPET") / "imagesTr"
    return out, predict_folder(images, out, grown.model, device="cpu", save_probabilities=True)


def test_the_first_task_is_bit_identical_after_the_second(grown, after):
    out, _ = after
    before = sorted((grown.predictions_before / "CT").rglob("*.nii.gz"))
    assert len(before) == 9
    for path in before:
        now = out / "CT" / path.relative_to(grown.predictions_before / "CT")
        assert np.array_equal(pixels(path), pixels(now)), path.name


def test_output_lies_on_the_grid_of_the_input(grown, after):
    out, report = after
    assert report.exit_code == 0
    for task in ("CT", "CTPET"):
        image = sitk.ReadImage(str(grown.raw("CTPET") / "imagesTr" / "phantom_0001_0000.nii.gz"))
        labels = sitk.ReadImage(str(out / task / "phantom_0001.nii.gz"))
        assert labels.GetSize() == image.GetSize()
        for got, wanted in ((labels.GetSpacing(), image.GetSpacing()), (labels.GetOrigin(), image.GetOrigin())):
            assert got == pytest.approx(wanted, abs=1e-4)
        assert labels.GetDirection() == pytest.approx(image.GetDirection(), abs=1e-6)


def test_probabilities_sum_to_one_and_their_largest_is_the_label(after):
    out, _ = after
    folder = out / "CTPET" / "probabilities"
    background = pixels(folder / "phantom_0002_background.nii.gz")
    lesion = pixels(folder / "phantom_0002_lesion.nii.gz")
    np.testing.assert_allclose(background + lesion, 1.0, atol=1e-5)
    labels = pixels(out / "CTPET" / "phantom_0002.nii.gz")
    clear = np.abs(lesion - background) > 1e-5
    assert np.array_equal((lesion > background)[clear], (labels == 1)[clear])


def test_a_flipped_and_turned_input_gives_the_same_mask_in_its_own_frame(grown, after, tmp_path):
    out, _ = after
    source = sitk.ReadImage(str(grown.raw("CT") / "imagesTr" / "phantom_0001_0000.nii.gz"))
    turned = sitk.DICOMOrient(source, "PRS")
    (tmp_path / "in").mkdir()
    sitk.WriteImage(turned, str(tmp_path / "in" / "turned_0000.nii.gz"))
    predict_folder(tmp_path / "in", tmp_path / "out", grown.model, tasks=["CT"], device="cpu")
    mask = sitk.ReadImage(str(tmp_path / "out" / "CT" / "turned.nii.gz"))
    assert mask.GetSize() == turned.GetSize()
    back = sitk.GetArrayFromImage(sitk.DICOMOrient(mask, "LPS"))
    expected = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(out / "CT" / "phantom_0001.nii.gz")), "LPS"))
    assert np.array_equal(back, expected)


def test_any_part_of_the_modalities_is_a_valid_input(grown, tmp_path):
    images = grown.raw("CTPET") / "imagesTr"
    (tmp_path / "in").mkdir()
    shutil.copy(images / "phantom_0001_0000.nii.gz", tmp_path / "in" / "ct_0000.nii.gz")
    shutil.copy(images / "phantom_0001_0001.nii.gz", tmp_path / "in" / "pet_0001.nii.gz")
    report = predict_folder(tmp_path / "in", tmp_path / "out", grown.model, device="cpu")
    runs = {case.case_id: case for case in report.cases}
    assert {run.task: run.modalities for run in runs["ct"].done} == {"CT": ("CT",), "CTPET": ("CT",)}
    assert {run.task: run.modalities for run in runs["pet"].done} == {"CTPET": ("PET",)}
    assert runs["pet"].skipped == {"CT": "needs CT, the case has PET"}
    assert report.exit_code == 0
    pet = sitk.ReadImage(str(tmp_path / "in" / "pet_0001.nii.gz"))
    assert sitk.ReadImage(str(tmp_path / "out" / "CTPET" / "pet.nii.gz")).GetSize() == pet.GetSize()
    written = json.loads((tmp_path / "out" / "run.json").read_text())
    assert written["model"] and written["versions"]["torch"] and written["cases"][0]["done"][0]["seconds"] > 0


def test_one_bad_case_is_named_and_the_others_are_written(grown, tmp_path):
    images = grown.raw("CTPET") / "imagesTr"
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    for case, channels in (("broken", (0, 1)), ("ctonly", (0,)), ("full", (0, 1))):
        for channel in channels:
            shutil.copy(images / f"phantom_0002_{channel:04d}.nii.gz", inputs / f"{case}_{channel:04d}.nii.gz")
    whole = (inputs / "broken_0000.nii.gz").read_bytes()
    (inputs / "broken_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    (out / "CT").mkdir(parents=True)
    (out / "CT" / "broken.nii.gz").write_bytes(b"from an earlier run")
    report = predict_folder(inputs, out, grown.model, device="cpu")
    assert report.exit_code == 1
    failures = {case.case_id: case.failure for case in report.cases if case.failure}
    assert list(failures) == ["broken"] and "broken_0000.nii.gz" in failures["broken"]
    assert sorted(path.name for path in (out / "CTPET").glob("*.nii.gz")) == ["ctonly.nii.gz", "full.nii.gz"]
    assert not (out / "CT" / "broken.nii.gz").exists(), "a stale mask must not look like a result"
    assert "broken FAILED" in report.summary()


def test_channels_that_tasks_number_differently_must_be_named(grown):
    predictor = Predictor.__new__(Predictor)
    plans = {name: type("Plan", (), {"modalities": m}) for name, m in (("A", ("CT",)), ("B", ("PET", "CT")))}
    predictor.plans = plans
    with pytest.raises(PredictionError, match="Channel 0000 is CT in one of the tasks and PET in B"):
        predictor.channel_names()


def test_unknown_task_and_empty_model_are_refused(grown, tmp_path):
    images = grown.raw("CT") / "imagesTr"
    with pytest.raises(CheckpointError, match="no task 'Liver'"):
        predict_folder(images, tmp_path, grown.model, tasks=["Liver"], device="cpu")


def test_mirroring_is_done_and_recorded(grown, after, tmp_path):
    out, _ = after
    source = grown.raw("CT") / "imagesTr" / "phantom_0003_0000.nii.gz"
    report = predict_folder(
        source, tmp_path, grown.model, tasks=["CT"], device="cpu", precision="fp32", tta=True, save_probabilities=True
    )
    assert report.asked["tta"]
    name = "probabilities/phantom_0003_lesion.nii.gz"
    one, other = read_image(out / "CT" / name).array_zyx, read_image(tmp_path / "CT" / name).array_zyx
    assert np.abs(one - other).max() > 0


def test_a_pet_that_is_not_in_suv_is_refused(grown, tmp_path):
    pet = sitk.ReadImage(str(grown.raw("CTPET") / "imagesTr" / "phantom_0001_0001.nii.gz"))
    (tmp_path / "in").mkdir()
    sitk.WriteImage(pet * 4000.0, str(tmp_path / "in" / "bq_0001.nii.gz"))
    report = predict_folder(tmp_path / "in", tmp_path / "out", grown.model, tasks=["CTPET"], device="cpu")
    assert report.exit_code == 2
    assert "bq_0001.nii.gz" in report.cases[0].failure and "SUV" in report.cases[0].failure


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_processes_side_by_side_give_the_same_files(grown, after, tmp_path, caplog):
    out, report = after
    caplog.set_level("INFO", "unicon_pipeline")
    inputs = shutil.copytree(grown.raw("CTPET") / "imagesTr", tmp_path / "in")
    shutil.copy(inputs / "phantom_0001_0001.nii.gz", inputs / "pet_0001.nii.gz")
    (inputs / "broken_0000.nii.gz").write_bytes(b"no image")
    with Workers(2) as workers:
        side_by_side = predict_folder(
            inputs, tmp_path / "out", grown.model, device="cpu", save_probabilities=True, workers=workers
        )
    assert side_by_side.exit_code == 1
    assert [case.case_id for case in side_by_side.cases] == ["broken", "pet", *(case.case_id for case in report.cases)]
    assert (side_by_side.precision, side_by_side.machine) == (report.precision, report.machine)
    assert side_by_side.other_machines == ()
    expected = {path: content for path, content in contents(out).items() if path.suffix == ".gz"}
    found = contents(tmp_path / "out")
    assert len(expected) == 18 and {path: found[path] for path in expected} == expected
    for message in ("broken failed: ", "pet: CT is skipped: it needs CT, the case has PET"):
        assert message in caplog.text


class StandIn(WantedTasks):
    """Two tasks that judge a whole case, without a network."""

    tasks = ("A", "B")
    plans = {task: SimpleNamespace(labels=None) for task in tasks}
    task_plans = {}

    def __init__(self):
        pass

    def unusable(self, task, modalities):
        return "does not want it" if (task, modalities.keys()) == ("B", {"PET"}) else None

    def predict(self, images, tasks, probabilities_in, beside):
        for task in tasks:
            yield TaskResult(TaskRun(task, ("CT",), 0.0, ()), scores={"x": 1 / 3, "y": 1.0})

    def arithmetic(self):
        return Arithmetic("float32", {"device": "cpu"})


class Backwards(Workers):
    """Ends the cases last to first, and is killed at the last."""

    in_process = False

    def each(self, function, items, *shared, at_most=None):
        yield items[-1], Failure("its process was killed")
        for item in reversed(items[:-1]):
            yield item, function(item, *shared)


def test_tables_and_reports_are_in_the_order_of_the_cases_whatever_ends_first(grown, tmp_path, monkeypatch):
    monkeypatch.setattr(predict_module, "_predictor", lambda job: StandIn())
    monkeypatch.setattr(predict_module, "WantedTasks", lambda folder, tasks: StandIn())
    monkeypatch.setattr(StandIn, "channel_names", lambda self: {0: "CT", 1: "PET"})
    ct, pet = sorted((grown.raw("CTPET") / "imagesTr").iterdir())[:2]
    (tmp_path / "in").mkdir()
    for number in range(4):
        shutil.copy(pet if number == 2 else ct, tmp_path / "in" / f"case{number}_{int(number == 2):04d}.nii.gz")
    (tmp_path / "B").mkdir()
    (tmp_path / "B" / "predictions.csv").write_text("from an earlier run")
    report = predict_folder(tmp_path / "in", tmp_path, grown.model, workers=Backwards())
    assert [case.case_id for case in report.cases] == ["case0", "case1", "case2", "case3"]
    assert report.cases[3].failure == "its process was killed" and report.cases[3].done == ()
    tables = {task: (tmp_path / task / "predictions.csv").read_text().splitlines() for task in "AB"}
    assert tables["A"] == ["case_id,x,y", *(f"case{i},0.333333,1.0" for i in range(3))]
    assert tables["B"] == ["case_id,x,y", *(f"case{i},0.333333,1.0" for i in range(2))]


def test_nothing_of_a_case_is_left_where_its_process_was_killed(tmp_path):
    plan = SimpleNamespace(labels=SimpleNamespace(names=("lesion",)))
    probabilities = tmp_path / "T" / "probabilities"
    probabilities.mkdir(parents=True)
    for name in ("a.nii.gz", ".12.partial.a.nii.gz", "ba.nii.gz", ".12.partial.ba.nii.gz"):
        (tmp_path / "T" / name).touch()
    (probabilities / ".7.partial.a_lesion.nii.gz").touch()
    predict_module._Output(tmp_path, {"T": plan}).clear("a", half_written=True)
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert left == [".12.partial.ba.nii.gz", "ba.nii.gz"]


def test_a_model_that_was_extended_meanwhile_is_refused(grown):
    with pytest.raises(CheckpointError, match="is not the model that this run began with"):
        predict_module._load(grown.model, "another", ("CT",), Options("cpu"))


@pytest.fixture
def three(grown, tmp_path):
    """Three CTs to predict."""
    folder = tmp_path / "in"
    folder.mkdir()
    for path in sorted((grown.raw("CT") / "imagesTr").glob("*_0000.nii.gz")):
        shutil.copy(path, folder)
    return folder


def times(out):
    return {path.name: path.stat().st_mtime_ns for path in (out / "CT").glob("*.nii.gz")}


def test_resume_predicts_only_what_is_missing_changed_or_failed(grown, three, tmp_path):
    def run(**how):
        return predict_folder(three, tmp_path / "out", grown.model, tasks=["CT"], device="cpu", resume=True, **how)

    broken = three / "phantom_0002_0000.nii.gz"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    assert run().exit_code == 1
    before = times(tmp_path / "out")
    assert sorted(before) == ["phantom_0001.nii.gz", "phantom_0003.nii.gz"]
    broken.write_bytes(whole)
    (tmp_path / "out" / "CT" / "phantom_0003.nii.gz").write_bytes(b"damaged")
    report = run()
    assert report.exit_code == 0 and len(report.cases) == 3
    after = times(tmp_path / "out")
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"phantom_0002.nii.gz", "phantom_0003.nii.gz"}
    run(tta=True)
    assert all(after[name] != now for name, now in times(tmp_path / "out").items()), "other options are another result"


def test_two_parts_share_an_output_folder(grown, three, tmp_path):
    out = tmp_path / "out"
    reports = [
        predict_folder(three, out, grown.model, tasks=["CT"], device="cpu", part=(number, 2)) for number in range(2)
    ]
    assert [[case.case_id[-1] for case in report.cases] for report in reports] == [["1", "3"], ["2"]]
    written = read_record(out / "run.json", RunReport)
    assert [case.case_id[-1] for case in written.cases] == ["1", "2", "3"]
    assert len(times(out)) == 3


def test_machines_that_differ_are_recorded(tmp_path):
    record = RunRecord(tmp_path, "model", ("T",), {}, ["a", "b", "c"])
    record.begin(keep=False)
    for case_id, threads in (("a", 1), ("c", 1), ("b", 2)):
        run = CaseRun(case_id, ("CT",), (), {}, None)
        record.add(run, Arithmetic("float32", {"threads": threads}))
    report = record.report(["a", "b", "c"])
    assert [case.case_id for case in report.cases] == ["a", "b", "c"]
    assert report.machine == {"threads": 1} and report.other_machines == (Arithmetic("float32", {"threads": 2}),)


def test_a_case_that_cannot_fit_the_memory_is_refused_beforehand(grown, three, tmp_path, monkeypatch):
    monkeypatch.setattr("unicon_pipeline.predictor.free_megabytes", lambda: 0.001)
    report = predict_folder(three, tmp_path / "out", grown.model, tasks=["CT"], device="cpu")
    assert report.exit_code == 2
    assert "CT needs at least 0.0 GB for this case, and 0.0 GB of memory are free" in report.cases[0].failure


@pytest.mark.skipif(os.name != "posix", reason="sends an interrupt")
def test_interrupted_it_leaves_no_half_file_and_resumes(grown, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number in range(60):
        for path in sorted((grown.raw("CT") / "imagesTr").glob("phantom_0001_*")):
            (source / path.name.replace("phantom_0001", f"case_{number:02d}")).symlink_to(path)
    script, model = str(Path(sys.executable).with_name("unicon_predict")), str(grown.model)
    command = [script, "-i", str(source), "-o", str(out), "-m", model, "-t", "CT", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(out.glob("CT/case_*.nii.gz")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and told.endswith("interrupted\n"), told
    assert not [path for path in out.rglob("*") if "partial" in path.name]
    done = sorted(out.glob("CT/*.nii.gz"))
    assert 0 < len(done) < 60 and len({path.read_bytes() for path in done}) == 1
    assert subprocess.run([*command, "--resume", "--quiet"]).returncode == 0
    every = [path.read_bytes() for path in out.glob("CT/*.nii.gz")]
    assert len(every) == 60 and len(set(every)) == 1
