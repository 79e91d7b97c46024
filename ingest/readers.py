"""Expression of a section, whatever its format: the one place that knows which reader reads what.

A new format is a module with two functions over local files, and one line in each table below.
"""

from collections.abc import Callable

from ingest.expression import Expression, Gene
from ingest.h5ad import read_h5ad, read_h5ad_genes
from ingest.legacy_st import read_legacy_st, read_legacy_st_genes
from ingest.sheet import SectionRow
from mclstexp import storage
from mclstexp.errors import SourceError

_READERS: dict[str, Callable[..., Expression]] = {"legacy_st": read_legacy_st, "h5ad": read_h5ad}
_GENE_READERS: dict[str, Callable[[str], tuple[Gene, ...]]] = {
    "legacy_st": read_legacy_st_genes,
    "h5ad": read_h5ad_genes,
}


def read_expression(row: SectionRow, scratch: str) -> Expression:
    """Returns the spots, counts and genes of a measured section; `scratch` is a local folder for copies.

    Raises:
        SourceError: a file is missing or damaged, or its content is no counts; names file, gene and spot.
    """
    assert row.expression is not None, "the sheet gives every measured section its counts"
    try:
        with storage.local_copy(row.expression, scratch) as counts:
            if row.positions is None:
                return _READERS[row.format](counts)
            with storage.local_copy(row.positions, scratch) as positions:
                return _READERS[row.format](counts, positions)
    except FileNotFoundError as error:
        raise SourceError(f"there is no file {error}") from None


def read_gene_names(row: SectionRow, scratch: str) -> tuple[Gene, ...]:
    """Returns a section's genes without its counts; empty for an H&E-only slide.

    Raises:
        SourceError: the file is missing or damaged, or names a gene twice.
    """
    if row.expression is None:
        return ()
    try:
        with storage.local_copy(row.expression, scratch) as counts:
            return _GENE_READERS[row.format](counts)
    except FileNotFoundError as error:
        raise SourceError(f"there is no file {error}") from None
