"""Prognosis on phantoms whose hazard is known: how near to the oracle, what the risk follows, and nothing from nothing.

    python tests/benchmarks/prognosis_phantoms.py [-n 200] [--loss mtlr] [-m MODEL] [--work FOLDER]

The oracle knows the log hazard that drew each time. What is trained sees CT, PET, the lesions' mask and the clinical
table with its gaps; every figure is of out-of-fold predictions, the mean over the repeats. The slopes are of a linear
regression of the risk on what made the hazard, in standard deviations of both. For the last rows, the outcomes are
dealt out to other patients: the interval should hold 0.5.
Without -m: the embedded foundation. --work is kept, and its phantoms are used again.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from unicon_pipeline.budget import PRESETS
from unicon_pipeline.case_extend import CaseExtendResult, extend_case
from unicon_pipeline.case_plan import CaseOptions
from unicon_pipeline.model_record import foundation_spec
from unicon_pipeline.phantom_scene import Scene, draw_scene
from unicon_pipeline.phantoms import MODALITIES, case_seed, write_phantom_task
from unicon_pipeline.preprocess import plan_and_preprocess
from unicon_pipeline.survival_metrics import Censoring, SurvivalScore, survival_scores

TASK = "Phantom_EFS"
NEAR = 0.03  # of the oracle's C-index
STAGES = {"I": 1.0, "II": 2.0, "III": 3.0, "IV": 4.0}
RESAMPLES = 1000


def main() -> None:
    options = parse_options()
    with contextlib.ExitStack() as stack:
        work = (options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        scenes = prepare(work, options)
        targets = np.array([[scene.time_days, scene.event] for scene in scenes])
        oracle = np.array([scene.log_hazard for scene in scenes])
        events = int(targets[:, 1].sum())
        print(f"{len(scenes)} phantoms, {events} events; {options.loss}, {options.repeats} x 5 folds\n")
        print(f"{'':24}{'Harrell C':>10}  95 % interval")
        best = print_row("oracle", score_of(targets, oracle))
        started = time.perf_counter()
        result = trained(work, options, targets)
        seconds, risk = time.perf_counter() - started, risks(work)
        own = print_row("trained", score_of(targets, risk))
        for name, scores in result.validation["models"].items():
            if name != "model":
                print_row(f"baseline {name}", SurvivalScore(**scores["harrell_c"]))
        print(f"oracle - trained {best - own:+.3f}: {'within' if best - own <= NEAR else 'NOT within'} {NEAR}")
        print(f"{result.validation['verdict']}\n{seconds:.0f} s for the extension\n")
        print_slopes(scenes, risk, oracle)
        print(f"\n{'outcomes of others':24}{'Harrell C':>10}  95 % interval")
        for number in range(options.shuffles):
            dealt = np.random.default_rng([options.seed, number]).permutation(targets)
            trained(work, options, dealt)
            score = score_of(dealt, risks(work))
            print_row(f"shuffled {number + 1}", score)
            print(f"{'':24}{'holds 0.5' if score.low <= 0.5 <= score.high else 'does NOT hold 0.5'}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=200, help="phantoms")
    parser.add_argument("-m", "--model", type=Path, help="the model to extend; it is copied")
    parser.add_argument("--work", type=Path, help="kept; for phantoms of one -n and --seed")
    parser.add_argument("--loss", default="mtlr")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shuffles", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def prepare(work: Path, options: argparse.Namespace) -> list[Scene]:
    """Writes and preprocesses the phantoms; returns what is in them."""
    folder = work / "raw" / TASK
    if not (folder / "dataset.json").exists():  # written last
        write_phantom_task(folder, "survival", options.n, options.seed, modalities=MODALITIES, region="Phantom_Lesions")
    scenes = [draw_scene(case_seed(options.seed, number)) for number in range(options.n)]
    # A run that was cut may have left the outcomes of others.
    write_targets(folder, np.array([[scene.time_days, scene.event] for scene in scenes]))
    spec = foundation_spec(options.model or work / "none")
    _, failed = plan_and_preprocess(folder, work, spec, PRESETS["cpu"])
    if failed:
        raise RuntimeError(f"{len(failed)} phantoms could not be preprocessed: {failed}")
    return scenes


def trained(work: Path, options: argparse.Namespace, targets: np.ndarray) -> CaseExtendResult:
    """Extends a fresh model by the task with these outcomes; out-of-fold predictions lie in `work` afterwards."""
    folder = work / "raw" / TASK
    write_targets(folder, targets)
    with tempfile.TemporaryDirectory(dir=work) as place:
        model = Path(place) / "model"
        if options.model:
            shutil.copytree(options.model, model)
        chosen = CaseOptions(loss=options.loss, repeats=options.repeats)
        return extend_case(folder, work, model, options=chosen, seed=options.seed)


def write_targets(folder: Path, targets: np.ndarray) -> None:
    rows = [f"{case_id(number)},{time_days},{event:.0f}\n" for number, (time_days, event) in enumerate(targets)]
    (folder / "targets.csv").write_text("case_id,time_days,event\n" + "".join(rows), encoding="utf-8")


def case_id(number: int) -> str:
    return f"phantom_{number + 1:04d}"


def risks(work: Path) -> np.ndarray:
    """(n,), higher = earlier event."""
    with open(work / "preprocessed" / TASK / "out_of_fold.csv", newline="", encoding="utf-8") as file:
        found = {row["case_id"]: float(row["risk"]) for row in csv.DictReader(file)}
    return np.array([found[case_id(number)] for number in range(len(found))])


def score_of(targets: np.ndarray, risk: np.ndarray) -> SurvivalScore:
    times, seen = targets.T
    return survival_scores(times, seen, risk, Censoring.fit(times, seen), resamples=RESAMPLES).scores["harrell_c"]


def print_row(name: str, score: SurvivalScore) -> float:
    interval = score.remark if score.low is None else f"{score.low:.3f} to {score.high:.3f}"
    print(f"{name:24}{score.value:>10.3f}  {interval}", flush=True)
    return score.value


def print_slopes(scenes: list[Scene], risk: np.ndarray, oracle: np.ndarray) -> None:
    """What the risk follows, each with the others held constant."""
    columns = {
        "log volume": [np.log(sum(lesion.volume_ml for lesion in scene.lesions)) for scene in scenes],
        "log SUV": [np.log(max(lesion.suv for lesion in scene.lesions)) for scene in scenes],
        "age": filled([scene.clinical["age"] for scene in scenes]),
        "male": [float(scene.clinical["sex"] == "M") for scene in scenes],
        "stage": filled([STAGES.get(scene.clinical["stage"]) for scene in scenes]),
    }
    x = np.array(list(columns.values())).T
    generator = np.random.default_rng(0)
    draws = [generator.integers(len(x), size=len(x)) for _ in range(RESAMPLES)]
    own, truth = slopes(x, risk), slopes(x, oracle)
    low, high = np.quantile([slopes(x[rows], risk[rows]) for rows in draws], (0.025, 0.975), axis=0)
    print(f"{'the risk rises with':24}{'trained':>10}  {'95 % interval':18}{'oracle':>8}")
    for name, *figures in zip(columns, own, low, high, truth, strict=True):
        slope, bottom, top, wanted = figures
        told = "" if bottom > 0 else "  NOT shown to rise"
        print(f"{name:24}{slope:>10.2f}  {f'{bottom:.2f} to {top:.2f}':18}{wanted:>8.2f}{told}")


def slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of the columns of x (n, d), in standard deviations of both."""
    scaled = (x - x.mean(axis=0)) / x.std(axis=0)
    return np.linalg.lstsq(scaled, (y - y.mean()) / y.std(), rcond=None)[0]


def filled(values: list[float | None]) -> np.ndarray:
    """Gaps as the median."""
    known = np.array([np.nan if value is None else value for value in values])
    return np.where(np.isnan(known), np.nanmedian(known), known)


if __name__ == "__main__":
    main()
