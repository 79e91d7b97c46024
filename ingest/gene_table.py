"""The gene table of a cohort: which gene of each source stands in which row.

An Ensembl id names a gene in every source, and the first source that gives it a symbol says which. A symbol alone is
taken for the one Ensembl gene of that symbol, without which sections of both kinds would share no gene; nothing is
looked up elsewhere. It stays a gene of its own where two Ensembl genes have the symbol, or one source (or the table so
far) names both.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ingest.expression import Gene


def merged_genes(present: Sequence[Gene], sources: Iterable[Sequence[Gene]]) -> tuple[Gene, ...]:
    """Returns the table's present genes in place, then the sources' new ones, so that stored gene indices stay valid.

    A present gene may gain the Ensembl id or the symbol that a source knows for it.
    """
    named = [present, *sources]
    genes: dict[str, Gene] = {}
    for gene in (gene for each in named for gene in each):
        known = genes.setdefault(gene.gene_id, gene)
        if gene.symbol and not known.symbol:
            genes[gene.gene_id] = known._replace(symbol=gene.symbol)
    joined = _joined(genes, [{gene.gene_id for gene in each} for each in named])
    merged: dict[str, Gene] = {}
    for gene_id in genes:
        gene = genes[joined.get(gene_id, gene_id)]
        merged.setdefault(gene.gene_id, gene)
    return tuple(merged.values())


def gene_rows(table: Sequence[Gene]) -> dict[str, int]:
    """Returns the row of each gene id, and of each symbol that is no id the first row that has it."""
    rows: dict[str, int] = {}
    for row, gene in enumerate(table):
        if gene.symbol:
            rows.setdefault(gene.symbol, row)
    return rows | {gene.gene_id: row for row, gene in enumerate(table)}


def _joined(genes: Mapping[str, Gene], named: Sequence[set[str]]) -> dict[str, str]:
    """Returns the id of the Ensembl gene that each symbol alone is taken for; `named` holds each source's ids."""
    owners: defaultdict[str, list[str]] = defaultdict(list)
    for gene in genes.values():
        if gene.ensembl_id and gene.symbol in genes and not genes[gene.symbol].ensembl_id:
            owners[gene.symbol].append(gene.gene_id)
    return {
        symbol: ids[0]
        for symbol, ids in owners.items()
        if len(ids) == 1 and not any({symbol, ids[0]} <= each for each in named)
    }
