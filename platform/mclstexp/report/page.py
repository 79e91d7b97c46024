"""The HTML page of a result, with pictures and tables beside it: one file that needs no network and no other file.

Sections are opened one at a time, twice: first for pictures and domains, which shows how much of the page's size is
left, then for gene maps. The page names what it leaves out to stay within its size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined

from mclstexp.data.genes import GenePanel
from mclstexp.progress import Show
from mclstexp.report import biology, maps, page_data, tables
from mclstexp.report.biology import WAYS, GeneOrder
from mclstexp.report.result import Result, Section

PAGE, DOMAINS, SIGNIFICANT = "report.html", "domains.csv", "significant_genes.csv"
_PICTURES_SHARE = 0.4
"""Largest part of the page's size for pictures; gene maps get the rest."""
_SHOWN_SIGNIFICANT = 50


@dataclass(frozen=True)
class PageOptions:
    """What the page shows first, and its size."""

    markers: dict[str, GenePanel]
    """Sets of marker genes, see `markers.load_markers`."""
    genes: list[str]
    """Genes to show before the marker genes."""
    page_bytes: int
    """Size limit of the page."""


@dataclass(frozen=True)
class Training:
    """The curves of the result's training runs."""

    curves: dict[str, pd.DataFrame]
    """`tracking.curves` by the run's name."""
    missing: list[str]
    """Why some curves are missing, in sentences."""


@dataclass
class _Content:
    """What the page shows of its sections, collected one by one."""

    slides: list[dict[str, Any]] = field(default_factory=list)
    images: dict[str, str] = field(default_factory=dict)
    """Pictures within the page by file name."""
    drawn: dict[str, list[str]] = field(default_factory=dict)
    """Files of gene maps and of domain maps by section."""
    domains: list[pd.DataFrame] = field(default_factory=list)
    without_domains: dict[str, list[str]] = field(default_factory=dict)
    """Sections without domains, by reason."""

    def embed(self, paths: Sequence[Path], num_bytes: float) -> None:
        """Puts pictures into the page while `num_bytes` last; gene maps last, because the page draws those itself."""
        for path in sorted(paths, key=lambda path: path.name.startswith("genes_")):
            data = maps.embedded(path)
            if len(data) <= num_bytes:
                self.images[path.name] = data
                num_bytes -= len(data)


def write_report(result: Result, options: PageOptions, training: Training, folder: Path, show: Show) -> None:
    """Writes the page (`report.html`), its pictures, domains.csv and significant_genes.csv into a local folder.

    Raises:
        ResultError: a section's prediction is damaged.
        ConfigError: one of `options.genes` is in no panel.
    """
    ranked = biology.significant_genes(result)
    order = biology.order_genes(result, ranked, options.markers, options.genes)
    ranked.to_csv(folder / SIGNIFICANT, index=False)
    content = _Content()
    paths = _result_pictures(result, training, folder)
    for done, name in enumerate(result.files):
        show("sections drawn", done, len(result.files))
        paths += _add_section(content, result, result.section(name), order, folder)
    show("sections drawn", len(result.files), len(result.files))
    content.embed(paths, _PICTURES_SHARE * options.page_bytes)
    domains = pd.concat(content.domains, ignore_index=True) if content.domains else pd.DataFrame()
    if len(domains):
        domains.to_csv(folder / DOMAINS, index=False)
    context = _context(result, order, ranked, training, content, domains)
    (folder / PAGE).write_text(_with_maps(result, order, context, options.page_bytes, show), encoding="utf-8")


def _result_pictures(result: Result, training: Training, folder: Path) -> list[Path]:
    paths = [folder / "pcc_by_method.png"]
    maps.draw_distribution(paths[0], result)
    if training.curves:
        paths.append(folder / "training_curves.png")
        maps.draw_curves(paths[1], training.curves, result.heading())
    return paths


def _add_section(content: _Content, result: Result, section: Section, order: GeneOrder, folder: Path) -> list[Path]:
    """Adds a section's slide, pictures and domains to the content; returns the pictures."""
    name = section.section_id
    content.slides.append(page_data.slide_data(section))
    own = set(biology.section_names(result, section))
    files = content.drawn[name] = []
    genes = [gene for gene in order.drawn if gene in own]
    if genes:
        files.append(f"genes_{name}.png")
        maps.draw_section_genes(folder / files[-1], result, section, genes)
    reason = biology.why_no_domains(section)
    if reason:
        content.without_domains.setdefault(reason, []).append(name)
    else:
        found = biology.section_domains(section)
        content.domains.append(biology.domain_table(result.record.protocol, name, found))
        for way in WAYS:
            files.append(f"domains_{name}_{way}.png")
            maps.draw_section_domains(folder / files[-1], result, section, found, way)
    return [folder / file for file in files]


def _context(
    result: Result,
    order: GeneOrder,
    ranked: pd.DataFrame,
    training: Training,
    content: _Content,
    domains: pd.DataFrame,
) -> dict[str, Any]:
    """Returns what the template shows, without the gene maps."""
    return {
        "record": result.record,
        "tables": tables.target_tables(result.record),
        "best_floor": tables.best_floor(result.record),
        "genes": tables.gene_lines(result),
        "sets_of": _sets_of(order),
        "order": order,
        "ranked": ranked.head(_SHOWN_SIGNIFICANT).to_dict("records"),
        "num_ranked": len(ranked),
        "domains": domains.to_dict("records"),
        "ways": WAYS,
        "training": training,
        "content": content,
        "colours": page_data.colours(),
        "number": tables.number,
        "style": _asset("page.css"),
        "script": _asset("page.js"),
    }


def _sets_of(order: GeneOrder) -> dict[str, str]:
    """Returns the names of each gene's sets as one text; genes without a set are left out."""
    sets: dict[str, list[str]] = {}
    for name, genes in order.sets.items():
        for gene in genes:
            sets.setdefault(gene, []).append(name)
    return {gene: ", ".join(names) for gene, names in sets.items()}


def _with_maps(result: Result, order: GeneOrder, context: Mapping[str, Any], page_bytes: int, show: Show) -> str:
    """Returns the page with the maps of as many genes as fit."""
    slides = context["content"].slides
    empty = [slide | {"genes": {}} for slide in slides]
    bytes_left = page_bytes - len(_render(context, [], order, empty).encode())
    shown = page_data.genes_that_fit(result, order.names, bytes_left)
    wanted, filled = set(shown), []
    for done, slide in enumerate(slides):
        show("maps packed", done, len(slides))
        section = result.section(slide["id"])
        genes = page_data.gene_data(section, biology.section_names(result, section), wanted)
        filled.append(slide | {"genes": genes})
    show("maps packed", len(slides), len(slides))
    return _render(context, shown, order, filled)


def _render(context: Mapping[str, Any], shown: Sequence[str], order: GeneOrder, slides: list[dict[str, Any]]) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    wanted = set(shown)
    sets = [(name, [gene for gene in genes if gene in wanted]) for name, genes in order.sets.items()]
    choice = {"sets": sets, "genes": sorted(shown, key=str.casefold), "colours": context["colours"]}
    template = environment.from_string(_asset("page.html.j2"))
    return template.render(**context, shown=shown, choice=choice, slides=slides)


def _asset(name: str) -> str:
    return resources.files("mclstexp.report").joinpath(name).read_text(encoding="utf-8")
