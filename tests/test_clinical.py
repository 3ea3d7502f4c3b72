"""Clinical covariates: what is learnt from the training cases, what a case to predict becomes, what leaks."""

import numpy as np
import pytest
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from unicon_pipeline.clinical import CategoricalColumn, ClinicalEncoder, NumericColumn
from unicon_pipeline.errors import PlanError
from unicon_pipeline.records import from_dict, to_dict
from unicon_pipeline.tables import read_table


def rows(**columns):
    return [dict(zip(columns, cells)) for cells in zip(*columns.values(), strict=True)]


def fit(targets=None, **columns):
    return ClinicalEncoder.fit(rows(**columns), targets)


AGES = [float(age) for age in range(41, 61)]
SITES = ["thigh"] * 9 + ["Arm"] * 8 + ["neck"] * 2 + ["hand"]
EVENT = [1.0, 0.0, 0.0, 1.0] * 5


class TestNumbers:
    def test_as_scikit_learn_scales_them(self):
        values = np.random.default_rng(0).normal((50, -3), (12, 0.01), (40, 2))
        encoder = fit(a=values[:, 0].tolist(), b=values[:, 1].tolist())
        found = np.stack([encoder.encode(row) for row in rows(a=values[:, 0], b=values[:, 1])])
        assert found.dtype == np.float32 and encoder.names == ("a", "b")
        np.testing.assert_allclose(found, StandardScaler().fit_transform(values), atol=1e-5)

    def test_a_gap_has_its_own_column_where_training_had_gaps(self):
        encoder = fit(age=[40.0, None, 60.0])
        assert encoder.numeric == (NumericColumn("age", 50.0, 10.0, True),)
        assert encoder.names == ("age", "age=unknown")
        assert encoder.encode({"age": 60.0}).tolist() == [1.0, 0.0]
        assert encoder.encode({"age": None}).tolist() == encoder.encode(None).tolist() == [0.0, 1.0]
        assert encoder.oddities({"age": None}) == []

    def test_a_gap_that_training_never_had_is_the_mean_and_told(self):
        encoder = fit(age=[40.0, 60.0])
        assert encoder.encode({"age": None}).tolist() == [0.0]
        assert encoder.oddities({"age": None}) == ["age is unknown; taken as the training cases' mean, 50"]
        (told,) = encoder.oddities({"age": "61 y"})
        assert "'61 y' and no number" in told

    @pytest.mark.parametrize("age, encoded", [(610.0, 5.0), (-300.0, -5.0)])
    def test_a_typing_error_does_not_rule(self, age, encoded):
        encoder = fit(age=[40.0, 60.0])
        assert encoder.encode({"age": age}).tolist() == [encoded]
        (told,) = encoder.oddities({"age": age})
        assert f"age is {age:g}" in told and "mean 50" in told
        assert encoder.oddities({"age": 99.0}) == []

    def test_words_for_a_gap(self):
        assert fit(x=[1.0, "unknown", "?", "2.5"]).numeric == (NumericColumn("x", 1.75, 0.75, True),)
        assert fit(x=[1, float("nan"), np.float32(2.5)]).numeric == (NumericColumn("x", 1.75, 0.75, True),)

    def test_one_value_or_blank_is_no_scale(self):
        encoder = fit(smoker=[1.0, None] * 4)
        assert encoder.names == ("smoker=1", "smoker=unknown")
        assert encoder.encode({"smoker": "1.0"}).tolist() == [1.0, 0.0]


class TestNames:
    def test_as_scikit_learn_encodes_them(self):
        encoder = fit(site=SITES)
        oracle = OneHotEncoder(min_frequency=3, sparse_output=False).fit(np.char.lower(np.array(SITES))[:, None])
        wanted = oracle.transform(np.char.lower(np.array(SITES))[:, None])
        np.testing.assert_array_equal(np.stack([encoder.encode({"site": site}) for site in SITES]), wanted)
        assert encoder.names == ("site=arm", "site=thigh", "site=other")
        assert encoder.categorical == (
            CategoricalColumn("site", ("arm", "thigh"), ("hand", "neck"), (0.4, 0.45, 0.15), False),
        )

    def test_five_percent_of_many_are_rare(self):
        assert fit(x=["a"] * 90 + ["b"] * 6 + ["c"] * 4).names == ("x=a", "x=b", "x=other")

    def test_spelling(self):
        encoder = fit(x=["High", "high ", "HIGH", 1.0, "1", True, "low", "low", "low"])
        assert encoder.names == ("x=1", "x=high", "x=low")

    def test_what_training_did_not_have(self):
        encoder = fit(x=["a", "b", "b", "b", "a", "a", None])
        assert encoder.names == ("x=a", "x=b", "x=unknown")
        assert encoder.encode({"x": "new"}).tolist() == encoder.encode(None).tolist() == [0.0, 0.0, 1.0]
        assert encoder.oddities({"x": "new"}) == ["x is 'new', which no training case was (a, b); taken as unknown"]
        assert encoder.oddities({"x": None}) == []

    def test_without_gaps_in_training_an_unknown_is_the_mixture(self):
        """A column that was never 1 in training would have a weight that nothing has taught."""
        encoder = fit(x=["a", "a", "a", "b", "b", "b", "b", "b", "b"])
        np.testing.assert_allclose(encoder.encode({"x": "new"}), [1 / 3, 2 / 3], rtol=1e-6)
        np.testing.assert_array_equal(encoder.encode({"x": "new"}), encoder.encode(None))
        (told,) = encoder.oddities({"x": None})
        assert told == "x is unknown; taken as the mixture of the training cases"

    def test_a_level_called_other(self):
        encoder = fit(x=["a"] * 5 + ["other"] * 5 + ["c"])
        assert encoder.names == ("x=a", "x=other")
        assert encoder.encode({"x": "other"}).tolist() == encoder.encode({"x": "c"}).tolist() == [0.0, 1.0]


class TestCases:
    def test_a_case_without_a_row(self):
        encoder = ClinicalEncoder.fit([*rows(age=[40.0, 60.0, 50.0], sex=["f", "f", "f"]), None])
        assert encoder.names == ("age", "age=unknown", "sex=f", "sex=unknown")
        assert encoder.encode(None).tolist() == [0.0, 1.0, 0.0, 1.0]
        (told,) = encoder.oddities(None)
        assert "no row in clinical.csv" in told

    def test_a_column_that_the_prediction_does_not_have(self):
        encoder = fit(age=AGES, size=AGES[::-1])
        assert encoder.encode({"age": 50.5, "more": "x"}).tolist() == [0.0, 0.0]
        assert encoder.oddities({"age": 50.5}) == ["clinical.csv has no column size; taken as unknown"]

    @pytest.mark.parametrize("cases", [[], [None, None], [{}], [{"x": None}]])
    def test_nothing_known(self, cases):
        encoder = ClinicalEncoder.fit(cases)
        assert encoder.names == () and encoder.encode(None).shape == (0,) and encoder.oddities(None) == []

    def test_json(self):
        encoder = fit(age=[*AGES[:-1], None], site=SITES, same=[1.0] * 20, death=AGES[::2] * 2)
        again = from_dict(ClinicalEncoder, to_dict(encoder), "plan.json", PlanError)
        assert again == encoder and encoder.remarks and encoder.left_out
        for row in (None, {"age": 44.25, "site": "Neck"}):
            np.testing.assert_array_equal(again.encode(row), encoder.encode(row))

    def test_only_the_training_rows_count(self):
        """The table is read as a whole; one case's numbers are text there where another has a word."""
        training = rows(stage=["1", "2", "3"] * 4)
        assert ClinicalEncoder.fit(training).numeric[0].mean == 2.0
        assert ClinicalEncoder.fit(training).encode({"stage": 2.0}).tolist() == [0.0]

    def test_from_a_table(self, tmp_path):
        (tmp_path / "t.csv").write_text("case_id;age;sex\na;61,5;f\nb;;m\n", encoding="utf-8")
        table = read_table(tmp_path / "t.csv")
        assert table.rows_of(["b", "c", "a"]) == [{"age": None, "sex": "m"}, None, {"age": 61.5, "sex": "f"}]


class TestLeftOut:
    def reason(self, cells, name="x", targets=None):
        encoder = fit(targets, **{name: cells, "age": [50.0 + 3 * (n % 7) for n in range(len(cells))]})
        assert encoder.names == ("age",)
        return encoder.left_out[name]

    def test_what_tells_nothing(self):
        assert self.reason([3.0] * 12) == "it is 3 in all training cases"
        assert self.reason([None] * 12) == "no training case has a value"
        assert "none of its 12 levels has 3 cases" in self.reason([f"patient {n}" for n in range(12)])
        assert "because of '61 y'" in self.reason([*AGES, "61 y"])

    @pytest.mark.parametrize("text", ["2024-05-{:02}", "{:02}.03.1961", "3/{}/61", "2024/1/{} 08:30"])
    def test_dates(self, text):
        assert "dates" in self.reason([text.format(day) for day in range(1, 21)])
        assert "dates" in self.reason([text.format(day % 3 + 1) for day in range(20)])

    def test_ids(self):
        assert "is an id" in self.reason(AGES, "patient_id") and "is an id" in self.reason(AGES, "MRN")
        assert fit(nodes=AGES, void=AGES).names == ("nodes", "void")

    def test_outcomes(self):
        days = np.random.default_rng(0).uniform(30, 3000, 20).tolist()
        survival = {"time_days": days, "event": EVENT}
        assert "name of the target event" in self.reason(AGES, "Event", survival)
        assert "same as the target event" in self.reason(["D" if e else "NED" for e in EVENT], targets=survival)
        assert "same as the target event" in self.reason([1 - event for event in EVENT], targets=survival)
        assert "rises or falls" in self.reason([round(day / 30.4, 1) for day in days], targets=survival)
        places = [("lung", "bone")[n % 2] if event else None for n, event in enumerate(EVENT)]
        assert "gaps say the same as the target event" in self.reason(places, targets=survival)
        until = [day if event else None for day, event in zip(AGES, EVENT)]
        assert "gaps say the same as the target event" in self.reason(until, targets=survival)
        grades = {"grade": ["low", "high", "high", "mid"] * 5}
        assert "same as the target grade" in self.reason([1.0, 3.0, 3.0, 2.0] * 5, targets=grades)
        assert "same as the target t" in self.reason([0.0, 1.0, 2.0, 5.0] * 5, targets={"t": [0.0, 1.0, 2.0, 5.0] * 5})

    def test_chance_is_not_taken_for_a_leak(self):
        """In three cases everything fits; and 200 columns of chance pass."""
        assert fit({"event": [1.0, 0.0, 0.0]}, sex=["f", "f", "f"], age=[61.0, 50.0, 43.0]).numeric
        generator = np.random.default_rng(1)
        targets = {"time_days": generator.uniform(1, 900, 30).tolist(), "event": (generator.random(30) < 0.3) * 1.0}
        names = {f"n{n}": generator.normal(size=30).tolist() for n in range(100)}
        names |= {f"c{n}": generator.choice(["a", "b", "c"], 30).tolist() for n in range(100)}
        encoder = fit({name: list(cells) for name, cells in targets.items()}, **names)
        assert (encoder.left_out, encoder.remarks) == ({}, ())


class TestRemarks:
    def remark(self, cells, name="x", targets=None):
        encoder = fit(targets, **{name: cells})
        assert encoder.names
        (remark,) = encoder.remarks
        return remark

    def test_a_column_that_separates_the_outcomes_is_told(self):
        grades = ["high" if event else ("mid", "low")[n % 2] for n, event in enumerate(EVENT)]
        assert self.remark(grades, targets={"event": EVENT}).startswith("x separates event")
        sizes = [event * 50 + age for age, event in zip(AGES, EVENT)]
        assert self.remark(sizes, targets={"event": EVENT}).startswith("x separates event")
        assert fit({"event": EVENT}, age=AGES).remarks == ()

    @pytest.mark.parametrize("name", ["days_to_recurrence", "Follow-up", "outcome", "overall_survival"])
    def test_a_name_of_later(self, name):
        assert "sounds like" in self.remark(AGES, name)
        assert fit(smoking_status=AGES, performance_status=AGES).remarks == ()

    def test_numbers_read_as_names(self):
        assert "because of '4a', '4b'" in self.remark(["1", "2", "4b", "1", "2", "4a", "1", "2", "1", "2"])
