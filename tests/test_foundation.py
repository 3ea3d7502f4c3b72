"""Contract of every registered foundation: what it declares is what it does."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from unicon_pipeline.errors import CheckpointError, UniconError
from unicon_pipeline.foundation import FOUNDATIONS, build_foundation, freeze, new_residual_encoder_spec
from unicon_pipeline.model_folder import EMBEDDED, ModelFolder

STRIDES = {
    "isotropic": ((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    "anisotropic": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    "half in plane": ((1, 2, 2), (2, 2, 2), (1, 2, 2)),
    "coarse": ((2, 4, 4), (2, 2, 2), (1, 1, 1)),
}
SPECS = {
    f"residual_encoder, {name}": new_residual_encoder_spec("none", {}, (4, 6, 8), strides)
    for name, strides in STRIDES.items()
} | {"residual_encoder, default": new_residual_encoder_spec("none", {})}


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
    assert set(FOUNDATIONS) == {spec.architecture for spec in SPECS.values()}


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
    spec, image, macs, calls = foundation.spec, native(foundation.spec, 2, 1, 3), [0], []

    def count(module, inputs, output):
        macs[0] += output[0].numel() * module.weight[0].numel()
        if math.prod(module.kernel_size) > 1:
            calls.append((extent(image.shape[2:], output.shape[2:]), output.shape[1]))

    def maps():
        kept = {}
        for stride, channels in calls:
            kept[stride] = kept.get(stride, 0) + channels
        return kept

    hooks = [m.register_forward_hook(count) for m in foundation.modules() if isinstance(m, nn.Conv3d)]
    try:
        projected = foundation.project(image)
        assert maps() == {spec.projection.stride_zyx: spec.projection.conv_maps}
        foundation.stages(projected)
    finally:
        for hook in hooks:
            hook.remove()
    assert spec.encoder_macs_per_voxel == pytest.approx(macs[0] / image[0, 0].numel(), rel=1e-9)
    by_level = {}
    for level in spec.pyramid:
        by_level[level.stride_zyx] = by_level.get(level.stride_zyx, 0) + level.conv_maps
    by_level.setdefault(spec.projection.stride_zyx, spec.projection.conv_maps)
    assert by_level == maps()


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
