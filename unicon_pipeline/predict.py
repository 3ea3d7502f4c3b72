"""Prediction: every wanted task that a case's modalities allow, back on the case's own grid.

One bad case is named with its reason and the others go on. What an earlier run left for a case is removed
before the case is tried, so that a failure cannot look like a result.
"""

from __future__ import annotations

import dataclasses
import glob
import logging
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from unicon_pipeline.case_prediction import Beside, with_own_grids
from unicon_pipeline.clinical import Row
from unicon_pipeline.dataset import Case, prediction_cases, prediction_clinical
from unicon_pipeline.errors import CheckpointError, UniconError
from unicon_pipeline.folder_lock import folder_lock
from unicon_pipeline.geometry import Volume, read_image, write_image, write_labels
from unicon_pipeline.intensity import check_units
from unicon_pipeline.model_folder import ModelFolder
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.prediction_run import Arithmetic, CaseRun, RunRecord, RunReport, still_valid
from unicon_pipeline.predictor import Options, Predictor, TaskResult, WantedTasks
from unicon_pipeline.progress import progress_bar
from unicon_pipeline.records import sha256_file, sha256_json, to_dict
from unicon_pipeline.tables import read_table, write_table
from unicon_pipeline.workers import Failure, Workers

logger = logging.getLogger(__name__)

Part = tuple[int, int]  # which one, of how many
Rows = dict[str, dict[str, float | None]]  # case -> column -> score
_FAILURES = (UniconError, OSError, RuntimeError, MemoryError)


@dataclass(frozen=True)
class _Item:
    """A case and, where a task reads it, its row of clinical.csv."""

    case: Case
    clinical: Row | None = None

    @property
    def case_id(self) -> str:
        return self.case.case_id

    def digests(self) -> dict[str, str]:
        """Of all that decides its results: modality -> sha256 of the file, and clinical.csv -> of the row."""
        row = {} if self.clinical is None else {"clinical.csv": sha256_json(self.clinical)}
        return {modality: sha256_file(path) for modality, path in self.case.images.items()} | row


@dataclass(frozen=True)
class _Job:
    """What is asked of every case. `head`: digest of the model that is meant. `own_grids`: whether images are wanted
    on the grids that they came on too."""

    model: Path
    head: str
    tasks: tuple[str, ...]
    options: Options
    save_probabilities: bool
    out: Path
    own_grids: bool


@dataclass(frozen=True)
class _Outcome:
    """A case's run; task -> output -> score of the tasks that judge a whole case; None: no predictor was there."""

    run: CaseRun
    scores: Rows = dataclasses.field(default_factory=dict)
    arithmetic: Arithmetic | None = None


def predict_folder(
    source: Path,
    out: Path,
    model: Path,
    *,
    tasks: Sequence[str] | None = None,
    save_probabilities: bool = False,
    resume: bool = False,
    part: Part | None = None,
    workers: Workers | None = None,
    **options: str | bool,
) -> RunReport:
    """Predicts a folder of images (or one image file) and writes `OUT/<Task>/` and `OUT/run.json`.

    Args:
        resume: keeps what an earlier run of the same model and options did for the same files.
        part: (k, n): the k-th of n shares of the cases, k from 0; the n runs may share `out`.
        workers: what predicts, each of its processes with a model of its own; None: this process, case by case.
        options: fields of `Options`.

    Returns:
        The report on the cases of this run.

    Raises:
        CheckpointError: no sound model, or a wanted task is not in it.
        PredictionError, DatasetError: no case could be found, or what the channels are is ambiguous.
    """
    folder, workers = ModelFolder(model), workers or Workers()
    wanted = WantedTasks(folder, tasks)
    asked_of = (folder.path, folder.head, wanted.tasks, Options(**options), save_probabilities, Path(out))
    job = _Job(*asked_of, own_grids=bool(wanted.regions))
    cases = _items(Path(source), wanted)
    own = cases if part is None else cases[part[0] :: part[1]]
    asked = to_dict(job.options) | {"save_probabilities": save_probabilities}
    record = RunRecord(job.out, job.head, job.tasks, asked, [case.case_id for case in cases])
    earlier, output = record.begin(keep=resume or part is not None), _Output(job.out, _plans(wanted))
    listed = output.listed() if resume else {}
    todo = [case for case in own if not (resume and _is_done(earlier.get(case.case_id), case, listed, job))]
    if len(todo) < len(own):
        logger.info("%d of %d cases are done already.", len(own) - len(todo), len(own))
    output.begin_tables(earlier.keys() - {case.case_id for case in todo})
    try:
        for outcome in _outcomes(todo, job, workers, output):
            _log(outcome.run)
            output.add_scores(outcome.run.case_id, outcome.scores)
            record.add(outcome.run, outcome.arithmetic)
    finally:
        _load.cache_clear()
    return record.report([case.case_id for case in own])


def _items(source: Path, wanted: WantedTasks) -> list[_Item]:
    cases = prediction_cases(source, wanted.channel_names())
    table = prediction_clinical(source) if wanted.read_clinical else None
    rows = [None] * len(cases) if table is None else table.rows_of(case.case_id for case in cases)
    return [_Item(case, row) for case, row in zip(cases, rows, strict=True)]


def _plans(wanted: WantedTasks) -> dict[str, DataPlan]:
    """Of the tasks whose results are written."""
    return {task: wanted.plans[task] for task in wanted.tasks}


def _is_done(earlier: CaseRun | None, item: _Item, listed: dict[str, set[str]], job: _Job) -> bool:
    if earlier is None or not still_valid(earlier, item.digests(), job.out):
        return False
    return all(item.case_id in listed[run.task] for run in earlier.done if run.task in listed)


def _outcomes(cases: Sequence[_Item], job: _Job, workers: Workers, output: _Output) -> Iterator[_Outcome]:
    """In the order of completion; their files are written."""
    if not cases:
        return
    if workers.in_process:
        predictor = _predictor(job)  # what is wrong with the model is wrong for all cases
        done = ((outcome.run.case_id, outcome) for outcome in _overlapped(cases, predictor, job))
    else:
        done = ((case.case_id, outcome) for case, outcome in workers.each(_predict_case, cases, job))
    images = {item.case_id: tuple(item.case.images) for item in cases}
    with closing(done):
        for case_id, outcome in progress_bar(done, "predict", lambda pair: pair[0], len(cases)):
            if isinstance(outcome, Failure):
                output.clear(case_id, half_written=True)
                outcome = _Outcome(CaseRun(case_id, images[case_id], (), {}, str(outcome)))
            yield outcome


def _overlapped(cases: Sequence[_Item], predictor: Predictor, job: _Job) -> Iterator[_Outcome]:
    """The next case is read and the last one is written while the network works on one."""
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        reading, written = reader.submit(_read, cases[0], job), None
        for item, following in zip(cases, (*cases[1:], None)):
            read = reading
            reading = reader.submit(_read, following, job) if following else None
            writing = writer.submit(_write, *_work(item.case, read, predictor, job))
            if written is not None:
                yield written.result()
            written = writing
        yield written.result()


def _predict_case(item: _Item, job: _Job) -> _Outcome:
    """Worker: one case, with its files written."""
    reading: Future = Future()
    reading.set_result(_read(item, job))
    return _write(*_work(item.case, reading, _predictor(job), job))


@dataclass(frozen=True)
class _Read:
    images: dict[str, Volume]
    inputs: dict[str, str]
    beside: Beside


def _read(item: _Item, job: _Job) -> _Read | str:
    """A case's volumes in their units (HU, SUV) and the digests of what is read; or why it cannot be read."""
    files = item.case.images
    try:
        images, own = with_own_grids(((name, path, read_image(path)) for name, path in files.items()), job.own_grids)
        for modality, volume in images.items():
            check_units(volume.array_zyx, modality, files[modality])
        return _Read(images, item.digests(), Beside(own, item.clinical))
    except _FAILURES as problem:
        return _reason(problem, item.case)


def _work(
    case: Case, reading: Future, predictor: Predictor, job: _Job
) -> tuple[_Outcome, list[TaskResult], _Scratch, _Job]:
    """What `_write` needs of a case: the outcome so far, results not yet written, and the files they grow in."""
    run = CaseRun(case.case_id, tuple(case.images), (), {}, None)
    _Output(job.out, _plans(predictor)).clear(case.case_id)
    scratch, results, read = _Scratch(job), [], reading.result()
    if isinstance(read, str):
        return _Outcome(dataclasses.replace(run, failure=read)), results, scratch, job
    skipped = {task: reason for task in predictor.tasks if (reason := predictor.unusable(task, case.images))}
    run = dataclasses.replace(run, skipped=skipped, inputs=read.inputs)
    try:
        usable = [task for task in predictor.tasks if task not in skipped]
        for result in predictor.predict(read.images, usable, scratch.of, read.beside):
            results.append(result)
    except _FAILURES as problem:
        run = dataclasses.replace(run, failure=_reason(problem, case))
    return _Outcome(run, arithmetic=predictor.arithmetic()), results, scratch, job


def _write(outcome: _Outcome, results: list[TaskResult], scratch: _Scratch, job: _Job) -> _Outcome:
    """The outcome, once the results' files are there."""
    run, scores, files = outcome.run, {}, {}
    output = _Output(job.out, {})
    with scratch:
        try:
            for result in results:
                if result.labels is None:
                    scores[result.run.task] = result.scores
                else:
                    written = output.write(result.run.task, run.case_id, result)
                    files |= {path.relative_to(job.out).as_posix(): sha256_file(path) for path in written}
                run = dataclasses.replace(run, done=(*run.done, result.run), outputs=dict(files))
        except OSError as problem:
            run = dataclasses.replace(run, failure=str(problem))
    return dataclasses.replace(outcome, run=run, scores=scores)


def _reason(problem: Exception, case: Case) -> str:
    logger.debug("%s", case.case_id, exc_info=True)
    return str(problem) or type(problem).__name__


class _Scratch:
    """Folders beside the results for files that probability maps grow in; they go when the maps are written."""

    def __init__(self, job: _Job):
        self._job, self._folders = job, ExitStack()

    def of(self, task: str) -> Path | None:
        """A task's folder; None where no probabilities are wanted."""
        if not self._job.save_probabilities:
            return None
        self._job.out.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=f".{task}.partial.", dir=self._job.out)
        return Path(self._folders.enter_context(folder))

    def __enter__(self) -> _Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self._folders.close()


class _Output:
    """`OUT/<Task>/`: label maps and probability maps per case, or one `predictions.csv` that grows case by case."""

    def __init__(self, folder: Path, plans: dict[str, DataPlan]):
        self.folder, self._plans = folder, plans

    def clear(self, case_id: str, half_written: bool = False) -> None:
        """Removes what an earlier run left for a case, and on demand what a killed process had half written."""
        for task, plan in self._plans.items():
            if plan.labels is None:
                continue
            for path in _outputs(self.folder / task, case_id, plan):
                path.unlink(missing_ok=True)
                if half_written:
                    for aside in path.parent.glob(f".*.partial.{glob.escape(path.name)}"):
                        aside.unlink(missing_ok=True)

    def write(self, task: str, case_id: str, result: TaskResult) -> list[Path]:
        """A case's label map and its probability maps."""
        written = [self.folder / task / f"{case_id}.nii.gz"]
        for name, volume in result.probabilities.items():
            written.append(_probability_path(self.folder / task, case_id, name))
            write_image(written[-1], volume.array_zyx, volume.grid)
        write_labels(written[0], result.labels.array_zyx, result.labels.grid)
        return written

    def begin_tables(self, kept: set[str]) -> None:
        """Removes from the tables of an earlier run all cases but those that are `kept`."""
        for task, plan in self._plans.items():
            if plan.labels is None and kept:
                self._change(task, lambda rows: {case_id: row for case_id, row in rows.items() if case_id in kept})
            elif plan.labels is None:
                self._table(task).unlink(missing_ok=True)

    def listed(self) -> dict[str, set[str]]:
        """Task -> the cases that its table has."""
        tables = {task: self._table(task) for task, plan in self._plans.items() if plan.labels is None}
        return {task: set(read_table(path).case_ids) if path.is_file() else set() for task, path in tables.items()}

    def add_scores(self, case_id: str, scores: Rows) -> None:
        """A case's row in each table, blank where there is no score; runs beside this one add theirs."""
        for task, of_case in scores.items():
            row = {name: None if score is None else round(score, 6) for name, score in of_case.items()}
            self._change(task, lambda rows, row=row: rows | {case_id: row})

    def _change(self, task: str, change: Callable[[Rows], Rows]) -> None:
        path, before = self._table(task), {}
        with folder_lock(self.folder):
            if path.is_file():
                table = read_table(path)
                rows = zip(*table.columns.values(), strict=True)
                before = {name: dict(zip(table.columns, row)) for name, row in zip(table.case_ids, rows)}
            after = dict(sorted(change(before).items()))
            if after:
                columns = tuple(next(iter(after.values())))
                write_table(path, columns, {name: [row[column] for column in columns] for name, row in after.items()})
            else:
                path.unlink(missing_ok=True)

    def _table(self, task: str) -> Path:
        return self.folder / task / "predictions.csv"


_LOADING = threading.Lock()  # else two threads of a Dask worker would each load the model


def _predictor(job: _Job) -> Predictor:
    with _LOADING:
        return _load(job.model, job.head, job.tasks, job.options)


@lru_cache(maxsize=1)
def _load(model: Path, head: str, tasks: tuple[str, ...], options: Options) -> Predictor:
    folder = ModelFolder(model)
    if folder.head != head:
        raise CheckpointError(f"{model} is not the model that this run began with: it was extended. Run again.")
    return Predictor(folder, tasks, options)


def _log(run: CaseRun) -> None:
    for task, reason in run.skipped.items():
        logger.info("%s: %s is skipped: it %s", run.case_id, task, reason)
    for task_run in run.done:
        for warning in task_run.warnings:
            logger.warning("%s, %s: %s", run.case_id, task_run.task, warning)
    if run.failure:
        logger.error("%s failed: %s", run.case_id, run.failure)


def _outputs(folder: Path, case_id: str, plan: DataPlan) -> list[Path]:
    names = ("background", *plan.labels.names)
    return [folder / f"{case_id}.nii.gz", *(_probability_path(folder, case_id, name) for name in names)]


def _probability_path(folder: Path, case_id: str, name: str) -> Path:
    return folder / "probabilities" / f"{case_id}_{re.sub(r'[^A-Za-z0-9]+', '_', name)}.nii.gz"
