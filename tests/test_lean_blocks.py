"""Blocks that hold no map twice, against the library's blocks that they replace."""

import copy

import pytest
import torch
from dynamic_network_architectures.building_blocks.residual import BasicBlockD
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU, StackedConvBlocks
from torch import nn

from unicon_pipeline import lean_blocks
from unicon_pipeline.inference_form import inference_form
from unicon_pipeline.lean_blocks import InstanceNormChannelsLast, LeanBlock, Upsampled, channel_moments, decoder_step

CPU = torch.device("cpu")
NORM = (nn.InstanceNorm3d, {"eps": 1e-5, "affine": True})
LEAKY = (nn.LeakyReLU, {"inplace": True})


@pytest.fixture(autouse=True)
def _exact():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture(params=[(1, 0), (700, 0), (10_000_000, 20_480)], ids=["row by row", "a few rows", "whole"])
def pieces(request, monkeypatch):
    for name, value in zip(("_PIECE_VALUES", "_FEWEST_ONEDNN"), request.param):
        monkeypatch.setattr(lean_blocks, name, value)


def usual_block(kernel=(3, 3, 3), stride=(1, 1, 1), channels=(4, 6), norm=NORM, nonlin=LEAKY, **options):
    block = ConvDropoutNormReLU(nn.Conv3d, *channels, kernel, stride, True, *norm, None, None, *nonlin, **options)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    return block.eval()


def close(found, wanted, tolerance=1e-5):
    assert found.shape == wanted.shape
    assert (found.float() - wanted.float()).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (5, 3, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (3, 1, 2)], ids=str)
def test_a_lean_block_computes_what_the_librarys_does(pieces, kernel, stride):
    block, maps = usual_block(kernel, stride), torch.randn(2, 4, 11, 10, 9)
    close(LeanBlock(block)(maps.clone()), block(maps))


@pytest.mark.parametrize("nonlin", [LEAKY, (nn.ReLU, {"inplace": False}), (None, None)], ids=["leaky", "relu", "none"])
def test_any_usual_activation(pieces, nonlin):
    block, maps = usual_block(nonlin=nonlin), torch.randn(1, 4, 7, 6, 5)
    assert LeanBlock.can_replace(block)
    close(LeanBlock(block)(maps.clone()), block(maps))


@pytest.mark.parametrize("kernel", [(3, 3, 3), (5, 3, 3), (1, 3, 3)], ids=str)
def test_maps_in_a_list_are_overwritten_and_others_are_not(pieces, kernel):
    block, maps, other = usual_block(kernel, channels=(6, 4)), torch.randn(1, 4, 9, 6, 5), torch.randn(1, 2, 9, 6, 5)
    wanted, before = block(torch.cat((maps, other), dim=1)), other.clone()
    maps = maps.to(memory_format=torch.channels_last_3d)
    given = [maps, other]
    found = LeanBlock(block)(given)
    close(found, wanted)
    assert found.data_ptr() == maps.data_ptr() and torch.equal(other, before) and not given


def test_its_input_is_left_as_it_is(pieces):
    maps = torch.randn(1, 4, 7, 6, 5)
    before = maps.clone()
    LeanBlock(usual_block())(maps)
    assert torch.equal(maps, before)


@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 2, 2), (3, 1, 1)], ids=str)
def test_a_decoder_step_reads_its_maps_side_by_side(pieces, stride):
    up = nn.ConvTranspose3d(5, 3, stride, stride)
    block = StackedConvBlocks(2, nn.Conv3d, 4, 6, 3, 1, True, *NORM, None, None, *LEAKY).eval()
    running = torch.randn(2, 5, 4, 3, 3)
    skip = torch.randn(2, 1, *(n * s for n, s in zip(running.shape[2:], stride)))
    wanted, parts = decoder_step(up, block, running, [skip.clone()]), [skip]
    close(wanted, block(torch.cat((up(running), skip), dim=1)), 0)
    close(decoder_step(up, inference_form(block, CPU, torch.float32), running, parts), wanted)
    assert not parts


def test_a_transposed_convolution_whose_voxels_overlap_is_not_read_row_by_row():
    assert not Upsampled.is_possible(nn.ConvTranspose3d(5, 3, 4, 2, 1))
    assert Upsampled.is_possible(nn.ConvTranspose3d(5, 3, 2, 2))


@pytest.mark.parametrize(
    "block",
    [
        usual_block(nonlin_first=True),
        usual_block(norm=(nn.BatchNorm3d, {})),
        usual_block(norm=(nn.InstanceNorm3d, {"affine": False})),
        usual_block(norm=(nn.InstanceNorm3d, {"affine": True, "track_running_stats": True})),
        usual_block(nonlin=(nn.Softmax, {"dim": 1})),
        nn.Conv3d(1, 1, 3),
    ],
    ids=["activation first", "batch norm", "no weights", "running statistics", "softmax", "no block"],
)
def test_other_blocks_are_left_alone(block):
    assert not LeanBlock.can_replace(block)


def test_moments_keep_their_digits_where_the_mean_is_far_from_zero():
    maps = 100 + torch.randn(1, 3, 40, 64, 64)
    mean, variance = channel_moments(maps.to(memory_format=torch.channels_last_3d))
    exact = torch.var_mean(maps.double(), dim=(0, 2, 3, 4), correction=0)
    assert torch.allclose(variance.double(), exact[0], rtol=2e-5)
    assert torch.allclose(mean.double(), exact[1], rtol=1e-6)


def test_the_norm_alone_computes_what_torchs_does():
    norm, maps = nn.InstanceNorm3d(4, affine=True), 5 + torch.randn(2, 4, 7, 6, 5)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    close(InstanceNormChannelsLast(norm)(maps), norm(maps))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_the_form_of_a_network_computes_the_same(pieces, precision):
    network = nn.Sequential(
        BasicBlockD(nn.Conv3d, 2, 8, 3, 2, True, *NORM, None, None, *LEAKY),
        StackedConvBlocks(2, nn.Conv3d, 8, 8, 3, 1, True, *NORM, None, None, *LEAKY),
        nn.InstanceNorm3d(8, affine=True),
        nn.Conv3d(8, 3, 1),
    ).eval()
    maps = torch.randn(1, 2, 16, 12, 10)
    wanted, before = network(maps), copy.deepcopy(network.state_dict())
    form = inference_form(network, CPU, precision)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        close(form(maps), wanted, 1e-5 if precision is torch.float32 else 0.05)
    assert sum(isinstance(module, LeanBlock) for module in form.modules()) == 5  # one of them is a shortcut
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_networks_that_have_a_part_in_common_have_it_in_common_in_their_forms():
    part, shared = nn.Sequential(usual_block()), {}
    one, other = nn.Sequential(part, nn.Conv3d(6, 2, 1)), nn.Sequential(part, nn.Conv3d(6, 3, 1))
    forms = [inference_form(network, CPU, torch.float32, shared) for network in (one, other)]
    assert forms[0][0] is forms[1][0] and isinstance(forms[0][0][0], LeanBlock)
    assert forms[0][0] is not part


def test_memory_of_a_map_is_taken_again_only_when_no_view_of_it_is_left():
    maps = lean_blocks._Maps()
    first = maps.empty((1, 2, 3, 4, 5), torch.float32)
    place, view = first.data_ptr(), first[:, :, 1:]
    assert first.is_contiguous(memory_format=torch.channels_last_3d) and first.shape == (1, 2, 3, 4, 5)
    del first
    second = maps.empty((1, 2, 3, 4, 5), torch.float32)
    assert second.data_ptr() != place
    del view
    assert maps.empty((1, 4, 3, 4, 5), torch.bfloat16).data_ptr() == place
    assert maps.empty((1, 2, 1, 2, 2), torch.float32).data_ptr() not in (place, second.data_ptr())
