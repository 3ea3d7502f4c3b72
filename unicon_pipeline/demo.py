"""The whole story on made phantoms: one foundation, two tasks added, every kind of input predicted and judged.

After each extension the earlier tasks predict the same cases again, and labels and probabilities are
compared file by file, bit by bit.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unicon_pipeline.budget import PRESETS
from unicon_pipeline.dataset import read_task
from unicon_pipeline.errors import UniconError
from unicon_pipeline.evaluate import evaluate
from unicon_pipeline.extend import extend
from unicon_pipeline.extension_plan import schedule_for
from unicon_pipeline.geometry import read_image, write_labels
from unicon_pipeline.input_shape import Overrides
from unicon_pipeline.metrics import Summary
from unicon_pipeline.model_folder import ModelFolder, open_or_create
from unicon_pipeline.model_record import ChainEntry
from unicon_pipeline.phantoms import case_seed, write_phantom_images, write_phantom_task
from unicon_pipeline.predict import predict_folder
from unicon_pipeline.preprocess import plan_and_preprocess
from unicon_pipeline.verify import verify

TASKS = {"Lesion_CT": ("CT",), "Lesion_CTPET": ("CT", "PET")}
INPUTS = {"CT only": ("CT",), "PET only": ("PET",), "CT and PET": ("CT", "PET")}


@dataclass(frozen=True)
class DemoSize:
    """How much is made and trained."""

    training_cases: int
    test_cases: int
    minutes: dict[str, float]


FULL = DemoSize(training_cases=24, test_cases=6, minutes={"Lesion_CT": 2.0, "Lesion_CTPET": 2.5})
QUICK = DemoSize(training_cases=6, test_cases=2, minutes={"Lesion_CT": 0.2, "Lesion_CTPET": 0.2})

# Minutes instead of an hour of training: smaller patches than planned and a higher rate than usual.
PATCH = Overrides(patch_shape_zyx=(32, 32, 32))
LEARNING_RATE = 3e-3


def run_demo(out: Path, quick: bool = False, seed: int = 0) -> int:
    """Runs the demonstration in `out` (new or empty) and prints its table.

    Returns:
        0 when every earlier task stayed identical and the model verifies, else 1.

    Raises:
        UniconError: `out` is not empty.
    """
    out = Path(out)
    if out.is_dir() and any(out.iterdir()):
        raise UniconError(f"{out} is not empty; give the demonstration a new folder with -o.")
    started, size = time.monotonic(), QUICK if quick else FULL
    demo = _Demo(out, size, seed)
    for task in TASKS:
        demo.add(task)
    rows = demo.evaluate()
    report = verify(demo.model)
    print(_table(demo, rows))
    print(f"\nunicon_verify: {'intact' if report.ok else '; '.join(report.problems)}")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes. Have a look: unicon_info -m {demo.model}")
    return 0 if report.ok and all(demo.identical.values()) else 1


class _Demo:
    def __init__(self, out: Path, size: DemoSize, seed: int):
        self.out, self.size, self.seed = out, size, seed
        self.work, self.model = out, out / "model"
        self.entries: dict[str, ChainEntry] = {}
        self.identical: dict[tuple[str, str], bool] = {}
        test_seeds = [case_seed(seed + 1_000_000, index) for index in range(size.test_cases)]
        for name, modalities in INPUTS.items():
            write_phantom_images(self._inputs(name), test_seeds, modalities, prefix="test")
        for task, modalities in TASKS.items():
            folder = write_phantom_task(
                self.work / "raw" / task, "lesions", size.training_cases, seed, modalities=modalities
            )
            images = folder / "imagesTs"
            held_out = write_phantom_images(images, test_seeds, modalities, channels=modalities, prefix="test")
            for case_id, phantom in held_out.items():
                lesions = phantom.lesions
                write_labels(folder / "labelsTs" / f"{case_id}.nii.gz", lesions.array_zyx, lesions.grid)
        self.foundation = open_or_create(self.model).chain.entries[0]

    def add(self, task: str) -> None:
        """Plans, extends by the task, predicts every input, and compares what the earlier tasks give now."""
        raw = self.work / "raw" / task
        spec = ModelFolder(self.model).spec()
        _, failed = plan_and_preprocess(raw, self.work, spec, PRESETS["cpu"], overrides=PATCH)
        if failed:
            raise UniconError(f"The demonstration's own phantoms failed: {failed}")
        schedule = dataclasses.replace(schedule_for(self.size.minutes[task], None), learning_rate=LEARNING_RATE)
        self.entries[task] = extend(raw, self.work, self.model, schedule=schedule, seed=self.seed).entry
        earlier = [name for name in self.entries if name != task]
        for name in INPUTS:
            predict_folder(self._inputs(name), self._predictions(name, task), self.model, save_probabilities=True)
        for old in earlier:
            self.identical[old, task] = all(
                _same_files(self._predictions(name, old) / old, self._predictions(name, task) / old)
                for name in INPUTS
            )

    def evaluate(self) -> list[tuple[str, str, Summary]]:
        """(task, input, Dice over the test cases) for each combination that the task accepts."""
        rows, last = [], list(TASKS)[-1]
        for task in TASKS:
            description = read_task(self.work / "raw" / task)
            for name in INPUTS:
                predictions = self._predictions(name, last) / task
                if any(predictions.glob("*.nii.gz")):
                    rows.append((task, name, evaluate(description, predictions, resample=True).overall["dice"]))
        return rows

    def _inputs(self, name: str) -> Path:
        return self.out / "inputs" / name.replace(" ", "_")

    def _predictions(self, name: str, after: str) -> Path:
        return self.out / "predictions" / f"after_{after}" / name.replace(" ", "_")


def _same_files(before: Path, after: Path) -> bool:
    """Whether both folders hold the same label maps and probabilities, voxel by voxel, bit by bit."""
    old = {path.relative_to(before) for path in before.rglob("*.nii.gz")}
    new = {path.relative_to(after) for path in after.rglob("*.nii.gz")}
    return old == new and all(
        np.array_equal(read_image(before / name).array_zyx, read_image(after / name).array_zyx) for name in old
    )


def _table(demo: _Demo, rows: Sequence[tuple[str, str, Summary]]) -> str:
    lines = [f"{'task':<14}{'input':<13}{'Dice (95 % interval, n)':<30}{'trained':>10}{'added':>10}  identical since"]
    lines.append(f"{'foundation':<14}{'':<43}{'':>10}{demo.foundation.added_bytes / 1e6:>7.1f} MB")
    for task, name, dice in rows:
        first = name == next(n for t, n, _ in rows if t == task)
        entry = demo.entries[task]
        figures = f"{entry.trained_parameters:>10,}{entry.added_bytes / 1e6:>7.1f} MB" if first else " " * 20
        kept = [f"{new}: {'yes' if same else 'NO'}" for (old, new), same in demo.identical.items() if old == task]
        shown = f"{dice.mean:.3f} ({dice.low:.3f} to {dice.high:.3f}, n={dice.n})" if dice.n > 1 else f"n={dice.n}"
        lines.append(f"{task:<14}{name:<13}{shown:<30}{figures}  {', '.join(kept) if first else ''}".rstrip())
    return "\n".join(lines)
