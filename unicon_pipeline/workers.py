"""Independent work on many cases in several processes; one bad case, or one killed process, costs that case only."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from unicon_pipeline.errors import UniconError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

_KILLED = (
    "its process was killed, most likely for lack of memory; give each process more of it by fewer at a time, "
    "or leave the case out"
)
_NO_MEMORY = "there is not enough memory for it; use fewer processes, or leave the case out"


CHECK_SECONDS = 1.0  # how often is looked whether processes live, while no result comes
WAS_KILLED = object()  # instead of an outcome


class Failure(str):
    """Why an item could not be done, in words."""


class Workers:
    """Processes that work on cases side by side, and stay from one round of work to the next.

    Used as a context: leaving it ends the processes, at once where it is left early (Ctrl-C, an error). They do not
    outlive this process however it ends. With an executor of someone else's, its processes or threads do the work,
    and are its owner's to end.
    """

    def __init__(self, processes: int = 1, executor: Executor | None = None):
        """`processes`: how many at most; 1 works in this process. `executor`: what does the work instead."""
        self.processes = processes
        self.local = executor is None
        self._executor = executor
        self._idle: list[_Worker] = []

    @property
    def in_process(self) -> bool:
        """Whether all work is done in this process."""
        return self.local and self.processes == 1

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        while self._idle:
            self._idle.pop().end()

    def each(
        self, function: Callable, items: Sequence[Item], *shared: object, at_most: int | None = None
    ) -> Iterator[tuple[Item, object]]:
        """Yields (item, `function(item, *shared)` or its `Failure`) in the order of completion.

        Errors meant for people, I/O errors and lack of memory become failures; anything else is a bug and raised.
        When a process is killed, its item is logged by name and tried once more at the end, with no other beside
        it; the others go on. `function` must live in a module, not in a script.

        Args:
            at_most: so many at a time, where that is fewer than there are processes; an executor is otherwise given
                everything at once.

        Raises:
            UniconError: the executor broke, as a process pool of someone else's does when one of it is killed.
        """
        at_once = min(at_most or len(items), len(items))
        if self.local:
            at_once = min(at_once, self.processes)
            if at_once <= 1:
                for item in items:
                    yield item, attempt(function, item, shared)
                return
        killed = []
        for item, outcome in self._side_by_side(function, items, at_once, shared):
            if outcome is WAS_KILLED:
                logger.warning("The process that worked on %s was killed; it is tried again at the end.", name_of(item))
                killed.append(item)
            else:
                yield item, outcome
        for item in killed:
            for _, outcome in self._side_by_side(function, [item], 1, shared):
                yield item, Failure(_KILLED) if outcome is WAS_KILLED else outcome

    def _side_by_side(
        self, function: Callable, items: Sequence[Item], at_once: int, shared: tuple
    ) -> Iterator[tuple[Item, object]]:
        """Yields (item, outcome or WAS_KILLED)."""
        if self._executor is not None:
            yield from self._through(self._executor, function, items, at_once, shared)
            return
        waiting = list(reversed(items))
        running: dict[Future, tuple[_Worker, Item]] = {}

        def start(worker: _Worker) -> None:
            item = waiting.pop()
            running[worker.submit(function, item, shared)] = worker, item

        try:
            for _ in range(at_once):
                start(self._idle.pop() if self._idle else _Worker())
            while running:
                done, _ = wait(running, CHECK_SECONDS, FIRST_COMPLETED)
                if not done:
                    for worker, _ in running.values():
                        worker.notice_death()
                for future in done:
                    worker, item = running.pop(future)
                    dead = isinstance(future.exception(), BrokenProcessPool)
                    outcome = WAS_KILLED if dead else future.result()
                    if dead:
                        worker.end()
                    if waiting:
                        start(_Worker() if dead else worker)
                    elif not dead:
                        self._idle.append(worker)
                    yield item, outcome
        finally:
            for worker, _ in running.values():
                worker.end()

    def _through(
        self, executor: Executor, function: Callable, items: Sequence[Item], at_once: int, shared: tuple
    ) -> Iterator[tuple[Item, object]]:
        waiting = iter(items)
        running: dict[Future, Item] = {}

        def start(number: int) -> None:
            running.update((executor.submit(attempt, function, item, shared), item) for item in islice(waiting, number))

        try:
            start(at_once)
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    item = running.pop(future)
                    outcome = future.result()
                    start(1)
                    yield item, outcome
        except (BrokenExecutor, CancelledError) as problem:
            raise UniconError(
                f"The {type(executor).__name__} that works on the cases has ended before they were done: "
                f"{problem or 'they were cancelled'}. A case may need more memory; run again, what is done is kept."
            ) from problem
        finally:
            for future in running:
                future.cancel()


class _Worker:
    """A pool of one process: when it is killed, what it worked on is known.

    The process holds the reading end of a pipe of which only this process has the writing end. It ends
    itself when that end closes: in `end`, or because this process is gone.
    """

    def __init__(self) -> None:
        context = get_context("spawn")
        self._theirs, self._ours = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(1, context, initializer=_end_with, initargs=(self._theirs,))

    def submit(self, function: Callable, item: object, shared: tuple) -> Future:
        with _script_left_alone():
            return self._pool.submit(attempt, function, item, shared)

    def notice_death(self) -> None:
        notice_death(self._pool)

    def end(self) -> None:
        self._ours.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._theirs.close()


def notice_death(pool: ProcessPoolExecutor) -> None:
    """Breaks a pool of which a process has died.

    A pool notices that by itself, but not where the process was killed while it sent a result: then it waits for the
    rest of it, for ever, because others hold the sending end of that pipe too.
    """
    processes = list((pool._processes or {}).values())
    if all(process.is_alive() for process in processes):
        return
    for process in processes:
        process.kill()
    if pool._result_queue is not None and not pool._result_queue._writer.closed:
        pool._result_queue._writer.close()


def _end_with(pipe: Connection) -> None:
    """In a worker: Ctrl-C is the parent's to handle; the end of the pipe ends the process, whatever it is doing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        wait_for([pipe])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def usable_processes(megabytes_each: float) -> int:
    """How many processes fit the cores and the free memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = free_megabytes()
    return max(1, cores if free is None else min(cores, int(free // megabytes_each)))


def free_megabytes() -> float | None:
    """Memory that programs can get; on Linux with what the file cache would give back, which is most of it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = {line.partition(":")[0]: line.partition(":")[2].split()[0] for line in lines}
        return int(kilobytes["MemAvailable"]) / 2**10
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (ValueError, OSError, AttributeError):
        return None


def attempt(function: Callable, item: object, shared: tuple) -> object:
    """`function(item, *shared)`, or its `Failure`."""
    try:
        return function(item, *shared)
    except (UniconError, OSError) as problem:
        return Failure(str(problem))
    except MemoryError:
        return Failure(_NO_MEMORY)


def name_of(item: object) -> object:
    """What messages call an item."""
    return getattr(item, "case_id", item)


@contextmanager
def _script_left_alone() -> Iterator[None]:
    """Keeps new processes from running the calling script again, which a script without a main guard would not bear."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
