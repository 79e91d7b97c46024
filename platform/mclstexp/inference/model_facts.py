"""What publishing needs to know of a model version: no weights, so that its tasks start without torch."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from mclstexp.data.genes import GenePanel
from mclstexp.errors import ConfigError

_NUM_NEAREST = 3


@dataclass(frozen=True)
class ModelFacts:
    """A model version as its predictions describe it."""

    panel: GenePanel
    unit: str
    """Unit of the predictions, in words."""
    model_digest: str
    tile_size_px: int
    mpp: float
    """Micrometres per tile pixel."""
    ood_similarity: float | None
    """Best similarity below which a tile is out of distribution; None where the model has no threshold."""


def choose_genes(panel: GenePanel, names: Sequence[str]) -> list[int]:
    """Returns the columns of genes named by symbol, gene id or Ensembl id, in the order asked for and once each.

    A symbol that several genes bear means all of them.

    Raises:
        ConfigError: the panel lacks some; names them and the panel's nearest.
    """
    columns: dict[str, list[int]] = {}
    for column, aliases in enumerate(zip(panel.symbol, panel.gene_id, panel.ensembl_id, strict=True)):
        for alias in dict.fromkeys(filter(None, aliases)):
            columns.setdefault(alias, []).append(column)
    unknown = [name for name in names if name not in columns]
    if unknown:
        lacks = "; ".join(_nearest(name, list(columns)) for name in dict.fromkeys(unknown))
        raise ConfigError(f"the model's panel of {len(panel)} genes lacks {lacks}")
    return list(dict.fromkeys(column for name in names for column in columns[name]))


def gene_labels(panel: GenePanel, columns: Sequence[int]) -> list[str]:
    """Returns what chosen genes are called: the symbol, followed by the gene id where another one bears it too."""
    names = panel.names()
    chosen = [names[column] for column in columns]
    return [
        name if chosen.count(name) == 1 else f"{name} {panel.gene_id[column]}"
        for name, column in zip(chosen, columns, strict=True)
    ]


def _nearest(name: str, known: list[str]) -> str:
    """Returns the name with the known ones most like it, whatever their case."""
    folded = {alias.lower(): alias for alias in known}
    near = [folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=_NUM_NEAREST)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has, for example, {', '.join(known[:_NUM_NEAREST])}"
    return f"{name} ({hint})"
