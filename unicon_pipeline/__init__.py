"""UNICON: one medical-imaging foundation model that grows by tasks and modalities and forgets nothing.

    import unicon_pipeline as unicon
    unicon.plan_and_preprocess(...)
    unicon.extend(...)
    report = unicon.predict(...)

Names are resolved on first use, so importing the package costs no torch. Arrays are z, y, x.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
_HOMES = {
    "UniconError": "errors",
    "DatasetError": "errors",
    "PlanError": "errors",
    "CheckpointError": "errors",
    "PredictionError": "errors",
    "FoundationSpec": "contract",
    "Grid": "geometry",
    "Volume": "geometry",
    "read_image": "geometry",
    "read_labels": "geometry",
    "write_image": "geometry",
    "write_labels": "geometry",
    "Task": "dataset",
    "read_task": "dataset",
    "make_phantom": "phantoms",
    "write_phantom_task": "phantoms",
    "DataPlan": "plan",
    "format_plan": "plan",
    "Machine": "budget",
    "PRESETS": "budget",
    "Overrides": "input_shape",
    "machine_for": "machine",
    "plan_and_preprocess": "preprocess",
    "import_checkpoint": "importer",
    "ImportOptions": "imported",
    "foundation_spec": "model_record",
    "describe": "info",
    "open_model": "array_api",
    "predict_array": "array_api",
    "ArrayResult": "array_api",
    "schedule_for": "extension_plan",
    "format_evaluation": "evaluate",
    "run_demo": "demo",
}

# A verb that shares its name with its module -> the function of that module which calling the verb calls.
_VERBS = {
    "pretrain": "pretrain",
    "extend": "extend",
    "predict": "predict_folder",
    "evaluate": "evaluate",
    "verify": "verify",
}

__all__ = ["__version__", *_HOMES, *_VERBS]


class _VerbModule(ModuleType):
    """A module that can be called: `unicon.extend(...)` is `unicon_pipeline.extend.extend(...)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        verb = self.__name__.rpartition(".")[2]
        return getattr(self, _VERBS[verb])(*args, **kwargs)


class _Package(ModuleType):
    # Importing a submodule binds it to the package under its name, over whatever had that name. So that
    # unicon.extend(...) works whoever imported what before, the module itself is made callable at that moment.
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VERBS and type(value) is ModuleType:
            value.__class__ = _VerbModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return import_module(f"{__name__}.{name}")
    if name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
