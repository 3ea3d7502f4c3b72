"""Primus: the library's own network as the oracle."""

import dataclasses

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from torch.nn import functional

import unicon_pipeline.families.primus  # noqa: F401 - registers the network
from unicon_pipeline.contract import FoundationSpec, InputContract, IntensityRule
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.families import build_foundation
from unicon_pipeline.foundation import declare, freeze

PATCH, GRID = (4, 4, 4), (2, 3, 4)
KWARGS = {
    "embed_dim": 24,
    "depth": 4,
    "heads": 2,
    "patch_embed_size": list(PATCH),
    "pretraining_grid_zyx": list(GRID),
    "hidden_layers": [1, 2, 4],
    "init_values": 0.1,
    "scale_attn_inner": True,
}


def tiny_spec(modalities=("CT",), **changed) -> FoundationSpec:
    rules = {name: IntensityRule("zscore", "none") for name in modalities}
    contract = InputContract(modalities, None, None, None, PATCH, rules)
    return declare("primus", {**KWARGS, **changed}, contract, "tokens", "none", {})


def upstream(grid=GRID, channels=1, **changed) -> Primus:
    """The library's network for input of `grid` patches; no parameter is left at 0 or 1."""
    arguments = {"init_values": 0.1, "scale_attn_inner": True} | changed
    shape = tuple(n * m for n, m in zip(grid, PATCH))
    torch.manual_seed(3)
    network = Primus(channels, 24, PATCH, 2, 4, 2, input_shape=shape, **arguments)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return freeze(network)


def encoder_state(network):
    return {name: t for name, t in network.state_dict().items() if name.startswith(("eva.", "down_projection."))}


def loaded(spec, network):
    foundation = freeze(build_foundation(spec))
    foundation.load_state_dict(encoder_state(network))
    return foundation


def image(grid, channels=1):
    shape = (2, channels, *(n * m for n, m in zip(grid, PATCH)))
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def encoded(network, native):
    """What the library's network hands on to its decoder."""
    handed_on = []
    hook = network.up_projection.register_forward_pre_hook(lambda _, inputs: handed_on.append(inputs[0]))
    network(native)
    hook.remove()
    return handed_on[0]


@pytest.mark.parametrize("changed", [{}, {"init_values": None, "scale_attn_inner": False}])
def test_last_map_is_what_the_library_decodes(changed):
    network, native = upstream(**changed), image(GRID)
    maps = loaded(tiny_spec(**changed), network)(native, None, None)
    torch.testing.assert_close(maps[-1], encoded(network, native), atol=1e-5, rtol=1e-5)


def test_earlier_maps_are_the_outputs_of_the_named_blocks():
    network, native = upstream(), image(GRID)
    outputs = {}
    for number in (1, 2):
        network.eva.blocks[number - 1].register_forward_hook(lambda _, __, out, n=number: outputs.update({n: out}))
    network(native)
    maps = loaded(tiny_spec(), network)(native, None, None)
    assert [level.shape for level in maps] == [(2, 24, *GRID)] * 3
    for number, level in zip((1, 2), maps):
        torch.testing.assert_close(level.flatten(2).transpose(1, 2), outputs[number], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", [(1, 3, 4), (4, 2, 3), (5, 5, 5)])
def test_other_grids_as_the_library_adapts_to_another_patch(grid):
    """nnU-Net builds Primus for the new patch, and resizes the learned embedding trilinearly."""
    trained, adapted = upstream(), upstream(grid)
    state = encoder_state(trained)
    map_bczyx = state["eva.pos_embed"].transpose(1, 2).reshape(1, 24, *GRID)
    resized = functional.interpolate(map_bczyx, grid, mode="trilinear", align_corners=False)
    state["eva.pos_embed"] = resized.flatten(2).transpose(1, 2)
    adapted.load_state_dict(state, strict=False)
    native = image(grid)
    maps = loaded(tiny_spec(), trained)(native, None, None)
    torch.testing.assert_close(maps[-1], encoded(adapted, native), atol=1e-5, rtol=1e-5)


def test_learned_positions_are_untouched_on_the_pretraining_grid():
    foundation = loaded(tiny_spec(), upstream())
    assert foundation._learned_positions(torch.Size(GRID)) is foundation.eva.pos_embed


def test_tokens_counted_in_another_order():
    """The same transformer, fed by hand with tokens in the order y, z, x."""
    network, native = upstream(grid=(3, 2, 4)), image(GRID)
    tokens, _ = network.eva(network.down_projection(native).transpose(2, 3).flatten(2).transpose(1, 2))
    expected = tokens.transpose(1, 2).reshape(2, 24, 3, 2, 4).transpose(2, 3)
    maps = loaded(tiny_spec(token_axes=[1, 0, 2]), network)(native, None, None)
    torch.testing.assert_close(maps[-1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_any_order_of_tokens_gives_maps_in_the_order_of_the_image(order):
    """Without positions a transformer does not care in which order its tokens come."""
    foundations = [loaded(tiny_spec(token_axes=list(axes)), upstream()) for axes in ((0, 1, 2), order)]
    for foundation in foundations:
        foundation.eva.pos_embed.zero_()
        foundation._rotary_positions = lambda grid, device: None
    expected, found = (foundation(image((2, 2, 3)), None, None)[-1] for foundation in foundations)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_fusion_is_linear_in_the_channels():
    foundation, both = loaded(tiny_spec(("CT", "PET")), upstream(channels=2)), image(GRID, channels=2)
    nothing = foundation.project(torch.zeros_like(both))
    ct = foundation.project(both * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1, 1))
    pet = foundation.project(both * torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1))
    torch.testing.assert_close(foundation.project(both), ct + pet - nothing, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", [GRID, (3, 3, 2)])
def test_bfloat16_autocast(grid):
    foundation, native = loaded(tiny_spec(), upstream()), image(grid)
    exact = foundation(native, None, None)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = foundation(native, None, None)
    for level, expected in zip(rounded, exact):
        torch.testing.assert_close(level.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"depth": 10**9}, "sizes"),
        ({"embed_dim": 0}, "sizes"),
        ({"patch_embed_size": [10**9, 4, 4]}, "patches to 64"),
        ({"embed_dim": 30}, "multiple of 6 x heads"),
        ({"pretraining_grid_zyx": [10**5] * 3}, "tokens"),
        ({"hidden_layers": [2, 1, 4]}, "hidden_layers"),
        ({"hidden_layers": [1, 2]}, "hidden_layers"),
        ({"hidden_layers": []}, "hidden_layers"),
        ({"token_axes": [0, 0, 2]}, "token_axes"),
        ({"depth": "4"}, "depth: expected int"),
        ({"patch_embed_size": [4, 4]}, "patch_embed_size"),
        ({"block_fn": "os.system"}, "unknown field block_fn"),
    ],
)
def test_impossible_arguments_are_refused(changed, message):
    spec = dataclasses.replace(tiny_spec(), arch_kwargs={**KWARGS, **changed})
    with pytest.raises(CheckpointError, match=message):
        build_foundation(spec)
