"""MONAI's encoders against MONAI itself: each release's wrapper and keys, features, axes and intensities."""

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from monai.data import MetaTensor
from monai.networks.nets import SegResNet, SegResNetDS, SwinUNETR
from monai.networks.nets.segresnet_ds import SegResEncoder
from monai.networks.nets.swin_unetr import PatchMergingV2
from monai.networks.nets.vista3d import vista3d132
from monai.transforms import Orientation, ScaleIntensityRange
from torch import nn

from unicon_pipeline.checkpoint import read_checkpoint
from unicon_pipeline.contract import InputContract, IntensityRule
from unicon_pipeline.device import one_thread
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.families import build_foundation
from unicon_pipeline.families.monai_encoders import convert, recognises
from unicon_pipeline.foundation import declare, freeze
from unicon_pipeline.geometry import Grid, Volume, orient
from unicon_pipeline.imported import ImportOptions
from unicon_pipeline.intensity import normalise
from unicon_pipeline.weights import canonical_state, load_exactly

SMALL = {"init_filters": 4, "blocks_down": (1, 2, 1)}
SWIN_HEADS = [1, 2, 3, 4]  # the real ones are 3, 6, 12, 24


@pytest.fixture(autouse=True)
def _one_thread():
    # These operations are small; on a busy machine several threads would mostly wait for each other.
    with one_thread():
        yield


def tiny_spec():
    """A SegResEncoder of a few thousand weights."""
    return _declared("segres_encoder", {"init_filters": 4, "blocks_down": [1, 1, 1], "norm": "batch"}, 4)


def tiny_swin_spec():
    """A Swin transformer with convolutions before its stages, as small as its windows allow."""
    kwargs = {"feature_size": 12, "depths": [2, 1, 1, 1], "heads": SWIN_HEADS, "convolutions": True}
    return _declared("swin_unetr", kwargs, 32)


def _declared(architecture, arch_kwargs, divisor):
    rule = IntensityRule("piecewise", "HU", (-1000.0, 1000.0), (0.0, 1.0))
    contract = InputContract(("CT",), "SAR", None, None, (divisor,) * 3, {"CT": rule})
    return declare(architecture, arch_kwargs, contract, "pyramid", "Apache-2.0", {"family": architecture})


class MergingBefore15(PatchMergingV2):
    """Patch merging as in MONAI 0.9 to 1.4, with which all releases were trained."""

    def forward(self, x):
        x0 = x[:, 0::2, 0::2, 0::2, :]
        x1 = x[:, 1::2, 0::2, 0::2, :]
        x2 = x[:, 0::2, 1::2, 0::2, :]
        x3 = x[:, 0::2, 0::2, 1::2, :]
        x4 = x[:, 1::2, 0::2, 1::2, :]
        x7 = x[:, 1::2, 1::2, 1::2, :]
        return self.reduction(self.norm(torch.cat([x0, x1, x2, x3, x4, x2, x3, x7], -1)))


def _trained(network):
    """Weights and running statistics unlike the initial ones, so that an exchange of two shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif name.endswith(("running_mean", "bias", "relative_position_bias_table")):
                tensor.normal_(std=0.3)
            elif tensor.dim() == 1 and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return network.eval()


def _swin_unetr(use_v2=False, downsample=MergingBefore15):
    sizes = {"feature_size": 12, "depths": (2, 1, 1, 1), "num_heads": SWIN_HEADS}
    return _trained(SwinUNETR(1, 14, **sizes, use_v2=use_v2, downsample=downsample))


def _prefixed(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


def _saved(folder, payload):
    path = folder / "checkpoint.pt"
    torch.save(payload, path)
    return path


def _hugging_face_folder(folder, network, **config):
    safetensors.torch.save_file(network.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _imported(path, **options):
    checkpoint = read_checkpoint(path)
    assert recognises(checkpoint)
    return convert(checkpoint, ImportOptions(**options))


def _features(imported, image):
    foundation = freeze(build_foundation(imported.spec))
    load_exactly(canonical_state(foundation), imported.weights, "the imported weights")
    with torch.no_grad():
        return foundation(image, None, None)


def _assert_equal_features(imported, expected, image):
    pyramid = _features(imported, image)
    assert len(pyramid) == len(expected) == len(imported.spec.pyramid)
    for features, reference, level in zip(pyramid, expected, imported.spec.pyramid, strict=True):
        assert level.channels == features.shape[1]
        assert level.stride_zyx == tuple(n // m for n, m in zip(image.shape[2:], features.shape[2:]))
        torch.testing.assert_close(features, reference, atol=1e-5, rtol=0)


def _image(*shape):
    return torch.rand((1, 1, *shape), generator=torch.Generator().manual_seed(1))


def _ct_fm_feature_extractor(folder):
    encoder = _trained(SegResEncoder(**SMALL))
    return _hugging_face_folder(folder, encoder, blocks_down=[1, 2, 1], act=["relu", {"inplace": True}]), encoder


def _ct_fm_segresnet(folder):
    network = _trained(SegResNetDS(**SMALL, dsdepth=2))
    return _hugging_face_folder(folder, network, norm="batch", dsdepth=2), network.encoder


def _ct_fm_lightning(folder):
    encoder = _trained(SegResEncoder(**SMALL))
    projector = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8)).state_dict()
    state = {**_prefixed("model.backbone.", encoder.state_dict()), **_prefixed("model.projection_head.", projector)}
    return _saved(folder, {"state_dict": state, "epoch": 449, "pytorch-lightning_version": "2.2"}), encoder


def _vista3d(folder):
    network = _trained(vista3d132(encoder_embed_dim=8))
    return _saved(folder, network.state_dict()), network.image_encoder.encoder


def _vista3d_research(folder):
    network = _trained(vista3d132(encoder_embed_dim=8))
    state = {key.replace(".mlp.linear", ".mlp.lin"): tensor for key, tensor in network.state_dict().items()}
    return _saved(folder, {"model": _prefixed("module.", state), "epoch": 3}), network.image_encoder.encoder


def _suprem_segresnet(folder):
    network = _trained(SegResNet(init_filters=8, blocks_down=(1, 2, 1), blocks_up=(1, 1), out_channels=25))
    state = _prefixed("module.", network.state_dict())
    return _saved(folder, {"net": state, "optimizer": {}, "epoch": 800}), lambda image: network.encode(image)[1]


@pytest.mark.parametrize(
    ("write", "source", "licence", "norm", "left_out"),
    [
        (_ct_fm_feature_extractor, "CT-FM", "Apache-2.0", "batch", set()),
        (_ct_fm_segresnet, "CT-FM", "Apache-2.0", "batch", {"up_layers"}),
        (_ct_fm_lightning, "CT-FM", "Apache-2.0", "batch", {"model.projection_head"}),
        (_vista3d, "VISTA3D", "NVIDIA Open", "instance", {"class_head", "image_encoder.up_layers", "point_head"}),
        (_vista3d_research, "VISTA3D", "NVIDIA Open", "instance", {"image_encoder.up_layers_auto"}),
        (_suprem_segresnet, "SuPreM", "CC-BY-NC-ND", "group", {"conv_final", "up_layers", "up_samples"}),
    ],
)
def test_segresnet_features_equal_monai(tmp_path, write, source, licence, norm, left_out):
    path, encode = write(tmp_path)
    imported = _imported(path)
    assert imported.spec.arch_kwargs["norm"] == norm
    assert imported.spec.provenance["source"].startswith(source)
    assert imported.spec.licence.startswith(licence)
    assert left_out <= set(imported.spec.load_report["left_out"])
    divisor = imported.spec.input.divisible_by_zyx[0]
    image = _image(divisor, 2 * divisor, divisor)
    with torch.no_grad():
        _assert_equal_features(imported, encode(image), image)


def _suprem_swin(folder):
    network = _swin_unetr()
    state = {**_prefixed("module.backbone.", network.state_dict()), "module.organ_embedding": torch.ones(25, 512)}
    return _saved(folder, {"net": state, "optimizer": {}, "scheduler": {}, "epoch": 1}), network


def _suprem_backbone(folder):
    network = _swin_unetr()
    return _saved(folder, {"net": network.state_dict()}), network


def _voco_bare(folder):
    network = _swin_unetr(use_v2=True)
    return _saved(folder, network.state_dict()), network


def _voco_training(folder):
    network = _swin_unetr(use_v2=True)
    student = _prefixed("student.", nn.Linear(3, 3).state_dict())
    state = _prefixed("module.", {**_prefixed("backbone.", network.state_dict()), **student})
    return _saved(folder, {"state_dict": state, "epoch": 1}), network


def _voco_network_weights(folder):
    network = _swin_unetr(use_v2=True)
    return _saved(folder, {"network_weights": _prefixed("module._orig_mod.", network.state_dict())}), network


def _nvidia_ssl(folder):
    network = _swin_unetr()
    state = {key.replace(".linear", ".fc"): tensor for key, tensor in network.swinViT.state_dict().items()}
    heads = {"norm.weight": torch.ones(96), "rotation_head.weight": torch.ones(4, 96)}
    return _saved(folder, {"state_dict": _prefixed("module.", {**state, **heads})}), network


def _nvidia_50k(folder):
    network = _swin_unetr()
    state = {f"encoder.{key}".replace(".0.", ".0.0.", 1): t for key, t in network.swinViT.state_dict().items()}
    state |= {"encoder.mask_token": torch.ones(1, 1, 12), "encoder.norm.weight": torch.ones(192)}
    state |= {"encoder1.layer.conv1.conv.weight": torch.ones(12, 1, 3, 3, 3), "out.conv.conv.bias": torch.ones(1)}
    return _saved(folder, {"model": state, "optimizer": {}, "epoch": 1}), network


def _nvidia_btcv(folder):
    network = _swin_unetr()
    return _saved(folder, {"epoch": 1, "best_acc": 0.8, "state_dict": network.state_dict()}), network


@pytest.mark.parametrize(
    ("write", "source", "licence", "spacing", "window", "left_out"),
    [
        (_suprem_swin, "SuPreM", "CC-BY-NC-ND-4.0", (1.5, 1.5, 1.5), (-175, 250), "backbone.encoder1"),
        (_suprem_backbone, "SuPreM", "CC-BY-NC-ND-4.0", (1.5, 1.5, 1.5), (-175, 250), "encoder10"),
        (_voco_bare, "VoCo", "Apache-2.0", (1.5, 1.5, 1.5), (-175, 250), "decoder5"),
        (_voco_training, "VoCo", "Apache-2.0", (1.5, 1.5, 1.5), (-175, 250), "student"),
        (_voco_network_weights, "VoCo", "Apache-2.0", (1.5, 1.5, 1.5), (-175, 250), "out"),
        (_nvidia_ssl, "Swin UNETR, pretrained", "not stated", None, (-1000, 1000), "rotation_head"),
        (_nvidia_50k, "Swin UNETR, pretrained", "not stated", None, (-1000, 1000), "encoder.mask_token"),
        (_nvidia_btcv, "Swin UNETR, trained", "not stated", (1.5, 1.5, 2.0), (-175, 250), "decoder1"),
    ],
)
def test_swin_features_equal_monai(tmp_path, write, source, licence, spacing, window, left_out):
    path, network = write(tmp_path)
    imported = _imported(path)
    contract = imported.spec.input
    assert imported.spec.provenance["source"].startswith(source)
    assert (imported.spec.licence, contract.spacing_zyx_mm) == (licence, spacing)
    assert contract.intensity["CT"].knots_in == window
    assert left_out in imported.spec.load_report["left_out"]
    assert imported.spec.load_report["tensors"] == len(network.swinViT.state_dict())
    image = _image(32, 32, 64)  # 16 and 32 at the first stage: no multiples of the window of 7
    with torch.no_grad():
        _assert_equal_features(imported, network.swinViT(image, normalize=True), image)


def test_the_patch_merging_of_later_monai_would_give_other_features(tmp_path):
    path, network = _suprem_backbone(tmp_path)
    later = _swin_unetr(downsample="merging")
    later.load_state_dict(network.state_dict())
    image = _image(32, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(_features(_imported(path), image)[1], later.swinViT(image)[1], atol=1e-2)


def test_swin_at_odd_multiples_of_its_coarsest_stride_and_in_bfloat16():
    foundation = freeze(build_foundation(tiny_swin_spec()))
    image = _image(96, 32, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        pyramid = foundation(image, None, None)
    shapes = [tuple(level.shape[2:]) for level in pyramid]
    assert shapes == [(48, 16, 32), (24, 8, 16), (12, 4, 8), (6, 2, 4), (3, 1, 2)]
    assert all(bool(level.isfinite().all()) for level in pyramid)


@pytest.mark.parametrize("spec", [tiny_spec(), tiny_swin_spec()], ids=["segres", "swin"])
def test_projection_is_linear_in_the_channels(spec):
    foundation = freeze(build_foundation(spec))
    first = _image(32, 32, 32)
    second = first.flip(2)
    both, one, other, none = (foundation.project(image) for image in (first + second, first, second, 0 * first))
    torch.testing.assert_close(both + none, one + other, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("write", "code"), [(_ct_fm_feature_extractor, "SPL"), (_vista3d, "RAS"), (_voco_bare, "RAS")])
def test_axes_and_intensities_equal_monai(tmp_path, write, code):
    """An asymmetric volume with oblique axes, through MONAI's transforms and through the input contract."""
    contract = _imported(write(tmp_path)[0]).spec.input
    array_zyx = np.random.default_rng(0).uniform(-1500, 2500, (4, 5, 6)).astype(np.float32)
    turned = np.array([[0.0, -0.98, 0.199], [0.0, 0.199, 0.98], [-1.0, 0.0, 0.0]])
    grid = Grid((4, 5, 6), (3.0, 0.8, 0.7), (1.0, -2.0, 3.0), tuple(turned.ravel()))
    ours = orient(Volume(array_zyx, grid), contract.orientation)
    low, high = {"SPL": (-1024, 2048), "RAS": contract.intensity["CT"].knots_in}[code]
    affine_ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine
    image = MetaTensor(torch.from_numpy(array_zyx.transpose(2, 1, 0).copy())[None], affine=affine_ras)
    labels = (("L", "R"), ("P", "A"), ("I", "S"))
    monai = ScaleIntensityRange(low, high, 0.0, 1.0, clip=True)(Orientation(code, labels=labels)(image))
    np.testing.assert_allclose(normalise(ours.array_zyx, contract.intensity["CT"]), monai[0].numpy(), atol=1e-6)


def test_options_override_what_is_known(tmp_path):
    spec = _imported(_voco_bare(tmp_path)[0], orientation="RAS", licence="mine", origin="there").spec
    assert (spec.input.orientation, spec.licence, spec.provenance["source"]) == ("RAS", "mine", "there")


def _without(state, ending):
    return {key: tensor for key, tensor in state.items() if not key.endswith(ending)}


def _refused(payload, folder, message):
    path = _saved(folder, payload)
    with pytest.raises(CheckpointError, match=message) as refusal:
        _imported(path)
    assert str(path) in str(refusal.value)


def test_incomplete_encoders_are_refused_by_key(tmp_path):
    plain, with_v2 = _swin_unetr().state_dict(), _swin_unetr(use_v2=True).state_dict()
    vista = _vista3d(tmp_path)[1].state_dict()
    _refused(_without(plain, "layers3.0.blocks.0.attn.proj.bias"), tmp_path, "missing.*layers3.0.blocks.0.attn.proj")
    _refused(_without(plain, "layers3.0.blocks.0.attn.relative_position_bias_table"), tmp_path, "layers1 to layers4")
    _refused(_without(with_v2, "layers2c.0.layer.conv2.conv.weight"), tmp_path, "missing.*layers2c.0.layer.conv2")
    _refused({**plain, "swinViT.layers4c.0.layer.conv1.conv.weight": torch.ones(1)}, tmp_path, "unknown.*layers4c")
    _refused({**plain, "swinViT.patch_embed.norm.weight": torch.ones(12)}, tmp_path, "unknown.*patch_embed.norm")
    vista = _prefixed("image_encoder.encoder.", vista)
    _refused(_without(vista, "layers.1.downsample.weight"), tmp_path, "missing.*layers.1.downsample")
    _refused({**vista, "image_encoder.encoder.layers.9.blocks.0.conv1.weight": torch.ones(1)}, tmp_path, "to 64, not 0")


def test_wrong_shapes_are_refused_by_key(tmp_path):
    state = _swin_unetr().state_dict()
    key = "swinViT.layers1.0.downsample.reduction.weight"
    _refused({**state, key: state[key][:-1]}, tmp_path, "shape.*layers1.0.downsample.reduction")
    state = SegResNetDS(init_filters=4, blocks_down=(1, 1), norm="batch", resolution=(1, 1, 5)).state_dict()
    _refused({"state_dict": state}, tmp_path, "shape.*conv_init")


def test_networks_of_unknown_contract_are_refused(tmp_path):
    _refused(SegResNet(init_filters=8).state_dict(), tmp_path, "not known which axes")
    _refused({"state_dict": SegResNetDS(**SMALL, norm="instance").state_dict()}, tmp_path, "not known which axes")
    other = {**_swin_unetr().state_dict(), "out.conv.conv.weight": torch.ones(2, 12, 1, 1, 1)}
    _refused({"state_dict": other}, tmp_path, "not known which axes")
    _refused({"state_dict": SegResNetDS(**SMALL, in_channels=4).state_dict()}, tmp_path, "takes 4 channels")
    state = SegResEncoder(**SMALL).state_dict()
    _refused(
        {"state_dict": _prefixed("student.", state) | _prefixed("teacher.", state)},
        tmp_path,
        "student.conv_init.weight, teacher.conv_init.weight",
    )


def test_config_that_contradicts_the_weights_is_refused(tmp_path):
    folder = _hugging_face_folder(tmp_path, SegResEncoder(**SMALL), norm=["instance", {"affine": True}])
    with pytest.raises(CheckpointError, match="config.json says norm 'instance'"):
        _imported(folder)


def test_suprem_unet_is_refused_with_the_reason(tmp_path):
    state = {"module.backbone.down_tr64.ops.0.bn1.weight": torch.ones(32)}
    _refused({"net": state}, tmp_path, "statistics of the batch at hand")


def test_other_families_are_not_recognised(tmp_path):
    for number, keys in enumerate((["encoder.stages.0.0.convs.0.conv.weight"], ["patch_embed.proj.weight"], [])):
        path = tmp_path / f"{number}.pt"
        torch.save({"state_dict": {key: torch.ones(1, 1, 1, 1, 1) for key in keys}}, path)
        assert not recognises(read_checkpoint(path))


@pytest.mark.parametrize(
    ("architecture", "arch_kwargs"),
    [
        ("segres_encoder", {"init_filters": 4.0, "blocks_down": [1], "norm": "batch"}),
        ("segres_encoder", {"init_filters": 4, "blocks_down": [1] * 7, "norm": "batch"}),
        ("segres_encoder", {"init_filters": 4, "blocks_down": [True], "norm": "batch"}),
        ("segres_encoder", {"init_filters": 4, "blocks_down": [1], "norm": "os.system"}),
        ("segres_encoder", {"init_filters": 4, "blocks_down": [1], "norm": "group"}),
        ("segres_encoder", {"init_filters": 4, "blocks_down": [1], "norm": "batch", "act": "relu"}),
        ("swin_unetr", {"feature_size": 12, "depths": [1] * 3, "heads": [3] * 3, "convolutions": True}),
        ("swin_unetr", {"feature_size": 10, "depths": [1] * 4, "heads": SWIN_HEADS, "convolutions": True}),
        ("swin_unetr", {"feature_size": 10**9, "depths": [1] * 4, "heads": SWIN_HEADS, "convolutions": True}),
    ],
)
def test_hostile_arguments_build_nothing(architecture, arch_kwargs):
    spec = tiny_spec()
    hostile = type(spec)(**{**vars(spec), "architecture": architecture, "arch_kwargs": arch_kwargs})
    with pytest.raises(CheckpointError, match="cannot be built"):
        build_foundation(hostile)


def test_without_monai_checkpoints_are_recognised_and_building_says_what_to_install(tmp_path):
    path = _ct_fm_lightning(tmp_path)[0]
    program = f"""
import sys
sys.modules["monai"] = None
from unicon_pipeline.checkpoint import read_checkpoint
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.families.monai_encoders import convert, recognises
from unicon_pipeline.imported import ImportOptions
checkpoint = read_checkpoint(__import__("pathlib").Path({str(path)!r}))
assert recognises(checkpoint)
try:
    convert(checkpoint, ImportOptions())
except CheckpointError as problem:
    sys.exit(0 if 'pip install "unicon-pipeline[monai]"' in str(problem) else str(problem))
"""
    subprocess.run([sys.executable, "-c", program], check=True)
