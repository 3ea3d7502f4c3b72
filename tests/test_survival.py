"""Against pycox (MTLR, DeepHit), torchsurv (Cox), scikit-survival and lifelines, which are not ours."""

import math
import warnings

import numpy as np
import pytest
import torch
from lifelines import CoxPHFitter, KaplanMeierFitter
from pandas import DataFrame
from pycox.models.data import pair_rank_mat
from pycox.models.loss import nll_mtlr, nll_pmf, rank_loss_deephit_single
from pycox.preprocessing.label_transforms import LabTransDiscreteTime
from scipy.stats import spearmanr
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.util import Surv
from torchsurv.loss.cox import neg_partial_log_likelihood

from unicon_pipeline.errors import PlanError, UniconError
from unicon_pipeline.records import from_dict, to_dict
from unicon_pipeline.survival import (
    EVENTS_PER_BIN,
    RANKING_SIGMA,
    RANKING_WEIGHT,
    SURVIVAL_LOSSES,
    BaselineHazard,
    breslow_baseline,
    median_survival_days,
    risk_of,
    survival_curve,
    time_bins,
)

KINDS = list(SURVIVAL_LOSSES)

# pycox appends a bin of score 0 in which no event is seen. Against this score of all others it has no probability.
NEGLIGIBLE = 500.0


def cohort(n=80, seed=0, step=50.0):
    """Times rounded up to `step` days, so that many are tied, some with an edge."""
    rng = np.random.default_rng(seed)
    latent, followed = rng.exponential(600, n), rng.uniform(100, 2000, n)
    times = np.ceil(np.minimum(latent, followed) / step) * step
    return torch.from_numpy(times), torch.from_numpy(latent <= followed)


def batch(kind, n=80, seed=0, dtype=torch.float64):
    times, event = cohort(n, seed)
    edges = (100.0, 200.0, 450.0, 800.0, 1230.0)
    width = SURVIVAL_LOSSES[kind].outputs(edges)
    logits = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return SURVIVAL_LOSSES[kind](edges), logits.to(dtype).requires_grad_(), times, event, edges


def pycox_labels(times, event, edges):
    """pycox's own discretisation; its grid starts at 0 and its last bin is the one behind the grid."""
    transform = LabTransDiscreteTime(np.array([0.0, *edges, 1e6]))
    index, seen = transform.transform(times.numpy(), event.numpy().astype(np.float32))
    # In pycox index k says: an event up to grid point k, or followed to grid point k. Ours count bins from 0.
    return torch.from_numpy(index).long() - 1, torch.from_numpy(seen)


class TestTimeBins:
    def test_bins_hold_equally_many_events(self):
        times, event = cohort(400, step=0.001)
        edges = time_bins(times, event, 12)
        assert len(edges) == 11
        held = np.histogram(times[event], [0, *edges, np.inf])[0]
        assert held.max() - held.min() <= 1

    def test_censored_times_change_nothing(self):
        times, event = cohort(100)
        assert time_bins(times, event) == time_bins(times[event], event[event])

    @pytest.mark.parametrize("events", [1, 2, EVENTS_PER_BIN * 4])
    def test_fewer_bins_of_few_events(self, events):
        times = np.arange(1.0, events + 1)
        assert len(time_bins(times, np.ones(events))) + 1 == max(2, events // EVENTS_PER_BIN)

    def test_ties_make_edges_fewer_not_equal(self):
        edges = time_bins([5.0] * 61 + [9.0] * 59, np.ones(120))
        assert edges == (5.0, 9.0)

    def test_no_event(self):
        with pytest.raises(PlanError, match="None of the 3 training cases has an event"):
            time_bins([1.0, 2.0, 3.0], [0, 0, math.nan])


@pytest.fixture
def double_by_default():
    """pycox makes tensors of the default type inside, which do not go with others."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class TestAgainstOthers:
    @pytest.mark.parametrize("seed", range(3))
    def test_mtlr(self, seed):
        loss, logits, times, event, edges = batch("mtlr", seed=seed)
        index, seen = pycox_labels(times, event, edges)
        followed = index >= 0  # nothing is known of the others: pycox cannot say that, and their loss is 0
        wide = torch.cat([logits, torch.full((len(times), 1), NEGLIGIBLE)], dim=1)
        theirs = nll_mtlr(wide[followed], index[followed], seen[followed], reduction="sum", epsilon=1e-300) / len(times)
        assert loss(logits, times, event).item() == pytest.approx(theirs.item(), abs=1e-9)

    @pytest.mark.usefixtures("double_by_default")
    @pytest.mark.parametrize("seed", range(3))
    def test_deephit(self, seed):
        loss, logits, times, event, edges = batch("deephit", seed=seed)
        index, seen = pycox_labels(times, event, edges)
        followed = index >= 0
        wide = torch.nn.functional.pad(logits, (0, 1)) + NEGLIGIBLE
        theirs = nll_pmf(wide[followed], index[followed], seen[followed], reduction="sum", epsilon=1e-300) / len(times)
        pairs = torch.from_numpy(pair_rank_mat(times.numpy(), event.numpy().astype(np.float32))).double()
        bins = index.clamp(min=0)  # of censored cases it is not read
        ranking = rank_loss_deephit_single(wide, bins, seen, pairs, RANKING_SIGMA)
        expected = theirs + RANKING_WEIGHT * ranking
        assert loss(logits, times, event).item() == pytest.approx(expected.item(), abs=1e-9)

    @pytest.mark.parametrize("step", [0.001, 50.0, 300.0], ids=["no_ties", "ties", "many_ties"])
    def test_cox(self, step):
        times, event = cohort(step=step)
        logits = torch.randn(80, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it announces ties
            theirs = neg_partial_log_likelihood(logits[:, 0], event, times, ties_method="efron", reduction="sum")
        ours = SURVIVAL_LOSSES["cox"]((1.0,))(logits, times, event)
        assert ours.item() == pytest.approx(theirs.item() / event.sum().item(), abs=1e-6)  # float32 inside

    def test_cox_at_the_fit_of_lifelines(self):
        times, event = cohort(60)
        x = np.random.default_rng(0).normal(size=60)
        fit = CoxPHFitter().fit(DataFrame({"x": x, "t": times.numpy(), "e": event.numpy()}), "t", "e")
        logits = torch.tensor(x * fit.params_["x"])[:, None]
        ours = SURVIVAL_LOSSES["cox"]((1.0,))(logits, times, event).item() * event.sum().item()
        assert ours == pytest.approx(-fit.log_likelihood_, abs=1e-6)

    def test_cox_curve(self):
        times, event = cohort(90)
        x = np.random.default_rng(0).normal(size=(90, 2))
        fit = CoxPHSurvivalAnalysis(ties="breslow").fit(x, Surv.from_arrays(event.numpy(), times.numpy()))
        log_hazard = torch.from_numpy(x @ fit.coef_)[:, None]
        edges = (30.0, 100.0, 333.0, 900.0)
        ours = survival_curve("cox", log_hazard, edges, breslow_baseline(log_hazard, times, event))
        theirs = [curve(edges[1:]) for curve in fit.predict_survival_function(x)]
        assert np.allclose(ours[:, 1:], theirs, rtol=0, atol=1e-6)
        assert (ours[:, 0] == 1).all()  # before the first event

    @pytest.mark.parametrize("kind", ["mtlr", "deephit"])
    def test_without_covariates_the_fit_is_kaplan_meier(self, kind):
        """Censored only on edges, a bin's likelihood is exact, and its maximum is the Kaplan-Meier estimate."""
        rng = np.random.default_rng(3)
        latent, edges = rng.exponential(500, 300), (100.0, 300.0, 600.0, 900.0)
        followed = rng.choice([*edges, 2000.0], 300)
        times, event = np.minimum(latent, followed), latent <= followed
        loss, logits = SURVIVAL_LOSSES[kind](edges), torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
        times, event = torch.from_numpy(times), torch.from_numpy(event)
        optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

        def closure():
            optimizer.zero_grad()
            # the ranking term of equal cases is a constant: the likelihood alone moves the fit
            value = loss.likelihood_loss(loss.log_probabilities(logits.expand(300, 4)), loss.bins(times, event), event)
            value.backward()
            return value

        optimizer.step(closure)
        theirs = KaplanMeierFitter().fit(times.numpy(), event.numpy()).predict(list(edges))
        assert np.allclose(survival_curve(kind, logits, edges)[0], theirs, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
class TestEveryLoss:
    def test_gradients_are_right(self, kind):
        loss, logits, times, event, _ = batch(kind, n=12)
        assert torch.autograd.gradcheck(lambda z: loss(z, times, event), logits)

    def test_no_event_is_finite_with_a_gradient(self, kind):
        loss, logits, times, event, _ = batch(kind)
        value = loss(logits, times, torch.zeros_like(event))
        value.backward()
        assert value.isfinite() and logits.grad.isfinite().all()
        assert kind != "cox" or (value == 0 and not logits.grad.any())

    @pytest.mark.parametrize("n", [0, 1])
    def test_hardly_any_case(self, kind, n):
        loss, logits, times, event, _ = batch(kind)
        value = loss(logits[:n], times[:n], event[:n])
        value.backward()
        assert value.isfinite() and value.shape == () and logits.grad.isfinite().all()

    def test_padding_changes_nothing(self, kind):
        loss, logits, times, event, _ = batch(kind, n=20)
        padded = torch.cat([logits, torch.full((3, logits.shape[1]), math.nan)]).detach().requires_grad_()
        event = event.double()
        longer = torch.cat([times, torch.tensor([math.nan, math.nan, 5.0])])
        events = torch.cat([event, torch.tensor([math.nan, 1.0, math.nan])])
        value, wanted = loss(padded, longer, events), loss(logits, times, event)
        value.backward(), wanted.backward()
        assert torch.equal(value, wanted)
        assert torch.equal(padded.grad[:20], logits.grad) and not padded.grad[20:].any()

    def test_nothing_known(self, kind):
        loss, logits, times, event, _ = batch(kind)
        value = loss(logits, torch.full_like(times, math.nan), event)
        value.backward()
        assert value == 0 and not logits.grad.any()

    def test_extreme_logits_are_finite(self, kind):
        loss, logits, times, event, _ = batch(kind, dtype=torch.float32)
        large = (1e4 * logits.detach()).requires_grad_()
        value = loss(large, times, event)
        value.backward()
        assert value.isfinite() and large.grad.isfinite().all()

    def test_float32_under_autocast(self, kind):
        loss, logits, times, event, _ = batch(kind, dtype=torch.float32)
        half = logits.detach().bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(half, times, event)
        assert value.dtype == torch.float32
        assert torch.equal(value, loss(half.float(), times, event))

    def test_the_order_of_cases_does_not_matter(self, kind):
        loss, logits, times, event, _ = batch(kind)
        order = torch.randperm(len(times), generator=torch.Generator().manual_seed(0))
        assert loss(logits[order], times[order], event[order]).item() == pytest.approx(
            loss(logits, times, event).item(), abs=1e-12
        )

    def test_shapes_are_checked(self, kind):
        loss, logits, times, event, _ = batch(kind)
        with pytest.raises(UniconError, match="expected logits"):
            loss(logits.repeat(1, 2), times, event)
        with pytest.raises(UniconError, match="expected logits"):
            loss(logits, times[:, None], event)

    @pytest.mark.parametrize("edges", [(), (0.0, 5.0), (5.0, 5.0), (math.nan,)])
    def test_edges_are_checked(self, kind, edges):
        with pytest.raises(PlanError, match="edges"):
            SURVIVAL_LOSSES[kind](edges)

    def test_curves_fall_and_risk_follows_them(self, kind):
        _, logits, times, event, edges = batch(kind)
        baseline = breslow_baseline(logits[:, :1], times, event)
        curve = survival_curve(kind, 3 * logits.float(), edges, baseline)
        assert curve.shape == (80, 5) and curve.dtype == torch.float64 and not curve.requires_grad
        assert ((curve >= 0) & (curve <= 1)).all() and (curve.diff(dim=1) <= 1e-12).all()
        lived = torch.trapezoid(torch.nn.functional.pad(curve, (1, 0), value=1.0), torch.tensor([0.0, *edges]).double())
        assert (lived[risk_of(kind, 3 * logits.float(), edges).argsort()].diff() <= 1e-9).all()

    def test_learns_the_order_of_a_known_hazard(self, kind):
        generator = np.random.default_rng(0)
        x = generator.normal(size=150)
        times = torch.from_numpy(generator.exponential(500 * np.exp(-x)))
        event = times < 1500
        times, edges = times.clamp(max=1500.0), time_bins(times, event)
        loss, inputs = SURVIVAL_LOSSES[kind](edges), torch.from_numpy(x)[:, None]
        weights = torch.zeros(2, loss.outputs(edges), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=30, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            value = loss(inputs * weights[0] + weights[1], times, event) + 0.01 * weights[0].square().sum()
            value.backward()
            return value

        optimizer.step(closure)
        risk = risk_of(kind, inputs * weights[0] + weights[1], edges)
        assert spearmanr(risk, x).statistic > 0.98


class TestCurves:
    def test_risk_is_in_days(self):
        sure = torch.tensor([[-40.0, -40.0]]), torch.tensor([[40.0, 0.0]])  # no event; an event in the first bin
        assert risk_of("deephit", sure[0], (100.0, 300.0)).item() == pytest.approx(-300, abs=1e-6)
        assert risk_of("deephit", sure[1], (100.0, 300.0)).item() == pytest.approx(-50, abs=1e-6)

    def test_median(self):
        curves = torch.tensor([[0.9, 0.6, 0.4], [0.2, 0.1, 0.0], [0.9, 0.8, 0.7], [0.8, 0.5, 0.5], [1.0, 1.0, 0.5]])
        found = median_survival_days(curves, (100.0, 200.0, 400.0)).tolist()
        assert found == pytest.approx([300.0, 62.5, math.inf, 200.0, 400.0], rel=1e-5)

    def test_cox_needs_its_baseline(self):
        with pytest.raises(UniconError, match="breslow_baseline"):
            survival_curve("cox", torch.zeros(2, 1), (10.0,))

    def test_baseline_of_no_event_is_no_hazard(self):
        times, event = cohort(10)
        nothing = breslow_baseline(torch.zeros(10, 1), times, torch.zeros_like(event))
        assert nothing == BaselineHazard((), ())
        assert (survival_curve("cox", torch.full((2, 1), 90.0), (10.0, 500.0), nothing) == 1).all()

    def test_baseline_survives_json_and_extreme_outputs(self):
        times, event = cohort(40)
        logits = torch.linspace(-2000, 2000, 40)[:, None]
        baseline = breslow_baseline(logits, times, event)
        assert from_dict(BaselineHazard, to_dict(baseline), "here") == baseline
        assert survival_curve("cox", logits, (100.0, 500.0), baseline).isfinite().all()

    def test_unknown_kind(self):
        with pytest.raises(UniconError, match="cox, deephit, mtlr"):
            risk_of("weibull", torch.zeros(1, 1), (1.0,))
