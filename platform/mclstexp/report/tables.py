"""The score card's tables as a page shows them: texts by row and column, without new figures.

Every score of the card is shown; the best of the model and its floors is marked, reference lines are not compared.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mclstexp.evaluation import scores
from mclstexp.evaluation.score_card import FLOOR, LINE, MODEL
from mclstexp.evaluation.scores import ALL, NOT_MEASURED, UNDEFINED, ScoredSet
from mclstexp.report.result import Result, Row, ScoreRecord


@dataclass(frozen=True)
class Cell:
    """One score."""

    text: str
    interval: str = ""
    is_best: bool = False


@dataclass(frozen=True)
class Line:
    """One method's scores."""

    method: str
    kind: str
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """The methods' scores over some sections."""

    title: str
    lines: list[Line]


@dataclass(frozen=True)
class TargetTables:
    """All tables in one target."""

    target: str
    unit: str
    columns: list[str]
    overall: Table
    patients: list[Table]
    sections: list[Table]


@dataclass(frozen=True)
class GeneLine:
    """One gene's mean correlations over patients or sections; NaN if undefined."""

    gene: str
    model: float
    low: float
    high: float
    floor: float
    undefined: int
    not_measured: int


def target_tables(record: ScoreRecord) -> list[TargetTables]:
    """Returns the tables of each target, the model's own first."""
    return [_target(record, target) for target in record.targets]


def best_floor(record: ScoreRecord) -> str | None:
    """Returns the floor of highest mean correlation over all genes in the model's own target, if any has one."""
    rows = [row for row in _of(record.means, target=record.target, gene_set=ALL, kind=FLOOR) if row["pcc"] is not None]
    return str(max(rows, key=lambda row: row["pcc"])["method"]) if rows else None


def gene_lines(result: Result) -> list[GeneLine]:
    """Returns each gene's means by the model and the best floor, the highest of the model first."""
    means = result.gene_means
    mine = means[means["method"] == MODEL].sort_values("mean", ascending=False, kind="stable")
    floor = means[means["method"] == best_floor(result.record)].set_index("gene")["mean"]
    floors = floor[~floor.index.duplicated()].reindex(mine["gene"])
    columns = [mine[name] for name in ("gene", "mean", "low", "high")]
    counts = mine.reindex(columns=[UNDEFINED, NOT_MEASURED], fill_value=0)  # results of before have only the first
    return [GeneLine(*values) for values in zip(*columns, floors, *(counts[name] for name in counts), strict=True)]


def number(value: float | None, digits: int = 3) -> str:
    """Returns a score with the page's number of digits, or a dash for None and NaN."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def _target(record: ScoreRecord, target: str) -> TargetTables:
    means = _of(record.means, target=target)
    columns, counts = _columns(means), _counts(record)
    return TargetTables(
        target=target,
        unit=record.targets[target],
        columns=[*(column.title for column in columns), *counts.values()],
        overall=_table("all sections", means, columns, counts),
        patients=_parts("patient", _of(record.patients, target=target), columns, counts),
        sections=_parts("section", _of(record.sections, target=target), columns, counts),
    )


def _counts(record: ScoreRecord) -> dict[str, str]:
    """Returns the titles of the counts of genes to show, by name: of unmeasured ones if a section has some."""
    has_unmeasured = any(row.get(NOT_MEASURED) for row in record.means)
    return {UNDEFINED: UNDEFINED} | ({NOT_MEASURED: "not measured"} if has_unmeasured else {})


def _columns(means: list[Row]) -> list[ScoredSet]:
    """Returns the scores to show; a result from before a score existed does not have it."""
    sets = dict.fromkeys(row["gene_set"] for row in means)
    known = [score for score in scores.SCORES if score.name in means[0]]
    return [ScoredSet(score, name) for score in known for name in (sets if score.of_sets else (ALL,))]


def _parts(unit: str, rows: list[Row], columns: Sequence[ScoredSet], counts: Iterable[str]) -> list[Table]:
    names = dict.fromkeys(row[f"{unit}_id"] for row in rows)
    return [_table(f"{unit} {name}", _of(rows, **{f"{unit}_id": name}), columns, counts) for name in names]


def _table(title: str, rows: list[Row], columns: Sequence[ScoredSet], counts: Iterable[str]) -> Table:
    found = {(row["method"], row["gene_set"]): row for row in rows}
    kinds = {row["method"]: row["kind"] for row in rows}
    best = [_best(rows, column) for column in columns]
    lines = []
    for method, kind in kinds.items():
        cells = [
            _cell(found[method, column.gene_set], column.score.name, top)
            for column, top in zip(columns, best, strict=True)
        ]
        cells += [Cell(f"{found[method, ALL][count]:,}") for count in counts]
        lines.append(Line(method, kind, cells))
    return Table(f"{title}, {rows[0]['num_spots']:,} spots", lines)


def _best(rows: list[Row], column: ScoredSet) -> float | None:
    """Returns the best score of the model and its floors, or None if fewer than two have it."""
    compared = [row.get(column.score.name) for row in _of(rows, gene_set=column.gene_set) if row["kind"] != LINE]
    values = [value for value in compared if value is not None]
    if len(values) < 2:
        return None
    return float(min(values) if column.score.is_error else max(values))


def _cell(row: Row, name: str, best: float | None) -> Cell:
    value = row.get(name)  # a section has no score that compares sections
    low, high = (row.get(f"{name}_{end}") for end in ("low", "high"))
    interval = "" if low is None or high is None else f"{number(low)} to {number(high)}"
    return Cell(number(value), interval, row["kind"] != LINE and value is not None and value == best)


def _of(rows: list[Row], **where: object) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in where.items())]
