"""The score card on a terminal of 120 columns: the model's own target in full, other targets and markers in short.

The rest is in the files: each section in each target, root mean squared errors, the patients' intervals.
"""

import math
from collections.abc import Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mclstexp.evaluation.scores import ALL, AVERAGED, HEG, HVG

if TYPE_CHECKING:
    from mclstexp.evaluation.score_card import ScoreCard
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

if TYPE_CHECKING:
    from mclstexp.evaluation.score_card import ScoreCard
    from mclstexp.evaluation.sections import SectionResult

_OWN = (
    ("PCC\nall", ALL, "pcc"),
    ("PCC\nHEG50", HEG, "pcc"),
    ("PCC\nHVG50", HVG, "pcc"),
    ("PCC\ndensity-\nfree", ALL, "pcc_density_free"),
    ("MSE", ALL, "mse"),
    ("MAE", ALL, "mae"),
    ("undefined", ALL, "undefined"),
)
_OTHERS = (("PCC all", ALL, "pcc"), ("PCC HEG50", HEG, "pcc"), ("MSE", ALL, "mse"))
_LEGEND = """\
HEG50, HVG50: the 50 genes of highest mean and variance in the section; density-free: given the spots' library size
undefined: genes without a correlation, summed over sections and left out of the mean; verdicts count one as 0
where the measured gene varies, so that silence wins nothing"""


class _Column(NamedTuple):
    heading: str
    target: str
    gene_set: str
    score: str


def card_tables(card: "ScoreCard") -> Group:
    """Returns the tables of a score card with its notes and verdicts; every table says the protocol."""
    overall = (f"{card.rows['section_id'].nunique()} section(s)", card.means())
    own = [_Column(name, card.target, *what) for name, *what in _OWN]
    others = [target for target in card.targets if target != card.target]
    columns = [_Column(f"{target}\n{name}", target, *what) for target in others for name, *what in _OTHERS]
    blocks: list[RenderableType] = [
        Text(f"score card of model {card.model_digest}, {len(card.genes)} genes\n{card.heading()}"),
        *_block(card, [card.target], own, [overall, *_parts(card)]),
        *_block(card, others, columns, [overall]),
    ]
    if markers := _marker_columns(card):
        blocks += _block(card, [card.target], markers, [overall])
    unit = "patients" if card.unit == "patient_id" else "sections"
    intervals = f"±: half of the 95 % interval over {unit}, of a mean or of a difference of model and floor"
    return Group(*blocks, Text("\n".join([_LEGEND, intervals, *card.notes, "", *card.verdicts()])))


def _block(
    card: "ScoreCard", targets: list[str], columns: list[_Column], scopes: list[tuple[str, pd.DataFrame]]
) -> tuple[Text, Table]:
    """Returns what a table is of, and the table."""
    units = "; ".join(f"{name}, {card.targets[name]}" for name in targets)
    return Text(f"\nprotocol {card.protocol}; target {units}"), _table(columns, scopes)


def _parts(card: "ScoreCard") -> Iterator[tuple[str, pd.DataFrame]]:
    """Yields each patient's scores, or where there is but one patient each section's."""
    by_patient = card.patients()[["patient_id", "num_spots", "target", "method", "gene_set", *AVERAGED, "undefined"]]
    for column, rows in (("patient_id", by_patient), ("section_id", card.rows)):
        if rows[column].nunique() > 1:
            for name, part in rows.groupby(column, sort=False):
                yield f"{column.removesuffix('_id')} {name}", part
            return


def _marker_columns(card: "ScoreCard") -> list[_Column]:
    """Returns a column for each named set of genes; folds whose panels differ may have different parts of a set."""
    sizes = card.rows.groupby("gene_set", sort=False)["num_genes"].agg(["min", "max"]).drop([ALL, HEG, HVG])
    return [
        _Column(f"PCC {name}\n{low if low == high else f'{low} to {high}'} gene(s)", card.target, str(name), "pcc")
        for name, low, high in sizes.itertuples()
    ]


def _table(columns: list[_Column], scopes: list[tuple[str, pd.DataFrame]]) -> Table:
    table = Table("method")
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for scope, rows in scopes:
        found = {(row["target"], row["method"], row["gene_set"]): row for row in rows.to_dict("records")}
        table.add_row(Text(f"{scope}, {rows['num_spots'].iloc[0]} spots", style="bold"))
        for method in rows["method"].unique():
            cells = (_cell(found[column.target, method, column.gene_set], column.score) for column in columns)
            table.add_row(f"  {method}", *cells)
        table.add_section()
    return table


def _cell(row: Mapping[Hashable, Any], score: str) -> str:
    """Returns a score, and below it half of its interval where it has one."""
    value = row[score]
    if math.isnan(value):
        return "-"
    if score == "undefined":
        return str(value)
    reach = (row.get(f"{score}_high", math.nan) - row.get(f"{score}_low", math.nan)) / 2
    return f"{value:.4f}" if math.isnan(reach) else f"{value:.4f}\n±{reach:.4f}"


NUM_MAPS = 4
LABEL_WIDTH, TITLE_WIDTH = 16, 150
"""Letters in a line."""


def draw(card: "ScoreCard", path: str | Path) -> None:
    """Writes the picture of a score card as PNG; no display or global state of matplotlib is used."""
    figure = Figure(figsize=(4 * NUM_MAPS, 11 if card.sections else 5), layout="constrained")
    grid = figure.add_gridspec(3 if card.sections else 1, NUM_MAPS)
    _draw_methods(card, figure.add_subplot(grid[0, :]))
    if card.sections:
        _draw_maps(card, card.sections[0], figure, grid)
    figure.savefig(path, dpi=90)


def _draw_maps(card: "ScoreCard", example: "SectionResult", figure: Figure, grid: GridSpec) -> None:
    """Draws the best genes of the example section, measured above predicted."""
    for column, gene in enumerate(_best_genes(card, example)):
        sides = {"measured": example.truth[:, gene], "predicted": example.prediction[:, gene]}
        for row, (word, values) in enumerate(sides.items(), start=1):
            axes = figure.add_subplot(grid[row, column])
            x, y = example.section.place.T
            points = axes.scatter(x, y, c=values, s=14, cmap="viridis")
            axes.set(xticks=[], yticks=[], aspect="equal")
            axes.set_title(f"{card.genes[gene]}, {word} ({example.section.section_id})")
            axes.invert_yaxis()
            figure.colorbar(points, ax=axes, shrink=0.7)


def _draw_methods(card: "ScoreCard", axes: Axes) -> None:
    """Draws each method's correlations over all sections and genes in the model's own target."""
    title = f"{textwrap.fill(card.heading(), TITLE_WIDTH)}\ntarget {card.target}: {card.targets[card.target]}"
    draw_correlations(axes, card.per_gene[card.per_gene["target"] == card.target], title)


def draw_correlations(axes: Axes, per_gene: pd.DataFrame, title: str) -> None:
    """Draws each method's correlations (columns method and pcc, a row a section and gene), or that it has none."""
    defined = per_gene.groupby("method", sort=False)["pcc"].apply(lambda pcc: pcc.dropna().to_numpy())
    names = {method: textwrap.fill(str(method), LABEL_WIDTH) for method in defined.index}
    labels = [names[method] if len(pcc) else f"{names[method]}\n(undefined)" for method, pcc in defined.items()]
    axes.boxplot(list(defined), tick_labels=labels, showfliers=False)
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set_ylabel("Pearson correlation of a gene")
    axes.set_title(title)


def _best_genes(card: "ScoreCard", example: "SectionResult") -> np.ndarray:
    """Returns the columns of the genes that the model predicts best in the example section."""
    mine = card.per_gene.query("method == 'model' and target == @card.target")
    mine = mine[mine["section_id"] == example.section.section_id]
    order = np.argsort(-np.nan_to_num(mine["pcc"].to_numpy(), nan=-2.0), kind="stable")
    return order[:NUM_MAPS]
