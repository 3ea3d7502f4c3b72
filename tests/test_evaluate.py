"""Whole evaluations of small task folders; the numbers are held against SimpleITK's and NumPy's."""

import json
import math
import os
import signal
from dataclasses import dataclass, replace

import numpy as np
import pytest
import SimpleITK as sitk

import unicon_pipeline.evaluate as module
from unicon_pipeline.dataset import read_task
from unicon_pipeline.errors import DatasetError, PredictionError, UniconError
from unicon_pipeline.evaluate import Evaluation, evaluate, format_evaluation
from unicon_pipeline.metrics import surface_scores
from unicon_pipeline.records import read_record

SHAPE = (10, 24, 28)
SPACING = (4.0, 1.5, 1.0)
BINARY = {"background": 0, "tumour": 1}


def blob(start, stop, value=1, onto=None):
    array = np.zeros(SHAPE, np.int16) if onto is None else onto.copy()
    array[tuple(slice(a, b) for a, b in zip(start, stop))] = value
    return array


score_case = module._score_case
TUMOUR = blob((2, 6, 6), (7, 16, 18))
EMPTY = np.zeros(SHAPE, np.int16)


def save(path, array, spacing=SPACING, origin_xyz=(-10.0, 20.0, 30.0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin(origin_xyz)
    sitk.WriteImage(image, str(path))


def make_task(folder, references, labels=BINARY, held_out=(), **extra):
    """A task folder; `references`: case -> label array, None for a held-out case without one."""
    for case_id, array in references.items():
        kind = "Ts" if case_id in held_out else "Tr"
        save(folder / f"images{kind}" / f"{case_id}_0000.nii.gz", np.full(SHAPE, -500, np.int16))
        if array is not None:
            save(folder / f"labels{kind}" / f"{case_id}.nii.gz", array)
    description = {
        "channel_names": {"0": "CT"},
        "labels": labels,
        "numTraining": len(references) - len(held_out),
        "file_ending": ".nii.gz",
        **extra,
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return read_task(folder)


def predict(folder, arrays):
    for case_id, array in arrays.items():
        save(folder / f"{case_id}.nii.gz", array)
    return folder


def overlap(prediction, reference):
    filtered = sitk.LabelOverlapMeasuresImageFilter()
    filtered.Execute(*(sitk.GetImageFromArray(mask.astype(np.uint8)) for mask in (prediction, reference)))
    return filtered.GetDiceCoefficient(1)


@pytest.fixture
def four(tmp_path):
    """Four cases of three patients, predicted with growing errors."""
    task = make_task(
        tmp_path / "Dataset001_Lesion",
        {f"case_{i}": TUMOUR for i in range(4)},
        patients={"case_0": "anna", "case_1": "anna", "case_2": "bert", "case_3": "carl"},
    )
    arrays = {f"case_{i}": np.roll(TUMOUR, (i // 2, i), (0, 2)) for i in range(4)}
    return task, predict(tmp_path / "out put", arrays), arrays


def test_scores_of_every_case(four):
    task, predictions, arrays = four
    result = evaluate(task, predictions, tolerance_mm=1.0)
    assert [case.case_id for case in result.cases] == sorted(arrays)
    for case in result.cases:
        scores, mask = case.outputs["tumour"], arrays[case.case_id] == 1
        assert scores.dice == pytest.approx(overlap(mask, TUMOUR == 1), abs=1e-12)
        # The evaluation crops; the metric on the whole arrays is the same.
        assert (scores.nsd, scores.hd95_mm) == surface_scores(mask, TUMOUR == 1, SPACING, 1.0)
        assert scores.reference_ml == pytest.approx(5 * 10 * 12 * math.prod(SPACING) / 1000)
        assert not case.held_out
    assert result.cases[0].outputs["tumour"].dice == result.cases[0].outputs["tumour"].nsd == 1.0
    # One slice of 4 mm, three voxels of 1 mm.
    assert result.cases[3].outputs["tumour"].hd95_mm == pytest.approx(4.0)
    assert result.cases[1].outputs["tumour"].nsd == 1.0 > result.cases[2].outputs["tumour"].nsd


def test_summaries_are_over_cases_and_their_interval_over_patients(four):
    task, predictions, _ = four
    result = evaluate(task, predictions)
    values = [case.outputs["tumour"].dice for case in result.cases]
    summary = result.outputs["tumour"]["dice"]
    assert (summary.mean, summary.median) == (pytest.approx(np.mean(values)), pytest.approx(np.median(values)))
    assert (summary.n, summary.n_undefined, result.patients) == (4, 0, 3)
    # Drawn three times, the same patient gives the outer bounds: anna has the best two cases, carl the worst.
    assert summary.low == pytest.approx(values[3])
    assert summary.high == pytest.approx(np.mean(values[:2]))
    assert result.overall["dice"] == summary
    assert evaluate(task, predictions, seed=0) == result


def test_the_record_on_disk_is_the_result(four):
    task, predictions, _ = four
    result = evaluate(task, predictions)
    assert read_record(predictions / "evaluation.json", Evaluation) == result
    assert json.loads((predictions / "evaluation.json").read_text())["schema_version"] == 1
    assert sorted(path.name for path in predictions.iterdir()) == [
        *(f"case_{i}.nii.gz" for i in range(4)),
        "evaluation.json",
    ]


def test_regions_are_unions_of_their_values(tmp_path):
    labels = {"background": 0, "whole": [1, 2, 5], "core": [2, 5], "rim": 1}
    reference = blob((3, 8, 8), (6, 14, 14), 2, blob((2, 6, 6), (8, 18, 20)))
    reference[4, 10, 10] = 5
    prediction = blob((4, 8, 8), (7, 14, 14), 2, blob((2, 6, 7), (8, 18, 21)))
    task = make_task(tmp_path / "Dataset002_Regions", {"a": reference}, labels, regions_class_order=[1, 5, 2])
    scores = evaluate(task, predict(tmp_path / "out", {"a": prediction})).cases[0].outputs
    assert set(scores) == {"whole", "core", "rim"}
    for name, values in (("whole", (1, 2, 5)), ("core", (2, 5)), ("rim", (1,))):
        masks = np.isin(prediction, values), np.isin(reference, values)
        assert scores[name].dice == pytest.approx(overlap(*masks), abs=1e-12), name
        assert (scores[name].nsd, scores[name].hd95_mm) == surface_scores(*masks, SPACING, 2.0), name
        assert scores[name].prediction_ml == pytest.approx(masks[0].sum() * math.prod(SPACING) / 1000)


def test_ignored_voxels_count_for_neither_side(tmp_path):
    ignored = blob((0, 0, 12), SHAPE, 2, TUMOUR)
    task = make_task(tmp_path / "Dataset003_Ignore", {"a": ignored, "b": ignored}, {**BINARY, "ignore": 2})
    wild = blob((0, 0, 14), (9, 20, 27), 1, TUMOUR)
    result = evaluate(task, predict(tmp_path / "out", {"a": wild, "b": np.where(ignored == 2, 2, ignored)}))
    for case in result.cases:
        assert case.outputs["tumour"].dice == case.outputs["tumour"].nsd == 1.0
        assert case.outputs["tumour"].prediction_ml == pytest.approx(5 * 10 * 6 * math.prod(SPACING) / 1000)
    stray = blob((0, 0, 0), (1, 1, 1), 2, TUMOUR)
    with pytest.raises(PredictionError, match=r"label values \[2\]"):
        evaluate(task, predict(tmp_path / "stray", {"a": stray}))


def test_empty_masks_are_counted_not_averaged(tmp_path):
    task = make_task(tmp_path / "Dataset004_Empty", {"both": EMPTY, "found": EMPTY, "missed": TUMOUR, "good": TUMOUR})
    arrays = {"both": EMPTY, "found": TUMOUR, "missed": EMPTY, "good": TUMOUR}
    result = evaluate(task, predict(tmp_path / "out", arrays))
    scores = {case.case_id: case.outputs["tumour"] for case in result.cases}
    assert (scores["both"].dice, scores["both"].nsd, scores["both"].hd95_mm) == (None, None, None)
    for name in ("found", "missed"):
        assert (scores[name].dice, scores[name].nsd, scores[name].hd95_mm) == (0.0, 0.0, None)
    assert (scores["missed"].prediction_ml, scores["found"].reference_ml) == (0.0, 0.0)
    summary = result.outputs["tumour"]
    assert (summary["dice"].n, summary["dice"].n_undefined) == (3, 1)
    assert summary["dice"].mean == summary["nsd"].mean == pytest.approx(1 / 3)
    assert (summary["hd95_mm"].mean, summary["hd95_mm"].n, summary["hd95_mm"].n_undefined) == (0.0, 1, 3)
    assert "dice 1, nsd 1, hd95_mm 3" in format_evaluation(result)


def test_overall_is_over_each_cases_mean_of_its_defined_outputs(tmp_path):
    labels = {"background": 0, "left": 1, "right": 2}
    both = blob((2, 6, 20), (7, 16, 24), 2, TUMOUR)
    task = make_task(tmp_path / "Dataset005_Pair", {"a": both, "b": TUMOUR}, labels)
    result = evaluate(task, predict(tmp_path / "out", {"a": np.roll(both, 1, 1), "b": TUMOUR}))
    a = result.cases[0].outputs
    mean_a = (a["left"].dice + a["right"].dice) / 2
    assert 0 < mean_a < 1
    assert result.overall["dice"].mean == pytest.approx((mean_a + 1.0) / 2)
    assert result.outputs["right"]["dice"].n_undefined == 1


def test_bad_cases_are_named_and_the_others_evaluated(tmp_path):
    names = ("cut", "foreign", "good", "moved", "rounded", "smaller")
    task = make_task(tmp_path / "Dataset006_Bad", {name: TUMOUR for name in names})
    out = predict(tmp_path / "out", {"cut": TUMOUR, "good": TUMOUR, "foreign": TUMOUR * 7, "smaller": TUMOUR[1:]})
    whole = (out / "cut.nii.gz").read_bytes()
    (out / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    save(out / "moved.nii.gz", TUMOUR, origin_xyz=(-9.0, 20.0, 30.0))
    save(out / "rounded.nii.gz", TUMOUR, origin_xyz=(-10.001, 20.001, 30.0))
    result = evaluate(task, out)
    assert [case.case_id for case in result.cases] == ["good", "rounded"]
    assert result.outputs["tumour"]["dice"].mean == 1.0
    assert set(result.failed) == {"cut", "foreign", "moved", "smaller"}
    for case_id, why in result.failed.items():
        assert f"{case_id}.nii.gz" in why
    assert "[7]" in result.failed["foreign"] and "tumour = 1" in result.failed["foreign"]
    assert "1 mm apart" in result.failed["moved"] and "labelsTr" in result.failed["moved"]
    assert "(9, 24, 28) and (10, 24, 28)" in result.failed["smaller"]
    assert "Failed: cut" in format_evaluation(result)
    (out / "evaluation.json").unlink()
    with pytest.raises(PredictionError, match=r"None of the 2(.|\n)*foreign: (.|\n)*moved: "):
        evaluate(task, out, case_ids=["moved", "foreign"])
    assert not (out / "evaluation.json").exists()


def test_held_out_missing_and_unmatched_cases(tmp_path):
    references = {"a": TUMOUR, "b": TUMOUR, "x": TUMOUR, "y": TUMOUR, "z": None}
    task = make_task(tmp_path / "Dataset007_Held", references, held_out=("x", "y", "z"))
    out = predict(tmp_path / "out", {name: TUMOUR for name in ("a", "x", "z", "stranger")})
    (out / ".123.partial.b.nii.gz").write_bytes(b"")
    result = evaluate(task, out)
    assert {case.case_id: case.held_out for case in result.cases} == {"a": False, "x": True}
    assert result.missing == ("b", "y")
    assert result.unmatched == ("stranger", "z")
    text = format_evaluation(result)
    assert "1 of them held out" in text and "mixed" in text
    assert "2 reference without prediction: b, y" in text
    only = evaluate(task, out, case_ids=["y", "x"])
    assert [case.case_id for case in only.cases] == ["x"] and only.missing == ("y",)
    assert only.unmatched == result.unmatched
    assert "mixed" not in format_evaluation(only)
    with pytest.raises(DatasetError, match="no reference labels for nobody, z"):
        evaluate(task, out, case_ids=["nobody", "a", "z"])


def test_several_processes_give_the_same(four):
    task, predictions, _ = four
    (predictions / "case_1.nii.gz").write_bytes(b"not an image")
    alone = evaluate(task, predictions)
    assert evaluate(task, predictions, processes=2) == alone
    assert set(alone.failed) == {"case_1"} and len(alone.cases) == 3


def killed_at_case_2(job):
    if job.case.case_id == "case_2":
        os.kill(os.getpid(), signal.SIGKILL)
    return score_case(job)


def test_a_killed_worker_costs_its_own_case_only(four, monkeypatch):
    task, predictions, _ = four
    expected = evaluate(task, predictions, case_ids=["case_0", "case_1", "case_3"])
    monkeypatch.setattr(module, "_score_case", killed_at_case_2)
    result = evaluate(task, predictions, processes=2)
    assert set(result.failed) == {"case_2"}
    assert "killed" in result.failed["case_2"]
    assert result.cases == expected.cases


def test_what_cannot_start_says_why(four, tmp_path):
    task, predictions, _ = four
    with pytest.raises(DatasetError, match="is a registration task.*segmentation, classification, prognosis"):
        evaluate(replace(task, task_type="registration"), predictions)
    with pytest.raises(DatasetError, match="no targets.csv"):
        evaluate(replace(task, task_type="prognosis"), predictions)
    for tolerance_mm in (-1.0, math.nan, math.inf):
        with pytest.raises(UniconError, match="tolerance"):
            evaluate(task, predictions, tolerance_mm=tolerance_mm)
    with pytest.raises(PredictionError, match="not a folder"):
        evaluate(task, tmp_path / "nowhere")
    other = predict(tmp_path / "other", {"case_0_seg": TUMOUR})
    with pytest.raises(PredictionError, match=r"It holds case_0_seg.nii.gz; expected .* case_0.nii.gz"):
        evaluate(task, other)
    assert not (predictions / "evaluation.json").exists()


def test_another_task_type_is_one_function(four, monkeypatch):
    @dataclass(frozen=True)
    class Ranking:
        task: str
        schema_version: int = 1

    task, predictions, _ = four
    monkeypatch.setitem(module.EVALUATORS, "prognosis", lambda task, *_: Ranking(task.name))
    result = evaluate(replace(task, task_type="prognosis"), predictions)
    assert read_record(predictions / "evaluation.json", Ranking) == result


def test_the_table(four):
    task, predictions, _ = four
    result = evaluate(task, predictions, tolerance_mm=1.0)
    lines = format_evaluation(result).splitlines()
    assert lines[0].startswith("Dataset001_Lesion: 4 cases of 3 patients")
    assert "NSD at 1 mm" in lines[2]
    summary = result.outputs["tumour"]["dice"]
    expected = f"{summary.mean:.3f} ({summary.low:.3f}-{summary.high:.3f}) {summary.median:.3f} 4"
    assert lines[4].startswith("tumour") and expected in lines[4]
    assert len(lines) == 5 and max(map(len, lines)) <= 120
    one = evaluate(task, predictions, case_ids=["case_2"])
    assert "(n/a)" in format_evaluation(one)


def test_another_grid_is_refused_or_on_request_resampled_to_the_nearest_voxel(tmp_path):
    task = make_task(tmp_path / "Dataset001_Lesion", {"case_0": TUMOUR})
    coarse = tmp_path / "out" / "case_0.nii.gz"
    # Every voxel split in two along each axis: the same mask on a finer grid, so nothing may be lost.
    fine = TUMOUR.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    spacing = tuple(step / 2 for step in SPACING)
    origin = tuple(o - s / 2 for o, s in zip((-10.0, 20.0, 30.0), spacing[::-1]))
    save(coarse, fine, spacing, origin)
    with pytest.raises(PredictionError, match="not on the grid of its reference.*evaluate with --resample"):
        evaluate(task, tmp_path / "out")
    result = evaluate(task, tmp_path / "out", resample=True)
    assert result.overall["dice"].mean == 1.0 and result.resampled
    assert "brought onto" in format_evaluation(result)
