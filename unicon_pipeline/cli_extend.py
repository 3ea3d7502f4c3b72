"""`unicon_extend`: options in, one call of the package."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from unicon_pipeline.command_line import (
    DONE,
    budget_options,
    device_option,
    model_option,
    new_parser,
    precision_option,
    run,
    seed_option,
    show,
    task_option,
    work_option,
)
from unicon_pipeline.errors import UniconError
from unicon_pipeline.option_types import fold_choice, positive_int

# Of classification and prognosis alone.
_CASE_OPTIONS = ("loss", "inputs", "repeats", "all_descriptors", "adapter_rank")


def main_extend(argv: Sequence[str] | None = None) -> int:
    """`unicon_extend`: plan the extension of the model by a task, train it, add it."""
    text = "Extend the model by one task: plan what it needs, train only that, and add it to the model folder."
    shared = (task_option, work_option, model_option, budget_options, device_option, precision_option, seed_option)
    parser = new_parser("unicon_extend", text, *shared)
    fold_help = "the fold to hold out, or 'all' to train on every case (default: %(default)s)"
    parser.add_argument("--fold", type=fold_choice, default="all", metavar="K|all", help=fold_help)
    parser.add_argument("--dry-run", action="store_true", help="print the extension plan and stop")
    parser.add_argument("--restart", action="store_true", help="begin anew instead of resuming a cut training")
    group = parser.add_argument_group("classification and prognosis")
    loss_help = "prognosis: how time to the event is learned (default: mtlr)"
    group.add_argument("--loss", choices=("mtlr", "deephit", "cox"), help=loss_help)
    inputs_help = "what is read of a case: image, region, clinical (default: all that the task offers)"
    inputs = {"choices": ("image", "region", "clinical"), "metavar": "INPUT"}
    group.add_argument("--inputs", nargs="+", help=inputs_help, **inputs)
    repeats_help = "how often --fold all cross-validates, each time with other folds (default: 5)"
    group.add_argument("--repeats", type=positive_int, metavar="N", help=repeats_help)
    every_help = "read all figures of the region instead of a few: for cohorts of hundreds"
    group.add_argument("--all-descriptors", action="store_true", help=every_help)
    rank_help = (
        "train end to end, with an adapter of this rank, instead of on a frozen encoder: takes hours, and more cases; "
        "--epochs and --minutes bound it, and --repeats is 1 unless given"
    )
    group.add_argument("--adapter-rank", type=positive_int, metavar="R", help=rank_help)
    return run(parser, _extend, argv)


def _extend(options: Namespace) -> int:
    from unicon_pipeline.dataset import read_task, resolve_task
    from unicon_pipeline.extend import extend, plan_for
    from unicon_pipeline.extension_plan import format_extension, schedule_for

    where = resolve_task(options.task, options.work), options.work, options.model
    task = read_task(where[0])
    if task.task_type != "segmentation":
        return _extend_by_case_task(options, where)
    if given := [name for name in _CASE_OPTIONS if getattr(options, name)]:
        option = "--" + given[0].replace("_", "-")
        raise UniconError(f"{option}: {task.name} is a {task.task_type} task, which has no such choice.")
    schedule = schedule_for(options.minutes, options.epochs)
    how = {"fold": options.fold, "schedule": schedule, "seed": options.seed}
    if options.dry_run:
        _, plan = plan_for(*where, **how)
        show(format_extension(plan))
        return DONE
    result = extend(
        *where, **how, device=options.device, precision=options.precision, resume=not options.restart
    )
    show(result.summary())
    return DONE


def _extend_by_case_task(options: Namespace, where: tuple[Path, Path, Path]) -> int:
    from unicon_pipeline.case_extend import extend_case, plan_case
    from unicon_pipeline.case_plan import CaseOptions
    from unicon_pipeline.descriptors import DESCRIPTORS
    from unicon_pipeline.extension_plan import format_extension

    end_to_end = {"minutes": options.minutes, "precision": options.precision != "auto", "restart": options.restart}
    if not options.adapter_rank and (ignored := [name for name, value in end_to_end.items() if value]):
        raise UniconError(f"--{ignored[0]}: heads on a frozen encoder are fitted in seconds, without this choice.")
    given = {
        "loss": options.loss,
        "inputs": tuple(options.inputs) if options.inputs else None,
        "repeats": options.repeats,
        "epochs": options.epochs,
        "descriptors": DESCRIPTORS if options.all_descriptors else None,
        "adapter_rank": options.adapter_rank,
        "adapter_epochs": options.epochs,
        "minutes": options.minutes,
    }
    chosen = CaseOptions(**{name: value for name, value in given.items() if value is not None})
    how = {"options": chosen, "fold": options.fold, "seed": options.seed}
    if options.dry_run:
        _, _, extension, _ = plan_case(*where, **how)
        show(format_extension(extension))
        return DONE
    machine = {"device": options.device, "precision": options.precision}
    show(extend_case(*where, **how, **machine, resume=not options.restart).summary())
    return DONE
