"""The sample sheet: one CSV row a section, validated whole before any work starts.

All faults are listed at once with row and column, missing files included; that costs one look-up a file up front
and saves a cohort's run that would end at row 300.
"""

import csv
import difflib
import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ingest.visium_files import find_visium_files
from mclstexp import storage
from mclstexp.errors import SheetError, SourceError, StorageError

MAX_SHEET_BYTES = 64 * 2**20
_IDENTIFIER = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")
_LOOKUPS = 16
FILE_COLUMNS = ("image", "expression", "positions", "labels")
Fault = tuple[int, str]
"""Line number and what is wrong there."""


class SectionRow(BaseModel):
    """One section as the sheet describes it; file URIs are absolute."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    section_id: str
    patient_id: str
    image: str
    format: Literal["legacy_st", "visium", "h5ad", "slide"]
    expression: str | None = None
    """File of counts; a folder for `visium`."""
    positions: str | None = None
    mpp: float | None = Field(None, gt=0, le=100)
    """Micrometres per pixel of the image's full resolution."""
    spot_diameter_um: float | None = Field(None, gt=0, le=1000)
    labels: str | None = None
    site: str = Field("", max_length=128)

    @field_validator("section_id", "patient_id")
    @classmethod
    def _is_identifier(cls, value: str) -> str:
        if not _IDENTIFIER.fullmatch(value):
            raise ValueError("use 1 to 128 of the characters A-Z a-z 0-9 . _ -, the first no dot")
        return value

    @field_validator("site")
    @classmethod
    def _is_printable(cls, value: str) -> str:
        if not value.isprintable():
            raise ValueError("use printable characters")
        return value

    @model_validator(mode="after")
    def _has_its_files(self) -> Self:
        needed = {"legacy_st": ("expression", "positions"), "slide": ()}.get(self.format, ("expression",))
        faults = [f"format {self.format} needs {name}" for name in needed if getattr(self, name) is None]
        spare = [name for name in ("expression", "positions") if name not in needed]
        faults += [f"format {self.format} takes no {name}" for name in spare if getattr(self, name) is not None]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def measured(self) -> bool:
        """Whether the section has counts."""
        return self.format != "slide"

    @property
    def files(self) -> dict[str, str]:
        """The files that the section names, by column."""
        return {name: uri for name in FILE_COLUMNS if (uri := getattr(self, name)) is not None}


def read_sheet(uri: str, require_files: bool = True) -> list[SectionRow]:
    """Returns the sections of a sample sheet (CSV, local or `s3://`), in its order.

    File paths may be absolute, `s3://` or relative to the sheet. That they are there is checked unless
    `require_files` is False: of ten thousand slides some are away, which must not hold up the others.

    Raises:
        SheetError: lists every fault of the sheet with row and column.
    """
    uri = storage.absolute(uri)
    lines = _read_lines(uri)
    rows: list[SectionRow] = []
    faults = [*_duplicates(lines), *(_file_faults(lines, uri) if require_files else ())]
    for line, cells in lines:
        try:
            rows.append(SectionRow.model_validate(_with_absolute_files(cells, uri)))
        except ValidationError as error:
            faults += _row_faults(line, error)
    if not lines:
        faults.append((1, "there are no rows below the header"))
    if faults:
        listed = "\n  ".join(f"row {line}{text}" for line, text in sorted(faults))
        raise SheetError(f"the sample sheet {uri} has {len(faults)} fault(s):\n  {listed}")
    return rows


def _read_lines(uri: str) -> list[tuple[int, dict[str, str]]]:
    """Returns each row's line number and cells by column."""
    try:
        if storage.size(uri) > MAX_SHEET_BYTES:
            raise SheetError(f"{uri} is larger than {MAX_SHEET_BYTES} bytes: it is no sample sheet")
        reader = csv.DictReader(io.StringIO(storage.read(uri).decode("utf-8-sig"), newline=""), strict=True)
        _require_columns(uri, list(reader.fieldnames or []))
        return [(reader.line_num, _cells(uri, reader.line_num, cells)) for cells in reader]
    except FileNotFoundError:
        raise SheetError(f"there is no sample sheet {uri}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise SheetError(f"{uri} is no CSV file in UTF-8: {error}") from None


def _require_columns(uri: str, columns: list[str]) -> None:
    known = list(SectionRow.model_fields)
    faults = [f"column {name} appears twice" for name in sorted({c for c in columns if columns.count(c) > 1})]
    for name in columns:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known ones: {', '.join(known)}"
            faults.append(f"column {name!r} is unknown; {hint}")
    needed = ("section_id", "patient_id", "image", "format")
    faults += [f"column {name} is missing" for name in needed if name not in columns]
    if faults:
        listed = "\n  ".join(faults)
        raise SheetError(f"the header of the sample sheet {uri} has {len(faults)} fault(s):\n  {listed}")


def _cells(uri: str, line: int, cells: dict[str | None, str | None]) -> dict[str, str]:
    if None in cells:
        raise SheetError(f"row {line} of {uri} has more cells than the header has columns")
    return {str(name): (value or "").strip() for name, value in cells.items()}


def _with_absolute_files(cells: dict[str, str], sheet_uri: str) -> dict[str, str]:
    """Returns the filled cells; a path that cannot be resolved stays as it is and is among `_file_faults`."""
    filled = {name: value for name, value in cells.items() if value}
    for name in filled.keys() & set(FILE_COLUMNS):
        with suppress(StorageError):
            filled[name] = _resolve(filled[name], sheet_uri)
    return filled


def _resolve(path: str, sheet_uri: str) -> str:
    if not path.isprintable():
        raise StorageError("it has unprintable characters")
    if "://" in path or path.startswith(("/", "~")):
        return storage.absolute(path)
    return storage.absolute(storage.join(sheet_uri.rsplit("/", 1)[0], path))


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


def _file_faults(lines: list[tuple[int, dict[str, str]]], sheet_uri: str) -> list[Fault]:
    places = [
        (line, cells["format"], name, cells[name]) for line, cells in lines for name in FILE_COLUMNS if cells.get(name)
    ]

    def fault(place: tuple[int, str, str, str]) -> Fault | None:
        line, kind, name, path = place
        try:
            uri = _resolve(path, sheet_uri)
            if kind == "visium" and name == "expression":
                find_visium_files(uri)
            elif not storage.exists(uri):
                return line, f", column {name}: there is no file {path}"
        except (StorageError, SourceError) as error:
            return line, f", column {name}, got {path!r}: {error}"
        return None

    with ThreadPoolExecutor(_LOOKUPS) as pool:
        return [found for found in pool.map(fault, places) if found]
