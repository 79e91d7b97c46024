"""The files of a section in the sample sheet, and what the reader of its format makes of them."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

from ingest.readers import LARGE_PARTS, READERS, Files
from ingest.readers.spots import Expression, Preview
from mclstexp import storage
from mclstexp.data.sheet import SectionRow
from mclstexp.errors import SourceError


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


def read_expression(row: SectionRow, scratch: str) -> Expression:
    """Returns the spots, counts and genes of a measured section; `scratch` is a local folder for copies.

    Raises:
        SourceError: a file is missing or damaged, or holds values that are not counts; names file, gene and spot.
    """
    with _local_copies(row, scratch, without=()) as files:
        return READERS[row.format].read(files, row)


def read_preview(row: SectionRow, scratch: str) -> Preview:
    """Returns a section's genes and more without its counts; an empty preview for an H&E-only slide.

    Raises:
        SourceError: a file is missing or damaged, or names a gene twice.
    """
    if not row.measured:
        return Preview()
    with _local_copies(row, scratch, without=LARGE_PARTS) as files:
        return READERS[row.format].preview(files, row)


@contextmanager
def _local_copies(row: SectionRow, scratch: str, without: Collection[str]) -> Iterator[Files]:
    """Yields local paths of a section's files of expression, without some parts."""
    wanted = {part: uri for part, uri in source_files(row).items() if part not in ("image", "labels", *without)}
    try:
        with ExitStack() as copies:
            yield {part: copies.enter_context(storage.local_copy(uri, scratch)) for part, uri in wanted.items()}
    except FileNotFoundError as error:
        raise SourceError(f"there is no file {error}") from None
