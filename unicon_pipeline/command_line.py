"""What all command lines share: options that mean the same everywhere, messages, exit statuses.

Exit status: 0 all done, 1 some cases failed, 2 nothing could be done (a wrong option included), 130 interrupted.
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
from unicon_pipeline.option_types import output_folder, positive_float, positive_int, seed_number

logger = logging.getLogger(__name__)

DONE, SOME_FAILED, NOTHING_DONE, INTERRUPTED = 0, 1, 2, 130
EXIT_STATUS = "exit status: 0 all done, 1 some cases failed, 2 nothing could be done, 130 interrupted"


# Options that several commands share: one function each, so that they mean the same everywhere.


def new_parser(command: str, description: str, *options: Callable[[ArgumentParser], None]) -> ArgumentParser:
    """A command's parser, with the options that all commands share and those that `options` add."""
    parser = ArgumentParser(prog=command, description=description, epilog=EXIT_STATUS, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"unicon-pipeline {__version__}")
    for add in options:
        add(parser)
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")
    parser.add_argument("--debug", action="store_true", help="detailed messages, and a traceback with an error")
    return parser


def task_option(parser: ArgumentParser) -> None:
    """`-t`."""
    parser.add_argument("-t", "--task", required=True, metavar="TASK", help="a folder name under WORK/raw, or a path")


def work_option(parser: ArgumentParser) -> None:
    """`-w`."""
    default = os.environ.get("UNICON_WORK") or "unicon_work"
    text = "holds raw/, preprocessed/ and model/ (default: $UNICON_WORK, else ./unicon_work; now %(default)s)"
    parser.add_argument("-w", "--work", type=output_folder, default=default, metavar="WORK", help=text)


def model_option(parser: ArgumentParser) -> None:
    """`-m`."""
    parser.add_argument(
        "-m", "--model", type=output_folder, metavar="MODEL", help="the model folder (default: WORK/model)"
    )


def device_option(parser: ArgumentParser) -> None:
    """`--device`."""
    text = "what computes; auto takes a CUDA GPU where there is one"
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=text)


def precision_option(parser: ArgumentParser) -> None:
    """`--precision`."""
    text = "the arithmetic of the network; auto takes the fastest that the hardware computes natively"
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=text)


def seed_option(parser: ArgumentParser) -> None:
    """`--seed`."""
    text = "every random choice follows from it (default: %(default)s)"
    parser.add_argument("--seed", type=seed_number, default=0, metavar="N", help=text)


def budget_options(parser: ArgumentParser) -> None:
    """`--minutes` and `--epochs`."""
    parser.add_argument("--minutes", type=positive_float, metavar="M", help="train for at most this long")
    parser.add_argument("--epochs", type=positive_int, metavar="N", help="train for at most this many epochs")


def workers_options(parser: ArgumentParser, default: str) -> None:
    """`--processes` and `--dask`."""
    parser.add_argument("--processes", type=positive_int, metavar="N", help=f"cases at a time (default: {default})")
    dask_help = "address of a Dask scheduler (tcp://host:8786) whose workers, on the same folders, do the work"
    parser.add_argument("--dask", metavar="ADDRESS", help=dask_help)


def json_option(parser: ArgumentParser) -> None:
    """`--json`."""
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


def run(parser: ArgumentParser, handle: Callable[[Namespace], int], argv: Sequence[str] | None) -> int:
    """Parses, sets up messages and runs `handle`; an error becomes one line on stderr and an exit status."""
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


def show(text: str) -> None:
    """A result on stdout."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. The work goes on, and the interpreter's own last flush stays silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_json(value: Any) -> None:
    """A result on stdout, as JSON."""
    show(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
