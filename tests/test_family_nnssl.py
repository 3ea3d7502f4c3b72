"""nnssl checkpoints: networks of the library nnssl builds on, saved in the wrapper that nnssl writes."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from dynamic_network_architectures.architectures.primus import Primus, PrimusB, PrimusL, PrimusM, PrimusS
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.eva import Eva
from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchDecode, PatchEmbed
from einops import rearrange
from torch import nn

from unicon_pipeline.checkpoint import Checkpoint, read_checkpoint
from unicon_pipeline.contract import IntensityRule
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.families import build_foundation, nnssl
from unicon_pipeline.families.nnssl import convert, recognises
from unicon_pipeline.foundation import freeze
from unicon_pipeline.geometry import orient, read_image
from unicon_pipeline.imported import ImportOptions
from unicon_pipeline.intensity import normalise
from unicon_pipeline.weights import canonical_state, load_exactly

# What nnssl's DynamicArchitecturePlans.serialize writes.
DYNAMIC = {
    "n_stages": 3,
    "features_per_stage": [4, 6, 8],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "n_blocks_per_stage": [1, 2, 1],
    "n_conv_per_stage_decoder": [1, 1],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.modules.activation.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
CLASSES = {"conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU}
CNN_KEYS = {
    "key_to_encoder": "encoder.stages",
    "key_to_stem": "encoder.stem",
    "keys_to_in_proj": ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"),
    "key_to_lpe": None,
}
VIT_KEYS = {
    "key_to_encoder": "eva",
    "key_to_stem": "down_projection",
    "keys_to_in_proj": ("down_projection.proj",),
    "key_to_lpe": "eva.pos_embed",
}
SCALES = {"init_values": 0.1, "scale_attn_inner": True}
NO_SCALES = {"init_values": None, "scale_attn_inner": False}


class MaskedAutoencoder(nn.Module):
    """What nnssl pretrains a Primus in: its tokens are counted y, z, x. Without the masking."""

    def __init__(self, shape, width=24, depth=3, heads=2):
        super().__init__()
        common = {"ref_feat_shape": tuple(n // 8 for n in shape), **SCALES}
        self.down_projection = PatchEmbed((8, 8, 8), 1, width)
        self.eva = Eva(width, depth, heads, **common)
        self.up_projection = PatchDecode((8, 8, 8), width, 1)
        self.decoder = Eva(width, 1, heads, **common)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, native):
        patches = self.down_projection(native)
        z, y, x = patches.shape[2:]
        tokens, _ = self.eva(rearrange(patches, "b c z y x -> b (y z x) c"))
        return rearrange(tokens, "b (y z x) c -> b c z y x", z=z, y=y, x=x)


def randomised(network):
    """Frozen, with no parameter left at 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return freeze(network)


def unet(network_class=ResidualEncoderUNet, **arguments):
    return randomised(network_class(input_channels=1, num_classes=1, **{**(arguments or DYNAMIC), **CLASSES}))


def adaptation_plan(name, arch_kwargs=None, keys=CNN_KEYS, patch=(16, 16, 16), **changed):
    """As AdaptationPlan.serialize gives it; `changed` goes to the configuration or the pretraining plan."""
    configuration = {
        "data_identifier": "nnsslPlans_onemmiso",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": "onemmiso",
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_mask": "resample_data_or_seg_to_shape",
        "resampling_fn_mask_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        "spacing": [1, 1, 1],
        "patch_size": patch,
    }
    pretraining = {
        "dataset_name": "Dataset745_OpenMind",
        "plans_name": "nnsslPlans",
        "original_median_spacing_after_transp": [1, 1, 1],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
    }
    for key, value in changed.items():
        (configuration if key in configuration else pretraining)[key] = value
    return {
        "architecture_plans": {
            "arch_class_name": name,
            "arch_kwargs": arch_kwargs,
            "arch_kwargs_requiring_import": None if arch_kwargs is None else ["conv_op", "norm_op", "nonlin"],
        },
        "pretrain_plan": {**pretraining, "configurations": {"onemmiso": configuration}},
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": (160, 160, 160),
        **keys,
    }


def mae_kwargs(shape, width=24, depth=3, heads=2):
    """What nnFoundation's trainer writes for its transformer."""
    return {
        "input_channels": 1,
        "embed_dim": width,
        "patch_embed_size": (8, 8, 8),
        "output_channels": 1,
        "input_shape": shape,
        "encoder_eva_depth": depth,
        "encoder_eva_numheads": heads,
        "decoder_eva_depth": 1,
        "decoder_eva_numheads": heads,
        "patch_drop_rate": 0.8,
        "drop_path_rate": 0.2,
        "attn_drop_rate": 0,
        "init_values": 0.1,
        "scale_attn_inner": True,
    }


def saved(folder: Path, state, plan, **payload) -> Checkpoint:
    """Written as a released checkpoint, and read."""
    path = folder / "checkpoint_final.pth"
    contents = {"network_weights": state, "trainer_name": "BaseMAETrainer_BS8", "init_args": {"fold": "all"}}
    torch.save({**contents, "nnssl_adaptation_plan": plan, **payload}, path)
    return read_checkpoint(path)


def weightless(network, plan) -> Checkpoint:
    """A checkpoint of a network on the meta device, whose tensors take no memory."""
    state = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in network.state_dict().items()}
    return Checkpoint(Path("a.pth"), {"network_weights": state, "nnssl_adaptation_plan": plan}, "0" * 64)


@pytest.fixture
def shapes_alone(monkeypatch):
    """Names and shapes of weights are compared, their values (of millions) not looked at."""

    def same_shapes(module, found, source):
        assert {name: t.shape for name, t in found.items()} == {n: t.shape for n, t in module.state_dict().items()}
        return {}, {"parameters": sum(p.numel() for p in module.parameters())}

    monkeypatch.setattr(nnssl, "take_state", same_shapes)


def imported(checkpoint, **options):
    assert recognises(checkpoint)
    return convert(checkpoint, ImportOptions(**options))


def built(result):
    foundation = freeze(build_foundation(result.spec))
    load_exactly(canonical_state(foundation), result.weights, "the test")
    return foundation


def image(*shape):
    return torch.randn((2, 1, *shape), generator=torch.Generator().manual_seed(2))


def same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


class TestConvolutional:
    def test_features_are_those_of_the_pretrained_encoder(self, tmp_path):
        network, native = unet(), image(8, 16, 12)
        result = imported(saved(tmp_path, network.state_dict(), adaptation_plan("ResidualEncoderUNet", DYNAMIC)))
        same(built(result)(native, None, None), network.encoder(native))
        assert result.spec.architecture == "residual_encoder"
        assert [level.stride_zyx for level in result.spec.pyramid] == [(1, 1, 1), (1, 2, 2), (2, 4, 4)]
        assert result.spec.load_report["left_out"] == {
            "decoder": sum(name.startswith("decoder.") for name in network.state_dict())
        }

    def test_plain_encoder_whose_stem_is_its_first_stage(self, tmp_path):
        kwargs = {**DYNAMIC, "n_conv_per_stage": [1, 2, 1]}
        del kwargs["n_blocks_per_stage"]
        network, native = unet(PlainConvUNet, **kwargs), image(8, 16, 12)
        plan = adaptation_plan("PlainConvUNet", kwargs, CNN_KEYS | {"key_to_stem": "encoder.stages.0"})
        result = imported(saved(tmp_path, network.state_dict(), plan))
        assert result.spec.architecture == "plain_encoder"
        same(built(result)(native, None, None), network.encoder(native))

    @pytest.mark.parametrize("dropped", [".all_modules.", ".conv."])
    def test_either_name_of_a_tensor_is_enough(self, tmp_path, dropped):
        """Formats without shared tensors keep one name of each."""
        network, native = unet(), image(8, 16, 12)
        state = {name: tensor for name, tensor in network.encoder.state_dict(prefix="encoder.").items()}
        state = {name: tensor for name, tensor in state.items() if dropped not in name or ".norm." in name}
        assert len(state) < len(network.encoder.state_dict())
        result = imported(saved(tmp_path, state, adaptation_plan("ResidualEncoderUNet", DYNAMIC)))
        same(built(result)(native, None, None), network.encoder(native))

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
    def test_prefixes_of_wrappers(self, tmp_path, prefix):
        network, native = unet(), image(8, 16, 12)
        state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
        result = imported(saved(tmp_path, state, adaptation_plan("ResidualEncoderUNet", DYNAMIC)))
        same(built(result)(native, None, None), network.encoder(native))

    def test_encoder_and_stem_lie_where_the_plan_says(self, tmp_path):
        """MultiTalent has a stem for each of its datasets; the plan names the one to use."""
        network, native = unet(), image(8, 16, 12)
        state = {
            name.replace("encoder.stem.", "net.stems.351_0.").replace("encoder.stages.", "net.encoder.stages."): tensor
            for name, tensor in network.state_dict().items()
            if name.startswith("encoder.")
        }
        other = {name.replace("351_0", "004"): tensor + 1 for name, tensor in state.items() if "stems" in name}
        keys = CNN_KEYS | {"key_to_encoder": "net.encoder.stages", "key_to_stem": "net.stems.351_0"}
        result = imported(saved(tmp_path, {**state, **other}, adaptation_plan("ResidualEncoderUNet", DYNAMIC, keys)))
        same(built(result)(native, None, None), network.encoder(native))
        assert result.spec.load_report["left_out"] == {"net": len(other)}

    @pytest.mark.parametrize("name", ["ResEncL", "NoSkipResEncL"])
    def test_presets(self, name, shapes_alone):
        large = DYNAMIC | {
            "n_stages": 6,
            "features_per_stage": [32, 64, 128, 256, 320, 320],
            "kernel_sizes": [[3, 3, 3]] * 6,
            "strides": [[1, 1, 1], *[[2, 2, 2]] * 5],
            "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
            "n_conv_per_stage_decoder": [1] * 5,
        }
        with torch.device("meta"):
            network = ResidualEncoderUNet(input_channels=1, num_classes=1, **{**large, **CLASSES})
        spec = imported(weightless(network, adaptation_plan(name))).spec
        assert [level.channels for level in spec.pyramid] == large["features_per_stage"]
        assert spec.input.divisible_by_zyx == (32, 32, 32)
        assert spec.load_report["parameters"] == sum(p.numel() for p in network.encoder.parameters())


class TestPrimus:
    def test_features_are_those_of_the_pretrained_autoencoder(self, tmp_path):
        torch.manual_seed(0)
        network, native = randomised(MaskedAutoencoder((24, 24, 16))), image(24, 24, 16)
        plan = adaptation_plan("PrimusX", mae_kwargs((24, 24, 16)), VIT_KEYS, patch=(24, 24, 16))
        result = imported(saved(tmp_path, network.state_dict(), plan))
        maps = built(result)(native, None, None)
        same(maps[-1:], [network(native)])
        assert result.spec.kind == "tokens"
        assert [level.stride_zyx for level in result.spec.pyramid] == [(8, 8, 8)] * 3
        assert set(result.spec.load_report["left_out"]) == {"decoder", "up_projection", "mask_token"}

    def test_features_are_those_of_the_pretrained_primus(self, tmp_path, monkeypatch):
        """Contrastive pretraining uses the library's network, below an `encoder`; here a small one for the real S."""
        monkeypatch.setitem(nnssl._PRIMUS, "PrimusS", nnssl._MaeKwargs(24, 3, 2))
        torch.manual_seed(0)
        network, native = randomised(Primus(1, 24, (8, 8, 8), 1, 3, 2, (16, 24, 8))), image(16, 24, 8)
        keys = {key: f"encoder.{VIT_KEYS[key]}" for key in ("key_to_encoder", "key_to_stem", "key_to_lpe")}
        plan = adaptation_plan("PrimusS", None, VIT_KEYS | keys, patch=[16, 24, 8])
        state = {f"encoder.{name}": tensor for name, tensor in network.state_dict().items()}
        result = imported(saved(tmp_path, state, plan))
        tokens, _ = network.eva(network.down_projection(native).flatten(2).transpose(1, 2))
        same(built(result)(native, None, None)[-1:], [tokens.transpose(1, 2).reshape(2, 24, 2, 3, 1)])

    @pytest.mark.parametrize(
        ("library_class", "scales"), [(PrimusS, NO_SCALES), (PrimusB, SCALES), (PrimusM, SCALES), (PrimusL, NO_SCALES)]
    )
    def test_presets(self, library_class, scales, shapes_alone):
        """Plans hold no arguments for them; whether blocks have scales differs between releases."""
        with torch.device("meta"):
            network = library_class(1, 1, (8, 8, 8), (16, 32, 16), **scales)
        plan = adaptation_plan(library_class.__name__, None, VIT_KEYS, patch=[16, 32, 16])
        spec = imported(weightless(network, plan)).spec
        depth = len(network.eva.blocks)
        assert [level.channels for level in spec.pyramid] == [network.embed_dim] * 4
        assert spec.arch_kwargs["hidden_layers"] == [depth // 4, depth // 2, 3 * depth // 4, depth]
        assert spec.arch_kwargs["pretraining_grid_zyx"] == [2, 4, 2]
        assert spec.arch_kwargs["token_axes"] == [0, 1, 2]
        assert {name: spec.arch_kwargs[name] for name in scales} == scales
        assert network.eva.blocks[0].attn.num_heads == spec.arch_kwargs["heads"]

    def test_full_size_autoencoder(self, shapes_alone):
        """nnFoundationViT."""
        size = (1056, 40, 16)
        with torch.device("meta"):
            network = MaskedAutoencoder((192, 192, 192), *size)
        plan = adaptation_plan("PrimusX", mae_kwargs([192, 192, 192], *size), VIT_KEYS, patch=[160, 160, 160])
        spec = imported(weightless(network, plan)).spec
        assert spec.arch_kwargs["pretraining_grid_zyx"] == [24, 24, 24]
        assert spec.arch_kwargs["token_axes"] == [1, 0, 2]
        assert spec.load_report["parameters"] == 551_364_704

    def test_autoencoder_is_known_by_its_decoder(self, shapes_alone):
        """OpenMind's Primus-M."""
        with torch.device("meta"):
            network = MaskedAutoencoder((160, 160, 160), 864, 16, 12)
        spec = imported(weightless(network, adaptation_plan("PrimusM", None, VIT_KEYS, patch=[160] * 3))).spec
        assert spec.arch_kwargs["token_axes"] == [1, 0, 2]
        assert spec.arch_kwargs["init_values"] == 0.1 and spec.arch_kwargs["scale_attn_inner"]

    def test_grid_of_the_position_embedding_rather_than_of_the_plan(self, tmp_path):
        """VoCo pretrains on crops of another size than the patch of its plan."""
        torch.manual_seed(0)
        state = randomised(MaskedAutoencoder((16, 16, 16))).state_dict()
        plan = adaptation_plan("PrimusX", mae_kwargs((32, 32, 16)), VIT_KEYS, patch=(32, 32, 16))
        assert imported(saved(tmp_path, state, plan)).spec.arch_kwargs["pretraining_grid_zyx"] == [2, 2, 2]
        plan["pretrain_patch_size"] = [16, 16, 24]
        state = randomised(MaskedAutoencoder((16, 16, 24))).state_dict()
        assert imported(saved(tmp_path, state, plan)).spec.arch_kwargs["pretraining_grid_zyx"] == [2, 2, 3]
        del plan["pretrain_patch_size"]
        with pytest.raises(CheckpointError, match="has 12 tokens"):
            imported(saved(tmp_path, state, plan))

    def test_autoencoder_with_mixed_up_positions_is_refused(self, tmp_path):
        torch.manual_seed(0)
        state = MaskedAutoencoder((16, 24, 8)).state_dict()
        plan = adaptation_plan("PrimusX", mae_kwargs((16, 24, 8)), VIT_KEYS)
        with pytest.raises(CheckpointError, match="mixed up the positions along z and y"):
            imported(saved(tmp_path, state, plan))


@pytest.fixture(scope="module")
def weights():
    return unet().state_dict()


def cnn_plan(**changed):
    return adaptation_plan("ResidualEncoderUNet", DYNAMIC, **changed)


class TestContract:
    def test_what_the_plan_says(self, tmp_path, weights):
        checkpoint = saved(tmp_path, weights, cnn_plan())
        spec = imported(checkpoint).spec
        assert spec.input.orientation is None
        assert spec.input.spacing_zyx_mm == (1.0, 1.0, 1.0)
        assert spec.input.divisible_by_zyx == (2, 4, 4)
        assert spec.provenance == {
            "family": "nnssl",
            "source": "OpenMind, arXiv 2412.17041",
            "file": "checkpoint_final.pth",
            "sha256": checkpoint.sha256,
            "network": "ResidualEncoderUNet",
            "trainer": "BaseMAETrainer_BS8",
            "dataset": "Dataset745_OpenMind",
            "recommended_patch_zyx": [160, 160, 160],
        }

    def test_no_resampling(self, tmp_path, weights):
        plan = cnn_plan(spacing_style="noresample", spacing=None)
        assert imported(saved(tmp_path, weights, plan)).spec.input.spacing_zyx_mm is None

    @pytest.mark.parametrize(
        ("dataset", "payload", "modality", "licence"),
        [
            ("Dataset745_OpenNeuro_v2", {}, "MRI", "CC-BY-4.0"),
            ("Dataset800_Rocket", {}, "CT", "not stated"),
            ("Dataset1", {"citations": [{"type": "Pretraining", "name": "nnFoundation"}]}, "CT", "CC-BY-SA-4.0"),
            ("Dataset1", {"trainer_name": "nnFoundationViT_large_trainer"}, "CT", "CC-BY-SA-4.0"),
        ],
    )
    def test_modality_and_licence_of_a_release(self, tmp_path, weights, dataset, payload, modality, licence):
        spec = imported(saved(tmp_path, weights, cnn_plan(dataset_name=dataset), **payload)).spec
        assert spec.input.modalities == (modality,)
        assert spec.input.intensity == {modality: IntensityRule("zscore", "none")}
        assert spec.licence == licence

    def test_the_user_knows_better(self, tmp_path, weights):
        checkpoint = saved(tmp_path, weights, cnn_plan())
        spec = imported(checkpoint, orientation="LPS", licence="MIT", origin="a friend").spec
        assert (spec.input.orientation, spec.licence, spec.provenance["source"]) == ("LPS", "MIT", "a friend")

    @pytest.mark.parametrize(
        ("changed", "scheme"),
        [
            ({"use_mask_for_norm": [True]}, "zscore_nonzero"),
            ({"use_mask_for_norm": False}, "zscore"),
            ({"normalization_schemes": ["RescaleTo01"]}, "minmax"),
            ({"normalization_schemes": ["NoNormalization"]}, "identity"),
        ],
    )
    def test_normalisation(self, tmp_path, weights, changed, scheme):
        spec = imported(saved(tmp_path, weights, cnn_plan(**changed))).spec
        assert spec.input.intensity["MRI"].scheme == scheme

    @pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
    def test_a_volume_reaches_the_encoder_as_in_pretraining(self, tmp_path, transpose):
        """Read with SimpleITK, transposed, standardised: all that nnssl does to a volume without zeros at 1 mm."""
        network = unet()
        volume = np.random.default_rng(0).normal(50, 20, (8, 12, 16)).astype(np.float32)
        stored = sitk.GetImageFromArray(volume)
        stored.SetDirection((0, 0, 1, -1, 0, 0, 0, 1, 0))
        sitk.WriteImage(stored, tmp_path / "volume.nii.gz")
        array = sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "volume.nii.gz")).transpose(transpose)
        expected = network.encoder(torch.from_numpy((array - array.mean()) / max(array.std(), 1e-8))[None, None])
        result = imported(saved(tmp_path, network.state_dict(), cnn_plan(transpose_forward=list(transpose))))
        image, contract = read_image(tmp_path / "volume.nii.gz"), result.spec.input
        turned = image if contract.orientation is None else orient(image, contract.orientation)
        fed = normalise(turned.array_zyx, contract.intensity["MRI"])
        same(built(result)(torch.from_numpy(fed)[None, None], None, None), expected)

    def test_reader_that_reorients(self, tmp_path, weights):
        plan = cnn_plan(image_reader_writer="NibabelIOWithReorient", transpose_forward=[1, 0, 2])
        assert imported(saved(tmp_path, weights, plan)).spec.input.orientation == "RSA"


class TestRefused:
    def refused(self, folder, state, plan, message):
        checkpoint = saved(folder, state, plan)
        with pytest.raises(CheckpointError, match=message) as refusal:
            convert(checkpoint, ImportOptions())
        assert "checkpoint_final.pth" in str(refusal.value)

    @pytest.mark.parametrize("payload", [{"state_dict": {}}, {"network_weights": {}}, {"nnssl_adaptation_plan": {}}])
    def test_other_families(self, payload):
        checkpoint = Checkpoint(Path("other.pth"), payload, "0" * 64)
        assert not recognises(checkpoint)
        with pytest.raises(CheckpointError, match="other.pth is no nnssl checkpoint"):
            convert(checkpoint, ImportOptions())

    @pytest.mark.parametrize("missing", ["architecture_plans", "pretrain_plan", "key_to_encoder"])
    def test_incomplete_plan(self, tmp_path, weights, missing):
        plan = cnn_plan()
        del plan[missing]
        self.refused(tmp_path, weights, plan, missing)

    def test_plan_without_a_configuration(self, tmp_path, weights):
        plan = cnn_plan()
        plan["pretrain_plan"]["configurations"] = {}
        self.refused(tmp_path, weights, plan, "needs architecture_plans")

    @pytest.mark.parametrize("name", ["PrimusV2M", "SwinUNETR", "os.system"])
    def test_unknown_networks(self, tmp_path, weights, name):
        self.refused(tmp_path, weights, adaptation_plan(name), f"holds a {name.split('.')[-1]}; of nnssl's networks")

    @pytest.mark.parametrize(("name", "keys"), [("ResidualEncoderUNet", CNN_KEYS), ("PrimusX", VIT_KEYS)])
    def test_networks_that_no_name_describes(self, tmp_path, weights, name, keys):
        self.refused(tmp_path, weights, adaptation_plan(name, None, keys), "arch_kwargs")

    def test_impossible_patches(self, tmp_path, weights):
        kwargs = mae_kwargs((16, 16, 16)) | {"patch_embed_size": (8, 0, 8)}
        self.refused(tmp_path, weights, adaptation_plan("PrimusX", kwargs, VIT_KEYS), "are impossible")

    def test_several_channels(self, tmp_path, weights):
        self.refused(tmp_path, weights, {**cnn_plan(), "pretrain_num_input_channels": 2}, "pretrained with 2 channels")

    def test_channels_named_by_an_option(self, tmp_path):
        torch.manual_seed(3)
        network = ResidualEncoderUNet(input_channels=2, num_classes=1, **{**DYNAMIC, **CLASSES})
        plan = cnn_plan(normalization_schemes=["ZScoreNormalization"] * 2) | {"pretrain_num_input_channels": 2}
        checkpoint = saved(tmp_path, network.state_dict(), plan)
        with pytest.raises(CheckpointError, match="--modalities"):
            convert(checkpoint, ImportOptions(modalities=("CT",)))
        spec = convert(checkpoint, ImportOptions(modalities=("CT", "PET"))).spec
        assert spec.input.modalities == ("CT", "PET") and set(spec.input.intensity) == {"CT", "PET"}

    def test_unknown_normalisation(self, tmp_path, weights):
        plan = cnn_plan(normalization_schemes=["RGBTo01"])
        self.refused(tmp_path, weights, plan, "known are NoNormalization, RescaleTo01, ZScoreNormalization")

    def test_no_order_of_axes(self, tmp_path, weights):
        self.refused(tmp_path, weights, cnn_plan(transpose_forward=[0, 0, 1]), "transpose_forward")

    def test_missing_tensor(self, tmp_path, weights):
        gone = "encoder.stages.1.blocks.0.conv1.norm.bias"
        state = {
            name: t for name, t in weights.items() if not name.endswith(("conv1.norm.bias", "conv1.all_modules.1.bias"))
        }
        self.refused(tmp_path, state, cnn_plan(), f"4 missing, such as .*{gone.partition('stages')[0]}")

    def test_tensor_of_another_size(self, tmp_path, weights):
        plan = adaptation_plan("ResidualEncoderUNet", {**DYNAMIC, "features_per_stage": [4, 6, 10]})
        self.refused(tmp_path, weights, plan, "of another shape, such as encoder.stages.2")

    def test_more_than_the_plan_names(self, tmp_path, weights):
        plan = adaptation_plan("ResidualEncoderUNet", {**DYNAMIC, "n_blocks_per_stage": [1, 1, 1]})
        self.refused(tmp_path, weights, plan, "unknown, such as encoder.stages.1.blocks.1")
