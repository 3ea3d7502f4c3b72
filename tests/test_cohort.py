"""The cases of a task side by side: figures counted by hand, and what is said to be odd."""

from pathlib import Path

import numpy as np
import pytest

from unicon_pipeline.cohort import (
    Covariate,
    FollowUp,
    class_counts,
    covariates,
    follow_up,
    label_frequencies,
    remarks,
    spread,
)
from unicon_pipeline.dataset import Case, Labels, Task
from unicon_pipeline.measure import CaseFingerprint, Measured
from unicon_pipeline.tables import Table

NAMES = ("a", "b", "c", "d")
REGIONS = Labels(("whole", "core", "rare"), ((1, 2), (2,), (3,)), True, (1, 2, 3), None)


def table(case_ids, **columns):
    return Table(tuple(case_ids), {name: tuple(cells) for name, cells in columns.items()})


def task(task_type="segmentation", targets=None, clinical=None, patients=None):
    cases = tuple(Case(name, {}, None, (patients or {}).get(name, name)) for name in NAMES)
    labels = REGIONS if task_type == "segmentation" else None
    return Task("T", Path("T"), task_type, ("CT",), {}, labels, ".nii.gz", cases, (), targets, clinical)


def record(name, shape=(10, 20, 20), spacing=(3.0, 1.0, 1.0), oddities=(), voxels=None, labelled=0, parts=None):
    voxels = voxels or {}
    ml = {name: count / 1000 for name, count in voxels.items()}
    return CaseFingerprint(name, ("CT",), shape, shape, spacing, voxels, oddities, {}, None, labelled, ml, parts or {})


def measured(records=None, thumbnails=None):
    rng = np.random.default_rng(0)
    records = records or [record(name) for name in NAMES]
    thumbnails = thumbnails or {}
    return [Measured(one, {}, thumbnails.get(one.case_id, rng.normal(size=(8, 8, 8)))) for one in records]


def test_spread():
    found = spread([(1, 2, 3), (5, 2, 1), (2, 9, 2)])
    assert (found.low, found.median, found.high) == ((1, 2, 1), (2, 2, 2), (5, 9, 3))


def test_label_frequencies():
    cases = [
        record("a", voxels={"whole": 6000, "core": 2000, "rare": 0}, labelled=6000, parts={"whole": 2, "core": 1}),
        record("b", voxels={"whole": 2000, "core": 0, "rare": 0}, labelled=2000, parts={"whole": 1}),
        record("c", voxels={"whole": 0, "core": 0, "rare": 0}),
    ]
    whole, core, rare = label_frequencies(cases, REGIONS).values()
    assert (whole.cases, whole.share, whole.median_ml, whole.median_parts) == (2, 1.0, 4.0, 1.5)
    assert (core.cases, core.share, core.median_ml, core.median_parts) == (1, 0.25, 2.0, 1.0)
    assert (rare.cases, rare.share, rare.median_ml, rare.median_parts) == (0, 0.0, 0.0, 0.0)
    assert label_frequencies(cases, None) == {}


class TestOutcomes:
    def test_follow_up_by_hand(self):
        """Censored at 20 and 40: the curve falls to 2/3 at 20 (3 left) and to 0 at 40."""
        targets = table((*NAMES, "stranger"), time_days=(10.0, 20.0, 30.0, 40.0, 1.0), event=(1.0, 0.0, 1.0, 0.0, 1.0))
        found = follow_up(task("prognosis", targets), NAMES)
        assert found == FollowUp(4, 2, 0.5, 40.0, (10.0, 15.0, 20.0, 25.0, 30.0))
        assert follow_up(task("prognosis", targets), ("a", "b")) == FollowUp(2, 1, 0.5, 20.0, (10.0,) * 5)

    def test_ties_and_ends(self):
        """At 20 one is censored and one has the event: both were still under observation."""
        targets = table(NAMES, time_days=(20.0, 20.0, 30.0, 40.0), event=(1.0, 0.0, 0.0, 1.0))
        assert follow_up(task("prognosis", targets), NAMES).median_follow_up_days == 30.0  # 3/4, then 3/8
        for event, median in ((1.0, None), (0.0, 20.0)):
            targets = table(NAMES, time_days=(20.0, 20.0, 30.0, 40.0), event=(event,) * 4)
            found = follow_up(task("prognosis", targets), NAMES)
            assert (found.median_follow_up_days, len(found.event_days)) == (median, 5 * int(event))

    def test_classes(self):
        targets = table(NAMES, grade=("low", None, "high", "low"))
        assert class_counts(task("classification", targets), NAMES) == {"grade": {"low": 2, "high": 1}}
        findings = table(NAMES, x=(1.0, 0.0, 0.0, 0.0), y=(None, 1.0, 1.0, None))
        assert class_counts(task("classification", findings), NAMES[:3]) == {"x": {"0": 2, "1": 1}, "y": {"1": 2}}

    def test_other_task_types_have_neither(self):
        targets = table(NAMES, time_days=(1.0,) * 4, event=(1.0,) * 4)
        assert follow_up(task("segmentation", targets), NAMES) is None
        assert class_counts(task("prognosis", targets), NAMES) == {}


def test_covariates():
    clinical = table(("b", "a", "x"), age=(50.0, 60.0, 99.0), sex=("F", None, "M"), empty=(None, None, None))
    assert covariates(task(clinical=clinical), NAMES[:3]) == {
        "age": Covariate(True, 1, 50.0, 55.0, 60.0),
        "sex": Covariate(False, 2, levels={"F": 1}),
        "empty": Covariate(False, 3),
    }
    assert covariates(task(), NAMES) == {}


class TestRemarks:
    def test_nothing_odd(self):
        assert list(remarks(task(), measured())) == []

    def test_outliers(self):
        records = [record("a"), record("b"), record("c", spacing=(3.0, 2.5, 1.0)), record("d", shape=(10, 20, 62))]
        assert list(remarks(task(), measured(records))) == [
            "voxel size more than 2 times off the median, 3 x 1 x 1 mm (z y x): c (3 x 2.5 x 1)",
            "field of view more than 3 times off the median, 30 x 20 x 20 mm (z y x): d (30 x 20 x 62)",
        ]

    def test_oddities_that_cases_share_and_empty_labels(self):
        odd = {"a": ("no PET", "9 labelled voxels"), "b": ("nothing is labelled", "no PET"), "c": (), "d": ("no PET",)}
        assert list(remarks(task(), measured([record(name, oddities=odd[name]) for name in NAMES]))) == [
            "3 cases: no PET: a, b, d",
            "1 case: nothing is labelled: b",
        ]

    def test_patients_with_several_cases(self):
        found = list(remarks(task(patients={"a": "p", "c": "p"}), measured()))
        assert found == ["patients with several cases, which no fold separates: p (a, c)"]

    def test_look_alikes(self):
        image, other = np.random.default_rng(1).normal(size=(2, 8, 8, 8))
        noisy = image + np.random.default_rng(2).normal(0, 0.01, image.shape)
        one_patient = task(patients=dict.fromkeys(NAMES, "p"))
        alike = measured(thumbnails={"a": image, "b": noisy, "c": 3 * image + 5, "d": other})
        found = list(remarks(one_patient, alike))
        assert found[1:] == ["nearly the same image twice: a and b, a and c, b and c"]
        found = list(remarks(one_patient, measured(thumbnails={"b": image, "d": image.copy()})))
        assert found[1:] == ["the same image twice: b and d"]
        shapes = [record("a"), record("b", shape=(11, 20, 20))]
        assert list(remarks(task(), measured(shapes, {"a": image, "b": image}))) == []
        flat = dict.fromkeys(NAMES, np.ones((8, 8, 8)))
        assert not any("image" in remark for remark in remarks(task(), measured(thumbnails=flat)))

    def test_look_alikes_of_different_patients_leak(self):
        image = np.random.default_rng(1).normal(size=(8, 8, 8))
        (found,) = remarks(task(), measured(thumbnails={"a": image, "c": image, "d": image + 1e-9}))
        assert found.startswith(
            "images that look alike under different patients: a and c (the same), a and d (nearly the same), "
            "c and d (nearly the same). One would be trained on"
        )

    def test_many_are_found_block_by_block(self, monkeypatch):
        monkeypatch.setattr("unicon_pipeline.cohort._ROWS_AT_A_TIME", 2)
        image = np.random.default_rng(1).normal(size=(8, 8, 8))
        (found,) = remarks(task(), measured(thumbnails=dict.fromkeys(NAMES, image)))
        assert found.count("(the same)") == 6
        for pair in ("a and b", "a and d", "b and c", "c and d"):
            assert pair in found

    @pytest.mark.parametrize("filled, told", [(1, True), (2, False)])
    def test_a_covariate_that_is_mostly_missing(self, filled, told):
        clinical = table(NAMES, age=[50.0] * filled + [None] * (4 - filled))
        expected = ["the covariate age is missing in 3 of 4 cases"] if told else []
        assert list(remarks(task(clinical=clinical), measured())) == expected
