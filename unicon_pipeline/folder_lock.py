"""A folder that one run at a time writes to."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)


@contextmanager
def folder_lock(folder: Path, poll_seconds: float = 0.5) -> Iterator[None]:
    """Holds the folder for one run; a second run waits, and says so. A dead run holds nothing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "ab") as file:
        waiting = False
        while not _try_lock(file):
            if not waiting:
                logger.warning("Another run is writing to %s: waiting for it to end.", folder)
            waiting = True
            time.sleep(poll_seconds)
        yield


def _try_lock(file: IO[bytes]) -> bool:
    """An operating-system lock, which ends with the process however it ends; released by closing the file."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as problem:  # some network folders know no locks; writes are atomic all the same
        logger.debug("No lock on %s: %s", file.name, problem)
    return True
