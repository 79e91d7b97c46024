"""The pictures of a report: written as PNG for use elsewhere, and put into the page as smaller WebP."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from PIL import Image

from mclstexp.evaluation.domains import DomainComparison
from mclstexp.evaluation.score_plot import draw_correlations
from mclstexp.report.biology import WAYS, section_names
from mclstexp.report.domain_maps import draw_domain_maps
from mclstexp.report.figures import new_figure
from mclstexp.report.gene_maps import draw_gene_maps
from mclstexp.report.results import Result, Section

_WIDTH_IN = 13.0
_DPI = 90
_WEBP_QUALITY = 82
_LEGEND_RUNS = 12
_CURVES = {"loss": "training loss", "spots_per_s": "spots a second"}


def draw_distribution(path: Path, result: Result) -> None:
    """Writes each method's correlations over all sections and genes in the model's own target."""
    figure = new_figure(_WIDTH_IN, 4.2, result.heading())
    record = result.record
    draw_correlations(figure.subplots(), result.per_gene, f"target {record.target}: {record.targets[record.target]}")
    figure.savefig(path, dpi=_DPI)


def draw_curves(path: Path, curves: Mapping[str, pd.DataFrame], heading: str) -> None:
    """Writes the loss and the spots a second of training runs by step, a line a run.

    Args:
        path: local file to write.
        curves: `tracking.curves` by the run's name.
        heading: what every picture says.
    """
    figure = new_figure(_WIDTH_IN, 4.2, heading)
    for axes, (column, title) in zip(figure.subplots(1, len(_CURVES)), _CURVES.items(), strict=True):
        _draw_curve(axes, curves, column, title)
    if len(curves) <= _LEGEND_RUNS:
        figure.legend(list(curves), loc="outside lower center", ncols=min(6, len(curves)))
    figure.savefig(path, dpi=_DPI)


def draw_section_genes(path: Path, result: Result, section: Section, genes: list[str]) -> None:
    """Writes the maps of some of the section's genes, measured beside predicted."""
    names = section_names(result, section)
    columns = [names.index(gene) for gene in genes]
    maps = {"measured": section.measured[:, columns], "predicted": section.predicted[:, columns]}
    draw_gene_maps(
        path, section.place_px, genes, maps, section.unit, _section_heading(result, section), section.thumbnail
    )


def draw_section_domains(path: Path, result: Result, section: Section, found: DomainComparison, way: str) -> None:
    """Writes the labels' map beside the domains that one way (`kmeans` or `leiden`) finds."""
    domains = {f"{method}, {WAYS[way]}": getattr(each, way) for method, each in found.domains.items()}
    labels, heading = section.labels.tolist(), _section_heading(result, section)
    draw_domain_maps(path, section.place_px, labels, domains, heading, section.thumbnail)


def embedded(path: Path) -> str:
    """Returns a picture as the address of an image that holds it."""
    file = io.BytesIO()
    Image.open(path).convert("RGB").save(file, "WEBP", quality=_WEBP_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _section_heading(result: Result, section: Section) -> str:
    return f"section {section.section_id}; {result.heading(section)}"


def _draw_curve(axes: Axes, curves: Mapping[str, pd.DataFrame], column: str, title: str) -> None:
    for frame in curves.values():
        defined = frame.dropna(subset=[column]).sort_values("step")
        axes.plot(defined["step"], defined[column], linewidth=1)
    axes.set(xlabel="step", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
