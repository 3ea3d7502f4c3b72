"""Contract of every registered foundation: what it declares is what it does."""

import dataclasses
import math

import pytest
import test_family_ctvit
import test_family_inflated_resnet
import test_family_monai
import test_family_primus
import torch
from torch import nn

from unicon_pipeline.adapters import LowRankAdapter
from unicon_pipeline.budget import PRESETS
from unicon_pipeline.contract import CT_HU_RULE, PET_SUV_RULE, InputContract
from unicon_pipeline.errors import CheckpointError, UniconError
from unicon_pipeline.extend import extend
from unicon_pipeline.extension_plan import Schedule
from unicon_pipeline.families import ARCHITECTURES, build_foundation
from unicon_pipeline.families.dna_encoders import new_residual_encoder_spec
from unicon_pipeline.foundation import declare, freeze
from unicon_pipeline.input_shape import Overrides
from unicon_pipeline.model_folder import ModelFolder, create_model
from unicon_pipeline.model_record import EMBEDDED
from unicon_pipeline.phantoms import write_phantom_task
from unicon_pipeline.predict import predict_folder
from unicon_pipeline.preprocess import plan_and_preprocess
from unicon_pipeline.verify import verify
from unicon_pipeline.weights import canonical_state

STRIDES = {
    "isotropic": ((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    "anisotropic": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    "half in plane": ((1, 2, 2), (2, 2, 2), (1, 2, 2)),
    "coarse": ((2, 4, 4), (2, 2, 2), (1, 1, 1)),
}
SPECS = {
    f"residual_encoder, {name}": new_residual_encoder_spec("none", {}, (4, 6, 8), strides)
    for name, strides in STRIDES.items()
} | {
    "residual_encoder, default": new_residual_encoder_spec("none", {}),
    "plain_encoder": declare(
        "plain_encoder",
        {"features_per_stage": [4, 6], "strides": [[1, 1, 1], [1, 2, 2]], "blocks_per_stage": [1, 2]},
        InputContract(("CT", "PET"), "xzy", None, None, (1, 2, 2), {"CT": CT_HU_RULE, "PET": PET_SUV_RULE}),
        "pyramid", "none", {},
    ),
    "inflated_resnet": test_family_inflated_resnet.tiny_spec(),
    "ctvit": test_family_ctvit.tiny_spec(),
    "primus": test_family_primus.tiny_spec(),
    "segres_encoder": test_family_monai.tiny_spec(),
    "swin_unetr": test_family_monai.tiny_swin_spec(),
}  # fmt: skip


@pytest.fixture(scope="module", params=sorted(SPECS))
def foundation(request):
    torch.manual_seed(0)
    return freeze(build_foundation(SPECS[request.param]))


def extent(size, stride):
    return tuple(n // s for n, s in zip(size, stride, strict=True))


def input_shape(spec, *multiples):
    """Two positions at least for the coarsest norm."""
    return tuple(m * d for m, d in zip(multiples, spec.input.divisible_by_zyx, strict=True))


def native(spec, *multiples, batch=1):
    generator = torch.Generator().manual_seed(7)
    shape = (batch, len(spec.input.modalities), *input_shape(spec, *multiples))
    return torch.randn(shape, generator=generator)


def test_every_family_is_under_contract():
    assert set(ARCHITECTURES) == {spec.architecture for spec in SPECS.values()}


@pytest.mark.parametrize("multiples", [(1, 1, 2), (3, 1, 1), (1, 3, 2)])
def test_declared_pyramid_is_the_real_one(foundation, multiples):
    spec, image = foundation.spec, native(foundation.spec, *multiples)
    shape = image.shape[2:]
    projected = foundation.project(image)
    assert projected.shape == (1, spec.projection.channels, *extent(shape, spec.projection.stride_zyx))
    levels = foundation(image, None, None)
    assert [level.shape for level in levels] == [
        (1, declared.channels, *extent(shape, declared.stride_zyx)) for declared in spec.pyramid
    ]
    assert spec.embedding_channels == spec.pyramid[-1].channels
    assert all(level.isfinite().all() and level.std() > 0 for level in levels)


def test_declared_costs_are_those_of_its_layers(foundation):
    """Hooks on the real layers, as an oracle for both the multiply-accumulates and the maps kept."""
    spec, image = foundation.spec, native(foundation.spec, 2, 1, 2)
    voxels, macs, kept = image[0, 0].numel(), [0], [0]
    attention = any(isinstance(module, nn.Linear) for module in foundation.modules())

    def count(module, inputs, output):
        macs[0] += output[0].numel() * module.weight[0].numel()
        if not (math.prod(getattr(module, "kernel_size", (2,))) == 1 and module in shortcuts):
            kept[0] += output[0].numel()

    named = {name: m for name, m in foundation.named_modules() if isinstance(m, nn.Conv3d | nn.Linear)}
    shortcuts = [m for name, m in named.items() if ".skip." in name or ".downsample." in name]
    hooks = [module.register_forward_hook(count) for module in named.values()]
    try:
        foundation(image, None, None)
    finally:
        for hook in hooks:
            hook.remove()
    levels = {spec.projection.stride_zyx: spec.projection.conv_maps}
    for stride in {level.stride_zyx for level in spec.pyramid}:
        levels[stride] = sum(level.conv_maps for level in spec.pyramid if level.stride_zyx == stride)
    declared = sum(maps / math.prod(stride) for stride, maps in levels.items())
    if attention:  # its own products and maps come on top
        assert macs[0] / voxels <= spec.encoder_macs_per_voxel
        assert kept[0] / voxels <= declared * (1 + 1e-3)
    else:
        assert spec.encoder_macs_per_voxel == pytest.approx(macs[0] / voxels, rel=1e-9)
        assert declared == pytest.approx(kept[0] / voxels, rel=1e-9)


def test_adapters_change_the_features_and_each_gets_a_gradient(foundation):
    adapter, image = LowRankAdapter(foundation, 2, 4.0), native(foundation.spec, 2, 2, 2)
    before = foundation(image, None, None)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(before, adapter(foundation, image, None, None)))
    with torch.no_grad():
        for up in adapter.up:
            up.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    after = adapter(foundation, image, None, None)
    assert not torch.allclose(before[-1], after[-1], atol=1e-4)
    sum(level.square().sum() for level in after).backward()
    silent = [name for name, p in zip(adapter.matrix_names, adapter.up) if p.grad is None or not p.grad.any()]
    assert not silent


FAMILIES = ("plain_encoder", "inflated_resnet", "ctvit", "primus", "segres_encoder", "swin_unetr")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_on_it_grows_by_pet_predicts_and_stays_what_it_was(name, tmp_path):
    """Plan, extend by a CT+PET task, predict CT alone and both, verify; small spacing rules are lifted for speed."""
    spec = SPECS[name]
    spec = dataclasses.replace(spec, input=dataclasses.replace(spec.input, spacing_zyx_mm=None))
    torch.manual_seed(2)
    create_model(tmp_path / "model", spec, canonical_state(build_foundation(spec)))
    task = tmp_path / "raw" / "Both"
    size = {"shape_zyx": (24, 40, 40), "spacing_zyx_mm": (12.0, 10.0, 10.0)}
    write_phantom_task(task, "lesions", 3, 5, modalities=("CT", "PET"), **size)
    patch = input_shape(spec, 1, 1, 2)
    _, failed = plan_and_preprocess(task, tmp_path, spec, PRESETS["cpu"], processes=1, overrides=Overrides(None, patch))
    assert not failed
    result = extend(task, tmp_path, tmp_path / "model", schedule=Schedule(steps=1, minutes=None), device="cpu")
    assert result.entry.stems == (() if "PET" in spec.input.modalities else ("PET",))
    report = predict_folder(task / "imagesTr", tmp_path / "out", tmp_path / "model", device="cpu", precision="fp32")
    assert report.exit_code == 0
    (task / "imagesTr").joinpath(f"{report.cases[0].case_id}_0001.nii.gz").unlink()
    assert predict_folder(task / "imagesTr", tmp_path / "out", tmp_path / "model", device="cpu").exit_code == 0
    assert verify(tmp_path / "model").ok


def test_modalities_are_fused_by_a_sum_at_the_projection(foundation):
    native_bczyx = native(foundation.spec, 2, 1, 2, batch=2)
    added = torch.randn_like(foundation.project(native_bczyx))
    both = foundation.stages(foundation.project(native_bczyx) + added)
    fused = foundation(native_bczyx, None, added)
    assert all(torch.equal(a, b) for a, b in zip(both, fused, strict=True))
    alone = foundation(None, None, added)
    second_without = foundation(native_bczyx, torch.tensor([1.0, 0.0]), added)
    assert torch.allclose(second_without[-1][1], alone[-1][1], atol=1e-5)
    assert torch.allclose(second_without[-1][0], fused[-1][0], atol=1e-5)


def test_frozen_means_no_gradient_and_no_running_statistics():
    network = freeze(nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2)))
    before = network[1].running_mean.clone()
    network(torch.randn(2, 1, 4, 4, 4) + 5)
    assert torch.equal(before, network[1].running_mean)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_unknown_family_lists_what_there_is():
    spec = dataclasses.replace(SPECS["residual_encoder, default"], architecture="resnext")
    with pytest.raises(UniconError, match="Unknown foundation architecture 'resnext'.*residual_encoder"):
        build_foundation(spec)


@pytest.mark.parametrize(
    "change",
    [
        {"strides": None},
        {"strides": [[1, 1, 1]]},
        {"features_per_stage": [4, -8, 8, 8, 8]},
        {"features_per_stage": ["a"] * 5},
        {"features_per_stage": []},
        {"blocks_per_stage": [0] * 5},
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_a_checkpoint_error(change):
    default = SPECS["residual_encoder, default"]
    spec = dataclasses.replace(default, arch_kwargs={**default.arch_kwargs, **change})
    with pytest.raises(CheckpointError, match=r"foundation\.json: residual_encoder cannot be built"):
        build_foundation(spec)
    spec = dataclasses.replace(default, arch_kwargs={"features_per_stage": [4, 8]})
    with pytest.raises(CheckpointError, match=r"foundation\.json: residual_encoder cannot be built"):
        build_foundation(spec)


def test_the_embedded_foundation_declares_what_the_code_would():
    embedded = ModelFolder(EMBEDDED).spec()
    fresh = new_residual_encoder_spec(embedded.licence, embedded.provenance)
    assert dataclasses.replace(embedded, encoder_macs_per_voxel=0.0) == dataclasses.replace(
        fresh, encoder_macs_per_voxel=0.0
    )
    assert embedded.encoder_macs_per_voxel == pytest.approx(fresh.encoder_macs_per_voxel)
