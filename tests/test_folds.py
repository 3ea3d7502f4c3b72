"""Folds: no patient is split, each case is validated once, outcomes are spread evenly."""

from pathlib import Path

import pytest

from unicon_pipeline.dataset import Case, Task
from unicon_pipeline.folds import patient_folds
from unicon_pipeline.tables import Table


def task(patients, task_type="segmentation", **columns):
    """`patients`: case -> patient; columns of the targets in the same order."""
    cases = tuple(Case(name, {}, None, patient) for name, patient in patients.items())
    targets = Table(tuple(patients), {name: tuple(values) for name, values in columns.items()}) if columns else None
    return Task("T", Path("T"), task_type, ("CT",), {}, None, ".nii.gz", cases, (), targets, None)


def alone(count):
    return {f"c{n:02d}": f"c{n:02d}" for n in range(count)}


def test_each_case_is_validated_once_and_no_patient_is_split():
    patients = {f"c{n:02d}": f"p{n % 9}" for n in range(23)}
    folds = patient_folds(task(patients))
    assert sorted(case for fold in folds for case in fold) == sorted(patients)
    owners = [{patients[case] for case in fold} for fold in folds]
    assert sorted(len(patients_of_fold) for patients_of_fold in owners) == [1, 2, 2, 2, 2]
    assert sum(map(len, owners)) == 9


def test_as_many_as_patients_allow():
    few = task({"a": "p", "b": "p", "c": "c", "d": "d"})
    assert len(patient_folds(few)) == 3
    assert len(patient_folds(few, k=2)) == 2


def test_the_seed_decides():
    twenty = task(alone(20))
    assert patient_folds(twenty, seed=3) == patient_folds(twenty, seed=3)
    assert patient_folds(twenty, seed=3) != patient_folds(twenty, seed=4)


def test_segmentation_folds_stay_as_plans_have_them():
    assert patient_folds(task(alone(7)), k=3) == (("c01", "c02", "c06"), ("c04", "c05"), ("c00", "c03"))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("events", [0, 4, 5, 12, 23])
def test_events_are_spread_evenly(events, seed):
    happened = dict(zip(alone(23), [1.0] * events + [0.0] * (23 - events)))
    prognosis = task(alone(23), "prognosis", event=happened.values(), time_days=range(1, 24))
    folds = patient_folds(prognosis, seed=seed)
    assert sorted(case for fold in folds for case in fold) == sorted(happened)
    for figures in ([sum(happened[case] for case in fold) for fold in folds], [len(fold) for fold in folds]):
        assert max(figures) - min(figures) <= 1


def test_a_patient_has_an_event_where_one_case_has():
    patients = {f"c{n:02d}": f"p{n // 2}" for n in range(20)}
    events = [float(n in (1, 2, 5, 8, 9, 15)) for n in range(20)]  # patients 0, 1, 2, 4, 7
    folds = patient_folds(task(patients, "prognosis", event=events, time_days=range(1, 21)))
    marked = {case for case, event in zip(patients, events) if event}
    assert all(len({patients[case] for case in fold} & {patients[case] for case in marked}) == 1 for fold in folds)


@pytest.mark.parametrize("seed", range(5))
def test_classes_are_spread_evenly(seed):
    grades = dict(zip(alone(23), ["high"] * 6 + ["low"] * 9 + [None] * 8))
    folds = patient_folds(task(alone(23), "classification", grade=grades.values()), seed=seed)
    for grade in ("high", "low", None):
        counts = [sum(grades[case] == grade for case in fold) for fold in folds]
        assert max(counts) - min(counts) <= 1
    assert {len(fold) for fold in folds} == {4, 5}


def test_several_findings_are_left_to_chance():
    findings = {"a": [1.0] * 10 + [0.0] * 10, "b": [0.0, 1.0] * 10}
    assert patient_folds(task(alone(20), "classification", **findings)) == patient_folds(task(alone(20)))
