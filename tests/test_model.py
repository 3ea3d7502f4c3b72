"""The task model: what a stem, an adapter and a head change, and what they never do."""

import dataclasses

import pytest
import torch
from tiny_foundations import strided_spec, tokens_spec
from torch import nn

from unicon_pipeline import lean_blocks
from unicon_pipeline.contract import CT_HU_RULE, FeatureLevel, FoundationSpec, InputContract
from unicon_pipeline.device import autocast
from unicon_pipeline.errors import UniconError
from unicon_pipeline.extension_plan import AdapterPlan, ExtensionPlan, HeadPlan, Schedule, StemPlan
from unicon_pipeline.families import build_foundation
from unicon_pipeline.families.dna_encoders import new_residual_encoder_spec
from unicon_pipeline.foundation import Foundation
from unicon_pipeline.inference_form import inference_form
from unicon_pipeline.levels import new_stem_levels
from unicon_pipeline.model import TaskModel, build_stem, build_task_model

STRIDES = {
    "full resolution": ((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    "anisotropic": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    "half in plane": ((1, 2, 2), (2, 2, 2)),
    "coarse": ((2, 4, 4), (2, 2, 2)),
}
SPECS = {
    **{name: new_residual_encoder_spec("none", {}, (4, 6, 8)[: len(s)], s) for name, s in STRIDES.items()},
    "strided": strided_spec((4, 6, 8), ((1, 2, 2), (2, 2, 2), (2, 2, 2))),
    "one level": strided_spec((4,), ((4, 4, 4),)),
    "tokens": tokens_spec((4, 4, 4)),
    "odd tokens": tokens_spec((5, 6, 6), layers=2),
}
SPEC = SPECS["anisotropic"]
DECODER = {"pyramid": "unet", "tokens": "unetr"}
SUBSETS = ([True, True], [True, False], [False, True])
BOTH = torch.tensor([[True, True]])
CT_ONLY = torch.tensor([[True, False]])
PET_ONLY = torch.tensor([[False, True]])


def pet_stem(spec=SPEC, modality="PET"):
    strides = tuple(level.stride_zyx for level in new_stem_levels(spec))
    kind = {"pyramid": "residual_stem", "tokens": "patch_embedding"}[spec.kind]
    return StemPlan(modality, kind, strides, (3, 4, 5)[: len(strides)])


def extension(spec=SPEC, **changes):
    plan = {
        "task": "T", "modalities": ("CT", "PET"), "new_stems": (pet_stem(spec),), "reused_stems": (),
        "adapter": AdapterPlan("low_rank", 2, 4.0), "head": HeadPlan(DECODER[spec.kind], 3, {}),
        "schedule": Schedule(1, None), "training_cases": ("a",), "validation_cases": (), "seed": 0, "decisions": (),
    }  # fmt: skip
    return ExtensionPlan(**{**plan, **changes})


def build(spec=SPEC, **changes):
    torch.manual_seed(0)
    return build_task_model(extension(spec, **changes), build_foundation(spec), {})


def images_for(spec, channels=2, batch=2, multiple=(2, 2, 2)):
    shape = tuple(n * divisor for n, divisor in zip(multiple, spec.input.divisible_by_zyx))
    return torch.randn(batch, channels, *shape, generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=sorted(SPECS))
def model(request):
    return build(SPECS[request.param])


@pytest.fixture
def images(model):
    return images_for(model.foundation.spec)


def opened(model):
    """All that starts at zero is moved away from it."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for stem in model.stems.values():
            stem.gate.normal_(generator=generator)
        for parameter in (*model.adapter.up, *model.adapter.shift):
            parameter.normal_(std=0.1, generator=generator)
    return model


def as_tensor(output):
    return output[0] if isinstance(output, list) else output


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_on_the_day_a_stem_arrives_ct_features_are_exactly_the_old_ones(model, images):
    old = model.foundation(images[:, :1], None, None)
    with_pet = model.features(images, BOTH.expand(2, 2))
    without = model.features(images, CT_ONLY.expand(2, 2))
    mixed = model.features(images, torch.cat((BOTH, CT_ONLY)))
    assert "PET" in with_pet.stems and not without.stems
    assert all(same(old, features.pyramid) for features in (with_pet, without, mixed))


def test_an_absent_modality_is_not_computed_and_not_read(model, images):
    opened(model)
    model.stems["PET"].register_forward_hook(lambda *_: pytest.fail("the stem of an absent modality ran"))
    other_pet = images.clone()
    other_pet[:, 1] = 7.0
    present = CT_ONLY.expand(2, 2)
    assert same(model(images, present), model(other_pet, present))


def test_pet_alone_is_an_input_once_the_gate_is_open(model, images):
    opened(model)
    model.foundation.project = lambda *_: pytest.fail("the projection of an absent CT ran")
    if model.head.detail is not None:
        model.head.detail.register_forward_hook(lambda *_: pytest.fail("the detail path of an absent CT ran"))
    alone = model.features(images, PET_ONLY.expand(2, 2)).pyramid
    assert all((level[0] - level[1]).abs().max() > 1e-3 for level in alone)
    other_ct = images.clone()
    other_ct[:, 0] = 3.0
    assert same(alone, model.features(other_ct, PET_ONLY.expand(2, 2)).pyramid)
    assert same(model(images, PET_ONLY.expand(2, 2)), model(other_ct, PET_ONLY.expand(2, 2)))


@pytest.mark.parametrize("kind", ["decoder", "pooled_linear"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_mixed_batch_equals_its_cases_one_by_one(spec, kind):
    kind = DECODER[spec.kind] if kind == "decoder" else kind
    model = opened(build(spec, head=HeadPlan(kind, 3, {}))).double().eval()
    images = images_for(spec).double()
    for first in SUBSETS:
        for second in SUBSETS:
            present = torch.tensor([first, second])
            masked = images * present[:, :, None, None, None]
            together = as_tensor(model(masked, present))
            for row in range(2):
                alone = as_tensor(model(masked[row : row + 1], present[row : row + 1]))
                torch.testing.assert_close(together[row : row + 1], alone, atol=1e-9, rtol=0)


def test_everything_new_gets_a_gradient_and_nothing_old_does(model, images):
    opened(model)
    outputs = model.train()(images, BOTH.expand(2, 2), every_level=True)
    sum((output * torch.randn_like(output)).mean() for output in outputs).backward()
    trained = model.trained_state()
    assert not [name for name, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not any(p.requires_grad or p.grad is not None for p in model.foundation.parameters())
    assert {name.split(".")[0] for name in trained} == {"adapter", "head", "stems"}


@pytest.mark.parametrize("multiple", [(1, 1, 2), (3, 1, 1)])
def test_any_multiple_of_the_divisor_is_an_input(model, multiple):
    images = images_for(model.foundation.spec, multiple=multiple)
    outputs = model.train()(images, BOTH.expand(2, 2), every_level=True)
    assert outputs[0].shape == (2, 3, *images.shape[2:])
    for output, stride in zip(outputs, model.head.supervised_strides, strict=True):
        assert output.shape[2:] == tuple(n // s for n, s in zip(images.shape[2:], stride))
        assert output.isfinite().all()


def test_a_step_of_training_changes_what_the_task_owns_and_nothing_else(model, images):
    spec = model.foundation.spec
    plan = extension(
        spec, modalities=("CT", "PET", "MR"), new_stems=(pet_stem(spec, "MR"),), reused_stems=(pet_stem(spec),)
    )
    second = opened(build_task_model(plan, model.foundation, dict(model.stems))).train()
    trained = second.trained_state()
    before = {name: tensor.detach().clone() for name, tensor in second.state_dict().items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
    outputs = second(torch.cat((images, images[:, :1].flip(2)), dim=1), torch.ones(2, 3).bool(), every_level=True)
    sum((output * torch.randn_like(output)).mean() for output in outputs).backward()
    optimizer.step()
    own = {id(tensor) for tensor in trained.values()}
    for name, tensor in second.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, before[name]) == (id(tensor) not in own), name


def test_the_first_step_opens_the_gate(model, images):
    outputs = model.train()(images, BOTH.expand(2, 2))
    sum((output * torch.randn_like(output)).mean() for output in outputs).backward()
    assert model.stems["PET"].gate.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.adapter.up)


def test_trained_state_holds_each_new_tensor_once(model):
    trained = model.trained_state()
    parts = (model.adapter, model.head, model.stems["PET"])
    assert len({id(t) for t in trained.values()}) == len({t.data_ptr() for t in trained.values()}) == len(trained)
    assert {id(t) for t in trained.values()} == {id(p) for part in parts for p in part.parameters()}


class TestReusedStems:
    @pytest.fixture
    def second(self):
        first = opened(build())
        plan = extension(new_stems=(), reused_stems=(pet_stem(),))
        return build_task_model(plan, first.foundation, dict(first.stems))

    def test_they_are_frozen_and_not_trained_again(self, second):
        assert not any(name.startswith(("stems.", "foundation.")) for name in second.trained_state())
        assert not any(parameter.requires_grad for parameter in second.stems.parameters())

    def test_frozen_parts_stay_in_evaluation_mode(self, second):
        second.train()
        assert second.head.training and second.adapter.training
        assert not any(m.training for part in (second.foundation, second.stems["PET"]) for m in part.modules())
        second.eval()
        assert not any(m.training for m in second.modules())

    def test_an_old_and_a_new_stem_side_by_side(self):
        first = opened(build())
        plan = extension(
            modalities=("CT", "PET", "MR"), new_stems=(pet_stem(modality="MR"),), reused_stems=(pet_stem(),)
        )
        model = build_task_model(plan, first.foundation, dict(first.stems)).train()
        assert model.stems["MR"].training and not model.stems["PET"].training
        assert {n.split(".")[1] for n in model.trained_state() if n.startswith("stems.")} == {"MR"}
        images = images_for(SPEC, channels=3)
        old = first.features(images[:, :2], BOTH.expand(2, 2)).pyramid  # with the first task's adapter
        model.adapter.load_state_dict(first.adapter.state_dict())
        assert same(old, model.features(images, torch.tensor([[True] * 3] * 2)).pyramid)


class TestMerged:
    def test_it_predicts_the_same(self, model, images):
        opened(model).eval()
        for subset in SUBSETS:
            present = torch.tensor([subset, subset])
            assert same(model.merged()(images, present), model(images, present))

    def test_without_an_adapter_too(self):
        model, images = build(adapter=None).eval(), images_for(SPEC)
        assert same(model.merged()(images, BOTH.expand(2, 2)), model(images, BOTH.expand(2, 2)))

    def test_it_is_a_frozen_copy_and_training_goes_on(self, model):
        before = {name: (p.clone(), p.requires_grad) for name, p in model.train().named_parameters()}
        modes = [module.training for module in model.modules()]
        merged = model.merged()
        assert not any(m.training for m in merged.modules()) and not any(p.requires_grad for p in merged.parameters())
        assert modes == [module.training for module in model.modules()]
        with torch.no_grad():
            for parameter in merged.parameters():
                parameter.add_(1.0)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1], name


class BatchNormFoundation(Foundation):
    """A family with running statistics."""

    def __init__(self, spec: FoundationSpec):
        super().__init__(spec)
        self.projection = nn.Sequential(nn.Conv3d(len(spec.input.modalities), 4, 3, padding=1), nn.BatchNorm3d(4))
        self.stage = nn.Sequential(nn.Conv3d(4, 6, 3, 2, 1), nn.BatchNorm3d(6), nn.ReLU())

    def project(self, native_bczyx):
        return self.projection(native_bczyx)

    def stages(self, projected):
        return [projected, self.stage(projected)]


def batch_norm_model(native=("CT",), modalities=("CT", "PET")):
    levels = FeatureLevel((1, 1, 1), 4, 4), FeatureLevel((2, 2, 2), 6, 6)
    contract = InputContract(native, "LPS", None, None, (2, 2, 2), dict.fromkeys(native, CT_HU_RULE))
    spec = FoundationSpec("batch_norm", {}, contract, "pyramid", levels[0], levels, 6, 1.0, "none")
    stem = (StemPlan("PET", "residual_stem", ((1, 1, 1), (2, 2, 2)), (3, 4)),) if "PET" in modalities else ()
    torch.manual_seed(0)
    plan = extension(modalities=modalities, new_stems=stem)
    return build_task_model(plan, BatchNormFoundation(spec), {})


def test_running_statistics_of_the_foundation_never_move():
    model = opened(batch_norm_model()).train()
    before = {name: buffer.clone() for name, buffer in model.foundation.named_buffers()}
    assert before
    for present in (BOTH, CT_ONLY, PET_ONLY):
        model(torch.randn(2, 2, 4, 4, 4) + 5, present.expand(2, 2))[0].sum().backward()
    assert all(torch.equal(before[name], buffer) for name, buffer in model.foundation.named_buffers())
    assert not any(name.startswith("foundation") for name in model.trained_state())


class TestSeveralNativeModalities:
    def test_channels_go_by_name_and_not_by_position(self):
        model = opened(batch_norm_model(("CT", "MR"), ("PET", "MR", "CT")))
        images = torch.randn(2, 3, 4, 4, 4)
        everything = torch.ones(2, 3, dtype=torch.bool)
        added, _ = model.stems["PET"](images[:, :1])
        expected = model.adapter(model.foundation, images[:, [2, 1]], None, added)
        assert same(expected, model.features(images, everything).pyramid)

    def test_one_that_the_task_lacks_is_a_missing_summand(self):
        model = opened(batch_norm_model(("CT", "MR"), ("MR",)))
        images = torch.randn(2, 1, 4, 4, 4)
        padded = torch.cat((torch.zeros_like(images), images), dim=1)
        expected = model.adapter(model.foundation, padded, None, None)
        assert same(expected, model.features(images, torch.ones(2, 1, dtype=torch.bool)).pyramid)

    def test_a_task_without_any_lives_on_its_stems(self):
        model = opened(batch_norm_model(("CT",), ("PET",)))
        model.foundation.projection.register_forward_hook(lambda *_: pytest.fail("there is nothing to project"))
        assert model(torch.randn(2, 1, 4, 4, 4), torch.ones(2, 1, dtype=torch.bool))[0].shape == (2, 3, 4, 4, 4)


def test_a_plan_and_its_weights_make_the_same_model_again():
    model, again = opened(build()).eval(), build().eval()
    with torch.no_grad():
        for tensor in again.trained_state().values():
            tensor.zero_()
    for name, tensor in model.trained_state().items():
        again.trained_state()[name].data.copy_(tensor)
    images = images_for(SPEC)
    assert same(model(images, BOTH.expand(2, 2)), again(images, BOTH.expand(2, 2)))


def test_a_stem_is_built_for_the_projection_of_its_foundation():
    foundation = build_foundation(SPEC)
    stem = build_stem(pet_stem(), foundation)
    projected, _ = stem(torch.randn(1, 1, 4, 8, 8))
    assert projected.shape == foundation.project(torch.randn(1, 1, 4, 8, 8)).shape


def test_unknown_kinds_list_what_there_is():
    for change, message in (
        ({"head": HeadPlan("cox", 1, {})}, "Unknown head 'cox'.*unet"),
        ({"adapter": AdapterPlan("full", 2, 4.0)}, "Unknown adapter 'full'.*low_rank"),
        ({"new_stems": (dataclasses.replace(pet_stem(), kind="vit"),)}, "Unknown stem 'vit'.*residual_stem"),
    ):
        with pytest.raises(UniconError, match=message):
            build(**change)


def test_the_foundation_is_shared_and_not_copied():
    foundation = build_foundation(SPEC)
    models = [build_task_model(extension(), foundation, {}) for _ in range(2)]
    assert all(isinstance(m, TaskModel) and m.foundation is foundation for m in models)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("present", SUBSETS, ids=str)
def test_the_inference_form_computes_the_same_in_any_pieces(name, present, precision, monkeypatch):
    for size, value in (("_PIECE_VALUES", 500), ("_FEWEST_ONEDNN", 0)):
        monkeypatch.setattr(lean_blocks, size, value)
    model, images = build(SPECS[name]).eval(), images_for(SPECS[name])
    nn.init.normal_(model.stems["PET"].gate)  # closed, it gives a constant map, whose norm is rounding errors
    merged, before = model.merged(), images.clone()
    form = inference_form(merged, torch.device("cpu"), precision)
    here = torch.tensor([present, present])
    with torch.inference_mode():
        (wanted,) = merged(images, here)
        with autocast(torch.device("cpu"), precision):
            (found,) = form(images, here)
    assert torch.equal(images, before)
    tolerance = 1e-5 if precision is torch.float32 else 0.15
    assert (found.float() - wanted).abs().max() <= tolerance * wanted.abs().max().clamp_min(1)
