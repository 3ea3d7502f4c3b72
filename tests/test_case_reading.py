"""Figures and outcomes of whole cases: encoded as fitted, written and read back, answered in the stated columns."""

import math

import numpy as np
import pytest
import torch

from unicon_pipeline.case_answers import answers
from unicon_pipeline.case_reading import CaseReading, DescriptorEncoder, Hazard, Outcome
from unicon_pipeline.clinical import ClinicalEncoder
from unicon_pipeline.errors import UniconError
from unicon_pipeline.records import from_dict, to_dict
from unicon_pipeline.survival import BaselineHazard, survival_curve

ROWS = [
    {"volume_ml": 1.0, "suv_max": 2.0, "tlg_g": 2.0, "sphericity": 0.5, "hu_mean": 3.0},
    {"volume_ml": math.e, "suv_max": None, "tlg_g": None, "sphericity": 0.5},
    {"volume_ml": math.e**2, "suv_max": 8.0, "tlg_g": 32.0, "sphericity": 0.5},
]
HAZARD = Hazard((50.0, 400.0), (-2.0, 0.5))
OUTCOMES = {
    "mtlr": Outcome("survival", loss="mtlr", edges_days=(100.0, 300.5), horizons_days=(200.0, 365.0)),
    "cox": Outcome("survival", (), "cox", (100.0, 300.0), horizons_days=(365.0,), baseline=HAZARD),
    "classes": Outcome("classes", ("0", "1", "high"), temperature=2.0),
    "findings": Outcome("findings", ("nodule", "mass")),
}


class TestDescriptors:
    def test_logarithms_standardised_and_one_indicator_for_a_modality(self):
        encoder = DescriptorEncoder.fit(ROWS)
        assert encoder.names == ("volume_ml", "suv_max", "suv_max=unknown", "tlg_g")
        encoded = np.stack([encoder.encode(row) for row in ROWS])
        assert encoded[:, 0] == pytest.approx(np.array([-1, 0, 1]) * math.sqrt(1.5))
        assert encoded[:, 2].tolist() == [0, 1, 0] and encoded[1, 3] == 0

    def test_no_region_and_figures_that_training_did_not_have(self):
        encoder = DescriptorEncoder.fit(ROWS)
        assert encoder.encode(None).tolist() == encoder.encode({}).tolist() == [0, 0, 1, 0]
        assert np.isfinite(encoder.encode({"volume_ml": 0.0, "hu_sd": 1.0, "suv_max": math.nan})).all()

    def test_nothing_known_is_no_column(self):
        assert DescriptorEncoder.fit([None, {}, {"volume_ml": 0.0}]).names == ()
        assert DescriptorEncoder.fit(ROWS, ("hu_mean",)).names == ()


class TestOutcome:
    def test_targets(self):
        rows = [{"time_days": 5.0, "event": 1.0}, None]
        np.testing.assert_equal(OUTCOMES["mtlr"].targets(rows), [[5, 1], [math.nan] * 2])
        np.testing.assert_equal(OUTCOMES["classes"].targets([{"g": 1.0}, {"g": None}, {"g": "high"}]), [1, math.nan, 2])
        np.testing.assert_equal(OUTCOMES["findings"].targets([{"mass": 1.0, "nodule": None}]), [[math.nan, 1]])

    @pytest.mark.parametrize("name", OUTCOMES)
    def test_answers_have_the_stated_columns(self, name):
        outcome = OUTCOMES[name]
        found = answers(outcome, torch.full(({"mtlr": 2, "cox": 1}.get(name, len(outcome.names)),), 0.3))
        assert tuple(found) == outcome.outputs

    def test_a_horizon_behind_the_curve_is_left_out_and_one_between_edges_is_between(self):
        assert OUTCOMES["mtlr"].days == (100.0, 200.0, 300.5) and OUTCOMES["cox"].days == (100.0, 300.0, 365.0)
        found = answers(OUTCOMES["mtlr"], torch.tensor([0.2, -0.1]))
        assert found["survival_100"] > found["survival_200"] > found["survival_300.5"]

    def test_temperature_and_cox(self):
        logits = torch.tensor([0.0, 2.0, 1.0])
        assert list(answers(OUTCOMES["classes"], logits).values()) == pytest.approx((logits / 2).softmax(0).tolist())
        found, hazard = answers(OUTCOMES["cox"], torch.tensor([0.4])), BaselineHazard(**vars(HAZARD))
        expected = survival_curve("cox", torch.tensor([[0.4]]), (365.0,), hazard)
        assert found["survival_365"] == pytest.approx(float(expected))
        assert found["risk"] == pytest.approx(0.4) and 50 < found["median_survival_days"] < 400

    def test_a_median_that_is_not_reached_is_none(self):
        assert answers(OUTCOMES["mtlr"], torch.tensor([-5.0, -5.0]))["median_survival_days"] is None


class TestReading:
    @pytest.mark.parametrize("name", OUTCOMES)
    def test_is_the_same_once_written_and_read(self, name):
        clinical = ClinicalEncoder.fit([{"age": 1.0}, {"age": None}, {"age": 3.0}])
        reading = CaseReading(("region", "clinical"), clinical, DescriptorEncoder.fit(ROWS), OUTCOMES[name])
        assert from_dict(CaseReading, to_dict(reading), "x") == reading
        assert reading.tabular({"age": 3.0}, ROWS[0]).shape == (len(reading.names),) == (6,)

    def test_without_encoders_there_is_no_row(self):
        assert CaseReading(("image",), None, None, OUTCOMES["mtlr"]).tabular({"age": 1.0}, ROWS[0]) is None

    def test_an_unknown_kind_is_refused(self):
        with pytest.raises(UniconError, match="no kind of outcome"):
            from_dict(Outcome, {"kind": "regression"}, "x")
