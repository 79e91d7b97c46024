"""The score card's picture: correlations over genes by method, and the best genes measured beside predicted."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

if TYPE_CHECKING:
    from mclstexp.evaluation.score_card import ScoreCard
    from mclstexp.evaluation.section_file import SectionResult

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
