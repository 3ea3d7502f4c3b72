"""Against scikit-survival and lifelines, which are not ours; intervals against simulated truth."""

import dataclasses
import math
import time

import numpy as np
import pytest
from lifelines import KaplanMeierFitter
from lifelines.utils import concordance_index
from sksurv import metrics as reference
from sksurv.nonparametric import CensoringDistributionEstimator
from sksurv.util import Surv

from unicon_pipeline.records import from_dict, to_dict
from unicon_pipeline.survival_metrics import BRIER_STEPS, Censoring, Curves, Survival, survival_scores

EDGES = np.linspace(60, 1500, 12)


def cohort(n=120, seed=0, decimals=1, strength=1.0):
    """Times of which `decimals` -2 makes many tied, risks with ties that order them, and curves."""
    rng = np.random.default_rng(seed)
    log_hazard = np.round(rng.normal(size=n), 1)
    latent = rng.exponential(700 * np.exp(-strength * log_hazard))
    followed = rng.uniform(100, 2500, n)
    times = np.maximum(np.round(np.minimum(latent, followed), decimals), 10.0 ** max(-decimals, 0))
    curves = np.exp(-EDGES / 700 * np.exp(strength * log_hazard)[:, None])
    return times, latent <= followed, log_hazard, Curves(EDGES, curves)


def scores(times, event, risk, curves=None, horizons=(), censoring=None, resamples=0, **options):
    censoring = censoring or Censoring.fit(times, event)
    return survival_scores(times, event, risk, censoring, horizons, curves, resamples=resamples, **options)


def records(times, event):
    return Surv.from_arrays(event, times)


def same(ours, theirs):
    assert ours == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("decimals", [1, -2], ids=["few_ties", "many_ties"])
class TestAgainstOthers:
    def test_harrell(self, seed, decimals):
        times, event, risk, _ = cohort(seed=seed, decimals=decimals)
        ours = scores(times, event, risk).scores["harrell_c"].value
        same(ours, concordance_index(times, -risk, event))
        same(ours, reference.concordance_index_censored(event, times, risk)[0])

    def test_censoring(self, seed, decimals):
        times, event, _, _ = cohort(seed=seed, decimals=decimals)
        days = np.linspace(1, times.max(), 50)
        theirs = CensoringDistributionEstimator().fit(records(times, event)).predict_proba(days)
        assert np.allclose(Censoring.fit(times, event)(days), theirs, rtol=0, atol=1e-12)

    def test_uno_with_the_censoring_of_other_cases(self, seed, decimals):
        training = cohort(200, seed + 50, decimals)[:2]
        times, event, risk, _ = cohort(seed=seed, decimals=decimals)
        censoring = Censoring.fit(*training)
        theirs = reference.concordance_index_ipcw(
            records(*training), records(times, event), risk, tau=censoring.tau_days
        )[0]
        found = scores(times, event, risk, censoring=censoring)
        same(found.scores["uno_c"].value, theirs)
        assert found.tau_days == censoring.tau_days

    def test_auc_and_brier_at_horizons(self, seed, decimals):
        times, event, risk, curves = cohort(seed=seed, decimals=decimals)
        horizons = EDGES[[2, 5, 9]]
        truth = records(times, event)
        plain = scores(times, event, risk, horizons=horizons).horizons
        full = scores(times, event, -risk, curves, horizons).horizons  # the curves decide, not the wrong risk
        predicted = curves.at(horizons)
        # scikit-survival wants all cases inside the training follow-up: those of the training are
        kept = times < times.max()
        censoring = Censoring.fit(times, event)
        auc, _ = reference.cumulative_dynamic_auc(truth, truth[kept], risk[kept], horizons)
        ours = scores(times[kept], event[kept], risk[kept], horizons=horizons, censoring=censoring).horizons
        same([h.scores["auc"].value for h in ours], auc)
        same([h.scores["auc"].value for h in full], [h.scores["auc"].value for h in plain])
        _, brier = reference.brier_score(truth, truth, predicted, horizons)
        same([h.scores["brier"].value for h in full], brier)

    def test_integrated_brier(self, seed, decimals):
        times, event, risk, curves = cohort(seed=seed, decimals=decimals)
        found = scores(times, event, risk, curves)
        days = np.linspace(0, found.brier_days, BRIER_STEPS + 1)
        assert found.brier_days == min(found.tau_days, EDGES[-1])
        within = days >= times.min()  # before the first time every case lives on, and no case is censored
        _, late = reference.brier_score(
            records(times, event), records(times, event), curves.at(days[within]), days[within]
        )
        early = ((1 - curves.at(days[~within])) ** 2).mean(axis=0)
        theirs = np.trapezoid(np.concatenate([early, late]), days) / found.brier_days
        same(found.scores["integrated_brier"].value, theirs)

    def test_calibration(self, seed, decimals):
        times, event, risk, curves = cohort(seed=seed, decimals=decimals)
        (at,) = scores(times, event, risk, curves, [700.0]).horizons
        predicted = curves.at(np.array([700.0]))[:, 0]
        whole = KaplanMeierFitter().fit(times, event).predict(700.0)
        same(at.scores["calibration"].value, predicted.mean() - whole)
        assert sum(point.observed.n for point in at.calibration) == len(times)
        groups = np.searchsorted(np.quantile(predicted, [0.2, 0.4, 0.6, 0.8]), predicted)
        assert len(at.calibration) == 5
        for number, point in enumerate(at.calibration):
            inside = groups == number
            same(point.predicted, predicted[inside].mean())
            same(point.observed.value, KaplanMeierFitter().fit(times[inside], event[inside]).predict(700.0))
            assert point.observed.events == (event & (times <= 700))[inside].sum()


class TestIntervals:
    def test_they_are_the_bootstrap(self):
        times, event, risk, curves = cohort(60)
        censoring = Censoring.fit(times, event)
        found = scores(times, event, risk, curves, [500.0], resamples=400)
        generator, plain = np.random.default_rng(1), []
        for _ in range(400):
            drawn = generator.integers(60, size=60)
            again = scores(
                times[drawn], event[drawn], risk[drawn], Curves(EDGES, curves.survival[drawn]), [500.0], censoring
            )
            (at,) = again.horizons
            plain.append(
                [again.scores[name].value for name in found.scores] + [at.scores[name].value for name in at.scores]
            )
        low, high = np.quantile(np.array(plain), [0.025, 0.975], axis=0)
        ours = [*found.scores.values(), *found.horizons[0].scores.values()]
        width = high - low
        assert np.all(np.abs([score.low for score in ours] - low) < 0.2 * width)
        assert np.all(np.abs([score.high for score in ours] - high) < 0.2 * width)

    def test_useless_risks_cover_one_half(self):
        inside = 0
        for seed in range(60):
            times, event, risk, _ = cohort(60, seed, strength=0.0)
            score = scores(times, event, risk, resamples=300, seed=seed).scores["harrell_c"]
            inside += score.low <= 0.5 <= score.high
        assert inside >= 53

    def test_whole_patients_are_drawn(self):
        times, event, risk, _ = cohort(40)
        alone = scores(times, event, risk, resamples=500).scores["harrell_c"]
        twice = (np.tile(times, 2), np.tile(event, 2), np.tile(risk, 2))
        paired = scores(*twice, patients=list(range(40)) * 2, resamples=500).scores["harrell_c"]
        assert paired.value == pytest.approx(alone.value)
        assert (paired.low, paired.high) == pytest.approx((alone.low, alone.high))

    def test_the_seed_decides(self):
        times, event, risk, _ = cohort(40)
        first, same_seed, other = (scores(times, event, risk, resamples=200, seed=seed) for seed in (3, 3, 4))
        assert first == same_seed != other

    def test_a_thousand_resamples_take_less_than_a_second(self):
        times, event, risk, curves = cohort(200)
        start = time.perf_counter()
        scores(times, event, risk, curves, [365.0, 730.0], resamples=1000)
        assert time.perf_counter() - start < 3  # on a busy machine


class TestUndefined:
    def test_no_event(self):
        times, _, risk, curves = cohort(30)
        found = scores(times, np.zeros(30, bool), risk, curves, [200.0], resamples=50)
        for score in (*found.scores.values(), found.horizons[0].scores["auc"]):
            assert score.events == 0 and score.n == 30
        assert found.scores["harrell_c"].value is None and found.scores["harrell_c"].remark == "no event"
        assert found.horizons[0].scores["auc"].value is None
        assert all(point.observed.value == 1 for point in found.horizons[0].calibration)
        assert all(point.observed.low is None for point in found.horizons[0].calibration)

    def test_one_case(self):
        found = scores([100.0], [1], [0.5], Curves([50.0, 200.0], [[0.9, 0.4]]), [80.0], resamples=50)
        assert found.scores["harrell_c"].value is None
        assert found.scores["harrell_c"].remark == "no case is followed beyond an event"

    def test_all_tied(self):
        times, event, _, _ = cohort(30)
        score = scores(times, event, np.zeros(30), resamples=50).scores["harrell_c"]
        assert score.value == 0.5 and score.low is None and "0.5 in every resample" in score.remark

    def test_all_at_one_time(self):
        found = scores(np.full(10, 100.0), np.ones(10), np.arange(10.0), horizons=[100.0, 300.0], resamples=50)
        assert found.scores["harrell_c"].value is None
        assert all(at.scores["auc"].value is None for at in found.horizons)

    def test_horizon_beyond_follow_up_or_curves(self):
        times, event, risk, curves = cohort(60)
        late, later = scores(times, event, risk, curves, [2000.0, 9000.0], resamples=50).horizons
        assert late.scores["auc"].value is not None
        assert late.scores["brier"].remark == "the curves end on day 1500" and late.calibration == ()
        assert later.scores["auc"].remark == "no training case is followed beyond day 9000"

    def test_calibration_ends_with_the_follow_up(self):
        curves, censoring = Curves([50.0, 500.0], [[0.9, 0.3]] * 3), Censoring.fit([100.0, 200.0, 600.0], [1, 0, 0])
        (open_end,) = scores([100.0, 150.0, 200.0], [1, 1, 0], np.arange(3.0), curves, [400.0], censoring).horizons
        assert open_end.scores["calibration"].remark == "no case is followed to day 400"
        assert open_end.calibration[0].observed.value is None
        (all_died,) = scores([100.0, 150.0, 200.0], [1, 0, 1], np.arange(3.0), curves, [400.0], censoring).horizons
        assert all_died.calibration[0].observed.value == 0

    def test_rare_events_have_no_interval(self):
        times, event = np.arange(1.0, 31.0), np.arange(30) == 3
        score = scores(times, event, -times, resamples=200).scores["harrell_c"]
        assert score.value is not None and score.left_out > 50
        assert score.low is None and "undefined in" in score.remark


class TestArguments:
    def test_tau_is_that_of_the_training(self):
        times, event, risk, _ = cohort(100)
        censoring = Censoring.fit(times, event)
        assert (times >= censoring.tau_days).sum() == 10
        assert scores(times, event, risk, censoring=dataclasses.replace(censoring, tau_days=300.0)).tau_days == 300

    def test_tau_lies_before_the_common_end_of_a_study(self):
        times, event, risk, curves = cohort(100)
        event &= times < 600
        times = np.minimum(times, 600.0)
        found = scores(times, event, risk, curves)
        assert found.tau_days == times[times < 600].max()
        assert all(score.value is not None for score in found.scores.values())

    def test_no_tau_where_all_are_censored_at_once(self):
        found = scores([5.0, 5.0, 5.0], [0, 0, 0], np.arange(3.0), Curves([9.0], [[0.5]] * 3))
        assert found.scores["integrated_brier"].remark == "no training case is followed beyond day 5"

    def test_records_survive_json(self):
        times, event, risk, curves = cohort(40)
        found = scores(times, event, risk, curves, [365.0], resamples=20)
        assert from_dict(Survival, to_dict(found), "here") == found
        censoring = Censoring.fit(times, event)
        assert from_dict(Censoring, to_dict(censoring), "here") == censoring

    def test_curves_between_their_days(self):
        found = Curves([10.0, 20.0], [[0.8, 0.4]]).at(np.array([0.0, 5.0, 15.0, 20.0, 21.0]))
        assert found[0, :4] == pytest.approx([1.0, 0.9, 0.6, 0.4]) and math.isnan(found[0, 4])

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"times": [0.0, 5.0]}, "not above 0"),
            ({"event": [0, 2]}, "neither 0 nor 1"),
            ({"times": [1.0]}, "Expected times"),
            ({"risk": [math.nan, 1.0]}, "not finite"),
            ({"risk": [1.0]}, "Expected 2 risks"),
            ({"horizons": [0.0]}, "horizon"),
            ({"curves": Curves([5.0, 4.0], [[1.0, 0.5]] * 2)}, "increasing"),
            ({"curves": Curves([4.0, 5.0], [[1.0, 1.5]] * 2)}, "outside 0 to 1"),
        ],
    )
    def test_refused(self, change, message):
        good = {"times": [3.0, 5.0], "event": [1, 0], "risk": [1.0, 0.0]}
        with pytest.raises(ValueError, match=message):
            scores(**{**good, **change}, censoring=Censoring.fit([3.0, 5.0], [1, 0]))
