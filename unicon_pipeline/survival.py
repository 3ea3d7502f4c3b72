"""Time to an event as a network learns it and says it: time bins, losses, survival curves, risk.

Bin j reaches from edge j - 1 (excluded) to edge j (included), from 0 in the first, and without end in the last: K edges
make K + 1 bins. What is known of a case is the set of bins that its event may be in: the one where it was seen, or,
where follow-up ended before, all bins that end later. Times are days. A kind of loss is one registered class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from unicon_pipeline.errors import PlanError, UniconError
from unicon_pipeline.registry import Registry

SURVIVAL_LOSSES: Registry[type[SurvivalLoss]] = Registry("survival loss")

# In simulated cohorts of 39 and 120 cases, anything from 1 to 8 events in a bin gave the same C-index (within 0.005),
# but from about 5 on the better Brier score.
EVENTS_PER_BIN = 5

# DeepHit's weight and width of its ranking term (Lee 2018).
RANKING_WEIGHT = 0.2
RANKING_SIGMA = 0.1


@dataclass(frozen=True)
class BaselineHazard:
    """The cumulative hazard of a case whose Cox output is 0: its logarithm from each of `days` on; before them, 0."""

    days: tuple[float, ...]
    log_cumulative: tuple[float, ...]


def time_bins(time_days: Sequence[float], event: Sequence[float], count: int = 12) -> tuple[float, ...]:
    """Inner edges, strictly increasing, between `count` bins that hold equally many of the events given.

    Quantiles of the events' times, as in Yu 2011 and Lee 2018, and not of the Kaplan-Meier curve (Kvamme 2021): each
    bin is learned from as many events. There are fewer bins where one would hold less than `EVENTS_PER_BIN` events,
    but always two, and fewer where events are tied.

    Args:
        time_days: (n,) of the training cases, to the event or to the end of follow-up.
        event: (n,) 1 or True where the event was seen. NaN in either is a case to leave out.
        count: at least 2.

    Raises:
        PlanError: no event, which leaves nothing to learn.
    """
    times, seen = np.asarray(time_days, np.float64), np.asarray(event, np.float64)
    times = times[(seen > 0) & np.isfinite(times)]
    if not len(times):
        raise PlanError(
            f"None of the {len(seen)} training cases has an event, so there is no time to an event to learn. "
            "Prognosis needs cases with event = 1 in targets.csv, some in every training part of a cross-validation."
        )
    bins = max(2, min(count, len(times) // EVENTS_PER_BIN))
    return tuple(np.unique(np.quantile(times, np.arange(1, bins) / bins)).tolist())


class SurvivalLoss(nn.Module, ABC):
    """What every kind of loss offers; `edges` are those of `time_bins`."""

    def __init__(self, edges: Sequence[float]) -> None:
        """Raises PlanError: no edge, or edges that do not increase from above 0."""
        super().__init__()
        self.edges = tuple(edges)
        if not edges or not all(low < high for low, high in zip((0.0, *edges), edges)):
            raise PlanError(f"Expected edges of time bins that increase from above 0 days, found {self.edges}.")

    @staticmethod
    def outputs(edges: Sequence[float]) -> int:
        """The number of logits that a case needs."""
        return len(edges)

    def forward(self, logits: Tensor, time_days: Tensor, event: Tensor) -> Tensor:
        """The loss as a scalar, float32 or wider, under autocast too; 0 where no case is known.

        Args:
            logits: (B, outputs).
            time_days: (B,) to the event or to the end of follow-up. NaN, here or in `event`, is a case without
                outcome, or padding: it changes neither the value nor the gradient.
            event: (B,) 1 or True where the event was seen.

        Raises:
            UniconError: the shapes do not fit.
        """
        cases, width = len(logits), self.outputs(self.edges)
        if logits.shape != (cases, width) or time_days.shape != (cases,) or event.shape != (cases,):
            raise UniconError(
                f"{type(self).__name__}: expected logits (B, {width}), times (B,) and events (B,), "
                f"found {tuple(logits.shape)}, {tuple(time_days.shape)} and {tuple(event.shape)}."
            )
        with torch.autocast(device_type=logits.device.type, enabled=False):
            known = ~(time_days.isnan() | event.isnan())
            logits = logits[known].to(torch.promote_types(logits.dtype, torch.float32))
            return self.loss(logits, time_days[known].double(), event[known] > 0)

    @abstractmethod
    def loss(self, logits: Tensor, time_days: Tensor, event: Tensor) -> Tensor:
        """As `forward`, of the known cases alone, B >= 0; `time_days` float64, `event` boolean."""

    @staticmethod
    @abstractmethod
    def curve(logits: Tensor, edges: Sequence[float], baseline: BaselineHazard | None) -> Tensor:
        """As `survival_curve`, of float64 logits."""

    @classmethod
    def risk(cls, logits: Tensor, edges: Sequence[float]) -> Tensor:
        """As `risk_of`, of float64 logits."""
        curve = functional.pad(cls.curve(logits, edges, None), (1, 0), value=1.0)
        return -torch.trapezoid(curve, logits.new_tensor((0.0, *edges)), dim=1)


class BinnedLoss(SurvivalLoss):
    """Minus the log probability of the bins that a case's event may be in, mean over the cases."""

    @staticmethod
    @abstractmethod
    def log_probabilities(logits: Tensor) -> Tensor:
        """(B, K) -> (B, K + 1), of the event lying in each bin."""

    def loss(self, logits: Tensor, time_days: Tensor, event: Tensor) -> Tensor:
        """See the base."""
        if not len(logits):
            return logits.sum()
        return self.likelihood_loss(self.log_probabilities(logits), self.bins(time_days, event), event)

    def bins(self, time_days: Tensor, event: Tensor) -> Tensor:
        """(B,) the bin of the event, or the first that is possible: follow-up to an edge saw the bin before it."""
        edges = time_days.new_tensor(self.edges)
        return torch.where(event, torch.bucketize(time_days, edges), torch.bucketize(time_days, edges, right=True))

    @staticmethod
    def likelihood_loss(log_p: Tensor, bins: Tensor, event: Tensor) -> Tensor:
        """A scalar from (B, K + 1), (B,) and (B,)."""
        every = torch.arange(log_p.shape[1], device=log_p.device)
        possible = torch.where(event[:, None], every == bins[:, None], every >= bins[:, None])
        return -log_p.masked_fill(~possible, -torch.inf).logsumexp(dim=1).mean()

    @classmethod
    def curve(cls, logits: Tensor, edges: Sequence[float], baseline: BaselineHazard | None) -> Tensor:
        """See the base."""
        later = cls.log_probabilities(logits).exp()[:, 1:]  # (B, K), bin j + 1 lies behind edge j
        return later.flip(1).cumsum(1).flip(1).clamp(max=1.0)


@SURVIVAL_LOSSES.register("mtlr")
class MTLRLoss(BinnedLoss):
    """Multi-task logistic regression with censoring (Yu 2011).

    Logit j argues for an event before edge j, so that a bin's score is the sum of the logits from its own on.
    """

    @staticmethod
    def log_probabilities(logits: Tensor) -> Tensor:
        """See the base."""
        scores = logits.flip(1).cumsum(1).flip(1)
        return functional.log_softmax(functional.pad(scores, (0, 1)), dim=1)


@SURVIVAL_LOSSES.register("deephit")
class DeepHitLoss(BinnedLoss):
    """Likelihood, and a ranking term for cases whose event came first (Lee 2018), of a single kind of event.

    Each logit is a bin's score, that of the last is 0. Of each pair the probability of an event up to the earlier
    event's bin should be the larger for the case that had it; mean over all B x B pairs, as in Lee's own code. Lee
    counts a censored case's own bin as survived, here it is possible: bins are wide, and the last has no end.
    """

    @staticmethod
    def log_probabilities(logits: Tensor) -> Tensor:
        """See the base."""
        return functional.log_softmax(functional.pad(logits, (0, 1)), dim=1)

    def loss(self, logits: Tensor, time_days: Tensor, event: Tensor) -> Tensor:
        """See the base."""
        likelihood = super().loss(logits, time_days, event)
        if not len(logits):
            return likelihood
        cumulative = self.log_probabilities(logits).exp().cumsum(1)  # (B, K + 1)
        by_then = cumulative[:, self.bins(time_days, event)].T  # (B, B): of case j, up to the bin of case i
        earlier = time_days[:, None] < time_days
        earlier = event[:, None] & (earlier | ((time_days[:, None] == time_days) & ~event))
        wrong = torch.exp((by_then - by_then.diagonal()[:, None]) / RANKING_SIGMA)
        return likelihood + RANKING_WEIGHT * (wrong * earlier).mean()


@SURVIVAL_LOSSES.register("cox")
class CoxLoss(SurvivalLoss):
    """Minus Cox's log partial likelihood, mean over the events; Efron's handling of ties (Efron 1977).

    The one logit is the log hazard ratio. A batch without event says nothing: 0, with a gradient of 0.
    """

    @staticmethod
    def outputs(edges: Sequence[float]) -> int:
        """See the base."""
        return 1

    def loss(self, logits: Tensor, time_days: Tensor, event: Tensor) -> Tensor:
        """See the base."""
        score, moments = logits[:, 0], time_days[event]
        if not len(moments):
            return 0.0 * score.sum()
        tied = (moments[:, None] == moments).to(score)
        before = tied.tril(-1).sum(1, keepdim=True) / tied.sum(1, keepdim=True)  # share of a tie that came earlier
        # (events, B) a case's part in the risk set: of tied events, those that came earlier are gone by that share
        part = (time_days >= moments[:, None]).to(score) - before * ((time_days == moments[:, None]) & event)
        return ((score + part.log()).logsumexp(dim=1) - score[event]).mean()

    @staticmethod
    def curve(logits: Tensor, edges: Sequence[float], baseline: BaselineHazard | None) -> Tensor:
        """See the base."""
        if baseline is None:
            raise UniconError("A survival curve of a Cox model needs the baseline hazard: see breslow_baseline.")
        reached = np.searchsorted(baseline.days, edges, side="right")
        log_hazard = logits.new_tensor((-np.inf, *baseline.log_cumulative))[torch.from_numpy(reached).to(logits.device)]
        return torch.exp(-torch.exp(logits + log_hazard))

    @classmethod
    def risk(cls, logits: Tensor, edges: Sequence[float]) -> Tensor:
        """See the base."""
        return logits[:, 0]


def breslow_baseline(logits: Tensor, time_days: Tensor, event: Tensor) -> BaselineHazard:
    """The baseline hazard of the training cases under a Cox model's outputs (Breslow 1972); of no event, 0 throughout.

    Args:
        logits: (n, 1).
        time_days, event: (n,) as in `SurvivalLoss.forward`, NaN where unknown.
    """
    known = ~(time_days.isnan() | event.isnan())
    score, times, seen = logits[known, 0].detach().double(), time_days[known].double(), event[known] > 0
    days, counts = times[seen].unique(return_counts=True)
    log_at_risk = score.masked_fill(times < days[:, None], -torch.inf).logsumexp(dim=1)
    log_cumulative = torch.logcumsumexp(counts.double().log() - log_at_risk, dim=0)
    return BaselineHazard(tuple(days.tolist()), tuple(log_cumulative.tolist()))


def survival_curve(kind: str, logits: Tensor, edges: Sequence[float], baseline: BaselineHazard | None = None) -> Tensor:
    """The probability of no event up to each edge, (B, K) float64, never rising.

    Args:
        kind: one of `SURVIVAL_LOSSES`.
        logits: (B, outputs).
        edges: those of the training.
        baseline: for `cox` alone, `breslow_baseline` of the training cases.

    Raises:
        UniconError: an unknown kind, or a Cox model without baseline.
    """
    return SURVIVAL_LOSSES[kind].curve(logits.detach().double(), edges, baseline)


def risk_of(kind: str, logits: Tensor, edges: Sequence[float]) -> Tensor:
    """(B,) float64; higher = earlier event. Comparable between cases of one model only.

    `cox`: the log hazard ratio. Else minus the restricted mean survival time: minus the days without event expected
    up to the last edge, the curve linear between edges. The alternative, the expected number of events (the sum of
    the cumulative hazards, Ishwaran 2008), is without bound where a curve nears 0, and so hangs on the end of the
    curve, where the fewest cases are.
    """
    return SURVIVAL_LOSSES[kind].risk(logits.detach().double(), edges)


def median_survival_days(survival: Tensor, edges: Sequence[float]) -> Tensor:
    """(B,) the day on which a curve (B, K) reaches one half, linear between edges; infinite where it does not."""
    days = survival.new_tensor((0.0, *edges))
    curve = functional.pad(survival, (1, 0), value=1.0)
    after = (curve > 0.5).sum(1).clamp(max=len(edges))[:, None]  # the first edge at or below one half
    high, low = curve.gather(1, after - 1)[:, 0], curve.gather(1, after)[:, 0]
    start, end = days[after[:, 0] - 1], days[after[:, 0]]
    return torch.where(low > 0.5, torch.inf, start + (end - start) * (high - 0.5) / (high - low))
