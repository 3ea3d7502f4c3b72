"""Makes trained-model folders with nnU-Net's own code, and predicts with it; run as a script, in its own process.

    python nnunet_oracle.py FOLDER

For each model: FOLDER/results/<Dataset>/<trainer>__<plans>__3d_fullres/, images in FOLDER/images/<Dataset>/, and what
nnU-Net makes of them in FOLDER/expected/<Dataset>.npz (`array`, `logits`, `labels`). The networks have random weights
of a size that gives decided labels. nnU-Net sums tiles in float16; here it is made to sum in float32, so that the
comparison shows the method and not the rounding.
"""

import os
import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk

FOLDER = Path(sys.argv[1])
for name in ("raw", "preprocessed", "results"):
    os.environ[f"nnUNet_{name}"] = str(FOLDER / name)
    (FOLDER / name).mkdir(parents=True, exist_ok=True)

import nnunetv2.inference.predict_from_raw_data as predict_module  # noqa: E402
import torch  # noqa: E402
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json  # noqa: E402
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner  # noqa: E402
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (  # noqa: E402
    nnUNetPlannerResEncM,
)
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints  # noqa: E402
from nnunetv2.inference.export_prediction import export_prediction_from_logits  # noqa: E402
from nnunetv2.inference.sliding_window_prediction import compute_gaussian  # noqa: E402
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # noqa: E402

MODELS = {
    "Dataset901_Plain": {
        "channels": {"0": "CT"},
        "labels": {"background": 0, "b": 2, "a": 1},
        "spacing_xyz": (1.0, 1.2, 1.5),
        "shape_zyx": (40, 52, 60),
        "folds": (0,),
        "planner": ExperimentPlanner,
    },
    "Dataset902_Residual": {
        "channels": {"0": "CT", "1": "PET"},
        "labels": {"background": 0, "tumour": 1},
        "spacing_xyz": (1.0, 1.0, 4.5),
        "shape_zyx": (21, 60, 56),
        "folds": (0, 1),
        "planner": nnUNetPlannerResEncM,
    },
    "Dataset903_Regions": {
        "channels": {"0": "T1"},
        "labels": {"background": 0, "all": [1, 2], "core": [2]},
        "spacing_xyz": (4.0, 1.0, 1.1),
        "shape_zyx": (50, 48, 22),
        "folds": (0,),
        "planner": ExperimentPlanner,
    },
}


class SumsInFloat32:
    """The torch module, but for `half`."""

    half = torch.float32

    def __getattr__(self, name):
        return getattr(torch, name)


def image(rng, shape_zyx, scale):
    coarse = rng.normal(size=tuple(max(3, n // 8) for n in shape_zyx))
    smooth = sitk.GetArrayFromImage(
        sitk.Resample(
            sitk.GetImageFromArray(coarse), shape_zyx[::-1], sitk.Transform(), sitk.sitkBSpline, (0.0,) * 3,
            tuple((c - 1) / n for c, n in zip(coarse.shape[::-1], shape_zyx[::-1])), (1, 0, 0, 0, 1, 0, 0, 0, 1), 0.0,
            sitk.sitkFloat64,
        )
    )  # fmt: skip
    array = (smooth * scale + rng.normal(size=shape_zyx) * scale / 4).astype(np.float32)
    array[:3], array[:, :2], array[..., -4:] = 0, 0, 0  # a rim of zeros, to be cropped
    array[8:10, 20:23, 5:8] = 0  # and a hole
    return array


def save(array, spacing_xyz, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = sitk.GetImageFromArray(array)
    picture.SetSpacing(spacing_xyz)
    picture.SetOrigin((5.0, -7.0, 11.0))
    picture.SetDirection((-1, 0, 0, 0, 0, 1, 0, 1, 0))
    sitk.WriteImage(picture, str(path))


def make_dataset(name, model, rng):
    raw = FOLDER / "raw" / name
    for case in range(3):
        shape = tuple(n + case for n in model["shape_zyx"])
        first = image(rng, shape, 300)
        for channel in model["channels"]:
            array = first if channel == "0" else np.abs(image(rng, shape, 4))
            save(array, model["spacing_xyz"], raw / "imagesTr" / f"case{case}_{int(channel):04d}.nii.gz")
        labels = np.digitize(first, (100, 250)).astype(np.uint8)
        values = [v for value in model["labels"].values() for v in (value if isinstance(value, list) else [value])]
        save(np.minimum(labels, max(values)), model["spacing_xyz"], raw / "labelsTr" / f"case{case}.nii.gz")
    shape = tuple(n + 6 for n in model["shape_zyx"])
    for channel in model["channels"]:
        array = image(rng, shape, 300) if channel == "0" else np.abs(image(rng, shape, 4))
        save(array, model["spacing_xyz"], FOLDER / "images" / name / f"new_{int(channel):04d}.nii.gz")
    description = {"channel_names": model["channels"], "labels": model["labels"]}
    description |= {"numTraining": 3, "file_ending": ".nii.gz"}
    if any(isinstance(value, list) for value in model["labels"].values()):
        description["regions_class_order"] = [1, 2]
    save_json(description, str(raw / "dataset.json"))


def make_model(name, model):
    number = int(name[7:10])
    extract_fingerprints([number], num_processes=1, show_progress_bar=False)
    planner = model["planner"](number, gpu_memory_target_in_gb=0.03, preprocessor_name="DefaultPreprocessor")
    planner.UNet_base_num_features, planner.UNet_max_features_3d = 8, 24
    planner.UNet_blocks_per_stage_encoder = (1, 2, 1, 1, 1, 1, 1, 1)
    planner.plan_experiment()
    plans = load_json(str(FOLDER / "preprocessed" / name / f"{planner.plans_identifier}.json"))
    dataset = load_json(str(FOLDER / "raw" / name / "dataset.json"))
    for fold in model["folds"]:
        torch.manual_seed(fold)
        trainer = nnUNetTrainer({**plans, "continue_training": False}, "3d_fullres", fold, dataset, torch.device("cpu"))
        stored = Path(trainer.preprocessed_dataset_folder) / "case0.b2nd"  # it only looks at the ending
        stored.parent.mkdir(parents=True, exist_ok=True)
        stored.touch()
        trainer.initialize()
        with torch.no_grad():
            for parameter in trainer.network.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.05))
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
        folder = Path(trainer.output_folder_base)
        save_json(plans, str(folder / "plans.json"))
        save_json(dataset, str(folder / "dataset.json"))
    return folder


def predict(name, model, folder):
    predictor = predict_module.nnUNetPredictor(use_mirroring=True, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), model["folds"])
    files = sorted(str(path) for path in (FOLDER / "images" / name).glob("*.nii.gz"))
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    array, _, properties = preprocessor.run_case(
        files, None, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    )
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(array))
    out = FOLDER / "expected" / name
    out.parent.mkdir(exist_ok=True)
    export_prediction_from_logits(
        logits.clone(), properties, predictor.configuration_manager, predictor.plans_manager, predictor.dataset_json,
        str(out),
    )  # fmt: skip
    labels = sitk.GetArrayFromImage(sitk.ReadImage(f"{out}.nii.gz"))
    np.savez(out, array=array, logits=logits.numpy(), labels=labels)


if __name__ == "__main__":
    torch.set_num_threads(2)
    predict_module.torch = SumsInFloat32()
    predict_module.compute_gaussian = lambda *args, **options: compute_gaussian(
        *args, **{**options, "dtype": torch.float32}
    )
    for dataset, settings in MODELS.items():
        make_dataset(dataset, settings, np.random.default_rng(int(dataset[7:10])))
        predict(dataset, settings, make_model(dataset, settings))
