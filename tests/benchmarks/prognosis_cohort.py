"""Event-free survival and grade in the sarcoma collection: the model's inputs one by one, beside simple models.

    python -m tests.benchmarks.prognosis_cohort -i COLLECTION -m MODEL [--work FOLDER] [--repeats 5]

COLLECTION: as `dataset_conversion.soft_tissue_sarcoma` reads it. MODEL: any foundation; it is copied for each row. The
image of PET is read where the model has a stem for PET, which a segmentation task with PET brings: add STS_GTV_CTPET
first. Every figure is of out-of-fold predictions, the mean over the repeats, on the same folds. Views are centred on
the drawn tumour; `region` adds its descriptors, and its mask to the pooling. --work is kept, and what is preprocessed
there is used again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dataset_conversion.soft_tissue_sarcoma import convert
from unicon_pipeline.case_extend import CaseExtendResult, extend_case
from unicon_pipeline.case_plan import CaseOptions
from unicon_pipeline.machine import machine_for
from unicon_pipeline.model_record import foundation_spec
from unicon_pipeline.preprocess import plan_and_preprocess

CT_ONLY = "_CT"  # of the names of tasks that have no PET
ROWS = {  # -> what the name of the task ends in, and what is read
    "CT": (CT_ONLY, ("image",)),
    "CT+PET": ("", ("image",)),
    "CT+PET+clinical": ("", ("image", "clinical")),
    "region": ("", ("region",)),
    "region+clinical": ("", ("region", "clinical")),
    "CT+PET+region": ("", ("image", "region")),
    "CT+PET+region+clinical": ("", ("image", "region", "clinical")),
}
TASKS = {"STS_EFS": "harrell_c", "STS_Grade": "auc"}
NAMES = {"harrell_c": "Harrell's C", "uno_c": "Uno's C", "integrated_brier": "int. Brier", "auc": "AUC",
         "average_precision": "avg. prec.", "brier": "Brier"}  # fmt: skip


def main() -> None:
    options = parse_options()
    with contextlib.ExitStack() as stack:
        work = (options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        print(convert(options.input, work / "raw"))
        for task, metric in TASKS.items():
            models: dict[str, Mapping[str, Any]] = {}
            for row, result, seconds in extended(task, work, options):
                found = result.validation["models"]
                models[row] = found["model"]
                told = [f"{d.name}: {d.value}" for d in result.plan.decisions if d.name.startswith(("image", "epochs"))]
                print(f"{task}, {row}: {seconds:.0f} s; {'; '.join(told)}", flush=True)
            # The last row's task has all that the simple models read.
            models |= {f"simple: {name}": scores for name, scores in found.items() if name != "model"}
            print_table(f"{task}, {options.repeats} x 5 folds", models, metric)
            print(f"{row}: {result.validation['verdict']}\n", flush=True)
            (work / f"{task}.json").write_text(json.dumps(models, indent=2))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", "--input", type=Path, required=True, help="the collection, with STS_* and clinical.csv")
    parser.add_argument("-m", "--model", type=Path, help="the model to extend (default: the embedded foundation)")
    parser.add_argument("--work", type=Path, help="kept, with the results as JSON")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="only these, in this order")
    parser.add_argument("--loss", default="mtlr")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def extended(task: str, work: Path, options: argparse.Namespace) -> Iterator[tuple[str, CaseExtendResult, float]]:
    """(row, what a fresh model was extended by, seconds), for each row that is wanted."""
    without_pet(work / "raw" / task)
    spec = foundation_spec(options.model or work / "none")
    for name in dict.fromkeys(task + ROWS[row][0] for row in options.rows):
        _, failed = plan_and_preprocess(work / "raw" / name, work, spec, machine_for(options.device))
        if failed:
            raise RuntimeError(f"{name}: {len(failed)} cases could not be preprocessed: {failed}")
    for row in options.rows:
        ending, inputs = ROWS[row]
        chosen = CaseOptions(loss=options.loss, inputs=inputs, repeats=options.repeats)
        with tempfile.TemporaryDirectory(dir=work) as place:
            model = Path(place) / "model"
            if options.model:
                shutil.copytree(options.model, model)
            started = time.perf_counter()
            folder = work / "raw" / (task + ending)
            result = extend_case(folder, work, model, options=chosen, device=options.device, seed=options.seed)
            yield row, result, time.perf_counter() - started


def without_pet(folder: Path) -> None:
    """The same task without its PET, as links, beside it."""
    lean = folder.with_name(folder.name + CT_ONLY)
    shutil.rmtree(lean, ignore_errors=True)
    for path in (*folder.glob("imagesTr/*_0000.nii.gz"), *folder.glob("labelsTr/*.nii.gz"), *folder.glob("*.csv")):
        link = lean / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    description = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    description["channel_names"] = {"0": "CT"}
    (lean / "dataset.json").write_text(json.dumps(description), encoding="utf-8")


def print_table(title: str, models: Mapping[str, Mapping[str, Any]], main: str) -> None:
    """The main metric with its interval, then the others."""
    first = next(iter(models.values()))
    others = [name for name in NAMES if name != main and name in first]
    count = first[main].get("events", first[main].get("positives"))
    print(f"\n{title}; n = {first[main]['n']}, {count} {'events' if 'events' in first[main] else 'positive'}")
    print(f"{'':26}{NAMES[main]:>12}  {'95 % interval':18}" + "".join(f"{NAMES[name]:>12}" for name in others))
    for row, scores in models.items():
        interval = f"{shown(scores[main]['low'])} to {shown(scores[main]['high'])}"
        rest = "".join(f"{shown(scores.get(name, {}).get('value')):>12}" for name in others)
        print(f"{row:26}{shown(scores[main]['value']):>12}  {interval:18}{rest}")


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
