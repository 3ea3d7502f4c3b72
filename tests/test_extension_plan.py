"""What a task adds: stems by what the model has met, folds, budgets, and a round trip."""

import dataclasses
import re

import pytest
from tiny_foundations import strided_spec, tokens_spec

from unicon_pipeline.contract import PET_SUV_RULE, FeatureLevel
from unicon_pipeline.errors import PlanError
from unicon_pipeline.extension_plan import (
    ExtensionPlan,
    Schedule,
    StemPlan,
    check_trainable,
    format_extension,
    plan_extension,
    schedule_for,
)
from unicon_pipeline.families.dna_encoders import new_residual_encoder_spec
from unicon_pipeline.label_spec import Labels
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.records import read_record, write_record

SPEC = new_residual_encoder_spec("none", {})
LABELS = Labels(("tumour",), ((1,),), False, (1,), None)
CASES = ("a", "b", "c", "d")
PET = StemPlan("PET", "residual_stem", ((1, 1, 1), (2, 2, 2), (4, 4, 4)), (16, 32, 64))


def data_plan(**changes):
    plan = DataPlan(
        task="T", task_type="segmentation", modalities=("CT", "PET"), labels=LABELS, foundation="", orientation="LPS",
        spacing_zyx_mm=(1.0, 1.0, 1.0), view="patch", patch_shape_zyx=(32, 32, 32), batch_size=2,
        intensity={"PET": PET_SUV_RULE}, median_shape_zyx=(40, 40, 40), folds=(("a", "b"), ("c", "d")), memory_gb=2.0,
        estimated_memory_gb=1.0, estimated_minutes_to_train=1.0, estimated_seconds_per_case=1.0, decisions=(),
        fingerprint_sha256="",
    )  # fmt: skip
    return dataclasses.replace(plan, **changes)


def extension(known=(), fold="all", schedule=None, spec=SPEC, **changes):
    stems = {stem.modality: stem for stem in known}
    return plan_extension(data_plan(**changes), spec, stems, CASES, schedule or schedule_for(5.0, None), fold, 7)


def test_a_new_modality_brings_a_stem_and_a_known_one_reuses_it():
    first = extension()
    assert [stem.modality for stem in first.new_stems] == ["PET"] and not first.reused_stems
    assert first.new_stems[0].strides_zyx == ((1, 1, 1), (2, 2, 2), (4, 4, 4))
    second = extension(known=first.new_stems)
    assert not second.new_stems and second.reused_stems == first.new_stems == second.stems
    assert not extension(modalities=("CT",)).stems


@pytest.mark.parametrize(
    "projection, pyramid, strides",
    [
        ((1, 2, 2), [(2, 4, 4), (4, 8, 8)], ((1, 1, 1), (1, 2, 2), (2, 4, 4))),
        ((2, 4, 4), [(2, 4, 4), (4, 8, 8)], ((1, 1, 1), (2, 2, 2), (2, 4, 4))),
        ((1, 2, 2), [(16, 16, 16)], ((1, 1, 1), (1, 2, 2), (2, 4, 4))),
        ((2, 2, 2), [(2, 2, 2)], ((1, 1, 1), (2, 2, 2))),
        ((16, 16, 16), [(16, 16, 16)], tuple((2**n,) * 3 for n in range(5))),
        ((1, 1, 1), [(1, 1, 1), (2, 2, 2)], ((1, 1, 1), (2, 2, 2))),
    ],
)
def test_a_stem_goes_down_to_the_projection_without_leaping_over_voxels(projection, pyramid, strides):
    levels = tuple(FeatureLevel(stride, 8, 8) for stride in pyramid)
    own = dataclasses.replace(SPEC.input, divisible_by_zyx=pyramid[-1])
    spec = dataclasses.replace(SPEC, input=own, projection=FeatureLevel(projection, 8, 8), pyramid=levels)
    (stem,) = extension(spec=spec).new_stems
    assert stem.strides_zyx == strides and len(stem.features) == len(strides)
    assert list(stem.features) == sorted(stem.features)


@pytest.mark.parametrize("name", ["T1.5", "keys", "half", "train", "training", "_modules", "T_destination"])
def test_a_modality_whose_name_cannot_name_a_stem_is_refused(name):
    with pytest.raises(PlanError, match=f"modality {re.escape(name)} cannot have a stem: rename it"):
        extension(modalities=("CT", name))


def rows(plan):
    return {decision.name: f"{decision.value}: {decision.reason}" for decision in plan.decisions}


def test_tokens_get_a_patch_embedding_a_neck_and_a_detail_path():
    plan = extension(spec=tokens_spec((10, 20, 20), layers=4))
    assert plan.new_stems == (
        StemPlan("PET", "patch_embedding", ((1, 1, 1), (2, 2, 2), (10, 4, 4)), (16, 32, 64)),
    )
    assert plan.head.kind == "unetr"
    table = rows(plan)
    assert "a patch embedding beside the foundation's" in table["stem PET"]
    assert table["head"].startswith("UNETR decoder, 2 channels")
    assert table["neck"].startswith("4 hidden layers")
    assert table["detail path"].startswith("16, 32, 64 features") and "10 x 20 x 20 voxels" in table["detail path"]
    assert "every linear layer" in table["adapter"]


def test_a_foundation_that_begins_coarser_than_the_image_gets_a_detail_path():
    plan = extension(spec=strided_spec((8, 16), ((1, 2, 2), (2, 2, 2))))
    assert (plan.head.kind, plan.new_stems[0].kind) == ("unet", "residual_stem")
    assert rows(plan)["detail path"].startswith("16 features: the foundation's finest map has 1 x 2 x 2 voxels")
    assert "neck" not in rows(plan)
    assert not {"detail path", "neck"} & set(rows(extension()))


def test_stems_come_in_the_order_of_the_modalities():
    plan = extension(known=(PET,), modalities=("MR", "PET", "CT"))
    assert [stem.modality for stem in plan.stems] == ["MR", "PET"]
    assert plan.new_stems[0].modality == "MR" and plan.reused_stems == (PET,)


def test_modality_dropout_only_where_there_is_something_to_drop():
    assert extension().schedule.modality_dropout > 0
    assert extension(modalities=("CT",)).schedule.modality_dropout == 0


def test_folds():
    held_out = extension(fold=1)
    assert held_out.validation_cases == ("c", "d") and held_out.training_cases == ("a", "b")
    assert extension().training_cases == CASES and extension().validation_cases == ()
    for fold in (2, -1, "1", "any"):
        with pytest.raises(PlanError, match="folds 0 to 1, or 'all'"):
            extension(fold=fold)
    with pytest.raises(PlanError, match="leaves no preprocessed case"):
        extension(fold=0, folds=(CASES,))


def test_budgets():
    assert schedule_for(None, 3) == Schedule(steps=150, minutes=None)
    assert schedule_for(2.0, 3) == Schedule(steps=150, minutes=2.0)
    assert schedule_for(2.0, None).minutes == 2.0 and schedule_for(2.0, None).steps > 10**5
    assert schedule_for(None, None).minutes is None


def test_other_task_types_are_planned_in_another_way():
    with pytest.raises(PlanError, match="T is a classification task.*plan_case_extension"):
        extension(task_type="classification", labels=None)


def test_cases_that_failed_to_preprocess_are_in_neither_part():
    stored = ("a", "d")
    plan = plan_extension(data_plan(), SPEC, {}, stored, schedule_for(None, 1), 1, 0)
    assert (plan.training_cases, plan.validation_cases) == (("a",), ("d",))


def test_inputs_are_left_as_they_are():
    known, schedule, plan = {"PET": PET}, schedule_for(None, 1), data_plan()
    plan_extension(plan, SPEC, known, CASES, schedule, 0, 0)
    assert known == {"PET": PET} and schedule == schedule_for(None, 1) and plan == data_plan()


def test_overlapping_regions_are_said_to_be_so():
    regions = Labels(("whole", "core"), ((1, 2), (2,)), True, (1, 2), None)
    plan = extension(labels=regions)
    assert plan.head.output_channels == 2 and "one sigmoid each" in format_extension(plan)
    assert extension().head.output_channels == 2 and "softmax with background" in format_extension(extension())


def test_a_changed_task_must_be_planned_again(tmp_path):
    facts = {"modalities": ("CT",), "labels": LABELS, "task_type": "segmentation", "region": None}
    task = type("Task", (), {"name": "T", "folder": tmp_path, **facts})
    with pytest.raises(PlanError, match="has changed since T was planned"):
        check_trainable(task, data_plan())
    with pytest.raises(PlanError, match=r"dataset\.json has changed"):
        check_trainable(task, data_plan(modalities=("CT",), labels=dataclasses.replace(LABELS, ignore=2)))
    with pytest.raises(PlanError, match=r"region differ"):
        check_trainable(task, data_plan(modalities=("CT",), region="Tumour"))
    check_trainable(task, data_plan(modalities=("CT",)))


def test_round_trip_and_table(tmp_path):
    plan = extension(known=(PET,), fold=0)
    write_record(tmp_path / "p.json", plan)
    assert read_record(tmp_path / "p.json", ExtensionPlan) == plan
    table = format_extension(plan)
    for words in ("reused, frozen", "rank 8", "5 minutes", "2 held out (fold 0)", "modality dropout"):
        assert words in table
