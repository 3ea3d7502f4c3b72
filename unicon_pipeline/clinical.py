"""Clinical covariates as numbers: what a column of `clinical.csv` becomes, learnt on the training cases alone.

Numbers are standardised; names become one column of 0 and 1 for each level. A gap is a value of its own wherever gaps
were seen in training. Whole numbers that stand for kinds (site 1 to 8) must be written as names: nothing can tell them
from a scale. Nor can anything tell that a column was only known after the images were made (treatment response, weight
at follow-up): such a column leaks the outcome, and only the reader of the table can leave it out. What can be seen is
looked for: columns that repeat an outcome, dates, ids and names of patients are left out; one that separates the
outcomes without an error, or whose name sounds like follow-up, is used and told.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real

import numpy as np

from unicon_pipeline.spreadsheet import Cell, is_date, number
from unicon_pipeline.tables import enumerated

Row = Mapping[str, Cell]
Values = tuple[Cell, ...]

FAR_SD = 5.0
_RARE_SHARE, _RARE_CASES = 0.05, 3
_ENOUGH = 10  # cases below which a column may fit the outcome by chance
_ALIKE = 0.999  # correlation with the time: the same in months, or rounded
_OTHER, _UNKNOWN = "other", "unknown"
_GAP_WORDS = {"", _UNKNOWN, "missing", "?"}
_AN_ID = re.compile(r"(.*[_\s])?(id|nr|no|mrn|number)", re.IGNORECASE)
_LATER = re.compile(r"outcome|follow.?up|death|surviv|recurren|relapse|progress|censor|(days|time).to", re.IGNORECASE)


@dataclass(frozen=True)
class NumericColumn:
    """`mean` and `sd` of the known training values; `gaps`: whether some were unknown."""

    name: str
    mean: float
    sd: float
    gaps: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Of the encoded columns."""
        return (self.name, f"{self.name}={_UNKNOWN}") if self.gaps else (self.name,)

    def encode(self, cell: Cell) -> list[float]:
        """A gap is the mean. What is far out counts as 5 standard deviations, so that a typing error cannot rule."""
        value = _number(cell)
        scaled = 0.0 if value is None else (value - self.mean) / self.sd
        return [min(max(scaled, -FAR_SD), FAR_SD), float(value is None)][: 1 + self.gaps]

    def oddity(self, cell: Cell) -> str | None:
        """What to tell about a cell."""
        value = _number(cell)
        if value is None:
            told = "unknown" if _text(cell) is None else f"{cell!r} and no number"
            return None if self.gaps and _text(cell) is None else f"{self.name} is {told}; taken as {self._filled}"
        if abs(value - self.mean) > FAR_SD * self.sd:
            return (
                f"{self.name} is {value:g}, over {FAR_SD:g} standard deviations ({self.sd:.3g}) off the training "
                f"cases' mean {self.mean:.3g}; taken as {FAR_SD:g}"
            )
        return None

    @property
    def _filled(self) -> str:
        return _UNKNOWN if self.gaps else f"the training cases' mean, {self.mean:.3g}"


@dataclass(frozen=True)
class CategoricalColumn:
    """`levels`: each has an encoded column. `pooled`: rare ones, which share the column "other".

    `shares`: of the levels and of other, among the training cases with a known level. `gaps`: as above.
    """

    name: str
    levels: tuple[str, ...]
    pooled: tuple[str, ...]
    shares: tuple[float, ...]
    gaps: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Of the encoded columns."""
        kinds = (*self.levels, *((_OTHER,) if self.pooled else ()), *((_UNKNOWN,) if self.gaps else ()))
        return tuple(f"{self.name}={kind}" for kind in kinds)

    def encode(self, cell: Cell) -> list[float]:
        """A gap or a level that training did not have: "unknown", or the training shares where that was never seen.

        A column of "unknown" that was 0 in all training cases would have a weight that nothing has taught.
        """
        level = _text(cell)
        if level in self.levels:
            place = self.levels.index(level)
        elif level in self.pooled:
            place = len(self.levels)
        elif self.gaps:
            place = len(self.shares)
        else:
            return list(self.shares)
        return [float(place == n) for n in range(len(self.names))]

    def oddity(self, cell: Cell) -> str | None:
        """What to tell about a cell."""
        level = _text(cell)
        if level in (*self.levels, *self.pooled) or (level is None and self.gaps):
            return None
        taken = _UNKNOWN if self.gaps else "the mixture of the training cases"
        if level is None:
            return f"{self.name} is unknown; taken as {taken}"
        return f"{self.name} is {level!r}, which no training case was ({', '.join(self.levels)}); taken as {taken}"


@dataclass(frozen=True)
class ClinicalEncoder:
    """Encodes rows of `clinical.csv`, as learnt from the training cases.

    `left_out`: column -> why. `remarks`: what else the reader should know about the training cases' columns.
    """

    numeric: tuple[NumericColumn, ...]
    categorical: tuple[CategoricalColumn, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @classmethod
    def fit(cls, rows: Sequence[Row | None], targets: Mapping[str, Sequence[Cell]] | None = None) -> ClinicalEncoder:
        """Learns from the training cases.

        Args:
            rows: column -> cell of each case; None for a case without a row, whose columns are all gaps.
            targets: the outcomes of the same cases by column of `targets.csv`, to find covariates that repeat them.
        """
        numeric, categorical, left_out, remarks = [], [], {}, []
        names = dict.fromkeys(name for row in rows if row is not None for name in row)
        for name in names:
            cells = tuple(None if row is None else row.get(name) for row in rows)
            column = _fit_column(name, cells)
            reason = column if isinstance(column, str) else _restates(name, cells, targets or {})
            if reason:
                left_out[name] = reason
                continue
            (numeric if isinstance(column, NumericColumn) else categorical).append(column)
            remarks += _doubts(name, cells, column, targets or {})
        return cls(tuple(numeric), tuple(categorical), left_out, tuple(remarks))

    @property
    def columns(self) -> tuple[NumericColumn | CategoricalColumn, ...]:
        """In the order in which they are encoded."""
        return (*self.numeric, *self.categorical)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the encoded columns: `age`, `age=unknown`, `site=thigh`, `site=other` and so on."""
        return tuple(name for column in self.columns for name in column.names)

    def encode(self, row: Row | None) -> np.ndarray:
        """A case's row (column -> cell; None: it has none) as float32 (D,), one finite value for each of `names`."""
        row = row or {}
        values = [value for column in self.columns for value in column.encode(row.get(column.name))]
        return np.array(values, np.float32)

    def oddities(self, row: Row | None) -> list[str]:
        """What is odd about a case to be predicted: no row, levels and gaps that training had not, values far out."""
        if not self.columns:
            return []
        if row is None:
            return ["no row in clinical.csv; all covariates are taken as unknown"]
        absent = [column.name for column in self.columns if column.name not in row]
        told = [column.oddity(row[column.name]) for column in self.columns if column.name in row]
        no_column = [f"clinical.csv has no column {', '.join(absent)}; taken as unknown"] if absent else []
        return no_column + [oddity for oddity in told if oddity]


def _fit_column(name: str, cells: Values) -> NumericColumn | CategoricalColumn | str:
    """The column's encoding, or why it has none."""
    filled = [cell for cell in cells if _text(cell) is not None]
    texts = Counter(_text(cell) for cell in filled)
    numbers = [value for cell in filled if (value := _number(cell)) is not None]
    gaps = len(filled) < len(cells)
    if not filled or (len(texts) == 1 and not gaps):
        return f"it is {next(iter(texts))} in all training cases" if filled else "no training case has a value"
    if sum(is_date(text) for text in texts) > len(texts) / 2:
        return "it holds dates; write an age or a number of days instead"
    if len(texts) == len(filled) >= _ENOUGH and _AN_ID.fullmatch(name) and all(map(float.is_integer, numbers)):
        return "it is another number in each case, and its name says that it is an id"
    # A column that is 1 or blank is a yes or no: two levels, and no scale.
    if len(numbers) == len(filled) and len(texts) > 1:
        return NumericColumn(name, float(np.mean(numbers)), float(np.std(numbers)), gaps)
    rare = max(_RARE_CASES, _RARE_SHARE * len(cells))
    pooled = {level for level, count in texts.items() if count < rare}
    if len(pooled) == len(texts):
        words = _words(cells)
        why = f"; it is read as names because of {enumerated(words)}" if len(words) < len(numbers) else ""
        return f"none of its {len(texts)} levels has {_RARE_CASES} cases and {_RARE_SHARE:.0%} of all{why}"
    if pooled:
        pooled |= {_OTHER} & set(texts)  # the table may have a level of that name: the same column
    levels = sorted(set(texts) - pooled)
    counts = [texts[level] for level in levels] + [sum(texts[level] for level in pooled)] * bool(pooled)
    shares = tuple(count / len(filled) for count in counts)
    return CategoricalColumn(name, tuple(levels), tuple(sorted(pooled)), shares, gaps)


def _restates(name: str, cells: Values, targets: Mapping[str, Sequence[Cell]]) -> str | None:
    """Why a column is taken for an outcome, or None."""
    for target, outcomes in targets.items():
        if name.casefold() == target.casefold():
            return f"it has the name of the target {target}"
        if _gaps_repeat(cells, outcomes):
            return f"its gaps say the same as the target {target}"
        pairs = _known(cells, outcomes)
        kinds, classes = {kind for kind, _ in pairs}, Counter(outcome for _, outcome in pairs)
        if len(pairs) < _ENOUGH or len(kinds) < 2 or len(pairs) - max(classes.values()) < _RARE_CASES:
            continue
        if len(set(pairs)) == len(kinds) == len(classes) <= len(pairs) / 2:
            return f"it says the same as the target {target}"
        both = [(number(kind), number(outcome)) for kind, outcome in pairs]
        if len(classes) > 2 and all(None not in pair for pair in both):
            if abs(np.corrcoef(np.array(both).T)[0, 1]) > _ALIKE:
                return f"it rises or falls with the target {target} (correlation above {_ALIKE:g})"
    return None


def _gaps_repeat(cells: Values, outcomes: Sequence[Cell]) -> bool:
    """Whether all cases with a gap have one outcome, and all others another: the place of a recurrence, say."""
    gaps, rest = (
        [_text(o) for cell, o in zip(cells, outcomes) if (_text(cell) is None) == gap] for gap in (True, False)
    )
    enough = len(cells) >= _ENOUGH and min(len(gaps), len(rest)) >= _RARE_CASES
    return enough and len({*gaps}) == len({*rest}) == 1 and None not in {*gaps, *rest} and gaps[0] != rest[0]


def _doubts(
    name: str, cells: Values, column: NumericColumn | CategoricalColumn, targets: Mapping[str, Sequence[Cell]]
) -> Iterator[str]:
    """What the reader of the table should check."""
    if _LATER.search(name):
        yield f"{name} sounds like something known after the images only; if so, remove it: it gives the outcome away"
    if isinstance(column, CategoricalColumn):
        words = _words(cells)
        if 0 < len(words) < sum(_number(cell) is not None for cell in cells):
            yield f"{name} is read as names, because of {enumerated(words)}; leave gaps blank if it should be numbers"
    for target, outcomes in targets.items():
        if _separates(column, _known(cells, outcomes)):
            yield f"{name} separates {target} without an error; if it was made from it or known only later, remove it"


def _separates(column: NumericColumn | CategoricalColumn, pairs: Sequence[tuple[str, str]]) -> bool:
    """Whether the classes of a target (at least two, of at least three cases each) never mix in the column."""
    counts = Counter(outcome for _, outcome in pairs)
    if len(pairs) < _ENOUGH or len(counts) < 2 or min(counts.values()) < _RARE_CASES:
        return False
    if isinstance(column, CategoricalColumn):
        kinds = {(tuple(column.encode(level)), outcome) for level, outcome in pairs}
        return len(kinds) == len({kind for kind, _ in kinds})
    values = {outcome: [number(value) for value, other in pairs if other == outcome] for outcome in counts}
    ranges = sorted((min(known), max(known)) for known in values.values())
    return all(low[1] < high[0] for low, high in zip(ranges, ranges[1:]))


def _words(cells: Values) -> list[str]:
    return sorted({repr(cell) for cell in cells if _text(cell) is not None and _number(cell) is None})


def _known(cells: Values, outcomes: Sequence[Cell]) -> list[tuple[str, str]]:
    """The cases whose covariate and outcome are known, as text."""
    pairs = [(_text(cell), _text(outcome)) for cell, outcome in zip(cells, outcomes, strict=True)]
    return [(cell, outcome) for cell, outcome in pairs if cell is not None and outcome is not None]


def _number(cell: Cell) -> float | None:
    text = _text(cell)
    return None if text is None else number(text)


def _text(cell: Cell) -> str | None:
    """One spelling for what is the same: High and high; 1, 1.0 and True. None for a gap."""
    if cell is None:
        return None
    value = float(cell) if isinstance(cell, Real) else number(cell)
    if value is not None:
        return repr(int(value) if value.is_integer() else value) if np.isfinite(value) else None
    text = " ".join(cell.split()).casefold()
    return None if text in _GAP_WORDS else text
