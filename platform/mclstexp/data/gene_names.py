"""How sources spell the names of genes, and what else they list beside genes.

All spellings of a stable id give one id, so that sections, panels and the genes that a user names meet. Only the name
itself is read; none is looked up in an annotation. The trade-off: a synonym is a gene of its own, but no gene is taken
for another one.
"""

import re
from collections.abc import Collection
from typing import NamedTuple

_SEPARATOR = r"[_. -]?"  # R and Seurat write a point or a dash for an underscore
_GENOME = re.compile(
    r"(?P<genome>(?:GRC[hmzg]\d+|hg\d+|mm\d+|rn\d+|mRatBN[\d.]+|Rnor[_-]?[\d.]+|danRer\d+|BDGP\d+|dm\d+|WBcel\d+)"
    r"(?:\.p\d+)?(?:-(?:20\d\d-[A-Z]|\d(?:\.\d){1,2}))?(?:[_-]premrna)?)[_-]+(?P<rest>.+)"
)
_STABLE_ID = re.compile(
    r"(?:(?P<before>.*[^_|-])[_|-]+)?"
    r"(?P<id>ENS[A-Z]*G\d+|ENSGR\d+|FBgn\d{7}|WBGene\d{8}|AT[1-5MC]G\d{5}|Y[A-P][LR]\d{3}[WC](?:-[A-Z])?)"
    r"(?:[._-]\d+){0,2}"  # the version; GENCODE's lift to GRCh37 adds a number
    r"(?P<par>[_-]PAR[_-]Y)?"
    r"(?:[_|](?P<after>.+))?"
)
_KIND_OF_GENE = re.compile(
    r"(?!.*(?:control|guide)).*(?:gene|genes|gene expression|rna|coding)|gex|tec|ribozyme|artifact|"
    r"antisense|sense (?:intronic|overlapping)|processed transcript|endogenous|housekeeping|"
)
_NO_KIND = frozenset({"nan", "na", "none", "<na>"})
_OTHER_KINDS = {
    "Negative Control Codeword": rf"neg(ative)?{_SEPARATOR}control{_SEPARATOR}codeword.*|false{_SEPARATOR}code.*",
    "Negative Control Probe": rf"negative.*|neg{_SEPARATOR}(control|ctrl|probe|prb).*|antisense[_.-].+",
    "System Control": rf"system{_SEPARATOR}control.*",
    "Genomic Control": rf"genomic{_SEPARATOR}control.*|intergenic{_SEPARATOR}region.*",
    "Unassigned Codeword": rf"unassigned{_SEPARATOR}codeword.*|blank([_.-].+|{_SEPARATOR}codeword.*|\d+)",
    "Deprecated Codeword": rf"deprecated{_SEPARATOR}codeword.*",
    "Deprecated Probe": r"deprecated[_.-].+",
    "ERCC spike-in": rf"(.+[_.-])?ercc{_SEPARATOR}\d{{5}}",
    "Antibody Capture": rf".+[_. -]total{_SEPARATOR}seq{_SEPARATOR}[a-d]([_. -].*)?|(?-i:ADT)[_-].+",
    "Multiplexing Capture": r"hashtag.*|(?-i:HTO)[_-].+|cmo\d{3}",
    "CRISPR Guide Capture": r"sgrna[_.-].+",
    "reads without a gene": r"(__|--).+|n_(unmapped|multimapping|nofeature|ambiguous)|no_feature|alignment_not_unique|"
    r"too_low_aqual|not_aligned",
}
"""Features that are not genes, by 10x's name for their kind where it has one: patterns of names, in any case
but `ADT`, since worms have genes such as adt-1."""
_OTHER = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in _OTHER_KINDS.items()}
_ANY_OTHER = re.compile("|".join(f"(?:{pattern})" for pattern in _OTHER_KINDS.values()), re.IGNORECASE)
_MONTH = r"(?:jan|feb|m[aä]r|mrz|apr|ma[iy]|jun|jul|aug|sep|o[ck]t|nov|de[cz])"
_ANY_MONTH = rf"(?:{_MONTH}|m[aä]r[sz]|avr|sept|set|ago|out|d[eé]c|dic)"
_EXCEL = re.compile(
    rf"X?(?:\d{{1,2}}[-. /]+(?i:{_ANY_MONTH})[.]?(?:[-. /]+\d{{2,4}})?"  # 1-Mar, 01. März, 1-sept., 1-Mar-20
    rf"|(?=[A-ZÄ])(?i:{_MONTH})[-. /]+\d{{2,4}}"  # Mar-01; worms have genes such as sep-1
    r"|\d{4}-\d\d-\d\d.*|\d{1,2}[./]\d{1,2}[./]\d{2,4}"  # 2020-03-01, 3/1/2020
    r"|\d(?:\.\d+)?[eE][+.]?\d+"  # 2.31E+13, a clone of RIKEN
    r"|(?P<day>[34]\d{4}))"  # 43891, the number of a day
)
_MADE_UNIQUE = re.compile(r"(?P<name>.+)[-.]\d+")
_MAX_SHARE_NUMBERS = 0.1  # of names; above it numbers are how genes are named


class StableId(NamedTuple):
    """A gene's stable id (Ensembl, FlyBase, WormBase, TAIR, SGD) in a name of a source."""

    gene_id: str
    """Without genome, version and mark of the Y chromosome's PAR."""
    before: str
    """What is before the id: a genome, or the symbol; may be empty."""
    after: str
    """What is after it: the symbol; may be empty."""
    in_par_y: bool
    """True for the copy in the pseudoautosomal region of chromosome Y, which has the gene's id with a mark."""


def stable_id(name: str) -> StableId | None:
    """Returns the stable id in a name such as `GRCh38_ENSG00000182378.15_PAR_Y`; None if it has none."""
    match = _STABLE_ID.fullmatch(name)
    if not match:
        return None
    gene_id = match["id"]
    if in_par_y := gene_id.startswith("ENSGR"):  # of GENCODE before version 25
        gene_id = f"ENSG0{gene_id.removeprefix('ENSGR')}"
    return StableId(gene_id, match["before"] or "", match["after"] or "", in_par_y or match["par"] is not None)


def without_genome(name: str) -> str:
    """Returns a name without the genome before it, if that is one in common use: `GNAS` for `GRCh38_GNAS`."""
    match = _GENOME.fullmatch(name)
    return match["rest"] if match else name


def gene_names(name: str) -> tuple[str, str, str]:
    """Returns (gene_id, symbol, ensembl_id) of a gene that someone names by stable id or symbol.

    The gene_id is the stable id, else the symbol; the unknown one is empty. Genome and version are left off.
    """
    found = stable_id(name)
    symbol = without_genome(name)
    return (found.gene_id, "", found.gene_id) if found else (symbol, symbol, "")


def is_kind_of_gene(kind: str) -> bool:
    """Returns whether a source's name for a kind of features means genes; a biotype does, and so does no kind."""
    plain = kind.strip().lower().replace("_", " ").replace("-", " ")
    return plain in _NO_KIND or bool(_KIND_OF_GENE.fullmatch(plain))


def other_kind(name: str) -> str | None:
    """Returns the kind of a feature whose name says that it is not a gene; None for all others."""
    plain = without_genome(name)
    if not _ANY_OTHER.fullmatch(plain):
        return None
    return next(kind for kind, pattern in _OTHER.items() if pattern.fullmatch(plain))


def excel_names(names: Collection[str]) -> list[str]:
    """Returns those of a source's names that Excel made of symbols: dates, numbers of days, powers of ten."""
    num_numbers = sum(name.isdecimal() for name in names)
    found = {name: match for name in names if (match := _EXCEL.fullmatch(name))}
    return [name for name, match in found.items() if not match["day"] or num_numbers <= _MAX_SHARE_NUMBERS * len(names)]


def made_unique(names: Collection[str]) -> list[str]:
    """Returns those of a source's names that have a number after another one of them: `TBCE-1` beside `TBCE`."""
    known = set(names)
    return [name for name in names if (match := _MADE_UNIQUE.fullmatch(name)) and match["name"] in known]
