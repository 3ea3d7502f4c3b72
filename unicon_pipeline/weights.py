"""Weights on disk (safetensors, never pickles) and in a module, each tensor once and under one name."""

from __future__ import annotations

from pathlib import Path

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
    if any(problems.values()):
        report = "; ".join(f"{len(keys)} {what}, such as {keys[0]}" for what, keys in problems.items() if keys)
        raise CheckpointError(f"{source} does not fit the declared architecture: {report}.")
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(found[key])


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
