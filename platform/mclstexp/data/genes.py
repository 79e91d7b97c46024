"""Gene panels and normalisation.

A panel is fitted on training sections only and carried by the model; any data is aligned to it by gene id. Counts
stay raw in the tile table and are normalised here, so that both can be fitted per split. The trade-off: counts are
turned into dense arrays over the panel each time they are read, which costs microseconds a spot.
"""

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from mclstexp.data.schema import Manifest, SectionEntry, gene_names
from mclstexp.data.table import read_counts
from mclstexp.errors import ConfigError, ModelError
from mclstexp.settings import GenesConfig

Scheme = Literal["per_spot_all", "per_spot_panel", "per_gene"]
_NAMED_IN_ERROR = 5


@dataclass(frozen=True)
class GenePanel:
    """The genes that a model predicts, in their order."""

    gene_id: tuple[str, ...]
    symbol: tuple[str, ...]
    ensembl_id: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.gene_id)

    def names(self) -> list[str]:
        """Returns what people call the genes: the symbol where there is one, else the id."""
        return [symbol or gene for symbol, gene in zip(self.symbol, self.gene_id, strict=True)]

    def to_json(self) -> str:
        """Returns the panel as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_names(cls, names: Iterable[str]) -> "GenePanel":
        """Returns the panel of genes as a source names them, by symbol or Ensembl id."""
        genes = [gene_names(name) for name in names]
        return cls(*(tuple(gene[place] for gene in genes) for place in range(3)))

    @classmethod
    def from_json(cls, text: str) -> "GenePanel":
        """Returns the panel that `to_json` wrote."""
        return cls(**{name: tuple(values) for name, values in json.loads(text).items()})


@dataclass(frozen=True)
class Normaliser:
    """log(1 + scale * count / total), with the total of the spot, of the spot's panel genes, or of the gene.

    `per_spot_panel` and `per_gene` in base 10 are mclSTExp's training input and payload (2024,
    https://arxiv.org/abs/2407.08216); `per_spot_all` in base e is the field's usual log-normalisation (scanpy, 2018,
    https://doi.org/10.1186/s13059-017-1382-0).
    """

    scheme: Scheme
    scale: float
    log_base: Literal["e", "10"]

    def apply(self, counts: np.ndarray, totals: np.ndarray, gene_totals: np.ndarray | None) -> np.ndarray:
        """Returns normalised expression, float32 (N, G); a total of zero gives zeros.

        Args:
            counts: raw counts of the panel genes, (N, G).
            totals: each spot's count over all genes, (N,).
            gene_totals: each panel gene's count over its section, (G,); used by `per_gene` only.
        """
        if self.scheme == "per_gene":
            if gene_totals is None:
                raise ModelError("the per_gene normalisation needs the section's gene totals")
            divisor = gene_totals[None, :]
        else:
            divisor = (totals if self.scheme == "per_spot_all" else counts.sum(axis=1))[:, None]
        shares = np.divide(counts, divisor, out=np.zeros(counts.shape), where=divisor > 0)
        logs = np.log1p(self.scale * shares)
        return (logs / np.log(10) if self.log_base == "10" else logs).astype(np.float32)

    def unit(self) -> str:
        """Returns the unit in words, for outputs."""
        log = "ln" if self.log_base == "e" else "log10"
        total = {
            "per_spot_all": "spot total over all genes",
            "per_spot_panel": "spot total over the panel",
            "per_gene": "gene total over the section",
        }[self.scheme]
        return f"{log}(1 + {self.scale:g} * count / {total})"


def normalisers(config: GenesConfig) -> tuple[Normaliser, Normaliser]:
    """Returns the normalisers of the spot tower's input and of the target."""
    schemes = (config.input, config.target)
    return tuple(Normaliser(scheme, config.scale, config.log_base) for scheme in schemes)  # type: ignore[return-value]


def align(panel: GenePanel, genes: pa.Table) -> np.ndarray:
    """Returns the gene-table row of each panel gene, int32 (G,); -1 where the table lacks it.

    A gene is found by its Ensembl id, else by its symbol; one symbol with two different Ensembl ids is two genes.
    """
    symbols, ids = genes["symbol"].to_pylist(), genes["ensembl_id"].to_pylist()
    by_ensembl = _first_rows(ids, range(len(ids)))
    by_symbol = _first_rows(symbols, range(len(ids)))
    by_symbol_alone = _first_rows(symbols, [row for row, name in enumerate(ids) if not name])
    rows = [
        by_ensembl.get(ensembl, by_symbol_alone.get(symbol, -1)) if ensembl else by_symbol.get(symbol, -1)
        for ensembl, symbol in zip(panel.ensembl_id, panel.symbol, strict=True)
    ]
    return np.array(rows, np.int32)


def coverage(panel: GenePanel, columns: np.ndarray) -> str:
    """Returns a line on how many of the panel's genes a data set has, and which it lacks."""
    missing = [name for name, column in zip(panel.names(), columns, strict=True) if column < 0]
    more = f" and {len(missing) - _NAMED_IN_ERROR} more" if len(missing) > _NAMED_IN_ERROR else ""
    lacks = f"; it lacks {', '.join(missing[:_NAMED_IN_ERROR])}{more}" if missing else ""
    return f"the data has {len(panel) - len(missing)} of the panel's {len(panel)} genes{lacks}"


def panel_counts(
    gene_index: pa.ChunkedArray, count: pa.ChunkedArray, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns panel counts, float32 (N, G), and totals over all genes, float64 (N,), of N stored rows.

    Args:
        gene_index, count: the table's sparse columns.
        columns: gene-table row of each panel gene, (G,); a gene at -1 gets zeros.
    """
    genes, values = (column.combine_chunks() for column in (gene_index, count))
    lengths = np.diff(genes.offsets.to_numpy())
    spots = np.repeat(np.arange(len(genes)), lengths)
    gene, value = genes.flatten().to_numpy(), values.flatten().to_numpy().astype(np.float64)
    place = np.full(max(gene.max(initial=0), columns.max(initial=0)) + 1, -1)
    place[columns[columns >= 0]] = np.flatnonzero(columns >= 0)
    dense = np.zeros((len(genes), len(columns)), np.float32)
    wanted = place[gene] >= 0
    dense[spots[wanted], place[gene[wanted]]] = value[wanted]
    return dense, np.bincount(spots, weights=value, minlength=len(genes))


def gene_totals(root: str, manifest: Manifest, entry: SectionEntry, columns: np.ndarray) -> np.ndarray:
    """Returns each panel gene's count over a section, float64 (G,); 0 for a gene that the table lacks."""
    totals = np.asarray(read_counts(root, entry, manifest.num_genes).sum(axis=0), np.float64).ravel()
    return np.where(columns >= 0, totals[columns], 0.0)


def _first_rows(names: list[str], rows: Iterable[int]) -> dict[str, int]:
    """Returns the first of the given rows that each name stands in; an empty name stands nowhere."""
    first: dict[str, int] = {}
    for row in rows:
        if names[row]:
            first.setdefault(names[row], row)
    return first


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


_NUM_NEAREST = 3


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
