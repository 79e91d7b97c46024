"""Tables of text that users write, read as spreadsheets save them.

Separators, decimal commas, Unicode encodings, blank rows and blank columns differ from one spreadsheet and country to
the next and change no value. What could be read in two ways (other encodings, `1,234` between tabs) is refused.
"""

import codecs
import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mclstexp import storage
from mclstexp.errors import SheetError

SAVE_AS = "save it as a CSV file in UTF-8 (in Excel: Save As, CSV UTF-8)"
_SEPARATORS = (",", ";", "\t")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_OTHER_FILES = {
    b"PK\x03\x04": "is a workbook (.xlsx, .ods or .numbers) or another zip archive",
    b"\xd0\xcf\x11\xe0": "is a workbook of old Excel (.xls)",
    b"\x1f\x8b": "is compressed with gzip",
}
_SEPARATOR_LINE = re.compile(r"\s*\"?sep=(.)\"?\s*(\r\n|\r|\n)", re.IGNORECASE)
"""First line by which Excel names the separator."""
_DECIMAL_COMMA = re.compile(r"([+-]?\d+),(\d+)")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")
_SPREADSHEET_ERRORS = frozenset({"#N/A", "#REF!", "#VALUE!", "#NAME?", "#DIV/0!", "#NUM!", "#NULL!"})


@dataclass(frozen=True)
class TextTable:
    """A table without its blank rows and columns; cells have no spaces around them."""

    columns: tuple[str, ...]
    """Names in lower case, with `_` for spaces and hyphens."""
    rows: list[tuple[int, dict[str, str]]]
    """The line in the file on which each row ends, and its cells by column."""
    separator: str

    def number(self, text: str) -> str:
        """Returns a number's text with a decimal point for a decimal comma; any other text as it is.

        A comma is only a decimal one between semicolons or tabs. Between tabs `1,234` stays as it is, and is no number:
        it could as well be 1234.
        """
        if self.separator == "," or (self.separator == "\t" and _THOUSANDS.fullmatch(text)):
            return text
        return _DECIMAL_COMMA.sub(r"\1.\2", text) if _DECIMAL_COMMA.fullmatch(text) else text


def read_text_table(uri: str, what: str, max_bytes: int | None = None) -> TextTable:
    """Returns the table in a text file, local or `s3://`.

    Separators are commas, semicolons or tabs; the encoding is UTF-8, or UTF-16 with a byte order mark.

    Args:
        uri: the file.
        what: its name in messages, such as `sample sheet`.
        max_bytes: a larger file is refused.

    Raises:
        SheetError: there is no such file, it is not such a text, or has cells outside its columns; shows no raw bytes.
    """
    try:
        if max_bytes is not None and storage.size(uri) > max_bytes:
            raise SheetError(f"{uri} is larger than {max_bytes} bytes: it is not a {what}")
        text = _decoded(storage.read(uri))
        separator, text = _separator(text)
        lines = _unnumbered(list(_filled_lines(text, separator)))
        header = lines[0][1] if lines else []
        columns = tuple(re.sub(r"[\s-]+", "_", name.lower()) for name in header)
        return TextTable(tuple(filter(None, columns)), [_row(columns, *line) for line in lines[1:]], separator)
    except FileNotFoundError:
        raise SheetError(f"there is no {what} {uri}") from None
    except _TableFault as fault:
        raise SheetError(f"the {what} {uri} {fault}") from None


class _TableFault(Exception):
    """What is wrong with a file, to follow its name in a message."""


def _decoded(data: bytes) -> str:
    for start, kind in _OTHER_FILES.items():
        if data.startswith(start):
            raise _TableFault(f"{kind}: {SAVE_AS}")
    encoding = "utf-16" if data.startswith(_UTF16) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        fault = f"is not a CSV file in UTF-8: row {line} has characters of another encoding"
        raise _TableFault(f"{fault}; {SAVE_AS}") from None
    if "\0" in text:
        raise _TableFault(f"is not a CSV file in UTF-8: it has null characters; {SAVE_AS}")
    return text


def _separator(text: str) -> tuple[str, str]:
    """Returns the separator that the first line names or that splits the header into most cells, and the rows."""
    if named := _SEPARATOR_LINE.match(text):
        return named[1], text[named.end(1) :].lstrip('" ')
    header = next((line for line in text.splitlines() if line.strip("".join(_SEPARATORS) + ' "')), "")
    if len(header) > csv.field_size_limit():
        raise _TableFault(f"is not a CSV file: its header has {len(header)} characters")
    return max(_SEPARATORS, key=lambda separator: len(next(csv.reader([header], delimiter=separator), []))), text


def _filled_lines(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows with a filled cell: the line on which each ends, and its cells without spaces around them."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if any(stripped):
                yield reader.line_num, stripped
    except csv.Error as error:
        raise _TableFault(f"is not a CSV file: row {reader.line_num}: {error}") from None


def _unnumbered(lines: list[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
    """Returns the lines without a first column that has no name and counts the rows, as pandas and R write it."""
    numbers = [cells[0] for _, cells in lines[1:]]
    counted = any(numbers == [str(row + first) for row in range(len(numbers))] for first in (0, 1))
    if not counted or not lines or lines[0][1][0]:
        return lines
    return [(line, ["", *cells[1:]]) for line, cells in lines]


def _row(columns: tuple[str, ...], line: int, cells: list[str]) -> tuple[int, dict[str, str]]:
    """Returns a row's cells by column; missing ones are empty, and those without a column must be."""
    for index, cell in enumerate(cells):
        fault = ""
        if cell and index >= len(columns):
            fault = "the row has more cells than the header has columns"
        elif cell and not columns[index]:
            fault = "its column has no name in the header"
        elif cell in _SPREADSHEET_ERRORS:
            fault = "that is the error of a formula"
        if fault:
            raise _TableFault(f"has a fault: row {line}, cell {index + 1}, got {cell!r}: {fault}")
    filled = dict.fromkeys(filter(None, columns), "")
    return line, filled | {name: cell for name, cell in zip(columns, cells, strict=False) if name}
