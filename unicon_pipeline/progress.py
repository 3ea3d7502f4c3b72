"""Progress for people: a bar on a terminal, nothing elsewhere (log lines tell the rest)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress_bar(items: Iterable[Item], what: str, name: Callable[[Item], str], total: int) -> Iterator[Item]:
    """Passes the items through, and shows how many of `total` are done, the present one, and the time left."""
    with tqdm(total=total, desc=what, disable=not sys.stderr.isatty(), leave=False) as bar:
        for item in items:
            bar.set_postfix_str(name(item))
            yield item
            bar.update()


@contextmanager
def steps_bar(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """Beneath the bar of items: the steps of the present one, and the time left for it; call it with steps done."""
    hidden = total < 2 or not sys.stderr.isatty()
    with tqdm(total=total, desc=what, disable=hidden, leave=False, position=1) as bar:
        yield bar.update
