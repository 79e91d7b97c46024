"""The sample sheet: one CSV row per section, validated as a whole before any work starts.

All faults, also missing files, are listed at once with row and column. That costs one look-up per file up front, and
saves a cohort's run from ending at row 300.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mclstexp import storage
from mclstexp.data.spelling import as_spelled
from mclstexp.data.text_table import TextTable, read_text_table
from mclstexp.errors import SheetError, SourceError, StorageError
from mclstexp.messages import did_you_mean

SLIDE = "slide"
"""Format of a section without counts; all others have readers."""
FILE_COLUMNS = ("image", "expression", "positions", "labels")
_FORMAT_COLUMNS = ("expression", "positions", "library_id")
MAX_SHEET_BYTES = 64 * 2**20
Fault = tuple[int, str]
"""Line number and what is wrong there."""
_REQUIRED_COLUMNS = ("section_id", "patient_id", "image", "format")
_IDENTIFIER = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")
_NUMBERS = ("mpp", "spot_diameter_um", "pitch_um")
_MAY_BE_MISSING = (*_NUMBERS, "expression", "positions", "labels", "mirrored")
_MISSING = frozenset({"na", "n/a", "nan", "none", "null"})
"""What tables write for a missing value, in lower case."""
_SPECIES = {"human": "homo sapiens", "mouse": "mus musculus", "rat": "rattus norvegicus"}
_WINDOWS_DRIVE = re.compile(r"[A-Za-z]:/")
_NUM_LOOKUPS = 16  # at once


class Format(Protocol):
    """What the sheet needs to know about a format with counts (`ingest.readers.READERS`)."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns that must be filled, of `expression` and `positions`."""

    @property
    def takes(self) -> tuple[str, ...]:
        """Columns that may be filled, of these and `library_id`; all others must be empty."""

    @property
    def files(self) -> Callable[[Mapping[str, str]], Mapping[str, str]]:
        """Maps the URIs in these columns to the URIs of all files to read, by part.

        Raises SourceError if a file that no column names is missing.
        """


class SectionRow(BaseModel):
    """One section in the sheet; file URIs are absolute."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    section_id: str
    patient_id: str
    image: str
    format: str
    """`slide`, or the name of a reader."""
    expression: str | None = None
    """File of counts, or a folder for `visium`."""
    positions: str | None = None
    mpp: float | None = Field(None, gt=0, le=100)
    """Micrometres per pixel of the image's full resolution."""
    spot_diameter_um: float | None = Field(None, gt=0, le=1000)
    labels: str | None = None
    site: str = Field("", max_length=128)
    pitch_um: float | None = Field(None, gt=0, le=5000)
    """Distance of neighbouring spots in micrometres; known for Visium."""
    mirrored: bool | None = None
    """Whether the image really is a mirror image of the array."""
    library_id: str | None = None
    """Which of the sections in an `h5ad` file."""
    species: str = Field("", max_length=128)
    """For example `homo sapiens` or `human`; compared with a model's."""
    organ: str = Field("", max_length=128)

    @field_validator("section_id", "patient_id")
    @classmethod
    def _is_identifier(cls, value: str) -> str:
        if not _IDENTIFIER.fullmatch(value):
            raise ValueError("use 1 to 128 of the characters A-Z a-z 0-9 . _ -, and no dot first")
        if value.lower() in _MISSING:
            raise ValueError("this stands for a missing value: give a name")
        return value

    @field_validator("species", "organ")
    @classmethod
    def _plain(cls, value: str) -> str:
        plain = " ".join(value.lower().split())
        return _SPECIES.get(plain, plain)

    @field_validator("site", "species", "organ")
    @classmethod
    def _is_printable(cls, value: str) -> str:
        if not value.isprintable():
            raise ValueError("use printable characters")
        return value

    @property
    def measured(self) -> bool:
        """Whether the section has counts."""
        return self.format != SLIDE

    @property
    def files(self) -> dict[str, str]:
        """The section's files by column."""
        return {name: uri for name in FILE_COLUMNS if (uri := getattr(self, name)) is not None}


def read_sheet(uri: str, formats: Mapping[str, Format] | None = None) -> list[SectionRow]:
    """Returns the sections of a sample sheet (CSV, local or `s3://`) in its order.

    File paths may be absolute, `s3://`, `file://` or relative to the sheet.

    Args:
        uri: the sheet.
        formats: all formats with counts; each row is then checked against its format, and all its files must exist.
            None: formats do not matter and images may be missing: of ten thousand slides to predict some always are,
            which must not stop the others.

    Raises:
        SheetError: lists every fault of the sheet with row and column.
    """
    uri = storage.absolute(uri)
    lines = _read_lines(uri)
    rows: list[SectionRow] = []
    in_files = _format_faults(lines, uri, formats) if formats is not None else _path_faults(lines, uri)
    faults = [*_duplicates(lines), *in_files]
    for line, cells in lines:
        try:
            row = SectionRow.model_validate(_with_absolute_files(cells, uri))
        except ValidationError as error:
            faults += _row_faults(line, error)
            continue
        rows.append(row)
        if formats is not None and (row.format == SLIDE or row.format in formats):
            faults += _column_faults(line, row, None if row.format == SLIDE else formats[row.format])
    if not lines:
        faults.append((1, ": there are no rows below the header"))
    if faults:
        listed = "\n  ".join(f"row {line}{text}" for line, text in sorted(faults))
        raise SheetError(f"the sample sheet {uri} has {len(faults)} fault(s):\n  {listed}")
    return rows


def _read_lines(uri: str) -> list[tuple[int, dict[str, str]]]:
    """Returns each row's line number and cells by column, with decimal points and empty where R writes NA."""
    table = read_text_table(uri, "sample sheet", MAX_SHEET_BYTES)
    _require_columns(uri, table)
    return [(line, _with_points(cells, table)) for line, cells in table.rows]


def _with_points(cells: dict[str, str], table: TextTable) -> dict[str, str]:
    filled = {
        name: "" if name in _MAY_BE_MISSING and text.lower() in _MISSING else text for name, text in cells.items()
    }
    return {name: table.number(text) if name in _NUMBERS else text for name, text in filled.items()}


def _require_columns(uri: str, table: TextTable) -> None:
    known, columns = list(SectionRow.model_fields), table.columns
    faults = [f"column {name} appears twice" for name in sorted({c for c in columns if columns.count(c) > 1})]
    for name in columns:
        if name not in known:
            faults.append(f"column {name!r} is unknown; {did_you_mean(name, known)}")
    faults += [f"column {name} is missing" for name in _REQUIRED_COLUMNS if name not in columns]
    if faults:
        listed = "\n  ".join(faults)
        raise SheetError(f"the header of the sample sheet {uri} has {len(faults)} fault(s):\n  {listed}")


def _with_absolute_files(cells: dict[str, str], sheet_uri: str) -> dict[str, str]:
    """Returns the filled cells; a path that cannot be resolved stays unchanged (`_path_faults` reports it)."""
    filled = {name: value for name, value in cells.items() if value}
    for name in filled.keys() & set(FILE_COLUMNS):
        with suppress(StorageError):
            filled[name] = _resolve(filled[name], sheet_uri)
    return filled


def _resolve(path: str, sheet_uri: str) -> str:
    """Returns the absolute URI of a path in the sheet, spelled as the file is if that differs in Unicode form only."""
    if not path.isprintable():
        raise StorageError("it has unprintable characters")
    if "\\" in path or _WINDOWS_DRIVE.match(path):
        raise StorageError("it is a path of Windows: give a path on this machine, with / between folders")
    if not path.startswith(("/", "~", "file:")) and "://" not in path:
        path = storage.join(sheet_uri.rsplit("/", 1)[0], path)
    try:
        return as_spelled(storage.absolute(path))
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder that is closed, ~ of no user
        raise StorageError(str(error)) from error


def _row_faults(line: int, error: ValidationError) -> Iterator[Fault]:
    for fault in error.errors():
        message = fault["msg"].removeprefix("Value error, ")
        if not fault["loc"]:
            yield line, f": {message}"
        elif fault["type"] == "missing":
            yield line, f", column {fault['loc'][0]}: it is empty"
        else:
            yield line, f", column {fault['loc'][0]}, got {fault['input']!r}: {message}"


def _duplicates(lines: list[tuple[int, dict[str, str]]]) -> Iterator[Fault]:
    first: dict[str, int] = {}
    for line, cells in lines:
        name = cells["section_id"]
        if name in first:
            yield line, f", column section_id: {name!r} is already in row {first[name]}"
        first.setdefault(name, line)


def _column_faults(line: int, row: SectionRow, reader: Format | None) -> Iterator[Fault]:
    needs, takes = (reader.needs, reader.takes) if reader else ((), ())
    filled = {name for name in _FORMAT_COLUMNS if getattr(row, name) is not None}
    faults = [f"format {row.format} needs {name}" for name in needs if name not in filled]
    faults += [f"format {row.format} takes no {name}" for name in sorted(filled.difference(needs, takes))]
    if faults:
        yield line, f": {'; '.join(faults)}"


def _format_faults(
    lines: list[tuple[int, dict[str, str]]], sheet_uri: str, formats: Mapping[str, Format]
) -> list[Fault]:
    """Returns the faults in formats and files; many files are looked up at once."""

    def faults(numbered: tuple[int, dict[str, str]]) -> list[Fault]:
        line, cells = numbered
        known, name = [*formats, SLIDE], cells.get("format", "")
        unknown = name and name not in known  # `_row_faults` reports an empty one
        found = [(line, f", column format, got {name!r}: use one of {', '.join(known)}")] if unknown else []
        reader = formats.get(name)
        return found + [fault for path in _paths(cells) if (fault := _file_fault(line, *path, sheet_uri, reader))]

    with ThreadPoolExecutor(_NUM_LOOKUPS) as pool:
        return [fault for found in pool.map(faults, lines) for fault in found]


def _path_faults(lines: list[tuple[int, dict[str, str]]], sheet_uri: str) -> Iterator[Fault]:
    """Yields the paths that cannot be resolved."""
    for line, cells in lines:
        for column, path in _paths(cells):
            try:
                _resolve(path, sheet_uri)
            except StorageError as error:
                yield line, f", column {column}, got {path!r}: {error}"


def _paths(cells: dict[str, str]) -> list[tuple[str, str]]:
    """Returns the filled columns of files, with their paths."""
    return [(column, cells[column]) for column in FILE_COLUMNS if cells.get(column)]


def _file_fault(line: int, column: str, path: str, sheet_uri: str, reader: Format | None) -> Fault | None:
    try:
        uri = _resolve(path, sheet_uri)
        uris = reader.files({column: uri}) if reader is not None and column in reader.needs else {column: uri}
        exists = uri not in uris.values() or storage.exists(uri)  # the reader has looked up all other files
    except (StorageError, SourceError, OSError) as error:
        return line, f", column {column}, got {path!r}: {error}"
    return None if exists else (line, f", column {column}: there is no file {path}")
