"""Reader of legacy Spatial Transcriptomics: a counts table and a spot-selection table (HER2+, cSCC, MOB).

Counts are spots x genes with the index `{x}x{y}`, grid or rounded; positions carry grid x, y and pixels. Both are
joined on the rounded grid place. Counts are parsed line by line, slower than a bulk parser, so that memory holds
only what is not zero and a bad cell can be named.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from ingest.readers.spots import (
    Expression,
    Gene,
    Reject,
    Spots,
    array_mpp,
    checked_counts,
    named_gene,
    naming,
    require_places,
    require_unique,
    split_usable,
)
from mclstexp.errors import SourceError
from mclstexp.slides.slide import open_unpacked

_MAX_LINE_BYTES = 64 * 2**20
_MAX_POSITIONS_BYTES = 512 * 2**20
_PLACE = re.compile(r"(-?\d+(?:\.\d+)?)x(-?\d+(?:\.\d+)?)")
_KIND = "tab-separated table"
_POSITION_COLUMNS = ("x", "y", "pixel_x", "pixel_y")


@dataclass(frozen=True)
class _Positions:
    """The selection table by rounded grid place (x, y)."""

    pixel: dict[tuple[int, int], tuple[float, float]]
    selected: dict[tuple[int, int], bool]


def read_legacy_st(counts_path: str, positions_path: str) -> Expression:
    """Returns a section from its local counts and selection files (tab-separated, plain or gzip).

    Raises:
        SourceError: a file is damaged, or holds anything that is no count or no position; names gene and spot.
    """
    places, genes, counts = _read_counts(counts_path)
    positions = _read_positions(positions_path)
    has_position = np.array([place in positions.pixel for place in places], bool)
    rejected = [Reject(_name(place), np.nan, np.nan, "no_position") for place in places if place not in positions.pixel]
    joined = [place for place in places if place in positions.pixel]
    spots = _spots(joined, positions, counts[has_position])
    require_places(spots)
    usable, unusable = split_usable(spots, np.array([positions.selected[place] for place in joined], bool))
    rejected += unusable
    for place in positions.pixel.keys() - set(places):
        reason = "no_counts" if positions.selected[place] else "not_selected"
        rejected.append(Reject(_name(place), *positions.pixel[place], reason))
    return Expression(usable, genes, tuple(sorted(rejected)))


def read_legacy_st_genes(counts_path: str) -> tuple[Gene, ...]:
    """Returns the genes of a local counts file from its header."""
    with _reading(counts_path) as file:
        header = _fields(_next_line(file))
        return _genes(header, _fields(_next_line(file)))


def read_legacy_st_mpp(positions_path: str, pitch_um: float) -> float | None:
    """Returns the micrometres per pixel of a local selection file whose neighbouring spots lie `pitch_um` apart.

    None where there are too few spots to tell.
    """
    positions = _read_positions(positions_path).pixel
    place, pixel = (np.array(list(axis), np.float64).reshape(-1, 2) for axis in (positions, positions.values()))
    return array_mpp(place, pixel, pitch_um)


def _read_counts(path: str) -> tuple[list[tuple[int, int]], tuple[Gene, ...], csr_array]:
    spot_ids: list[str] = []
    in_line: list[str] = []
    columns: list[np.ndarray] = []
    values: list[np.ndarray] = []
    with _reading(path) as file:
        header = _fields(_next_line(file))
        genes: tuple[Gene, ...] = ()
        for number, line in enumerate(iter(lambda: _next_line(file), b""), start=2):
            if not line.strip():
                continue
            fields = _fields(line)
            genes = genes or _genes(header, fields)
            spot_ids.append(fields[0])
            in_line.append(f"{fields[0]} (line {number})")
            row = _row(fields, genes, in_line[-1])
            columns.append(np.flatnonzero(row).astype(np.int32))
            values.append(row[columns[-1]])
    if not spot_ids:
        raise SourceError(f"{Path(path).name} has no spots")
    first = np.cumsum([0, *map(len, columns)])
    matrix = csr_array((np.concatenate(values), np.concatenate(columns), first), shape=(len(spot_ids), len(genes)))
    with naming(path, _KIND):
        places = [_place(spot_id, spot) for spot_id, spot in zip(spot_ids, in_line, strict=True)]
        require_unique([_name(place) for place in places], "spot")
        return places, genes, checked_counts(matrix, in_line, genes)


def _genes(header: list[str], first_row: list[str]) -> tuple[Gene, ...]:
    """Returns the header's genes; a name above the index column is optional (R leaves it out)."""
    names = header[len(header) - len(first_row) + 1 :] if len(header) in (len(first_row), len(first_row) - 1) else []
    if not names:
        raise SourceError(f"its header has {len(header)} cells and its first spot {len(first_row)}")
    genes = tuple(map(named_gene, names))
    require_unique([gene.gene_id for gene in genes], "gene")
    return genes


def _row(fields: list[str], genes: tuple[Gene, ...], spot: str) -> np.ndarray:
    """Returns a line's values, float64 (genes,); `spot` is what it is called in errors, with its line."""
    if len(fields) != len(genes) + 1:
        raise SourceError(f"spot {spot} has {len(fields) - 1} values for {len(genes)} genes: is the file whole?")
    try:
        return np.array(fields[1:], np.float64)
    except ValueError:
        gene, text = next((g, text) for g, text in zip(genes, fields[1:], strict=True) if not _is_number(text))
        raise SourceError(f"gene {gene.gene_id} of spot {spot} has the value {text!r}, which is no count") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_positions(path: str) -> _Positions:
    with _reading(path) as file:
        data = file.read(_MAX_POSITIONS_BYTES + 1)
        if len(data) > _MAX_POSITIONS_BYTES:
            raise SourceError(f"it is larger than {_MAX_POSITIONS_BYTES} bytes")
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
            raise SourceError(f"line {_line_of(data, row)} holds no position: {cells}")
        places = list(zip(*(np.rint(number[name]).astype(int).tolist() for name in ("x", "y")), strict=True))
        require_unique([_name(place) for place in places], "spot")
    pixels = zip(number["pixel_x"].tolist(), number["pixel_y"].tolist(), strict=True)
    selected = (number["selected"] != 0).tolist() if "selected" in number else [True] * len(places)
    return _Positions(dict(zip(places, pixels, strict=True)), dict(zip(places, selected, strict=True)))


def _line_of(data: bytes, row: int) -> int:
    """Returns the line, counted from 1, of a row below the header; pandas counts no blank lines."""
    filled = [number for number, line in enumerate(data.splitlines(), 1) if line.strip(b" ")]
    return filled[row + 1]


def _spots(places: list[tuple[int, int]], positions: _Positions, counts: csr_array) -> Spots:
    pixel = np.array([positions.pixel[place] for place in places], np.float64).reshape(-1, 2)
    grid = np.array(places, np.float64).reshape(-1, 2)
    spot_id = np.array([_name(place) for place in places], object)
    return Spots(spot_id, pixel[:, 0], pixel[:, 1], array_row=grid[:, 1], array_col=grid[:, 0], counts=counts)


def _place(spot_id: str, spot: str) -> tuple[int, int]:
    match = _PLACE.fullmatch(spot_id)
    if not match:
        raise SourceError(f"spot {spot} is not named like 10x21")
    return round(float(match[1])), round(float(match[2]))


def _name(place: tuple[int, int]) -> str:
    return f"{place[0]}x{place[1]}"


def _next_line(file: IO[bytes]) -> bytes:
    line = file.readline(_MAX_LINE_BYTES)
    if len(line) == _MAX_LINE_BYTES:
        raise SourceError(f"it has a line of more than {_MAX_LINE_BYTES} bytes")
    return line


def _fields(line: bytes) -> list[str]:
    """Returns a line's cells; R puts names in quotes."""
    return [cell.strip('"') for cell in line.decode().rstrip("\r\n").split("\t")]


@contextmanager
def _reading(path: str) -> Iterator[IO[bytes]]:
    """Yields the file's decompressed bytes; whatever goes wrong meanwhile is a SourceError that names it."""
    with naming(path, _KIND), open_unpacked(path) as file:
        yield file
