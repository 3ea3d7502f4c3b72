"""Levels as numbers: what is filled in, how wide a decoder is, which hidden layer serves which level."""

import pytest
from tiny_foundations import strided_spec, tokens_spec

from unicon_pipeline.contract import FeatureLevel
from unicon_pipeline.families.dna_encoders import new_residual_encoder_spec
from unicon_pipeline.levels import DETAIL, new_stem_levels, residual_levels, skip_levels


def strides(levels):
    return [level.stride_zyx for level in levels]


def test_a_foundation_that_begins_at_full_resolution_needs_no_detail_path_and_sets_the_decoders_widths():
    skips = skip_levels(new_residual_encoder_spec("none", {}, (4, 24, 500), ((1, 1, 1), (2, 2, 2), (4, 4, 4))), {})
    assert not skips.detail and not any(level.side_channels for level in skips.levels)
    assert [level.backbone_channels for level in skips.levels] == [4, 24, 0, 500]
    assert skips.decoder_channels == (16, 24, 250)  # at least 16; half the coarser width where there is no map


def test_what_is_finer_than_the_foundation_is_the_detail_paths():
    skips = skip_levels(strided_spec((8, 64, 512), ((1, 2, 2), (2, 2, 2), (8, 8, 8))), {})
    assert strides(skips.levels) == [(2**z, 2**x, 2**x) for z, x in ((0, 0), (0, 1), (1, 2), (2, 3), (3, 4), (4, 5))]
    assert [level.side_channels for level in skips.levels] == [((DETAIL, 16),), (), (), (), (), ()]
    assert skips.decoder_channels == (16, 32, 64, 128, 256)
    deep = skip_levels(strided_spec((8,), ((32, 32, 32),)), {})
    assert [level.channels for level in deep.detail] == [16, 32, 64, 128, 128]


def test_the_neck_fills_the_levels_between_full_resolution_and_the_tokens():
    skips = skip_levels(tokens_spec((10, 20, 20), width=7), {"PET": residual_levels(((1, 1, 1), (2, 2, 2)), (3, 4))})
    assert strides(skips.levels) == [(1, 1, 1), (2, 2, 2), (10, 4, 4), (10, 20, 20)]
    assert [level.backbone_channels for level in skips.levels] == [0, 32, 64, 7]
    assert [dict(level.side_channels) for level in skips.levels] == [
        {DETAIL: 16, "PET": 3}, {DETAIL: 32, "PET": 4}, {DETAIL: 64}, {},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "patch, layers, sources",
    [
        (8, 3, [0, 1, 2]),
        (8, 4, [0, 1, 3]),
        (8, 1, [0, 0, 0]),
        (8, 2, [0, 1, 1]),
        (16, 4, [0, 1, 2, 3]),
        (16, 12, [0, 4, 7, 11]),
        (2, 3, [2]),
    ],
)
def test_hidden_layers_are_spread_evenly_and_the_deepest_stays_at_the_tokens(patch, layers, sources):
    skips = skip_levels(tokens_spec((patch,) * 3, layers=layers), {})
    assert [source for source, _ in skips.neck] == sources
    for level, (_, path) in zip(skips.levels[1:], skips.neck, strict=True):
        passed = [other for other in skips.levels if level.stride_zyx <= other.stride_zyx < (patch,) * 3]
        assert list(path) == passed[::-1]


@pytest.mark.parametrize(
    "spec, expected",
    [
        (strided_spec((4, 6), ((1, 2, 2), (2, 2, 2))), [(1, 1, 1), (1, 2, 2), (2, 4, 4)]),
        (strided_spec((4,), ((2, 2, 2),)), [(1, 1, 1), (2, 2, 2)]),
        (strided_spec((4, 6), ((2, 2, 2), (16, 16, 16))), [(1, 1, 1), (2, 2, 2), (4, 4, 4)]),
        (tokens_spec((8, 8, 8)), [(1, 1, 1), (2, 2, 2), (4, 4, 4)]),
        (tokens_spec((10, 20, 20)), [(1, 1, 1), (2, 2, 2), (10, 4, 4)]),
        (tokens_spec((1, 1, 1)), [(1, 1, 1)]),
    ],
)
def test_levels_of_a_new_stem(spec, expected):
    levels = new_stem_levels(spec)
    assert strides(levels) == expected
    assert [level.channels for level in levels] == [16, 32, 64][: len(expected)]
    assert {level.stride_zyx for level in levels} <= set(strides(skip_levels(spec, {}).levels))


def test_maps_kept_are_two_a_block_and_one_for_the_input():
    levels = residual_levels(((1, 1, 1), (2, 2, 2)), (3, 4))
    assert levels == (FeatureLevel((1, 1, 1), 3, 9), FeatureLevel((2, 2, 2), 4, 8))
