"""Against scikit-learn, which is not ours; intervals against plain loops and simulated truth."""

import math
import time

import numpy as np
import pytest
from scipy.special import expit, logit, softmax
from sklearn import metrics as reference
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV, calibration_curve
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

from unicon_pipeline.class_metrics import METRICS, Classification, classification_scores, temperature
from unicon_pipeline.records import from_dict, to_dict


def findings(n=150, count=4, seed=0, blanks=0.0, decimals=2):
    """Probabilities with ties, and outcomes that follow them."""
    rng = np.random.default_rng(seed)
    p = np.round(rng.random((n, count)), decimals)
    targets = (rng.random((n, count)) < p).astype(float)
    targets[rng.random((n, count)) < blanks] = np.nan
    return p, targets


def exclusive(n=150, count=3, seed=0):
    rng = np.random.default_rng(seed)
    p = softmax(1.5 * rng.normal(size=(n, count)), axis=1)
    return p, np.array([rng.choice(count, p=row) for row in p], dtype=float)


def values(scores):
    return {name: score.value for name, score in scores.items()}


def binary_reference(p, wanted):
    return {
        "auc": reference.roc_auc_score(wanted, p),
        "average_precision": reference.average_precision_score(wanted, p),
        "balanced_accuracy": reference.balanced_accuracy_score(wanted, p > 0.5),
        "brier": reference.brier_score_loss(wanted, p),
    }


def without_calibration(found):
    return {name: value for name, value in found.items() if name != "calibration_error"}


def plain_calibration_error(p, wanted, bins):
    """Over scikit-learn's curve; its bins' sizes are counted again here."""
    observed, predicted = calibration_curve(wanted, p, n_bins=bins, strategy="quantile")
    edges = np.percentile(p, np.linspace(0, 100, bins + 1))
    sizes = np.bincount(np.searchsorted(edges[1:-1], p), minlength=bins)
    return np.abs(observed - predicted) @ sizes[sizes > 0] / len(p)


class TestAgainstScikitLearn:
    @pytest.mark.parametrize("seed", range(3))
    def test_a_finding_with_ties(self, seed):
        p, targets = findings(count=1, seed=seed, decimals=1)
        scores = classification_scores(p, targets, ["nodule"]).outputs["nodule"].scores
        expected = binary_reference(p[:, 0], targets[:, 0])
        assert without_calibration(values(scores)) == pytest.approx(expected, abs=1e-12)

    def test_findings_with_blanks(self):
        p, targets = findings(blanks=0.3)
        found = classification_scores(p, targets, list("abcd"))
        expected = []
        for i, name in enumerate("abcd"):
            known = ~np.isnan(targets[:, i])
            expected.append(binary_reference(p[known, i], targets[known, i]))
            output = found.outputs[name]
            assert without_calibration(values(output.scores)) == pytest.approx(expected[-1], abs=1e-12)
            assert {score.n for score in output.scores.values()} == {known.sum()}
            assert {score.positives for score in output.scores.values()} == {(targets[:, i] == 1).sum()}
        means = {name: np.mean([one[name] for one in expected]) for name in expected[0]}
        assert without_calibration(values(found.overall)) == pytest.approx(means, abs=1e-12)

    def test_exclusive_classes(self):
        p, targets = exclusive()
        found = values(classification_scores(p, targets, list("abc")).overall)
        assert without_calibration(found) == pytest.approx(
            {
                "auc": reference.roc_auc_score(targets, p, multi_class="ovr", average="macro"),
                "average_precision": reference.average_precision_score(np.eye(3)[targets.astype(int)], p),
                "balanced_accuracy": reference.balanced_accuracy_score(targets, p.argmax(axis=1)),
                "brier": reference.brier_score_loss(targets, p, labels=[0, 1, 2], scale_by_half=True),
            },
            abs=1e-12,
        )

    def test_two_exclusive_classes_are_one_finding(self):
        p, targets = findings(count=1)
        two = classification_scores(np.column_stack([1 - p, p]), targets[:, 0], ["low", "high"])
        assert two == classification_scores(p, targets, ["high"])

    @pytest.mark.parametrize("n, bins", [(15, 2), (55, 5), (400, 10)])
    def test_calibration(self, n, bins):
        p, targets = findings(n=n, count=1, decimals=6)
        output = classification_scores(p, targets, ["nodule"], resamples=0).outputs["nodule"]
        observed, predicted = calibration_curve(targets[:, 0], p[:, 0], n_bins=bins, strategy="quantile")
        assert [point.observed for point in output.calibration] == pytest.approx(observed)
        assert [point.predicted for point in output.calibration] == pytest.approx(predicted)
        assert sum(point.n for point in output.calibration) == n
        assert all(point.low <= point.observed <= point.high for point in output.calibration)
        error = plain_calibration_error(p[:, 0], targets[:, 0], bins)
        assert output.scores["calibration_error"].value == pytest.approx(error, abs=1e-12)


class TestIntervals:
    def test_is_the_plain_bootstrap_over_patients(self):
        p, targets = findings(n=60, count=1)
        patients = [f"P{i // 2}" for i in range(60)]
        score = classification_scores(p, targets, ["a"], patients, resamples=4000).overall["auc"]
        rng, drawn = np.random.default_rng(1), []
        for _ in range(2000):
            rows = np.concatenate([[2 * i, 2 * i + 1] for i in rng.integers(30, size=30)])
            drawn.append(reference.roc_auc_score(targets[rows, 0], p[rows, 0]))
        assert (score.low, score.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.01)

    def test_blocks_change_only_how_many_are_drawn_at_once(self, monkeypatch):
        p, targets = findings(n=30, count=2, blanks=0.2)
        whole = classification_scores(p, targets, ["a", "b"], resamples=100).overall
        monkeypatch.setattr("unicon_pipeline.metrics.BOOTSTRAP_BLOCK", 210)
        parts = classification_scores(p, targets, ["a", "b"], resamples=100).overall
        for name, score in whole.items():
            assert (parts[name].low, parts[name].high) == pytest.approx((score.low, score.high), abs=1e-12)

    def test_repeating_each_patients_cases_does_not_narrow_it(self):
        p, targets = findings(n=50, count=1)
        twice = [i % 50 for i in range(100)]
        once = classification_scores(p, targets, ["a"]).overall["brier"]
        doubled = classification_scores(p[twice], targets[twice], ["a"], patients=twice).overall["brier"]
        assert (doubled.low, doubled.high) == pytest.approx((once.low, once.high), abs=1e-12)

    def test_resamples_without_both_classes_are_counted(self):
        p, targets = np.linspace(0, 1, 40)[:, None], np.zeros((40, 1))
        targets[[5, 30]] = 1
        auc = classification_scores(p, targets, ["rare"]).overall["auc"]
        assert 0.08 < auc.left_out / 1000 < 0.19  # (1 - 2/40)^40 = 0.13
        assert auc.low < auc.value < auc.high
        assert classification_scores(p, targets, ["rare"]).overall["brier"].left_out == 0

    def test_one_positive_patient_shows_no_spread(self):
        p, targets = np.linspace(0, 1, 40)[:, None], np.zeros((40, 1))
        targets[30] = 1
        auc = classification_scores(p, targets, ["rare"]).overall["auc"]
        assert auc.value is not None and auc.low is None and auc.high is None
        assert "resamples lack a class" in auc.remark

    def test_calibration_error_of_calibrated_probabilities_is_small_after_chance(self):
        held = 0
        for seed in range(40):
            p, targets = findings(n=100, count=1, seed=seed, decimals=6)
            distorted = expit(1.5 * logit(np.clip(p, 0.001, 0.999)))
            score = classification_scores(distorted, targets, ["a"], resamples=200).overall["calibration_error"]
            truth = np.abs(expit(1.5 * logit(np.linspace(0.001, 0.999, 999))) - np.linspace(0.001, 0.999, 999)).mean()
            held += score.low <= truth <= score.high
        assert held >= 32

    def test_fast(self):
        p, targets = findings(n=200, count=18)
        start = time.perf_counter()
        classification_scores(p, targets, [str(i) for i in range(18)])
        assert time.perf_counter() - start < 3  # 0.2 s on an idle machine


class TestUndefined:
    @pytest.mark.parametrize("value, why", [(0.0, "no case is positive"), (1.0, "every case is positive")])
    def test_one_class(self, value, why):
        scores = classification_scores(np.full((5, 1), 0.3), np.full((5, 1), value), ["a"]).overall
        for name in ("auc", "average_precision", "balanced_accuracy"):
            assert scores[name].value is None and why in scores[name].remark
        assert scores["brier"].value == pytest.approx((0.3 - value) ** 2)

    def test_a_finding_without_annotation_is_left_out_of_the_mean(self):
        p, targets = findings(count=2)
        targets[:, 1] = np.nan
        found = classification_scores(p, targets, ["a", "b"])
        assert found.overall["auc"].value == found.outputs["a"].scores["auc"].value
        assert found.overall["auc"].remark == "left out: b: no case is annotated"
        assert found.outputs["b"].calibration == ()

    def test_a_class_that_no_case_has(self):
        p, targets = exclusive()
        targets[targets == 2] = 0
        found = classification_scores(p, targets, list("abc"))
        assert "c: no case is positive" in found.overall["auc"].remark
        recalls = [np.mean(p[targets == k].argmax(axis=1) == k) for k in (0, 1)]
        assert found.overall["balanced_accuracy"].value == pytest.approx(np.mean(recalls))

    @pytest.mark.parametrize("n", [0, 1])
    def test_hardly_a_case(self, n):
        p, targets = findings(n=n, count=2)
        found = classification_scores(p, targets, ["a", "b"])
        assert all(score.low is None for score in found.overall.values())
        assert set(found.overall) == set(METRICS)

    def test_one_patient(self):
        p, targets = findings(n=20, count=1)
        auc = classification_scores(p, targets, ["a"], patients=["P"] * 20).overall["auc"]
        assert auc.value is not None and "one patient" in auc.remark

    def test_everything_is_json(self):
        p, targets = findings(count=2)
        targets[:, 1] = np.nan
        found = classification_scores(p, targets, ["a", "b"])
        assert from_dict(Classification, to_dict(found), "here") == found

    @pytest.mark.parametrize(
        "p, targets, message",
        [
            (np.zeros((3, 2)), np.zeros((3, 3)), "found"),
            (np.full((3, 1), np.nan), np.zeros((3, 1)), "NaN"),
            (np.full((3, 1), 1.1), np.zeros((3, 1)), "0 to 1"),
            (np.zeros((3, 2)), np.full((3, 2), 0.5), "0.5 is none of 0, 1"),
            (np.zeros((3, 2)), np.full(3, 2.0), "2 is none of 0, 1"),
        ],
    )
    def test_refused(self, p, targets, message):
        with pytest.raises(ValueError, match=message):
            classification_scores(p, targets, [str(i) for i in range(p.shape[1])])


class Logits(ClassifierMixin, BaseEstimator):
    """A fitted classifier for scikit-learn whose features are its logits."""

    def fit(self, x, y):
        self.classes_ = np.unique(y)
        return self

    def decision_function(self, x):
        return x

    def predict(self, x):
        return self.classes_[x.argmax(axis=1)]


class TestTemperature:
    def test_exclusive_is_scikit_learns(self):
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(300, 4))
        targets = np.array([rng.choice(4, p=softmax(row)) for row in logits])
        logits *= 3
        calibrated = CalibratedClassifierCV(FrozenEstimator(Logits().fit(logits, targets)), method="temperature")
        expected = calibrated.fit(logits, targets).predict_proba(logits)
        found = softmax(logits / temperature(logits, targets), axis=1)
        assert found == pytest.approx(expected, abs=1e-4)  # scikit-learn stops its search early

    def test_findings_are_a_logistic_regression_without_intercept(self):
        p, targets = findings(n=300, blanks=0.2, decimals=4)
        logits = 2.5 * logit(np.clip(p, 0.01, 0.99))
        known = ~np.isnan(targets)
        model = LogisticRegression(C=math.inf, fit_intercept=False, tol=1e-12)
        slope = model.fit(logits[known][:, None], targets[known]).coef_[0, 0]
        assert temperature(logits, targets) == pytest.approx(1 / slope, rel=1e-6)

    def test_blanks_change_nothing(self):
        p, targets = exclusive()
        logits = np.log(p)
        more, blank = np.concatenate([logits, logits[:5]]), np.concatenate([targets, np.full(5, np.nan)])
        assert temperature(more, blank) == temperature(logits, targets)

    def test_limits(self):
        logits, right = np.array([[5.0, -5.0], [-5.0, 5.0]]), np.array([0, 1])
        assert temperature(logits, right) == 0.05
        assert temperature(logits, right[::-1]) == 20.0
        assert temperature(logits, np.full(2, np.nan)) == 1.0

    def test_refused(self):
        with pytest.raises(ValueError, match="finite logits"):
            temperature(np.array([[np.nan, 0.0]]), np.array([0.0]))
