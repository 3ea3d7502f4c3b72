"""Answers about whole cases against their outcomes; the numbers are held against scikit-learn's and lifelines'."""

from pathlib import Path

import numpy as np
import pytest
from lifelines.utils import concordance_index
from sklearn.metrics import brier_score_loss, roc_auc_score

from unicon_pipeline.case_evaluate import CaseEvaluation
from unicon_pipeline.dataset import Case, Task
from unicon_pipeline.errors import DatasetError, PredictionError
from unicon_pipeline.evaluate import evaluate, format_evaluation
from unicon_pipeline.records import read_record
from unicon_pipeline.survival_metrics import Censoring, horizons
from unicon_pipeline.tables import Table, write_table

NAMES = tuple(f"case_{n:02d}" for n in range(60))
HELD_OUT = 20  # the last ones


def make_task(folder, task_type, columns):
    cases = [Case(name, {"CT": Path(name)}, None, f"patient_{n // 2}") for n, name in enumerate(NAMES)]
    targets = Table(NAMES, {name: tuple(cells) for name, cells in columns.items()})
    kept, held_out = tuple(cases[:-HELD_OUT]), tuple(cases[-HELD_OUT:])
    return Task("Task", folder, task_type, ("CT",), {}, None, ".nii.gz", kept, held_out, targets, None)


def write(folder, columns, names=NAMES):
    folder.mkdir(exist_ok=True)
    rows = {name: ["" if v is None else v for v in values] for name, values in zip(names, zip(*columns.values()))}
    write_table(folder / "predictions.csv", tuple(columns), rows)
    return folder


@pytest.fixture
def survival(tmp_path):
    generator = np.random.default_rng(3)
    risk = generator.normal(size=60)
    onset, lost = generator.exponential(900 * np.exp(-risk)), generator.uniform(200, 3000, 60)
    days, event = np.ceil(np.minimum(onset, lost)) + 1, (onset <= lost).astype(float)
    task = make_task(tmp_path, "prognosis", {"time_days": days.tolist(), "event": event.tolist()})
    curves = {f"survival_{day}": np.exp(-day / 900 * np.exp(risk)).round(6) for day in (200, 365, 1000, 2000)}
    columns = {"risk": risk.round(6).tolist(), "median_survival_days": [None] * 60}
    columns |= {name: values.tolist() for name, values in curves.items()}
    return task, columns, days, event


def test_prognosis(survival, tmp_path):
    task, columns, days, event = survival
    result = evaluate(task, write(tmp_path / "out", columns))
    scores = result.survival.scores
    expected = concordance_index(days, -np.array(columns["risk"]), event)
    assert scores["harrell_c"].value == pytest.approx(expected, abs=1e-6)
    assert scores["harrell_c"].low < expected < scores["harrell_c"].high
    assert (scores["harrell_c"].n, scores["harrell_c"].events) == (60, int(event.sum()))
    training = Censoring.fit(days[:-HELD_OUT], event[:-HELD_OUT])
    assert result.survival.tau_days == training.tau_days
    assert tuple(at.days for at in result.survival.horizons) == horizons(days[:-HELD_OUT], event[:-HELD_OUT])
    assert scores["integrated_brier"].value is not None and result.survival.horizons[0].calibration
    assert (result.patients, result.held_out, len(result.cases)) == (30, HELD_OUT, 60)
    assert read_record(tmp_path / "out" / "evaluation.json", CaseEvaluation) == result
    text = format_evaluation(result)
    assert f"the 40 training cases; Uno's C counts events before day {training.tau_days:g} (tau)" in text
    for words in ("harrell_c", "uno_c to day", "auc to day 365", "Horizons: day 365", "40 cases are training cases"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 140


def test_held_out_cases_alone_missing_unmatched_and_unusable_ones(survival, tmp_path):
    task, columns, *_ = survival
    part = {name: values[-HELD_OUT:] for name, values in columns.items()}
    part["risk"] = [None, *part["risk"][1:]]
    part["survival_365"] = [0.5, 1.5, *part["survival_365"][2:]]
    names = (*NAMES[-HELD_OUT:-1], "stranger")
    result = evaluate(task, write(tmp_path / "out", part, names))
    assert result.missing == (NAMES[-1],) and result.unmatched == ("stranger",)
    assert result.failed == {NAMES[40]: "risk is blank, no number", NAMES[41]: "survival_365 is 1.5, no probability"}
    assert len(result.cases) == result.held_out == HELD_OUT - 3
    text = format_evaluation(result)
    assert "training case" not in text.split("Horizons")[1] and "Failed: case_40: risk is blank" in text
    only = evaluate(task, tmp_path / "out", case_ids=[NAMES[45], NAMES[46]])
    assert only.cases == NAMES[45:47] and only.missing == ()


def test_risks_alone_have_no_brier_score(survival, tmp_path):
    task, columns, *_ = survival
    result = evaluate(task, write(tmp_path / "out", {"risk": columns["risk"]}))
    assert "integrated_brier" not in result.survival.scores
    assert "no Brier score" in format_evaluation(result)


def test_classes(tmp_path):
    generator = np.random.default_rng(1)
    classes = generator.integers(0, 2, 60)
    cells = [None if n % 10 == 0 else ("low", "high")[kind] for n, kind in enumerate(classes)]
    cells[5] = "unheard of"
    task = make_task(tmp_path, "classification", {"grade": cells})
    p = np.clip(0.5 + 0.3 * (classes - 0.5) + generator.normal(0, 0.2, 60), 0.01, 0.99).round(6)
    result = evaluate(task, write(tmp_path / "out", {"p_low": (1 - p).round(6).tolist(), "p_high": p.tolist()}))
    known = [n for n, cell in enumerate(cells) if cell in ("low", "high")]
    scores = result.classification.outputs["high"].scores
    assert list(result.classification.outputs) == ["high"]
    assert scores["auc"].value == pytest.approx(roc_auc_score(classes[known], p[known]))
    assert scores["brier"].value == pytest.approx(brier_score_loss(classes[known], p[known]))
    assert (scores["auc"].n, scores["auc"].positives) == (len(known), int(classes[known].sum()))
    assert result.failed == {NAMES[5]: "it is unheard of, which the predictions do not know; they know low, high"}
    assert set(result.unmatched) == set(NAMES[::10])
    assert read_record(tmp_path / "out" / "evaluation.json", CaseEvaluation) == result
    assert "Positive is high, against low." in format_evaluation(result)


@pytest.mark.parametrize("prefix", ["p_", ""])
def test_findings_with_blanks(tmp_path, prefix):
    generator = np.random.default_rng(2)
    truth = {name: generator.integers(0, 2, 60).astype(float).tolist() for name in ("mass", "fluid", "untold")}
    truth["mass"][:7] = [None] * 7
    task = make_task(tmp_path, "classification", truth)
    p = {name: generator.random(60).round(6).tolist() for name in ("mass", "fluid")}
    result = evaluate(task, write(tmp_path / "out", {prefix + name: values for name, values in p.items()}))
    mass = result.classification.outputs["mass"].scores["auc"]
    assert mass.value == pytest.approx(roc_auc_score(truth["mass"][7:], p["mass"][7:])) and mass.n == 53
    text = format_evaluation(result)
    assert "overall" in text and "No column tells untold." in text


def test_what_does_not_fit_says_what_was_expected(survival, tmp_path):
    task, columns, *_ = survival
    with pytest.raises(PredictionError, match="predictions.csv does not exist"):
        evaluate(task, tmp_path)
    with pytest.raises(PredictionError, match="expected a column risk"):
        evaluate(task, write(tmp_path / "a", {"x": columns["risk"]}))
    with pytest.raises(PredictionError, match="no row for any of the 60 cases.*It has rows for one"):
        evaluate(task, write(tmp_path / "b", {"risk": [1.0]}, ["one"]))
    with pytest.raises(PredictionError, match="none of the 60 predictions can be evaluated"):
        evaluate(task, write(tmp_path / "c", {"risk": ["high"] * 60}))
    with pytest.raises(DatasetError, match="no outcome of case_99"):
        evaluate(task, write(tmp_path / "d", columns), case_ids=["case_99"])
    grade = make_task(tmp_path, "classification", {"grade": ["low", "high"] * 30})
    with pytest.raises(PredictionError, match="expected a column p_<class> for each class, found risk"):
        evaluate(grade, write(tmp_path / "e", {"risk": columns["risk"]}))
    assert not (tmp_path / "e" / "evaluation.json").exists()


def test_horizons_are_years_that_the_cohort_tells_of():
    days, event = np.linspace(100, 1500, 40), np.ones(40)
    assert horizons(days, event) == (365.0, 730.0, 1095.0)
    assert horizons(days / 20, event) == (40.0,)
    assert horizons(days, np.zeros(40)) == ()
