"""Stems, heads and the task model: contracts over everything that is registered."""

import pytest
import torch

from unicon_pipeline.contract import FeatureLevel
from unicon_pipeline.extension_plan import AdapterPlan, ExtensionPlan, HeadPlan, Schedule, StemPlan
from unicon_pipeline.foundation import build_foundation, new_residual_encoder_spec
from unicon_pipeline.heads import HEADS, Features, SkipLevel, UNetHead, skip_levels
from unicon_pipeline.model import build_task_model
from unicon_pipeline.stems import STEMS

SPEC = new_residual_encoder_spec("none", {})
PET = StemPlan("PET", "residual_stem", ((1, 1, 1), (2, 2, 2), (4, 4, 4)), (8, 16, 16))
BOTH = torch.tensor([[True, True]])


def extension(**changes):
    plan = {
        "task": "T", "modalities": ("CT", "PET"), "new_stems": (PET,), "reused_stems": (),
        "adapter": AdapterPlan("low_rank", 2, 4.0), "head": HeadPlan("unet", 3, {}),
        "schedule": Schedule(1, None), "training_cases": ("a",), "validation_cases": (), "seed": 0, "decisions": (),
    }  # fmt: skip
    return ExtensionPlan(**{**plan, **changes})


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_task_model(extension(), build_foundation(SPEC), {})


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 2, 32, 32, 16, generator=torch.Generator().manual_seed(2))


def open_gate(model):
    with torch.no_grad():
        model.stems["PET"].gate.fill_(0.5)


@pytest.mark.parametrize("kind", sorted(STEMS))
def test_a_stem_gives_what_it_declares(kind):
    stem = STEMS[kind](SPEC.projection, PET.strides_zyx, PET.features)
    projected, skips = stem(torch.randn(1, 1, 16, 32, 16))
    assert projected.shape == (1, SPEC.projection.channels, 16, 32, 16) and not projected.any()
    for skip, level in zip(skips, stem.levels, strict=True):
        size = tuple(n // s for n, s in zip((16, 32, 16), level.stride_zyx, strict=True))
        assert skip.shape == (1, level.channels, *size)


def test_a_stem_for_a_projection_that_is_coarser_than_the_input():
    stem = STEMS["residual_stem"](FeatureLevel((1, 2, 2), 12, 12), ((1, 1, 1), (1, 2, 2)), (4, 8))
    projected, skips = stem(torch.randn(1, 1, 8, 16, 16))
    assert projected.shape == (1, 12, 8, 8, 8) and skips[0].shape == (1, 4, 8, 16, 16)


def test_on_the_day_a_stem_arrives_ct_features_are_exactly_the_old_ones(model, images):
    old = model.foundation(images[:1, :1], None, None)
    with_pet = model.features(images[:1], BOTH)
    without = model.features(images[:1], torch.tensor([[True, False]]))
    assert "PET" in with_pet.stems and not without.stems
    for level, both, alone in zip(old, with_pet.pyramid, without.pyramid, strict=True):
        assert torch.equal(level, both) and torch.equal(level, alone)


def test_a_modality_that_is_absent_costs_nothing_and_changes_nothing(model, images):
    open_gate(model)
    model.stems["PET"].register_forward_hook(lambda *_: pytest.fail("the stem of an absent modality ran"))
    only_ct = torch.tensor([[True, False]])
    other_pet = images[:1].clone()
    other_pet[:, 1] = 7.0
    assert torch.equal(model(images[:1], only_ct)[0], model(other_pet, only_ct)[0])


def test_pet_alone_is_an_input_once_the_gate_is_open(model, images):
    open_gate(model)
    only_pet = torch.tensor([[False, True]])
    one, other = model(images[:1], only_pet)[0], model(images[1:], only_pet)[0]
    assert not torch.allclose(one, other)
    other_ct = images[:1].clone()
    other_ct[:, 0] = 3.0
    assert torch.equal(one, model(other_ct, only_pet)[0])


def test_a_mixed_batch_equals_its_cases_one_by_one(model, images):
    open_gate(model)
    model.eval()
    for first in ([True, True], [True, False], [False, True]):
        for second in ([True, True], [True, False], [False, True]):
            present = torch.tensor([first, second])
            masked = images * present[:, :, None, None, None]
            together = model(masked, present)[0]
            for row in range(2):
                alone = model(masked[row : row + 1], present[row : row + 1])[0]
                torch.testing.assert_close(together[row : row + 1], alone, atol=2e-5, rtol=1e-4)


def test_everything_new_gets_a_gradient_and_nothing_old_does(model, images):
    open_gate(model)
    with torch.no_grad():
        for up in model.adapter.up:
            up.normal_()
    outputs = model.train()(images, BOTH.expand(2, 2), every_level=True)
    sum(output.square().mean() for output in outputs).backward()
    trained = model.trained_state()
    assert not [name for name, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not any(parameter.requires_grad for parameter in model.foundation.parameters())
    assert {name.split(".")[0] for name in trained} == {"adapter", "head", "stems"}


def test_frozen_parts_stay_in_evaluation_mode(images):
    foundation = build_foundation(SPEC)
    first = build_task_model(extension(), foundation, {})
    second = build_task_model(extension(new_stems=(), reused_stems=(PET,)), foundation, dict(first.stems))
    second.train()
    assert second.head.training
    assert not any(m.training for m in second.foundation.modules())
    assert not any(m.training for m in second.stems.modules() if m is not second.stems)
    assert not any(name.startswith("stems.") for name in second.trained_state())


def test_merged_predicts_the_same(model, images):
    open_gate(model)
    with torch.no_grad():
        for up in model.adapter.up:
            up.normal_(std=0.1)
    model.eval()
    assert torch.equal(model.merged()(images, BOTH.expand(2, 2))[0], model(images, BOTH.expand(2, 2))[0])


class TestHeads:
    def test_every_head_is_under_contract(self):
        assert set(HEADS) == {"unet", "pooled_linear"}

    @pytest.mark.parametrize(
        "levels",
        [
            (((1, 1, 1), 4), ((2, 2, 2), 6), ((4, 4, 4), 8)),
            (((1, 2, 2), 6), ((2, 4, 4), 8)),
            (((2, 4, 4), 6), ((4, 8, 8), 8)),
            (((8, 8, 8), 16),),
        ],
        ids=["full resolution", "half in plane", "coarse", "tokens"],
    )
    def test_a_decoder_reaches_full_resolution_from_any_pyramid(self, levels):
        declared = tuple(SkipLevel(stride, channels) for stride, channels in levels)
        spec = type("Spec", (), {"pyramid": [FeatureLevel(s, c, c) for s, c in levels]})
        filled = skip_levels(spec, {})
        assert filled[0].stride_zyx == (1, 1, 1) and set(declared) <= set(filled)
        for fine, coarse in zip(filled, filled[1:], strict=False):
            assert all(c in (f, 2 * f) for f, c in zip(fine.stride_zyx, coarse.stride_zyx, strict=True))
        head = UNetHead(filled, 2)
        shape = (16, 32, 16)
        pyramid = [torch.randn(1, c, *(n // s for n, s in zip(shape, stride, strict=True))) for stride, c in levels]
        outputs = head(Features(pyramid, {}), every_level=True)
        assert outputs[0].shape == (1, 2, *shape)
        for output, stride in zip(outputs, head.supervised_strides, strict=True):
            assert output.shape[2:] == tuple(n // s for n, s in zip(shape, stride, strict=True))
        sum(output.square().mean() for output in outputs).backward()
        assert not [name for name, p in head.named_parameters() if p.grad is None]
        assert len(head(Features(pyramid, {}))) == 1

    def test_an_absent_stem_counts_as_zeros(self, model, images):
        model.eval()
        features = model.features(images[:1], torch.tensor([[True, False]]))
        levels = model.stems["PET"].levels
        sizes = [[n // s for n, s in zip(images.shape[2:], level.stride_zyx, strict=True)] for level in levels]
        zeros = [torch.zeros(1, level.channels, *size) for level, size in zip(levels, sizes, strict=True)]
        assert torch.equal(model.head(features)[0], model.head(Features(features.pyramid, {"PET": zeros}))[0])
