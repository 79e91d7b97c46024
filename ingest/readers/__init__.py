"""The readers of sections with counts, by the name of their format.

A new format is a module with the functions `preview` and `read` and one line in `READERS`; the sample sheet, `prepare`
and its --help follow from that line. A reader's module is imported when it is first used, so that --help does not wait
for pandas and AnnData.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ingest.readers.spots import Expression, Preview
    from mclstexp.data.sheet import SectionRow

Files = Mapping[str, str]
"""A section's files by part: the sheet's columns, or the parts of a folder."""
LARGE_PARTS = ("matrix", "barcodes")
"""Parts of a folder that `preview` does without; they are not downloaded for it."""


@dataclass(frozen=True)
class Reader:
    """How one format is read."""

    needs: tuple[str, ...]
    """Columns of the sheet that must be filled, of `expression` and `positions`."""
    files: Callable[[Files], Files]
    """Maps the URIs in some of these columns to the URIs of all files to read.

    Raises SourceError if a file that no column names is missing; the sheet looks up the others.
    """
    preview: "Callable[[Files, SectionRow], Preview]"
    """Reads the genes and more of a row of the sheet from local copies of all its files but `LARGE_PARTS`."""
    read: "Callable[[Files, SectionRow], Expression]"
    """Reads spots, counts and genes of a row of the sheet from local copies of all its files."""
    takes: tuple[str, ...] = ()
    """Columns that may be filled, of these and `library_id`, if a file may hold several sections; all others must be
    empty."""


def _reader(module: str, needs: tuple[str, ...], *, takes: tuple[str, ...] = (), in_folder: bool = False) -> Reader:
    """Returns the reader in a module of this package, which is imported at the first call.

    With `in_folder` the sheet names a folder, and the module's function `files` returns the files in it; else the files
    are those that the sheet names.
    """

    def call(function: str) -> Callable:
        return lambda *inputs: getattr(import_module(f"ingest.readers.{module}"), function)(*inputs)

    return Reader(needs, call("files") if in_folder else dict, call("preview"), call("read"), takes)


READERS: dict[str, Reader] = {
    "legacy_st": _reader("legacy_st", needs=("expression", "positions")),
    "visium": _reader("visium", needs=("expression",), in_folder=True),
    "h5ad": _reader("h5ad", needs=("expression",), takes=("library_id",)),
}
