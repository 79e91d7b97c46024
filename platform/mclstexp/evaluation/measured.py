"""Measured sections as raw counts, so that one reading serves every target that a score card states.

The price is memory: the panel counts of all training and held-out spots are held, 4 bytes a spot and gene.

Shapes: N spots of one section, G genes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mclstexp.data.genes import Normaliser, panel_counts
from mclstexp.data.spots import SpotReader
from mclstexp.data.table import read_columns
from mclstexp.errors import ModelError
from mclstexp.evaluation.targets import normalise_section
from mclstexp.inference.bank import Bank

_PLACE, _PLACE_PX = ("x_um", "y_um"), ("x_px", "y_px")


@dataclass(frozen=True)
class MeasuredSection:
    """One section's spots in stored order: where they are and what was counted."""

    section_id: str
    patient_id: str
    spot_id: np.ndarray
    """Strings, (N,)."""
    place: np.ndarray
    """Micrometres, (N, 2)."""
    place_px: np.ndarray
    """Pixels of slide level 0, (N, 2)."""
    label: np.ndarray
    """A pathologist's labels, object (N,) of str; None where there is none."""
    counts: np.ndarray
    """Raw counts of the panel's genes, float32 (N, G)."""
    totals: np.ndarray
    """Count over all genes, float64 (N,)."""

    def __len__(self) -> int:
        return len(self.spot_id)

    def expression(self, target: Normaliser) -> np.ndarray:
        """Returns the section's expression in a target's unit, float32 (N, G)."""
        return normalise_section(target, self.counts, self.totals)


def read_measured(reader: SpotReader, section_id: str) -> MeasuredSection:
    """Returns a measured section of the reader's tile table over the reader's panel."""
    entry = reader.manifest.section(section_id)
    table = read_columns(reader.root, entry, ["spot_id", *_PLACE, *_PLACE_PX, "label", "gene_index", "count"])
    counts, totals = panel_counts(table["gene_index"], table["count"], reader.columns)
    place, place_px = (np.stack([table[name].to_numpy() for name in names], axis=1) for names in (_PLACE, _PLACE_PX))
    return MeasuredSection(
        section_id,
        entry.patient_id,
        np.array(table["spot_id"].to_pylist(), object),
        place,
        place_px,
        np.array(table["label"].to_pylist(), object),
        counts,
        totals,
    )


def restate(bank: Bank, training: Sequence[MeasuredSection], target: Normaliser) -> Bank:
    """Returns a bank whose payload stands in another target: the same keys, so the same neighbours and weights.

    Args:
        bank: of a model version.
        training: the version's training sections, in its order.
        target: the unit of the new payload.

    Raises:
        ModelError: the sections' spots are not the bank's.
    """
    sections = np.concatenate([np.full(len(section), section.section_id, object) for section in training])
    spots = np.concatenate([section.spot_id for section in training])
    if not (np.array_equal(sections, bank.section_id) and np.array_equal(spots, bank.spot_id)):
        raise ModelError(
            f"the bank holds {len(bank)} spots of {', '.join(dict.fromkeys(bank.section_id))}, and the tile table's "
            f"{len(spots)} spots of {', '.join(dict.fromkeys(sections))} are not the same in the same order, so that "
            "the model cannot answer in another target; score it on the tile table that it was trained on"
        )
    return replace(bank, payload=np.concatenate([section.expression(target) for section in training]))
