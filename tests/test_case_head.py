"""The head of case-level tasks: what it reads, what it leaves alone, and that any subset of its inputs is one."""

import dataclasses
import math

import pytest
import torch
from test_heads import PYRAMIDS, STEMS, maps, skips_of

from unicon_pipeline.case_head import (
    FOUNDATION,
    PRIOR,
    REGION_SHARE,
    FusionEnsemble,
    FusionHead,
    Standard,
    fusion_options,
)
from unicon_pipeline.errors import UniconError
from unicon_pipeline.heads import HEADS, Features

SHAPE = (16, 16, 32)
SMALL = {"units": 6}


def features_of(pyramid="anisotropic", stems="PET and MR", batch=3, dtype=torch.float32):
    of_stems = {name: maps(levels, SHAPE, batch, seed) for seed, (name, levels) in enumerate(STEMS[stems].items())}
    of_stems = {name: [m.to(dtype) for m in levels] for name, levels in of_stems.items()}
    return Features([m.to(dtype) for m in maps(PYRAMIDS[pyramid], SHAPE, batch, 9)], of_stems)


def head_of(pyramid="anisotropic", stems="PET and MR", columns=4, trained=True, **options):
    torch.manual_seed(0)
    head = FusionHead(skips_of(pyramid, STEMS[stems]), 3, columns, **{**SMALL, **options}).eval()
    if trained:  # moved away from where it starts
        with torch.no_grad():
            for parameter in head.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return head


def rows(batch=3, columns=4):
    return torch.randn(batch, columns, generator=torch.Generator().manual_seed(5))


def region(*boxes):
    found = torch.zeros(len(boxes), *SHAPE, dtype=torch.uint8)
    for mask, box in zip(found, boxes, strict=True):
        mask[box] = 1
    return found


BOX = (slice(0, 4), slice(4, 12), slice(8, 16))
EMPTY = (slice(0, 0),) * 3


def test_it_is_registered():
    assert HEADS["fusion"] is FusionHead and HEADS["fusion_ensemble"] is FusionEnsemble


@pytest.mark.parametrize("attention", [0, 1])
@pytest.mark.parametrize("pyramid", ["anisotropic", "coarse", "tokens", "tokens, no power of two"])
def test_every_parameter_gets_a_gradient_in_the_first_step(pyramid, attention):
    stems = "PET and MR" if pyramid in ("anisotropic", "tokens") else "no stem"
    head = head_of(pyramid, stems, trained=False, attention=attention)
    shape = tuple(2 * stride for stride in PYRAMIDS[pyramid][-1][0])
    of_stems = {name: maps(levels, shape, 3, 1) for name, levels in STEMS[stems].items()}
    output = head(Features(maps(PYRAMIDS[pyramid], shape, 3, 2), of_stems), rows())
    (output * torch.randn_like(output)).sum().backward()
    assert not [name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize("columns", [0, 4])
def test_it_begins_as_the_linear_model_of_the_row(columns):
    head = head_of(columns=columns, trained=False)
    row = rows() if columns else None
    if columns:
        torch.nn.init.normal_(head.skip.weight)
    expected = row @ head.skip.weight.T if columns else torch.zeros(3, 3)
    torch.testing.assert_close(head(features_of(), row), expected, atol=0.02, rtol=0)
    if columns:
        torch.testing.assert_close(head.linear(row), expected)


@pytest.mark.parametrize("attention", [0, 1])
class TestWhatIsThere:
    def test_a_mixed_batch_equals_its_cases_one_by_one(self, attention):
        head, features, row = head_of(attention=attention).double(), features_of(dtype=torch.float64), rows().double()
        for name, case in (("PET", 0), ("MR", 1), ("MR", 2), ("PET", 2)):
            for m in features.stems[name]:
                m[case] = 0.0
        row[1] = math.nan
        mask = region(BOX, EMPTY, BOX)
        together = head(features, row, mask)
        present = ({"MR"}, {"PET"}, set())
        for case, names in enumerate(present):
            stems = {name: [m[case : case + 1] for m in features.stems[name]] for name in names}
            alone = Features([m[case : case + 1] for m in features.pyramid], stems)
            row_alone = None if case == 1 else row[case : case + 1]
            mask_alone = None if case == 1 else mask[case : case + 1]
            torch.testing.assert_close(
                head(alone, row_alone, mask_alone), together[case : case + 1], atol=1e-12, rtol=0
            )

    def test_each_part_counts(self, attention):
        head, features = head_of(attention=attention), features_of()
        outputs = [
            head(features, rows(), region(BOX, BOX, BOX)),
            head(features, rows()),
            head(features),
            head(dataclasses.replace(features, stems={"PET": features.stems["PET"]}), rows()),
            head(dataclasses.replace(features, stems={}), rows()),
            head.fuse({}, rows()),
        ]
        assert all(output.isfinite().all() for output in outputs)
        for place, one in enumerate(outputs):
            assert all((one - other).abs().max() > 1e-4 for other in outputs[place + 1 :])

    def test_a_row_of_another_width_or_nothing_at_all_is_refused(self, attention):
        head = head_of(attention=attention)
        with pytest.raises(UniconError, match="rows of 4 figures, not 5"):
            head(features_of(), rows(columns=5))
        with pytest.raises(UniconError, match="maps, a row of figures, or both"):
            head.fuse({})
        with pytest.raises(UniconError, match="takes no row of figures, 4 columns"):
            head_of(columns=0, attention=attention)(features_of(), rows())


class TestPooling:
    def test_an_untrained_pool_is_the_mean_of_the_region_and_a_little_of_everything(self):
        features = features_of("full resolution", "no stem")
        coarsest = features.pyramid[-1]  # stride 4
        mask = region(BOX, EMPTY, (slice(0, 16), slice(0, 16), slice(0, 32)))
        inside = coarsest[0, :, 0:1, 1:3, 2:4].flatten(1).mean(1)
        whole = coarsest.flatten(2).mean(2)
        expected = torch.stack([REGION_SHARE * inside + (1 - REGION_SHARE) * whole[0], whole[1], whole[2]])
        for attention in (0, 1):
            head = head_of("full resolution", "no stem", trained=False, attention=attention)
            tokens = head.gather(features, mask)
            pooled, present = head.pools[FOUNDATION](tokens[FOUNDATION], tokens[FOUNDATION + PRIOR])
            torch.testing.assert_close(pooled, expected)
            assert present.flatten().tolist() == [1.0, 1.0, 1.0]

    def test_learned_scores_move_the_weights(self):
        head = head_of("full resolution", "no stem", trained=False)
        with torch.no_grad():
            head.pools[FOUNDATION].score.weight[0, 0] = 50.0
        features = features_of("full resolution", "no stem")
        tokens = head.gather(features)
        pooled, _ = head.pools[FOUNDATION](tokens[FOUNDATION], tokens[FOUNDATION + PRIOR])
        highest = features.pyramid[-1].flatten(2)[:, 0].max(dim=1)
        torch.testing.assert_close(pooled[:, 0], highest.values, atol=0.2, rtol=0)

    def test_padding_weighs_nothing(self):
        head, tokens = head_of(), head_of().gather(features_of())
        padded = {
            name: torch.cat([values, torch.full_like(values[:, :5], -torch.inf if name.endswith(PRIOR) else 0.0)], 1)
            for name, values in tokens.items()
        }
        torch.testing.assert_close(head.fuse(padded, rows()), head.fuse(tokens, rows()))

    def test_without_attention_one_position_is_kept(self):
        tokens = head_of(attention=0).gather(features_of(), region(BOX, BOX, BOX))
        assert {name: tuple(values.shape) for name, values in tokens.items()} == {
            "foundation": (3, 1, 8), "foundation.prior": (3, 1),
            "MR": (3, 1, 2), "MR.prior": (3, 1), "PET": (3, 1, 5), "PET.prior": (3, 1),
        }  # fmt: skip


class TestStandard:
    def test_inputs_come_to_mean_0_and_sd_1_over_the_cases_that_have_them(self):
        head, features = head_of(trained=False, attention=0), features_of(batch=8)
        row = 100.0 + 7.0 * rows(8)
        row[:, 3], row[5] = 3.0, math.nan  # a constant column, a case without row
        for m in features.stems["PET"]:
            m[:2] = 0.0
        tokens = head.gather(features)
        head.standardise(tokens, row)
        pet, present = head.pools["PET"](tokens["PET"], tokens["PET" + PRIOR])
        values, known = head.row(*head._known(row))
        assert present.flatten().tolist() == [0.0] * 2 + [1.0] * 6 and not pet[:2].any()
        assert known.flatten().tolist() == [1.0] * 5 + [0.0] + [1.0] * 2 and not values[5].any()
        assert not values[:, 3].any()
        for found in (pet[2:], values[known[:, 0] > 0, :3]):
            torch.testing.assert_close(found.mean(0), torch.zeros(found.shape[1]), atol=1e-5, rtol=0)
            torch.testing.assert_close(found.std(0, correction=0), torch.ones(found.shape[1]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("cases, units", [(1, 8), (39, 8), (127, 8), (128, 16), (200, 16), (1024, 128), (10**6, 128)])
def test_sizes_grow_with_the_cohort(cases, units):
    options = fusion_options(cases)
    assert options == {"units": units, "attention": int(cases >= 200)}
    assert FusionHead(skips_of("coarse", {}), 2, columns=5, **options)(
        features_of("coarse", "no stem"), rows(columns=5)
    ).shape == (3, 2)


def test_each_group_of_columns_weighs_the_same_however_many_it_has():
    standard = Standard(6, (2, 4))
    values = 3 + 2 * torch.randn(500, 6)
    values[:, 5] = 7.0  # constant, so the second group has three
    standard.fit(values, torch.ones(500, 1))
    found, _ = standard(values, torch.ones(500, 1))
    variances = found.var(dim=0, correction=0)
    torch.testing.assert_close(variances, torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3, 0.0]))
    plain = Standard(2)
    plain.fit(values[:, :2], torch.ones(500, 1))
    torch.testing.assert_close(plain(values[:, :2], torch.ones(500, 1))[0].var(dim=0, correction=0), torch.ones(2))
