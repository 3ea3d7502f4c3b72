"""The command lines: options in, one call of the package, results on stdout, messages on stderr.

Exit status: 0 all done, 1 some cases failed, 2 nothing could be done (a wrong option included),
130 interrupted. Nothing heavy is imported before the options are known to be good.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import Any

from unicon_pipeline import __version__
from unicon_pipeline.errors import UniconError
from unicon_pipeline.option_types import (
    existing_folder,
    existing_path,
    fold_choice,
    output_folder,
    positive_float,
    positive_int,
    seed_number,
)

logger = logging.getLogger(__name__)

DONE, SOME_FAILED, NOTHING_DONE, INTERRUPTED = 0, 1, 2, 130
EXIT_STATUS = "exit status: 0 all done, 1 some cases failed, 2 nothing could be done, 130 interrupted"


# Options that several commands share: one function each, so that they mean the same everywhere.


def _parser(command: str, description: str, *options: Callable[[ArgumentParser], None]) -> ArgumentParser:
    parser = ArgumentParser(prog=command, description=description, epilog=EXIT_STATUS, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"unicon-pipeline {__version__}")
    for add in options:
        add(parser)
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")
    parser.add_argument("--debug", action="store_true", help="detailed messages, and a traceback with an error")
    return parser


def _task(parser: ArgumentParser) -> None:
    parser.add_argument("-t", "--task", required=True, metavar="TASK", help="a folder name under WORK/raw, or a path")


def _work(parser: ArgumentParser) -> None:
    default = os.environ.get("UNICON_WORK") or "unicon_work"
    text = "holds raw/, preprocessed/ and model/ (default: $UNICON_WORK, else ./unicon_work; now %(default)s)"
    parser.add_argument("-w", "--work", type=output_folder, default=default, metavar="WORK", help=text)


def _model(parser: ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--model", type=output_folder, metavar="MODEL", help="the model folder (default: WORK/model)"
    )


def _device(parser: ArgumentParser) -> None:
    text = "what computes; auto takes a CUDA GPU where there is one"
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=text)


def _precision(parser: ArgumentParser) -> None:
    text = "the arithmetic of the network; auto takes the fastest that the hardware computes natively"
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=text)


def _seed(parser: ArgumentParser) -> None:
    text = "every random choice follows from it (default: %(default)s)"
    parser.add_argument("--seed", type=seed_number, default=0, metavar="N", help=text)


def _budget(parser: ArgumentParser) -> None:
    parser.add_argument("--minutes", type=positive_float, metavar="M", help="train for at most this long")
    parser.add_argument("--epochs", type=positive_int, metavar="N", help="train for at most this many epochs")


def _json(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")


# Running: one place decides what a person sees of an error, and which status the shell gets.


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def _set_up_logging(quiet: bool, debug: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainFormatter("%(name)s: %(message)s" if debug else "%(message)s"))
    package = logging.getLogger("unicon_pipeline")
    package.handlers[:] = [handler]
    # blosc2's numexpr announces its threads at INFO to whoever listens at the root.
    logging.getLogger("numexpr").setLevel(logging.WARNING)
    package.setLevel(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)


def _run(parser: ArgumentParser, handle: Callable[[Namespace], int], argv: Sequence[str] | None) -> int:
    options = parser.parse_args(argv)
    if "model" in options and options.model is None:
        options.model = options.work / "model"
    _set_up_logging(options.quiet, options.debug)
    if threading.current_thread() is threading.main_thread():
        # A scheduler ends jobs with SIGTERM: what Ctrl-C saves is saved then too.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return handle(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as problem:
        logger.error(_explain(problem), exc_info=options.debug)
        return NOTHING_DONE


def _explain(problem: Exception) -> str:
    if isinstance(problem, UniconError | OSError):
        return str(problem)
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":
        return f"not enough memory. {problem}".rstrip()
    summary = " ".join(f"{type(problem).__name__}: {problem}".split())
    return f"{summary} -- this is a bug in unicon-pipeline; run with --debug and report what it prints."


def _show(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. The work goes on, and the interpreter's own last flush stays silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_json(value: Any) -> None:
    _show(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


# The commands.


def main_demo(argv: Sequence[str] | None = None) -> int:
    """`unicon_demo`: the whole story on made phantoms."""
    parser = _parser("unicon_demo", "Plan, extend, predict and evaluate on phantoms made on the spot.", _seed)
    text = "where everything is written (default: ./%(default)s)"
    parser.add_argument("-o", "--out", type=output_folder, default="unicon_demo", metavar="DIR", help=text)
    parser.add_argument("--quick", action="store_true", help="a short run: shows that everything works, trains little")
    return _run(parser, _demo, argv)


def _demo(options: Namespace) -> int:
    from unicon_pipeline.demo import run_demo

    return run_demo(options.out, options.quick, options.seed)


def main_pretrain(argv: Sequence[str] | None = None) -> int:
    """`unicon_pretrain`: a classification foundation from scratch."""
    text = "Train a foundation from scratch on a classification task, as a new model folder."
    parser = _parser("unicon_pretrain", text, _task, _work, _model, _budget, _device, _seed)
    parser.add_argument(
        "--licence", default="not stated", metavar="TEXT", help="the licence to record with the weights"
    )
    return _run(parser, _pretrain, argv)


def _pretrain(options: Namespace) -> int:
    from unicon_pipeline.dataset import resolve_task
    from unicon_pipeline.pretrain import pretrain

    folder = pretrain(
        resolve_task(options.task, options.work),
        options.work,
        options.model,
        minutes=options.minutes,
        epochs=options.epochs,
        device=options.device,
        seed=options.seed,
        licence=options.licence,
    )
    _show(f"The new foundation is in {folder}.")
    return DONE


def main_plan_and_preprocess(argv: Sequence[str] | None = None) -> int:
    """`unicon_plan_and_preprocess`: check, fingerprint, plan and preprocess tasks."""
    text = "Check the tasks' data, plan from the data and the foundation, and preprocess every case."
    parser = _parser("unicon_plan_and_preprocess", text, _work, _model, _device)
    task_help = "folder names under WORK/raw, or paths"
    parser.add_argument("-t", "--task", required=True, nargs="+", metavar="TASK", help=task_help)
    memory_help = "what training may use (default: by device)"
    parser.add_argument("--memory-gb", type=positive_float, metavar="GB", help=memory_help)
    processes_help = "cases at a time (default: by machine)"
    parser.add_argument("--processes", type=positive_int, metavar="N", help=processes_help)
    axes = {"nargs": 3, "metavar": ("Z", "Y", "X")}
    parser.add_argument("--spacing", type=positive_float, help="voxel size in mm, instead of the planned one", **axes)
    parser.add_argument("--patch", type=positive_int, help="input shape in voxels, instead of the planned one", **axes)
    parser.add_argument("--batch", type=positive_int, metavar="N", help="batch size, instead of the planned one")
    return _run(parser, _plan_and_preprocess, argv)


def _plan_and_preprocess(options: Namespace) -> int:
    from unicon_pipeline.dataset import resolve_task
    from unicon_pipeline.device import choose_device
    from unicon_pipeline.model_folder import foundation_spec
    from unicon_pipeline.plan import format_plan
    from unicon_pipeline.preprocess import plan_and_preprocess

    folders = [resolve_task(task, options.work) for task in options.task]
    spec = foundation_spec(options.model)
    on_cpu = choose_device(options.device).type == "cpu"
    statuses = []
    for folder in folders:
        try:
            plan, failed = plan_and_preprocess(
                folder,
                options.work,
                spec,
                memory_gb=options.memory_gb,
                on_cpu=on_cpu,
                processes=options.processes,
                spacing_zyx_mm=options.spacing and tuple(options.spacing),
                patch_shape_zyx=options.patch and tuple(options.patch),
                batch_size=options.batch,
            )
        except UniconError as problem:  # one task's fault must not cost the others
            logger.error("%s: %s", folder.name, problem, exc_info=options.debug)
            statuses.append(NOTHING_DONE)
            continue
        _show(format_plan(plan))
        for case_id, reason in failed.items():
            logger.error("%s: case %s failed: %s", folder.name, case_id, reason)
        statuses.append(SOME_FAILED if failed else DONE)
    return statuses[0] if len(set(statuses)) == 1 else SOME_FAILED


def main_extend(argv: Sequence[str] | None = None) -> int:
    """`unicon_extend`: plan the extension of the model by a task, train it, add it."""
    text = "Extend the model by one task: plan what it needs, train only that, and add it to the model folder."
    parser = _parser("unicon_extend", text, _task, _work, _model, _budget, _device, _precision, _seed)
    fold_help = "the fold to hold out, or 'all' to train on every case (default: %(default)s)"
    parser.add_argument("--fold", type=fold_choice, default="all", metavar="K|all", help=fold_help)
    parser.add_argument("--dry-run", action="store_true", help="print the extension plan and stop")
    parser.add_argument("--restart", action="store_true", help="begin anew instead of resuming a cut training")
    return _run(parser, _extend, argv)


def _extend(options: Namespace) -> int:
    from unicon_pipeline.dataset import resolve_task
    from unicon_pipeline.extend import extend, plan_for
    from unicon_pipeline.extension_plan import format_extension, schedule_for

    where = resolve_task(options.task, options.work), options.work, options.model
    how = {
        "fold": options.fold,
        "schedule": schedule_for(options.minutes, options.epochs),
        "seed": options.seed,
    }
    if options.dry_run:
        _, plan = plan_for(*where, **how)
        _show(format_extension(plan))
        return DONE
    result = extend(
        *where, **how, device=options.device, precision=options.precision, resume=not options.restart
    )
    _show(result.summary())
    return DONE


def main_predict(argv: Sequence[str] | None = None) -> int:
    """`unicon_predict`: every wanted task that the input's modalities allow."""
    text = "Predict every wanted task that the modalities of the input allow."
    parser = _parser("unicon_predict", text, _work, _model, _device, _precision)
    source_help = "a folder with <case>_0000.nii.gz, <case>_0001.nii.gz, ..., or one image file"
    parser.add_argument("-i", "--input", type=existing_path, required=True, metavar="IN", help=source_help)
    out_help = "results go to OUT/<Task>/ and OUT/run.json"
    parser.add_argument("-o", "--out", type=output_folder, required=True, metavar="OUT", help=out_help)
    parser.add_argument("-t", "--task", nargs="+", metavar="TASK", help="only these tasks of the model (default: all)")
    parser.add_argument("--save-probabilities", action="store_true", help="also write each output's probability map")
    parser.add_argument("--tta", action="store_true", help="average over mirrored inputs: slower, slightly better")
    return _run(parser, _predict, argv)


def _predict(options: Namespace) -> int:
    from unicon_pipeline.predict import predict_folder

    report = predict_folder(
        options.input,
        options.out,
        options.model,
        tasks=options.task,
        device=options.device,
        precision=options.precision,
        save_probabilities=options.save_probabilities,
        tta=options.tta,
    )
    _show(report.summary())
    return report.exit_code


def main_evaluate(argv: Sequence[str] | None = None) -> int:
    """`unicon_evaluate`: predictions against a task's references, with confidence intervals."""
    text = "Compare predictions with a task's references; every figure with its n and a 95 % interval."
    parser = _parser("unicon_evaluate", text, _task, _work, _seed, _json)
    predictions_help = "the folder with the predictions, usually OUT/<Task>"
    parser.add_argument(
        "-p", "--predictions", type=existing_folder, required=True, metavar="DIR", help=predictions_help
    )
    tolerance_help = "surface distance that counts as agreement (default: %(default)s)"
    parser.add_argument("--tolerance", type=positive_float, default=2.0, metavar="MM", help=tolerance_help)
    processes_help = "cases at a time (default: %(default)s)"
    parser.add_argument("--processes", type=positive_int, default=1, metavar="N", help=processes_help)
    resample_help = "accept predictions on other grids, and bring them onto the references' (nearest voxel)"
    parser.add_argument("--resample", action="store_true", help=resample_help)
    return _run(parser, _evaluate, argv)


def _evaluate(options: Namespace) -> int:
    from unicon_pipeline.dataset import read_task, resolve_task
    from unicon_pipeline.evaluate import evaluate, format_evaluation
    from unicon_pipeline.records import to_dict

    task = read_task(resolve_task(options.task, options.work))
    result = evaluate(
        task,
        options.predictions,
        tolerance_mm=options.tolerance,
        seed=options.seed,
        processes=options.processes,
        resample=options.resample,
    )
    if options.json:
        _show_json(to_dict(result))
    else:
        _show(format_evaluation(result))
    return SOME_FAILED if result.failed else DONE


def main_verify(argv: Sequence[str] | None = None) -> int:
    """`unicon_verify`: hashes, the chain, and the stored probe outputs of every task."""
    text = "Check every file's digest, the chain of extensions, and that each task still gives its stored outputs."
    return _run(_parser("unicon_verify", text, _work, _model, _json), _verify, argv)


def _verify(options: Namespace) -> int:
    from unicon_pipeline.records import to_dict
    from unicon_pipeline.verify import verify

    report = verify(options.model)
    if options.json:
        _show_json(to_dict(report))
    else:
        _show("\n".join([*report.problems, f"{options.model}: {'intact' if report.ok else 'NOT intact'}"]))
    return DONE if report.ok else SOME_FAILED


def main_info(argv: Sequence[str] | None = None) -> int:
    """`unicon_info`: what the model can do, and where each part came from."""
    text = "Show what the model can do, and where each part of it came from."
    return _run(_parser("unicon_info", text, _work, _model, _json), _info, argv)


def _info(options: Namespace) -> int:
    from unicon_pipeline.info import describe, format_description

    description = describe(options.model)
    if options.json:
        _show_json(description)
    else:
        _show(format_description(description))
    return DONE
