"""The extension plan of a case-level task, and what it reads beside the image: all that is fitted before a network is.

The cases come as a `Cohort`, whose parts are in one order; cases are named by their number in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from unicon_pipeline.budget import TRAINING_PASSES
from unicon_pipeline.case_fit import FitOptions
from unicon_pipeline.case_head import fusion_options
from unicon_pipeline.case_reading import (
    CLASSES,
    CLINICAL,
    FINDINGS,
    IMAGE,
    INPUTS,
    REGION,
    SURVIVAL,
    USUAL_DESCRIPTORS,
    CaseReading,
    DescriptorEncoder,
    Figures,
    Outcome,
    class_name,
)
from unicon_pipeline.clinical import ClinicalEncoder, Row
from unicon_pipeline.contract import FoundationSpec
from unicon_pipeline.dataset import Task
from unicon_pipeline.decisions import Decision
from unicon_pipeline.errors import PlanError
from unicon_pipeline.extension_plan import (
    AdapterPlan,
    ExtensionPlan,
    HeadPlan,
    Planned,
    Schedule,
    StemPlan,
    held_out_cases,
)
from unicon_pipeline.loader import cases_per_step
from unicon_pipeline.plan import NOMINAL_STEPS, DataPlan
from unicon_pipeline.store import read_meta, stored_case_ids
from unicon_pipeline.survival import SURVIVAL_LOSSES, time_bins
from unicon_pipeline.survival_metrics import horizons
from unicon_pipeline.tables import enumerated

MEMBERS = 5  # of the shipped ensemble
_ALPHA_PER_RANK = 16.0  # rank 2 has UNICON's alpha for prognosis, 32
_ADAPTER_LEARNING_RATE = 3e-4


@dataclass(frozen=True)
class CaseOptions:
    """What a person may choose. `inputs`: of INPUTS, None: all that the task offers. `epochs`: of the head, at most.

    `loss`: of survival, a key of SURVIVAL_LOSSES. `repeats`: of the cross-validation, None: see `rounds`.
    `descriptors`: of the region. `adapter_rank`: 0: the encoder is frozen; else all is trained end to end as well, for
    `adapter_epochs`, and within `minutes` (of all folds together) if given.
    """

    loss: str = "mtlr"
    inputs: tuple[str, ...] | None = None
    repeats: int | None = None
    epochs: int = 60
    descriptors: tuple[str, ...] = USUAL_DESCRIPTORS
    adapter_rank: int = 0
    adapter_epochs: int = 20
    minutes: float | None = None

    @property
    def rounds(self) -> int:
        """Of the cross-validation: as many as `repeats`, else 5, or 1 where each fold trains the encoder."""
        return self.repeats or (1 if self.adapter_rank else 5)


@dataclass(frozen=True, eq=False)
class Cohort:
    """The cases that can be trained on, those of `task`: their tables' rows and region figures, None where absent.

    `outcome`: without what is fitted. `targets`: as `Outcome.targets` gives them.
    """

    task: Task
    clinical: tuple[Row | None, ...]
    descriptors: tuple[Figures | None, ...]
    outcome: Outcome
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def case_ids(self) -> tuple[str, ...]:
        """In order."""
        return tuple(case.case_id for case in self.task.cases)

    @property
    def patients(self) -> tuple[str, ...]:
        """Of each case."""
        return tuple(case.patient for case in self.task.cases)

    @property
    def strata(self) -> np.ndarray:
        """(n,) what each batch should have its share of: event or not, the class; nothing for findings."""
        if self.outcome.kind == SURVIVAL:
            return self.targets[:, 1]
        return np.nan_to_num(self.targets, nan=-1) if self.outcome.kind == CLASSES else np.zeros(len(self))

    def numbers(self, case_ids: Sequence[str]) -> np.ndarray:
        """Of these cases, in order."""
        return np.flatnonzero(np.isin(self.case_ids, list(case_ids)))


def read_cohort(planned: Planned) -> Cohort:
    """The preprocessed cases of a classification or prognosis task that have an outcome.

    Raises:
        PlanError: none has, or there is one class only.
    """
    task, stored = planned.task, set(stored_case_ids(planned.cases))
    rows = dict(zip(task.targets.case_ids, task.targets.rows_of(task.targets.case_ids), strict=True))
    outcome = _outcome(task)
    cases = tuple(case for case in task.cases if case.case_id in stored and case.case_id in rows)
    targets = outcome.targets([rows[case.case_id] for case in cases])
    known = [not np.isnan(row).all() for row in targets]
    cases, targets = tuple(case for case, has in zip(cases, known) if has), targets[np.array(known, bool)]
    if not cases:
        raise PlanError(f"{task.name}: no preprocessed case has an outcome in {task.folder / 'targets.csv'}.")
    if outcome.kind == CLASSES and len(np.unique(targets)) < 2:
        only = outcome.names[int(targets[0])]
        raise PlanError(f"{task.name}: all preprocessed cases are {only}; there is nothing to tell apart.")
    names = [case.case_id for case in cases]
    clinical = [None] * len(cases) if task.clinical is None else task.clinical.rows_of(names)
    descriptors = [read_meta(planned.cases, name).get("descriptors") for name in names]
    if outcome.kind == SURVIVAL:
        outcome = dataclasses.replace(outcome, horizons_days=horizons(*targets.T))
    used = dataclasses.replace(task, cases=cases)
    return Cohort(used, tuple(clinical), tuple(descriptors), outcome, targets)


def fit_reading(cohort: Cohort, training: Sequence[int], inputs: Sequence[str], options: CaseOptions) -> CaseReading:
    """Encoders and time bins of these cases alone.

    Raises:
        PlanError: prognosis, and none of them has an event.
    """
    outcome, clinical, descriptors = cohort.outcome, None, None
    if CLINICAL in inputs:
        names = [cohort.case_ids[n] for n in training]
        outcomes = cohort.task.targets.rows_of(names)
        columns = {name: [row[name] for row in outcomes] for name in cohort.task.targets.columns}
        clinical = ClinicalEncoder.fit([cohort.clinical[n] for n in training], columns)
    if REGION in inputs:
        descriptors = DescriptorEncoder.fit([cohort.descriptors[n] for n in training], options.descriptors)
    if outcome.kind == SURVIVAL:
        edges = time_bins(*cohort.targets[np.asarray(training, np.intp)].T)
        outcome = dataclasses.replace(outcome, loss=options.loss, edges_days=edges)
    return CaseReading(tuple(inputs), clinical, descriptors, outcome)


def plan_case_extension(
    planned: Planned,
    cohort: Cohort,
    spec: FoundationSpec,
    known_stems: dict[str, StemPlan],
    options: CaseOptions,
    fold: int | str,
    seed: int,
) -> tuple[ExtensionPlan, CaseReading]:
    """Plans the extension of a model by a task that judges whole cases.

    The steps of its schedule are epochs, the most that may be chosen; with an adapter, of the training end to end.

    Args:
        known_stems: the stems that the model has, by modality.
        fold: which of the plan's folds is held out for validation, or "all" to train on every case.

    Raises:
        PlanError: an input that the task has not, nothing to read, an adapter without an image, no fold of that number,
            nothing to train on.
    """
    plan = planned.plan
    held = held_out_cases(plan, fold)
    training = tuple(name for name in cohort.case_ids if name not in held)
    if not training:
        raise PlanError(f"{plan.task}: fold {fold} leaves no preprocessed case to train on.")
    readable = [name for name in plan.modalities if name in spec.input.modalities or name in known_stems]
    inputs = _inputs(planned, cohort, readable, options)
    reading = fit_reading(cohort, cohort.numbers(training), inputs, options)
    image = IMAGE in inputs
    if not image and not reading.names:
        raise PlanError(f"{plan.task}: nothing can be read of its cases: see the decisions of its plan, or --inputs.")
    if options.adapter_rank and not image:
        raise PlanError(f"--adapter-rank adapts what reads the image, and {plan.task} is to be judged without one.")
    trainings = options.rounds * max(len(plan.folds), 2) + 1 if fold == "all" else 1
    minutes = options.minutes and options.minutes / trainings
    sizes = fusion_options(len(training)) | reading.row_sizes | {"image": int(image), "members": MEMBERS}
    extension = ExtensionPlan(
        task=plan.task,
        modalities=plan.modalities,
        new_stems=(),
        reused_stems=tuple(known_stems[name] for name in readable if name in known_stems) if image else (),
        adapter=AdapterPlan("low_rank", rank, _ALPHA_PER_RANK * rank) if (rank := options.adapter_rank) else None,
        head=HeadPlan("fusion_ensemble", output_channels(reading.outcome), sizes),
        schedule=schedule_of(cohort.strata[cohort.numbers(training)], options, minutes),
        training_cases=training,
        validation_cases=tuple(name for name in cohort.case_ids if name in held),
        seed=seed,
        decisions=(),
    )
    parts = (
        *_input_decisions(extension, reading, readable, options),
        *_fit_decisions(extension, reading, options, fold),
        *(_end_to_end_decisions(extension, plan, options, trainings) if options.adapter_rank else ()),
        _cases_decision(extension, len(plan.folds), options, fold),
    )
    return dataclasses.replace(extension, decisions=parts), reading


def schedule_of(strata: np.ndarray, options: CaseOptions, minutes: float | None) -> Schedule:
    """For training cases of these strata; end to end, steps that hold an event each, and so many minutes at most."""
    if not options.adapter_rank:
        fit = FitOptions()
        return Schedule(options.epochs, None, fit.learning_rate, fit.weight_decay, warmup_steps=0)
    size = cases_per_step(strata.tolist())
    steps = max(1, round(options.adapter_epochs * len(strata) / size))
    return Schedule(steps, minutes, _ADAPTER_LEARNING_RATE, warmup_steps=steps // 10, accumulate=size)


def output_channels(outcome: Outcome) -> int:
    """The number of logits of a case."""
    if outcome.kind == SURVIVAL:
        return SURVIVAL_LOSSES[outcome.loss].outputs(outcome.edges_days)
    return len(outcome.names)


def _outcome(task: Task) -> Outcome:
    if task.task_type == "prognosis":
        return Outcome(SURVIVAL)
    if len(task.targets.columns) > 1:
        return Outcome(FINDINGS, tuple(task.targets.columns))
    cells = {cell for cell in next(iter(task.targets.columns.values())) if cell is not None}
    numbers_first = sorted(cells, key=lambda cell: (isinstance(cell, str), cell))
    return Outcome(CLASSES, tuple(class_name(cell) for cell in numbers_first))


def _inputs(planned: Planned, cohort: Cohort, readable: Sequence[str], options: CaseOptions) -> tuple[str, ...]:
    """What is read: what was asked for and is there, or all that is there."""
    there = {
        IMAGE: bool(readable),
        REGION: planned.plan.region is not None,
        CLINICAL: any(row is not None for row in cohort.clinical),
    }
    wanted = options.inputs or tuple(name for name in INPUTS if there[name])
    unknown = [name for name in wanted if name not in INPUTS]
    if unknown:
        raise PlanError(f"--inputs {unknown[0]}: there are {', '.join(INPUTS)}.")
    why = {
        IMAGE: f"the model's foundation and stems read none of {', '.join(planned.plan.modalities)}",
        REGION: "dataset.json names no region",
        CLINICAL: "clinical.csv has no row of a preprocessed case",
    }
    for name in wanted:
        if not there[name]:
            raise PlanError(f"{planned.plan.task} cannot read the {name}: {why[name]}.")
    return tuple(name for name in INPUTS if name in wanted)


def _input_decisions(
    extension: ExtensionPlan, reading: CaseReading, readable: Sequence[str], options: CaseOptions
) -> Iterator[Decision]:
    reason = "chosen by the user" if options.inputs else "all that the task offers"
    yield Decision("inputs", ", ".join(reading.inputs), reason)
    if IMAGE in reading.inputs:
        for name in (name for name in extension.modalities if name not in readable):
            told = " (its figures in the region count)" if reading.descriptors is not None else ""
            why = f"the model has no stem for it{told}; a segmentation task with {name}, added before, brings one"
            yield Decision(f"image of {name}", "left out", why)
        for stem in extension.reused_stems:
            yield Decision(f"stem {stem.modality}", "reused, frozen", "an earlier task brought it")
        value = "none, the encoder is frozen"
        why = "small cohorts are overfitted by less; each case goes through the encoder once, and is kept"
        if adapter := extension.adapter:
            value = f"rank {adapter.rank}, alpha {adapter.alpha:g}"
            why = "chosen by the user (UNICON's for prognosis: rank 2, alpha 32); the foundation itself stays frozen"
        yield Decision("adapter", value, why)
    if reading.descriptors is not None:
        names = reading.descriptors.names
        yield Decision("region", f"{len(names)} figures", f"{', '.join(names)}: logarithms of sizes, standardised")
    if reading.clinical is not None:
        out = [f"{name}: {why}" for name, why in reading.clinical.left_out.items()]
        told = "; ".join([*out, *reading.clinical.remarks]) or "all columns are used"
        yield Decision("covariates", f"{len(reading.clinical.names)} columns", told)


def _fit_decisions(
    extension: ExtensionPlan, reading: CaseReading, options: CaseOptions, fold: int | str
) -> Iterator[Decision]:
    sizes, cases = extension.head.options, len(extension.training_cases)
    pooled = "weights of positions are learned" if sizes["attention"] else "too few cases to learn where to look"
    size = f"{4 * sizes['units']}-{sizes['units']}, {MEMBERS} together"
    yield Decision("head", size, f"fusion of all inputs, sized for {cases} cases; {pooled}; starts as a linear model")
    yield _outcome_decision(reading.outcome, calibrated=extension.adapter is None or fold == "all")
    where = " of the head, on the frozen encoder" if extension.adapter else ""
    reason = f"inner folds of the training cases choose those{where}; 0 is the ridge model of the figures alone"
    yield Decision("epochs", f"0 to {options.epochs}", reason)


def _end_to_end_decisions(
    extension: ExtensionPlan, plan: DataPlan, options: CaseOptions, trainings: int
) -> Iterator[Decision]:
    schedule, cases = extension.schedule, len(extension.training_cases)
    how = (
        f"{options.adapter_epochs} epochs in steps of {schedule.accumulate} cases, each with an event or each class "
        f"where enough are; AdamW {schedule.learning_rate:g}, from the fitted head on"
    )
    yield Decision("end to end", f"{schedule.steps} steps", how)
    # A round's folds together train on all cases but one share of them.
    rounds = options.rounds if trainings > 1 else 0
    computed = options.adapter_epochs * cases * (trainings - rounds)
    pass_minutes = plan.estimated_minutes_to_train / (NOMINAL_STEPS * plan.batch_size * TRAINING_PASSES)
    minutes = computed * (TRAINING_PASSES + 1) * pass_minutes  # one more: see `case_training.backward_by_case`
    bound = ""
    if options.minutes:
        minutes, bound = min(minutes, options.minutes), f", cut at {options.minutes:g} minutes in all"
    value = f"about {max(minutes, 1):.0f} minutes" if minutes < 90 else f"about {minutes / 60:.0f} hours"
    reason = f"{trainings} trainings that compute {computed} cases{bound}, on the machine that the data are planned for"
    yield Decision("training time", value, reason)


def _outcome_decision(outcome: Outcome, calibrated: bool) -> Decision:
    if outcome.kind != SURVIVAL:
        how = "each class counts the same" if outcome.kind == CLASSES else "a blank counts for nothing"
        told = "probabilities are calibrated" if calibrated else "probabilities are not calibrated, as --fold all does"
        return Decision("loss", "cross-entropy", f"{enumerated(outcome.names)}; {how}; {told}")
    days = ", ".join(f"{day:.0f}" for day in outcome.edges_days)
    reason = f"time bins between days {days}: each holds as many of the training cases' events"
    if outcome.loss == "cox":
        reason = "log hazard ratios, and the baseline hazard of the training cases"
    return Decision("loss", outcome.loss, reason)


def _cases_decision(extension: ExtensionPlan, folds: int, options: CaseOptions, fold: int | str) -> Decision:
    count = len(extension.training_cases)
    if fold == "all":
        value = f"{count}, {options.rounds} x {folds} folds"
        reason = (
            "cross-validation judges, with whole patients and outcomes spread evenly; then all cases train what is "
            "shipped, as a fold's model lacks a part of them"
        )
        return Decision("cases", value, reason)
    held = len(extension.validation_cases)
    return Decision("cases", f"{count}, {held} held out (fold {fold})", "validated after training")
