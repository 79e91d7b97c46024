"""What sections say of themselves before anything is cut, and the report on it that a user sees.

An image in object storage is opened here only where the sheet leaves out its mpp, since opening it means fetching it.
"""

import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ingest.expression import Gene, Preview
from ingest.readers import read_preview
from ingest.section import section_errors, source_mpp
from ingest.sheet import SectionRow
from ingest.slides import open_slide
from mclstexp import storage

_MOST_NAMED = 5


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


def report(headers: Mapping[str, Header]) -> str:
    """Returns in words where the resolutions come from, how genes are named and how many all sections share.

    Args:
        headers: by section; those that were read in this run.
    """
    genes = {name: header.preview.genes for name, header in headers.items() if header.preview.genes}
    return "\n".join([*_resolution_lines(headers), *_gene_lines(genes), *_left_out_lines(headers)])


def naming_system(genes: Iterable[Gene]) -> str:
    """Returns how a source names its genes, for example `Ensembl ids (ENSG) and symbols`."""
    kinds = Counter((bool(gene.ensembl_id), bool(gene.symbol)) for gene in genes)
    species = ", ".join(sorted({gene.ensembl_id.rstrip("0123456789") for gene in genes} - {""}))
    names = {
        (True, True): f"Ensembl ids ({species}) and symbols",
        (True, False): f"Ensembl ids ({species})",
        (False, True): "symbols",
    }
    named = [names[kind] for kind, _ in kinds.most_common()]
    return named[0] if len(named) == 1 else f"{named[0]}, some by {' or '.join(named[1:])}"


def _resolution_lines(headers: Mapping[str, Header]) -> list[str]:
    sources = Counter(header.mpp_source for header in headers.values())
    lines = ["resolution from " + ", ".join(f"{source} ({times})" for source, times in sources.most_common())]
    return lines if sources else []


def _gene_lines(genes: Mapping[str, tuple[Gene, ...]]) -> list[str]:
    systems: defaultdict[str, list[str]] = defaultdict(list)
    for section_id, named in genes.items():
        systems[naming_system(named)].append(section_id)
    lines = [f"genes by   {system}: {_shared(genes, sections)}" for system, sections in systems.items()]
    if len(systems) > 1:
        lines.append(f"genes      {_shared(genes, list(genes))}; nothing is mapped from one way of naming to another")
    spellings: defaultdict[str, set[str]] = defaultdict(set)
    for symbol in {gene.symbol for named in genes.values() for gene in named}:
        spellings[symbol.upper()].add(symbol)
    alike = sorted(sorted(same) for same in spellings.values() if len(same) > 1)
    if alike:
        lines.append(f"genes      {len(alike)} symbols differ in case alone, as {', '.join(alike[0])}: they stay apart")
    return lines


def _shared(genes: Mapping[str, tuple[Gene, ...]], sections: list[str]) -> str:
    sets = [{gene.gene_id for gene in genes[name]} for name in sections]
    fewest, most = min(map(len, sets)), max(map(len, sets))
    each = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    named = ", ".join(sections[:_MOST_NAMED]) + (", ..." if len(sections) > _MOST_NAMED else "")
    return f"{len(sections)} section(s) x {len(set.intersection(*sets))} genes in common, {each} each ({named})"


def _left_out_lines(headers: Mapping[str, Header]) -> list[str]:
    return [
        f"left out   {name}: {', '.join(f'{times} of {kind}' for kind, times in header.preview.other_features.items())}"
        for name, header in headers.items()
        if header.preview.other_features
    ]
