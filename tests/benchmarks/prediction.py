"""Prediction against nnU-Net's: wall time of the whole process, the largest resident memory of any process, and labels.

    python tests/benchmarks/prediction.py [--work FOLDER] [--runs 2] [--trained FOLDER -i IMAGES]

Without --trained, nnU-Net's own planner and trainer make a 3d_fullres model, trained for a few steps on the made case,
so that most labels are decided. It shows time and memory; what reduced precision costs in Dice, only a model that was
trained in earnest can show. The case has CT and PET on the plan's spacing, so that nothing is resampled; its body fills
about half of it, or what --body says.

Both sides: the same weights (all folds), the same files, CPU, no mirroring. Runs alternate, and the fastest of each
counts. nnU-Net's network computes in float32, but its tiles are summed in float16: where two labels are nearly equal,
it may take the other one. `equal`: share of voxels with nnU-Net's label. Dice is against our fp32, over the cases.
--work is kept, with the model, the case and the label maps; rows left out by --rows are compared with those.
Needs the extra `peers`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import SimpleITK as sitk

DATASET, TRAINED_AS = "Dataset901_Benchmark", ("nnUNetTrainer", "nnUNetPlans", "3d_fullres")
LABELS = {"background": 0, "organ": 1, "lesion": 2}
PLAN_SPACING_MM = 2.0
THEIRS, EXACT = "nnU-Net", "fp32"
ROWS = {  # -> options of unicon_predict
    THEIRS: None,
    EXACT: ("--precision", "fp32", "--compute-air"),
    "bf16": ("--precision", "bf16", "--compute-air"),
    "bf16-no-air": ("--precision", "bf16"),
    "auto-no-air": (),
    "fast": ("--fast",),
}


def main() -> None:
    options = parse_options()
    with contextlib.ExitStack() as stack:
        work = (options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        prepare(work, options)
        machine = f"{os.cpu_count()} cores" if options.device == "cpu" else options.device
        print(f"nnU-Net {version('nnunetv2')}, torch {version('torch')}, {machine}")
        figures = {name: [] for name in options.rows}
        for _ in range(options.runs):
            for name in options.rows:
                figures[name].append(measured(row_command(name, work, options.device), work, work / "out" / name))
        print_table({name: best(runs) for name, runs in figures.items()}, work)
        print_agreement(work)
        print_start_up(work)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder to keep (default: a temporary one)")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS)[:4])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--trained", type=Path, help="nnU-Net's trained-model folder (with plans.json)")
    parser.add_argument("-i", "--images", type=Path, help="the cases for --trained")
    parser.add_argument("--no-evidence", action="store_true", help="import without --images: quicker, without --fast")
    sizes = parser.add_argument_group("made model and case, z y x")
    sizes.add_argument("--shape", type=int, nargs=3, default=[224, 250, 250])
    sizes.add_argument("--patch", type=int, nargs=3, default=[112, 128, 160])
    sizes.add_argument("--features", type=int, default=32, help="of the first stage; the last ones have 10 times these")
    sizes.add_argument("--steps", type=int, default=100, help="of training")
    sizes.add_argument("--spacing", type=float, nargs=3, default=[PLAN_SPACING_MM] * 3, help="of the case, in mm")
    sizes.add_argument("--body", type=float, nargs=3, default=[1.0, 0.7, 0.85], help="how much of each axis it takes")
    options = parser.parse_args()
    if (options.trained is None) != (options.images is None):
        parser.error("--trained and -i belong together.")
    if any(size < tile for size, tile in zip(options.shape, options.patch)):
        parser.error("--shape is smaller than --patch.")
    return options


def prepare(work: Path, options: argparse.Namespace) -> None:
    """The model of both sides and the images in `work`; what is there already stays."""
    if options.trained:
        made = [str(options.trained.resolve()), str(options.images.resolve())]
    else:
        made = [options.shape, options.patch, options.features, options.steps, options.spacing, options.body]
    made, settings = {"made": made, "evidence": not options.no_evidence}, work / "settings.json"
    work.mkdir(parents=True, exist_ok=True)
    if settings.exists() and json.loads(settings.read_text()) != made:
        raise SystemExit(f"{work} was made with other options: {settings.read_text()}. Choose another folder.")
    settings.write_text(json.dumps(made))
    trained, images, model = trained_folder(work), work / "images", work / "model"
    if options.trained:
        trained.parent.mkdir(parents=True, exist_ok=True)
        for link, folder in ((trained, options.trained), (images, options.images)):
            if not link.exists():
                link.symlink_to(folder.resolve(), target_is_directory=True)
    elif not (trained / "dataset.json").exists():
        make_case(work, options.shape, options.body, options.spacing)
        apart(make_model, work, options.patch, options.features, options.steps)
    if not (model / "model.json").exists():
        evidence = [] if options.no_evidence else ["--images", str(images)]
        command = [script("unicon_import"), "-c", str(trained), "-m", str(model), *evidence]
        print(f"imported in {measured(command, work, model)[0]:.0f} s", flush=True)
    for card in sorted(model.glob("tasks/*/card.json")):
        found = json.loads(card.read_text())
        for key in ("reduced_precision", "fast"):
            print(f"{key}: {found.get(key, 'not on the card')}")


def trained_folder(work: Path) -> Path:
    return work / "results" / DATASET / "__".join(TRAINED_AS)


def row_command(name: str, work: Path, device: str) -> list[str]:
    files = ["-i", str(work / "images"), "-o", str(work / "out" / name)]
    if name != THEIRS:
        return [script("unicon_predict"), *files, "-m", str(work / "model"), "--device", device, "--quiet", *ROWS[name]]
    trainer, plans, configuration = TRAINED_AS
    checkpoints = trained_folder(work).glob("fold_*/checkpoint_final.pth")
    folds = sorted({path.parent.name.removeprefix("fold_") for path in checkpoints} - {"all"}) or ["all"]
    model = ["-d", DATASET, "-tr", trainer, "-p", plans, "-c", configuration, "-f", *folds]
    how = ["-device", device, "--disable_tta", "-npp", "1", "-nps", "1", "--disable_progress_bar"]
    return [script("nnUNetv2_predict"), *files, *model, *how]


def script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def measured(command: list[str], work: Path, results: Path | None = None) -> tuple[float, float]:
    """Seconds of a command, and the largest resident memory (GB) of any of its processes; its results start empty."""
    if results is not None:
        shutil.rmtree(results, ignore_errors=True)
    return apart(_run, command, work)  # in a process whose children are this command's only


def apart(function: Callable, *arguments: object) -> object:
    """What a function gives in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _run(command: list[str], work: Path) -> tuple[float, float]:
    start = time.perf_counter()
    done = subprocess.run(command, env=os.environ | nnunet_folders(work), capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def nnunet_folders(work: Path) -> dict[str, str]:
    return {f"nnUNet_{name}": str(work / name) for name in ("raw", "preprocessed", "results")}


def best(runs: list[tuple[float, float]]) -> tuple[float, float]:
    seconds, gigabytes = zip(*runs)
    return min(seconds), min(gigabytes)


def print_table(figures: dict[str, tuple[float, float]], work: Path) -> None:
    print(f"{'':13}{'seconds':>9}{'GB':>7}{'times faster':>14}{'memory':>9}{'tiles':>7}{'of air':>8}")
    for name, (seconds, gigabytes) in figures.items():
        line = f"{name:13}{seconds:>9.1f}{gigabytes:>7.2f}"
        if THEIRS in figures:
            line += f"{figures[THEIRS][0] / seconds:>14.2f}{gigabytes / figures[THEIRS][1]:>9.0%}"
        else:
            line += f"{'':>23}"
        if name != THEIRS:
            cases = json.loads((work / "out" / name / "run.json").read_text())["cases"]
            for kind, width in (("tiles", 7), ("air_tiles", 8)):
                line += f"{sum(run[kind] for case in cases for run in case['done']):>{width}}"
        print(line)


def print_agreement(work: Path) -> None:
    maps = {name: label_maps(work / "out" / name) for name in ROWS}
    exact, theirs = maps[EXACT], maps[THEIRS]
    labels = sorted({int(value) for array in exact.values() for value in np.unique(array)} - {0})
    columns = "".join(f"{f'label {label}: mean, lowest':>27}" for label in labels)
    print(f"\n{'':13}{'equal':>11}{columns}   of Dice, n={len(exact)}")
    for name, found in maps.items():
        if not found:
            continue
        equal = [found[case] == theirs[case] for case in found if case in theirs]
        line = f"{name:13}{np.mean([same.mean() for same in equal]):>11.4%}" if equal else f"{name:13}{'':>11}"
        for label in labels:
            scores = [dice(found[case] == label, exact[case] == label) for case in exact]
            scores = [score for score in scores if score is not None]
            line += f"{f'{np.mean(scores):.4f}, {min(scores):.4f}':>27}"
        print(line)


def label_maps(folder: Path) -> dict[str, np.ndarray]:
    """Case -> its label map, of nnU-Net's folder or of the one task in ours."""
    files = [path for pattern in ("*.nii.gz", "*/*.nii.gz") for path in sorted(folder.glob(pattern))]
    return {path.name.removesuffix(".nii.gz"): sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in files}


def dice(a: np.ndarray, b: np.ndarray) -> float | None:
    """None where neither has anything."""
    both = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / both if both else None


def print_start_up(work: Path) -> None:
    seconds = [best([measured([script(name), "-h"], work) for _ in range(3)])[0]
               for name in ("nnUNetv2_predict", "unicon_predict")]  # fmt: skip
    print(f"\n-h: nnU-Net {seconds[0]:.2f} s, ours {seconds[1]:.2f} s")


def make_case(work: Path, shape: list[int], body: list[float], spacing_zyx_mm: list[float]) -> None:
    """A body of softly varying tissue with a few lesions; CT in HU (int16), PET in SUV (float32).

    As a training case on the plan's spacing, which nnU-Net takes from it, and as the case to predict on its own.
    """
    rng = np.random.default_rng(0)
    place = np.meshgrid(*(np.linspace(-1, 1, size, dtype=np.float32) for size in shape), indexing="ij", sparse=True)
    length, height, width = body
    inside = ((place[1] / height) ** 2 + (place[2] / width) ** 2 < 1) & (abs(place[0]) <= length)
    lesions = np.zeros(shape, bool)
    for centre, radius in zip(rng.uniform(-0.5, 0.5, (6, 3)) * body, rng.uniform(0.08, 0.2, 6)):
        lesions |= sum((axis - c) ** 2 for axis, c in zip(place, centre)) < radius**2
    noise = rng.standard_normal(shape, np.float32)
    tissue = 40 + 400 * np.cos(7 * place[0]) * np.cos(5 * place[1]) * np.cos(6 * place[2])
    ct = np.where(inside, tissue + 12 * noise, -1000 + 8 * noise).astype(np.int16)
    lesions &= inside
    pet = (np.where(inside, 0.8, 0.01) * np.exp(0.1 * noise[::-1]) + 6 * lesions).astype(np.float32)
    raw, plan_spacing = work / "raw" / DATASET, [PLAN_SPACING_MM] * 3
    write(raw / "labelsTr/case.nii.gz", inside + lesions.astype(np.uint8), plan_spacing)
    for channel, array in enumerate((ct, pet)):
        write(raw / f"imagesTr/case_{channel:04d}.nii.gz", array, plan_spacing)
        write(work / f"images/case_{channel:04d}.nii.gz", array, spacing_zyx_mm)
    description = {"channel_names": {"0": "CT", "1": "PET"}, "labels": LABELS, "numTraining": 1}
    (raw / "dataset.json").write_text(json.dumps(description | {"file_ending": ".nii.gz"}))


def write(path: Path, array_zyx: np.ndarray, spacing_zyx_mm: list[float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array_zyx)
    image.SetSpacing(spacing_zyx_mm[::-1])
    sitk.WriteImage(image, str(path), useCompression=True)


def make_model(work: Path, patch: list[int], features: int, steps: int) -> None:
    """In a process of its own: nnU-Net reads its folders from the environment when it is imported."""
    os.environ.update(nnunet_folders(work))
    import torch
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    configuration = TRAINED_AS[2]
    with contextlib.redirect_stdout(io.StringIO()):
        extract_fingerprints([int(DATASET[7:10])], num_processes=1, show_progress_bar=False)
        plans = plan(work, patch, features)
        dataset = json.loads((work / "raw" / DATASET / "dataset.json").read_text())
        torch.manual_seed(0)
        trainer = nnUNetTrainer({**plans, "continue_training": False}, configuration, 0, dataset, torch.device("cpu"))
        stored = Path(trainer.preprocessed_dataset_folder) / "case.b2nd"  # it only looks at the ending
        stored.parent.mkdir(parents=True, exist_ok=True)
        stored.touch()
        trainer.initialize()
        train(trainer, work, steps)
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    for name, content in (("plans.json", plans), ("dataset.json", dataset)):
        (Path(trainer.output_folder_base) / name).write_text(json.dumps(content))


def plan(work: Path, patch: list[int], features: int) -> dict:
    """nnU-Net's plan of the made dataset, with this patch and the layers that nnU-Net gives such a network."""
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    ExperimentPlanner(int(DATASET[7:10])).plan_experiment()
    plans = json.loads((work / "preprocessed" / DATASET / f"{TRAINED_AS[1]}.json").read_text())
    configuration = plans["configurations"][TRAINED_AS[2]]
    _, strides, kernels, padded, _ = get_pool_and_conv_props(configuration["spacing"], patch, 4, 999999)
    if list(padded) != list(patch):
        raise SystemExit(f"--patch {patch}: nnU-Net would make it {list(padded)}.")
    configuration["patch_size"] = list(patch)
    configuration["architecture"]["arch_kwargs"] |= {
        "n_stages": len(strides),
        "features_per_stage": [min(features * 2**stage, 10 * features) for stage in range(len(strides))],
        "strides": strides,
        "kernel_sizes": kernels,
        "n_conv_per_stage": [2] * len(strides),
        "n_conv_per_stage_decoder": [2] * (len(strides) - 1),
    }
    return plans


def train(trainer, work: Path, steps: int) -> None:
    """A little, on small crops around voxels of each label in turn."""
    import torch

    manager, raw, rng = trainer.configuration_manager, work / "raw" / DATASET, np.random.default_rng(0)
    images = sorted(str(path) for path in (raw / "imagesTr").iterdir())
    array, labels, _ = manager.preprocessor_class(verbose=False).run_case(
        images, str(raw / "labelsTr/case.nii.gz"), trainer.plans_manager, manager, trainer.dataset_json
    )
    strides = np.prod(manager.network_arch_init_kwargs["strides"], axis=0)
    crop = np.maximum(2 * strides, 32)
    optimizer = torch.optim.Adam(trainer.network.parameters(), 1e-3)
    of_label = [np.argwhere(labels[0] == label) for label in LABELS.values()]
    for step in range(steps):
        centre = rng.choice(of_label[step % len(of_label)])
        starts = np.clip(centre - crop // 2, 0, np.array(array.shape[1:]) - crop)
        here = tuple(slice(start, start + size) for start, size in zip(starts, crop))
        images_bczyx = torch.as_tensor(array[(slice(None), *here)])[None].float()
        wanted_bzyx = torch.as_tensor(labels[(0, *here)].astype(np.int64))[None].clamp(min=0)
        loss = torch.nn.functional.cross_entropy(trainer.network(images_bczyx)[0], wanted_bzyx)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
