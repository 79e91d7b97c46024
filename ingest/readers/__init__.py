"""The readers of measured sections by the name of their format.

A new format is a module of its own and one line in `READERS`; the sample sheet, `prepare` and `--help` follow from it.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from ingest.readers.h5ad import read_h5ad, read_h5ad_genes
from ingest.readers.legacy_st import read_legacy_st, read_legacy_st_genes
from ingest.readers.spots import Expression, Preview
from ingest.readers.visium import find_visium_files, preview_visium, read_visium
from mclstexp import storage
from mclstexp.data.sheet import SectionRow
from mclstexp.errors import SourceError

Files = Mapping[str, str]
"""A section's files by part: the sheet's columns, or the parts of a folder."""


@dataclass(frozen=True)
class Reader:
    """How one format is read."""

    needs: tuple[str, ...]
    """Columns of the sheet that it needs beside the image."""
    files: Callable[[Files], Files]
    """Maps the URIs of some of these columns to the URIs of all files behind them; raises SourceError."""
    preview: Callable[[Files], Preview]
    """Reads genes, and more, from local copies of all files but the large ones (`matrix`, `barcodes`)."""
    read: Callable[[Files], Expression]
    """Reads spots, counts and genes from local copies of all files."""


READERS: dict[str, Reader] = {
    "legacy_st": Reader(
        needs=("expression", "positions"),
        files=lambda files: files,
        preview=lambda files: Preview(read_legacy_st_genes(files["expression"])),
        read=lambda files: read_legacy_st(files["expression"], files["positions"]),
    ),
    "visium": Reader(
        ("expression",), lambda files: find_visium_files(files["expression"]), preview_visium, read_visium
    ),
    "h5ad": Reader(
        needs=("expression",),
        files=lambda files: files,
        preview=lambda files: Preview(read_h5ad_genes(files["expression"])),
        read=lambda files: read_h5ad(files["expression"]),
    ),
}


def source_files(row: SectionRow) -> dict[str, str]:
    """Returns the URIs of all files that a section's part of the table is made from, by part.

    Raises:
        SourceError: a folder lacks a file.
    """
    if not row.measured:
        return row.files
    reader = READERS[row.format]
    named = {column: uri for column, uri in row.files.items() if column in reader.needs}
    others = {column: uri for column, uri in row.files.items() if column not in reader.needs}
    return others | dict(reader.files(named))


def read_expression(row: SectionRow, scratch: str) -> Expression:
    """Returns the spots, counts and genes of a measured section; `scratch` is a local folder for copies.

    Raises:
        SourceError: a file is missing or damaged, or its content is no counts; names file, gene and spot.
    """
    with _local_copies(row, scratch, without=()) as files:
        return READERS[row.format].read(files)


def read_preview(row: SectionRow, scratch: str) -> Preview:
    """Returns a section's genes and more without its counts; nothing for an H&E-only slide.

    Raises:
        SourceError: the file is missing or damaged, or names a gene twice.
    """
    if not row.measured:
        return Preview()
    with _local_copies(row, scratch, without=("matrix", "barcodes")) as files:
        return READERS[row.format].preview(files)


@contextmanager
def _local_copies(row: SectionRow, scratch: str, without: Collection[str]) -> Iterator[Files]:
    """Yields local paths of a section's files of expression, without the parts that are not asked for."""
    wanted = {part: uri for part, uri in source_files(row).items() if part not in ("image", "labels", *without)}
    try:
        with ExitStack() as copies:
            yield {part: copies.enter_context(storage.local_copy(uri, scratch)) for part, uri in wanted.items()}
    except FileNotFoundError as error:
        raise SourceError(f"there is no file {error}") from None
