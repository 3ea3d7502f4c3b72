"""Contract of every registered stem: declared maps are the real ones, the gate is shut at first and can open."""

import math

import pytest
import torch
from torch import nn

from unicon_pipeline.contract import FeatureLevel, filled_strides
from unicon_pipeline.stems import STEMS

PROJECTIONS = [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 4, 4)]
FEATURES = (4, 6, 8)
SHAPE = (4, 12, 8)


@pytest.fixture(params=[(kind, stride) for kind in sorted(STEMS) for stride in PROJECTIONS], ids=str)
def stem_and_projection(request):
    kind, stride = request.param
    strides = filled_strides([stride])
    if kind == "patch_embedding":
        strides = strides[:-1] or strides  # finer than the projection
    else:
        strides = tuple(sorted(set((strides + ((2, 4, 4), (4, 4, 4)))[: len(FEATURES)])))
    projection = FeatureLevel(stride, 5, 5)
    torch.manual_seed(0)
    return STEMS[kind](projection, strides, FEATURES[: len(strides)]), projection, strides


def image(batch=1):
    return torch.randn(batch, 1, *SHAPE, generator=torch.Generator().manual_seed(4))


def extent(size, stride):
    return tuple(n // s for n, s in zip(size, stride, strict=True))


def open_gate(stem):
    with torch.no_grad():
        stem.gate.normal_(generator=torch.Generator().manual_seed(1))


def test_declared_maps_are_the_real_ones(stem_and_projection):
    stem, projection, strides = stem_and_projection
    projected, maps = stem(image())
    assert projected.shape == (1, projection.channels, *extent(SHAPE, projection.stride_zyx))
    assert tuple(level.stride_zyx for level in stem.levels) == strides and strides[0] == (1, 1, 1)
    assert [m.shape for m in maps] == [(1, level.channels, *extent(SHAPE, level.stride_zyx)) for level in stem.levels]


def test_declared_conv_maps_are_those_of_its_convolutions(stem_and_projection):
    stem, kept = stem_and_projection[0], {}

    def count(module, inputs, output):
        stride = extent(SHAPE, output.shape[2:])
        if math.prod(module.kernel_size) > 1:
            kept[stride] = kept.get(stride, 0) + output.shape[1]

    for module in stem.encoder.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(count)
    stem(image())
    assert kept == {level.stride_zyx: level.conv_maps for level in stem.levels}


def test_every_stem_is_under_contract():
    assert set(STEMS) == {"residual_stem", "patch_embedding"}


def test_the_gate_is_shut_at_first_and_its_gradient_opens_it(stem_and_projection):
    stem = stem_and_projection[0]
    projected, _ = stem(image())
    assert not projected.any()
    (projected * torch.randn_like(projected)).sum().backward()
    assert stem.gate.grad.abs().min() > 0


def test_every_parameter_gets_a_gradient(stem_and_projection):
    stem = stem_and_projection[0]
    open_gate(stem)
    projected, maps = stem(image())
    sum((tensor * torch.randn_like(tensor)).sum() for tensor in (projected, *maps)).backward()
    assert not [name for name, p in stem.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_each_case_of_a_batch_is_read_alone(stem_and_projection):
    stem = stem_and_projection[0].double()
    open_gate(stem)
    batch = image(2).double()
    projected, maps = stem(batch)
    for row in range(2):
        alone, alone_maps = stem(batch[row : row + 1])
        for together, single in zip((projected, *maps), (alone, *alone_maps), strict=True):
            torch.testing.assert_close(together[row : row + 1], single, atol=1e-9, rtol=0)


def test_a_stem_is_more_than_one_convolution(stem_and_projection):
    assert sum(isinstance(module, nn.Conv3d) for module in stem_and_projection[0].modules()) > 3


def test_a_patch_embedding_gives_normalised_tokens_of_its_patch_alone():
    torch.manual_seed(0)
    stem = STEMS["patch_embedding"](FeatureLevel((2, 4, 4), 5, 5), ((1, 1, 1), (2, 2, 2)), (4, 6))
    open_gate(stem)
    (tokens, _), other = stem(image()), image()
    normalised = tokens / stem.gate.view(1, -1, 1, 1, 1)
    torch.testing.assert_close(normalised.mean(dim=1), torch.zeros(1, *extent(SHAPE, (2, 4, 4))), atol=1e-5, rtol=0)
    other[..., 2:4, 4:8, :4] *= 2.0
    changed = (stem(other)[0] != tokens).any(dim=1)[0]
    assert changed.nonzero().tolist() == [[1, 1, 0]]
