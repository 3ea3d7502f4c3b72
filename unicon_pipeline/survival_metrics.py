"""How good risks and survival curves are: ranking, error and calibration, each with an interval over patients.

Censored cases are made up for by inverse probability of censoring weights. The censoring distribution is an argument,
since it is that of the training cases (of out-of-fold predictions: of the whole cohort, whose cases all trained). It
is held fixed when patients are resampled. What cannot be computed is None with the reason, never a made-up number.

Definitions are those of lifelines and scikit-survival, which the tests compare with. Every metric is a function of case
weights, so that one matrix product serves all resamples of a bootstrap. torchsurv has most of these, but takes seconds
to import, and torch with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from unicon_pipeline.metrics import finite_or_none, ratio, resample_counts

# tau is the last day of the training cases on which this share of them is still followed, and up to which they would be
# without events. No weight then exceeds its inverse: Uno's are squared, so that a single case could decide.
FOLLOWED_SHARE = 0.1

# The integrated Brier score sums over this many equal steps from 0 to tau.
BRIER_STEPS = 100

# A Kaplan-Meier estimate of fewer cases says little; more groups show no more.
CASES_PER_GROUP = 10
MAX_GROUPS = 5

# Years at which a prognosis is judged: those that have so many training cases with an event before, and beyond.
HORIZONS_DAYS = (365.0, 730.0, 1095.0, 1825.0)
CASES_AT_HORIZON = 5

# Where a metric is undefined in this share of the resamples, the others no longer show its spread.
MAX_LEFT_OUT = 0.25

# (resamples, n) how often each case is drawn -> (resamples,) the metric, NaN where undefined.
Measure = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Censoring:
    """P(followed beyond a day): `probability[k]` from `days[k]` on, 1 before. Metrics stop at `tau_days`."""

    days: tuple[float, ...]
    probability: tuple[float, ...]
    tau_days: float

    @classmethod
    def fit(cls, time_days: np.ndarray, event: np.ndarray) -> Censoring:
        """The Kaplan-Meier estimate of the censoring; events come before the censoring of their day.

        Args:
            time_days: (n,) to the event or to the end of follow-up, n >= 1.
            event: (n,) 1 or True where the event was seen.
        """
        times, seen = _checked(time_days, event)
        days = np.unique(times)
        lost = ((times == days[:, None]) & ~seen).sum(axis=1)
        followed = (times >= days[:, None]).sum(axis=1)
        at_risk = followed - ((times == days[:, None]) & seen).sum(axis=1)
        probability = np.cumprod(1 - ratio(lost, at_risk, otherwise=0.0))
        many = np.minimum(followed / len(times), probability) >= FOLLOWED_SHARE
        tau = days[many].max(initial=days[0])
        return cls(tuple(days.tolist()), tuple(probability.tolist()), float(tau))

    def __call__(self, days: np.ndarray) -> np.ndarray:
        """P(followed beyond each of `days`)."""
        return np.array((1.0, *self.probability))[np.searchsorted(self.days, days, side="right")]

    def ends_before(self, day: float) -> bool:
        """Whether no training case says how many are followed beyond `day`."""
        return day > self.days[-1] or float(self(np.asarray(day))) == 0


@dataclass(frozen=True, eq=False)
class Curves:
    """Survival curves: `survival` (n, K), the probability of no event up to each of the increasing `days` (K,)."""

    days: Sequence[float]
    survival: np.ndarray

    def at(self, days: np.ndarray) -> np.ndarray:
        """(n, len(days)) survival, linear between the days known and from 1 on day 0; NaN behind the last."""
        known = np.array((0.0, *self.days))
        rows = np.pad(np.asarray(self.survival, np.float64), ((0, 0), (1, 0)), constant_values=1.0)
        shape = (len(rows), len(days))
        return np.array([np.interp(days, known, row, right=np.nan) for row in rows]).reshape(shape)


@dataclass(frozen=True)
class SurvivalScore:
    """One metric; `low` and `high` bound it (95 % percentile bootstrap over patients).

    `n` cases, `events` of them seen; of a metric that stops at a day, those up to it. `left_out` resamples were
    undefined and are not in the interval. `remark`: why something is None, or what to mind.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    events: int
    left_out: int
    remark: str = ""


@dataclass(frozen=True)
class SurvivalPoint:
    """Cases of similar prediction: their mean predicted survival at the horizon, and the Kaplan-Meier estimate."""

    predicted: float
    observed: SurvivalScore


@dataclass(frozen=True)
class HorizonScores:
    """At one horizon: `auc`, and with curves `brier` and `calibration`; the points run from the poorest prognosis."""

    days: float
    scores: dict[str, SurvivalScore]
    calibration: tuple[SurvivalPoint, ...]


@dataclass(frozen=True)
class Survival:
    """`scores`: `harrell_c`, `uno_c` up to `tau_days`, and with curves `integrated_brier` up to `brier_days`."""

    scores: dict[str, SurvivalScore]
    horizons: tuple[HorizonScores, ...]
    tau_days: float
    brier_days: float | None


def survival_scores(
    time_days: np.ndarray,
    event: np.ndarray,
    risk: np.ndarray,
    censoring: Censoring,
    horizons: Sequence[float] = (),
    curves: Curves | None = None,
    patients: Sequence[Hashable] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Survival:
    """All metrics of predictions for cases that the model was not trained on.

    - `harrell_c`: the share of comparable pairs, those whose earlier time is an event, that the risk orders rightly,
      ties of risk one half (Harrell 1996). An event and the end of a follow-up on one day are comparable, two events
      are not.
    - `uno_c`: the same of events before tau, weighted so that it does not depend on the censoring (Uno 2011).
    - `auc`: of those with an event up to the horizon against those followed beyond it (Uno 2007), by the curves'
      value at the horizon where they reach it, else by the risk.
    - `brier`: mean squared error of the survival probability at the horizon (Graf 1999). `integrated_brier`: its mean
      from day 0 to tau, or to the end of the curves if that is earlier.
    - `calibration`: mean predicted survival at the horizon minus the Kaplan-Meier estimate, above 0 = too hopeful.

    Args:
        time_days: (n,) to the event or to the end of follow-up.
        event: (n,) 1 or True where the event was seen.
        risk: (n,), higher = earlier event.
        censoring: of the training cases, `Censoring.fit`.
        horizons: days.
        patients: the patient of each case, drawn as a whole; None: every case is its own.

    Raises:
        ValueError: shapes that do not fit, no case, or a value that is not finite.
    """
    times, seen = _checked(time_days, event)
    cohort = _Cohort(times, seen, np.asarray(risk, np.float64), censoring)
    labels = list(range(len(times)) if patients is None else patients)
    _check(cohort, curves, labels, horizons)
    draws, tau = list(resample_counts(labels, resamples, seed)), censoring.tau_days
    scores = {
        "harrell_c": _score(_harrell(cohort), cohort, draws),
        "uno_c": _score(_uno(cohort), cohort, draws, tau, cohort.unweighted(tau)),
    }
    end = None if curves is None else min(tau, float(curves.days[-1]))
    if curves is not None:
        scores["integrated_brier"] = _score(_brier(cohort, curves, end), cohort, draws, end, cohort.unweighted(end))
    return Survival(scores, tuple(_horizon(cohort, curves, float(day), draws) for day in horizons), tau, end)


def horizons(time_days: np.ndarray, event: np.ndarray) -> tuple[float, ...]:
    """Days at which a cohort (n,) says something of survival: whole years, else the median time of its events."""

    def told(day: float) -> bool:
        return min(((event > 0) & (time_days <= day)).sum(), (time_days > day).sum()) >= CASES_AT_HORIZON

    years = tuple(day for day in HORIZONS_DAYS if told(day))
    return years or ((float(np.ceil(np.median(time_days[event > 0]))),) if (event > 0).any() else ())


@dataclass(frozen=True, eq=False)
class _Cohort:
    """The cases evaluated, each array (n,)."""

    times: np.ndarray
    seen: np.ndarray
    risk: np.ndarray
    censoring: Censoring

    def unweighted(self, day: float) -> str:
        """Why no censoring weight exists up to `day`; empty where they exist."""
        return f"no training case is followed beyond day {day:g}" if self.censoring.ends_before(day) else ""

    def unfollowed(self, day: float) -> str:
        """Why there is no Kaplan-Meier estimate at `day`; empty where there is one."""
        last = self.times.max()
        known = last >= day or self.seen[self.times == last].all()
        return "" if known else f"no case is followed to day {day:g}"

    def event_weight(self, until: np.ndarray) -> np.ndarray:
        """(n,) the inverse probability of not being censored before an event that is `until`, else 0."""
        return ratio(until & self.seen, self.censoring(self.times), otherwise=0.0)


def _horizon(cohort: _Cohort, curves: Curves | None, day: float, draws: Sequence[np.ndarray]) -> HorizonScores:
    predicted = np.full(len(cohort.times), np.nan) if curves is None else curves.at(np.array([day]))[:, 0]
    reached = bool(np.isfinite(predicted).all())
    marker, why = (1 - predicted if reached else cohort.risk), cohort.unweighted(day)
    scores = {"auc": _score(_auc(cohort, marker, day), cohort, draws, day, why)}
    if curves is None:
        return HorizonScores(day, scores, ())
    short = "" if reached else f"the curves end on day {curves.days[-1]:g}"
    errors = _brier_errors(cohort, predicted[:, None], np.array([day]))[:, 0]
    scores["brier"] = _score(_mean(errors), cohort, draws, day, short or why)
    scores["calibration"] = _score(_gap(cohort, predicted, day), cohort, draws, day, short or cohort.unfollowed(day))
    return HorizonScores(day, scores, _points(cohort, predicted, day, draws) if reached else ())


def _harrell(cohort: _Cohort) -> Measure:
    return _pair_measure(_comparable(cohort).astype(np.float64), cohort.risk[cohort.seen], cohort.risk, cohort.seen)


def _uno(cohort: _Cohort) -> Measure:
    weight = cohort.event_weight(cohort.times < cohort.censoring.tau_days)[cohort.seen]
    pairs = _comparable(cohort) * weight[:, None] ** 2
    return _pair_measure(pairs, cohort.risk[cohort.seen], cohort.risk, cohort.seen)


def _auc(cohort: _Cohort, marker: np.ndarray, day: float) -> Measure:
    beyond, weight = cohort.times > day, cohort.event_weight(cohort.times <= day)
    found = weight > 0
    return _pair_measure(weight[found, None] * beyond, marker[found], marker, found)


def _comparable(cohort: _Cohort) -> np.ndarray:
    """(events, n) whether the case of the column is known to live longer without event."""
    times, moments = cohort.times, cohort.times[cohort.seen, None]
    return (times > moments) | ((times == moments) & ~cohort.seen)


def _pair_measure(pairs: np.ndarray, high: np.ndarray, low: np.ndarray, rows: np.ndarray) -> Measure:
    """The weighted share of `pairs` (m, n) in which `high` (m,) of the cases `rows` exceeds `low` (n,)."""
    right = pairs * ((high[:, None] > low) + 0.5 * (high[:, None] == low))

    def measure(weights: np.ndarray) -> np.ndarray:
        firsts = weights[:, rows]
        return ratio(((firsts @ right) * weights).sum(axis=1), ((firsts @ pairs) * weights).sum(axis=1))

    return measure


def _brier(cohort: _Cohort, curves: Curves, end: float) -> Measure:
    """Integrated: linear in the cases' errors, so these are integrated first."""
    days = np.linspace(0, end, BRIER_STEPS + 1)
    return _mean(np.trapezoid(_brier_errors(cohort, curves.at(days), days), days, axis=1) / end)


def _brier_errors(cohort: _Cohort, predicted: np.ndarray, days: np.ndarray) -> np.ndarray:
    """(n, len(days)) squared errors of the survival `predicted`, weighted; 0 for cases censored by then."""
    beyond = cohort.times[:, None] > days
    died = cohort.event_weight(np.ones(len(cohort.times), bool))[:, None] * ~beyond
    return died * predicted**2 + ratio(beyond, cohort.censoring(days)[None], otherwise=0.0) * (1 - predicted) ** 2


def _mean(values: np.ndarray) -> Measure:
    return lambda weights: weights @ values / weights.sum(axis=1)


def _gap(cohort: _Cohort, predicted: np.ndarray, day: float) -> Measure:
    mean, observed = _mean(predicted), _kaplan_meier(cohort, day)
    return lambda weights: mean(weights) - observed(weights)


def _kaplan_meier(cohort: _Cohort, day: float) -> Measure:
    """Survival at `day`; undefined where follow-up ends before, unless all have had the event by then."""
    order = np.argsort(cohort.times, kind="stable")
    times, seen = cohort.times[order], cohort.seen[order]
    first = np.unique(times, return_index=True)[1]
    until = first[times[first] <= day]

    def measure(weights: np.ndarray) -> np.ndarray:
        drawn = weights[:, order]
        at_risk = np.cumsum(drawn[:, ::-1], axis=1)[:, ::-1][:, until]
        died = np.add.reduceat(drawn * seen, first, axis=1)[:, : len(until)]
        survival = np.prod(1 - ratio(died, at_risk, otherwise=0.0), axis=1)
        followed = drawn[:, times >= day].any(axis=1)
        return np.where(followed | ((survival == 0) & drawn.any(axis=1)), survival, np.nan)

    return measure


def _points(
    cohort: _Cohort, predicted: np.ndarray, day: float, draws: Sequence[np.ndarray]
) -> tuple[SurvivalPoint, ...]:
    count = int(np.clip(len(predicted) // CASES_PER_GROUP, 1, MAX_GROUPS))
    group = np.searchsorted(np.quantile(predicted, np.arange(1, count) / count), predicted)
    points = []
    for inside in (group == number for number in np.unique(group)):
        members = _Cohort(cohort.times[inside], cohort.seen[inside], cohort.risk[inside], cohort.censoring)
        drawn = [block[:, inside] for block in draws]
        observed = _score(_kaplan_meier(members, day), members, drawn, day, members.unfollowed(day))
        points.append(SurvivalPoint(float(predicted[inside].mean()), observed))
    return tuple(points)


def _score(
    measure: Measure, cohort: _Cohort, draws: Sequence[np.ndarray], until: float = math.inf, why: str = ""
) -> SurvivalScore:
    """`why` it is undefined, where that is known before."""
    n, events = len(cohort.times), int((cohort.seen & (cohort.times <= until)).sum())
    value = math.nan if why else float(measure(np.ones((1, n)))[0])
    if math.isnan(value):
        reason = "no case is followed beyond an event" if events else "no event"
        return SurvivalScore(None, None, None, n, events, 0, why or reason)
    drawn = np.concatenate([measure(block) for block in draws]) if draws else np.empty(0)
    defined = drawn[~np.isnan(drawn)]
    left_out, low, high, remark = len(drawn) - len(defined), math.nan, math.nan, ""
    if not len(drawn):
        remark = "no interval: one patient shows no spread"
    elif left_out > MAX_LEFT_OUT * len(drawn):
        remark = f"no interval: undefined in {left_out} of {len(drawn)} resamples"
    elif np.ptp(defined) == 0:
        remark = f"no interval: {value:g} in every resample"
    else:
        low, high = np.quantile(defined, [0.025, 0.975])
    return SurvivalScore(value, finite_or_none(low), finite_or_none(high), n, events, left_out, remark)


def _checked(time_days: np.ndarray, event: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    times, seen = np.asarray(time_days, np.float64), np.asarray(event, np.float64)
    if times.ndim != 1 or not len(times) or times.shape != seen.shape:
        raise ValueError(f"Expected times (n,) and events (n,) of one case or more, found {times.shape}, {seen.shape}.")
    if not (np.isfinite(times) & (times > 0)).all() or not np.isin(seen, (0, 1)).all():
        raise ValueError("A time is not above 0 days or not finite, or an event is neither 0 nor 1.")
    return times, seen == 1


def _check(cohort: _Cohort, curves: Curves | None, patients: Sequence[Hashable], horizons: Sequence[float]) -> None:
    n = len(cohort.times)
    if cohort.risk.shape != (n,) or len(patients) != n:
        raise ValueError(f"Expected {n} risks and patients, found {cohort.risk.shape} and {len(patients)}.")
    if not np.isfinite(cohort.risk).all():
        raise ValueError("A risk is not finite: leave cases without prediction out before.")
    if not all(0 < day < math.inf for day in horizons):
        raise ValueError(f"A horizon must be a finite number of days above 0, found {list(horizons)}.")
    if curves is None:
        return
    survival, days = np.asarray(curves.survival), np.asarray(curves.days)
    if survival.shape != (n, len(days)) or not len(days) or not (np.diff(days, prepend=0.0) > 0).all():
        raise ValueError(f"Expected curves of {n} cases at increasing days, found {survival.shape} at {list(days)}.")
    if not ((survival >= 0) & (survival <= 1)).all():
        raise ValueError("A survival probability lies outside 0 to 1 or is NaN.")
