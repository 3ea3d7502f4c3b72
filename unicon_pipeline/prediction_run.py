"""What a prediction run did: case by case, on which machine, with which model; `run.json`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from unicon_pipeline.errors import PredictionError, UniconError
from unicon_pipeline.folder_lock import folder_lock
from unicon_pipeline.records import read_record, sha256_file, write_record

logger = logging.getLogger(__name__)

DONE, SOME_FAILED, NOTHING_DONE = 0, 1, 2
RUN_FILE = "run.json"


@dataclass(frozen=True)
class TaskRun:
    """One task on one case. `modalities`: those that were used. `warnings`: what a person should look at.

    `tiles`: of the sliding window, computed; `air_tiles`: left out, as nothing but air.
    """

    task: str
    modalities: tuple[str, ...]
    seconds: float
    warnings: tuple[str, ...]
    tiles: int = 0
    air_tiles: int = 0


@dataclass(frozen=True)
class CaseRun:
    """One case. `skipped`: task -> why it could not use this input. `failure`: the reason, or None.

    `inputs`: modality -> sha256 of its file, and clinical.csv -> of the case's row, where a task reads it; `outputs`:
    file within OUT -> sha256.
    """

    case_id: str
    modalities: tuple[str, ...]
    done: tuple[TaskRun, ...]
    skipped: dict[str, str]
    failure: str | None
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    outputs: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Arithmetic:
    """What decides whether two runs of one model give the same bits."""

    precision: str
    machine: dict[str, Any]


@dataclass(frozen=True)
class RunReport:
    """`run.json`. `model` is the digest of the whole model, so of everything that decides a result.

    `asked`: the options that decide it too. `precision`, `machine`: where the cases were predicted; of a cluster of
    several kinds of machines, the first case's. `other_machines`: how those that differ from it do their arithmetic.
    """

    model: str
    tasks: tuple[str, ...]
    asked: dict[str, Any]
    cases: tuple[CaseRun, ...] = ()
    precision: str = "unknown"
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    other_machines: tuple[Arithmetic, ...] = ()
    schema_version: int = 2

    @property
    def exit_code(self) -> int:
        """0: all done; 1: some cases failed; 2: nothing could be done."""
        if not any(case.done for case in self.cases):
            return NOTHING_DONE
        return SOME_FAILED if any(case.failure for case in self.cases) else DONE

    def summary(self) -> str:
        """One line per failure, then one for the run."""
        failed = [case for case in self.cases if case.failure]
        lines = [f"{case.case_id} FAILED: {case.failure}" for case in failed]
        seconds = sum(run.seconds for case in self.cases for run in case.done)
        results = sum(len(case.done) for case in self.cases)
        lines.append(f"{results} results from {len(self.cases)} cases in {seconds:.1f} s; {len(failed)} cases failed.")
        return "\n".join(lines)


class RunRecord:
    """`run.json` while it grows: after each case it holds all that is done, by this run or by others beside it.

    Several runs (parts) may share a folder: each adds its own cases, under the folder's lock.
    """

    def __init__(self, out: Path, model: str, tasks: tuple[str, ...], asked: dict[str, Any], case_ids: Sequence[str]):
        """`case_ids`: all cases of the input, in order, whichever part they belong to."""
        self._out, self._order = Path(out), {case_id: position for position, case_id in enumerate(case_ids)}
        versions = {name: version(name) for name in ("unicon-pipeline", "torch", "numpy", "SimpleITK")}
        self._empty = RunReport(model, tasks, asked, versions=versions)

    def begin(self, keep: bool) -> dict[str, CaseRun]:
        """What earlier or parallel runs of the same model and options have done here.

        Args:
            keep: else the record starts anew.
        """
        with folder_lock(self._out):
            report = self._stored() if keep else self._empty
            write_record(self._out / RUN_FILE, report)
        return {case.case_id: case for case in report.cases}

    def add(self, case: CaseRun, arithmetic: Arithmetic | None) -> None:
        """Adds a case, or replaces an older record of it."""
        with folder_lock(self._out):
            report = self._stored()
            cases = {old.case_id: old for old in report.cases} | {case.case_id: case}
            ordered = tuple(sorted(cases.values(), key=lambda run: self._order[run.case_id]))
            report = dataclasses.replace(report, cases=ordered)
            write_record(self._out / RUN_FILE, _with_arithmetic(report, arithmetic))

    def report(self, case_ids: Sequence[str]) -> RunReport:
        """The record of these cases."""
        stored, wanted = self._stored(), set(case_ids)
        return dataclasses.replace(stored, cases=tuple(case for case in stored.cases if case.case_id in wanted))

    def _stored(self) -> RunReport:
        path = self._out / RUN_FILE
        if not path.is_file():
            return self._empty
        try:
            stored = read_record(path, RunReport, PredictionError)
        except UniconError as problem:  # of an older version, or damaged
            logger.warning("%s Nothing of it is kept.", problem)
            return self._empty
        if (stored.model, stored.tasks, stored.asked) != (self._empty.model, self._empty.tasks, self._empty.asked):
            logger.warning("%s is of another model or other options: its cases are predicted again.", path)
            return self._empty
        return dataclasses.replace(stored, cases=tuple(case for case in stored.cases if case.case_id in self._order))


def still_valid(case: CaseRun, inputs: dict[str, str], out: Path) -> bool:
    """Whether a recorded case need not be predicted again: done, same input files, its results as they were written."""
    if case.failure or case.inputs != inputs:
        return False
    return all((out / file).is_file() and sha256_file(out / file) == digest for file, digest in case.outputs.items())


def _with_arithmetic(report: RunReport, arithmetic: Arithmetic | None) -> RunReport:
    if arithmetic is None:
        return report
    if not report.machine:
        return dataclasses.replace(report, precision=arithmetic.precision, machine=arithmetic.machine)
    if arithmetic in (Arithmetic(report.precision, report.machine), *report.other_machines):
        return report
    logger.warning("The cases are predicted on machines that differ; last digits may. %s says how.", RUN_FILE)
    return dataclasses.replace(report, other_machines=(*report.other_machines, arithmetic))
