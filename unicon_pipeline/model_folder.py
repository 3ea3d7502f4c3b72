"""The model folder: what a growing model is on disk.

Nothing written here is ever rewritten. Each extension adds files and then one entry to the chain in
`model.json`; an entry holds the digest of every file that it added and of the entry before it, so a change
anywhere is found, and a cut at any moment leaves the model as it was before. Files that no entry names are
leftovers of a cut extension and count for nothing.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unicon_pipeline.contract import FoundationSpec
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.extension_plan import ExtensionPlan, StemPlan
from unicon_pipeline.families import build_foundation, build_native
from unicon_pipeline.foundation import Foundation, freeze
from unicon_pipeline.model import TaskModel, build_stem, build_task_model
from unicon_pipeline.native import NativeModel, NativePlan
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.records import read_json, read_record, sha256_file, sha256_json, to_dict, write_json, write_record
from unicon_pipeline.store import folder_lock
from unicon_pipeline.weights import canonical_state, load_exactly, load_weights, save_weights

EMBEDDED = Path(__file__).parent / "embedded"
CHAIN_FILE, WEIGHTS_FILE = "model.json", "weights.safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-+]*")


@dataclass(frozen=True)
class ChainEntry:
    """One extension. `kind`: foundation or task. `files`: path within the model folder -> sha256.

    `previous`: digest of the entry before ("" for the first). `stems`: the modalities that it brought.
    """

    kind: str
    name: str
    stems: tuple[str, ...]
    files: dict[str, str]
    trained_parameters: int
    added_bytes: int
    previous: str


@dataclass(frozen=True)
class Chain:
    """`model.json`. `head` is the digest of the last entry and so of the whole model."""

    entries: tuple[ChainEntry, ...]
    head: str
    schema_version: int = 1


@dataclass(frozen=True)
class TaskPlan:
    """`plan.json` of a task: how its data becomes input, and what it added.

    A task has an `extension`, or it came with the checkpoint and is `native`.
    """

    data: DataPlan
    extension: ExtensionPlan | None
    native: NativePlan | None = None
    schema_version: int = 1

    def __post_init__(self) -> None:
        if (self.extension is None) == (self.native is None):
            raise ValueError("a task has either an extension or a native network.")


class ModelFolder:
    """A model folder, opened for reading, or for adding one extension.

    Raises:
        CheckpointError: the folder holds no model, or its chain is damaged.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if not (self.path / CHAIN_FILE).is_file():
            raise CheckpointError(
                f"{self.path} is no model folder: it has no {CHAIN_FILE}. unicon_extend makes one; -m names another."
            )
        self.chain = read_record(self.path / CHAIN_FILE, Chain, CheckpointError)
        check_chain(self.chain, self.path / CHAIN_FILE)
        self._sound: set[str] = set()

    @property
    def head(self) -> str:
        """Digest of the whole model."""
        return self.chain.head

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks in the order in which they were added."""
        return tuple(entry.name for entry in self.chain.entries if entry.kind == "task")

    def spec(self) -> FoundationSpec:
        """The foundation's declaration."""
        return read_record(self._checked("foundation/foundation.json"), FoundationSpec, CheckpointError)

    def foundation(self) -> Foundation:
        """The frozen foundation with its weights."""
        foundation = build_foundation(self.spec())
        self._load(foundation, "foundation")
        return freeze(foundation)

    def stem_plans(self) -> dict[str, StemPlan]:
        """The stems that earlier tasks brought, by modality."""
        return {
            modality: read_record(self._checked(f"stems/{modality}/stem.json"), StemPlan, CheckpointError)
            for entry in self.chain.entries
            for modality in entry.stems
        }

    def stem(self, stem: StemPlan, foundation: Foundation) -> nn.Module:
        """A trained stem, frozen."""
        built = build_stem(stem, foundation)
        self._load(built, f"stems/{stem.modality}")
        return freeze(built)

    def task_plan(self, task: str) -> TaskPlan:
        """The plan of a task.

        Raises:
            CheckpointError: the model has no such task; the message lists those it has.
        """
        if task not in self.tasks:
            has = ", ".join(self.tasks) or "none yet"
            raise CheckpointError(f"{self.path} has no task {task!r}; it has: {has}.")
        return read_record(self._checked(f"tasks/{task}/plan.json"), TaskPlan, CheckpointError)

    def card(self, task: str) -> dict[str, Any]:
        """A task's card: data fingerprint, metrics, seeds, versions, probe."""
        return read_json(self._checked(f"tasks/{task}/card.json"), CheckpointError)

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

    def add_task(self, plan: TaskPlan, model: TaskModel, card: dict[str, Any]) -> ChainEntry:
        """Writes what a task adds, and last its entry in the chain.

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

    def _checked(self, file: str) -> Path:
        """The path of a file of the chain, once its digest was compared."""
        if file not in self._sound:
            digest = next((entry.files[file] for entry in self.chain.entries if file in entry.files), None)
            if digest is None:
                raise CheckpointError(f"{self.path / file} belongs to no entry of {CHAIN_FILE}.")
            if problem := file_problem(self.path, file, digest):
                raise CheckpointError(f"{problem} Restore it from a copy; unicon_verify checks all files.")
            self._sound.add(file)
        return self.path / file

    def _load(self, module: nn.Module, folder: str, without: tuple[str, ...] = ()) -> None:
        path = self._checked(f"{folder}/{WEIGHTS_FILE}")
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


def foundation_spec(path: Path) -> FoundationSpec:
    """The declaration of the model in `path`, or of the embedded foundation where there is no model yet."""
    return ModelFolder(path if (Path(path) / CHAIN_FILE).exists() else EMBEDDED).spec()


def check_chain(chain: Chain, source: Path) -> None:
    """Each entry must name the digest of the one before it, and stay inside the folder.

    Raises:
        CheckpointError: an entry was changed, removed or reordered, or names a path outside.
    """
    previous = ""
    for entry in chain.entries:
        names = (entry.name, *entry.stems, *(part for file in entry.files for part in file.split("/")))
        if not all(_NAME.fullmatch(name) for name in names):
            raise CheckpointError(f"{source}: the entry {entry.name!r} holds a name that no model folder has.")
        if entry.previous != previous:
            raise CheckpointError(f"{source}: the chain is broken at {entry.name}: an earlier entry was changed.")
        previous = sha256_json(to_dict(entry))
    if chain.head != previous:
        raise CheckpointError(f"{source}: the chain is broken at its end: the last entry was changed.")


def file_problem(model: Path, file: str, digest: str) -> str | None:
    """What is wrong with a file of the chain, in words; None if nothing is."""
    path = model / file
    if not path.is_file():
        return f"{path} is missing."
    return None if sha256_file(path) == digest else f"{path} has changed since it was added (sha256 differs)."
