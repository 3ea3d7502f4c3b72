"""Training batches from preprocessed cases, the same ones for the same seed and step.

The batch of step s depends on the seed and on s alone, never on the number of workers or on earlier steps: a run
that was cut goes on with `first_step` and sees what it would have seen. Batches are made in spawned processes, a few
steps ahead. Those import this module, so torch is imported only where a finished batch becomes tensors.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from unicon_pipeline.augment import (
    PATCH_SCALES,
    UNCHANGED,
    VOLUME_SCALES,
    SpatialChange,
    change_intensity,
    draw_spatial_change,
    mirror,
    recipe_for,
    resample,
    seeded_globals,
)
from unicon_pipeline.contract import ZYX
from unicon_pipeline.errors import DatasetError, UniconError
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.store import StoredCase, open_case
from unicon_pipeline.workers import CHECK_SECONDS, notice_death

STEPS_AHEAD = 2  # finished or running batches beyond one per worker; bounds the memory
CASES_KEPT_OPEN = 64

_ORDER, _SAMPLE, _INTENSITY = range(3)  # what a random stream is for


@dataclass(eq=False)
class BatchLoader(ABC):
    """An endless iterator of batches; a context manager that ends its processes.

    Cases come in a new random order in each round, so after any number of rounds all were used equally often.

    Args:
        cases_folder: the folder of preprocessed cases.
        case_ids: the cases to use.
        plan: gives the modalities (channel order), intensity rules, sample shape and spacing.
        batch_size: samples per batch.
        seed: not negative.
        workers: processes; 0: batches are made in this one, as they are asked for.
        augment: whether samples are changed at random.
        first_step: the step of the first batch.

    Attributes:
        step: the step whose batch comes next.
    """

    cases_folder: Path
    case_ids: Sequence[str]
    plan: DataPlan
    batch_size: int
    seed: int
    workers: int
    augment: bool = True
    first_step: int = 0

    def __post_init__(self) -> None:
        if not self.case_ids:
            raise DatasetError(f"No case of {self.cases_folder} is left to train on.")
        if self.batch_size < 1 or min(self.seed, self.workers, self.first_step) < 0:
            raise UniconError(
                f"The loader needs a batch size of at least 1 and seed, workers and first step not negative; found "
                f"{self.batch_size}, {self.seed}, {self.workers}, {self.first_step}."
            )
        self.step = self.first_step
        self._pool: ProcessPoolExecutor | None = None
        self._pending: deque[Future] = deque()
        self._closed = False
        self._opened: OrderedDict[str, _OpenCase] = OrderedDict()
        self._air = self.plan.air
        self._recipes = [recipe_for(self.plan.intensity[name]) for name in self.plan.modalities]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        """The batch of `step`.

        Raises:
            UniconError: a worker died, or a case cannot be read (DatasetError); the loader is then closed.
        """
        if self._closed:
            raise StopIteration
        try:
            arrays = self._from_workers() if self.workers else self.batch(self.step)
        except BrokenProcessPool as problem:
            self.close()
            raise UniconError(
                f"Step {self.step}: a data loading process ended unexpectedly, most often because the memory ran out. "
                f"Continue from this step with fewer workers (now {self.workers}) or a smaller batch."
            ) from problem
        except BaseException:
            self.close()
            raise
        self.step += 1
        return _as_tensors(arrays)

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker processes, after the batches they are at; the loader then gives no more batches."""
        self._closed = True
        self._pending.clear()
        self._opened.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def batch(self, step: int) -> dict[str, Any]:
        """The batch of one step as numpy arrays (see the classes for what it holds), made in this process.

        Raises:
            DatasetError: a case is missing, damaged, or not what the plan describes.
        """
        samples = []
        for position in range(self.batch_size):
            case = self._case(self._case_id(step * self.batch_size + position))
            generator = np.random.default_rng([self.seed, _SAMPLE, step, position])
            image, others = self._sample(case, generator, position)
            if self.augment:
                recipes = [recipe if there else None for recipe, there in zip(self._recipes, case.present, strict=True)]
                with seeded_globals(np.random.SeedSequence([self.seed, _INTENSITY, step, position])):
                    change_intensity(image, recipes)
            samples.append({"data": image, "present": case.present, **others})
        stacked = {name: np.stack([sample[name] for sample in samples]) for name in samples[0] if name != "case_ids"}
        return {**stacked, "case_ids": [sample["case_ids"] for sample in samples]}

    @abstractmethod
    def _sample(self, case: _OpenCase, generator: np.random.Generator, position: int) -> tuple[np.ndarray, dict]:
        """One sample's image (C, Z, Y, X), spatially changed already, and whatever else the batch holds of it."""

    def _draw_change(self, generator: np.random.Generator, scales: tuple[float, float]) -> SpatialChange:
        if not self.augment:
            return UNCHANGED
        return draw_spatial_change(generator, self.plan.patch_shape_zyx, self.plan.spacing_zyx_mm, scales)

    def _cut_image(self, case: _OpenCase, start_zyx: np.ndarray, change: SpatialChange) -> np.ndarray:
        fill = [air if there else 0.0 for air, there in zip(self._air, case.present, strict=True)]
        return _cut(case.stored.array, start_zyx, self.plan.patch_shape_zyx, change, fill)

    def _case_id(self, number: int) -> str:
        """The case of the number-th sample since step 0."""
        round_number, index = divmod(number, len(self.case_ids))
        return self.case_ids[self._order(np.random.default_rng([self.seed, _ORDER, round_number]))[index]]

    def _order(self, generator: np.random.Generator) -> np.ndarray:
        """The cases of one round, as places in `case_ids`."""
        return generator.permutation(len(self.case_ids))

    def _case(self, case_id: str) -> _OpenCase:
        if case_id not in self._opened:
            self._opened[case_id] = _open(self.cases_folder, case_id, self.plan)
            if len(self._opened) > CASES_KEPT_OPEN:
                self._opened.popitem(last=False)
        self._opened.move_to_end(case_id)
        return self._opened[case_id]

    def _from_workers(self) -> dict[str, Any]:
        if self._pool is None:
            settings = {item.name: getattr(self, item.name) for item in fields(self)} | {"workers": 0}
            self._pool = ProcessPoolExecutor(
                self.workers, multiprocessing.get_context("spawn"), _start_worker, (type(self), settings)
            )
        while len(self._pending) < self.workers + STEPS_AHEAD:
            self._pending.append(self._pool.submit(_make_batch, self.step + len(self._pending)))
        while not wait([self._pending[0]], CHECK_SECONDS).done:
            notice_death(self._pool)
        result = self._pending[0].result()
        self._pending.popleft()
        return result


@dataclass(eq=False)
class PatchLoader(BatchLoader):
    """Random patches with their labels, for segmentation.

    A batch: `data` float32 (B, C, Z, Y, X), normalised, absent modalities exactly 0; `labels` int16 (B, 1, Z, Y, X),
    label map values; `present` bool (B, C); `case_ids`. Outside of an image lies air, labelled 0.

    The last samples of a batch, the given fraction and at least one, hold a random foreground voxel of a random
    class that their case has; a case without foreground gives a random patch there too.

    Args:
        foreground_fraction: of the batch; 0: none is forced.
    """

    foreground_fraction: float = 1 / 3

    def _sample(self, case: _OpenCase, generator: np.random.Generator, position: int) -> tuple[np.ndarray, dict]:
        if case.stored.labels is None:
            raise DatasetError(
                f"The case {case.stored.case_id} in {self.cases_folder} has no labels, which training on patches needs."
            )
        shape = np.array(self.plan.patch_shape_zyx)
        room = np.array(case.stored.array.shape[1:]) - shape  # negative where the image is smaller than the patch
        change = self._draw_change(generator, PATCH_SCALES)
        start = np.where(room < 0, room // 2, generator.integers(0, np.maximum(room, 0) + 1))
        if position >= self.batch_size - self._forced() and case.foreground:
            voxels = case.foreground[generator.integers(len(case.foreground))]
            start = voxels[generator.integers(len(voxels))] - shape // 2
            if change.matrix_zyx is None:
                # image instead of padding; a turned patch stays around its voxel, which could leave it otherwise
                start = np.where(room < 0, room // 2, np.clip(start, 0, np.maximum(room, 0)))
        labels = _cut(case.stored.labels, start, self.plan.patch_shape_zyx, change, [0])
        others = {"labels": labels.astype(np.int16, copy=False), "case_ids": case.stored.case_id}
        return self._cut_image(case, start, change), others

    def _forced(self) -> int:
        if self.foreground_fraction <= 0:
            return 0
        return max(1, self.batch_size - round(self.batch_size * (1 - self.foreground_fraction)))


@dataclass(eq=False)
class VolumeLoader(BatchLoader):
    """Whole volumes with their target vectors, for tasks that have one answer per case.

    A batch: `data` float32 (B, C, Z, Y, X) of the plan's shape, the image centred, cropped or padded with air;
    `targets` float32 (B, T), NaN where blank; `present` bool (B, C); `case_ids`. Where the plan has a region, `region`
    uint8 (B, Z, Y, X), 1 in it, changed with the image, and `has_region` bool (B,): false, and all zeros, where the
    case has none. Where rows are given, `tabular` float32 (B, D).

    Args:
        targets: case id -> (T,) target vector, or a number.
        tabular: case id -> (D,) figures.
        strata: case id -> what each stretch of cases should have its share of (event or not, the class). With E of n
            cases in one of two strata, any n / E cases in a row, rounded up, hold one of it.
    """

    targets: dict[str, np.ndarray] = field(kw_only=True)
    tabular: dict[str, np.ndarray] | None = field(kw_only=True, default=None)
    strata: dict[str, int] | None = field(kw_only=True, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, given in (("targets", self.targets), ("figures", self.tabular), ("stratum", self.strata)):
            missing = [] if given is None else [case_id for case_id in self.case_ids if case_id not in given]
            if missing:
                advice = " Add them to targets.csv or leave them out." if what == "targets" else ""
                raise DatasetError(f"No {what} for {', '.join(missing)}.{advice}")

    def _sample(self, case: _OpenCase, generator: np.random.Generator, position: int) -> tuple[np.ndarray, dict]:
        shape, case_id = self.plan.patch_shape_zyx, case.stored.case_id
        start = (np.array(case.stored.array.shape[1:]) - np.array(shape)) // 2
        change = self._draw_change(generator, VOLUME_SCALES)
        others = {"targets": np.asarray(self.targets[case_id], dtype=np.float32), "case_ids": case_id}
        if self.plan.region is not None:
            mask = case.stored.labels
            region = np.zeros(shape, np.uint8) if mask is None else _cut(mask, start, shape, change, [0])[0]
            others |= {"region": region.astype(np.uint8, copy=False), "has_region": np.array(region.any())}
        if self.tabular is not None:
            others["tabular"] = np.asarray(self.tabular[case_id], dtype=np.float32)
        return self._cut_image(case, start, change), others

    def _order(self, generator: np.random.Generator) -> np.ndarray:
        """With strata, each round has the same strata in the same places, evenly apart; which case, is drawn."""
        if self.strata is None:
            return super()._order(generator)
        strata = np.array([self.strata[case_id] for case_id in self.case_ids])
        members = [generator.permutation(np.flatnonzero(strata == stratum)) for stratum in np.unique(strata)]
        place = np.concatenate([(np.arange(len(those)) + 0.5) / len(those) for those in members])
        return np.concatenate(members)[place.argsort(kind="stable")]


@dataclass(frozen=True)
class _OpenCase:
    """A stored case; `present` is bool per channel, `foreground` has (n, 3) voxel indices for each class found."""

    stored: StoredCase
    present: np.ndarray
    foreground: list[np.ndarray]


def _open(folder: Path, case_id: str, plan: DataPlan) -> _OpenCase:
    stored = open_case(folder, case_id)
    if stored.array.shape[0] != len(plan.modalities):
        raise DatasetError(
            f"The preprocessed case {case_id} in {folder} has {stored.array.shape[0]} channels, the plan has "
            f"{len(plan.modalities)} ({', '.join(plan.modalities)}). Run unicon_plan_and_preprocess again."
        )
    present = np.array([name in stored.meta["present"] for name in plan.modalities])
    foreground = [np.array(voxels) for voxels in stored.meta["foreground"].values() if len(voxels)]
    return _OpenCase(stored, present, foreground)


def _cut(
    stored: Any, start_zyx: np.ndarray, shape_zyx: ZYX, change: SpatialChange, fill: Sequence[float]
) -> np.ndarray:
    """A sample (C, Z, Y, X) of a stored array, (C, Z, Y, X) or (Z, Y, X), as the spatial change asks for it.

    `start_zyx`: where the sample would begin if it were not changed; it may lie outside.
    """
    if change.matrix_zyx is None:
        return mirror(_read(stored, start_zyx, start_zyx + np.array(shape_zyx), fill), change)
    centre = start_zyx + (np.array(shape_zyx) - 1) / 2
    reach = change.reach(shape_zyx)
    start, stop = np.floor(centre - reach).astype(int), np.ceil(centre + reach).astype(int) + 1
    return mirror(resample(_read(stored, start, stop, fill), change, centre - start, shape_zyx, fill), change)


def _read(stored: Any, start_zyx: np.ndarray, stop_zyx: np.ndarray, fill: Sequence[float]) -> np.ndarray:
    """The box [start, stop) of a stored array, filled where it lies outside."""
    size = np.array(stored.shape[-3:])
    low, high = np.clip(start_zyx, 0, size), np.clip(stop_zyx, 0, size)
    inside = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    values = stored[(Ellipsis, *inside)].reshape(len(fill), *(high - low))
    if np.array_equal(low, start_zyx) and np.array_equal(high, stop_zyx):
        return values
    box = np.empty((len(fill), *(stop_zyx - start_zyx)), values.dtype)
    box[:] = np.array(fill, values.dtype).reshape(-1, 1, 1, 1)
    place = tuple(slice(int(a), int(b)) for a, b in zip(low - start_zyx, high - start_zyx, strict=True))
    box[(slice(None), *place)] = values
    return box


def cases_per_step(strata: Sequence[int], at_least: int = 8) -> int:
    """How many cases in a row of `VolumeLoader` hold one of the rarest stratum (all, if they are fewer)."""
    rarest = min(Counter(strata).values())
    return min(len(strata), max(at_least, -(-len(strata) // rarest)))


def usual_workers() -> int:
    """Processes for a training run: one core is left to the network, and more than 4 are seldom waited for."""
    return max(1, min(4, (os.cpu_count() or 2) - 1))


def _as_tensors(arrays: dict[str, Any]) -> dict[str, Any]:
    import torch  # not at the top: see the module's docstring

    return {name: torch.from_numpy(a) if isinstance(a, np.ndarray) else a for name, a in arrays.items()}


# In a worker process: the loader that makes its batches.
_loader: BatchLoader | None = None


def _start_worker(loader_class: type[BatchLoader], settings: dict[str, Any]) -> None:
    global _loader
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _loader = loader_class(**settings)


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make_batch(step: int) -> dict[str, Any]:
    return _loader.batch(step)
