"""What a case-level task reads beside the image, as figures, and what it answers; fitted on its training cases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unicon_pipeline.clinical import ClinicalEncoder, NumericColumn, Row
from unicon_pipeline.descriptors import DESCRIPTORS, linear_row
from unicon_pipeline.spreadsheet import Cell

IMAGE, REGION, CLINICAL = INPUTS = ("image", "region", "clinical")
CLASSES, FINDINGS, SURVIVAL = "classes", "findings", "survival"

# Few enough for a cohort of 40: size, uptake, both together, and roundness. Large ones may take all DESCRIPTORS.
USUAL_DESCRIPTORS = (
    "volume_ml", "sphericity", "suv_max", "suv_mean", "suv_peak", "metabolic_volume_ml", "tlg_g",
)  # fmt: skip

# A region's descriptors: name -> figure; None or NaN where one cannot be known.
Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class DescriptorEncoder:
    """Encodes a region's descriptors as `linear_row` reads them, standardised, a gap as the training cases' mean.

    Where training had gaps, a column of 0 and 1 says so: one for all descriptors that lack the same cases (those of
    one modality), or a missing PET would count several times.
    """

    columns: tuple[NumericColumn, ...]

    @classmethod
    def fit(cls, rows: Sequence[Figures | None], wanted: Sequence[str] = USUAL_DESCRIPTORS) -> DescriptorEncoder:
        """Learns from the training cases; what none of them knows, or what all have alike, is left out.

        Args:
            rows: each case's descriptors; None for a case without a region.
            wanted: some of DESCRIPTORS.
        """
        values = _logarithms(rows)
        columns, patterns = [], set()
        for number, name in enumerate(DESCRIPTORS):
            known = values[~np.isnan(values[:, number]), number]
            if name not in wanted or not len(known) or np.ptp(known) <= 1e-9 * np.abs(known).max():
                continue
            pattern = np.isnan(values[:, number]).tobytes()
            gaps = len(known) < len(values) and pattern not in patterns
            patterns.add(pattern)
            columns.append(NumericColumn(name, float(known.mean()), float(known.std()), gaps))
        return cls(tuple(columns))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the encoded columns."""
        return tuple(name for column in self.columns for name in column.names)

    def encode(self, descriptors: Figures | None) -> np.ndarray:
        """A case's descriptors (None: it has no region) as float32 (D,), one finite value for each of `names`."""
        row = dict(zip(DESCRIPTORS, _logarithms([descriptors])[0].tolist(), strict=True))
        return np.array([value for column in self.columns for value in column.encode(row[column.name])], np.float32)


@dataclass(frozen=True)
class Hazard:
    """As `survival.BaselineHazard`: of a Cox model, fitted on the training cases."""

    days: tuple[float, ...]
    log_cumulative: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """What is answered. `kind`: classes (exclusive), findings (each 0 or 1), or survival (time to an event).

    `names`: of the classes or findings. Of survival: `loss`, a key of SURVIVAL_LOSSES; `edges_days`, between its time
    bins; `horizons_days`, at which survival is told beside the edges; `baseline`, of Cox's. `temperature` divides the
    logits of classes and findings, so that probabilities are calibrated.
    """

    kind: str
    names: tuple[str, ...] = ()
    loss: str = ""
    edges_days: tuple[float, ...] = ()
    horizons_days: tuple[float, ...] = ()
    baseline: Hazard | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in (CLASSES, FINDINGS, SURVIVAL):
            raise ValueError(f"{self.kind} is no kind of outcome; there are {CLASSES}, {FINDINGS}, {SURVIVAL}.")

    @property
    def days(self) -> tuple[float, ...]:
        """At which survival is told: edges, and the horizons that the curve reaches; increasing."""
        last = self.baseline.days if self.baseline is not None else self.edges_days
        return tuple(sorted({*self.edges_days, *(day for day in self.horizons_days if day <= max(last, default=0))}))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Columns of predictions.csv."""
        if self.kind == SURVIVAL:
            return ("risk", "median_survival_days", *(f"survival_{day:.10g}" for day in self.days))
        return tuple(f"p_{name}" for name in self.names)

    def targets(self, rows: Sequence[Row | None]) -> np.ndarray:
        """Rows of targets.csv (column -> cell) as numbers, NaN for blanks and for cases without a row.

        Returns:
            float64; survival (n, 2) days and 0 or 1; findings (n, F) 0 or 1; classes (n,) the place in `names`, NaN
            also for a class that is none of them.
        """
        if self.kind == CLASSES:
            place = {name: float(number) for number, name in enumerate(self.names)}
            cells = [next(iter(row.values())) if row else None for row in rows]
            return np.array([place.get(class_name(cell), math.nan) for cell in cells], np.float64)
        wanted = ("time_days", "event") if self.kind == SURVIVAL else self.names
        cells = [[None if row is None else row.get(name) for name in wanted] for row in rows]
        return np.array(cells, np.float64).reshape(len(rows), len(wanted))


@dataclass(frozen=True)
class CaseReading:
    """`inputs`: which of image, region (its descriptors, and where in the image it lies), clinical are used."""

    inputs: tuple[str, ...]
    clinical: ClinicalEncoder | None
    descriptors: DescriptorEncoder | None
    outcome: Outcome

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns of `tabular`."""
        encoders = (self.descriptors, self.clinical)
        return tuple(name for encoder in encoders if encoder is not None for name in encoder.names)

    @property
    def row_sizes(self) -> dict[str, int]:
        """What a head must know of `tabular`."""
        figures = 0 if self.descriptors is None else len(self.descriptors.names)
        return {"columns": len(self.names), "figures": figures}

    @property
    def outputs(self) -> tuple[str, ...]:
        """Columns of predictions.csv."""
        return self.outcome.outputs

    def tabular(self, clinical_row: Row | None, descriptors: Figures | None) -> np.ndarray | None:
        """A case's descriptors and covariates as float32 (D,), finite; None where the task reads neither.

        Args:
            clinical_row: column -> cell of clinical.csv; None: the case has no row.
            descriptors: of the region; None: there is none.
        """
        if not self.names:
            return None
        parts = [] if self.descriptors is None else [self.descriptors.encode(descriptors)]
        parts += [] if self.clinical is None else [self.clinical.encode(clinical_row)]
        return np.concatenate(parts)


def class_name(cell: Cell) -> str | None:
    """What a class of targets.csv is called; None for a blank."""
    return str(int(cell)) if isinstance(cell, float) else cell


def _logarithms(rows: Sequence[Figures | None]) -> np.ndarray:
    """(n, DESCRIPTORS), NaN where unknown."""
    known = [{name: math.nan if value is None else value for name, value in (row or {}).items()} for row in rows]
    return np.stack([linear_row(row) for row in known]) if known else np.empty((0, len(DESCRIPTORS)))
