"""What one large CT+PET case takes to be preprocessed: seconds, and the process's largest resident memory.

    python tests/benchmarks/large_case.py [--shape 1000 512 512] [--ending .nii.gz]

A made case of that shape (z, y, x; 1 mm; CT int16, PET float32, labels uint8, hardly any air to crop) is fingerprinted
and preprocessed, from its files to the store, in a fresh process each time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from unicon_pipeline.budget import Machine
from unicon_pipeline.input_shape import Overrides
from unicon_pipeline.model_record import foundation_spec
from unicon_pipeline.preprocess import plan_and_preprocess

PET_VOXEL_MM = 4.0
PATCH_ZYX = (128, 128, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(1000, 512, 512), metavar=("Z", "Y", "X"))
    parser.add_argument("--ending", choices=(".nii", ".nii.gz"), default=".nii.gz")
    options = parser.parse_args()
    print(f"{'PET grid':10}{'spacing':>9}{'seconds':>9}{'GB':>7}")
    for own_grid in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            make_case(Path(folder) / "raw", tuple(options.shape), own_grid, options.ending)
            for spacing_mm in (1.0, 1.5):
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    seconds, gigabytes = pool.submit(preprocessed, Path(folder), spacing_mm).result()
                name = "its own" if own_grid else "the CT's"
                print(f"{name:10}{'kept' if spacing_mm == 1 else spacing_mm:>9}{seconds:>9.1f}{gigabytes:>7.2f}")


def preprocessed(folder: Path, spacing_mm: float) -> tuple[float, float]:
    """Seconds, and the largest resident memory of this process in GB."""
    spec = foundation_spec(folder / "no_model")
    start = time.perf_counter()
    overrides = Overrides((spacing_mm,) * 3, PATCH_ZYX)
    machine = Machine(24.0, False, "benchmark")
    work = folder / f"work_{spacing_mm}"
    _, failed = plan_and_preprocess(folder / "raw", work, spec, machine, overrides=overrides, processes=1)
    seconds = time.perf_counter() - start
    if failed:
        raise RuntimeError(f"The case could not be preprocessed: {failed}")
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def make_case(folder: Path, shape_zyx: tuple[int, int, int], own_grid: bool, ending: str) -> None:
    """A body nearly as wide as the image, with noise that repeats every few planes, and some lesions."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    planes, height, width = shape_zyx
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    body = y**2 + x**2 < 0.97
    noise = rng.normal(0, 20, (8, height, width))
    tissue = np.where(body, 40 + noise, -1000 + noise / 2).astype(np.int16)
    labels = np.zeros(shape_zyx, np.uint8)
    for z, row, column in rng.uniform(0.2, 0.8, (12, 3)) * shape_zyx:
        radius = int(min(shape_zyx) * 0.06)
        box = tuple(slice(int(centre) - radius, int(centre) + radius) for centre in (z, row, column))
        distance = sum(axis**2 for axis in np.ogrid[-radius:radius, -radius:radius, -radius:radius])
        labels[box][distance < radius**2] = 1
    write(folder / f"imagesTr/case_0000{ending}", tissue[np.arange(planes) % 8], (1.0, 1.0, 1.0))
    write(folder / f"labelsTr/case{ending}", labels, (1.0, 1.0, 1.0))
    step = round(PET_VOXEL_MM) if own_grid else 1
    uptake = np.where(body, 1 + noise / 60, 0.01).astype(np.float32)[np.arange(planes) % 8][::step, ::step, ::step]
    uptake += 6 * labels[::step, ::step, ::step]
    write(folder / f"imagesTr/case_0001{ending}", uptake, (float(step),) * 3)
    description = {
        "channel_names": {"0": "CT", "1": "PET"},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": 1,
        "file_ending": ending,
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def write(path: Path, array_zyx: np.ndarray, spacing_zyx_mm: tuple[float, float, float]) -> None:
    image = sitk.GetImageFromArray(array_zyx)
    image.SetSpacing(spacing_zyx_mm[::-1])
    sitk.WriteImage(image, str(path), useCompression=True, compressionLevel=1)


if __name__ == "__main__":
    main()
