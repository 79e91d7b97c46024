"""A sheet's sections prepared in this process, without Ray: the plan, its sections, and what their files hold."""

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from ingest.header import gene_rows, read_header
from ingest.plan import Plan, make_plan
from ingest.section import cut_section
from mclstexp import storage
from mclstexp.config import Config, override
from mclstexp.data.schema import SectionEntry, decode_rows
from mclstexp.slides.codec import decode_tile

SETTINGS = {"tiles.size_px": 32, "tiles.sentence_length": 16, "tiles.encoding": "png", "tiles.wide_um": None}


@dataclass(frozen=True)
class PreparedHere:
    """Sections as they were cut."""

    plan: Plan
    entries: dict[str, SectionEntry]

    def spots(self, section_id: str) -> dict[str, dict]:
        """Returns a section's rows of the tile table by spot."""
        return {row["spot_id"]: row for row in self._rows(self.entries[section_id].file)}

    def rejects(self, section_id: str) -> dict[str, str]:
        """Returns the reason of each rejected spot."""
        return {row["spot_id"]: row["reason"] for row in self._rows(self.entries[section_id].rejects_file)}

    def measures(self, section_id: str) -> set[str]:
        """Returns the ids of the genes that a section measures."""
        genes = self.entries[section_id].genes
        assert genes is not None
        listed = decode_rows(genes, len(self.plan.genes))
        return {gene.gene_id for gene, is_measured in zip(self.plan.genes, listed, strict=True) if is_measured}

    def counts(self, spot: dict) -> dict[str, int]:
        """Returns the counts above zero of a row of the tile table by gene id."""
        return {
            self.plan.genes[gene].gene_id: count for gene, count in zip(spot["gene_index"], spot["count"], strict=True)
        }

    def _rows(self, file: str) -> list[dict]:
        return pq.read_table(storage.join(self.plan.root, file)).to_pylist()


def prepare_here(sheet: str, out: str, **settings) -> PreparedHere:
    """Cuts a sheet's sections one after the other; raises what `prepare` raises."""
    plan = make_plan(str(sheet), str(out), override(Config(), SETTINGS | settings), lambda rows: map(read_header, rows))
    rows = gene_rows(plan.genes)
    cut = (cut_section(row, plan.recipe, rows, plan.root, digest) for digest, row in plan.todo.items())
    return PreparedHere(plan, {entry.section_id: entry for entry in cut})


def tile(spot: dict) -> np.ndarray:
    """Returns the decoded tile of a row of the tile table, uint8 (size, size, 3)."""
    return decode_tile(spot["image"])
