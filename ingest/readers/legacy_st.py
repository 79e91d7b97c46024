"""Reader of legacy Spatial Transcriptomics: a counts table and a spot-selection table (HER2+, cSCC, MOB).

Counts are spots x genes with the index `{x}x{y}`, on the grid or near it; positions have grid x, y and pixels. Both are
joined on the rounded grid position. Counts are parsed line by line, slower than by a bulk parser, so that memory holds
only values other than zero and a bad cell can be named.
"""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from ingest.readers.features import Features, named_features
from ingest.readers.spots import (
    Expression,
    Gene,
    Layout,
    Preview,
    Reject,
    Spots,
    file_errors,
    require_positions,
    require_unique,
    split_usable,
)
from mclstexp.data.sheet import SectionRow
from mclstexp.errors import SourceError
from mclstexp.slides.plain import open_unpacked

_MAX_LINE_BYTES = 64 * 2**20
_MAX_POSITIONS_BYTES = 512 * 2**20
_SPOT_NAME = re.compile(r"(-?\d+(?:\.\d+)?)x(-?\d+(?:\.\d+)?)")
_KIND = "tab-separated table"
_POSITION_COLUMNS = ("x", "y", "pixel_x", "pixel_y")


GridXY = tuple[int, int]
"""Rounded grid position (x, y) of a spot, by which counts and positions are joined."""


@dataclass(frozen=True)
class _Positions:
    """The selection table by grid position."""

    xy_px: dict[GridXY, tuple[float, float]]
    selected: dict[GridXY, bool]


def preview(paths: Mapping[str, str], row: SectionRow) -> Preview:
    """Returns the genes in the header of a local counts file, `expression`, and the layout in `positions`."""
    with _opened(paths["expression"]) as file:
        header = _fields(_next_line(file))
        features = named_features(_names(header, _fields(_next_line(file))))
    return Preview(features.genes, features.left_out, read_layout(paths["positions"]))


def read(paths: Mapping[str, str], row: SectionRow) -> Expression:
    """Returns a section from its local files `expression` and `positions` (tab-separated, plain or gzip).

    Raises:
        SourceError: a file is damaged, or holds a value that is not a count or position; names gene and spot.
    """
    counted, genes, counts = _read_counts(paths["expression"])
    positions = _read_positions(paths["positions"])
    has_position = np.array([xy in positions.xy_px for xy in counted], bool)
    rejected = [Reject(_name(xy), np.nan, np.nan, "no_position") for xy in counted if xy not in positions.xy_px]
    joined = [xy for xy in counted if xy in positions.xy_px]
    spots = _spots(joined, positions, counts[has_position])
    require_positions(spots)
    usable, unusable = split_usable(spots, np.array([positions.selected[xy] for xy in joined], bool))
    rejected += unusable
    for xy in positions.xy_px.keys() - set(counted):
        reason = "no_counts" if positions.selected[xy] else "not_selected"
        rejected.append(Reject(_name(xy), *positions.xy_px[xy], reason))
    return Expression(usable, genes, tuple(sorted(rejected)), _layout(positions))


def read_layout(positions_path: str) -> Layout:
    """Returns where the spots of a local selection file are."""
    return _layout(_read_positions(positions_path))


def _layout(positions: _Positions) -> Layout:
    array_xy, xy_px = (
        np.array(list(axis), np.float64).reshape(-1, 2) for axis in (positions.xy_px, positions.xy_px.values())
    )
    return Layout(array_xy, xy_px)


def _read_counts(path: str) -> tuple[list[GridXY], tuple[Gene, ...], csr_array]:
    spot_ids: list[str] = []
    in_line: list[str] = []
    columns: list[np.ndarray] = []
    values: list[np.ndarray] = []
    with _opened(path) as file:
        header = _fields(_next_line(file))
        names: list[str] = []
        features: Features | None = None
        for number, line in enumerate(iter(lambda: _next_line(file), b""), start=2):
            if not line.strip():
                continue
            fields = _fields(line)
            names = names or _names(header, fields)
            features = features or named_features(names)
            spot_ids.append(fields[0])
            in_line.append(f"{fields[0]} (line {number})")
            row = _row(fields, names, in_line[-1])
            columns.append(np.flatnonzero(row).astype(np.int32))
            values.append(row[columns[-1]])
    if features is None:
        raise SourceError(f"{Path(path).name} has no spots")
    first = np.cumsum([0, *map(len, columns)])
    matrix = csr_array((np.concatenate(values), np.concatenate(columns), first), shape=(len(spot_ids), len(names)))
    with file_errors(path, _KIND):
        counted = [_grid_xy(spot_id, spot) for spot_id, spot in zip(spot_ids, in_line, strict=True)]
        require_unique([_name(xy) for xy in counted], "spot")
        return counted, features.genes, features.counts(matrix, in_line)


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
    with _opened(path) as file:
        data = file.read(_MAX_POSITIONS_BYTES + 1)
        if len(data) > _MAX_POSITIONS_BYTES:
            raise SourceError(f"it is larger than {_MAX_POSITIONS_BYTES} bytes: it is not a table of spots")
        table = pd.read_csv(io.BytesIO(data), sep="\t", dtype=str)
        missing = [name for name in _POSITION_COLUMNS if name not in table]
        if missing:
            raise SourceError(f"it has no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
        columns = [*_POSITION_COLUMNS, "selected"] if "selected" in table else [*_POSITION_COLUMNS]
        number = table[columns].apply(pd.to_numeric, errors="coerce")
        wrong = ~np.isfinite(number.to_numpy(np.float64)).all(axis=1)
        if wrong.any():
            row = int(wrong.argmax())
            cells = ", ".join(f"{name} {table[name].iloc[row]}" for name in columns)
            raise SourceError(f"line {_line_of(data, row)} has no position: {cells}")
        grid_xy = list(zip(*(np.rint(number[name]).astype(int).tolist() for name in ("x", "y")), strict=True))
        require_unique([_name(xy) for xy in grid_xy], "spot")
    pixels = zip(number["pixel_x"].tolist(), number["pixel_y"].tolist(), strict=True)
    selected = (number["selected"] != 0).tolist() if "selected" in number else [True] * len(grid_xy)
    return _Positions(dict(zip(grid_xy, pixels, strict=True)), dict(zip(grid_xy, selected, strict=True)))


def _line_of(data: bytes, row: int) -> int:
    """Returns the line, counted from 1, of a row below the header; pandas skips blank lines."""
    filled = [number for number, line in enumerate(data.splitlines(), 1) if line.strip(b" ")]
    return filled[row + 1]


def _spots(grid_xy: list[GridXY], positions: _Positions, counts: csr_array) -> Spots:
    xy_px = np.array([positions.xy_px[xy] for xy in grid_xy], np.float64).reshape(-1, 2)
    grid = np.array(grid_xy, np.float64).reshape(-1, 2)
    spot_id = np.array([_name(xy) for xy in grid_xy], object)
    return Spots(spot_id, xy_px[:, 0], xy_px[:, 1], array_row=grid[:, 1], array_col=grid[:, 0], counts=counts)


def _grid_xy(spot_id: str, spot: str) -> GridXY:
    match = _SPOT_NAME.fullmatch(spot_id)
    if not match:
        raise SourceError(f"spot {spot} has no name like 10x21")
    return round(float(match[1])), round(float(match[2]))


def _name(xy: GridXY) -> str:
    return f"{xy[0]}x{xy[1]}"


def _next_line(file: IO[bytes]) -> bytes:
    line = file.readline(_MAX_LINE_BYTES)
    if len(line) == _MAX_LINE_BYTES:
        raise SourceError(f"it has a line of more than {_MAX_LINE_BYTES} bytes")
    return line


def _fields(line: bytes) -> list[str]:
    """Returns a line's cells without the quotes that R writes around names."""
    return [cell.strip('"') for cell in line.decode().rstrip("\r\n").split("\t")]


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    """Yields the file's decompressed bytes; errors name the file."""
    with file_errors(path, _KIND), open_unpacked(path) as file:
        yield file
