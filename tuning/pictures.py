"""The pictures of a sweep: parallel coordinates, temperature against depth, and learning curves.

They are drawn for any outcome of the trials: failed and stopped ones leave gaps, and no picture is refused for them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from mclstexp.figures import new_figure
from mclstexp.training.validation import VALIDATION_PCC
from tuning.space import Choice, Range, Space

PARALLEL, MAP, CURVES = "parallel.png", "temperature_depth.png", "curves.png"
TEMPERATURE, DEPTH = "model.temperature", "model.spot_layers"
_DPI, _COLOURS = 110, "viridis"
_SCORE = "validation PCC, 50 highest genes"


def draw_parallel(path: Path, table: pd.DataFrame, space: Space, heading: str) -> None:
    """Writes one line per trial, across its settings to its score; trials without a score are left out."""
    known = table.dropna(subset=[VALIDATION_PCC])
    columns = [*space, VALIDATION_PCC]
    heights = pd.DataFrame({name: _heights(known[name], space.get(name)) for name in columns})
    scores = known[VALIDATION_PCC].to_numpy(float)
    figure = new_figure(2.2 * len(columns) + 2, 4.5, heading)
    axes = figure.subplots()
    colours = _colours(scores)
    for row, colour in zip(heights.to_numpy(), colours, strict=True):
        axes.plot(range(len(columns)), row, color=colour, alpha=0.8)
    axes.set_xticks(range(len(columns)), [*space, _SCORE], rotation=15)
    axes.set_yticks([])
    for column, name in enumerate(columns):
        _label_axis(axes, column, known[name], heights[name])
    figure.savefig(path, dpi=_DPI)


def draw_temperature_depth(path: Path, table: pd.DataFrame, space: Space, heading: str) -> bool:
    """Writes the score over temperature and depth; returns False, and writes nothing, if either does not vary.

    Lists of both make a map with the mean score of each pair; if either is a range, every trial is a point.
    """
    if not {TEMPERATURE, DEPTH} <= set(space):
        return False
    known = table.dropna(subset=[VALIDATION_PCC]).astype({TEMPERATURE: float, DEPTH: int})
    figure = new_figure(6.5, 4.5, heading)
    axes = figure.subplots()
    if any(isinstance(space[name], Range) for name in (TEMPERATURE, DEPTH)):
        points = axes.scatter(known[TEMPERATURE], known[DEPTH], c=known[VALIDATION_PCC], cmap=_COLOURS, s=70)
        axes.set_xscale("log")
        figure.colorbar(points, label=_SCORE)
    else:
        _heat_map(axes, known)
    axes.set_xlabel(TEMPERATURE)
    axes.set_ylabel(DEPTH)
    figure.savefig(path, dpi=_DPI)
    return True


def draw_curves(path: Path, curves: Mapping[str, pd.DataFrame], heading: str) -> None:
    """Writes each trial's validation score and training loss by optimiser step.

    Args:
        path: local file to write.
        curves: step, loss and validation_pcc by trial, as `tracking.curves` returns them.
        heading: title of the picture.
    """
    figure = new_figure(11, 4.2, heading)
    for axes, name, label in zip(
        figure.subplots(1, 2), (VALIDATION_PCC, "loss"), (_SCORE, "training loss"), strict=True
    ):
        for trial, curve in curves.items():
            known = curve.dropna(subset=[name])
            axes.plot(known["step"], known[name], marker="." if name == VALIDATION_PCC else None, label=trial)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(label)
    if len(curves) <= 12:
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=_DPI)


def _heights(values: pd.Series, entry: Choice | Range | None) -> np.ndarray:
    """Returns the heights of values on their axis, from 0 to 1: lists by order, ranges by number or its logarithm."""
    if isinstance(entry, Choice):
        order = list(entry.bounds())
        return np.array([order.index(value) for value in values]) / max(1, len(order) - 1)
    numbers = values.to_numpy(float)
    numbers = np.log(numbers) if isinstance(entry, Range) and entry.log else numbers
    low, high = numbers.min(), numbers.max()
    return (numbers - low) / (high - low) if high > low else np.full(len(numbers), 0.5)


def _label_axis(axes: Axes, column: int, values: pd.Series, heights: pd.Series) -> None:
    axes.axvline(column, color="grey", linewidth=0.8)
    marks = pd.DataFrame({"value": values.to_numpy(), "height": heights.to_numpy()}).drop_duplicates("height")
    marks = marks if len(marks) <= 8 else marks.sort_values("height").iloc[[0, -1]]
    for value, height in zip(marks["value"], marks["height"], strict=True):
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        axes.annotate(text, (column, height), xytext=(3, 2), textcoords="offset points", fontsize=7)


def _colours(scores: np.ndarray) -> Sequence[tuple[float, ...]]:
    scale = Normalize(scores.min(), scores.max()) if len(scores) else Normalize(0, 1)
    return [tuple(colormaps[_COLOURS](scale(score))) for score in scores]


def _heat_map(axes: Axes, known: pd.DataFrame) -> None:
    means = known.pivot_table(index=DEPTH, columns=TEMPERATURE, values=VALIDATION_PCC, aggfunc="mean")
    axes.imshow(means.to_numpy(), cmap=_COLOURS, origin="lower", aspect="auto")
    axes.set_xticks(range(means.shape[1]), list(map(str, means.columns)))
    axes.set_yticks(range(means.shape[0]), [str(value) for value in means.index])
    for (row, column), value in np.ndenumerate(means.to_numpy()):
        if np.isfinite(value):
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", color="white", fontsize=9)
