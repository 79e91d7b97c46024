"""What sections say of themselves before anything is cut, and the report on it that a user sees.

An image in object storage is opened here only where the sheet leaves out its mpp, since opening it means fetching it.
"""

import tempfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ingest.readers import read_preview
from ingest.readers.spots import Gene, Preview
from ingest.section import section_errors, source_mpp
from mclstexp import storage
from mclstexp.data.sheet import SectionRow
from mclstexp.slides.slide import open_slide

_MOST_NAMED = 5
_WORTH_NAMING = 0.1


@dataclass(frozen=True)
class Header:
    """One section before it is cut."""

    mpp: float
    """Micrometres per level-0 pixel."""
    mpp_source: str
    """Who says so."""
    preview: Preview


def read_header(row: SectionRow) -> Header:
    """Returns what a section's files say of themselves.

    Raises:
        SourceError: a file is missing, damaged or contradicts the sheet; names the section.
    """
    with section_errors(row), tempfile.TemporaryDirectory(prefix="mclstexp-") as scratch:
        preview = read_preview(row, scratch)
        if row.mpp is not None and storage.is_s3(row.image):
            return Header(*source_mpp(row, None, preview.array_mpp), preview)
        with storage.local_copy(row.image, scratch) as image, open_slide(image) as slide:
            return Header(*source_mpp(row, slide.mpp, preview.array_mpp), preview)


def report(headers: Mapping[str, Header], table: Sequence[Gene], num_present: int = 0) -> str:
    """Returns in words where the resolutions come from, how genes are named and how many all sections share.

    Args:
        headers: by section; those that were read in this run.
        table: the gene table that holds their genes.
        num_present: how many of its first genes the tile table had before.
    """
    genes = {name: header.preview.genes for name, header in headers.items() if header.preview.genes}
    lines = [*_resolution_lines(headers), *_gene_lines(genes, table)]
    if genes and num_present:
        met = sum(row < num_present for row in _common(_rows(genes, table)))
        lines.append(f"genes      {met} of those in common are among the {num_present} of the table so far")
    return "\n".join([*lines, *_left_out_lines(headers)])


def naming_system(genes: Collection[Gene]) -> str:
    """Returns how a source names at least a tenth of its genes, for example `Ensembl ids (ENSG) and symbols`."""
    kinds = Counter((bool(gene.ensembl_id), bool(gene.symbol)) for gene in genes)
    species = ", ".join(sorted({gene.ensembl_id.rstrip("0123456789") for gene in genes} - {""}))
    names = {
        (True, True): f"Ensembl ids ({species}) and symbols",
        (True, False): f"Ensembl ids ({species})",
        (False, True): "symbols",
    }
    named = [names[kind] for kind, times in kinds.most_common() if times >= _WORTH_NAMING * kinds.total()]
    return named[0] if len(named) == 1 else f"{named[0]}, some by {' or '.join(named[1:])}"


def _resolution_lines(headers: Mapping[str, Header]) -> list[str]:
    sections: defaultdict[str, list[str]] = defaultdict(list)
    for name, header in headers.items():
        sections[header.mpp_source].append(name)
    return [
        f"resolution {_range([headers[name].mpp for name in names])} um/px by the {source}: {_named(names)}"
        for source, names in sections.items()
    ]


def _gene_lines(genes: Mapping[str, tuple[Gene, ...]], table: Sequence[Gene]) -> list[str]:
    rows = _rows(genes, table)
    systems: defaultdict[str, list[str]] = defaultdict(list)
    for section_id, named in genes.items():
        systems[naming_system(named)].append(section_id)
    lines = [
        f"genes by   {system}: {_shared({name: rows[name] for name in sections})}"
        for system, sections in systems.items()
    ]
    if len(systems) > 1:
        lines.append(f"genes      {_shared(rows)}; nothing is looked up elsewhere")
    lines += _joined_lines(genes, table)
    spellings: defaultdict[str, set[str]] = defaultdict(set)
    for symbol in {gene.symbol for named in genes.values() for gene in named}:
        spellings[symbol.upper()].add(symbol)
    alike = sorted(sorted(same) for same in spellings.values() if len(same) > 1)
    if alike:
        lines.append(f"genes      {len(alike)} symbols differ in case alone, as {', '.join(alike[0])}: they stay apart")
    return lines


def _joined_lines(genes: Mapping[str, tuple[Gene, ...]], table: Sequence[Gene]) -> list[str]:
    """Says which symbols alone stand for an Ensembl gene, and which do not although one has the symbol."""
    alone = {gene.gene_id for named in genes.values() for gene in named if not gene.ensembl_id}
    rows, owned = gene_rows(table), {gene.symbol for gene in table if gene.ensembl_id}
    joined = sorted(name for name in alone if table[rows[name]].ensembl_id)
    apart = sorted(name for name in alone & owned if not table[rows[name]].ensembl_id)
    lines = []
    if joined:
        lines.append(
            f"genes      {len(joined)} symbols alone are taken for the Ensembl gene of that symbol: {_some(joined)}"
        )
    if apart:
        lines.append(
            f"genes      {len(apart)} symbols alone stay apart from Ensembl genes of that symbol: several have it, or "
            f"one section or the table so far names both: {_some(apart)}"
        )
    return lines


def _rows(genes: Mapping[str, tuple[Gene, ...]], table: Sequence[Gene]) -> dict[str, set[int]]:
    """Returns each section's rows of the gene table."""
    row_of = gene_rows(table)
    return {name: {row_of[gene.gene_id] for gene in named} for name, named in genes.items()}


def _shared(rows: Mapping[str, set[int]]) -> str:
    sizes = _range([len(each) for each in rows.values()])
    return f"{len(_common(rows))} in common of {sizes} in each of {_named(list(rows))}"


def _common(rows: Mapping[str, set[int]]) -> set[int]:
    return set.intersection(*rows.values())


def _range(values: Sequence[float]) -> str:
    low, high = (f"{limit:.6g}" for limit in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _named(sections: Sequence[str]) -> str:
    return f"{len(sections)} section(s) ({_some(sections)})"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")


def _left_out_lines(headers: Mapping[str, Header]) -> list[str]:
    sections: defaultdict[str, list[str]] = defaultdict(list)
    for name, header in headers.items():
        for kind, times in header.preview.other_features.items():
            sections[f"{times} features of {kind}"].append(name)
    return [f"left out   {features} in {_named(names)}" for features, names in sections.items()]


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
