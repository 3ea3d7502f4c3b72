"""The model folder: what a growing model is on disk.

Nothing written here is ever rewritten. Each extension adds files and then one entry to the chain in
`model.json`; an entry holds the digest of every file that it added and of the entry before it, so a change
anywhere is found, and a cut at any moment leaves the model as it was before. Files that no entry names are
leftovers of a cut extension and count for nothing.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unicon_pipeline.contract import FoundationSpec
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.extension_plan import StemPlan
from unicon_pipeline.families import build_foundation, build_native
from unicon_pipeline.folder_lock import folder_lock
from unicon_pipeline.foundation import Foundation, freeze
from unicon_pipeline.model import TaskModel, build_stem, build_task_model
from unicon_pipeline.model_record import CHAIN_FILE, EMBEDDED, Chain, ChainEntry, ModelRecord, TaskPlan
from unicon_pipeline.native import NativeModel
from unicon_pipeline.records import (
    atomic_path,
    read_record,
    sha256_file,
    sha256_json,
    to_dict,
    write_json,
    write_record,
)
from unicon_pipeline.weights import canonical_state, load_exactly, load_weights, save_weights

WEIGHTS_FILE = "weights.safetensors"


class ModelFolder(ModelRecord):
    """A model folder, opened for its networks, or for adding one extension."""

    def foundation(self) -> Foundation:
        """The frozen foundation with its weights."""
        foundation = build_foundation(self.spec())
        self._load(foundation, "foundation")
        return freeze(foundation)

    def stem(self, stem: StemPlan, foundation: Foundation) -> nn.Module:
        """A trained stem, frozen."""
        built = build_stem(stem, foundation)
        self._load(built, f"stems/{stem.modality}")
        return freeze(built)

    def task_model(self, task: str, foundation: Foundation) -> TaskModel | NativeModel:
        """A task's network with its trained weights, in evaluation mode."""
        plan = self.task_plan(task)
        if plan.native is not None:
            native = build_native(plan.native, foundation)
            self._load(native, f"tasks/{task}", ("foundation.",))
            return freeze(native)
        extension = plan.extension
        stems = {stem.modality: self.stem(stem, foundation) for stem in extension.stems}
        # The stems that it brought are the model's by now, as if it reused them.
        trained = dataclasses.replace(extension, new_stems=(), reused_stems=extension.stems)
        model = build_task_model(trained, foundation, stems)
        self._load(model, f"tasks/{task}", ("foundation.", "stems."))
        return freeze(model)

    def add_task(
        self, plan: TaskPlan, model: TaskModel, card: dict[str, Any], beside: Sequence[Path] = ()
    ) -> ChainEntry:
        """Writes what a task adds, and last its entry in the chain.

        Args:
            beside: files to copy beside the card.

        Raises:
            CheckpointError: the task or one of its stems has meanwhile been added by another run.
        """
        name = plan.extension.task
        state = model.trained_state()
        with folder_lock(self.path):
            self.chain = read_record(self.path / CHAIN_FILE, Chain, CheckpointError)
            stems = tuple(stem.modality for stem in plan.extension.new_stems)
            self._refuse_doubles(name, stems)
            files = []
            for stem in plan.extension.new_stems:
                prefix = f"stems.{stem.modality}."
                own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                write_record(self.path / f"stems/{stem.modality}/stem.json", stem)
                save_weights(self.path / f"stems/{stem.modality}/{WEIGHTS_FILE}", own)
                files += [f"stems/{stem.modality}/stem.json", f"stems/{stem.modality}/{WEIGHTS_FILE}"]
            rest = {key: value for key, value in state.items() if not key.startswith("stems.")}
            files += self._write_task(plan, rest, card)
            for path in beside:
                files.append(f"tasks/{name}/{path.name}")
                with atomic_path(self.path / files[-1]) as aside:
                    shutil.copyfile(path, aside)
            trained = sum(parameter.numel() for parameter in state.values())
            return self._append("task", name, stems, files, trained)

    def add_native(self, plan: TaskPlan, state: dict[str, Tensor], card: dict[str, Any]) -> ChainEntry:
        """Writes a task that came with the foundation, and last its entry in the chain.

        Raises:
            CheckpointError: the model has a task of that name.
        """
        with folder_lock(self.path):
            self._refuse_doubles(plan.data.task, ())
            return self._append("task", plan.data.task, (), self._write_task(plan, state, card), 0)

    def _write_task(self, plan: TaskPlan, state: dict[str, Tensor], card: dict[str, Any]) -> list[str]:
        folder = f"tasks/{plan.data.task}"
        write_record(self.path / folder / "plan.json", plan)
        write_json(self.path / folder / "card.json", card)
        save_weights(self.path / folder / WEIGHTS_FILE, state)
        return [f"{folder}/{file}" for file in ("card.json", "plan.json", WEIGHTS_FILE)]

    def _append(self, kind: str, name: str, stems: tuple[str, ...], files: list[str], trained: int) -> ChainEntry:
        entry = ChainEntry(
            kind=kind,
            name=name,
            stems=stems,
            files={file: sha256_file(self.path / file) for file in files},
            trained_parameters=trained,
            added_bytes=sum((self.path / file).stat().st_size for file in files),
            previous=self.chain.head,
        )
        self.chain = Chain(self.chain.entries + (entry,), sha256_json(to_dict(entry)))
        write_record(self.path / CHAIN_FILE, self.chain)
        return entry

    def _refuse_doubles(self, name: str, stems: tuple[str, ...]) -> None:
        if name in self.tasks:
            raise CheckpointError(f"{self.path} already has the task {name}. A task is added once: rename the new one.")
        for modality in stems:
            if any(modality in entry.stems for entry in self.chain.entries):
                raise CheckpointError(
                    f"{self.path} has got a stem for {modality} from another run since this one began. "
                    "Run unicon_extend again: it will reuse that stem."
                )

    def _load(self, module: nn.Module, folder: str, without: tuple[str, ...] = ()) -> None:
        path = self.checked(f"{folder}/{WEIGHTS_FILE}")
        wanted = {name: t for name, t in canonical_state(module).items() if not name.startswith(without or ("\0",))}
        load_exactly(wanted, load_weights(path), str(path))


def create_model(path: Path, spec: FoundationSpec, weights: dict[str, Tensor]) -> ModelFolder:
    """A new model folder with a foundation and no task.

    Raises:
        CheckpointError: there is a model already.
    """
    path = Path(path)
    if (path / CHAIN_FILE).exists():
        raise CheckpointError(f"{path} already holds a model; choose another folder with -m.")
    write_record(path / "foundation/foundation.json", spec)
    save_weights(path / f"foundation/{WEIGHTS_FILE}", weights)
    write_record(path / CHAIN_FILE, Chain((), ""))
    model = ModelFolder(path)
    files = ["foundation/foundation.json", f"foundation/{WEIGHTS_FILE}"]
    model._append("foundation", spec.architecture, (), files, 0)
    return model


def open_or_create(path: Path) -> ModelFolder:
    """The model in `path`; where there is none, a new one that starts from the embedded foundation."""
    if (Path(path) / CHAIN_FILE).exists():
        return ModelFolder(path)
    embedded = ModelFolder(EMBEDDED)
    return create_model(path, embedded.spec(), load_weights(EMBEDDED / f"foundation/{WEIGHTS_FILE}"))
