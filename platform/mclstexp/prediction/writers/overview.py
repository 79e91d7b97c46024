"""Chosen genes of a slide as maps over its thumbnail, in one PNG.

Tiles are painted into an array of the thumbnail's size, because markers would take minutes for 100,000 tiles and hide
one another; the price is that a map is no sharper than the thumbnail.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from matplotlib.axes import Axes

from mclstexp.data.genes import AFTER_NAME, unique_labels
from mclstexp.figures import colour_limits, new_figure
from mclstexp.prediction.parts import SlideRecord
from mclstexp.prediction.writers.slide import PredictedSlide, tile_edge, tile_left

MAX_GENES = 23
"""Genes in a picture, the first of the chosen ones: eight rows of maps with the slide itself."""
_MAX_ACROSS = 3
_MAP_WIDTH_IN, _TITLE_IN, _COLOUR_BAR_IN = 4.2, 0.4, 0.9
_THUMBNAIL_ALPHA = 0.6
_BAR_SHARE = 0.25  # of the slide's width, at most
_DPI = 150
_MAX_PX = 30_000  # along an edge; matplotlib draws no more than 65,535


def draw_overview(path: Path, slide: PredictedSlide, columns: Sequence[int]) -> None:
    """Writes a PNG with the slide and one map per gene, each with its own colour scale (1st to 99th percentile).

    Of more than `MAX_GENES` genes the first are drawn, and the heading states it.

    Args:
        path: local file to write.
        slide: its table is written.
        columns: chosen columns of its panel.
    """
    num_chosen, columns = len(columns), columns[:MAX_GENES]
    record, thumbnail = slide.record, slide.thumbnail
    panel = slide.info.panel.take(columns)
    names, labels = panel.gene_id, unique_labels(panel.names(), panel.gene_id, form=AFTER_NAME)
    rows = pq.read_table(slide.table, columns=["x_px", "y_px", *names])
    height, width = thumbnail.shape[:2]
    corners = [tile_left(rows[name].to_numpy(), slide) for name in ("x_px", "y_px")]
    edge = tile_edge(slide)
    across_px, down_px = (_pixels(*axis, edge, record) for axis in zip(corners, (width, height), strict=True))

    # The figure, with a heading and one panel for the slide itself.
    num_maps = 1 + len(columns)
    across = min(num_maps, _MAX_ACROSS)
    down = -(-num_maps // across)
    size_in = (across * (_MAP_WIDTH_IN + _COLOUR_BAR_IN), down * (_MAP_WIDTH_IN * height / width + _TITLE_IN))
    left_out = f"\nthe first {len(columns)} of {num_chosen} chosen genes" if num_chosen > len(columns) else ""
    figure = new_figure(*size_in, _heading(slide) + left_out)
    first, *others = figure.subplots(down, across, squeeze=False).ravel()
    _draw_slide(first, thumbnail, record, 1.0)
    _draw_scale_bar(first, width * record.thumbnail_scale, record.mpp)
    first.set_title("slide" if record.not_h_and_e else "H&E")

    # One map per gene.
    for axes, name, label in zip(others, names, labels, strict=False):
        _draw_slide(axes, thumbnail, record, _THUMBNAIL_ALPHA)
        values = rows[name].to_numpy()
        limits = colour_limits(values) if len(values) else (0.0, 1.0)
        _draw_map(axes, paint(across_px, down_px, values, (height, width)), limits, record, slide.info.unit)
        axes.set_title(label)
    for axes in others[len(columns) :]:
        axes.remove()
    figure.savefig(path, dpi=min(_DPI, _MAX_PX / figure.get_figheight()), metadata={"Software": None})


def paint(across: np.ndarray, down: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Returns a picture of boxes with values, float64 `shape`: their mean where they overlap, NaN outside all boxes.

    Each box adds its value at two corners and subtracts it at the other two; sums over both axes fill it (a
    two-dimensional difference array), so that the time does not depend on how much a box covers.

    Args:
        across: first and last column (not included) of each box, int (2, n), within the picture.
        down: the same for rows.
        values: (n,).
        shape: height and width of the picture.
    """
    sums = np.zeros((2, shape[0] + 1, shape[1] + 1))
    for row, column, sign in ((0, 0, 1), (0, 1, -1), (1, 0, -1), (1, 1, 1)):
        corners = (down[row], across[column])
        np.add.at(sums[0], corners, sign * values.astype(np.float64))
        np.add.at(sums[1], corners, sign)
    total, count = sums.cumsum(axis=1).cumsum(axis=2)[:, :-1, :-1]
    return np.divide(total, count, out=np.full(shape, np.nan), where=count > 0.5)


def _pixels(corner: np.ndarray, size: int, edge: float, record: SlideRecord) -> np.ndarray:
    """Returns first and last thumbnail pixel of tiles along an axis of `size` pixels, int (2, n); at least one each."""
    first, last = (np.stack([corner, corner + edge]) / record.thumbnail_scale).round().astype(int)
    first = first.clip(0, size - 1)
    return np.stack([first, last.clip(first + 1, size)])


def _draw_slide(axes: Axes, thumbnail: np.ndarray, record: SlideRecord, alpha: float) -> None:
    axes.imshow(thumbnail, extent=_extent(thumbnail.shape, record), alpha=alpha)
    axes.set(xticks=[], yticks=[])


def _draw_map(axes: Axes, painted: np.ndarray, limits: tuple[float, float], record: SlideRecord, unit: str) -> None:
    extent = _extent(painted.shape, record)
    image = axes.imshow(painted, extent=extent, cmap="viridis", clim=limits, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label=unit, shrink=0.8, extend="both")


def _draw_scale_bar(axes: Axes, width_px: float, mpp: float) -> None:
    """Draws a bar of 1, 2 or 5 times a power of ten micrometres at the lower left."""
    length_um = _round_length(_BAR_SHARE * width_px * mpp)
    text = f"{length_um:g} µm" if length_um < 1000 else f"{length_um / 1000:g} mm"
    left, bottom = 0.03 * width_px, axes.get_ylim()[0] - 0.03 * width_px
    axes.plot([left, left + length_um / mpp], [bottom, bottom], color="black", linewidth=3, solid_capstyle="butt")
    axes.text(left, bottom - 0.015 * width_px, text, va="bottom", fontsize=8)


def _round_length(most: float) -> float:
    """Returns the largest 1, 2 or 5 times a power of ten that is at most `most`."""
    power = 10.0 ** math.floor(math.log10(most))
    return max(step * power for step in (1, 2, 5) if step * power <= most)


def _extent(shape: tuple[int, ...], record: SlideRecord) -> tuple[float, float, float, float]:
    return (0, shape[1] * record.thumbnail_scale, shape[0] * record.thumbnail_scale, 0)


def _heading(slide: PredictedSlide) -> str:
    record = slide.record
    tiles = f"{record.num_tiles - record.missing_tiles} tiles"
    missing = f", {record.missing_tiles} more without pixels" if record.missing_tiles else ""
    model = slide.info.model_digest
    lines = [f"{record.slide_id}: expression predicted from H&E by model {model}; {tiles}{missing}"]
    if record.not_h_and_e:
        lines.append(f"CAUTION, perhaps no H&E: {record.not_h_and_e}")
    return "\n".join(lines)
