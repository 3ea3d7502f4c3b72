"""Cases on the machines of an existing Dask cluster (extra `dask`), instead of in processes of this machine.

The workers read and write the same files under the same paths as this machine, in a folder that all of them share.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from unicon_pipeline import __version__
from unicon_pipeline.errors import UniconError
from unicon_pipeline.workers import WAS_KILLED, Failure, Workers, attempt, name_of

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

_CONNECT_SECONDS = 8


@contextmanager
def open_workers(processes: int, dask: str | None = None) -> Iterator[Workers]:
    """Processes of this machine, or the Dask cluster whose scheduler has the address `dask`."""
    with dask_workers(dask) if dask else Workers(processes) as workers:
        yield workers


@contextmanager
def dask_workers(address: str) -> Iterator[Workers]:
    """A Dask cluster's workers while the context lasts; leaving it cancels what waits, and leaves the cluster as it is.

    Each thread of a worker takes a case, so workers are best started with one thread each (`--nthreads 1`). Dask
    keeps a worker's arithmetic to one core unless OMP_NUM_THREADS, MKL_NUM_THREADS and OPENBLAS_NUM_THREADS are set
    where it is started: to predict, set them to its cores. They also decide the last digits of sums.

    Args:
        address: the scheduler's, such as `tcp://10.0.0.1:8786`.

    Raises:
        UniconError: the extra is missing, no scheduler answers there, or a worker has not this version of the package.
    """
    try:
        from distributed import Client
    except ImportError as problem:
        raise UniconError(f"--dask needs the package distributed ({problem}): pip install distributed.") from problem
    _check_address(address)
    with _dask_keeps_quiet():
        try:
            client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
        except (OSError, TimeoutError) as problem:
            raise UniconError(
                f"No Dask scheduler answers at {address}. Start one (dask scheduler) and workers "
                f"(dask worker {address} --nthreads 1), or correct the address."
            ) from problem
        with client:
            _check_workers(client, address)
            yield _DaskWorkers(client, address)


class _DaskWorkers(Workers):
    """`each` on a cluster. What a killed worker had at hand the scheduler gives to others, a few times over.

    What has still failed then may have been beside what killed them; as ever, it is tried once more at the end, alone.
    """

    def __init__(self, client: Client, address: str):
        super().__init__()
        self.local = False
        self._client, self._address = client, address
        # Keys of two parts make the cases one group, which the scheduler hands out one by one.
        self._keys = ((f"unicon-{self._client.id}", number) for number in count())
        self._running: dict[tuple[str, int], object] = {}
        client.subscribe_topic("all", self._name_what_is_lost)

    def _side_by_side(
        self, function: Callable, items: Sequence[Item], at_once: int, shared: tuple
    ) -> Iterator[tuple[Item, object]]:
        from distributed import KilledWorker, as_completed

        shared, waiting = _absolute(shared), iter(items)
        mine, finished = {}, as_completed(loop=self._client.loop)

        def start(number: int) -> None:
            for item, key in zip(islice(waiting, number), self._keys):
                # In one piece, since Dask would look into arguments for references to other tasks.
                job = partial(_on_worker, function, _absolute(item), shared, _needed(item, shared), __version__)
                self._running[key] = item
                mine[key] = self._client.submit(job, key=key, pure=False)
                finished.add(mine[key])

        try:
            start(at_once)
            for future in finished:
                try:
                    outcome = future.result()
                except KilledWorker:
                    outcome = WAS_KILLED
                del mine[future.key]
                item = self._running.pop(future.key)
                start(1)
                yield item, outcome
        except CancelledError as problem:
            raise UniconError(
                f"The Dask scheduler at {self._address} was lost before the cases were done. "
                "Run again when it is back: what is done is kept."
            ) from problem
        finally:
            if self._client.status == "running":
                self._client.cancel(list(mine.values()))
            for key in mine:
                del self._running[key]

    def _name_what_is_lost(self, event: tuple[float, dict]) -> None:
        """Warns of each case that a worker was at, or had at hand, when the scheduler lost it."""
        _, message = event
        if message.get("action") != "remove-worker" or message["expected"]:
            return
        for key in message["processing-tasks"]:
            if (item := self._running.get(key)) is not None:
                worker, name = message["worker"], name_of(item)
                logger.warning("The Dask worker %s, which had %s, is lost; another one takes it.", worker, name)


def _on_worker(function: Callable, item: object, shared: tuple, needed: list[Path], version: str) -> object:
    """On a worker: `attempt`, where what was sent makes sense there."""
    here = f"the Dask worker on {platform.node()}"
    if version != __version__:  # this worker came after the others were asked
        return Failure(f"{here} has unicon-pipeline {__version__}, and what sent the case {version}: install the same")
    if missing := [str(path) for path in needed if not path.exists()]:
        return Failure(
            f"{', '.join(missing)}: not there for {here}. Each worker must see the folders of the machine that sends "
            "the cases under the same paths, as a shared folder gives them"
        )
    return attempt(function, item, shared)


def _check_address(address: str) -> None:
    parts = urlsplit(address)
    try:
        good = parts.scheme in ("tcp", "tls") and bool(parts.hostname) and bool(parts.port)
    except ValueError:  # a port that is no number
        good = False
    if not good:
        raise UniconError(f"--dask {address}: expected a Dask scheduler's address, such as tcp://10.0.0.1:8786.")


def _check_workers(client: Client, address: str) -> None:
    threads = client.nthreads()
    if not threads:
        logger.warning("The Dask cluster at %s has no workers yet: waiting for one (dask worker %s).", address, address)
    if any(number > 1 for number in threads.values()):
        logger.warning(
            "A Dask worker with several threads holds as many cases in memory at once (most here: %d). Start workers "
            "with --nthreads 1, and as many of them as there is memory for.",
            max(threads.values()),
        )
    # A lambda travels whole; a function of this package could not be asked whether the package is there.
    found = client.run(lambda: importlib.util.find_spec("unicon_pipeline") is not None)
    versions = {worker: None for worker, there in found.items() if not there}
    if not versions:
        versions = client.run(lambda: importlib.import_module("unicon_pipeline").__version__)
    for worker, version in versions.items():
        if version != __version__:
            has = f"unicon-pipeline {version}" if version else "no unicon-pipeline"
            raise UniconError(f"The Dask worker {worker} has {has}, here is {__version__}: install it there.")


@contextmanager
def _dask_keeps_quiet() -> Iterator[None]:
    """What Dask would log of lost workers and connections is said here, by the case's name or as an error."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]  # Dask gives both a level
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels):
            one.setLevel(level)


def _absolute(value: object) -> object:
    """The same with every path in it made absolute, since a worker runs in a folder of its own."""
    if isinstance(value, Path):
        return value.absolute()
    if type(value) in (list, tuple):
        return type(value)(_absolute(item) for item in value)
    if isinstance(value, dict):
        return {key: _absolute(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: _absolute(getattr(value, name)) for name in fields})
    return value


def _needed(item: object, shared: tuple) -> list[Path]:
    """What a worker must find: the item's files, and where results go, or the folder that this will be made in."""
    paths = {path.absolute() for path in (*_paths(item), *(path for path in shared if isinstance(path, Path)))}
    return sorted({next(place for place in (path, *path.parents) if place.exists()) for path in paths})


def _paths(value: object) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _paths(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _paths(getattr(value, field.name))
