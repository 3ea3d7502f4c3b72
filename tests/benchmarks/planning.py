"""Planning and preprocessing against nnU-Net's: wall time, and the largest resident memory of any process.

    python tests/benchmarks/planning.py [-i TASK_FOLDER] [--processes 2] [--runs 2]

Without -i: four made CT+PET cases of 20 million voxels. Channels on other grids are first brought onto the grid of
channel 0 for both sides, because nnU-Net refuses them. Both get the spacing that nnU-Net plans; runs alternate, and the
fastest of each side counts. Both check the dataset, ours always and nnU-Net by its flag; `--unchecked` leaves the flag
out. Needs the extra `peers`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk

NUMBER, NAME = 901, "Dataset901_Benchmark"
CASE_SHAPES_ZYX = ((200, 320, 320), (180, 340, 330), (220, 300, 310), (190, 330, 320))
CASE_SPACINGS_ZYX_MM = ((2.0, 1.2, 1.2), (2.5, 1.1, 1.1), (2.0, 1.4, 1.4), (3.0, 1.2, 1.2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", "--input", type=Path, help="a task folder (nnU-Net raw dataset)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--unchecked", action="store_true", help="nnU-Net without its dataset check")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        raw = work / "raw" / NAME
        cases = copy_on_one_grid(options.input, raw) if options.input else make_cases(raw)
        print(f"{cases} cases, {options.processes} processes")
        print(f"{'run':5}{'nnU-Net s':>11}{'GB':>7}{'ours s':>9}{'GB':>7}{'times faster':>14}{'memory':>9}")
        theirs, ours = [], []
        for run in range(options.runs):
            theirs.append(measured(nnunet_command(options.processes, not options.unchecked), work, work / "nnunet"))
            ours.append(measured(our_command(work, options.processes), work, work / "preprocessed"))
            print_row(str(run + 1), theirs[-1], ours[-1])
        print_row("best", *(tuple(min(values) for values in zip(*side, strict=True)) for side in (theirs, ours)))


def print_row(name: str, theirs: tuple[float, float], ours: tuple[float, float]) -> None:
    print(
        f"{name:5}{theirs[0]:>11.1f}{theirs[1]:>7.2f}{ours[0]:>9.1f}{ours[1]:>7.2f}"
        f"{theirs[0] / ours[0]:>14.1f}{ours[1] / theirs[1]:>9.0%}"
    )


def nnunet_command(processes: int, checked: bool) -> list[str]:
    script = Path(sys.executable).with_name("nnUNetv2_plan_and_preprocess")
    many = str(processes)
    command = [str(script), "-d", str(NUMBER), "-c", "3d_fullres", "-npfp", many, "-np", many]
    return [*command, "--verify_dataset_integrity"] if checked else command


def our_command(work: Path, processes: int) -> list[str]:
    plans = json.loads((work / "nnunet" / NAME / "nnUNetPlans.json").read_text())
    spacing = np.array(plans["configurations"]["3d_fullres"]["spacing"])[plans["transpose_backward"]]
    script = Path(sys.executable).with_name("unicon_plan_and_preprocess")
    arguments = ["-t", NAME, "-w", str(work), "-m", str(work / "none"), "--processes", str(processes), "--quiet"]
    return [str(script), *arguments, "--spacing", *map(str, spacing)]


def measured(command: list[str], work: Path, results: Path) -> tuple[float, float]:
    """Seconds of a command, and the largest resident memory (GB) of any of its processes; its results start empty."""
    shutil.rmtree(results, ignore_errors=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process whose children are this command's only
        return pool.apply(_run, (command, work))


def _run(command: list[str], work: Path) -> tuple[float, float]:
    folders = {f"nnUNet_{name}": str(work / place) for name, place in
               (("raw", "raw"), ("preprocessed", "nnunet"), ("results", "results"))}  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, env=os.environ | folders, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def copy_on_one_grid(source: Path, raw: Path) -> int:
    description = json.loads((source / "dataset.json").read_text())
    ending = description["file_ending"]
    (raw / "imagesTr").mkdir(parents=True)
    shutil.copytree(source / "labelsTr", raw / "labelsTr")
    first = sorted((source / "imagesTr").glob(f"*_0000{ending}"))
    for path in first:
        shutil.copy(path, raw / "imagesTr")
        reference = sitk.ReadImage(str(path))
        for number in range(1, len(description["channel_names"])):
            name = path.name.replace("_0000", f"_{number:04d}")
            image = sitk.ReadImage(str(path.with_name(name)))
            on_grid = sitk.Resample(image, reference, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkFloat32)
            sitk.WriteImage(on_grid, str(raw / "imagesTr" / name), useCompression=True)
    describe(raw, description["channel_names"], description["labels"], len(first))
    return len(first)


def make_cases(raw: Path) -> int:
    """A body of soft tissue and bone with a few lesions; CT in HU (int16), PET in SUV (float32) on the CT's grid."""
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    for number, (shape, spacing) in enumerate(zip(CASE_SHAPES_ZYX, CASE_SPACINGS_ZYX_MM, strict=True)):
        rng = np.random.default_rng(number)
        place = np.meshgrid(*(np.linspace(-1, 1, size, dtype=np.float32) for size in shape), indexing="ij", sparse=True)
        body = (place[1] / 0.7) ** 2 + (place[2] / 0.85) ** 2 < 1
        labels = np.zeros(shape, np.uint8)
        for centre, radius in zip(rng.uniform(-0.5, 0.5, (6, 3)), rng.uniform(0.04, 0.15, 6), strict=True):
            labels[sum((axis - c) ** 2 for axis, c in zip(place, centre, strict=True)) < radius**2] = 1
        noise = rng.standard_normal(shape, np.float32)
        ct = np.where(body, 40 + 12 * noise, -1000 + 8 * noise)
        pet = np.where(body, 0.8, 0.01) * np.exp(0.2 * noise[::-1]) + 6 * labels
        for name, array in (("imagesTr/case{}_0000", ct.astype(np.int16)), ("imagesTr/case{}_0001", pet),
                            ("labelsTr/case{}", labels * body)):  # fmt: skip
            image = sitk.GetImageFromArray(array.astype(np.float32) if array.dtype == np.float64 else array)
            image.SetSpacing(spacing[::-1])
            sitk.WriteImage(image, str(raw / f"{name.format(number)}.nii.gz"), useCompression=True)
    describe(raw, {"0": "CT", "1": "PET"}, {"background": 0, "lesion": 1}, len(CASE_SHAPES_ZYX))
    return len(CASE_SHAPES_ZYX)


def describe(raw: Path, channels: dict[str, str], labels: dict[str, int], cases: int) -> None:
    description = {"channel_names": channels, "labels": labels, "numTraining": cases, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(description))


if __name__ == "__main__":
    main()
