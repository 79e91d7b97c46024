"""Measured sections as raw counts over a gene panel, with the places of their spots.

Counts are kept raw, so that one reading serves every target of a score card and every depth of a thinned target. The
price is memory: 4 bytes per spot and gene.

Shapes: N spots of one section, G genes.
"""

from dataclasses import dataclass, field

import numpy as np

from mclstexp.data.genes import Normaliser, panel_counts, unmeasured_genes
from mclstexp.data.spots import SpotReader
from mclstexp.data.table import read_columns

XY_UM, XY_PX = ("x_um", "y_um"), ("x_px", "y_px")


@dataclass(frozen=True)
class MeasuredSection:
    """One section's spots in stored order, with their raw counts."""

    section_id: str
    patient_id: str
    spot_id: np.ndarray
    """Strings, (N,)."""
    xy_um: np.ndarray
    """Micrometres, (N, 2)."""
    xy_px: np.ndarray
    """Pixels of slide level 0, (N, 2)."""
    label: np.ndarray
    """A pathologist's labels, object (N,) of str; None for a spot without one."""
    counts: np.ndarray
    """Raw counts of the panel's genes, float32 (N, G)."""
    totals: np.ndarray
    """Count over the genes that make a total (`genes.total`), float64 (N,)."""
    unmeasured: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """The panel's genes that the section does not measure, indices (n,)."""
    in_total: np.ndarray = field(default_factory=lambda: np.ones(1, bool))
    """Whether each gene of the panel is part of the totals, bool (G,), or (1,) for all."""

    def __len__(self) -> int:
        return len(self.spot_id)

    def expression(self, target: Normaliser) -> np.ndarray:
        """Returns the section's expression in a target's unit, float32 (N, G); NaN for a gene it does not measure."""
        values = normalise_section(target, self.counts, self.totals)
        values[:, self.unmeasured] = np.nan
        return values


def normalise_section(target: Normaliser, counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Returns the expression of one whole section in a target's unit, float32 (N, G).

    Args:
        target: a model's, or another of a score card.
        counts: raw counts of the panel's G genes in all N spots of the section, (N, G).
        totals: each spot's count over the genes of the total, (N,).
    """
    return target.apply(counts, totals, counts.sum(axis=0, dtype=np.float64))


def read_measured(reader: SpotReader, section_id: str, group: int | None = None) -> MeasuredSection:
    """Returns a measured section of the reader's tile table, or one of its sentences, over the reader's panel."""
    entry = reader.manifest.section(section_id)
    table = read_columns(reader.root, entry, ["spot_id", *XY_UM, *XY_PX, "label", "gene_index", "count"], group)
    counts, totals = panel_counts(table["gene_index"], table["count"], reader.columns, reader.total)
    xy_um, xy_px = (np.stack([table[name].to_numpy() for name in names], axis=1) for names in (XY_UM, XY_PX))
    return MeasuredSection(
        section_id,
        entry.patient_id,
        np.array(table["spot_id"].to_pylist(), object),
        xy_um,
        xy_px,
        np.array(table["label"].to_pylist(), object),
        counts,
        totals,
        unmeasured_genes(reader.manifest, section_id, reader.columns),
        np.ones(1, bool) if reader.total is None else np.append(reader.total, False)[reader.columns],
    )
