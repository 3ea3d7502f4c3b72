"""Against lifelines and scikit-learn, which are not ours; and what out-of-fold must mean."""

import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from unicon_pipeline.baselines import RidgeCox, RidgeLogistic, baseline_predictions, out_of_fold
from unicon_pipeline.errors import UniconError
from unicon_pipeline.records import from_dict, to_dict

FOLDS = [list(range(start, 60, 5)) for start in range(5)]


def cohort(n=60, d=4, seed=0, tied=False):
    """Columns of very different sizes, and times whose hazard grows with the first column and falls with the second."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) @ (np.eye(d) + 0.3) * 10.0 ** np.arange(d)
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    time = rng.exponential(400 / np.exp(z[:, 0] - 0.5 * z[:, 1])) + 1
    end = rng.exponential(600, size=n) + 1
    days = np.minimum(time, end)
    return x, (np.ceil(days / 100) * 100 if tied else days), (time <= end).astype(float)


def classes_of(x, count, seed=1):
    """The class follows the first column, with some cases exchanged by chance."""
    rng = np.random.default_rng(seed)
    order = np.argsort(np.argsort(x[:, 0] + x[:, 0].std() * rng.normal(size=len(x))))
    return (order * count // len(x)).astype(float)


class TestRidgeCox:
    @pytest.mark.parametrize("penalty", [0.001, 0.1, 2.0])
    @pytest.mark.parametrize("tied", [False, True])
    def test_is_lifelines(self, penalty, tied):
        x, days, event = cohort(tied=tied)
        assert (len(np.unique(days)) < 40) == tied
        ours = RidgeCox.fit(x, days, event, penalty)
        table = pd.DataFrame(x).assign(days=days, event=event)
        # lifelines scales with n - 1 degrees of freedom, so that its coefficients are larger and its penalty smaller.
        share = len(x) / (len(x) - 1)
        theirs = CoxPHFitter(penalizer=penalty / share, l1_ratio=0.0)
        theirs.fit(table, "days", "event", fit_options={"precision": 1e-14, "r_precision": 1e-16})
        assert ours.coefficients == pytest.approx(theirs.params_.to_numpy() * x.std(axis=0), abs=1e-6)
        assert ours.risk(x) == pytest.approx(theirs.predict_log_partial_hazard(table).to_numpy(), abs=1e-6)

    def test_units_do_not_matter(self):
        x, days, event = cohort()
        risk = RidgeCox.fit(x, days, event).risk(x)
        assert RidgeCox.fit(x * 1e4 + 5, days, event).risk(x * 1e4 + 5) == pytest.approx(risk)

    def test_without_event_all_risks_are_equal(self):
        x, days, _ = cohort()
        assert not RidgeCox.fit(x, days, np.zeros(len(x))).risk(x).any()

    def test_constant_columns_count_for_nothing(self):
        x, days, event = cohort()
        more = np.column_stack([x, np.full(len(x), 0.1)])
        fitted = RidgeCox.fit(more, days, event)
        assert fitted.coefficients[-1] == 0
        more[:, -1] = 7  # at prediction it differs: nothing was learned of it
        assert fitted.risk(more) == pytest.approx(RidgeCox.fit(x, days, event).risk(x))

    def test_more_columns_than_cases(self):
        _, days, event = cohort(n=20)
        x = np.random.default_rng(0).normal(size=(20, 50))
        assert np.isfinite(RidgeCox.fit(x, days, event, 0.01).risk(x)).all()

    def test_is_json(self):
        fitted = RidgeCox.fit(*cohort())
        assert from_dict(RidgeCox, to_dict(fitted), "here") == fitted


class TestRidgeLogistic:
    @pytest.mark.parametrize("count", [2, 3, 5])
    @pytest.mark.parametrize("penalty", [0.01, 0.5])
    def test_is_scikit_learn(self, count, penalty):
        x, _, _ = cohort()
        classes = classes_of(x, count)
        model = LogisticRegression(C=1 / (len(x) * penalty), tol=1e-12, solver="newton-cg", max_iter=1000)
        theirs = make_pipeline(StandardScaler(), model).fit(x, classes).predict_proba(x)
        ours = RidgeLogistic.fit(x, classes, penalty).probabilities(x, count)
        assert ours == pytest.approx(theirs, abs=1e-6)

    def test_separable_classes_have_finite_coefficients(self):
        x = np.linspace(-1, 1, 20)[:, None]
        fitted = RidgeLogistic.fit(x, (x[:, 0] > 0).astype(int), 1e-6)
        assert np.isfinite(fitted.coefficients).all()

    def test_unseen_class_has_probability_zero(self):
        x, _, _ = cohort()
        p = RidgeLogistic.fit(x, 2 * classes_of(x, 2)).probabilities(x, 4)
        assert not p[:, [1, 3]].any()
        assert p.sum(axis=1) == pytest.approx(1)

    def test_is_json(self):
        x, _, _ = cohort()
        fitted = RidgeLogistic.fit(x, classes_of(x, 3))
        assert from_dict(RidgeLogistic, to_dict(fitted), "here") == fitted


class TestOutOfFold:
    def test_is_the_model_of_the_other_folds(self):
        x, days, event = cohort()
        found = out_of_fold(x, np.column_stack([days, event]), FOLDS, "survival", 0.2)
        for held in FOLDS:
            rest = np.setdiff1d(np.arange(60), held)
            assert found[held] == pytest.approx(RidgeCox.fit(x[rest], days[rest], event[rest], 0.2).risk(x[held]))

    def test_the_held_outcomes_change_nothing(self):
        x, days, event = cohort()
        targets = np.column_stack([days, event])
        before = out_of_fold(x, targets, FOLDS, "survival")[FOLDS[0]]
        targets[FOLDS[0]] = [1e4, 1]
        assert (out_of_fold(x, targets, FOLDS, "survival")[FOLDS[0]] == before).all()

    def test_gaps_are_filled_from_the_training_rows(self):
        x, _, _ = cohort()
        classes = classes_of(x, 2)
        x[np.random.default_rng(0).random(x.shape) < 0.2] = np.nan
        found = out_of_fold(x, classes, FOLDS, "classes", 0.1)
        for held in FOLDS:
            rest = np.setdiff1d(np.arange(60), held)
            model = LogisticRegression(C=1 / (len(rest) * 0.1), tol=1e-12, solver="newton-cg")
            steps = SimpleImputer(strategy="median", add_indicator=True), StandardScaler(), model
            theirs = make_pipeline(*steps).fit(x[rest], classes[rest]).predict_proba(x[held])
            assert found[held] == pytest.approx(theirs, abs=1e-5)

    def test_columns_with_the_same_gaps_share_an_indicator(self):
        x, days, event = cohort()
        gaps = np.arange(60) % 7 == 0
        x[gaps, :2] = np.nan
        found = out_of_fold(x, np.column_stack([days, event]), FOLDS, "survival")
        for held in FOLDS:
            rest = np.setdiff1d(np.arange(60), held)
            filled = np.column_stack([np.where(np.isnan(x), np.nanmedian(x[rest], axis=0), x), gaps])
            assert found[held] == pytest.approx(RidgeCox.fit(filled[rest], days[rest], event[rest]).risk(filled[held]))

    def test_a_column_that_is_all_gaps_counts_for_nothing(self):
        x, days, event = cohort()
        targets = np.column_stack([days, event])
        more = np.column_stack([x, np.full(60, np.nan)])
        assert (out_of_fold(more, targets, FOLDS, "survival") == out_of_fold(x, targets, FOLDS, "survival")).all()

    def test_features_can_be_fitted_in_the_fold(self):
        x, days, event = cohort()
        seen = []
        out_of_fold(lambda rows: seen.append(rows) or x, np.column_stack([days, event]), FOLDS, "survival")
        assert [sorted(set(range(60)) - set(rows)) for rows in seen] == FOLDS

    def test_findings_with_blanks(self):
        x, _, _ = cohort()
        targets = np.column_stack([classes_of(x, 2), np.full(60, np.nan), np.ones(60)])
        targets[:30:2, 0] = np.nan
        found = out_of_fold(x, targets, FOLDS, "findings")
        assert found.shape == (60, 3)
        assert (found[:, 1] == 0.5).all() and (found[:, 2] == 1).all()
        assert roc_auc_score(targets[30:, 0], found[30:, 0]) > 0.6
        rest = np.setdiff1d(np.flatnonzero(~np.isnan(targets[:, 0])), FOLDS[1])
        alone = RidgeLogistic.fit(x[rest], targets[rest, 0]).probabilities(x[FOLDS[1]], 2)[:, 1]
        assert found[FOLDS[1], 0] == pytest.approx(alone)

    def test_rows_in_no_fold_are_neither_used_nor_predicted(self):
        x, days, event = cohort()
        targets = np.column_stack([days, event])
        found = out_of_fold(x, targets, FOLDS[:3], "survival")
        assert np.isnan(found[FOLDS[3]]).all() and np.isfinite(found[FOLDS[0]]).all()
        targets[FOLDS[3]] = [1, 1]
        assert (out_of_fold(x, targets, FOLDS[:3], "survival")[FOLDS[0]] == found[FOLDS[0]]).all()

    @pytest.mark.parametrize(
        "folds, kind, penalty, message",
        [
            (FOLDS, "regression", 0.1, "survival"),
            (FOLDS, "classes", 0, "above 0"),
            ([FOLDS[0], []], "classes", 0.1, "two"),
        ],
    )
    def test_refused(self, folds, kind, penalty, message):
        with pytest.raises(UniconError, match=message):
            out_of_fold(np.zeros((60, 1)), np.zeros(60), folds, kind, penalty)


class TestBaselines:
    @staticmethod
    def regions(x, pet=True):
        rng = np.random.default_rng(3)
        volume = np.exp((x[:, 0] - x[:, 0].mean()) / x[:, 0].std())
        return [{"volume_ml": v, "suv_max": rng.uniform(2, 20) if pet else np.nan, "sphericity": 0.5} for v in volume]

    def test_all_that_the_data_allow(self):
        x, days, event = cohort()
        targets = np.column_stack([days, event])
        assert list(baseline_predictions(targets, FOLDS, "survival")) == ["constant"]
        assert list(baseline_predictions(targets, FOLDS, "survival", self.regions(x, pet=False), x)) == [
            "constant",
            "clinical",
            "volume",
        ]
        assert list(baseline_predictions(targets, FOLDS, "survival", self.regions(x))) == [
            "constant",
            "volume",
            "volume_suv",
        ]

    def test_volume_is_a_cox_model_of_its_logarithm(self):
        x, days, event = cohort()
        targets, regions = np.column_stack([days, event]), self.regions(x)
        regions[7]["volume_ml"] = 0.0  # an empty region: its volume is unknown rather than log 0
        logs = np.log([[case["volume_ml"] or np.nan] for case in regions])
        found = baseline_predictions(targets, FOLDS, "survival", regions)["volume"]
        assert (found == out_of_fold(logs, targets, FOLDS, "survival")).all()

    def test_constant_tells_the_rate_and_ranks_nothing(self):
        x, _, _ = cohort()
        targets = (classes_of(x, 10) < 3).astype(float)
        targets[0] = np.nan
        p = baseline_predictions(targets, FOLDS, "classes")["constant"]
        assert p == pytest.approx(np.tile([1 - np.nanmean(targets), np.nanmean(targets)], (60, 1)))
        assert roc_auc_score(targets[1:], p[1:, 1]) == 0.5
        risk = baseline_predictions(np.ones((60, 2)), FOLDS, "survival")["constant"]
        assert risk.shape == (60,) and not risk.any()
