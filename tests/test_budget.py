"""What a patch costs and what a machine affords, held against the real networks."""

import math

import pytest
import torch
from tiny_foundations import strided_spec, tokens_spec
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from unicon_pipeline.budget import PRESETS, Costs, training_costs
from unicon_pipeline.contract import CT_HU_RULE, FeatureLevel, FoundationSpec, InputContract
from unicon_pipeline.extension_plan import ExtensionPlan, HeadPlan, Schedule, StemPlan
from unicon_pipeline.families import build_foundation
from unicon_pipeline.families.dna_encoders import new_residual_encoder_spec
from unicon_pipeline.levels import new_stem_levels
from unicon_pipeline.model import build_task_model

EMBEDDED = new_residual_encoder_spec("none", {})
STRIDED = strided_spec((64, 256, 512, 1024), ((1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)))
TOKENS = tokens_spec((8, 8, 8), width=192, layers=8)
ODD_TOKENS = tokens_spec((10, 20, 20), width=512, layers=4)
CASES = {
    "embedded": (EMBEDDED, ("CT",)),
    "embedded with PET": (EMBEDDED, ("CT", "PET")),
    "strided": (STRIDED, ("CT",)),
    "strided with PET and MR": (STRIDED, ("CT", "PET", "MR")),
    "tokens": (TOKENS, ("CT",)),
    "tokens with PET": (TOKENS, ("CT", "PET")),
    "odd tokens with PET": (ODD_TOKENS, ("CT", "PET")),
}


def costs(spec, modalities=("CT",), view="patch") -> Costs:
    return training_costs(spec, modalities, view, PRESETS["gpu8"])


def real_costs(spec, modalities, head):
    """Feature map elements and multiply-accumulates per input voxel, counted in the network itself."""
    levels = new_stem_levels(spec)
    kind = "patch_embedding" if spec.kind == "tokens" else "residual_stem"
    shapes = tuple(level.stride_zyx for level in levels), tuple(level.channels for level in levels)
    stems = tuple(StemPlan(name, kind, *shapes) for name in modalities if name != "CT")
    plan = ExtensionPlan("T", modalities, stems, (), None, head, Schedule(1, None), (), (), 0, ())
    shape = tuple(2 * divisor for divisor in spec.input.divisible_by_zyx)
    with torch.device("meta"):
        model = build_task_model(plan, build_foundation(spec), {})
        images = torch.empty(1, len(modalities), *shape)
    kept = []
    layers = {id(m): m for m in model.modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d | nn.Linear)}
    for layer in layers.values():
        if isinstance(layer, nn.Linear) or math.prod(layer.kernel_size) > 1:
            layer.register_forward_hook(lambda _, __, output: kept.append(output.numel()))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(images, torch.ones(1, len(modalities), dtype=torch.bool))
    return sum(kept) / math.prod(shape), counter.get_total_flops() / 2 / math.prod(shape)


@pytest.mark.parametrize("spec, modalities", CASES.values(), ids=CASES)
@pytest.mark.parametrize("view", ["patch", "volume"])
def test_the_estimate_is_near_the_real_network(spec, modalities, view):
    decoder = "unetr" if spec.kind == "tokens" else "unet"
    head = HeadPlan(decoder if view == "patch" else "pooled_linear", 2, {})
    elements, macs = real_costs(spec, modalities, head)
    found = costs(spec, modalities, view)
    factor = 1.5 if spec is EMBEDDED else 1.03
    assert elements / factor < found.elements < elements * factor
    assert macs / factor < found.macs < macs * factor


def test_a_stem_costs_time_but_on_a_cpu_no_smaller_patch():
    one, two = (training_costs(EMBEDDED, names, "patch", PRESETS["cpu"]) for names in (("CT",), ("CT", "PET")))
    assert two.macs > 1.4 * one.macs and two.elements > 1.4 * one.elements
    assert two.budget == one.budget


def test_a_costly_encoder_does_not_make_its_decoder_costly():
    # A ResNet-152 as large as this: doubling it would be 160 000.
    level = [FeatureLevel((2**z, 2**x, 2**x), c, 9 * c) for z, x, c in
             ((0, 1, 64), (1, 2, 256), (2, 3, 512), (3, 4, 1024), (4, 5, 2048))]  # fmt: skip
    contract = InputContract(("CT",), "ARS", None, None, (16, 32, 32), {"CT": CT_HU_RULE})
    spec = FoundationSpec("net", {}, contract, "pyramid", level[0], tuple(level), 2048, 8e4, "MIT")
    assert 8e4 < costs(spec, view="patch").macs - costs(spec, view="volume").macs < 1.1e5


def test_a_costly_foundation_keeps_a_useful_patch_on_a_cpu():
    level = FeatureLevel((1, 1, 1), 32, 4)
    contract = InputContract(("CT",), "LPS", None, None, (8, 8, 8), {"CT": CT_HU_RULE})
    spec = FoundationSpec("net", {}, contract, "pyramid", level, (level,), 320, 1e9, "MIT")
    assert training_costs(spec, ("CT",), "patch", PRESETS["cpu"]).budget == 32 * 64 * 64
