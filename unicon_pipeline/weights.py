"""Weights on disk (safetensors, never pickles) and in a module, each tensor once and under one name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.records import atomic_path


def canonical_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers (the tensors themselves), each once and under its first name.

    One tensor can be reachable under several names in dynamic-network-architectures
    (`convs.0.conv` is `convs.0.all_modules.0`), so a plain state dict holds some of them twice.
    """
    first_name: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if first_name.setdefault(id(tensor), name) == name}


def load_exactly(wanted: dict[str, Tensor], found: dict[str, Tensor], source: str) -> None:
    """Copies `found` into the tensors of `wanted`, converting the number type.

    Raises:
        CheckpointError: a key is missing, unknown, or of another shape; the message names keys of each kind.
    """
    common = set(wanted) & set(found)
    problems = {
        "missing": sorted(set(wanted) - common),
        "unknown": sorted(set(found) - common),
        "of another shape": sorted(key for key in common if wanted[key].shape != found[key].shape),
    }
    _raise_if_any(problems, source)
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(found[key])


def take_state(module: nn.Module, found: dict[str, Tensor], source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The module's whole state out of a foreign state dict, and a report of what was there.

    A tensor may stand under any of its names in `module`, or under several if all of them agree.

    Args:
        found: keys relative to `module`; everything in it must belong there.

    Returns:
        The tensors, in the number types of `found`, under the names of `canonical_state`; and
        {"tensors": matched keys, "parameters": numbers in them, "number_types": names of their types}.

    Raises:
        CheckpointError: a key is missing, unknown, of another shape, not finite, or contradicts its other name.
    """
    first_name: dict[int, str] = {}
    state, present = {}, set()
    faults = {"missing": [], "of another shape": [], "not finite": [], "contradicting another name": []}
    names = module.state_dict(keep_vars=True)
    for name, tensor in names.items():
        canonical = first_name.setdefault(id(tensor), name)
        if name not in found:
            continue
        present.add(canonical)
        if found[name].shape != tensor.shape:
            faults["of another shape"].append(name)
        elif canonical in state:
            if not torch.equal(state[canonical], found[name]):
                faults["contradicting another name"].append(name)
        elif not math.isfinite(found[name].sum(dtype=torch.float64)):
            faults["not finite"].append(name)
        else:
            state[canonical] = found[name]
    faults["missing"] = sorted(set(first_name.values()) - present)
    _raise_if_any({**faults, "unknown": sorted(set(found) - set(names))}, source)
    report = {
        "tensors": len(set(found) & set(names)),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "number_types": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}),
    }
    return state, report


def _raise_if_any(faults: dict[str, list[str]], source: str) -> None:
    if any(faults.values()):
        report = "; ".join(f"{len(keys)} {what}, such as {keys[0]}" for what, keys in faults.items() if keys)
        raise CheckpointError(f"{source} does not fit the declared architecture: {report}.")


def save_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes tensors, whole or not at all; the same tensors give the same bytes."""
    tensors = {key: state[key].detach().cpu().contiguous() for key in sorted(state)}
    with atomic_path(path) as aside:
        safetensors.torch.save_file(tensors, aside, metadata)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Reads tensors; the header is checked against the file's size before anything is allocated.

    Raises:
        CheckpointError: the file is missing, truncated, or no safetensors file.
    """
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as problem:
        raise CheckpointError(f"{path} cannot be read as safetensors: {problem}. Restore it from a copy.") from problem


def read_metadata(path: Path) -> dict[str, str]:
    """The strings stored beside the tensors."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as problem:
        raise CheckpointError(f"{path} cannot be read as safetensors: {problem}.") from problem
