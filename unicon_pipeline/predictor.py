"""The wanted tasks of a model, loaded once, on one case after another.

What tasks have in common is done once: reading, preparing a case for tasks whose plans agree, and finding the region
that case-level tasks look at.
"""

from __future__ import annotations

import copy
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

from unicon_pipeline.case_answers import answers
from unicon_pipeline.case_prediction import Beside, Region, case_logits, oddities
from unicon_pipeline.case_reading import CLINICAL
from unicon_pipeline.clinical import Row
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
    """One task on one case: `labels` and `probabilities` on the case's grid, or `scores` per output of a whole case.

    A score is None where there is none, such as a median survival that the curve does not reach.
    """

    run: TaskRun
    labels: Volume | None = None
    probabilities: dict[str, Volume] = field(default_factory=dict)
    scores: dict[str, float | None] = field(default_factory=dict)


class WantedTasks:
    """The wanted tasks of a model, and what they say of their input.

    `task_plans` and `plans` have also the tasks that only find regions for wanted ones.
    """

    def __init__(self, folder: ModelRecord, tasks: Sequence[str] | None):
        """Raises CheckpointError: the model has no task, or not this one."""
        self.tasks = tuple(dict.fromkeys(tasks)) if tasks else folder.tasks
        if not self.tasks:
            raise CheckpointError(f"{folder.path} has no task yet. Add one with unicon_extend.")
        self.task_plans: dict[str, TaskPlan] = {task: folder.task_plan(task) for task in self.tasks}
        finders = set(self.regions.values()) & set(folder.tasks)
        self.task_plans |= {task: folder.task_plan(task) for task in sorted(finders)}
        self.plans: dict[str, DataPlan] = {task: plan.data for task, plan in self.task_plans.items()}

    @property
    def regions(self) -> dict[str, str]:
        """Case-level task -> the segmentation task that finds what it looks at."""
        return {
            task: plan.data.region
            for task, plan in self.task_plans.items()
            if plan.data.region is not None and plan.case is not None and plan.case.inputs != (CLINICAL,)
        }

    @property
    def read_clinical(self) -> bool:
        """Whether a wanted task reads clinical.csv."""
        return any(plan.case is not None and plan.case.clinical is not None for plan in self.task_plans.values())

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
        if task not in self.plans:
            return "is no task of this model"
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
            key = sha256_json([plan.view, self.regions.get(task), *(whole[name] for name in names)])
            groups.setdefault(key, []).append(task)
        return [tuple(group) for group in groups.values()]


class Predictor(WantedTasks):
    """The wanted tasks' networks on their device, ready for any number of cases."""

    def __init__(self, folder: ModelFolder, tasks: Sequence[str] | None, options: Options):
        super().__init__(folder, tasks)
        self.options, self.device = options, choose_device(options.device)
        cards = {task: folder.card(task) for task in self.task_plans}
        self.precisions = {task: self._precision(card) for task, card in cards.items()}
        self._windows = {task: self._window(task, card) for task, card in cards.items()}
        self._networks: dict[str, nn.Module] = {}
        self._last_layers: dict[str, LastLayer] = {}
        foundation, shared = folder.foundation(), {precision: {} for precision in self.precisions.values()}
        for task in self.task_plans:
            self._load(task, folder.task_model(task, foundation), shared[self.precisions[task]])

    def arithmetic(self) -> Arithmetic:
        """What decides the bits of its results, besides the model."""
        names = {task: str(precision).removeprefix("torch.") for task, precision in self.precisions.items()}
        alike = set(names.values()) if len(set(names.values())) == 1 else (f"{t}: {name}" for t, name in names.items())
        return Arithmetic(", ".join(alike), machine_facts(self.device))

    def predict(
        self,
        images: dict[str, Volume],
        tasks: Sequence[str],
        probabilities_in: Callable[[str], Path | None],
        beside: Beside | None = None,
    ) -> Iterator[TaskResult]:
        """These tasks on one case, one after the other; those that find regions before those that look at them.

        Args:
            images: modality -> volume in HU or SUV, all on one grid; emptied, to free memory early.
            probabilities_in: gives a task's folder for files that hold its probabilities; None: they are not wanted.
            beside: what case-level tasks read; its volumes are emptied too.

        Raises:
            PredictionError: the network's output is not finite.
            UniconError: nothing that a task reads is there.
        """
        beside, modalities = beside or Beside(), tuple(images)
        looked_at = {self.regions[task] for task in tasks if task in self.regions}
        why_not = {task: self.unusable(task, modalities) for task in looked_at}
        helpers = [task for task in looked_at if task not in tasks and why_not[task] is None]
        groups = [wanted for group in self.alike() if (wanted := [t for t in group if t in (*tasks, *helpers)])]
        groups.sort(key=lambda group: group[0] in self.regions)
        found: dict[str, Volume] = {}
        started = time.monotonic()  # what finding a region takes counts for the result after it
        for position, group in enumerate(groups):
            plan, finder, region = self.plans[group[0]], self.regions.get(group[0]), None
            own = {name: images[name] for name in plan.modalities if name in images}
            if finder is not None:
                described = {name: beside.own.get(name, volume) for name, volume in own.items()}
                region = Region.of(finder, found.get(finder), described, why_not[finder])
                del described
            if position == len(groups) - 1:
                images.clear()
                beside.own.clear()
            prepared = prepare_case(own, plan, None if region is None else region.mask)
            for task in group:
                if self.plans[task].labels is None:
                    result = self._judge(task, prepared, region, beside.clinical)
                else:
                    result = self._label(task, prepared, probabilities_in(task) if task in tasks else None)
                seconds = round(time.monotonic() - started, 3)
                result = dataclasses.replace(result, run=dataclasses.replace(result.run, seconds=seconds))
                if task in looked_at:
                    found[task] = result.labels
                if task in tasks:
                    yield result
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
        if self.task_plans[task].case is not None:
            network.head = copy.deepcopy(merged.head).to(self.device)  # in float32, see `case_logits`
        self._networks[task] = network

    def _label(self, task: str, prepared: PreparedCase, probabilities_in: Path | None) -> TaskResult:
        """A segmentation task; its `seconds` are still to be told."""
        plan = self.plans[task]
        self._check_memory(task, prepared)
        tiles = air_tiles = 0
        export = CaseExport(plan.labels, prepared.geometry, self._last_layers.get(task), probabilities_in)
        for slab in self.slabs(task, prepared):
            maps, seen = (None if tensor is None else tensor.numpy() for tensor in (slab.maps_kzyx, slab.seen_zyx))
            export.add(maps, seen, slab.rows.stop - slab.rows.start)
            tiles, air_tiles = tiles + slab.tiles, air_tiles + slab.air_tiles
        labels, probabilities = export.result()
        warnings = () if labels.array_zyx.any() else (_NOTHING_FOUND,)
        return TaskResult(TaskRun(task, prepared.present, 0.0, warnings, tiles, air_tiles), labels, probabilities)

    def _judge(self, task: str, prepared: PreparedCase, region: Region | None, clinical: Row | None) -> TaskResult:
        """A task that judges a whole case; its `seconds` are still to be told."""
        plan, reading, warnings = self.plans[task], self.task_plans[task].case, ()
        network, precision = self._networks[task], self.precisions[task]
        if reading is None:
            present = tuple(name in prepared.present for name in plan.modalities)
            logits = whole_logits(network, prepared.array_czyx, present, precision)
            scores = dict(zip(self.task_plans[task].native.outputs, logits.sigmoid().tolist(), strict=True))
        else:
            given = clinical, None if region is None else region.figures
            logits = case_logits(network, reading, plan, prepared, given, precision)
            scores = answers(reading.outcome, logits)
            told = () if region is None else region.warnings
            warnings = (*told, *oddities(reading, plan, prepared.present, clinical))
        _check_finite(task, logits)
        return TaskResult(TaskRun(task, prepared.present, 0.0, warnings), scores=scores)

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


def as_one_layer(layers: list[nn.Conv3d]) -> LastLayer:
    """The mean of layers that each read their own maps, as one layer that reads these side by side."""
    weights = [layer.weight.detach().flatten(1).numpy() for layer in layers]
    biases = [np.zeros(layer.out_channels) if layer.bias is None else layer.bias.detach().numpy() for layer in layers]
    return np.concatenate(weights, axis=1) / len(layers), np.mean(biases, axis=0, dtype=np.float32)


def _check_finite(task: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise PredictionError(f"{task} gave values that are not numbers; try --precision fp32.")
