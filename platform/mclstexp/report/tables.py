"""The score card's tables as a page shows them: texts by row and column, nothing computed anew.

Every score of the card is shown; the best of the model and its floors is marked, reference lines are not compared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mclstexp.evaluation.score_card import FLOOR, LINE, MODEL
from mclstexp.evaluation.scores import ALL, HEG, HVG
from mclstexp.report.result import Result, Row, ScoreRecord

_OVER_ALL = {
    "PCC density-free": "pcc_density_free",
    "MSE": "mse",
    "RMSE": "rmse",
    "MAE": "mae",
    "undefined": "undefined",
}
_LEAST_IS_BEST = {"mse", "rmse", "mae"}
_SET_NAMES = {ALL: "all", HEG: "HEG50", HVG: "HVG50"}


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
    """One gene's mean correlations over patients or sections; NaN where it has none."""

    gene: str
    model: float
    low: float
    high: float
    floor: float
    undefined: int


def target_tables(record: ScoreRecord) -> list[TargetTables]:
    """Returns the tables of each target, the model's own first."""
    return [_target(record, target) for target in record.targets]


def best_floor(record: ScoreRecord) -> str | None:
    """Returns the floor of highest mean correlation over all genes in the model's own target, if one has any."""
    rows = [row for row in _of(record.means, target=record.target, gene_set=ALL, kind=FLOOR) if row["pcc"] is not None]
    return str(max(rows, key=lambda row: row["pcc"])["method"]) if rows else None


def gene_lines(result: Result) -> list[GeneLine]:
    """Returns each gene's means by the model and the best floor, the highest of the model first."""
    means = result.gene_means
    mine = means[means["method"] == MODEL].sort_values("mean", ascending=False, kind="stable")
    floor = means[means["method"] == best_floor(result.record)].set_index("gene")["mean"]
    floors = floor[~floor.index.duplicated()].reindex(mine["gene"])
    columns = [mine[name] for name in ("gene", "mean", "low", "high")]
    return [GeneLine(*values) for values in zip(*columns, floors, mine["undefined"], strict=True)]


def number(value: float | None, digits: int = 3) -> str:
    """Returns a score in a page's digits; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def _target(record: ScoreRecord, target: str) -> TargetTables:
    sets = dict.fromkeys(row["gene_set"] for row in _of(record.means, target=target))
    columns = {f"PCC {_SET_NAMES.get(name, name)}": (name, "pcc") for name in sets}
    columns |= {title: (ALL, score) for title, score in _OVER_ALL.items()}
    places = list(columns.values())
    return TargetTables(
        target=target,
        unit=record.targets[target],
        columns=list(columns),
        overall=_table("all sections", _of(record.means, target=target), places),
        patients=_parts("patient", _of(record.patients, target=target), places),
        sections=_parts("section", _of(record.sections, target=target), places),
    )


def _parts(unit: str, rows: list[Row], places: Sequence[tuple[str, str]]) -> list[Table]:
    names = dict.fromkeys(row[f"{unit}_id"] for row in rows)
    return [_table(f"{unit} {name}", _of(rows, **{f"{unit}_id": name}), places) for name in names]


def _table(title: str, rows: list[Row], places: Sequence[tuple[str, str]]) -> Table:
    found = {(row["method"], row["gene_set"]): row for row in rows}
    kinds = {row["method"]: row["kind"] for row in rows}
    best = [_best(rows, *place) for place in places]
    lines = [
        Line(
            method,
            kind,
            [_cell(found[method, name], score, top) for (name, score), top in zip(places, best, strict=True)],
        )
        for method, kind in kinds.items()
    ]
    return Table(f"{title}, {rows[0]['num_spots']:,} spots", lines)


def _best(rows: list[Row], gene_set: str, score: str) -> float | None:
    values = [row[score] for row in _of(rows, gene_set=gene_set) if row["kind"] != LINE and row[score] is not None]
    if score == "undefined" or len(values) < 2:
        return None
    return float(min(values) if score in _LEAST_IS_BEST else max(values))


def _cell(row: Row, score: str, best: float | None) -> Cell:
    value = row[score]
    if score == "undefined":
        return Cell(f"{value:,}")
    low, high = (row.get(f"{score}_{end}") for end in ("low", "high"))
    interval = "" if low is None or high is None else f"{number(low)} to {number(high)}"
    return Cell(number(value), interval, row["kind"] != LINE and value is not None and value == best)


def _of(rows: list[Row], **where: object) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in where.items())]
