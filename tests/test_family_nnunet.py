"""nnU-Net's trained-model folders: what nnU-Net itself wrote and predicted is the reference."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from unicon_pipeline.budget import PRESETS
from unicon_pipeline.dataset import prediction_cases
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.extend import extend
from unicon_pipeline.extension_plan import Schedule
from unicon_pipeline.families.nnunet import find_model_folder
from unicon_pipeline.families.nnunet_plans import read_configuration
from unicon_pipeline.geometry import Grid, Volume, orient, read_labels
from unicon_pipeline.imported import ImportOptions
from unicon_pipeline.importer import import_checkpoint
from unicon_pipeline.info import describe, format_description
from unicon_pipeline.input_shape import Overrides
from unicon_pipeline.intensity import read_in_units
from unicon_pipeline.model_folder import ModelFolder
from unicon_pipeline.predict import predict_folder
from unicon_pipeline.predictor import Options, Predictor, as_one_layer
from unicon_pipeline.prepare import prepare_case
from unicon_pipeline.preprocess import plan_and_preprocess
from unicon_pipeline.verify import verify

pytest.importorskip("nnunetv2")
MODELS = ("Dataset901_Plain", "Dataset902_Residual", "Dataset903_Regions")
MODALITIES = {"Dataset901_Plain": ("CT",), "Dataset902_Residual": ("CT", "PET"), "Dataset903_Regions": ("T1",)}


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    """What tests/nnunet_oracle.py makes."""
    folder = tmp_path_factory.mktemp("nnunet")
    script = Path(__file__).with_name("nnunet_oracle.py")
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture(scope="session")
def trained(oracle):
    """Name -> trained-model folder."""
    return {name: next((oracle / "results" / name).iterdir()) for name in MODELS}


@pytest.fixture(scope="session")
def models(trained, tmp_path_factory):
    """Name -> imported model folder."""
    folder = tmp_path_factory.mktemp("imported")
    return {name: import_checkpoint(path, folder / name).path for name, path in trained.items()}


@pytest.mark.parametrize("name", MODELS)
def test_input_logits_and_labels_are_nnunets(name, oracle, models, tmp_path):
    expected = np.load(oracle / "expected" / f"{name}.npz")
    (case,) = prediction_cases(oracle / "images" / name, dict(enumerate(MODALITIES[name])))
    predictor = Predictor(ModelFolder(models[name]), None, Options("cpu", "fp32", tta=True))
    prepared = prepare_case(read_in_units(case), predictor.plans[name])
    assert prepared.array_czyx.shape == expected["array"].shape
    np.testing.assert_allclose(prepared.array_czyx, expected["array"], atol=1e-4)
    logits = torch.cat([slab.maps_kzyx for slab in predictor.slabs(name, prepared)], dim=1).numpy()
    assert np.abs(logits - expected["logits"]).max() < 1e-3
    report = predict_folder(oracle / "images" / name, tmp_path, models[name], device="cpu", precision="fp32", tta=True)
    assert report.exit_code == 0
    labels = read_labels(tmp_path / name / "new.nii.gz").array_zyx
    assert len(np.unique(expected["labels"])) > 1
    assert (labels == expected["labels"]).mean() >= 0.9999


def test_the_extension_builds_on_the_chosen_fold_and_the_task_keeps_all(trained, models, tmp_path):
    first = ModelFolder(models["Dataset902_Residual"])
    second = import_checkpoint(trained["Dataset902_Residual"], tmp_path / "m", options=ImportOptions(fold=1))
    assert (first.spec().provenance["fold"], second.spec().provenance["fold"]) == ("0", "1")
    weights = torch.load(trained["Dataset902_Residual"] / "fold_1" / "checkpoint_final.pth", weights_only=False)
    key = "encoder.stages.1.blocks.0.conv1.conv.weight"
    assert torch.equal(second.foundation().state_dict()[key], weights["network_weights"][key])
    assert not torch.equal(first.foundation().state_dict()[key], weights["network_weights"][key])
    images, present = torch.randn(1, 2, 16, 48, 40), torch.ones((1, 2), dtype=torch.bool)
    with torch.inference_mode():
        outputs = [m.task_model("Dataset902_Residual", m.foundation())(images, present)[0] for m in (first, second)]
    assert torch.allclose(*outputs, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_an_imported_model_is_intact_and_says_what_it_is(name, models):
    assert verify(models[name]).ok
    told = format_description(describe(models[name]))
    assert f"task        {name}: segmentation of" in told and "came with the foundation" in told
    assert "nnU-Net nnUNetTrainer, 3d_fullres, mean of folds" in told and "licence: not stated" in told
    assert "left out:" in told


def test_a_task_that_came_along_needs_all_its_modalities(models):
    predictor = Predictor(ModelFolder(models["Dataset902_Residual"]), None, Options("cpu", "fp32"))
    assert predictor.unusable("Dataset902_Residual", ["CT"]) == "needs CT and PET, the case has CT"
    assert predictor.unusable("Dataset902_Residual", ["CT", "PET"]) is None


def as_first_release(folder):
    """The same plans in the form of nnU-Net 2.0 to 2.3."""
    plans = json.loads((folder / "plans.json").read_text())
    for configuration in plans["configurations"].values():
        arguments = configuration.pop("architecture", {}).get("arch_kwargs")
        if arguments:
            configuration |= {
                "UNet_class_name": "PlainConvUNet",
                "UNet_base_num_features": arguments["features_per_stage"][0],
                "unet_max_num_features": max(arguments["features_per_stage"]),
                "n_conv_per_stage_encoder": arguments["n_conv_per_stage"],
                "n_conv_per_stage_decoder": arguments["n_conv_per_stage_decoder"],
                "num_pool_per_axis": [2, 2, 2],
                "pool_op_kernel_sizes": arguments["strides"],
                "conv_kernel_sizes": arguments["kernel_sizes"],
            }
    (folder / "plans.json").write_text(json.dumps(plans))


def test_old_plans_give_the_same_model(trained, models, tmp_path):
    old = shutil.copytree(trained["Dataset901_Plain"], tmp_path / "old")
    as_first_release(old)
    one, other = import_checkpoint(old, tmp_path / "m"), ModelFolder(models["Dataset901_Plain"])
    assert one.spec().pyramid == other.spec().pyramid
    name = "tasks/Dataset901_Plain/weights.safetensors"
    assert one.chain.entries[1].files[name] == other.chain.entries[1].files[name]


@pytest.mark.parametrize("wrapped", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_weights_are_unwrapped(wrapped, trained, models, tmp_path):
    folder = shutil.copytree(trained["Dataset901_Plain"], tmp_path / "wrapped")
    file = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    checkpoint["network_weights"] = {wrapped + key: value for key, value in checkpoint["network_weights"].items()}
    torch.save(checkpoint, file)
    foundation = import_checkpoint(folder, tmp_path / "m").chain.entries[0]
    weights = "foundation/weights.safetensors"
    assert foundation.files[weights] == ModelFolder(models["Dataset901_Plain"]).chain.entries[0].files[weights]


def edited(folder, change):
    plans = json.loads((folder / "plans.json").read_text())
    change(plans["configurations"]["3d_fullres"])
    (folder / "plans.json").write_text(json.dumps(plans))


def without(folder, key, more=None):
    file = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    for name in [name for name in checkpoint["network_weights"] if key in name]:
        del checkpoint["network_weights"][name]
    checkpoint["network_weights"] |= more or {}
    torch.save(checkpoint, file)


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda f: edited(f, lambda c: c.update(patch_size=[64, 64])), "2-D; a foundation is 3-D"),
        (lambda f: edited(f, lambda c: c.update(previous_stage="3d_lowres")), "second stage of a cascade"),
        (lambda f: edited(f, lambda c: c.update(preprocessor_name="Mine")), "preprocessed by Mine"),
        (lambda f: edited(f, lambda c: c.update(normalization_schemes=["Rank"])), "normalised by Rank"),
        (lambda f: edited(f, lambda c: c["resampling_fn_data_kwargs"].update(order=1)), "resamples data by"),
        (lambda f: edited(f, lambda c: c.pop("spacing")), "KeyError 'spacing'"),
        (lambda f: edited(f, lambda c: c["architecture"].update(network_class_name="os.system")), "is a system"),
        (lambda f: edited(f, lambda c: c["architecture"]["arch_kwargs"].update(norm_op="a.B")), "norm_op is B"),
        (lambda f: shutil.rmtree(f / "fold_0"), "was not trained, or not copied whole"),
        (lambda f: (f / "dataset.json").unlink(), "dataset.json does not exist"),
        (lambda f: without(f, "encoder.stages.1.0.convs.0"), "missing, such as encoder.stages.1.0.convs.0"),
        (lambda f: without(f, "seg_layers"), "missing, such as seg_layers"),
        (lambda f: without(f, "-", {"extra.weight": torch.ones(1)}), "extra.weight: the trainer of"),
    ],
)
def test_what_cannot_be_imported_says_why_and_leaves_nothing(damage, complaint, trained, tmp_path):
    folder = shutil.copytree(trained["Dataset901_Plain"], tmp_path / trained["Dataset901_Plain"].name)
    damage(folder)
    with pytest.raises(CheckpointError) as stop:
        import_checkpoint(folder, tmp_path / "m")
    assert complaint in str(stop.value)
    assert not (tmp_path / "m").exists()


def test_the_folder_is_found_from_a_file_in_it_and_from_its_parent(trained, tmp_path):
    folder = trained["Dataset901_Plain"]
    places = (folder, folder.parent, folder / "fold_0", folder / "fold_0" / "checkpoint_final.pth")
    assert {find_model_folder(place) for place in places} == {folder}
    assert find_model_folder(tmp_path) is None
    for name in ("A__p__3d_fullres", "B__p__3d_lowres", "A__p__2d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "plans.json").touch()
    with pytest.raises(CheckpointError, match="several trained models: A__p__3d_fullres, B__p__3d_lowres"):
        find_model_folder(tmp_path)


@pytest.mark.parametrize("given", [None, "RAS", "LPI"])
@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_orientation_then_transposition(given, transpose, trained, tmp_path):
    plans = json.loads((trained["Dataset901_Plain"] / "plans.json").read_text()) | {"transpose_forward": transpose}
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    dataset = trained["Dataset901_Plain"] / "dataset.json"
    options = ImportOptions(orientation=given)
    code = read_configuration(tmp_path / "plans.json", dataset, "3d_fullres", options).orientation
    array = np.arange(24).reshape(2, 3, 4)
    stored = Volume(array, Grid((2, 3, 4), (3.0, 2.0, 1.0), (0.0, 0.0, 0.0), (0.0, -1, 0, -1, 0, 0, 0, 0, 1)))
    turned = stored if given is None else orient(stored, given)
    expected = turned.array_zyx.transpose(transpose)
    assert np.array_equal(expected, stored.array_zyx if code is None else orient(stored, code).array_zyx)


def test_channels_may_be_named(trained, tmp_path):
    named = import_checkpoint(
        trained["Dataset902_Residual"], tmp_path / "m", options=ImportOptions(modalities=("CT", "FET"))
    )
    assert named.spec().input.modalities == ("CT", "FET")
    with pytest.raises(CheckpointError, match="has 2 channels .*--modalities gave 1"):
        import_checkpoint(trained["Dataset902_Residual"], tmp_path / "n", options=ImportOptions(modalities=("CT",)))


def test_an_imported_model_grows_and_its_own_task_stays_bit_identical(oracle, models, tmp_path):
    model = shutil.copytree(models["Dataset901_Plain"], tmp_path / "model")
    images = oracle / "images" / "Dataset901_Plain"
    how = {"tasks": ["Dataset901_Plain"], "device": "cpu", "save_probabilities": True}
    predict_folder(images, tmp_path / "before", model, **how)
    task = shutil.copytree(oracle / "raw" / "Dataset901_Plain", tmp_path / "raw" / "Again")
    spec = ModelFolder(model).spec()
    small = Overrides(patch_shape_zyx=(16, 16, 16))
    plan, failed = plan_and_preprocess(task, tmp_path, spec, PRESETS["cpu"], processes=1, overrides=small)
    assert not failed
    assert plan.spacing_zyx_mm == spec.input.spacing_zyx_mm and plan.intensity == spec.input.intensity
    extend(task, tmp_path, model, schedule=Schedule(steps=2, minutes=None), device="cpu")
    assert ModelFolder(model).tasks == ("Dataset901_Plain", "Again") and verify(model).ok
    predict_folder(images, tmp_path / "after", model, **how)
    files = sorted(path.relative_to(tmp_path / "before") for path in (tmp_path / "before").rglob("*.nii.gz"))
    assert len(files) == 4
    assert all((tmp_path / "before" / f).read_bytes() == (tmp_path / "after" / f).read_bytes() for f in files)


def test_without_its_last_layers_it_gives_what_makes_the_same_logits(models):
    folder = ModelFolder(models["Dataset902_Residual"])
    network = folder.task_model("Dataset902_Residual", folder.foundation())
    images, present = torch.randn(1, 2, 16, 48, 40), torch.ones((1, 2), dtype=torch.bool)
    with torch.inference_mode():
        expected = network(images, present)[0]
        weight, bias = as_one_layer(network.last_layers())
        network.drop_last_layers()
        maps = network(images, present)[0]
    assert maps.shape[1] == weight.shape[1]
    found = np.einsum("ck,bkzyx->bczyx", weight, maps.numpy()) + bias.reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
