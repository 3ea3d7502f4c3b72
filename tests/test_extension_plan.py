"""What a task adds: stems by what the model has met, folds, budgets, and a round trip."""

import dataclasses

import pytest

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
from unicon_pipeline.foundation import new_residual_encoder_spec
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


def test_a_stem_reaches_down_to_a_coarse_projection():
    pyramid = tuple(FeatureLevel((s // 2, s, s), 8, 8) for s in (4, 8, 16))
    spec = dataclasses.replace(SPEC, projection=FeatureLevel((1, 2, 2), 8, 8), pyramid=pyramid)
    (stem,) = extension(spec=spec).new_stems
    assert stem.strides_zyx[:2] == ((1, 1, 1), (1, 2, 2)) and len(stem.features) == len(stem.strides_zyx)


def test_modality_dropout_only_where_there_is_something_to_drop():
    assert extension().schedule.modality_dropout > 0
    assert extension(modalities=("CT",)).schedule.modality_dropout == 0


def test_folds():
    held_out = extension(fold=1)
    assert held_out.validation_cases == ("c", "d") and held_out.training_cases == ("a", "b")
    assert extension().training_cases == CASES and extension().validation_cases == ()
    for fold in (2, -1):
        with pytest.raises(PlanError, match="folds 0 to 1, or 'all'"):
            extension(fold=fold)
    with pytest.raises(PlanError, match="leaves no preprocessed case"):
        extension(fold=0, folds=(CASES,))


def test_budgets():
    assert schedule_for(None, 3) == Schedule(steps=150, minutes=None)
    assert schedule_for(2.0, 3) == Schedule(steps=150, minutes=2.0)
    assert schedule_for(2.0, None).minutes == 2.0 and schedule_for(2.0, None).steps > 10**5
    assert schedule_for(None, None).minutes is None


def test_other_task_types_are_told_what_they_can_do():
    with pytest.raises(PlanError, match="T is a classification task.*unicon_pretrain"):
        extension(task_type="classification", labels=None)


def test_a_changed_task_must_be_planned_again(tmp_path):
    task = type("Task", (), {"name": "T", "folder": tmp_path, "modalities": ("CT",), "labels": LABELS})
    with pytest.raises(PlanError, match="has changed since T was planned"):
        check_trainable(task, data_plan())


def test_round_trip_and_table(tmp_path):
    plan = extension(known=(PET,), fold=0)
    write_record(tmp_path / "p.json", plan)
    assert read_record(tmp_path / "p.json", ExtensionPlan) == plan
    table = format_extension(plan)
    for words in ("reused, frozen", "rank 8", "5 minutes", "2 held out (fold 0)", "modality dropout"):
        assert words in table
