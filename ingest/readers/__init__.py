"""The readers of sections with counts, by the name of their format.

A new format is a module with the functions `files`, `preview` and `read` and one line in `READERS`; the sample sheet,
`prepare` and its --help follow from that line. A reader's module is imported when it is first used, so that --help does
not wait for pandas and AnnData.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from mclstexp import storage
from mclstexp.data.sheet import SectionRow
from mclstexp.errors import SourceError

if TYPE_CHECKING:
    from ingest.readers.spots import Expression, Preview

Files = Mapping[str, str]
"""A section's files by part: the sheet's columns, or the parts of a folder."""
_LARGE_PARTS = ("matrix", "barcodes")
"""Parts that `preview` does not need; they are not downloaded for it."""


@dataclass(frozen=True)
class Reader:
    """How one format is read."""

    needs: tuple[str, ...]
    """Columns of the sheet that must be filled, of `expression` and `positions`; the other must be empty."""
    files: Callable[[Files], Files]
    """Maps the URIs in some of these columns to the URIs of all files to read; raises SourceError if one is missing."""
    preview: "Callable[[Files], Preview]"
    """Reads the genes and more from local copies of all files but the large ones (`matrix`, `barcodes`)."""
    read: "Callable[[Files], Expression]"
    """Reads spots, counts and genes from local copies of all files."""


def _reader(module: str, needs: tuple[str, ...]) -> Reader:
    """Returns the reader in a module of this package, which is imported at the first call."""

    def call(function: str) -> Callable:
        return lambda files: getattr(import_module(f"ingest.readers.{module}"), function)(files)

    return Reader(needs, call("files"), call("preview"), call("read"))


READERS: dict[str, Reader] = {
    "legacy_st": _reader("legacy_st", needs=("expression", "positions")),
    "visium": _reader("visium", needs=("expression",)),
    "h5ad": _reader("h5ad", needs=("expression",)),
}


def source_files(row: SectionRow) -> dict[str, str]:
    """Returns the URIs of all files that a section is made from, by part.

    Raises:
        SourceError: a file of a folder is missing.
    """
    if not row.measured:
        return row.files
    reader = READERS[row.format]
    named = {column: uri for column, uri in row.files.items() if column in reader.needs}
    others = {column: uri for column, uri in row.files.items() if column not in reader.needs}
    return others | dict(reader.files(named))


def read_expression(row: SectionRow, scratch: str) -> "Expression":
    """Returns the spots, counts and genes of a measured section; `scratch` is a local folder for copies.

    Raises:
        SourceError: a file is missing or damaged, or holds values that are not counts; names file, gene and spot.
    """
    with _local_copies(row, scratch, without=()) as files:
        return READERS[row.format].read(files)


def read_preview(row: SectionRow, scratch: str) -> "Preview":
    """Returns a section's genes and more without its counts; an empty preview for an H&E-only slide.

    Raises:
        SourceError: a file is missing or damaged, or names a gene twice.
    """
    if not row.measured:
        from ingest.readers.spots import Preview

        return Preview()
    with _local_copies(row, scratch, without=_LARGE_PARTS) as files:
        return READERS[row.format].preview(files)


@contextmanager
def _local_copies(row: SectionRow, scratch: str, without: Collection[str]) -> Iterator[Files]:
    """Yields local paths of a section's files of expression, without some parts."""
    wanted = {part: uri for part, uri in source_files(row).items() if part not in ("image", "labels", *without)}
    try:
        with ExitStack() as copies:
            yield {part: copies.enter_context(storage.local_copy(uri, scratch)) for part, uri in wanted.items()}
    except FileNotFoundError as error:
        raise SourceError(f"there is no file {error}") from None
