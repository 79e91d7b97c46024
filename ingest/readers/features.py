"""From what a source lists (names, ids, symbols, kinds) to genes: the one way in which all readers name them.

Whatever is not a gene is left out and counted by kind. A gene with a stable id is that id in any spelling; others are
named by symbol, or by the source's own ids where its symbols repeat, since only one of both can tell its genes apart.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from ingest.readers.spots import Gene, checked_counts, require_unique
from mclstexp.data.gene_names import StableId, excel_names, is_kind_of_gene, other_kind, stable_id, without_genome
from mclstexp.errors import SourceError
from mclstexp.messages import some_of

_NOT_A_GENE = -1
_NUMBERINGS = (("", 0), ("", 1), ("V", 1))
_EDGES = ' \t\r"\ufeff'  # no part of a name: blanks, R's quotes, a byte order mark


class _Listed(NamedTuple):
    """What a source calls one gene; each may be empty."""

    name: str
    source_id: str

    @property
    def stable_id(self) -> StableId | None:
        return stable_id(self.source_id) or stable_id(self.name)

    @property
    def symbol(self) -> str:
        """As it is written, with a genome before it; empty if the name is an id.

        Some sources have names and ids exchanged.
        """
        if stable_id(self.name):
            return "" if stable_id(self.source_id) else self.source_id
        return self.name


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


def named_features(names: Sequence[str], ids: Sequence[str] = (), kinds: Sequence[str] = ()) -> Features:
    """Returns the genes among the columns of a matrix.

    Args:
        names: what the source calls each column: a symbol or a stable id.
        ids, kinds: the ids and kinds that it states beside the names, with empty cells where it has none.

    Raises:
        SourceError: no column is a gene, two are the same gene, or one has no name; names kinds or genes.
    """
    stripped = ([text.strip(_EDGES) for text in part] for part in (names, ids, kinds))
    parts = [[""] * len(names) if _is_numbering(part) else part for part in stripped]
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
    without_genome = _genome_stripper(found.before for found in stable if found)
    unknown = [each for each, found in zip(listed, stable, strict=True) if not found]
    others = iter(_named_without_stable_id(unknown, without_genome))
    named = [
        Gene(found.gene_id, _symbol_of(each, found, without_genome), found.gene_id) if found else next(others)
        for each, found in zip(listed, stable, strict=True)
    ]
    in_par_y = [found is not None and found.in_par_y for found in stable]
    _require_unique([f"{gene.gene_id}{'_PAR_Y' * on_y}" for gene, on_y in zip(named, in_par_y, strict=True)])
    return named


def _genome_stripper(before_ids: Iterable[str]) -> Callable[[str], str]:
    """Returns a function that takes the genome off a name: one that several ids of the source have, or a known one.

    What is before ids and mostly differs from id to id is no genome but the symbols, some of which may repeat.
    """
    times = Counter(filter(None, before_ids))
    are_symbols = 2 * len(times) > times.total()
    genomes = [] if are_symbols else [text for text in times if times[text] > 1]

    def stripped(name: str) -> str:
        genome = next((each for each in genomes if name.startswith((f"{each}_", f"{each}-"))), "")
        return name.removeprefix(genome).lstrip("_-") if genome else without_genome(name)

    return stripped


def _symbol_of(listed: _Listed, found: StableId, without_genome: Callable[[str], str]) -> str:
    """Returns the symbol of a gene with a stable id: alone, or in one name with the id."""
    if listed.symbol:
        return without_genome(listed.symbol)
    has_genome = without_genome(f"{found.before}_{found.gene_id}") == found.gene_id
    return found.after or ("" if has_genome else found.before)


def _named_without_stable_id(listed: Sequence[_Listed], without_genome: Callable[[str], str]) -> list[Gene]:
    """Names genes by symbol, or all by the source's ids if symbols repeat and ids do not.

    The genome stays before a symbol that two genomes have.
    """
    written = [each.symbol or each.source_id for each in listed]
    if not all(written):
        raise SourceError(
            f"{written.count('')} of its genes have neither a name nor an id, or only a number; name them"
        )
    symbols = [without_genome(symbol) for symbol in written]
    times = Counter(symbols)
    symbols = [symbol if times[symbol] == 1 else full for symbol, full in zip(symbols, written, strict=True)]
    ids = [without_genome(each.source_id) for each in listed]
    if _has_repeated(symbols) and all(ids) and not _has_repeated(ids):
        return [Gene(own, symbol, own if own != symbol else "") for own, symbol in zip(ids, symbols, strict=True)]
    return [Gene(symbol, symbol, "") for symbol in symbols]


def _is_numbering(names: Sequence[str]) -> bool:
    """Returns whether names only count the columns, as pandas (0, 1) and R (1, 2 or V1, V2) do; or there are none."""
    return any(list(names) == [f"{start}{i + first}" for i in range(len(names))] for start, first in _NUMBERINGS)


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
