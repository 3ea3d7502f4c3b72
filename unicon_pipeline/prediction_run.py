"""What a prediction run did: case by case, on which machine, with which model; `run.json`."""

from __future__ import annotations

from dataclasses import dataclass

DONE, SOME_FAILED, NOTHING_DONE = 0, 1, 2


@dataclass(frozen=True)
class TaskRun:
    """One task on one case. `modalities`: those that were used. `warnings`: what a person should look at."""

    task: str
    modalities: tuple[str, ...]
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class CaseRun:
    """One case. `skipped`: task -> why it could not use this input. `failure`: the reason, or None."""

    case_id: str
    modalities: tuple[str, ...]
    done: tuple[TaskRun, ...]
    skipped: dict[str, str]
    failure: str | None


@dataclass(frozen=True)
class Arithmetic:
    """What decides whether two runs of one model give the same bits."""

    precision: str
    machine: dict[str, str | int | bool]


@dataclass(frozen=True)
class RunReport:
    """`run.json`. `model` is the digest of the whole model, so of everything that decides a result.

    `precision`, `machine`: where the cases were predicted; of a cluster of several kinds of machines, the first
    case's. `other_machines`: how those that differ from it do their arithmetic.
    """

    model: str
    tasks: tuple[str, ...]
    cases: tuple[CaseRun, ...]
    precision: str
    tta: bool
    machine: dict[str, str | int | bool]
    versions: dict[str, str]
    other_machines: tuple[Arithmetic, ...] = ()
    schema_version: int = 1

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
