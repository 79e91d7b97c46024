"""The pictures of a report: written as PNG for use elsewhere, and put into the page as smaller WebP.

From whole to part: pictures of the result, of one section's genes and domains, and the spots over the slide beneath.

Shapes: N spots of one section.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.patches import Patch
from PIL import Image
from scipy.optimize import linear_sum_assignment

from mclstexp.evaluation.domains import NO_DOMAIN, DomainComparison, spot_pitch
from mclstexp.evaluation.show import draw_correlations
from mclstexp.figures import colour_limits, new_figure
from mclstexp.report.biology import WAYS, number_labels, section_names
from mclstexp.report.result import Result, Section, Thumbnail

SPOT_PITCHES = 0.8
"""Diameter of a drawn spot."""
_MARGIN_PITCHES = 1.5
_THUMBNAIL_ALPHA = 0.6
_WIDTH_IN, _HEIGHT_IN = 13.0, 4.2
_MAP_WIDTH_IN, _TITLE_IN, _COLOUR_BAR_IN, _LEGEND_IN = 3.6, 0.4, 1.0, 1.1
_DPI = 90
_WEBP_QUALITY = 82
_MAX_CURVES_IN_LEGEND = 12
_CURVES = {"loss": "training loss", "spots_per_s": "spots per second"}
_LEGEND = "found domains take the colour of the label that they cover best;\nother colours: no label is left for them"
_NO_DOMAIN_COLOUR = (0.75, 0.75, 0.75, 1.0)


def draw_distribution(path: Path, result: Result) -> None:
    """Writes each method's correlations over all sections and genes in the model's own target."""
    figure = new_figure(_WIDTH_IN, _HEIGHT_IN, result.heading())
    record = result.record
    draw_correlations(figure.subplots(), result.per_gene, f"target {record.target}: {record.targets[record.target]}")
    figure.savefig(path, dpi=_DPI)


def draw_curves(path: Path, curves: Mapping[str, pd.DataFrame], heading: str) -> None:
    """Writes loss and spots per second by step, one line per training run.

    Args:
        path: local file to write.
        curves: `tracking.curves` by the run's name.
        heading: what every picture says.
    """
    figure = new_figure(_WIDTH_IN, _HEIGHT_IN, heading)
    for axes, (column, title) in zip(figure.subplots(1, len(_CURVES)), _CURVES.items(), strict=True):
        _draw_curve(axes, curves, column, title)
    if len(curves) <= _MAX_CURVES_IN_LEGEND:
        figure.legend(list(curves), loc="outside lower center", ncols=min(6, len(curves)))
    figure.savefig(path, dpi=_DPI)


def draw_section_genes(path: Path, result: Result, section: Section, genes: list[str]) -> None:
    """Writes the maps of some of the section's genes, measured beside predicted."""
    names = section_names(result, section)
    columns = [names.index(gene) for gene in genes]
    maps = {"measured": section.measured[:, columns], "predicted": section.predicted[:, columns]}
    heading = _section_heading(result, section)
    draw_gene_maps(path, section.xy_px, genes, maps, section.unit, heading, section.thumbnail)


def draw_section_domains(path: Path, result: Result, section: Section, found: DomainComparison, way: str) -> None:
    """Writes the labels' map beside the domains that one way (`kmeans` or `leiden`) finds."""
    domains = {f"{method}, {WAYS[way]}": getattr(each, way) for method, each in found.domains.items()}
    labels, heading = section.labels.tolist(), _section_heading(result, section)
    draw_domain_maps(path, section.xy_px, labels, domains, heading, section.thumbnail)


def embedded(path: Path) -> str:
    """Returns a picture as a data URI of its WebP."""
    file = io.BytesIO()
    Image.open(path).convert("RGB").save(file, "WEBP", quality=_WEBP_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def draw_gene_maps(
    path: str | Path,
    xy_px: np.ndarray,
    genes: Sequence[str],
    maps: Mapping[str, np.ndarray],
    unit: str,
    heading: str,
    thumbnail: Thumbnail | None = None,
) -> None:
    """Writes a PNG with one row of maps per gene, without a display or matplotlib's global state.

    Measured and predicted share a gene's colour scale, so that a prediction that varies less than the truth looks
    flatter. The scale spans 98 % of the values, so that one spot of few counts does not take it all; the arrows of its
    bar mark the rest.

    Args:
        path: local file to write.
        xy_px: float (N, 2), spot centres in level-0 pixels.
        genes: names of the columns to draw.
        maps: (N, len(genes)) by title, in the order of the columns: "measured", "predicted". A gene that is NaN has an
            empty map.
        unit: unit of all values, for the colour bar.
        heading: what every picture says: what was held out, the protocol and its leaks.
        thumbnail: the slide, drawn beneath.
    """
    assert all(matrix.shape == (len(xy_px), len(genes)) for matrix in maps.values())
    width, height = map_size_in(xy_px)
    figure = new_figure(width * len(maps) + _COLOUR_BAR_IN, height * len(genes), heading)
    grid = figure.subplots(len(genes), len(maps), squeeze=False)
    for column, (gene, row) in enumerate(zip(genes, grid, strict=True)):
        values = {title: matrix[:, column] for title, matrix in maps.items()}
        limits = colour_limits(np.stack(list(values.values())))
        for axes, (title, shades) in zip(row, values.items(), strict=True):
            spots = draw_spots(axes, xy_px, thumbnail)
            spots.set(array=shades, cmap="viridis", clim=limits)
            axes.set_title(f"{gene}, {'not measured' if np.isnan(shades).all() else title}")
        figure.colorbar(spots, ax=list(row), label=unit, shrink=0.8, extend="both")
    figure.savefig(path, dpi=_DPI)


def draw_domain_maps(
    path: str | Path,
    xy_px: np.ndarray,
    labels: Sequence[str | None],
    found: Mapping[str, np.ndarray],
    heading: str,
    thumbnail: Thumbnail | None = None,
) -> None:
    """Writes a PNG with the labels' map and one map for each way to find domains.

    Args:
        path: local file to write.
        xy_px: float (N, 2), spot centres in level-0 pixels.
        labels: a label of each spot; spots without one (see `is_labelled`) are grey.
        found: int (N,) domains by title ("measured", "predicted"); NO_DOMAIN is grey.
        heading: what every picture says: what was held out, the protocol and its leaks.
        thumbnail: the slide, drawn beneath.
    """
    names, numbers = number_labels(labels)
    maps = {"labels": numbers} | {title: match_labels(numbers, domains) for title, domains in found.items()}
    width, height = map_size_in(xy_px)
    figure = new_figure(width * len(maps), height + _LEGEND_IN, heading)
    for axes, (title, domains) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        colours = _colours(np.unique(domains).tolist())
        draw_spots(axes, xy_px, thumbnail).set(facecolors=[colours[number] for number in domains.tolist()])
        axes.set_title(title)
    numbered = dict(enumerate(names)) | ({NO_DOMAIN: "none"} if NO_DOMAIN in numbers else {})
    handles = [Patch(color=colour, label=numbered[number]) for number, colour in _colours(numbered).items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(maps) + 1, title=_LEGEND)
    figure.savefig(path, dpi=_DPI)


def match_labels(labels: np.ndarray, domains: np.ndarray) -> np.ndarray:
    """Returns domains, int (N,), renumbered to take the numbers of the labels that they cover best.

    The matching covers the most spots in total (Kuhn 1955, https://doi.org/10.1002/nav.3800020109); a domain without a
    label of its own gets a number beyond the labels'. NO_DOMAIN stays.
    """
    both = (labels != NO_DOMAIN) & (domains != NO_DOMAIN)
    overlap = np.zeros((domains.max() + 1, labels.max() + 1), np.int64)
    np.add.at(overlap, (domains[both], labels[both]), 1)
    domain, label = linear_sum_assignment(overlap, maximize=True)
    covers = overlap[domain, label] > 0
    number = overlap.shape[1] + np.arange(overlap.shape[0])
    number[domain[covers]] = label[covers]
    return np.where(domains == NO_DOMAIN, NO_DOMAIN, number[domains])


def draw_spots(axes: Axes, xy_px: np.ndarray, thumbnail: Thumbnail | None) -> EllipseCollection:
    """Draws spots (N, 2), 0.8 pitches wide, over the slide and returns them for the caller to colour.

    The map ends one and a half pitches beyond the outermost spots.
    """
    if thumbnail is not None:
        height, width = (side * thumbnail.scale for side in thumbnail.rgb.shape[:2])
        axes.imshow(thumbnail.rgb, extent=(0, width, height, 0), alpha=_THUMBNAIL_ALPHA)
    diameter = np.full(len(xy_px), SPOT_PITCHES * spot_pitch(xy_px))
    spots = EllipseCollection(
        diameter, diameter, np.zeros(len(xy_px)), units="xy", offsets=xy_px, offset_transform=axes.transData
    )
    axes.add_collection(spots)
    (left, top), (right, bottom) = window(xy_px)
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], aspect="equal")
    return spots


def map_size_in(xy_px: np.ndarray) -> tuple[float, float]:
    """Returns width and height in inches of one map of the spots (N, 2) with its title."""
    (left, top), (right, bottom) = window(xy_px)
    return _MAP_WIDTH_IN, _MAP_WIDTH_IN * (bottom - top) / (right - left) + _TITLE_IN


def window(xy_px: np.ndarray) -> np.ndarray:
    """Returns the upper left and the lower right corner of a map of the spots (N, 2), float (2, 2)."""
    margin = _MARGIN_PITCHES * spot_pitch(xy_px)
    return np.stack([xy_px.min(axis=0) - margin, xy_px.max(axis=0) + margin])


def _section_heading(result: Result, section: Section) -> str:
    return f"section {section.section_id}; {result.heading(section)}"


def _draw_curve(axes: Axes, curves: Mapping[str, pd.DataFrame], column: str, title: str) -> None:
    for frame in curves.values():
        defined = frame.dropna(subset=[column]).sort_values("step")
        axes.plot(defined["step"], defined[column], linewidth=1)
    axes.set(xlabel="step", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _colours(numbers: Iterable[int]) -> dict[int, tuple[float, float, float, float]]:
    """Returns the colour of each domain's number; they repeat after 12."""
    palette = matplotlib.colormaps["Paired"]
    return {
        number: _NO_DOMAIN_COLOUR if number == NO_DOMAIN else palette((2 * number + 1 - number // 6) % 12)
        for number in numbers
    }
