"""Contract of every registered foundation: what it declares is what it does."""

import dataclasses

import pytest
import torch
from torch import nn

from unicon_pipeline.errors import CheckpointError, UniconError
from unicon_pipeline.foundation import FOUNDATIONS, build_foundation, freeze, new_residual_encoder_spec
from unicon_pipeline.model_folder import EMBEDDED, ModelFolder

SPECS = {"residual_encoder": new_residual_encoder_spec("none", {})}


@pytest.fixture(scope="module", params=sorted(SPECS))
def foundation(request):
    torch.manual_seed(0)
    return freeze(build_foundation(SPECS[request.param]))


def test_every_family_is_under_contract():
    assert set(FOUNDATIONS) == set(SPECS)


@pytest.mark.parametrize("multiples", [(1, 1, 2), (2, 1, 3), (1, 3, 2)])
def test_declared_pyramid_is_the_real_one(foundation, multiples):
    spec = foundation.spec
    shape = tuple(m * d for m, d in zip(multiples, spec.input.divisible_by_zyx, strict=True))
    native = torch.randn(1, len(spec.input.modalities), *shape)
    projected = foundation.project(native)
    stride = spec.projection.stride_zyx
    assert projected.shape == (1, spec.projection.channels, *(n // s for n, s in zip(shape, stride, strict=True)))
    levels = foundation(native, None, None)
    assert len(levels) == len(spec.pyramid)
    for level, declared in zip(levels, spec.pyramid, strict=True):
        size = tuple(n // s for n, s in zip(shape, declared.stride_zyx, strict=True))
        assert level.shape == (1, declared.channels, *size)
    assert spec.embedding_channels == spec.pyramid[-1].channels


def test_declared_cost_is_that_of_its_convolutions(foundation):
    spec, counted, maps = foundation.spec, [0], {}

    def count(module, inputs, output):
        counted[0] += output[0].numel() * module.weight[0].numel()
        maps.setdefault(tuple(output.shape[2:]), []).append(output.shape[1])

    hooks = [m.register_forward_hook(count) for m in foundation.modules() if isinstance(m, nn.Conv3d)]
    shape = tuple(4 * d for d in spec.input.divisible_by_zyx)
    foundation(torch.zeros(1, len(spec.input.modalities), *shape), None, None)
    for hook in hooks:
        hook.remove()
    voxels = torch.Size(shape).numel()
    assert spec.encoder_macs_per_voxel == pytest.approx(counted[0] / voxels, rel=1e-3)
    for level in spec.pyramid:
        kept = sum(maps[tuple(n // s for n, s in zip(shape, level.stride_zyx, strict=True))])
        assert level.conv_maps <= kept <= 1.5 * level.conv_maps  # 1x1x1 shortcuts are left out of the rule


def test_modalities_are_fused_by_a_sum_at_the_projection(foundation):
    shape = tuple(2 * d for d in foundation.spec.input.divisible_by_zyx)
    native = torch.randn(2, len(foundation.spec.input.modalities), *shape)
    added = torch.randn_like(foundation.project(native))
    both = foundation.stages(foundation.project(native) + added)
    fused = foundation(native, None, added)
    assert all(torch.equal(a, b) for a, b in zip(both, fused, strict=True))
    alone = foundation(None, None, added)
    second_without = foundation(native, torch.tensor([1.0, 0.0]), added)
    assert torch.allclose(second_without[-1][1], alone[-1][1], atol=1e-5)
    assert torch.allclose(second_without[-1][0], fused[-1][0], atol=1e-5)


def test_frozen_means_no_gradient_and_no_running_statistics():
    network = freeze(nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2)))
    before = network[1].running_mean.clone()
    network(torch.randn(2, 1, 4, 4, 4) + 5)
    assert torch.equal(before, network[1].running_mean)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_unknown_family_lists_what_there_is():
    spec = dataclasses.replace(SPECS["residual_encoder"], architecture="resnext")
    with pytest.raises(UniconError, match="Unknown foundation architecture 'resnext'.*residual_encoder"):
        build_foundation(spec)


def test_arguments_that_do_not_fit_are_a_checkpoint_error():
    spec = dataclasses.replace(SPECS["residual_encoder"], arch_kwargs={"features_per_stage": [4, 8]})
    with pytest.raises(CheckpointError, match=r"foundation\.json: residual_encoder cannot be built"):
        build_foundation(spec)


def test_the_embedded_foundation_declares_what_the_code_would():
    embedded = ModelFolder(EMBEDDED).spec()
    fresh = new_residual_encoder_spec(embedded.licence, embedded.provenance)
    assert dataclasses.replace(embedded, encoder_macs_per_voxel=0.0) == dataclasses.replace(
        fresh, encoder_macs_per_voxel=0.0
    )
    assert embedded.encoder_macs_per_voxel == pytest.approx(fresh.encoder_macs_per_voxel)
