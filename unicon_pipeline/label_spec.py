"""Labels: which values of a label map make up which output of a task (nnU-Net v2's `labels`)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unicon_pipeline.errors import DatasetError

logger = logging.getLogger(__name__)

_LARGEST = 32_000


@dataclass(frozen=True)
class Labels:
    """The outputs of a segmentation task, without background.

    `values`: the label values that belong to each output. `regions`: outputs may overlap (sigmoid each);
    else they exclude each other (softmax, background as channel 0). `written`: the value that an output gets
    in an exported label map (for regions `regions_class_order`, later ones over earlier ones).
    `ignore`: the value of voxels that are not annotated, or None.
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    regions: bool
    written: tuple[int, ...]
    ignore: int | None

    @property
    def output_channels(self) -> int:
        """Channels of the network's output."""
        return len(self.names) + (0 if self.regions else 1)


def parse_labels(description: dict[str, Any], source: Path) -> Labels:
    """The labels of a `dataset.json`.

    Raises:
        DatasetError: no labels, a value that is no whole number, a value named twice, or a wrong class order.
    """
    named = description.get("labels")
    if not isinstance(named, dict) or not named:
        raise DatasetError(f'{source} needs labels, such as {{"background": 0, "tumour": 1}}.')
    members = {str(name): _values(name, value, source) for name, value in named.items()}
    ignore = members.pop("ignore", None)
    if members.get("background", (0,)) != (0,):
        raise DatasetError(f"{source}: the background must have the value 0, found {named['background']!r}.")
    if sum(values == (0,) for values in members.values()) > 1:
        raise DatasetError(f"{source}: two labels share the value 0, which is the background: {dict(named)}.")
    outputs = {name: values for name, values in members.items() if name != "background" and values != (0,)}
    if not outputs:
        raise DatasetError(f"{source}: labels name nothing but the background.")
    order = description.get("regions_class_order")
    regions = any(isinstance(value, list) and len(value) > 1 for value in named.values())
    flat = [value for values in outputs.values() for value in values]
    if 0 in flat:
        raise DatasetError(f"{source}: 0 is the background and belongs to no label: {dict(named)}.")
    if ignore is not None and (len(ignore) != 1 or ignore[0] == 0 or ignore[0] in flat):
        raise DatasetError(f"{source}: ignore must be one value that no label has, found {named['ignore']!r}.")
    if regions:
        whole = isinstance(order, list) and all(type(value) is int and value in flat for value in order)
        if not whole or len(order) != len(outputs):
            raise DatasetError(
                f"{source}: the labels are regions, so regions_class_order must give one label value for each of "
                f"{', '.join(outputs)}; found {order!r}."
            )
        written = tuple(order)
        lost = _lost_regions(outputs, written)
        if lost:
            logger.warning(
                "%s: with regions_class_order %s, exported label maps cannot show %s: later regions are written over "
                "earlier ones. Name the regions from the largest to the smallest, each with a value of its own.",
                source, order, ", ".join(lost),
            )  # fmt: skip
    else:
        if len(set(flat)) != len(flat):
            raise DatasetError(f"{source}: two labels share a value: {dict(named)}.")
        written = tuple(values[0] for values in outputs.values())
    return Labels(tuple(outputs), tuple(outputs.values()), regions, written, ignore[0] if ignore else None)


def _lost_regions(outputs: dict[str, tuple[int, ...]], written: tuple[int, ...]) -> list[str]:
    """The regions whose own value, painted in order with later regions over earlier ones, is no longer theirs."""
    lost = []
    for name, own in zip(outputs, written):
        last = [value for values, value in zip(outputs.values(), written) if own in values][-1]
        if own not in outputs[name] or last not in outputs[name] or written.count(own) > 1:
            lost.append(name)
    return lost


def _values(name: Any, value: Any, source: Path) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= _LARGEST for v in values):
        hint = f' Write it as "{value}": {name} (nnU-Net version 2).' if str(name).isdigit() else ""
        raise DatasetError(
            f"{source}: label {name!r} is {value!r}; expected a whole number from 0 to {_LARGEST}.{hint}"
        )
    return tuple(values)
