"""Independent work on many cases in several processes; one bad case, or one killed process, costs that case only."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from types import ModuleType
from typing import TypeVar

from unicon_pipeline.errors import UniconError

Item = TypeVar("Item")

_KILLED = "its process was killed, most likely for lack of memory; use fewer processes, or leave the case out"
_NO_MEMORY = "there is not enough memory for it; use fewer processes, or leave the case out"


class Failure(str):
    """Why an item could not be done, in words."""


def each(function: Callable, items: Sequence[Item], processes: int, *shared: object) -> Iterator[tuple[Item, object]]:
    """Yields (item, `function(item, *shared)` or its `Failure`) in the order of completion.

    Errors meant for people, I/O errors and lack of memory become failures; anything else is a bug and raised.
    When a process is killed, all work in flight is lost with its pool: those items are tried again, each in
    a process of its own, so that the guilty one is known by name. `function` must live in a module, not in a script.
    """
    if processes <= 1 or len(items) <= 1:
        for item in items:
            yield item, _attempt(function, item, shared)
        return
    processes = min(processes, len(items))
    with _pool(processes) as pool:
        with _script_left_alone():
            running = {pool.submit(_attempt, function, item, shared): item for item in items}
        try:
            for future in as_completed(running):
                if not isinstance(future.exception(), BrokenProcessPool):
                    yield running[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    lost = [item for future, item in running.items() if isinstance(future.exception(), BrokenProcessPool)]
    # Items are taken in order, and each process holds one and has at most one more waiting, or one just finished.
    suspects = 3 * processes if len(lost) > 3 * processes + 1 else len(lost)
    for item in lost[:suspects]:
        yield item, _alone(function, item, shared)
    if lost[suspects:]:
        yield from each(function, lost[suspects:], max(2, processes), *shared)


def usable_processes(megabytes_each: float) -> int:
    """How many processes fit the cores and the free memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (ValueError, OSError, AttributeError):
        return max(1, cores)
    return max(1, min(cores, int(free // megabytes_each)))


def _attempt(function: Callable, item: object, shared: tuple) -> object:
    try:
        return function(item, *shared)
    except (UniconError, OSError) as problem:
        return Failure(str(problem))
    except MemoryError:
        return Failure(_NO_MEMORY)


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"))


def _alone(function: Callable, item: object, shared: tuple) -> object:
    with _pool(1) as pool:
        with _script_left_alone():
            future = pool.submit(_attempt, function, item, shared)
        try:
            return future.result()
        except BrokenProcessPool:
            return Failure(_KILLED)


@contextmanager
def _script_left_alone() -> Iterator[None]:
    """Keeps new processes from running the calling script again, which a script without a main guard would not bear."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
