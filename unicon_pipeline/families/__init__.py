"""The families of foundations: one module each, imported when a model or a checkpoint needs it.

A family module registers its networks and knows its checkpoints. What only some families need (MONAI, transformers)
is therefore never imported for the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from importlib import import_module
from types import ModuleType
from typing import TypeVar

from unicon_pipeline.contract import FoundationSpec
from unicon_pipeline.errors import CheckpointError, UniconError
from unicon_pipeline.foundation import FOUNDATIONS, Foundation
from unicon_pipeline.model_record import NativePlan
from unicon_pipeline.native import NATIVES, NativeModel

Part = TypeVar("Part")

# Architecture, as foundation.json names it -> the module that registers it.
ARCHITECTURES = {
    "residual_encoder": "dna_encoders",
    "plain_encoder": "dna_encoders",
    "primus": "primus",
    "inflated_resnet": "inflated_resnet",
    "ctvit": "ctvit",
    "segres_encoder": "monai_encoders",
    "swin_unetr": "monai_encoders",
}

# Native task, as its plan names it -> the module that registers its network.
NATIVE_TASKS = {"nnunet": "nnunet", "zero_shot": "zero_shot"}


def build_foundation(spec: FoundationSpec) -> Foundation:
    """The network that `spec` declares, with fresh weights.

    Raises:
        UniconError: this installation has no such architecture.
        CheckpointError: the architecture does not take these arguments.
    """
    _import(spec.architecture, ARCHITECTURES, FOUNDATIONS, "foundation architecture")
    return _built(f"foundation.json: {spec.architecture}", lambda: FOUNDATIONS[spec.architecture](spec))


def build_native(plan: NativePlan, foundation: Foundation) -> NativeModel:
    """The network of a native task, with fresh weights; raises as `build_foundation`."""
    _import(plan.kind, NATIVE_TASKS, NATIVES, "native task")
    return _built(f"plan.json: {plan.kind}", lambda: NATIVES[plan.kind](foundation, plan.options))


def family_module(name: str) -> ModuleType:
    """Imports a family's module; what its libraries announce about torch's future stays unsaid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return import_module(f"{__name__}.{name}")


def _import(name: str, homes: dict[str, str], registry: Iterable[str], what: str) -> None:
    if name in homes:
        family_module(homes[name])
    elif name not in registry:
        known = ", ".join(sorted({*homes, *registry}))
        raise UniconError(f"Unknown {what} {name!r}; this installation has: {known}.")


def _built(what: str, build: Callable[[], Part]) -> Part:
    try:
        return build()
    except (LookupError, TypeError, ValueError, AssertionError, RuntimeError) as problem:
        raise CheckpointError(f"{what} cannot be built from its declared arguments: {problem}.") from problem
