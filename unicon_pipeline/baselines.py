"""What simple models reach on the same folds: a result means something only beside them.

Ridge regression of a few columns: Cox's model for times, the logistic model for classes and findings. Everything that
is fitted (medians of gaps, means, standard deviations, coefficients) is fitted on the other folds alone; only the
constant needs no folds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from unicon_pipeline.errors import UniconError

# In units of the mean log likelihood of a case, for columns of unit variance. A fixed value: in simulated cohorts of 39
# and 120 cases with 6 to 20 columns its C-index on new cases was within 0.003 of the best of seven from 0.003 to 3, and
# at least that of choosing among them by inner cross-validation, which follows chance in small cohorts.
PENALTY = 0.1

# Baseline -> the region descriptors that it reads, and those of which one must be known in some case. All are positive
# and skewed: it takes their logarithms.
VOLUME = ("volume_ml",)
SUV = ("suv_max", "suv_mean", "suv_peak", "metabolic_volume_ml", "tlg_g")
BASELINES = {"volume": (VOLUME, VOLUME), "volume_suv": ((*VOLUME, *SUV), SUV)}

# Columns (n, d) with NaN for gaps, or a function that makes them from the numbers of the training rows.
Features = np.ndarray | Callable[[np.ndarray], np.ndarray]

NEWTON_STEPS = 100
NEWTON_TOLERANCE = 1e-13


@dataclass(frozen=True)
class Scale:
    """Brings columns to mean 0 and standard deviation 1 over the rows fitted; a constant column to 0."""

    mean: tuple[float, ...]
    sd: tuple[float, ...]

    @classmethod
    def fit(cls, x: np.ndarray) -> Scale:
        """`x` (n, d), finite."""
        spread = x.std(axis=0)
        constant = spread <= 1e-9 * np.abs(x).max(axis=0, initial=0.0)
        return cls(tuple(x.mean(axis=0).tolist()), tuple(np.where(constant, 0.0, spread).tolist()))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        sd = np.array(self.sd)
        return np.divide(x - np.array(self.mean), sd, out=np.zeros(x.shape), where=sd > 0)


@dataclass(frozen=True)
class RidgeCox:
    """Cox's proportional hazards with a ridge penalty and Efron's handling of ties (Efron 1977).

    `coefficients` are those of the scaled columns. They maximise the log partial likelihood divided by the number of
    cases, minus penalty / 2 times their squared norm, as lifelines' do.
    """

    scale: Scale
    coefficients: tuple[float, ...]

    @classmethod
    def fit(cls, x: np.ndarray, time_days: np.ndarray, event: np.ndarray, penalty: float = PENALTY) -> RidgeCox:
        """Without any event, all coefficients are 0. Memory grows with events times cases.

        Args:
            x: (n, d), finite.
            time_days: (n,) to the event or to the end of follow-up.
            event: (n,) 1 or True where the event was seen.
            penalty: above 0.
        """
        scale = Scale.fit(x)
        terms = _cox_terms(scale(x), np.asarray(time_days, np.float64), np.asarray(event) > 0, penalty)
        return cls(scale, tuple(_newton(terms, np.zeros(x.shape[1])).tolist()))

    def risk(self, x: np.ndarray) -> np.ndarray:
        """(n,) log hazard ratio to a case with the fitted rows' mean columns; higher = earlier event."""
        return self.scale(x) @ np.array(self.coefficients)


@dataclass(frozen=True)
class RidgeLogistic:
    """Multinomial logistic regression with a ridge penalty; the intercepts are free.

    `coefficients` (classes, d) of the scaled columns, for the `classes` seen. Maximises the mean log likelihood minus
    penalty / 2 times their squared norm, which is scikit-learn's with C = 1 / (cases x penalty). Of two classes the
    norm is that of the difference between both rows, as in scikit-learn.
    """

    scale: Scale
    classes: tuple[int, ...]
    intercepts: tuple[float, ...]
    coefficients: tuple[tuple[float, ...], ...]

    @classmethod
    def fit(cls, x: np.ndarray, classes: np.ndarray, penalty: float = PENALTY) -> RidgeLogistic:
        """`x` (n, d), finite; `classes` (n,) their numbers; `penalty` above 0."""
        scale, (seen, index) = Scale.fit(x), np.unique(np.asarray(classes, np.intp), return_inverse=True)
        design = np.column_stack([np.ones(len(x)), scale(x)])
        # Two rows b and -b stand for a difference of 2 b: half of (2 b)^2 is b^2 + (-b)^2.
        terms = _logistic_terms(design, index, len(seen), penalty * (2 if len(seen) == 2 else 1))
        fitted = _newton(terms, np.zeros(len(seen) * design.shape[1])).reshape(len(seen), -1)
        rows = tuple(tuple(row) for row in fitted[:, 1:].tolist())
        return cls(scale, tuple(seen.tolist()), tuple(fitted[:, 0].tolist()), rows)

    def probabilities(self, x: np.ndarray, count: int) -> np.ndarray:
        """(n, count) over the classes 0 to count - 1; 0 for a class that was not seen."""
        result = np.zeros((len(x), count))
        weights = np.array(self.coefficients).reshape(len(self.classes), x.shape[1])
        result[:, self.classes] = np.exp(log_softmax(self.scale(x) @ weights.T + self.intercepts, axis=1))
        return result


def out_of_fold(
    features: Features, targets: np.ndarray, folds: Sequence[Sequence[int]], kind: str, penalty: float = PENALTY
) -> np.ndarray:
    """Each fold's predictions by a ridge model of the other folds; NaN for rows in no fold.

    A gap becomes the median of the training rows, and a column that says where the gaps are joins where these have
    some. A column that is all gaps in the training rows is left out. Without any column: the constant model.

    Args:
        features: one row a case.
        targets: `survival` (n, 2): days, and 1 for an event or 0; `classes` (n,) the number of the class;
            `findings` (n, F) 0 or 1. Of the latter two NaN is a blank, predicted but not learned from.
        folds: row numbers; all cases of a patient must be in one.
        kind: one of `KINDS`.

    Returns:
        `survival` (n,) risk, higher = earlier event; `classes` (n, K) and `findings` (n, F) probabilities.

    Raises:
        UniconError: an unknown kind, a penalty not above 0, or fewer than two folds with cases.
    """
    _check(kind, folds, penalty)
    targets, result = np.asarray(targets, np.float64), None
    for held in (np.asarray(fold, np.intp) for fold in folds):
        training = np.setdiff1d(np.concatenate([np.asarray(fold, np.intp) for fold in folds]), held)
        columns = features(training) if callable(features) else features
        x = _complete(np.asarray(columns, np.float64), training)
        predicted = KINDS[kind](x[training], targets[training], x[held], targets, penalty)
        result = np.full((len(targets), *predicted.shape[1:]), np.nan) if result is None else result
        result[held] = predicted
    return result


def baseline_predictions(
    targets: np.ndarray,
    folds: Sequence[Sequence[int]],
    kind: str,
    descriptors: Sequence[Mapping[str, float]] = (),
    clinical: Features | None = None,
    penalty: float = PENALTY,
) -> dict[str, np.ndarray]:
    """Baseline -> its out-of-fold predictions, as `out_of_fold`, for all baselines that the data allow.

    `constant` is the rate over all cases (prognosis: equal risks). Fitted fold by fold it would be lowest where the
    cases held out have the highest rate, and so rank them backwards; and one number learns nothing from a case.

    Args:
        descriptors: of each case's region, name -> figure, NaN where unknown; empty: no region.
        clinical: encoded covariates; the function form keeps the encoder's fit to the training rows.
    """
    _check(kind, folds, penalty)
    targets = np.asarray(targets, np.float64)
    nothing = np.empty((len(targets), 0))
    result = {"constant": KINDS[kind](nothing, targets, nothing, targets, penalty)}
    if clinical is not None:
        result["clinical"] = out_of_fold(clinical, targets, folds, kind, penalty)
    for baseline, (names, needed) in BASELINES.items():
        if any(case.get(name, np.nan) > 0 for case in descriptors for name in needed):
            figures = np.array([[case.get(name, np.nan) for name in names] for case in descriptors])
            logs = np.log(figures, out=np.full(figures.shape, np.nan), where=figures > 0)
            result[baseline] = out_of_fold(logs, targets, folds, kind, penalty)
    return result


def _check(kind: str, folds: Sequence[Sequence[int]], penalty: float) -> None:
    if kind not in KINDS:
        raise UniconError(f"Unknown kind of baseline {kind!r}; there are: {', '.join(KINDS)}.")
    if not penalty > 0:
        raise UniconError(f"The ridge penalty must be above 0, not {penalty}: separable classes have no fit without.")
    filled = sum(len(fold) > 0 for fold in folds)
    if filled < 2:
        raise UniconError(
            f"A baseline learns from one fold to predict another, so it needs two with cases, not {filled}."
        )


def _complete(x: np.ndarray, training: np.ndarray) -> np.ndarray:
    missing = np.isnan(x)
    known = ~missing[training].all(axis=0)
    x, missing = x[:, known], missing[:, known]
    if not missing.any():
        return x
    # Columns of one modality lack the same cases: one indicator says so, or they would count several times.
    patterns, first = np.unique(missing[training], axis=1, return_index=True)
    indicators = missing[:, first[patterns.any(axis=0)]]
    return np.column_stack([np.where(missing, np.nanmedian(x[training], axis=0), x), indicators])


def _survival(x: np.ndarray, targets: np.ndarray, held: np.ndarray, _: np.ndarray, penalty: float) -> np.ndarray:
    return RidgeCox.fit(x, targets[:, 0], targets[:, 1], penalty).risk(held)


def _classes(x: np.ndarray, targets: np.ndarray, held: np.ndarray, every: np.ndarray, penalty: float) -> np.ndarray:
    known, count = ~np.isnan(targets), int(np.nanmax(every, initial=0)) + 1
    if not known.any():
        return np.full((len(held), count), 1 / count)
    return RidgeLogistic.fit(x[known], targets[known], penalty).probabilities(held, count)


def _findings(x: np.ndarray, targets: np.ndarray, held: np.ndarray, _: np.ndarray, penalty: float) -> np.ndarray:
    binary = np.array([0.0, 1.0])
    return np.column_stack([_classes(x, column, held, binary, penalty)[:, 1] for column in targets.T])


KINDS = {"survival": _survival, "classes": _classes, "findings": _findings}

# The penalised negative log likelihood of a case at some coefficients, its gradient, and its Hessian.
Terms = Callable[[np.ndarray], tuple[float, np.ndarray, np.ndarray]]


def _cox_terms(z: np.ndarray, time_days: np.ndarray, event: np.ndarray, penalty: float) -> Terms:
    n = len(z)
    events = np.flatnonzero(event)[np.argsort(time_days[event], kind="stable")]
    moments = time_days[events]
    _, first, index, count = np.unique(moments, return_index=True, return_inverse=True, return_counts=True)
    before = (np.arange(len(events)) - first[index]) / count[index]  # share of the tied events that came earlier
    # (events, n): a case's part in the risk set; of tied events, those that came earlier are gone, each by its share.
    part = (time_days >= moments[:, None]) - before[:, None] * ((time_days == moments[:, None]) & event)

    def terms(b: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        score = z @ b
        hazard = np.exp(score - score.max())
        total = part @ hazard
        share = part * hazard / total[:, None]
        mean = share @ z  # (events, d)
        value = (np.log(total) + score.max() - score[events]).sum() / n + penalty / 2 * (b @ b)
        gradient = (mean - z[events]).sum(axis=0) / n + penalty * b
        curvature = (z.T * share.sum(axis=0)) @ z - mean.T @ mean
        return value, gradient, curvature / n + penalty * np.eye(len(b))

    return terms


def _logistic_terms(design: np.ndarray, index: np.ndarray, count: int, penalty: float) -> Terms:
    n, width = design.shape
    wanted = np.eye(count)[index]
    ridge = penalty * np.tile(np.arange(width) > 0, count)  # not for the intercepts, the first column

    def terms(b: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        logs = log_softmax(design @ b.reshape(count, width).T, axis=1)  # (n, classes)
        p = np.exp(logs)
        spread = p[:, :, None] * (np.eye(count) - p[:, None, :])  # (n, classes, classes)
        curvature = np.einsum("ni,nkl,nj->kilj", design, spread, design, optimize=True).reshape(len(b), len(b))
        value = -(logs * wanted).sum() / n + (ridge * b) @ b / 2
        return value, ((p - wanted).T @ design).ravel() / n + ridge * b, curvature / n + np.diag(ridge)

    return terms


def _newton(terms: Terms, start: np.ndarray) -> np.ndarray:
    """The minimum of a convex function, by Newton's method with steps halved until they lead down."""
    if not len(start):
        return start
    here, (value, gradient, hessian) = start, terms(start)
    for _ in range(NEWTON_STEPS):
        # Least squares: equal shifts of all intercepts change nothing, so the Hessian of several classes is singular.
        step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        gain, length = gradient @ step, 1.0
        while (new := terms(here - length * step))[0] > value + NEWTON_TOLERANCE and length > 1e-6:
            length /= 2
        here, (value, gradient, hessian) = here - length * step, new
        if gain < NEWTON_TOLERANCE:
            return here
    raise UniconError("A baseline's fit did not converge: a column has extreme outliers. Leave it out or transform it.")
