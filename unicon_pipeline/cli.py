"""The command lines: options in, one call of the package, results on stdout, messages on stderr.

Nothing heavy is imported before the options are known to be good.
"""

from __future__ import annotations

import dataclasses
import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from unicon_pipeline.cli_extend import main_extend  # noqa: F401  all commands are found here
from unicon_pipeline.command_line import (
    DONE,
    NOTHING_DONE,
    SOME_FAILED,
    budget_options,
    device_option,
    json_option,
    model_option,
    new_parser,
    precision_option,
    run,
    seed_option,
    show,
    show_json,
    task_option,
    work_option,
    workers_options,
)
from unicon_pipeline.contract import NOT_STATED
from unicon_pipeline.errors import UniconError
from unicon_pipeline.option_types import (
    existing_folder,
    existing_path,
    fold_number,
    orientation_code,
    output_folder,
    positive_float,
    positive_int,
)

logger = logging.getLogger(__name__)


def main_demo(argv: Sequence[str] | None = None) -> int:
    """`unicon_demo`: the whole story on made phantoms."""
    parser = new_parser("unicon_demo", "Plan, extend, predict and evaluate on phantoms made on the spot.", seed_option)
    text = "where everything is written (default: ./%(default)s)"
    parser.add_argument("-o", "--out", type=output_folder, default="unicon_demo", metavar="DIR", help=text)
    parser.add_argument("--quick", action="store_true", help="a short run: shows that everything works, trains little")
    return run(parser, _demo, argv)


def _demo(options: Namespace) -> int:
    from unicon_pipeline.demo import run_demo

    return run_demo(options.out, options.quick, options.seed)


def main_import(argv: Sequence[str] | None = None) -> int:
    """`unicon_import`: an existing checkpoint becomes a model folder."""
    text = "Make a model folder from an existing checkpoint: its encoder becomes the foundation, its task comes along."
    parser = new_parser("unicon_import", text, work_option, model_option)
    source_help = "a checkpoint file, an nnU-Net or model folder, or 'astra' for the installed weights package"
    parser.add_argument("-c", "--checkpoint", required=True, metavar="CHECKPOINT", help=source_help)
    family_help = "instead of what the checkpoint shows: nnunet, nnssl, ctclip, inflated-resnet, monai, unicon"
    parser.add_argument("-f", "--family", metavar="FAMILY", help=family_help)
    turned_help = "how images were turned before the network saw them, such as RAS for TotalSegmentator"
    parser.add_argument("--orientation", type=orientation_code, metavar="XYZ", help=turned_help)
    channels_help = "what the input channels are, such as CT PET, where the checkpoint does not say"
    parser.add_argument("--modalities", nargs="+", metavar="NAME", help=channels_help)
    fold_help = "nnU-Net: whose encoder becomes the foundation (default: the first fold)"
    parser.add_argument("--fold", type=fold_number, metavar="K", help=fold_help)
    text_help = "CT-CLIP: a folder with the tokenizer of its text encoder"
    parser.add_argument("--text-encoder", type=existing_folder, metavar="DIR", help=text_help)
    findings_help = "CT-CLIP: a JSON file with ready text latents of the findings"
    parser.add_argument("--findings", type=existing_path, metavar="FILE", help=findings_help)
    images_help = "a few cases, to measure whether reduced precision changes what the task finds: if not, it is used"
    parser.add_argument("--images", type=existing_path, metavar="DIR", help=images_help)
    parser.add_argument("--licence", metavar="TEXT", help="the licence of the weights, where the checkpoint has none")
    parser.add_argument("--origin", metavar="TEXT", help="where the checkpoint came from")
    return run(parser, _import, argv)


def _import(options: Namespace) -> int:
    from unicon_pipeline.imported import ImportOptions
    from unicon_pipeline.importer import import_checkpoint
    from unicon_pipeline.info import describe, format_description

    details = ImportOptions(
        orientation=options.orientation,
        modalities=tuple(options.modalities) if options.modalities else None,
        licence=options.licence,
        origin=options.origin,
        fold=options.fold,
        text_encoder=options.text_encoder,
        findings=options.findings,
        images=options.images,
    )
    folder = import_checkpoint(options.checkpoint, options.model, family=options.family, options=details)
    show(format_description(describe(folder.path)))
    return DONE


def main_pretrain(argv: Sequence[str] | None = None) -> int:
    """`unicon_pretrain`: a classification foundation from scratch."""
    text = "Train a foundation from scratch on a classification task, as a new model folder."
    shared = (task_option, work_option, model_option, budget_options, device_option, seed_option)
    parser = new_parser("unicon_pretrain", text, *shared)
    parser.add_argument(
        "--licence", default=NOT_STATED, metavar="TEXT", help="the licence to record with the weights"
    )
    return run(parser, _pretrain, argv)


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
    show(f"The new foundation is in {folder}.")
    return DONE


def main_plan_and_preprocess(argv: Sequence[str] | None = None) -> int:
    """`unicon_plan_and_preprocess`: check, fingerprint, plan and preprocess tasks."""
    text = "Check the tasks' data, plan from the data and the foundation, and preprocess every case."
    parser = new_parser("unicon_plan_and_preprocess", text, work_option, model_option, device_option)
    task_help = "folder names under WORK/raw, or paths"
    parser.add_argument("-t", "--task", required=True, nargs="+", metavar="TASK", help=task_help)
    preset_help = "plan for another machine than this one"
    parser.add_argument("--preset", choices=("cpu", "gpu8", "gpu24", "gpu80"), help=preset_help)
    memory_help = "what training may use (default: a GPU's memory, or 2 GB on a CPU, whose limit is time)"
    parser.add_argument("--memory-gb", type=positive_float, metavar="GB", help=memory_help)
    workers_options(parser, "as many as fit the cores and the free memory")
    axes = {"nargs": 3, "metavar": ("Z", "Y", "X")}
    parser.add_argument("--spacing", type=positive_float, help="voxel size in mm, instead of the planned one", **axes)
    parser.add_argument("--patch", type=positive_int, help="input shape in voxels, instead of the planned one", **axes)
    parser.add_argument("--batch", type=positive_int, metavar="N", help="batch size, instead of the planned one")
    parser.add_argument("--folds", type=positive_int, metavar="K", help="cross-validation folds, instead of five")
    return run(parser, _plan_and_preprocess, argv)


def _plan_and_preprocess(options: Namespace) -> int:
    from unicon_pipeline.budget import PRESETS
    from unicon_pipeline.dataset import resolve_task
    from unicon_pipeline.input_shape import Overrides
    from unicon_pipeline.machine import machine_for
    from unicon_pipeline.model_record import foundation_spec
    from unicon_pipeline.plan import format_plan
    from unicon_pipeline.preprocess import plan_and_preprocess

    folders = [resolve_task(task, options.work) for task in options.task]
    spec = foundation_spec(options.model)
    machine = PRESETS[options.preset] if options.preset else machine_for(options.device)
    if options.memory_gb:
        machine = dataclasses.replace(machine, memory_gb=options.memory_gb, source="memory set by the user")
    spacing, patch = (tuple(value) if value else None for value in (options.spacing, options.patch))
    overrides = Overrides(spacing, patch, options.batch, options.folds)
    statuses = []
    for folder in folders:
        try:
            plan, failed = plan_and_preprocess(
                folder,
                options.work,
                spec,
                machine,
                overrides=overrides,
                processes=options.processes,
                dask=options.dask,
                regions=_regions(folder, options),
            )
        except UniconError as problem:  # one task's fault must not cost the others
            logger.error("%s: %s", folder.name, problem, exc_info=options.debug)
            statuses.append(NOTHING_DONE)
            continue
        show(format_plan(plan))
        for case_id, reason in failed.items():
            logger.error("%s: case %s failed: %s", folder.name, case_id, reason)
        statuses.append(SOME_FAILED if failed else DONE)
    return statuses[0] if len(set(statuses)) == 1 else SOME_FAILED


def _regions(folder: Path, options: Namespace) -> dict[str, Path]:
    from unicon_pipeline.dataset import read_task

    task = read_task(folder)
    if task.region is None:
        return {}
    from unicon_pipeline.case_regions import find_regions

    return find_regions(task, options.work, options.model, options.device)


def main_predict(argv: Sequence[str] | None = None) -> int:
    """`unicon_predict`: every wanted task that the input's modalities allow."""
    text = "Predict every wanted task that the modalities of the input allow."
    parser = new_parser("unicon_predict", text, work_option, model_option, device_option, precision_option)
    source_help = "a folder with <case>_0000.nii.gz, <case>_0001.nii.gz, ..., or one image file"
    parser.add_argument("-i", "--input", type=existing_path, required=True, metavar="IN", help=source_help)
    out_help = "results go to OUT/<Task>/ and OUT/run.json"
    parser.add_argument("-o", "--out", type=output_folder, required=True, metavar="OUT", help=out_help)
    parser.add_argument("-t", "--task", nargs="+", metavar="TASK", help="only these tasks of the model (default: all)")
    parser.add_argument("--save-probabilities", action="store_true", help="also write each output's probability map")
    parser.add_argument("--tta", action="store_true", help="average over mirrored inputs: slower, slightly better")
    fast_help = "fewer or larger tiles, where the task's own cases showed Dice of at least 0.99 against the exact run"
    parser.add_argument("--fast", action="store_true", help=fast_help)
    air_help = "compute tiles that hold nothing but air, too"
    parser.add_argument("--compute-air", action="store_true", help=air_help)
    resume_help = "keep the results in OUT that this model made of these files with these options"
    parser.add_argument("--resume", action="store_true", help=resume_help)
    parts_help = "share the cases between N runs, which may write to one OUT at once"
    parser.add_argument("--num-parts", type=positive_int, default=1, metavar="N", help=parts_help)
    parser.add_argument("--part-id", type=fold_number, default=0, metavar="K", help="which of them this is, from 0")
    workers_options(parser, "1, which uses all cores")
    return run(parser, _predict, argv)


def _predict(options: Namespace) -> int:
    from unicon_pipeline.dask_cluster import open_workers
    from unicon_pipeline.predict import predict_folder

    if options.part_id >= options.num_parts:
        last = options.num_parts - 1
        raise UniconError(f"--part-id {options.part_id}: of {options.num_parts} parts, the last one is {last}.")
    with open_workers(options.processes or 1, options.dask) as workers:
        report = predict_folder(
            options.input,
            options.out,
            options.model,
            tasks=options.task,
            device=options.device,
            precision=options.precision,
            save_probabilities=options.save_probabilities,
            tta=options.tta,
            compute_air=options.compute_air,
            fast=options.fast,
            resume=options.resume,
            part=(options.part_id, options.num_parts) if options.num_parts > 1 else None,
            workers=workers,
        )
    show(report.summary())
    return report.exit_code


def main_evaluate(argv: Sequence[str] | None = None) -> int:
    """`unicon_evaluate`: predictions against a task's references, with confidence intervals."""
    text = "Compare predictions with a task's references; every figure with its n and a 95 % interval."
    parser = new_parser("unicon_evaluate", text, task_option, work_option, seed_option, json_option)
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
    return run(parser, _evaluate, argv)


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
        show_json(to_dict(result))
    else:
        show(format_evaluation(result))
    return SOME_FAILED if result.failed else DONE


def main_verify(argv: Sequence[str] | None = None) -> int:
    """`unicon_verify`: hashes, the chain, and the stored probe outputs of every task."""
    text = "Check every file's digest, the chain of extensions, and that each task still gives its stored outputs."
    return run(new_parser("unicon_verify", text, work_option, model_option, json_option), _verify, argv)


def _verify(options: Namespace) -> int:
    from unicon_pipeline.records import to_dict
    from unicon_pipeline.verify import verify

    report = verify(options.model)
    if options.json:
        show_json(to_dict(report))
    else:
        show("\n".join([*report.problems, f"{options.model}: {'intact' if report.ok else 'NOT intact'}"]))
    return DONE if report.ok else SOME_FAILED


def main_info(argv: Sequence[str] | None = None) -> int:
    """`unicon_info`: what the model can do, and where each part came from."""
    text = "Show what the model can do, and where each part of it came from."
    return run(new_parser("unicon_info", text, work_option, model_option, json_option), _info, argv)


def _info(options: Namespace) -> int:
    from unicon_pipeline.info import describe, format_description

    description = describe(options.model)
    if options.json:
        show_json(description)
    else:
        show(format_description(description))
    return DONE
