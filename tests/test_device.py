"""Device and precision choices, and the one convolution that bfloat16 gets wrong."""

import pytest
import torch
from torch import nn

from unicon_pipeline.device import autocast, choose_device, choose_precision, machine_facts
from unicon_pipeline.errors import UniconError

CPU = torch.device("cpu")


def test_choices():
    assert choose_device("cpu") == CPU
    assert choose_precision("fp32", CPU) is torch.float32
    assert choose_precision("auto", CPU) in (torch.float32, torch.bfloat16)
    with pytest.raises(UniconError, match="fp16 needs a CUDA device"):
        choose_precision("fp16", CPU)
    with pytest.raises(UniconError, match="--precision int8: choose one of auto, fp32, bf16, fp16"):
        choose_precision("int8", CPU)
    with pytest.raises(UniconError, match="--device tpu: choose one of auto, cpu, cuda"):
        choose_device("tpu")


@pytest.mark.parametrize("available", [True, False])
def test_cuda_is_taken_where_there_is_one_and_never_pretended(monkeypatch, available):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if available else "cpu")
    if available:
        assert choose_device("cuda").type == "cuda"
    else:
        with pytest.raises(UniconError, match="no CUDA device"):
            choose_device("cuda")


@pytest.mark.parametrize("native", [True, False])
def test_auto_never_takes_an_emulated_precision(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    monkeypatch.setattr("unicon_pipeline.device.cpu_computes_bfloat16", lambda: native)
    assert choose_precision("auto", torch.device("cuda")) is (torch.bfloat16 if native else torch.float16)
    assert choose_precision("auto", CPU) is (torch.bfloat16 if native else torch.float32)


def test_machine_facts_are_json():
    facts = machine_facts(CPU)
    assert facts["torch"] == torch.__version__ and all(isinstance(v, str | int | bool) for v in facts.values())


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_weight_gradients_in_bfloat16_are_those_of_float32(depth):
    torch.manual_seed(0)
    convolution = nn.Conv3d(16, 16, 3, padding=1)
    for _ in range(4):
        x = torch.randn(2, 16, depth, 6, 6)
        torch.full((300_007,), 1e30)  # what a wrong gradient would pick up from freed memory
        with autocast(CPU, torch.bfloat16):
            output = convolution(x)
        assert output.dtype is torch.bfloat16
        seed = torch.randn_like(output)
        (low,) = torch.autograd.grad(output, convolution.weight, seed)
        (exact,) = torch.autograd.grad(convolution(x), convolution.weight, seed.float())
        assert (low - exact).abs().max() < 0.02 * exact.abs().max()


def test_float32_is_left_alone():
    convolution = nn.Conv3d(1, 1, 3, padding=1)
    x = torch.randn(1, 1, 2, 4, 4)
    with autocast(CPU, torch.float32):
        assert torch.equal(convolution(x), convolution(x)) and convolution(x).dtype is torch.float32
