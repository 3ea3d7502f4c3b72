"""What a model folder says of itself: its chain, the foundation's declaration, plans and cards; without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unicon_pipeline.case_reading import CaseReading
from unicon_pipeline.contract import FoundationSpec
from unicon_pipeline.errors import CheckpointError, PlanError
from unicon_pipeline.extension_plan import ExtensionPlan, StemPlan
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.records import read_json, read_record, sha256_file, sha256_json, to_dict

EMBEDDED = Path(__file__).parent / "embedded"
CHAIN_FILE = "model.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-+]*")


@dataclass(frozen=True)
class NativePlan:
    """`kind` is a key of the registry of native networks, `options` its JSON arguments.

    `outputs`: what it tells apart, without background. `origin`: one line on where it came from.
    """

    kind: str
    options: dict[str, Any]
    outputs: tuple[str, ...]
    origin: str


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

    A task has an `extension`, or it came with the checkpoint and is `native`. `case`: of an extension that judges whole
    cases, what it reads beside the image and what it answers.
    """

    data: DataPlan
    extension: ExtensionPlan | None
    native: NativePlan | None = None
    case: CaseReading | None = None
    schema_version: int = 1

    def __post_init__(self) -> None:
        if (self.extension is None) == (self.native is None):
            raise ValueError("a task has either an extension or a native network.")
        if self.case is not None and self.extension is None:
            raise ValueError("a native task judges cases in its own way.")


class ModelRecord:
    """A model folder, opened for reading what its JSON files say; `ModelFolder` opens the networks too.

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
        return read_record(self.checked("foundation/foundation.json"), FoundationSpec, CheckpointError)

    def stem_plans(self) -> dict[str, StemPlan]:
        """The stems that earlier tasks brought, by modality."""
        return {
            modality: read_record(self.checked(f"stems/{modality}/stem.json"), StemPlan, CheckpointError)
            for entry in self.chain.entries
            for modality in entry.stems
        }

    def task_plan(self, task: str) -> TaskPlan:
        """The plan of a task.

        Raises:
            CheckpointError: the model has no such task; the message lists those it has.
        """
        if task not in self.tasks:
            has = ", ".join(self.tasks) or "none yet"
            raise CheckpointError(f"{self.path} has no task {task!r}; it has: {has}.")
        return read_record(self.checked(f"tasks/{task}/plan.json"), TaskPlan, CheckpointError)

    def check_new(self, task: str) -> None:
        """Raises PlanError: the model has the task."""
        if task in self.tasks:
            raise PlanError(f"{self.path} has the task {task} already; tasks are added once. Rename the task.")

    def card(self, task: str) -> dict[str, Any]:
        """A task's card: data fingerprint, metrics, seeds, versions, probe."""
        return read_json(self.checked(f"tasks/{task}/card.json"), CheckpointError)

    def checked(self, file: str) -> Path:
        """The path of a file of the chain, once its digest was compared."""
        if file not in self._sound:
            digest = next((entry.files[file] for entry in self.chain.entries if file in entry.files), None)
            if digest is None:
                raise CheckpointError(f"{self.path / file} belongs to no entry of {CHAIN_FILE}.")
            if problem := file_problem(self.path, file, digest):
                raise CheckpointError(f"{problem} Restore it from a copy; unicon_verify checks all files.")
            self._sound.add(file)
        return self.path / file


def foundation_spec(path: Path) -> FoundationSpec:
    """The declaration of the model in `path`, or of the embedded foundation where there is no model yet."""
    return ModelRecord(path if (Path(path) / CHAIN_FILE).exists() else EMBEDDED).spec()


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
