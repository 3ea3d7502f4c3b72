"""The wanted tasks of a model, loaded once, on one case after another.

What tasks have in common is done once: reading, and preparing a case for tasks whose plans agree.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unicon_pipeline.device import choose_device, choose_precision, machine_facts
from unicon_pipeline.errors import CheckpointError, PredictionError
from unicon_pipeline.evidence import fast_window, trusted_precision
from unicon_pipeline.export import CaseExport, LastLayer
from unicon_pipeline.geometry import Volume
from unicon_pipeline.inference_form import inference_form
from unicon_pipeline.model import TaskModel
from unicon_pipeline.model_folder import ModelFolder
from unicon_pipeline.model_record import ModelRecord, TaskPlan
from unicon_pipeline.native import NativeModel
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.prediction_run import Arithmetic, TaskRun
from unicon_pipeline.prepare import PreparedCase, prepare_case
from unicon_pipeline.records import sha256_json, to_dict
from unicon_pipeline.sliding_window import Slab, Window, whole_logits, window_slabs
from unicon_pipeline.workers import free_megabytes

logger = logging.getLogger(__name__)

_NOTHING_FOUND = "nothing was found; if that surprises, check orientation, units (HU, SUV) and field of view"
_PREPARED_BY = ("modalities", "orientation", "spacing_zyx_mm", "intensity", "conventions")  # of a plan


@dataclass(frozen=True)
class Options:
    """How to predict. `precision`: auto, fp32, bf16 or fp16. `compute_air`: leave no tile out.

    `fast`: with fewer or larger tiles, as the task's card found to be faster at nearly the same labels.
    """

    device: str = "auto"
    precision: str = "auto"
    tta: bool = False
    compute_air: bool = False
    fast: bool = False


@dataclass(frozen=True)
class TaskResult:
    """One task on one case: `labels` and `probabilities` on the case's grid, or `scores` per output of a whole case."""

    run: TaskRun
    labels: Volume | None = None
    probabilities: dict[str, Volume] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


class WantedTasks:
    """The wanted tasks of a model, and what they say of their input."""

    def __init__(self, folder: ModelRecord, tasks: Sequence[str] | None):
        """Raises CheckpointError: the model has no task, or not this one."""
        self.tasks = tuple(dict.fromkeys(tasks)) if tasks else folder.tasks
        if not self.tasks:
            raise CheckpointError(f"{folder.path} has no task yet. Add one with unicon_extend.")
        self.task_plans: dict[str, TaskPlan] = {task: folder.task_plan(task) for task in self.tasks}
        self.plans: dict[str, DataPlan] = {task: plan.data for task, plan in self.task_plans.items()}

    def channel_names(self) -> dict[int, str]:
        """Channel number -> modality, as the tasks agree on it.

        Raises:
            PredictionError: two tasks number their channels differently.
        """
        names: dict[int, str] = {}
        for task, plan in self.plans.items():
            for number, name in enumerate(plan.modalities):
                if names.setdefault(number, name) != name:
                    raise PredictionError(
                        f"Channel {number:04d} is {names[number]} in one of the tasks and {name} in {task}. "
                        'Say what the files are in a dataset.json beside them: {"channel_names": {"0": "CT"}}, '
                        "or predict these tasks one by one with -t."
                    )
        return names

    def unusable(self, task: str, modalities: Sequence[str]) -> str | None:
        """Why a task cannot use an input with these modalities; None if it can."""
        wanted = self.plans[task].modalities
        native = self.task_plans[task].native is not None  # it never learned to do without one
        if (all if native else any)(name in modalities for name in wanted):
            return None
        return f"needs {(' and ' if native else ' or ').join(wanted)}, the case has {', '.join(modalities)}"

    def alike(self) -> list[tuple[str, ...]]:
        """The tasks in groups that see a case in the same way, in the order of their first tasks."""
        groups: dict[str, list[str]] = {}
        for task, plan in self.plans.items():
            whole = to_dict(plan)
            names = _PREPARED_BY + (("patch_shape_zyx",) if plan.view == "volume" else ())
            key = sha256_json([plan.view, *(whole[name] for name in names)])
            groups.setdefault(key, []).append(task)
        return [tuple(group) for group in groups.values()]


class Predictor(WantedTasks):
    """The wanted tasks' networks on their device, ready for any number of cases."""

    def __init__(self, folder: ModelFolder, tasks: Sequence[str] | None, options: Options):
        super().__init__(folder, tasks)
        self.options, self.device = options, choose_device(options.device)
        cards = {task: folder.card(task) for task in self.tasks}
        self.precisions = {task: self._precision(card) for task, card in cards.items()}
        self._windows = {task: self._window(task, card) for task, card in cards.items()}
        self._networks: dict[str, nn.Module] = {}
        self._last_layers: dict[str, LastLayer] = {}
        foundation, shared = folder.foundation(), {precision: {} for precision in self.precisions.values()}
        for task in self.tasks:
            self._load(task, folder.task_model(task, foundation), shared[self.precisions[task]])

    def arithmetic(self) -> Arithmetic:
        """What decides the bits of its results, besides the model."""
        names = {task: str(precision).removeprefix("torch.") for task, precision in self.precisions.items()}
        alike = set(names.values()) if len(set(names.values())) == 1 else (f"{t}: {name}" for t, name in names.items())
        return Arithmetic(", ".join(alike), machine_facts(self.device))

    def predict(
        self, images: dict[str, Volume], tasks: Sequence[str], probabilities_in: Callable[[str], Path | None]
    ) -> Iterator[TaskResult]:
        """These tasks on one case, one after the other.

        Args:
            images: modality -> volume in HU or SUV, all on one grid; emptied, to free memory early.
            probabilities_in: gives a task's folder for files that hold its probabilities; None: they are not wanted.

        Raises:
            PredictionError: the network's output is not finite.
        """
        groups = [wanted for group in self.alike() if (wanted := [task for task in group if task in tasks])]
        for position, group in enumerate(groups):
            started = time.monotonic()
            plan, last = self.plans[group[0]], position == len(groups) - 1
            own = {name: images[name] for name in plan.modalities if name in images}
            if last:
                images.clear()
            prepared = prepare_case(own, plan)
            for task in group:
                yield self._predict(task, prepared, probabilities_in(task), started)
                started = time.monotonic()

    def _precision(self, card: dict[str, Any]) -> torch.dtype:
        if self.options.precision == "auto":
            return trusted_precision(card, self.device)
        return choose_precision(self.options.precision, self.device)

    def _window(self, task: str, card: dict[str, Any]) -> Window:
        plan, fast = self.plans[task], fast_window(card) if self.options.fast else None
        mirror_axes = plan.conventions.mirror_axes if self.options.tta else ()
        window = Window(plan.patch_shape_zyx, plan.air, self.precisions[task], mirror_axes)
        if fast is not None:
            return dataclasses.replace(window, tile_zyx=fast.tile_zyx, step=fast.step)
        if self.options.fast and plan.labels is not None:
            logger.warning("%s: its card knows no faster way that finds the same; it is predicted as usual.", task)
        return window

    def _load(self, task: str, model: TaskModel | NativeModel, shared: dict[int, Any]) -> None:
        merged = model.merged()
        network = inference_form(merged, self.device, self.precisions[task], shared)
        layers, labels = merged.last_layers(), self.plans[task].labels
        # Many classes: what the last layer gets is fewer maps to sum up and to resize than what it gives.
        if labels is not None and layers and sum(layer.in_channels for layer in layers) < labels.output_channels:
            self._last_layers[task] = as_one_layer(layers)
            network.drop_last_layers()
        self._networks[task] = network

    def _predict(
        self, task: str, prepared: PreparedCase, probabilities_in: Path | None, started: float
    ) -> TaskResult:
        plan = self.plans[task]

        def run(*warnings: str, tiles: int = 0, air_tiles: int = 0) -> TaskRun:
            return TaskRun(task, prepared.present, round(time.monotonic() - started, 3), warnings, tiles, air_tiles)

        if plan.labels is None:
            return TaskResult(run(), scores=self._scores(task, prepared))
        self._check_memory(task, prepared)
        tiles = air_tiles = 0
        export = CaseExport(plan.labels, prepared.geometry, self._last_layers.get(task), probabilities_in)
        for slab in self.slabs(task, prepared):
            maps, seen = (None if tensor is None else tensor.numpy() for tensor in (slab.maps_kzyx, slab.seen_zyx))
            export.add(maps, seen, slab.rows.stop - slab.rows.start)
            tiles, air_tiles = tiles + slab.tiles, air_tiles + slab.air_tiles
        labels, probabilities = export.result()
        warnings = () if labels.array_zyx.any() else (_NOTHING_FOUND,)
        return TaskResult(run(*warnings, tiles=tiles, air_tiles=air_tiles), labels, probabilities)

    def slabs(self, task: str, prepared: PreparedCase) -> Iterator[Slab]:
        """What the network gives for a prepared case, from its first row to its last.

        Raises:
            PredictionError: some of it is not finite.
        """
        present = tuple(name in prepared.present for name in self.plans[task].modalities)
        is_air = None if self.options.compute_air or prepared.body is None else prepared.body.is_air
        for slab in window_slabs(self._networks[task], prepared.array_czyx, present, self._windows[task], is_air):
            if slab.maps_kzyx is not None:
                _check_finite(task, slab.maps_kzyx)
            yield slab

    def _check_memory(self, task: str, prepared: PreparedCase) -> None:
        """Before hours of work: what the sums of one row of tiles and the labels take, at the least."""
        last_layer = self._last_layers.get(task)
        maps = self.plans[task].labels.output_channels if last_layer is None else last_layer[0].shape[1]
        row = 4 * maps * self._windows[task].tile_zyx[0] * math.prod(prepared.geometry.resized_shape_zyx[1:])
        needed = (2 * row + math.prod(prepared.geometry.original.shape_zyx)) / 2**20
        free = free_megabytes()
        if free is not None and needed > free:
            raise PredictionError(
                f"{task} needs at least {needed / 1024:.1f} GB for this case, and {free / 1024:.1f} GB of memory are "
                "free. Close other programs, or predict it on a machine with more memory."
            )

    def _scores(self, task: str, prepared: PreparedCase) -> dict[str, float]:
        present = tuple(name in prepared.present for name in self.plans[task].modalities)
        logits = whole_logits(self._networks[task], prepared.array_czyx, present, self.precisions[task])
        _check_finite(task, logits)
        return dict(zip(self.task_plans[task].native.outputs, logits.sigmoid().tolist(), strict=True))

def as_one_layer(layers: list[nn.Conv3d]) -> LastLayer:
    """The mean of layers that each read their own maps, as one layer that reads these side by side."""
    weights = [layer.weight.detach().flatten(1).numpy() for layer in layers]
    biases = [np.zeros(layer.out_channels) if layer.bias is None else layer.bias.detach().numpy() for layer in layers]
    return np.concatenate(weights, axis=1) / len(layers), np.mean(biases, axis=0, dtype=np.float32)


def _check_finite(task: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise PredictionError(f"{task} gave values that are not numbers; try --precision fp32.")
