"""Adapters: every geometry against an explicit formula, the aliasing trap, and a base that is never touched."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from unicon_pipeline.adapters import ADAPTERS, LowRankAdapter, adapted_parameters
from unicon_pipeline.errors import PlanError
from unicon_pipeline.foundation import build_foundation, freeze, new_residual_encoder_spec


def opened(encoder, rank=3, alpha=6.0):
    """An adapter that changes something: `up` and the shifts are no longer zero."""
    torch.manual_seed(5)
    adapter = LowRankAdapter(encoder, rank, alpha).to(next(encoder.parameters()).dtype)
    with torch.no_grad():
        for parameter in (*adapter.up, *adapter.shift):
            parameter.normal_(std=0.1)
    return adapter


@pytest.fixture(scope="module")
def foundation():
    torch.manual_seed(0)
    return freeze(build_foundation(new_residual_encoder_spec("none", {})))


@pytest.fixture(scope="module")
def images():
    return torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kernel", [(1, 1, 1), (3, 3, 3), (1, 3, 3), (1, 1, 3)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": (1, 2, 2)},
        {"stride": 2, "padding": 1},
        {"dilation": (1, 2, 1), "padding": 2},
        {"groups": 2},
        {"groups": 4, "bias": False},
        {"padding": 1, "padding_mode": "replicate"},
        {"padding": 1, "padding_mode": "circular"},
    ],
    ids=str,
)
def test_every_convolution_geometry_equals_the_formula(kernel, options):
    torch.manual_seed(3)
    convolution = nn.Conv3d(4, 8, kernel, **options).double()
    adapter = opened(convolution)
    x = torch.randn(2, 4, 7, 8, 9, dtype=torch.float64)
    expected = copy.deepcopy(convolution)
    update = (6.0 / 3.0) * (adapter.up[0] @ adapter.down[0]).reshape(convolution.weight.shape)
    expected.weight = nn.Parameter(convolution.weight + update)
    torch.testing.assert_close(adapter(convolution, x), expected(x), atol=1e-9, rtol=0)
    torch.testing.assert_close(adapter.merged(convolution)(x), expected(x), atol=1e-9, rtol=0)
    assert not torch.allclose(expected(x), convolution(x))


def test_linear_equals_two_thin_products():
    linear = nn.Linear(6, 5).double()
    adapter = opened(linear)
    x = torch.randn(3, 6, dtype=torch.float64)
    thin = functional.linear(functional.linear(x, adapter.down[0]), adapter.up[0]) * 2.0
    torch.testing.assert_close(adapter(linear, x), linear(x) + thin, atol=1e-9, rtol=0)


def test_a_new_adapter_changes_nothing(foundation, images):
    adapter = LowRankAdapter(foundation, 4, 8.0)
    plain = foundation(images, None, None)
    assert all(torch.equal(a, b) for a, b in zip(plain, adapter(foundation, images, None, None), strict=True))


def test_the_base_is_bitwise_untouched_by_forward_backward_and_merge(foundation, images):
    """The aliases of dynamic-network-architectures make functional_call leave adapted weights behind by default."""
    before = {name: parameter.clone() for name, parameter in foundation.named_parameters(remove_duplicate=False)}
    plain = [level.clone() for level in foundation(images, None, None)]
    adapter = opened(foundation)
    for _ in range(2):
        sum(level.square().mean() for level in adapter(foundation, images, None, None)).backward()
    adapter.merged(foundation)
    after = dict(foundation.named_parameters(remove_duplicate=False))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in foundation.parameters())
    assert all(torch.equal(a, b) for a, b in zip(plain, foundation(images, None, None), strict=True))


def test_each_weight_is_adapted_once_and_each_adapter_matters(foundation, images):
    matrices, vectors = adapted_parameters(foundation)
    convolutions = {id(m) for m in foundation.modules() if isinstance(m, nn.Conv3d)}
    norms = {id(m) for m in foundation.modules() if isinstance(m, nn.InstanceNorm3d)}
    assert (len(matrices), len(vectors)) == (len(convolutions), 2 * len(norms))
    adapter = LowRankAdapter(foundation, 2, 2.0)
    plain = foundation(images, None, None)
    for index, name in enumerate(adapter.matrix_names):
        with torch.no_grad():
            adapter.up[index].fill_(0.3)
            changed = adapter(foundation, images, None, None)
            adapter.up[index].zero_()
        assert any(not torch.equal(a, b) for a, b in zip(plain, changed, strict=True)), name
    for index, name in enumerate(adapter.vector_names):
        with torch.no_grad():
            adapter.shift[index].fill_(0.3)
            changed = adapter(foundation, images, None, None)
            adapter.shift[index].zero_()
        assert any(not torch.equal(a, b) for a, b in zip(plain, changed, strict=True)), name


def test_each_adapter_parameter_gets_a_gradient(foundation, images):
    adapter = opened(foundation)
    sum(level.square().mean() for level in adapter(foundation, images, None, None)).backward()
    assert not [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_merged_equals_unmerged(foundation, images):
    adapter = opened(foundation)
    merged = adapter.merged(foundation)(images, None, None)
    assert all(torch.equal(a, b) for a, b in zip(adapter(foundation, images, None, None), merged, strict=True))


def test_tied_weights_get_one_update_in_both_places():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(torch.relu(self.one(x)))

    tied, x = Tied(), torch.randn(3, 4)
    adapter = opened(tied)
    assert len(adapter.up) == 1
    weight = tied.one.weight + 2.0 * adapter.up[0] @ adapter.down[0]
    torch.testing.assert_close(adapter(tied, x), torch.relu(x @ weight.T) @ weight.T)
    assert tied.two.weight is tied.one.weight


def test_an_encoder_without_anything_to_adapt_is_refused():
    with pytest.raises(PlanError, match="found no Linear or Conv weight"):
        LowRankAdapter(nn.Sequential(nn.ReLU()), 2, 2.0)


def test_registered():
    assert "low_rank" in list(ADAPTERS)
