"""A score card on a terminal of 120 columns and as a picture.

The terminal shows the model's own target in full, other targets and marker genes in short. The rest is in the files:
each section in each target, root mean squared errors, the patients' intervals.
"""

import math
import textwrap
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mclstexp.evaluation import scores
from mclstexp.evaluation.score_card import ScoreCard
from mclstexp.evaluation.scores import ALL, NOT_MEASURED, SET_TITLES, UNDEFINED, ScoredSet
from mclstexp.evaluation.sections import SectionResult

NUM_MAPS = 4
"""Genes whose maps the picture shows."""
LABEL_WIDTH, TITLE_WIDTH = 16, 150
"""Characters per line of the picture's labels and title."""
_LEGEND = """\
HEG50, HVG50: the 50 genes of highest mean and variance in the section; density-free: given the spots' library size
undefined: genes without a correlation, summed over sections and left out of the mean; verdicts count one as 0
where the measured gene varies, so that silence wins nothing; not measured: such genes have no score in a section
between sections: of each gene's mean over a section; PCC over at least three patients (sections, as published)"""


def card_tables(card: ScoreCard) -> Group:
    """Returns the tables of a score card with its notes and verdicts; every table names the protocol."""
    overall = (f"{card.rows['section_id'].nunique()} section(s)", card.means())
    others = [target for target in card.targets if target != card.target]
    blocks: list[RenderableType] = [
        Text(f"score card of model {card.model_digest}, {len(card.genes)} genes\n{card.heading()}"),
        *_block(card, [card.target], _own_columns(card), [overall, *_parts(card)]),
        *_block(card, [card.target], _level_columns(card), [overall]),
        *_block(card, others, _other_columns(others), [overall]),
    ]
    if markers := _marker_columns(card):
        blocks += _block(card, [card.target], markers, [overall])
    unit = "patients" if card.unit == "patient_id" else "sections"
    intervals = f"±: half of the 95 % interval over {unit}, of a mean or of a difference of model and floor"
    return Group(*blocks, Text("\n".join([_LEGEND, intervals, *card.notes, "", *card.verdicts()])))


def draw(card: ScoreCard, path: str | Path) -> None:
    """Writes the picture of a score card as PNG, without a display or matplotlib's global state."""
    figure = Figure(figsize=(4 * NUM_MAPS, 11 if card.sections else 5), layout="constrained")
    grid = figure.add_gridspec(3 if card.sections else 1, NUM_MAPS)
    title = f"{textwrap.fill(card.heading(), TITLE_WIDTH)}\ntarget {card.target}: {card.targets[card.target]}"
    own_target = card.per_gene[card.per_gene["target"] == card.target]
    draw_correlations(figure.add_subplot(grid[0, :]), own_target, title)
    if card.sections:
        _draw_maps(card, card.sections[0], figure, grid)
    figure.savefig(path, dpi=90)


def draw_correlations(axes: Axes, per_gene: pd.DataFrame, title: str) -> None:
    """Draws each method's correlations as a box, or marks the method as undefined.

    Args:
        axes: where to draw.
        per_gene: columns method and pcc, one row per section and gene.
        title: the title of the axes.
    """
    defined = per_gene.groupby("method", sort=False)["pcc"].apply(lambda pcc: pcc.dropna().to_numpy())
    names = {method: textwrap.fill(str(method), LABEL_WIDTH) for method in defined.index}
    labels = [names[method] if len(pcc) else f"{names[method]}\n(undefined)" for method, pcc in defined.items()]
    axes.boxplot(list(defined), tick_labels=labels, showfliers=False)
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set_ylabel("Pearson correlation of a gene")
    axes.set_title(title)


class _Column(NamedTuple):
    heading: str
    target: str
    gene_set: str
    name: str


def _own_columns(card: ScoreCard) -> list[_Column]:
    """Returns the columns of the model's own target, with narrow headings."""
    shown = [ScoredSet(score, gene_set) for score in scores.SCORES for gene_set in score.printed]
    columns = [
        _Column(each.title.replace(" ", "\n").replace("-", "-\n"), card.target, each.gene_set, each.score.name)
        for each in shown
    ]
    lacking = [_Column("not\nmeasured", card.target, ALL, NOT_MEASURED)] if card.rows[NOT_MEASURED].any() else []
    return [*columns, _Column(UNDEFINED, card.target, ALL, UNDEFINED), *lacking]


def _level_columns(card: ScoreCard) -> list[_Column]:
    """Returns the columns of the scores of sections' levels, and of the genes without a correlation."""
    of_level = [score for score in scores.SCORES if score.of_level]
    columns = [(score.title, score.name) for score in of_level]
    columns += [(UNDEFINED, score.undefined) for score in of_level if score.undefined]
    return [_Column(title, card.target, ALL, name) for title, name in columns]


def _other_columns(targets: list[str]) -> list[_Column]:
    shown = [ScoredSet(score, gene_set) for score in scores.SCORES for gene_set in score.printed_in_others]
    return [
        _Column(f"{target}\n{each.title}", target, each.gene_set, each.score.name)
        for target in targets
        for each in shown
    ]


def _marker_columns(card: ScoreCard) -> list[_Column]:
    """Returns the columns of the marker sets; folds with different panels may have different parts of a set."""
    sizes = card.rows.groupby("gene_set", sort=False)["num_genes"].agg(["min", "max"]).drop(list(SET_TITLES))
    return [
        _Column(
            f"{ScoredSet(score, str(name)).title}\n{low if low == high else f'{low} to {high}'} gene(s)",
            card.target,
            str(name),
            score.name,
        )
        for score in scores.SCORES
        if score.of_sets
        for name, low, high in sizes.itertuples()
    ]


def _parts(card: ScoreCard) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yields the scores of each patient, or of each section if there is only one patient."""
    names = [score.name for score in scores.of_sections()]
    columns = ["patient_id", "num_spots", "target", "method", "gene_set", *names, UNDEFINED, NOT_MEASURED]
    by_patient = card.patients()[columns]
    for column, rows in (("patient_id", by_patient), ("section_id", card.rows)):
        if rows[column].nunique() > 1:
            for name, part in rows.groupby(column, sort=False):
                yield f"{column.removesuffix('_id')} {name}", part
            return


def _block(
    card: ScoreCard, targets: list[str], columns: list[_Column], scopes: list[tuple[str, pd.DataFrame]]
) -> tuple[Text, Table]:
    """Returns a table and the line above it, which names protocol and targets."""
    units = "; ".join(f"{name}, {card.targets[name]}" for name in targets)
    return Text(f"\nprotocol {card.protocol}; target {units}"), _table(columns, scopes)


def _table(columns: list[_Column], scopes: list[tuple[str, pd.DataFrame]]) -> Table:
    table = Table("method")
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for scope, rows in scopes:
        found = {(row["target"], row["method"], row["gene_set"]): row for row in rows.to_dict("records")}
        table.add_row(Text(f"{scope}, {rows['num_spots'].iloc[0]} spots", style="bold"))
        for method in rows["method"].unique():
            cells = (_cell(found[column.target, method, column.gene_set], column.name) for column in columns)
            table.add_row(f"  {method}", *cells)
        table.add_section()
    return table


def _cell(row: Mapping[Hashable, Any], name: str) -> str:
    """Returns a score, and below it half of its interval if it has one."""
    value = row[name]
    if math.isnan(value):
        return "-"
    if name == NOT_MEASURED or name in {score.undefined for score in scores.SCORES}:
        return f"{value:.0f}"
    reach = (row.get(f"{name}_high", math.nan) - row.get(f"{name}_low", math.nan)) / 2
    return f"{value:.4f}" if math.isnan(reach) else f"{value:.4f}\n±{reach:.4f}"


def _draw_maps(card: ScoreCard, example: SectionResult, figure: Figure, grid: GridSpec) -> None:
    """Draws the best genes of the example section, measured above predicted."""
    for column, gene in enumerate(_best_genes(card, example)):
        sides = {"measured": example.truth[:, gene], "predicted": example.prediction[:, gene]}
        for row, (word, values) in enumerate(sides.items(), start=1):
            axes = figure.add_subplot(grid[row, column])
            x, y = example.section.xy_um.T
            points = axes.scatter(x, y, c=values, s=14, cmap="viridis")
            axes.set(xticks=[], yticks=[], aspect="equal")
            axes.set_title(f"{card.genes[gene]}, {word} ({example.section.section_id})")
            axes.invert_yaxis()
            figure.colorbar(points, ax=axes, shrink=0.7)


def _best_genes(card: ScoreCard, example: SectionResult) -> np.ndarray:
    """Returns the columns of the measured genes that the model predicts best in the example section."""
    mine = card.per_gene.query("method == 'model' and target == @card.target")
    mine = mine[mine["section_id"] == example.section.section_id]
    order = np.argsort(-np.nan_to_num(mine["pcc"].to_numpy(), nan=-2.0), kind="stable")
    return order[mine["truth_mean"].notna().to_numpy()[order]][:NUM_MAPS]
