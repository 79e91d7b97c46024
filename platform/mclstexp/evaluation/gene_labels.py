"""What result tables and pages call genes: by symbol, with the id behind one that several genes have."""

from collections import Counter

import pyarrow as pa

from mclstexp.data.genes import GenePanel


def unique_labels(panel: GenePanel, genes: pa.Table) -> list[str]:
    """Returns a label for each gene of a panel, none twice.

    What is repeated is told by the tile table, so that folds whose panels differ call a gene the same.

    Args:
        panel: the genes.
        genes: all genes of the tile table (GENE_SCHEMA).
    """
    symbols, ids = (genes[name].to_pylist() for name in ("symbol", "gene_id"))
    in_table, in_panel = Counter(symbol or gene for symbol, gene in zip(symbols, ids, strict=True)), panel.names()
    counted = in_table | Counter(in_panel)
    return [
        with_id(name, gene_id) if counted[name] > 1 else name
        for name, gene_id in zip(in_panel, panel.gene_id, strict=True)
    ]


def with_id(name: str, gene_id: str) -> str:
    """Returns the label of a gene whose name is not its own alone."""
    return f"{name} ({gene_id})"
