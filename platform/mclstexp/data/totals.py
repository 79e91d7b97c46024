"""Which genes make a spot's total, and whether the totals of different sections mean the same.

Expression in shares of the spot's total (`per_spot_all`) compares sections only if their totals are over the same
genes, and assays list different ones. What is judged is the share of the counts that one section would lose with the
list of another, not the number of genes: tables that leave out genes without counts all differ, and their totals do
not. The price is one more read of the counts of such sections.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from mclstexp.data.genes import GenePanel, align, gene_totals
from mclstexp.data.schema import Manifest
from mclstexp.errors import ConfigError, ModelError
from mclstexp.messages import some_of
from mclstexp.settings import GenesConfig

MAX_LOST = 0.05
"""Largest share of a section's counts in genes that another does not measure: ln(1 + x) is then at most .05 off."""
_OTHER_UNITS = "use genes.input and genes.target of per_spot_panel or per_gene"


class GeneCounts:
    """What the sections of a tile table measure and count, gene by gene; remembers what it has read."""

    def __init__(self, root: str, manifest: Manifest) -> None:
        self.root, self.manifest = root, manifest
        self._measures: dict[str, np.ndarray] = {}
        self._counts: dict[str, np.ndarray] = {}
        self._lost: dict[tuple[str, str], float] = {}

    def lost(self, counted: Sequence[str], by: Sequence[str], genes: np.ndarray | None = None) -> np.ndarray:
        """Returns the share of the `counted` sections' totals in genes that the sections `by` do not measure.

        Float64 (counted, by). Counts are not read where lists of genes do not differ.

        Args:
            counted: sections whose counts are weighed.
            by: sections whose lists of genes are applied to them.
            genes: the genes of the total, bool (genes,); None: all of the table.
        """
        shares = [[self._share(section_id, other, genes) for other in by] for section_id in counted]
        return np.array(shares).reshape(len(counted), len(by))

    def _share(self, section_id: str, other: str, genes: np.ndarray | None) -> float:
        if genes is None and (section_id, other) in self._lost:
            return self._lost[section_id, other]
        missing = self._measured(section_id) & ~self._measured(other) & (True if genes is None else genes)
        share = 0.0
        if missing.any():
            counts = self._counted(section_id) if genes is None else self._counted(section_id) * genes
            share = float(counts[missing].sum() / max(1.0, counts.sum()))
        if genes is None:
            self._lost[section_id, other] = share
        return share

    def _measured(self, section_id: str) -> np.ndarray:
        if section_id not in self._measures:
            self._measures[section_id] = self.manifest.measures(section_id)
        return self._measures[section_id]

    def _counted(self, section_id: str) -> np.ndarray:
        if section_id not in self._counts:
            entry, columns = self.manifest.section(section_id), np.arange(self.manifest.num_genes)
            self._counts[section_id] = gene_totals(self.root, self.manifest, entry, columns)
        return self._counts[section_id]


def shared_genes(manifest: Manifest, section_ids: Sequence[str]) -> np.ndarray:
    """Returns the genes that all of some sections measure, bool (genes,).

    Raises:
        ConfigError: the table does not say which genes a section measures, or the sections share none.
    """
    unknown = [name for name in section_ids if manifest.section(name).genes is None]
    if unknown:
        raise ConfigError(
            f"genes.total=shared: the tile table does not say which genes {some_of(unknown)} measure; prepare it again "
            "(jobs/prepare.py), or set genes.total=all"
        )
    shared = np.logical_and.reduce([manifest.measures(name) for name in section_ids])
    if not shared.any():
        raise ConfigError(
            f"genes.total=shared: the training sections {some_of(section_ids)} share no gene; leave sections out, or "
            f"{_OTHER_UNITS}"
        )
    return shared


def genes_of_total(
    config: GenesConfig, manifest: Manifest, genes: pa.Table, training: Sequence[str], recorded: GenePanel | None
) -> np.ndarray | None:
    """Returns the genes of a table that make a spot's total, bool (genes,); None: all that its section counts.

    Args:
        config: says which.
        manifest: the table's.
        genes: the table's genes (GENE_SCHEMA).
        training: the training sections.
        recorded: the genes that a model version names; None: those that all training sections measure.

    Raises:
        ConfigError: as `shared_genes`.
        ModelError: the table lacks a recorded gene.
    """
    if config.total == "all":
        return None
    if recorded is None:
        return shared_genes(manifest, training)
    rows = align(recorded, genes)
    if (rows < 0).any():
        missing = [name for name, row in zip(recorded.names(), rows, strict=True) if row < 0]
        raise ModelError(
            f"the model's spot totals are over {len(recorded)} genes, and the tile table lacks {len(missing)} of them: "
            f"{some_of(missing)}; score the model on the table that it was trained on, or on one with these genes"
        )
    return np.isin(np.arange(manifest.num_genes), rows)


def require_one_total(counts: GeneCounts, training: Sequence[str]) -> list[str]:
    """Checks that totals over all genes mean the same in the training sections; returns small differences in words.

    Raises:
        ConfigError: a section would lose more than `MAX_LOST` of its counts with another's list of genes.
    """
    lists = [counts.manifest.measures(name) for name in training]
    num_all, num_any = (int(join.reduce(lists).sum()) for join in (np.logical_and, np.logical_or))
    if num_all == num_any:
        return []
    lost = counts.lost(training, training)
    row, column = divmod(int(lost.argmax()), len(training))
    what = (
        f"genes.total=all: the training sections measure different genes ({num_all} of {num_any} are measured by all), "
        f"and {lost.max():.1%} of the counts of {training[row]} are in genes that {training[column]} does not measure"
    )
    if lost.max() <= MAX_LOST:
        return [f"{what}; up to {MAX_LOST:.0%} their spot totals count as the same"]
    odd = [name for name, shares in zip(training, lost.T, strict=True) if shares.max() > MAX_LOST]
    raise ConfigError(
        f"{what}, so that spot totals are not over the same genes and one value means different things; allowed are "
        f"{MAX_LOST:.0%}. Set --genes.total shared (totals over the {num_all} genes that all measure), leave out "
        f"{some_of(odd)}, or {_OTHER_UNITS}"
    )


def other_totals(
    counts: GeneCounts, training: Sequence[str], sections: Sequence[str], genes: np.ndarray | None
) -> list[str]:
    """Returns a sentence on each section whose totals are over other genes than those of the training sections.

    Its measured expression is then in another unit than predictions: correlations hold, errors do not.

    Args:
        counts: of the tile table.
        training: the training sections.
        sections: the sections to score.
        genes: the genes of `genes.total=shared`, bool (genes,); None: all that a section measures.

    Raises:
        ConfigError: with `genes`, which promise one unit, there is such a section.
    """
    lost = counts.lost(training, sections, genes).max(axis=0)
    if genes is None:
        lost = np.maximum(lost, counts.lost(sections, training).max(axis=1))
    found = [
        f"spot totals of section {name} are over other genes than those of training sections: {share:.1%} of the "
        "counts are in genes that one of them does not measure"
        for name, share in zip(sections, lost, strict=True)
        if share > MAX_LOST
    ]
    if found and genes is not None:
        raise ConfigError(
            f"genes.total=shared: {'; '.join(found)}, allowed are {MAX_LOST:.0%}; leave such sections out, or "
            f"{_OTHER_UNITS}"
        )
    return found
