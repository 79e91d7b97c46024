"""From what a source lists (names, ids, symbols, kinds) to genes: the one way in which all readers name them.

Whatever is not a gene is left out and counted by kind. A gene with a stable id is that id in any spelling; others are
named by symbol, or by the source's own ids where its symbols repeat, since only one of both can tell its genes apart.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from ingest.readers.spots import Gene, checked_counts, require_unique
from mclstexp.data.gene_names import StableId, excel_names, is_kind_of_gene, other_kind, stable_id, without_genome
from mclstexp.errors import SourceError
from mclstexp.messages import some_of

_NOT_A_GENE = -1


class _Listed(NamedTuple):
    """What a source calls one gene; each may be empty."""

    name: str
    source_id: str
    symbol: str

    @property
    def stable_id(self) -> StableId | None:
        return next(filter(None, map(stable_id, self)), None)

    @property
    def written_symbol(self) -> str:
        """The first that is not a stable id, with the genome before it."""
        return next((text for text in (self.name, self.symbol) if text and not stable_id(text)), "")


@dataclass(frozen=True)
class Features:
    """The columns of a source's matrix and the genes among them."""

    genes: tuple[Gene, ...]
    """Each gene once, in the order of its first column."""
    gene_of: np.ndarray
    """Index in `genes` of each column, int64 (columns,); -1 for a column that is not a gene."""
    left_out: Mapping[str, int]
    """Number of columns that are not genes, by kind."""

    def counts(self, values: csr_array, spot_ids: list[str]) -> csr_array:
        """Returns int32 counts (spots, genes) of values (spots, columns); columns of one gene are summed.

        Raises:
            SourceError: a value or sum of a gene is not a count; names spot and gene.
        """
        is_gene = self.gene_of != _NOT_A_GENE
        gene_of = self.gene_of[is_gene]
        named = tuple(self.genes[gene] for gene in gene_of)
        counts = checked_counts(values if is_gene.all() else values[:, is_gene], spot_ids, named)
        if len(gene_of) == len(self.genes):
            return counts
        shape = (counts.shape[0], len(self.genes))
        summed = csr_array((counts.data.astype(np.int64), gene_of[counts.indices], counts.indptr), shape=shape)
        return checked_counts(summed, spot_ids, self.genes)


def named_features(
    names: Sequence[str], ids: Sequence[str] = (), symbols: Sequence[str] = (), kinds: Sequence[str] = ()
) -> Features:
    """Returns the genes among the columns of a matrix.

    Args:
        names: what the source calls each column: a stable id or a symbol.
        ids, symbols, kinds: what else it states of each column, in any spelling; empty if it has none.

    Raises:
        SourceError: no column is a gene, two are the same gene, or one has no name; names kinds or genes.
    """
    parts = [
        [text.strip() for text in part] if len(part) else [""] * len(names) for part in (names, ids, symbols, kinds)
    ]
    columns = list(zip(*parts, strict=True))
    kind_of = [_other_kind(kind, texts) for *texts, kind in columns]
    is_gene = np.array([kind is None for kind in kind_of], bool)
    left_out = Counter(kind for kind in kind_of if kind is not None)
    if not is_gene.any():
        raise SourceError(f"it has no feature of the kind 'Gene Expression'; it has {dict(left_out) or 'none'}")
    named = _named([_Listed(*texts) for (*texts, _), kind in zip(columns, kind_of, strict=True) if kind is None])
    genes: dict[str, Gene] = {}
    for gene in named:
        known = genes.setdefault(gene.gene_id, gene)
        genes[gene.gene_id] = known if known.symbol else gene
    row_of = {gene_id: row for row, gene_id in enumerate(genes)}
    gene_of = np.full(len(names), _NOT_A_GENE)
    gene_of[is_gene] = [row_of[gene.gene_id] for gene in named]
    return Features(tuple(genes.values()), gene_of, dict(sorted(left_out.items())))


def _other_kind(kind: str, texts: Sequence[str]) -> str | None:
    """Returns the kind of a column that is not a gene, as the source states it or as one of its names says it."""
    if not is_kind_of_gene(kind):
        return kind
    return next(filter(None, map(other_kind, texts)), None)


def _named(listed: Sequence[_Listed]) -> list[Gene]:
    """Returns the gene of each column of genes; two may have the same one, if one of both is its copy on Y."""
    stable = [each.stable_id for each in listed]
    prefixes = Counter(found.before for found in stable if found)
    genes = [
        Gene(found.gene_id, _symbol_beside(each, found, prefixes), found.gene_id) if found else None
        for each, found in zip(listed, stable, strict=True)
    ]
    others = iter(_named_without_stable_id([each for each, found in zip(listed, stable, strict=True) if not found]))
    named = [gene or next(others) for gene in genes]
    in_par_y = [found is not None and found.in_par_y for found in stable]
    _require_unique([f"{gene.gene_id}{'_PAR_Y' * on_y}" for gene, on_y in zip(named, in_par_y, strict=True)])
    return named


def _symbol_beside(listed: _Listed, found: StableId, prefixes: Mapping[str, int]) -> str:
    """Returns the symbol of a gene with a stable id; what only one id of a source has before it is no genome."""
    symbol = listed.written_symbol
    if symbol:
        genome, rest = symbol[: len(found.before)], symbol[len(found.before) :].lstrip("_-")
        return rest if found.before and genome == found.before and rest else without_genome(symbol)
    is_genome = prefixes[found.before] > 1 or without_genome(f"{found.before}_{found.gene_id}") == found.gene_id
    return found.after or ("" if is_genome else found.before)


def _named_without_stable_id(listed: Sequence[_Listed]) -> list[Gene]:
    """Names genes by symbol, or all by the source's ids if symbols repeat and ids do not."""
    written = [each.written_symbol or each.source_id for each in listed]
    if not all(written):
        raise SourceError(f"{written.count('')} of its features have neither name nor id; name them or leave them out")
    symbols = [without_genome(symbol) for symbol in written]
    times = Counter(symbols)
    symbols = [symbol if times[symbol] == 1 else full for symbol, full in zip(symbols, written, strict=True)]
    ids = [without_genome(each.source_id) for each in listed]
    if _has_repeated(symbols) and all(ids) and not _has_repeated(ids):
        return [Gene(source_id, symbol, source_id) for source_id, symbol in zip(ids, symbols, strict=True)]
    return [Gene(symbol, symbol, "") for symbol in symbols]


def _has_repeated(names: Collection[str]) -> bool:
    return len(set(names)) < len(names)


def _require_unique(names: list[str]) -> None:
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if excel := excel_names(repeated):
        raise SourceError(
            f"gene appears more than once: {some_of(excel)}; Excel makes such names of different symbols (1-Mar of "
            "MARCH1 and MARC1): give the table as it was before Excel, or its ids"
        )
    require_unique(names, "gene")
