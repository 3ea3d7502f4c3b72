"""What prediction costs: seconds and memory of `unicon_predict` against volume, number of classes and number of tasks.

    python tests/benchmarks/cost_curves.py [--precision bf16] [--plot curves.png]

Tasks of random weights on the embedded foundation, all prepared alike, label a made CT. Each figure is a fresh process,
start-up and reading included, and its largest resident memory; of several --runs, the least. `tiles`: of the sliding
window, of all tasks; those of nothing but air are left out. `of n runs`: against as many runs of one task each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import SimpleITK as sitk

# Nothing here imports torch: the memory of what starts a process would count as that of the process.

SIZES = ((128, 128, 128), (200, 256, 256), (300, 400, 400), (400, 512, 512))
BACKGROUND_BIAS = 1.5  # of random logits; most voxels are background then, as with trained weights
Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Cost:
    """`at`: the number of voxels, classes or tasks."""

    at: int
    name: str
    seconds: float
    gigabytes: float
    tiles: int


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options)
        volume = print_table("voxels", (bench.volume(size) for size in options.sizes))
        classes = print_table("classes", (bench.classes(number) for number in options.classes))
        tasks = print_table("tasks", (bench.tasks(number) for number in options.tasks), of_runs=True)
    if options.plot:
        plot(options.plot, {"million voxels": volume, "classes": classes, "tasks": tasks})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=shape, nargs="+", default=SIZES, metavar="ZxYxX", help="volumes to predict")
    parser.add_argument("--classes", type=int, nargs="+", default=(2, 20, 100), help="labels without background")
    parser.add_argument("--tasks", type=int, nargs="+", default=(1, 2, 5, 10), help="of one model folder")
    parser.add_argument("--shape", type=shape, default=SIZES[1], metavar="ZxYxX", help="for --classes and --tasks")
    parser.add_argument("--labels", type=int, default=2, help="number of classes for --sizes and --tasks")
    parser.add_argument("--spacing", type=float, nargs=3, default=(1.5, 0.8, 0.8), help="of the volumes, z y x, mm")
    parser.add_argument("--plan-spacing", type=float, nargs=3, default=(1.5, 1.5, 1.5), help="of the network")
    parser.add_argument("--patch", type=shape, default=(96, 96, 96), metavar="ZxYxX")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also as a figure; needs matplotlib")
    return parser.parse_args()


def shape(text: str) -> Shape:
    z, y, x = (int(size) for size in text.split("x"))
    return z, y, x


class Bench:
    """The models, made at the start, the volumes, made when they are needed, and the runs."""

    def __init__(self, work: Path, options: argparse.Namespace):
        self.work, self.options = work, options
        most = {number: 1 for number in options.classes} | {options.labels: max(options.tasks)}
        apart(make_models, work, most, options.patch, tuple(options.plan_spacing))

    def volume(self, size: Shape) -> Cost:
        name = f"{' x '.join(map(str, size))}: {math.prod(size) / 1e6:.1f} M"
        return self._cost(math.prod(size), name, size, self.options.labels, 1)

    def classes(self, number: int) -> Cost:
        return self._cost(number, str(number), self.options.shape, number, 1)

    def tasks(self, number: int) -> Cost:
        return self._cost(number, str(number), self.options.shape, self.options.labels, number)

    def _cost(self, at: int, name: str, size: Shape, classes: int, tasks: int) -> Cost:
        """Of a volume, predicted by so many tasks of so many classes each."""
        image, out = self.work / f"{'x'.join(map(str, size))}.nii.gz", self.work / "out"
        if not image.exists():
            apart(make_volume, image, size, self.options.spacing)
        names = [task_name(number) for number in range(tasks)]
        command = [
            *(script("unicon_predict"), "-i", str(image), "-o", str(out), "-m", str(model_folder(self.work, classes))),
            *("--device", self.options.device, "--precision", self.options.precision, "--quiet", "-t", *names),
        ]
        runs = [measured(command, out) for _ in range(self.options.runs)]
        seconds, gigabytes = (min(values) for values in zip(*runs))
        (case,) = json.loads((out / "run.json").read_text())["cases"]
        return Cost(at, name, seconds, gigabytes, sum(run["tiles"] for run in case["done"]))


def task_name(number: int) -> str:
    return f"Task{number + 1}"


def model_folder(work: Path, classes: int) -> Path:
    return work / f"model_{classes}"


def script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def apart(function: Callable, *arguments: object) -> object:
    """What a function gives in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measured(command: list[str], results: Path) -> tuple[float, float]:
    """Seconds of a command, and the largest resident memory (GB) of any of its processes; its results start empty."""
    shutil.rmtree(results, ignore_errors=True)
    return apart(run, command)  # in a process whose children are this command's only


def run(command: list[str]) -> tuple[float, float]:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def make_volume(path: Path, size: Shape, spacing_zyx_mm: Sequence[float]) -> None:
    """A CT of a body that fills 0.6 of the volume, with noise that repeats every few planes."""
    rng = np.random.default_rng(0)
    planes, height, width = size
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    noise = rng.normal(0, 20, (16, height, width))
    tissue = np.where((y / 0.85) ** 2 + (x / 0.9) ** 2 < 1, 40 + noise, -1000 + noise / 2).astype(np.int16)
    image = sitk.GetImageFromArray(tissue[np.arange(planes) % 16])
    image.SetSpacing(tuple(spacing_zyx_mm)[::-1])
    sitk.WriteImage(image, str(path), useCompression=True, compressionLevel=1)


def make_models(work: Path, most: dict[int, int], patch: Shape, spacing_zyx_mm: tuple[float, float, float]) -> None:
    """A model folder for each number of classes (-> tasks in it); made phantoms are planned for all of them."""
    from unicon_pipeline.budget import Machine
    from unicon_pipeline.input_shape import Overrides
    from unicon_pipeline.label_spec import Labels
    from unicon_pipeline.model_record import foundation_spec
    from unicon_pipeline.phantoms import write_phantom_task
    from unicon_pipeline.preprocess import plan_and_preprocess

    raw = write_phantom_task(work / "raw/Phantoms", "lesions", 2, 0, shape_zyx=(32, 48, 48), spacing_zyx_mm=(10, 8, 8))
    machine, overrides = Machine(64.0, False, "benchmark"), Overrides(spacing_zyx_mm, patch)
    spec = foundation_spec(work / "none")
    plan, _ = plan_and_preprocess(raw, work, spec, machine, overrides=overrides, processes=1)
    for classes, tasks in most.items():
        values = tuple(range(1, classes + 1))
        labels = Labels(tuple(f"class{n}" for n in values), tuple((n,) for n in values), False, values, None)
        add_tasks(model_folder(work, classes), dataclasses.replace(plan, labels=labels), tasks)


def add_tasks(folder: Path, plan, tasks: int) -> None:
    """A model on the embedded foundation, extended without training."""
    import torch

    from unicon_pipeline.extension_plan import plan_extension, schedule_for
    from unicon_pipeline.model import build_task_model
    from unicon_pipeline.model_folder import open_or_create
    from unicon_pipeline.model_record import TaskPlan

    model = open_or_create(folder)
    foundation = model.foundation()
    for number in range(tasks):
        torch.manual_seed(number)
        own = dataclasses.replace(plan, task=task_name(number))
        extension = plan_extension(own, model.spec(), {}, ("case",), schedule_for(None, 1), "all", seed=number)
        network = build_task_model(extension, foundation, {})
        with torch.no_grad():
            for parameter in network.adapter.parameters():  # else they would add nothing, and all be alike
                parameter.add_(0.01 * torch.randn_like(parameter))
            for layer in network.last_layers():
                layer.bias[0] += BACKGROUND_BIAS
        model.add_task(TaskPlan(own, extension), network, {})


def print_table(what: str, costs: Iterable[Cost], of_runs: bool = False) -> list[Cost]:
    """Each row as soon as it is known; all of them then."""
    print(f"\n{what:26}{'seconds':>9}{'GB':>7}{'tiles':>7}" + (f"{'of n runs':>11}" if of_runs else ""))
    rows: list[Cost] = []
    for cost in costs:
        rows.append(cost)
        line = f"{cost.name:26}{cost.seconds:>9.1f}{cost.gigabytes:>7.2f}{cost.tiles:>7}"
        if of_runs and rows[0].at == 1:
            line += f"{cost.seconds / (cost.at * rows[0].seconds):>11.0%}"
        print(line, flush=True)
    return rows


def plot(path: Path, curves: dict[str, list[Cost]]) -> None:
    """One panel a curve: seconds on the left axis, GB on the right one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(curves), figsize=(4 * len(curves), 3.2), layout="constrained")
    for panel, (what, costs) in zip(panels, curves.items()):
        at = [cost.at / 1e6 if what == "million voxels" else cost.at for cost in costs]
        seconds, gigabytes = [cost.seconds for cost in costs], [cost.gigabytes for cost in costs]
        memory = panel.twinx()
        lines = [
            *panel.plot(at, seconds, "o-", color="tab:blue", label="seconds"),
            *memory.plot(at, gigabytes, "s--", color="tab:orange", label="GB"),
        ]
        panel.set(xlabel=what, ylabel="seconds", xlim=(0, 1.1 * max(at)), ylim=(0, 1.2 * max(seconds)))
        memory.set(ylabel="peak memory, GB", ylim=(0, 1.2 * max(gigabytes)))
        panel.legend(handles=lines, loc="lower right")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
