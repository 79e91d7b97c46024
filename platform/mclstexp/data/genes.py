"""Gene panels, the names of their genes, and normalisation.

A panel is fitted on training sections only and travels with the model; any data is aligned to it by gene id. The tile
table stores raw counts, and they are normalised here, so that both can be fitted for each split. The trade-off: counts
become dense arrays over the panel each time they are read, which costs microseconds per spot.

A gene has one id (its Ensembl id where the source gives one, else its symbol), and three functions deal with names:
`find_genes` finds the genes that a user names, `align` finds a panel's genes in a gene table, and `unique_labels` gives
genes names that differ.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from mclstexp.data.gene_names import gene_names
from mclstexp.data.schema import GENE_SCHEMA, Manifest, SectionEntry
from mclstexp.data.table import read_counts
from mclstexp.errors import ConfigError, ModelError, TableError
from mclstexp.messages import did_you_mean, some_of
from mclstexp.settings import GenesConfig

Scheme = Literal["per_spot_all", "per_spot_panel", "per_gene"]
Total = Literal["all", "shared"]
IN_BRACKETS, AFTER_NAME = "{name} ({gene_id})", "{name} {gene_id}"
"""Where a label has the gene id: in score cards and reports, and in pictures and GeoJSON."""
_NUM_NEAREST = 3


@dataclass(frozen=True)
class GenePanel:
    """The genes that a model predicts, in order."""

    gene_id: tuple[str, ...]
    symbol: tuple[str, ...]
    """Empty where the source gives only an Ensembl id."""
    ensembl_id: tuple[str, ...]
    """Empty where the source gives only a symbol."""

    def __len__(self) -> int:
        return len(self.gene_id)

    def names(self) -> list[str]:
        """Returns what people call the genes: the symbol, or the id of a gene without one. Names may repeat."""
        return [symbol or gene_id for symbol, gene_id in zip(self.symbol, self.gene_id, strict=True)]

    def take(self, columns: Sequence[int] | np.ndarray) -> "GenePanel":
        """Returns the panel of the genes in the given columns, in that order."""
        return GenePanel(*(tuple(names[column] for column in columns) for names in self._fields()))

    def to_table(self) -> pa.Table:
        """Returns the panel as a gene table (GENE_SCHEMA)."""
        return pa.table([list(names) for names in self._fields()], schema=GENE_SCHEMA)

    def to_json(self) -> str:
        """Returns the panel as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "GenePanel":
        """Returns the panel that `to_json` wrote."""
        return cls(**{name: tuple(values) for name, values in json.loads(text).items()})

    @classmethod
    def from_names(cls, names: Iterable[str], symbols: Collection[str] = ()) -> "GenePanel":
        """Returns the panel of genes that a file lists by symbol or stable id, in any spelling.

        Args:
            names: the genes.
            symbols: those of a gene table, which are taken as they are (some keep a genome before them).
        """
        genes = [(name, name, "") if name in symbols else gene_names(name) for name in names]
        return cls(*(tuple(gene[field] for gene in genes) for field in range(3)))

    @classmethod
    def from_table(cls, genes: pa.Table) -> "GenePanel":
        """Returns the genes of a gene table (GENE_SCHEMA) as a panel."""
        return cls(*(tuple(genes[name].to_pylist()) for name in GENE_SCHEMA.names))

    def _fields(self) -> tuple[tuple[str, ...], ...]:
        return self.gene_id, self.symbol, self.ensembl_id


def find_genes(panel: GenePanel, names: Sequence[str]) -> list[int]:
    """Returns the columns of the genes that a user names, in the user's order, each once.

    A name is a symbol, a gene id or an Ensembl id, with or without its version. A symbol that several genes share means
    all of them.

    Raises:
        ConfigError: the panel has no such gene; gives the nearest names of the panel.
    """
    columns: dict[str, list[int]] = {}
    for column, aliases in enumerate(zip(panel.symbol, panel.gene_id, panel.ensembl_id, strict=True)):
        for alias in dict.fromkeys(filter(None, aliases)):
            columns.setdefault(alias, []).append(column)
    found = {name: columns.get(name) or columns.get(gene_names(name)[0], []) for name in names}
    unknown = [f"{name} ({did_you_mean(name, columns, _NUM_NEAREST)})" for name in found if not found[name]]
    if unknown:
        raise ConfigError(f"the panel of {len(panel)} genes does not have {'; '.join(unknown)}")
    return list(dict.fromkeys(column for each in found.values() for column in each))


def align(panel: GenePanel, genes: pa.Table) -> np.ndarray:
    """Returns the row of each panel gene in a gene table (GENE_SCHEMA), int32 (G,); -1 if the table has no such gene.

    A gene is found by its Ensembl id, else by its symbol; one symbol with two different Ensembl ids is two genes. What
    a panel has as a symbol may also be the own id of a source (`ingest.readers.features`).
    """
    symbols, ids = genes["symbol"].to_pylist(), genes["ensembl_id"].to_pylist()
    by_ensembl = _first_rows(ids, range(len(ids)))
    by_name = by_ensembl | _first_rows(symbols, range(len(ids)))
    by_symbol_alone = _first_rows(symbols, [row for row, name in enumerate(ids) if not name])
    rows = [
        by_ensembl.get(ensembl, by_symbol_alone.get(symbol, -1)) if ensembl else by_name.get(symbol, -1)
        for ensembl, symbol in zip(panel.ensembl_id, panel.symbol, strict=True)
    ]
    return np.array(rows, np.int32)


def unique_labels(
    names: Sequence[str], gene_ids: Sequence[str], *others: Iterable[str], form: str = IN_BRACKETS
) -> list[str]:
    """Returns a label for each gene: its name, with its gene id where the name is shared.

    Args:
        names: what the genes are called (`GenePanel.names`).
        gene_ids: their ids.
        others: names of other lists of genes. A name is shared if it occurs twice in `names` or twice in one of these:
            the names of the tile table's genes give one gene the same label in folds with different panels.
        form: the label of a gene whose name is shared.
    """
    times = Counter(names)
    for other in others:
        times |= Counter(other)
    return [
        form.format(name=name, gene_id=gene_id) if times[name] > 1 else name
        for name, gene_id in zip(names, gene_ids, strict=True)
    ]


def coverage(panel: GenePanel, columns: np.ndarray) -> str:
    """Returns how many of the panel's genes a data set has and which are missing, in words.

    Args:
        columns: the data set's row of each gene, (G,); -1 if it has none (`align`).
    """
    missing = [name for name, column in zip(panel.names(), columns, strict=True) if column < 0]
    named = f"; missing: {some_of(missing)}" if missing else ""
    return f"the data has {len(panel) - len(missing)} of the panel's {len(panel)} genes{named}"


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
    total: Total = "all"
    """Genes of the spot total of `per_spot_all`, as `genes.total`."""

    def apply(self, counts: np.ndarray, totals: np.ndarray, gene_totals: np.ndarray | None) -> np.ndarray:
        """Returns normalised expression, float32 (N, G); a total of zero gives zeros.

        Args:
            counts: raw counts of the panel genes, (N, G).
            totals: each spot's count over the genes of the total, (N,).
            gene_totals: each panel gene's count over its section, (G,); only `per_gene` uses it.

        Raises:
            ModelError: `per_gene` without `gene_totals`.
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
        genes = "all genes" if self.total == "all" else "the genes that all training sections measure"
        total = {
            "per_spot_all": f"spot total over {genes}",
            "per_spot_panel": "spot total over the panel",
            "per_gene": "gene total over the section",
        }[self.scheme]
        return f"{log}(1 + {self.scale:g} * count / {total})"


def normalisers(config: GenesConfig) -> tuple[Normaliser, Normaliser]:
    """Returns the normalisers of the spot tower's input and of the target."""
    first, second = (
        Normaliser(scheme, config.scale, config.log_base, config.total if scheme == "per_spot_all" else "all")
        for scheme in (config.input, config.target)
    )
    return first, second


def panel_counts(
    gene_index: pa.ChunkedArray, count: pa.ChunkedArray, columns: np.ndarray, total: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns panel counts, float32 (N, G), and totals, float64 (N,), of N stored rows.

    Args:
        gene_index, count: the table's sparse columns.
        columns: row of each panel gene in the gene table, (G,); a gene at -1 gets zeros.
        total: the genes that make a total, bool (genes,); None: all.

    Raises:
        TableError: the columns do not fit each other.
    """
    genes, values = (column.combine_chunks() for column in (gene_index, count))
    lengths = np.diff(genes.offsets.to_numpy())
    if not np.array_equal(lengths, np.diff(values.offsets.to_numpy())):
        raise TableError("a spot has more gene indices than counts, or fewer: the file is damaged; prepare it again")
    gene, value = genes.flatten().to_numpy(), values.flatten().to_numpy()
    column_of = np.full(max(gene.max(initial=0), columns.max(initial=0)) + 1, -1)
    column_of[columns[columns >= 0]] = np.flatnonzero(columns >= 0)
    column = column_of[gene]
    wanted = np.flatnonzero(column >= 0)
    spots = np.repeat(np.arange(len(genes)), lengths)[wanted]
    dense = np.zeros((len(genes), len(columns)), np.float32)
    dense.ravel()[spots * len(columns) + column[wanted]] = value[wanted]
    counted = np.append(0, np.cumsum(value if total is None else value * total[gene], dtype=np.int64))
    ends = np.cumsum(lengths)
    return dense, (counted[ends] - counted[ends - lengths]).astype(np.float64)


def gene_totals(root: str, manifest: Manifest, entry: SectionEntry, columns: np.ndarray) -> np.ndarray:
    """Returns each panel gene's count over a section, float64 (G,); 0 for a gene at -1.

    Args:
        columns: row of each panel gene in the gene table, (G,).
    """
    totals = np.asarray(read_counts(root, entry, manifest.num_genes).sum(axis=0), np.float64).ravel()
    return np.where(columns >= 0, totals[columns], 0.0)


def unmeasured_genes(manifest: Manifest, section_id: str, columns: np.ndarray) -> np.ndarray:
    """Returns the panel's genes that a section does not measure, ascending indices, int64 (n,).

    Args:
        columns: row of each panel gene in the gene table, (G,); a gene at -1 is in no section.
    """
    measures = np.append(manifest.measures(section_id), False)  # which -1 picks
    return np.flatnonzero(~measures[columns])


def _first_rows(names: list[str], rows: Iterable[int]) -> dict[str, int]:
    """Returns the first of the given rows for each name that is not empty."""
    first: dict[str, int] = {}
    for row in rows:
        if names[row]:
            first.setdefault(names[row], row)
    return first
