"""Reader of legacy Spatial Transcriptomics: a counts table and a spot-selection table (HER2+, cSCC, MOB).

Counts are spots x genes with the index `{x}x{y}`, on the grid or near it; positions have grid x, y and pixels. Both are
joined on the rounded grid position. Counts are parsed line by line, slower than by a bulk parser, so that memory holds
only values other than zero and a bad cell can be named.
"""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from ingest.readers.cells import first_line, flags, numbers, read_text, separator, whole
from ingest.readers.features import Features, named_features
from ingest.readers.spots import (
    Expression,
    Gene,
    Layout,
    Preview,
    Reject,
    Spots,
    file_errors,
    join_counts,
    require_unique,
)
from mclstexp.data.sheet import SectionRow
from mclstexp.errors import SourceError
from mclstexp.slides.plain import open_unpacked

_MAX_LINE_BYTES = 64 * 2**20
_SPOT_NAME = re.compile(r"X?(-?\d+(?:\.\d+)?)x(-?\d+(?:\.\d+)?)")  # R puts X before numbers
_DECIMAL_COMMA = r"^([+-]?\d+),(\d+)$"
_KIND = "table of legacy ST"
_BYTE_ORDER_MARK = "\ufeff"
_POSITION_COLUMNS = ("x", "y", "pixel_x", "pixel_y")
_MAX_SHARE_OF_SPOTS = 0.5  # of a header's cells, which are genes


class _Positions(NamedTuple):
    """The selection table."""

    spots: Spots
    selected: np.ndarray
    """1.0 or 0.0, float64 (n,); NaN where it is unclear."""
    nameless: list[Reject]
    """Its rows without a grid position, by their line."""


def preview(paths: Mapping[str, str], row: SectionRow) -> Preview:
    """Returns the genes in the header of a local counts file, `expression`, and the layout in `positions`."""
    with _opened(paths["expression"]) as file:
        mark, header = _header(file)
        features = named_features(_names(header, _fields(_next_line(file), mark)))
    return Preview(features.genes, features.left_out, read_layout(paths["positions"]))


def read(paths: Mapping[str, str], row: SectionRow) -> Expression:
    """Returns a section from its local files `expression` and `positions` (tables with tabs or commas, plain or gzip).

    Raises:
        SourceError: a file is damaged, or holds a value that is not a count; names gene and spot.
    """
    spot_ids, genes, counts = _read_counts(paths["expression"])
    spots, selected, nameless = _read_positions(paths["positions"])
    usable, rejected = join_counts(spot_ids, counts, spots, selected)
    return Expression(usable, genes, tuple(sorted(rejected + nameless)), spots.layout())


def read_layout(positions_path: str) -> Layout:
    """Returns where the spots of a local selection file are."""
    return _read_positions(positions_path).spots.layout()


def _read_counts(path: str) -> tuple[list[str], tuple[Gene, ...], csr_array]:
    in_line: list[str] = []
    spot_ids: list[str] = []
    columns: list[np.ndarray] = []
    values: list[np.ndarray] = []
    with _opened(path) as file:
        mark, header = _header(file)
        names: list[str] = []
        features: Features | None = None
        for number, line in enumerate(iter(lambda: _next_line(file), b""), start=2):
            if not line.strip():
                continue
            fields = _fields(line, mark)
            names = names or _names(header, fields)
            features = features or named_features(names)
            in_line.append(f"{fields[0]} (line {number})")
            spot_ids.append(fields[0])
            row = _row(fields, names, in_line[-1])
            columns.append(np.flatnonzero(row).astype(np.int32))
            values.append(row[columns[-1]])
    if features is None:
        raise SourceError(f"{Path(path).name} has no spots")
    first = np.cumsum([0, *map(len, columns)])
    matrix = csr_array((np.concatenate(values), np.concatenate(columns), first), shape=(len(spot_ids), len(names)))
    with file_errors(path, _KIND):
        spot_ids = [_on_grid(spot_id, spot) for spot_id, spot in zip(spot_ids, in_line, strict=True)]
        require_unique(spot_ids, "spot")
        return spot_ids, features.genes, features.counts(matrix, in_line)


def _header(file: IO[bytes]) -> tuple[str, list[str]]:
    """Returns what separates the cells of a table of counts, and those of its header."""
    line = _next_line(file)
    mark = separator(line.decode())
    cells = _fields(line, mark)
    spots = [cell for cell in cells if _SPOT_NAME.fullmatch(cell)]
    if len(spots) > _MAX_SHARE_OF_SPOTS * len(cells):
        raise SourceError(
            f"its columns are spots ({', '.join(spots[:2])}, ...), so it is a table of genes x spots: transpose it, so "
            "that each row is a spot and each column a gene"
        )
    return mark, cells


def _names(header: list[str], first_row: list[str]) -> list[str]:
    """Returns the header's names of genes; the name of the index column is optional (R leaves it out)."""
    names = header[len(header) - len(first_row) + 1 :] if len(header) in (len(first_row), len(first_row) - 1) else []
    if not names:
        raise SourceError(f"its header has {len(header)} cells and its first spot {len(first_row)}")
    return names


def _row(fields: list[str], names: list[str], spot: str) -> np.ndarray:
    """Returns a line's values, float64 (names,); `spot` names it in errors."""
    if len(fields) != len(names) + 1:
        raise SourceError(f"spot {spot} has {len(fields) - 1} values for {len(names)} genes: is the file complete?")
    try:
        return np.array(fields[1:], np.float64)
    except ValueError:
        name, text = next((name, text) for name, text in zip(names, fields[1:], strict=True) if not _is_number(text))
        raise SourceError(f"gene {name} of spot {spot} has the value {text!r}, which is not a count") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_positions(path: str) -> _Positions:
    with file_errors(path, _KIND):
        table = _table(read_text(path))
        missing = [name for name in _POSITION_COLUMNS if name not in table]
        if missing:
            raise SourceError(f"it has no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
        grid = np.rint(whole(numbers(table[name]) for name in ("x", "y")))
        xy_px = whole(numbers(table[name]) for name in ("pixel_x", "pixel_y"))
        selected = flags(table["selected"]) if "selected" in table else np.ones(len(table))
        named = np.isfinite(grid).all(axis=1)
        spot_id = np.array(
            [_name(*xy) if known else "" for xy, known in zip(grid.tolist(), named, strict=True)], object
        )
        require_unique(spot_id[named].tolist(), "spot")
    x_px, y_px = xy_px.T
    spots = Spots(np.where(named, spot_id, table.index), x_px, y_px, array_row=grid[:, 1], array_col=grid[:, 0])
    return _Positions(spots.take(named), selected[named], spots.rejects(~named, "no_position"))


def _table(text: str) -> pd.DataFrame:
    """Returns the cells of the rows that have any, as text, with their lines as index."""
    filled = [number for number, line in enumerate(text.splitlines(), 1) if line.strip(" ")]
    mark = separator(first_line(text))
    table = pd.read_csv(io.StringIO(text), sep=mark, dtype=str, skipinitialspace=True)
    names = [name.strip().lower() for name in table.columns]
    table.columns = names if len(set(names)) == len(names) else [name.strip() for name in table.columns]
    if mark == ";":
        table = table.replace(_DECIMAL_COMMA, r"\1.\2", regex=True)
    table.index = pd.Index([f"line {number}" for number in filled[1 : len(table) + 1]])
    return table.dropna(how="all")


def _on_grid(name: str, spot: str) -> str:
    match = _SPOT_NAME.fullmatch(name)
    if not match:
        raise SourceError(f"spot {spot} has no name like 10x21")
    return _name(float(match[1]), float(match[2]))


def _name(x: float, y: float) -> str:
    return f"{round(x)}x{round(y)}"


def _next_line(file: IO[bytes]) -> bytes:
    line = file.readline(_MAX_LINE_BYTES)
    if len(line) == _MAX_LINE_BYTES:
        raise SourceError(f"it has a line of more than {_MAX_LINE_BYTES} bytes")
    return line


def _fields(line: bytes, mark: str) -> list[str]:
    """Returns a line's cells without spaces around them and the quotes that R writes around names."""
    return [cell.strip(' "') for cell in line.decode().removeprefix(_BYTE_ORDER_MARK).rstrip("\r\n").split(mark)]


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    """Yields the file's decompressed bytes; errors name the file."""
    with file_errors(path, _KIND), open_unpacked(path) as file:
        yield file
