"""Which genes vary most: two rules that fit a panel on training sections.

Sections are read one at a time, so that memory does not grow with the cohort; the union reads each of them twice,
because the genes in common must be known before a section ranks them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array, diags_array

from mclstexp.data.schema import Manifest
from mclstexp.data.table import read_counts
from mclstexp.data.totals import shared_genes
from mclstexp.settings import GenesConfig

NUM_BINS = 20


@dataclass
class _Seen:
    """Which genes have counts in the sections so far, and which are measured there."""

    everywhere: np.ndarray
    """bool (genes,): with counts in every section that measures it."""
    num_spots: np.ndarray
    """int64 (genes,): number of spots with counts."""
    num_sections: np.ndarray
    """int64 (genes,): number of sections that measure it."""
    num_measured: np.ndarray
    """int64 (genes,): number of spots in these sections."""

    @classmethod
    def nothing(cls, num_genes: int) -> "_Seen":
        """Returns the state before the first section."""
        return cls(np.ones(num_genes, bool), *np.zeros((3, num_genes), np.int64))

    def add(self, counts: csr_array, measures: np.ndarray) -> None:
        """Adds a section's counts, (spots, genes), and which genes it measures, bool (genes,)."""
        num_spots = np.asarray((counts > 0).sum(axis=0)).ravel()
        self.everywhere &= (num_spots > 0) | ~measures
        self.num_spots += num_spots
        self.num_sections += measures
        self.num_measured += measures * counts.shape[0]


def most_variable(
    root: str, manifest: Manifest, section_ids: Sequence[str], config: GenesConfig, gene_ids: list[str]
) -> list[int]:
    """Returns the gene-table rows of an `hvg` panel, most variable first.

    At least `min_sections` of the sections measure them, and all that do have counts of them, in at least `min_spots`
    spots together. They are ranked by the variance of ln(1 + scale * count / spot total) over all spots of these
    sections; ties by gene id. The total is that of `genes.total`.
    """
    num_genes = manifest.num_genes
    in_total = shared_genes(manifest, section_ids) if config.total == "shared" else np.ones(num_genes, bool)
    first, second = np.zeros(num_genes), np.zeros(num_genes)
    seen = _Seen.nothing(num_genes)
    for name in section_ids:
        counts = read_counts(root, manifest.section(name), num_genes)
        seen.add(counts, manifest.measures(name))
        logs = _scaled(counts, config.scale, counts @ in_total).log1p()
        first += np.asarray(logs.sum(axis=0)).ravel()
        second += np.asarray(logs.multiply(logs).sum(axis=0)).ravel()
    num_spots = np.maximum(1, seen.num_measured)
    variance = (second / num_spots - (first / num_spots) ** 2).round(12)
    is_often_measured = seen.num_sections >= least_sections(config, len(section_ids))
    candidates = np.flatnonzero(seen.everywhere & is_often_measured & (seen.num_spots >= config.min_spots))
    ranked = sorted(candidates, key=lambda row: (-variance[row], gene_ids[row]))
    return [int(row) for row in ranked[: config.num_genes]]


def least_sections(config: GenesConfig, num_sections: int) -> int:
    """Returns how many of so many training sections must measure a gene of an `hvg` panel, at least one."""
    return max(1, math.ceil(round(config.min_sections * num_sections, 9)))


def most_variable_of_any(root: str, manifest: Manifest, section_ids: Sequence[str], config: GenesConfig) -> list[int]:
    """Returns the gene-table rows of an `hvg_union` panel, ascending: the rule in mclSTExp's paper.

    Of the genes with counts in all sections and in at least `min_spots` spots, these are among the `num_genes` most
    variable ones of any section (2024, https://arxiv.org/abs/2407.08216).
    """
    seen = _Seen.nothing(manifest.num_genes)
    for name in section_ids:
        counts = read_counts(root, manifest.section(name), manifest.num_genes)
        seen.add(counts, np.ones(manifest.num_genes, bool))  # which a gene with counts in all sections is
    common = np.flatnonzero(seen.everywhere)
    if not len(common):
        return []
    chosen = np.zeros(len(common), bool)
    for name in section_ids:
        counts = read_counts(root, manifest.section(name), manifest.num_genes)[:, common]
        chosen |= _highest(normalised_dispersion(counts), config.num_genes)
    return [int(row) for row in common[chosen & (seen.num_spots[common] >= config.min_spots)]]


def normalised_dispersion(counts: csr_array) -> np.ndarray:
    """Returns how variable each gene is for its level within one section, float64 (genes,); NaN for a constant gene.

    It equals scanpy's `normalize_total`, `log1p` and `highly_variable_genes` with their defaults (2018,
    https://doi.org/10.1186/s13059-017-1382-0), after Satija et al. 2015 (https://doi.org/10.1038/nbt.3192). Spots are
    scaled to the median of their totals. ln(variance / mean) is standardised within 20 bins of ln(1 + mean): the bin's
    mean is subtracted and the result divided by its standard deviation; a gene alone in its bin gets 1. scanpy undoes
    `log1p` before it computes mean and variance, so it is left out here.

    Args:
        counts: raw counts, (spots, genes), of genes that have some.
    """
    totals = np.asarray(counts.sum(axis=1)).ravel()
    values = _scaled(counts, float(np.median(totals[totals > 0])), totals)
    mean = np.asarray(values.mean(axis=0)).ravel()
    squares = np.asarray(values.multiply(values).mean(axis=0)).ravel()
    num_spots = counts.shape[0]
    variance = (squares - mean**2) * num_spots / max(1, num_spots - 1)
    variable = variance > 1e-12 * squares  # less is rounding
    dispersion = np.log(variance / mean, out=np.full(len(mean), np.nan), where=variable)
    return _standardised(dispersion, _bins(np.log1p(mean)))


def _scaled(counts: csr_array, total: float, totals: np.ndarray) -> csr_array:
    """Returns counts scaled from each spot's total, (spots,), to the same one, float64; a total of 0 gives zeros."""
    factors = np.divide(total, totals, out=np.zeros(len(totals)), where=totals > 0)
    return diags_array(factors).dot(counts.astype(np.float64)).tocsr()


def _bins(values: np.ndarray) -> np.ndarray:
    """Returns each value's bin among 20 of equal width over their range, open below, int (genes,)."""
    edges = np.linspace(values.min(), values.max(), NUM_BINS + 1)
    return np.searchsorted(edges[1:-1], values, side="left")


def _standardised(values: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Returns (value - mean of its bin) / standard deviation of its bin; NaN stays NaN and is not counted."""
    result = np.full(len(values), np.nan)
    for each in np.unique(bins):
        members = (bins == each) & ~np.isnan(values)
        inside = values[members]
        if len(inside) == 1:
            result[members] = 1.0
        elif len(inside) and inside.std() > 0:
            result[members] = (inside - inside.mean()) / inside.std(ddof=1)
    return result


def _highest(values: np.ndarray, number: int) -> np.ndarray:
    """Returns which values are at least the `number`-th highest, bool; all ties are, NaN never is."""
    known = np.sort(values[~np.isnan(values)])
    return values >= known[-min(number, len(known))] if len(known) else np.zeros(len(values), bool)
