"""Declarations: what contradicts itself is refused, and the path from full resolution down to any stride."""

import dataclasses
import math

import pytest

from unicon_pipeline.contract import FeatureLevel, FoundationSpec, filled_strides
from unicon_pipeline.errors import CheckpointError, PlanError
from unicon_pipeline.families.dna_encoders import new_residual_encoder_spec
from unicon_pipeline.records import from_dict, to_dict

SPEC = new_residual_encoder_spec("none", {}, (4, 6, 8), ((1, 1, 1), (1, 2, 2), (2, 2, 2)))


def test_a_declaration_survives_json():
    assert from_dict(FoundationSpec, to_dict(SPEC), "foundation.json") == SPEC


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["pyramid"][1].update(stride_zyx=[0, 1, 1]), r"pyramid\[1\]: a level has strides and channels"),
        (lambda d: d["pyramid"][1].update(channels=-6), r"pyramid\[1\]: a level has strides and channels"),
        (lambda d: d["pyramid"].clear(), "at least one native modality and one level"),
        (lambda d: d["input"].update(modalities=[]), "at least one native modality and one level"),
        (lambda d: d["pyramid"].reverse(), "must go from fine to coarse"),
        (lambda d: d["input"].update(divisible_by_zyx=[2, 2, 4]), "last one of the input's divisor"),
        (lambda d: d["input"].update(divisible_by_zyx=[0, 0, 0]), "last one of the input's divisor"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused_with_its_place(change, message):
    payload = to_dict(SPEC)
    change(payload)
    with pytest.raises(CheckpointError, match=rf"^foundation\.json.*{message}"):
        from_dict(FoundationSpec, payload, "foundation.json", CheckpointError)


@pytest.mark.parametrize(
    "strides, path",
    [
        ([], [(1, 1, 1)]),
        ([(1, 1, 1), (2, 2, 2)], [(1, 1, 1), (2, 2, 2)]),
        ([(2, 4, 4)], [(1, 1, 1), (2, 2, 2), (2, 4, 4)]),
        ([(4, 8, 8), (1, 2, 2)], [(1, 1, 1), (1, 2, 2), (2, 4, 4), (4, 8, 8)]),
        ([(1, 3, 3)], [(1, 1, 1), (1, 3, 3)]),
        ([(10, 20, 20)], [(1, 1, 1), (2, 2, 2), (10, 4, 4), (10, 20, 20)]),
        ([(14, 14, 14)], [(1, 1, 1), (2, 2, 2), (14, 14, 14)]),
    ],
)
def test_strides_are_filled_in(strides, path):
    assert list(filled_strides(strides)) == path


def test_every_step_of_a_path_is_a_prime_or_one():
    path = filled_strides([(3 * 16, 5 * 8, 7 * 4)])
    for fine, coarse in zip(path, path[1:]):
        for small, large in zip(fine, coarse):
            assert large % small == 0
            step = large // small
            assert all(step % factor for factor in range(2, math.isqrt(step) + 1))


def test_strides_without_a_path_are_refused():
    with pytest.raises(PlanError, match=r"No path leads from features of stride \(2, 2, 2\) to those of stride \(3"):
        filled_strides([(2, 2, 2), (3, 3, 3)])


def test_declarations_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FeatureLevel((1, 1, 1), 4, 4).channels = 5
