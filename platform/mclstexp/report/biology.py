"""The biology of a result: significant genes, the order in which genes are shown, and spatial domains.

Genes have unique names here: those of the result's own tables, made unique where older tables repeat one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mclstexp.data.genes import IN_BRACKETS, GenePanel, find_genes, unique_labels
from mclstexp.evaluation.domains import NO_DOMAIN, DomainComparison, compare_domains, is_labelled
from mclstexp.evaluation.markers import marker_columns
from mclstexp.evaluation.significance import rank_genes, section_significance
from mclstexp.report.result import Result, Section, model_rows

CHOSEN = "chosen"
PREDICTED = "predicted"
WAYS = {"kmeans": "k-means", "leiden": "Leiden"}
"""Titles of the ways to find domains, by field of `domains.Domains`."""
_DRAWN_OF_SET, _DRAWN_WITHOUT_SETS = 4, 8
"""Genes in a section's picture: from each marker set, or in all if there is no set."""


@dataclass(frozen=True)
class GeneOrder:
    """The names of a result's genes, those to look at first in front."""

    names: list[str]
    """All genes."""
    sets: dict[str, list[str]]
    """Genes by set; the first is `chosen` if the user chose any."""
    drawn: list[str]
    """Genes in each section's picture."""
    missing: dict[str, list[str]]
    """Genes of each set that are in no section's panel."""


def significant_genes(result: Result) -> pd.DataFrame:
    """Returns `significance.rank_genes` of the model in its own target, with protocol as first column.

    A gene that a section does not measure is not among that section's genes.
    """
    measured = result.per_gene[result.per_gene["truth_mean"].notna()]
    sections = model_rows(measured).groupby("section_id", sort=False)
    tables = [
        section_significance(str(name), rows["gene"].tolist(), rows["pcc"].to_numpy(), result.num_spots[str(name)])
        for name, rows in sections
    ]
    ranked = rank_genes(pd.concat(tables))
    ranked.insert(0, "protocol", result.record.protocol)
    return ranked


def unique_names(result: Result) -> list[str]:
    """Returns the unique names of the genes of `result.panel`."""
    return unique_labels(_table_names(result), result.panel.gene_id)


def section_names(result: Result, section: Section) -> list[str]:
    """Returns the unique names of the genes of a section's panel."""
    named = dict(zip(result.panel.gene_id, unique_names(result), strict=True))
    return [named[gene_id] for gene_id in section.panel.gene_id]


def order_genes(
    result: Result, ranked: pd.DataFrame, markers: Mapping[str, GenePanel], chosen: Sequence[str]
) -> GeneOrder:
    """Returns the order in which genes are shown: chosen ones, marker sets, then the most significant and the highest.

    Raises:
        ConfigError: a chosen gene is in no section's panel.
    """
    columns, missing = marker_columns(markers, result.panel)
    names = unique_names(result)
    sets = {CHOSEN: [names[column] for column in find_genes(result.panel, chosen)]} if chosen else {}
    sets |= {name: [names[column] for column in found] for name, found in columns.items()}
    rest = [names[column] for column in _by_interest(result, ranked)]
    ordered = list(dict.fromkeys([name for genes in sets.values() for name in genes] + rest))
    return GeneOrder(
        ordered, sets, _drawn(sets, rest, ranked), {name: genes for name, genes in missing.items() if genes}
    )


def why_no_domains(section: Section) -> str | None:
    """Returns why a section's labels cannot be compared with domains, or None if they can."""
    kinds = len(number_labels(section.labels.tolist())[0])
    if kinds == 0:
        return "no spot has a label"
    return "all labels are the same" if kinds == 1 else None


def section_domains(section: Section) -> DomainComparison:
    """Returns the domains of a labelled section by measured, smoothed measured and predicted expression.

    All three have the genes that the section measures.
    """
    labels, genes = section.labels.tolist(), ~np.isnan(section.measured).any(axis=0)
    predicted = {PREDICTED: section.predicted[:, genes]}
    return compare_domains(labels, section.xy_um, section.measured[:, genes], predicted)


def domain_table(protocol: str, section_id: str, found: DomainComparison) -> pd.DataFrame:
    """Returns a section's `DomainComparison.table` with the columns that name it."""
    of = {"protocol": protocol, "section_id": section_id}
    smoothing = {"smoothing_radius_um": found.smoothing_radius_um, "smoothing_neighbours": found.smoothing_neighbours}
    return found.table.assign(**of, **smoothing)[[*of, *found.table.columns, *smoothing]]


def number_labels(labels: Sequence[str | None]) -> tuple[list[str], np.ndarray]:
    """Returns the different labels in alphabetical order, and each spot's index among them or NO_DOMAIN, int64 (N,)."""
    used = is_labelled(labels)
    names, inverse = np.unique(np.asarray(labels, object)[used].astype(str), return_inverse=True)
    numbers = np.full(len(used), NO_DOMAIN, np.int64)
    numbers[used] = inverse
    return names.tolist(), numbers


def _table_names(result: Result) -> list[str]:
    """Returns the names of the panel's genes in the result's tables; older tables repeat the name of some."""
    known, panel = set(result.per_gene["gene"]), result.panel
    pairs = zip(panel.names(), panel.gene_id, strict=True)
    labels = [(name, IN_BRACKETS.format(name=name, gene_id=gene_id)) for name, gene_id in pairs]
    return [label if label in known else name for name, label in labels]


def _by_interest(result: Result, ranked: pd.DataFrame) -> np.ndarray:
    """Returns the panel's columns, ordered by the better of two ranks: significance, and mean measured expression."""
    significance = ranked.set_index("gene")["rank"]
    height = model_rows(result.per_gene).groupby("gene")["truth_mean"].mean().rank(ascending=False)
    best = pd.concat([significance, height], axis=1).min(axis=1)
    return np.argsort(best.reindex(_table_names(result)).to_numpy(), kind="stable")


def _drawn(sets: Mapping[str, list[str]], rest: list[str], ranked: pd.DataFrame) -> list[str]:
    """Returns all chosen genes and the most significant of each set, or of all genes if there is no set."""
    rank = ranked.set_index("gene")["rank"].to_dict()
    significant = sorted(rest, key=lambda name: rank.get(name, len(rank)))
    if not sets:
        return significant[:_DRAWN_WITHOUT_SETS]
    parts = [
        genes if name == CHOSEN else [gene for gene in significant if gene in genes][:_DRAWN_OF_SET]
        for name, genes in sets.items()
    ]
    return list(dict.fromkeys(gene for part in parts for gene in part))
