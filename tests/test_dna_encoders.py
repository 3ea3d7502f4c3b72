"""nnU-Net's encoders: every option of its `arch_kwargs` gives the network that the library itself builds."""

import dataclasses

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.residual import BottleneckD
from torch import nn

from unicon_pipeline.contract import InputContract, IntensityRule
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.families import build_foundation
from unicon_pipeline.families.dna_encoders import dna_encoder_kwargs, new_residual_encoder_spec, total_stride
from unicon_pipeline.foundation import declare, freeze
from unicon_pipeline.weights import canonical_state, load_exactly, take_state

CLASSES = {
    "torch.nn.modules.conv.Conv3d": nn.Conv3d,
    "torch.nn.modules.instancenorm.InstanceNorm3d": nn.InstanceNorm3d,
    "torch.nn.modules.batchnorm.BatchNorm3d": nn.BatchNorm3d,
    "torch.nn.modules.dropout.Dropout3d": nn.Dropout3d,
    "torch.nn.LeakyReLU": nn.LeakyReLU,
    "torch.nn.ReLU": nn.ReLU,
    "dynamic_network_architectures.building_blocks.residual.BottleneckD": BottleneckD,
}
PLAIN = {
    "n_stages": 3,
    "features_per_stage": [4, 6, 8],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "n_conv_per_stage": [2, 2, 1],
    "n_conv_per_stage_decoder": [1, 2],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
RESIDUAL = {key: value for key, value in PLAIN.items() if key != "n_conv_per_stage"} | {"n_blocks_per_stage": [1, 2, 1]}
BATCH_NORM = {"norm_op": "torch.nn.modules.batchnorm.BatchNorm3d", "norm_op_kwargs": {"eps": 1e-4, "momentum": 0.2}}
DROPOUT = {"dropout_op": "torch.nn.modules.dropout.Dropout3d", "dropout_op_kwargs": {"p": 0.5}}
BOTTLENECK = "dynamic_network_architectures.building_blocks.residual.BottleneckD"
NETWORKS = {
    "plain": (PlainConvUNet, PLAIN),
    "plain, batch norm": (PlainConvUNet, PLAIN | BATCH_NORM),
    "plain, dropout": (PlainConvUNet, PLAIN | DROPOUT),
    "plain, activation first": (PlainConvUNet, PLAIN | {"nonlin_first": True}),
    "plain, ReLU, no bias": (PlainConvUNet, PLAIN | {"nonlin": "torch.nn.ReLU", "conv_bias": False}),
    "plain, strided at once": (PlainConvUNet, PLAIN | {"strides": [[1, 2, 2], [1, 2, 2], [2, 1, 1]]}),
    "plain, one number for all": (PlainConvUNet, PLAIN | {"n_conv_per_stage": 2, "kernel_sizes": 3}),
    "residual": (ResidualEncoderUNet, RESIDUAL),
    "residual, own stem": (ResidualEncoderUNet, RESIDUAL | {"stem_channels": 5}),
    "residual, dropout, slope": (ResidualEncoderUNet, RESIDUAL | DROPOUT | {"nonlin_kwargs": {"negative_slope": 0.2}}),
    "bottleneck": (ResidualEncoderUNet, RESIDUAL | {"block": BOTTLENECK, "bottleneck_channels": [2, 3, 4]}),
}  # fmt: skip


def upstream(network_class, arguments):
    torch.manual_seed(0)
    built = {
        key: CLASSES[value] if isinstance(value, str) else value for key, value in arguments.items()
    }  # as nnU-Net resolves paths
    network = network_class(input_channels=2, num_classes=3, **built)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in network.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return freeze(network)


def ours(network_class, arguments):
    architecture, kwargs = dna_encoder_kwargs(f"somewhere.{network_class.__name__}", arguments)
    rules = dict.fromkeys(("CT", "PET"), IntensityRule("zscore", "none"))
    contract = InputContract(("CT", "PET"), None, None, None, total_stride(kwargs["strides"]), rules)
    return freeze(build_foundation(declare(architecture, kwargs, contract, "pyramid", "none", {})))


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_the_librarys(name):
    network, foundation = upstream(*NETWORKS[name]), ours(*NETWORKS[name])
    state = {key: tensor for key, tensor in network.state_dict().items() if key.startswith("encoder.")}
    weights, report = take_state(foundation, state, name)
    assert report["tensors"] == len(state)
    load_exactly(canonical_state(foundation), weights, name)
    image = torch.randn(1, 2, 4, 16, 12)
    with torch.no_grad():
        for mine, theirs in zip(foundation(image, None, None), network.encoder(image), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "network, change, complaint",
    [
        ("a.b.SwinUNETR", {}, "is a SwinUNETR"),
        ("PlainConvUNet", {"conv_op": "torch.nn.modules.conv.Conv2d"}, "2-D configuration"),
        ("PlainConvUNet", {"norm_op": "os.system"}, "norm_op is system; known are InstanceNorm3d"),
        ("PlainConvUNet", {"nonlin": "builtins.eval"}, "nonlin is eval"),
        ("PlainConvUNet", {"norm_op_kwargs": {"eps": "1"}}, "norm_op_kwargs"),
        ("PlainConvUNet", {"norm_op_kwargs": {"device": 3}}, "norm_op_kwargs"),
        ("PlainConvUNet", {"secret": 1}, "not known here: secret"),
        ("PlainConvUNet", {"strides": [[1, 1], [2, 2], [2, 2]]}, "three numbers"),
        ("ResidualEncoderUNet", {"pool_type": "avg"}, "not known here: n_conv_per_stage, pool_type"),
    ],
)
def test_what_is_not_known_is_refused(network, change, complaint):
    with pytest.raises(CheckpointError) as stop:
        dna_encoder_kwargs(network, PLAIN | change)
    assert complaint in str(stop.value)


@pytest.mark.parametrize(
    "change",
    [
        {"features_per_stage": [10**9] * 5},
        {"blocks_per_stage": [10**9] * 5},
        {"strides": [[1, 1, 1], *[[99, 99, 99]] * 4]},
        {"kernel_sizes": [[999] * 3] * 5},
    ],
    ids=str,
)
def test_a_declaration_larger_than_any_encoder_is_refused(change):
    spec = new_residual_encoder_spec("none", {})
    hostile = dataclasses.replace(spec, arch_kwargs={**spec.arch_kwargs, **change})
    with pytest.raises(CheckpointError, match="cannot be built"):
        build_foundation(hostile)
