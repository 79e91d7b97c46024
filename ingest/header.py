"""What sections' files state before anything is cut: resolution and genes; the table's genes; a report for the user.

A remote image is opened here only if the sheet leaves out its mpp, because opening it means downloading it.
"""

import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ingest.layout import judged_resolution
from ingest.readers.files import read_preview
from ingest.readers.spots import Gene, Preview
from ingest.section import section_errors
from mclstexp import storage
from mclstexp.data.gene_names import excel_names, made_unique
from mclstexp.data.sheet import SectionRow
from mclstexp.messages import some_of
from mclstexp.slides.slide import Slide, open_slide

_MIN_SHARE_NAMED = 0.1
_DIGIT = re.compile(r"\d")


@dataclass(frozen=True)
class Header:
    """A section before it is cut."""

    mpp: float
    """Micrometres per level-0 pixel."""
    mpp_source: str
    """What states it: `sheet`, `image`, `scale factors` or `array of spots`."""
    preview: Preview
    remark: str = ""
    """What the user should know of the resolution."""


def read_header(row: SectionRow) -> Header:
    """Returns what a section's files state before it is cut.

    Raises:
        SourceError: a file is missing, damaged or contradicts the sheet; names the section.
    """
    with section_errors(row), tempfile.TemporaryDirectory(prefix="mclstexp-") as scratch:
        preview = read_preview(row, scratch)
        if row.mpp is not None and storage.is_s3(row.image):
            return _header(row, preview, None)
        with storage.local_copy(row.image, scratch) as image, open_slide(image) as slide:
            return _header(row, preview, slide)


def _header(row: SectionRow, preview: Preview, slide: Slide | None) -> Header:
    mpp, source, remark = judged_resolution(row, preview.layout, slide)
    return Header(mpp, source, preview, remark)


def merged_genes(present: Sequence[Gene], sources: Iterable[Sequence[Gene]]) -> tuple[Gene, ...]:
    """Returns the genes of the table: those present in their rows, then the sources' new ones.

    Stored gene indices stay valid, since a present gene keeps its row; it may gain the Ensembl id or the symbol that a
    source knows for it. A symbol without Ensembl id is the Ensembl gene with that symbol if exactly one has it and no
    source, nor the table so far, lists both.
    """
    named = [present, *sources]
    genes: dict[str, Gene] = {}
    for gene in (gene for each in named for gene in each):
        known = genes.setdefault(gene.gene_id, gene)
        if gene.symbol and not known.symbol:
            genes[gene.gene_id] = known._replace(symbol=gene.symbol)
    joined = _joined_symbols(genes, [{gene.gene_id for gene in each} for each in named])
    merged: dict[str, Gene] = {}
    for gene_id in genes:
        gene = genes[joined.get(gene_id, gene_id)]
        merged.setdefault(gene.gene_id, gene)
    return tuple(merged.values())


def gene_rows(table: Sequence[Gene]) -> dict[str, int]:
    """Returns the row of each gene id, and for each symbol that is not an id, the first row with that symbol."""
    rows: dict[str, int] = {}
    for row, gene in enumerate(table):
        if gene.symbol:
            rows.setdefault(gene.symbol, row)
    return rows | {gene.gene_id: row for row, gene in enumerate(table)}


def report(headers: Mapping[str, Header], table: Sequence[Gene], num_present: int = 0) -> str:
    """Returns in words what states the resolutions, how genes are named and how many all sections share.

    Args:
        headers: by section id; those read in this run.
        table: the gene table with their genes.
        num_present: number of its genes, from the first on, that the tile table had before this run.
    """
    genes = {name: header.preview.genes for name, header in headers.items() if header.preview.genes}
    lines = [*_resolution_lines(headers), *_gene_lines(genes, table)]
    if genes and num_present:
        known = sum(row < num_present for row in _common(_rows(genes, table)))
        lines.append(f"genes      {known} of those in common are among the {num_present} of the table so far")
    return "\n".join([*lines, *_left_out_lines(headers)])


def naming_system(genes: Collection[Gene]) -> str:
    """Returns how a source names its genes, for example `Ensembl ids (ENSG) and symbols`.

    Ways that name less than a tenth of them are left out.
    """
    kinds = Counter((bool(gene.ensembl_id), bool(gene.symbol)) for gene in genes)
    starts = sorted({_DIGIT.split(gene.ensembl_id, maxsplit=1)[0] for gene in genes} - {""})
    ids = "Ensembl ids" if all(start.startswith("ENS") for start in starts) else "ids"
    ids = f"{ids} ({some_of(starts)})" if starts else "ids of the source"
    names = {
        (True, True): f"{ids} and symbols",
        (True, False): ids,
        (False, True): "symbols",
    }
    named = [names[kind] for kind, times in kinds.most_common() if times >= _MIN_SHARE_NAMED * kinds.total()]
    return named[0] if len(named) == 1 else f"{named[0]}, some by {' or '.join(named[1:])}"


def _joined_symbols(genes: Mapping[str, Gene], sources: Sequence[set[str]]) -> dict[str, str]:
    """Returns the id of the Ensembl gene that each symbol without Ensembl id stands for.

    Args:
        genes: all genes by id.
        sources: each source's gene ids.
    """
    owners: defaultdict[str, list[str]] = defaultdict(list)
    for gene in genes.values():
        if gene.ensembl_id and gene.symbol in genes and not genes[gene.symbol].ensembl_id:
            owners[gene.symbol].append(gene.gene_id)
    return {
        symbol: ids[0]
        for symbol, ids in owners.items()
        if len(ids) == 1 and not any({symbol, ids[0]} <= each for each in sources)
    }


def _resolution_lines(headers: Mapping[str, Header]) -> list[str]:
    sections: defaultdict[str, list[str]] = defaultdict(list)
    for name, header in headers.items():
        sections[header.mpp_source].append(name)
    lines = [
        f"resolution {_range([headers[name].mpp for name in names])} um/px by the {source}: {_sections(names)}"
        for source, names in sections.items()
    ]
    lines += [f"resolution {name}: {header.remark}" for name, header in headers.items() if header.remark]
    return lines + [f"spots      {name}: {each}" for name, header in headers.items() for each in header.preview.remarks]


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
        lines.append(f"genes      {_shared(rows)}; names are not looked up elsewhere")
    lines += _joined_lines(genes, table)
    spellings: defaultdict[str, set[str]] = defaultdict(set)
    for symbol in {gene.symbol for named in genes.values() for gene in named}:
        spellings[symbol.upper()].add(symbol)
    variants = sorted(sorted(same) for same in spellings.values() if len(same) > 1)
    if variants:
        example = ", ".join(variants[0])
        lines.append(f"genes      {len(variants)} symbols differ only in case, such as {example}: they stay separate")
    return [*lines, *_odd_name_lines(genes)]


def _odd_name_lines(genes: Mapping[str, tuple[Gene, ...]]) -> list[str]:
    """Names the symbols that a program has changed; they are used as they are."""
    faults = {
        "names look as Excel changes symbols, and match no other section; give the table before Excel": excel_names,
        "names have a number to make them unique, as the name without it is in the same section": made_unique,
    }
    lines = []
    for fault, find in faults.items():
        found = {name: find([gene.symbol for gene in named if gene.symbol]) for name, named in genes.items()}
        names = dict.fromkeys(name for each in found.values() for name in each)
        if names:
            sections = [name for name, each in found.items() if each]
            lines.append(f"genes      {len(names)} {fault}: {some_of(names)}, in {_sections(sections)}")
    return lines


def _joined_lines(genes: Mapping[str, tuple[Gene, ...]], table: Sequence[Gene]) -> list[str]:
    """Names the symbols without Ensembl id that stand for an Ensembl gene, and those that cannot be joined."""
    alone = {gene.gene_id for named in genes.values() for gene in named if not gene.ensembl_id}
    rows, owned = gene_rows(table), {gene.symbol for gene in table if gene.ensembl_id}
    joined = sorted(name for name in alone if table[rows[name]].ensembl_id)
    separate = sorted(name for name in alone & owned if not table[rows[name]].ensembl_id)
    lines = []
    if joined:
        lines.append(
            f"genes      {len(joined)} symbols without Ensembl id are the Ensembl gene with that symbol: "
            f"{some_of(joined)}"
        )
    if separate:
        lines.append(
            f"genes      {len(separate)} symbols without Ensembl id stay separate from Ensembl genes with that symbol, "
            f"because several have it, or one section or the table so far lists both: {some_of(separate)}"
        )
    return lines


def _rows(genes: Mapping[str, tuple[Gene, ...]], table: Sequence[Gene]) -> dict[str, set[int]]:
    """Returns each section's rows of the gene table."""
    row_of = gene_rows(table)
    return {name: {row_of[gene.gene_id] for gene in named} for name, named in genes.items()}


def _shared(rows: Mapping[str, set[int]]) -> str:
    sizes = _range([len(each) for each in rows.values()])
    return f"{len(_common(rows))} in common of {sizes} in each of {_sections(list(rows))}"


def _common(rows: Mapping[str, set[int]]) -> set[int]:
    return set.intersection(*rows.values())


def _range(values: Sequence[float]) -> str:
    low, high = (f"{limit:.6g}" for limit in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _sections(names: Sequence[str]) -> str:
    return f"{len(names)} section(s) ({some_of(names)})"


def _left_out_lines(headers: Mapping[str, Header]) -> list[str]:
    times: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for name, header in headers.items():
        for kind, number in header.preview.other_features.items():
            times[kind][name] = number
    return [
        f"left out   {_range(list(found.values()))} features of {kind} in {_sections(list(found))}"
        for kind, found in times.items()
    ]
