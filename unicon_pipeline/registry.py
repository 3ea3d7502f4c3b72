"""Named parts: a foundation family, stem, adapter or head is one class registered under one name.

The name is what JSON records hold; nothing on disk names a class or a module path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from unicon_pipeline.errors import UniconError

Part = TypeVar("Part")


class Registry(Generic[Part]):
    """A closed list of named parts; duplicates are refused, unknown names list what there is."""

    def __init__(self, kind: str):
        self.kind = kind
        self._parts: dict[str, Part] = {}

    def register(self, name: str) -> Callable[[Part], Part]:
        """Decorator that adds a part under `name`."""

        def add(part: Part) -> Part:
            if name in self._parts:
                raise ValueError(f"{self.kind} {name!r} is registered twice.")
            self._parts[name] = part
            return part

        return add

    def __getitem__(self, name: str) -> Part:
        if name not in self._parts:
            raise UniconError(f"Unknown {self.kind} {name!r}; this installation has: {', '.join(self)}.")
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._parts))
