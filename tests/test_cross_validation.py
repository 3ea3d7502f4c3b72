"""Cross-validation: each case is predicted once a repeat by what never saw it, and patients stay whole."""

import numpy as np
import pytest
from test_folds import alone, task

from unicon_pipeline.cross_validation import cross_validate, folds_of, inner_folds
from unicon_pipeline.errors import PlanError


def prognosis(count=39, events=14):
    happened = [1.0] * events + [0.0] * (count - events)
    return task(alone(count), "prognosis", event=happened, time_days=range(1, count + 1))


def test_predictions_come_from_the_other_folds_alone():
    seen = []

    def fit(training, held, seed):
        assert not set(training) & set(held) and len(training) + len(held) == 39
        seen.append((seed, tuple(held)))
        return np.column_stack([held, np.full(len(held), seed)])

    found = cross_validate(39, fit, folds_of(prognosis()), repeats=3, seed=100)
    assert found.per_repeat.shape == (3, 39, 2)
    assert (found.per_repeat[:, :, 0] == np.arange(39)).all()
    assert [seed for seed, _ in seen] == list(range(100, 115))
    assert [held for _, held in seen] == [tuple(sorted(part)) for parts in found.folds for part in parts]
    np.testing.assert_array_equal(found.mean, found.per_repeat.mean(axis=0))


def test_repeats_have_other_folds_and_a_seed_the_same():
    folds, again = folds_of(prognosis(), seed=3), folds_of(prognosis(), seed=3)
    assert len({folds(repeat) for repeat in range(5)}) == 5
    assert all(folds(repeat) == again(repeat) for repeat in range(5))


@pytest.mark.parametrize("repeat", range(3))
def test_folds_inside_a_fold_keep_patients_whole_and_events_spread(repeat):
    patients = {f"c{n:02d}": f"p{n // 2:02d}" for n in range(40)}
    events = [float(n // 2 < 8) for n in range(40)]
    cohort = task(patients, "prognosis", event=events, time_days=range(1, 41))
    owner = [case.patient for case in cohort.cases]
    for held in folds_of(cohort)(repeat):
        training = sorted(set(range(40)) - set(held))
        assert not {owner[n] for n in training} & {owner[n] for n in held}
        inner = inner_folds(cohort, training, k=4)
        assert sorted(n for part in inner for n in part) == list(range(len(training)))
        of_patients = [{owner[training[n]] for n in part} for part in inner]
        assert sum(map(len, of_patients)) == len(set().union(*of_patients))
        counts = [sum(events[training[n]] for n in part) / 2 for part in inner]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("folds", [((0, 1, 2),), ((0, 1), (1, 2)), ((0,), (1,))])
def test_folds_that_do_not_cover_each_case_once_are_refused(folds):
    with pytest.raises(PlanError, match="each of the 3 cases in exactly one"):
        cross_validate(3, lambda training, held, seed: held, lambda repeat: folds)


def test_a_prediction_too_few_is_refused():
    with pytest.raises(PlanError, match="2 cases got 1"):
        cross_validate(4, lambda training, held, seed: held[:1], lambda repeat: ((0, 1), (2, 3)))
