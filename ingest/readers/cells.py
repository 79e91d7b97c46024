"""Tables as people pass them on: their text, and the cells that state where spots are and whether they are selected.

One bad cell costs one spot. A column that is mostly bad is not what its name says, and ends the section.
"""

import codecs
from collections.abc import Iterable

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from mclstexp.errors import SourceError
from mclstexp.slides.plain import open_unpacked

MAX_TEXT_BYTES = 512 * 2**20
_FLAGS = {"true": 1.0, "t": 1.0, "yes": 1.0, "y": 1.0, "false": 0.0, "f": 0.0, "no": 0.0, "n": 0.0}
_ALLOWED_FLAGS = "1 or 0, true or false, yes or no"
_SEPARATORS = "\t,;"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: str) -> str:
    """Returns a local text file in UTF-8, or UTF-16 with a byte order mark, plain or gzip, without that mark.

    Raises:
        SourceError: it holds more than `MAX_TEXT_BYTES`.
        OSError, EOFError, zlib.error, ValueError: it is damaged.
    """
    with open_unpacked(path) as file:
        data = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise SourceError(f"it is larger than {MAX_TEXT_BYTES} bytes: it is not a table of a section")
    return data.decode("utf-16" if data.startswith(_UTF16) else "utf-8-sig")


def first_line(text: str) -> str:
    """Returns a text up to its first line break of any kind."""
    return next(iter(text.splitlines()), "")


def separator(line: str) -> str:
    """Returns what separates the cells of a line: a tab if it has any, else a comma, else a semicolon."""
    return next((mark for mark in _SEPARATORS if mark in line), "\t")


def numbers(column: pd.Series) -> np.ndarray:
    """Returns a column's finite numbers, float64 (n,); NaN for any other cell.

    Args:
        column: its name and index name the column and the rows in errors, for example `line 7`.

    Raises:
        SourceError: more than half of the cells are no numbers; names the column and one of them.
    """
    values = _as_numbers(column)
    found = np.where(np.isfinite(values), values, np.nan)
    _require_mostly_good(column, found, "finite numbers")
    return found


def flags(column: pd.Series) -> np.ndarray:
    """Returns 1.0 for each cell that says yes, 0.0 for no, and NaN for any other, float64 (n,).

    Args:
        column: of numbers, truth values or text; its name and index as in `numbers`.

    Raises:
        SourceError: more than half of the cells are neither; names the column and one of them.
    """
    values = _as_numbers(column)
    found = np.where(np.isin(values, (0, 1)), values, np.nan)
    if not is_numeric_dtype(column):
        named = column.astype(str).str.strip().str.lower().map(_FLAGS).to_numpy(np.float64, na_value=np.nan)
        found = np.where(np.isnan(found), named, found)
    _require_mostly_good(column, found, _ALLOWED_FLAGS)
    return found


def whole(columns: Iterable[np.ndarray]) -> np.ndarray:
    """Returns columns of numbers, float64 (n, number of columns), with NaN throughout a row in which one is missing."""
    rows = np.stack(list(columns), axis=1)
    return np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, np.nan)


def _as_numbers(column: pd.Series) -> np.ndarray:
    cells = column if is_numeric_dtype(column) else column.astype(object)
    return pd.to_numeric(cells, errors="coerce").to_numpy(np.float64, na_value=np.nan)


def _require_mostly_good(column: pd.Series, found: np.ndarray, allowed: str) -> None:
    bad = np.isnan(found)
    if 2 * bad.sum() > len(bad):
        first = int(bad.argmax())
        cell = column.iloc[first]
        shown = repr(cell) if isinstance(cell, str) else str(cell)
        raise SourceError(
            f"column {column.name}: {int(bad.sum())} of {len(bad)} cells cannot be used, such as "
            f"{shown} ({column.index[first]}); allowed: {allowed}"
        )
