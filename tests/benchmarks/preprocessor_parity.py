"""The same plan through nnU-Net's DefaultPreprocessor and through ours: how far the arrays are apart.

    python tests/benchmarks/preprocessor_parity.py RAW PLANS [--cases 8] [--spacing Z,Y,X ...]

RAW is an nnU-Net raw dataset of which all channels of a case lie on one grid, PLANS the `nnUNetPlans.json` that nnU-Net
made for it (3d_fullres). Both sides read each case from its files and prepare it: first with the plan's own spacing,
then with each given one in its place (default 3,2,2 and 2,1.5,1.5 mm), so that images and labels are resampled.

Images: largest and mean difference over all channels, in units of the normalised image (its standard deviation is
about 1), and the largest as a share of the image's range. Labels: the share of equal voxels. nnU-Net crops to the
non-zero voxels and marks background outside of their mask as -1, for its training; here that counts as background.
Ours widens the crop where labels would be cut off; a case of which the shapes differ for that reason is named.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from unicon_pipeline.dataset import Case, Task, check_labels, read_task
from unicon_pipeline.families.nnunet_plans import read_configuration
from unicon_pipeline.imported import ImportOptions
from unicon_pipeline.intensity import read_in_units
from unicon_pipeline.model_record import EMBEDDED, ModelRecord
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.prepare import prepare_case
from unicon_pipeline.records import read_json

CONFIGURATION = "3d_fullres"
SPACINGS = ((3.0, 2.0, 2.0), (2.0, 1.5, 1.5))


@dataclass(frozen=True)
class Differences:
    """One case: of the images, `largest`, `mean` and `share` of the range; of the labels, how many are `equal`."""

    largest: float
    mean: float
    share: float
    equal: float
    seconds: tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("plans", type=Path)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--spacing", type=_spacing, action="append")
    options = parser.parse_args()
    task, plans = read_task(options.raw), read_json(options.plans)
    plan = _our_plan(options.plans, options.raw / "dataset.json")
    found = []
    print(f"{'case':12}{'spacing zyx mm':>20}{'largest':>10}{'mean':>10}{'of range':>10}{'labels equal':>14}{'s':>12}")
    for spacing in (plan.spacing_zyx_mm, *(options.spacing or SPACINGS)):
        plans["configurations"][CONFIGURATION]["spacing"] = list(spacing)
        for case in task.cases[: options.cases]:
            result = _compare(task, case, plans, replace(plan, spacing_zyx_mm=spacing))
            print(f"{case.case_id:12}{' x '.join(f'{value:.2f}' for value in spacing):>20}", end="")
            if result is None:
                print("  another crop")
                continue
            found.append(result)
            theirs, ours = result.seconds
            print(
                f"{result.largest:>10.1e}{result.mean:>10.1e}{result.share:>10.1e}{result.equal:>14.6%}"
                f"{theirs:>6.2f}/{ours:.2f}"
            )
    theirs, ours = np.sum([result.seconds for result in found], axis=0)
    print(
        f"{len(found)} comparisons: largest difference {max(result.largest for result in found):.1e}, "
        f"{max(result.share for result in found):.1e} of the range, mean {np.mean([one.mean for one in found]):.1e}; "
        f"labels equal {min(result.equal for result in found):.6%} at least; "
        f"nnU-Net took {theirs / ours:.1f} times as long"
    )


def _spacing(text: str) -> tuple[float, float, float]:
    z, y, x = (float(value) for value in text.split(","))
    return z, y, x


def _our_plan(plans: Path, dataset: Path) -> DataPlan:
    """What an imported model of these plans would treat images by."""
    configuration = read_configuration(plans, dataset, CONFIGURATION, ImportOptions())
    spec = ModelRecord(EMBEDDED).spec()
    contract = replace(
        spec.input,
        modalities=configuration.modalities,
        orientation=configuration.orientation,
        spacing_zyx_mm=configuration.spacing_zyx_mm,
        intensity=configuration.intensity,
    )
    return configuration.data_plan(replace(spec, input=contract), mirror_axes=(0, 1, 2))


def _compare(task: Task, case: Case, plans: dict, plan: DataPlan) -> Differences | None:
    """None where the two crops differ."""
    started = time.perf_counter()
    manager = PlansManager(plans)
    files = [str(path) for path in case.images.values()]
    description = read_json(task.folder / "dataset.json")
    theirs, segmentation, _ = DefaultPreprocessor(verbose=False).run_case(
        files, str(case.labels), manager, manager.get_configuration(CONFIGURATION), description
    )
    middle = time.perf_counter()
    images = read_in_units(case)
    labels = check_labels(case, next(iter(images.values())).grid, task.labels)
    ours = prepare_case(images, plan, labels)
    seconds = (middle - started, time.perf_counter() - middle)
    if ours.array_czyx.shape != theirs.shape:
        return None
    difference = np.abs(ours.array_czyx - theirs)
    span = np.ptp(theirs.reshape(len(theirs), -1), axis=1)
    return Differences(
        largest=float(difference.max()),
        mean=float(difference.mean(dtype=np.float64)),
        share=float((difference.reshape(len(span), -1).max(axis=1) / span).max()),
        equal=float((ours.labels_zyx == np.maximum(segmentation[0], 0)).mean()),
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
