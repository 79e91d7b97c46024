"""Expression of a section, whatever its format: the one place that knows which reader reads what.

A new format is a module with two functions over local files, and one line in each table below.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from ingest.expression import Expression, Preview
from ingest.h5ad import read_h5ad, read_h5ad_genes
from ingest.legacy_st import read_legacy_st, read_legacy_st_genes
from ingest.sheet import SectionRow
from ingest.visium import preview_visium, read_visium
from ingest.visium_files import find_visium_files
from mclstexp import storage
from mclstexp.errors import SourceError

Files = Mapping[str, str]
"""A section's files by part: the sheet's columns, or the parts of a Visium folder."""

_READERS: dict[str, Callable[[Files], Expression]] = {
    "legacy_st": lambda files: read_legacy_st(files["expression"], files["positions"]),
    "visium": read_visium,
    "h5ad": lambda files: read_h5ad(files["expression"]),
}
_PREVIEWS: dict[str, Callable[[Files], Preview]] = {
    "legacy_st": lambda files: Preview(read_legacy_st_genes(files["expression"])),
    "visium": preview_visium,
    "h5ad": lambda files: Preview(read_h5ad_genes(files["expression"])),
}


def source_files(row: SectionRow) -> dict[str, str]:
    """Returns the URIs of all files that a section's part of the table is made from, by part.

    Raises:
        SourceError: a Visium folder lacks a file.
    """
    if row.format != "visium":
        return row.files
    visium = find_visium_files(row.files["expression"])
    return {name: uri for name, uri in row.files.items() if name != "expression"} | visium


def read_expression(row: SectionRow, scratch: str) -> Expression:
    """Returns the spots, counts and genes of a measured section; `scratch` is a local folder for copies.

    Raises:
        SourceError: a file is missing or damaged, or its content is no counts; names file, gene and spot.
    """
    with _local_copies(row, scratch, without=()) as files:
        return _READERS[row.format](files)


def read_preview(row: SectionRow, scratch: str) -> Preview:
    """Returns a section's genes and more without its counts; nothing for an H&E-only slide.

    Raises:
        SourceError: the file is missing or damaged, or names a gene twice.
    """
    if not row.measured:
        return Preview()
    with _local_copies(row, scratch, without=("matrix", "barcodes")) as files:
        return _PREVIEWS[row.format](files)


@contextmanager
def _local_copies(row: SectionRow, scratch: str, without: Collection[str]) -> Iterator[Files]:
    """Yields local paths of a section's files of expression, without the parts that are not asked for."""
    wanted = {part: uri for part, uri in source_files(row).items() if part not in ("image", "labels", *without)}
    try:
        with ExitStack() as copies:
            yield {part: copies.enter_context(storage.local_copy(uri, scratch)) for part, uri in wanted.items()}
    except FileNotFoundError as error:
        raise SourceError(f"there is no file {error}") from None
