"""What unicon_info tells of a model."""

from unicon_pipeline.info import describe, format_description
from unicon_pipeline.model_record import EMBEDDED


def test_describes_foundation_and_tasks(grown):
    description = describe(grown.model)
    assert [task["name"] for task in description["tasks"]] == ["CT", "CTPET"]
    assert description["tasks"][1]["brought_stems"] == ["PET"]
    assert description["foundation"]["licence"] == "Apache-2.0"
    text = format_description(description)
    assert "made_by: the tests" in text
    assert "CTPET: segmentation of lesion from CT and/or PET, brought the stem for PET" in text
    assert "validation Dice" in text


def test_a_model_without_tasks_says_what_to_do():
    text = format_description(describe(EMBEDDED))
    assert "no task yet: add one with unicon_extend" in text
    assert "takes CT" in text
