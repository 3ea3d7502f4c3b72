"""Adapters: every geometry against an explicit formula, the aliasing trap, and a base that is never touched."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from unicon_pipeline.adapters import ADAPTERS, adapted_parameters
from unicon_pipeline.errors import PlanError
from unicon_pipeline.families import build_foundation
from unicon_pipeline.families.dna_encoders import new_residual_encoder_spec
from unicon_pipeline.foundation import freeze

SPEC = new_residual_encoder_spec("none", {}, (4, 6, 8), ((1, 1, 1), (1, 2, 2), (2, 2, 2)))


def opened(encoder, kind="low_rank", rank=3, alpha=6.0):
    """An adapter that changes something: what starts at zero no longer is."""
    torch.manual_seed(5)
    adapter = ADAPTERS[kind](encoder, rank, alpha).to(next(encoder.parameters()).dtype)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.1)
    return adapter


@pytest.fixture(scope="module")
def foundation():
    torch.manual_seed(0)
    return freeze(build_foundation(SPEC))


@pytest.fixture(scope="module")
def images():
    return torch.randn(1, 1, 4, 8, 12, generator=torch.Generator().manual_seed(1))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def padded_convolution(x, convolution, weight):
    """Padding and convolution by their definition, without the module's own forward."""
    if convolution.padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(convolution.dilation, convolution.kernel_size, strict=True)]
    else:
        padding = convolution.padding
    mode = "constant" if convolution.padding_mode == "zeros" else convolution.padding_mode
    sides = [amount for amount in reversed(padding) for _ in range(2)]
    x = functional.pad(x, sides, mode=mode)
    return functional.conv3d(
        x, weight, convolution.bias, convolution.stride, 0, convolution.dilation, convolution.groups
    )


@pytest.mark.parametrize("kernel", [(1, 1, 1), (3, 3, 3), (1, 3, 3), (1, 1, 3)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": (1, 2, 2)},
        {"stride": 2, "padding": 1},
        {"dilation": (1, 2, 1), "padding": 2},
        {"dilation": 2, "padding": "same"},
        {"groups": 2},
        {"groups": 4, "bias": False},
        {"padding": 1, "padding_mode": "replicate"},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": (0, 1, 2), "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_every_convolution_geometry_equals_the_formula(kernel, options):
    torch.manual_seed(3)
    convolution = nn.Conv3d(4, 8, kernel, **options).double()
    adapter = opened(convolution)
    x = torch.randn(2, 4, 7, 8, 9, dtype=torch.float64)
    update = 2.0 * torch.einsum("or,ri->oi", adapter.up[0], adapter.down[0])
    weight = convolution.weight + update.reshape(8, 4 // convolution.groups, *kernel)
    expected = padded_convolution(x, convolution, weight)
    torch.testing.assert_close(adapter(convolution, x), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(adapter.merged(convolution)(x), expected, atol=1e-9, rtol=0)
    assert (expected - convolution(x)).abs().max() > 1e-3


@pytest.mark.parametrize("dimensions", [1, 2])
def test_flat_convolutions_too(dimensions):
    torch.manual_seed(3)
    convolution = (nn.Conv1d, nn.Conv2d)[dimensions - 1](4, 6, 3, padding=1).double()
    adapter = opened(convolution)
    x = torch.randn(2, 4, *(7, 8)[:dimensions], dtype=torch.float64)
    weight = convolution.weight + 2.0 * (adapter.up[0] @ adapter.down[0]).reshape(6, 4, *(3, 3)[:dimensions])
    expected = (functional.conv1d, functional.conv2d)[dimensions - 1](x, weight, convolution.bias, padding=1)
    torch.testing.assert_close(adapter(convolution, x), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("rank, alpha", [(1, 1.0), (2, 16.0), (100, 50.0)])
def test_the_update_has_the_rank_and_the_scale_that_were_asked_for(rank, alpha):
    linear = nn.Linear(6, 5).double()
    adapter = opened(linear, rank=rank, alpha=alpha)
    update = adapter.merged(linear).weight - linear.weight
    assert torch.linalg.matrix_rank(update) == min(rank, 5)
    torch.testing.assert_close(update, alpha / rank * adapter.up[0] @ adapter.down[0], atol=1e-9, rtol=0)


def test_norm_scales_and_shifts_move_freely():
    network = freeze(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))).double()
    adapter, x = opened(network), torch.randn(5, 4, dtype=torch.float64)
    scale, shift = adapter.shift
    y = x @ (network[0].weight + 2.0 * adapter.up[0] @ adapter.down[0]).T + network[0].bias
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(adapter(network, x), y * (1.0 + scale) + shift, atol=1e-9, rtol=0)


def test_linear_equals_two_thin_products():
    linear = nn.Linear(6, 5).double()
    adapter = opened(linear)
    x = torch.randn(3, 6, dtype=torch.float64)
    thin = functional.linear(functional.linear(x, adapter.down[0]), adapter.up[0]) * 2.0
    torch.testing.assert_close(adapter(linear, x), linear(x) + thin, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", sorted(ADAPTERS))
class TestEveryAdapter:
    def test_a_new_one_changes_nothing(self, kind, foundation, images):
        adapter = ADAPTERS[kind](foundation, 4, 8.0)
        assert same(foundation(images, None, None), adapter(foundation, images, None, None))
        assert same(foundation(images, None, None), adapter.merged(foundation)(images, None, None))

    def test_the_base_is_bitwise_untouched_by_forward_backward_and_merge(self, kind, foundation, images):
        """The aliases of dynamic-network-architectures make functional_call leave adapted weights behind by default."""
        objects = dict(foundation.named_parameters(remove_duplicate=False))
        before = {name: parameter.clone() for name, parameter in objects.items()}
        plain = [level.clone() for level in foundation(images, None, None)]
        adapter = opened(foundation, kind)
        optimizer = torch.optim.SGD(adapter.parameters(), 0.01)
        for _ in range(8):
            sum(level.square().mean() for level in adapter(foundation, images, None, None)).backward()
            optimizer.step()
            adapter.merged(foundation)(images, None, None)
        after = dict(foundation.named_parameters(remove_duplicate=False))
        assert list(before) == list(after)
        assert all(after[name] is objects[name] and torch.equal(before[name], after[name]) for name in before)
        assert not any(p.requires_grad or p.grad is not None for p in foundation.parameters())
        assert same(plain, foundation(images, None, None))

    def test_the_base_is_untouched_by_a_forward_pass_that_fails(self, kind, foundation, images):
        before = {name: parameter.clone() for name, parameter in foundation.named_parameters()}
        with pytest.raises(RuntimeError):
            opened(foundation, kind)(foundation, images[:, :, :, :3, :3], None, images)
        assert all(torch.equal(before[name], parameter) for name, parameter in foundation.named_parameters())
        assert all(isinstance(p, nn.Parameter) for p in foundation.parameters())

    def test_each_parameter_matters_and_learns(self, kind, foundation, images):
        adapter = opened(foundation, kind)
        levels = adapter(foundation, images, None, None)
        sum((level * torch.randn_like(level)).mean() for level in levels).backward()
        for name, parameter in adapter.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
            kept = parameter.detach().clone()
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter))
                assert not same(levels, adapter(foundation, images, None, None)), name
                parameter.copy_(kept)

    def test_merged_equals_unmerged_and_is_a_copy(self, kind, foundation, images):
        adapter = opened(foundation, kind)
        merged = adapter.merged(foundation)
        assert same(adapter(foundation, images, None, None), merged(images, None, None))
        assert not same(foundation(images, None, None), merged(images, None, None))
        own = {parameter.data_ptr() for parameter in foundation.parameters()}
        assert not own & {parameter.data_ptr() for parameter in merged.parameters()}

    def test_an_encoder_without_anything_to_adapt_is_refused(self, kind):
        with pytest.raises(PlanError, match="found no Linear or Conv weight"):
            ADAPTERS[kind](nn.Sequential(nn.ReLU()), 2, 2.0)

    @pytest.mark.parametrize("rank", [0, -1])
    def test_a_rank_below_one_is_refused(self, kind, rank):
        with pytest.raises(PlanError, match="rank of an adapter is at least 1"):
            ADAPTERS[kind](nn.Linear(2, 2), rank, 2.0)

    def test_running_statistics_stay_frozen(self, kind):
        network = freeze(nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2)))
        before = {name: buffer.clone() for name, buffer in network.named_buffers()}
        adapter = opened(network, kind).train()
        for _ in range(3):
            adapter(network, torch.randn(2, 1, 4, 4, 4) + 5).sum().backward()
        adapter.merged(network)(torch.randn(2, 1, 4, 4, 4) + 5)
        assert all(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())

    def test_in_mixed_precision_the_update_is_still_summed_in_float32(self, kind, foundation, images):
        adapter = opened(foundation, kind)
        with torch.autocast("cpu", torch.bfloat16):
            together = adapter(foundation, images, None, None)
            merged = adapter.merged(foundation)(images, None, None)
        assert same(together, merged)


def test_each_weight_is_adapted_once(foundation):
    matrices, vectors = adapted_parameters(foundation)
    convolutions = {id(m) for m in foundation.modules() if isinstance(m, nn.Conv3d)}
    norms = {id(m) for m in foundation.modules() if isinstance(m, nn.InstanceNorm3d)}
    assert (len(matrices), len(vectors)) == (len(convolutions), 2 * len(norms))
    adapted = {id(p) for p in (*matrices.values(), *vectors.values())}
    assert adapted == {id(p) for p in foundation.parameters()} - {
        id(m.bias) for m in foundation.modules() if isinstance(m, nn.Conv3d)
    }


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
    expected = torch.relu(x @ weight.T) @ weight.T
    for _ in range(2):
        torch.testing.assert_close(adapter(tied, x), expected)
    assert tied.two.weight is tied.one.weight
    merged = adapter.merged(tied)
    assert merged.two.weight is merged.one.weight
    torch.testing.assert_close(merged(x), expected)


def test_one_module_under_two_names_is_adapted_once():
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.again = nn.Sequential(self.layer)

        def forward(self, x):
            return self.again(x)

    aliased, x = Aliased(), torch.randn(2, 3)
    before = aliased.layer.weight.clone()
    adapter = opened(aliased)
    for _ in range(2):
        weight = before + 2.0 * adapter.up[0] @ adapter.down[0]
        torch.testing.assert_close(adapter(aliased, x), functional.linear(x, weight, aliased.layer.bias))
    assert torch.equal(aliased.layer.weight, before) and aliased.again[0] is aliased.layer


def test_one_weight_under_two_names_of_one_module_is_put_into_both():
    class Twice(nn.Linear):
        def __init__(self):
            super().__init__(3, 3, bias=False)
            self.same = self.weight

        def forward(self, x):
            return functional.linear(super().forward(x), self.same)

    twice, x = Twice(), torch.randn(2, 3)
    before = twice.weight.clone()
    adapter = opened(twice)
    weight = before + 2.0 * adapter.up[0] @ adapter.down[0]
    torch.testing.assert_close(adapter(twice, x), x @ weight.T @ weight.T)
    assert torch.equal(twice.weight, before) and twice.same is twice.weight


def test_every_adapter_is_under_contract():
    assert set(ADAPTERS) == {"low_rank"}
