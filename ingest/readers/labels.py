"""A pathologist's labels of a section's spots.

Labels are a separate table beside the measurement and are joined by the spot's id or its rounded array position. Only
evaluation uses them; nothing is trained on them.
"""

import io

import numpy as np
import pandas as pd

from ingest.readers.cells import first_line, read_text, separator
from ingest.readers.spots import Spots, file_errors, require_unique
from mclstexp.data.schema import NO_LABEL
from mclstexp.errors import SourceError

LABEL = "label"
_ID_COLUMNS = ("spot_id", "barcode", "Barcode")
_ARRAY_COLUMNS = ("x", "y")
_KIND = "table of labels"


def read_labels(path: str, spots: Spots) -> np.ndarray:
    """Returns each spot's label from a local file, object (n,) of str.

    A spot has None if the file has no row for it, or a row with an empty cell, NA or NaN (as R and pandas write them).

    The file is a table with commas, semicolons or tabs, plain or gzip, with a column `label` and either the spots' ids
    (`spot_id` or `barcode`) or their array column and row (`x`, `y`; rounded, because HER2+ has fractions). Rows of
    other spots are ignored.

    Raises:
        SourceError: the file is not such a table, names a spot twice, or labels none of the spots.
    """
    with file_errors(path, _KIND):
        text = read_text(path)
        table = pd.read_csv(io.StringIO(text), sep=separator(first_line(text)), dtype=str, keep_default_na=False)
        table = table.rename(columns=lambda name: name.strip())
        keys = _keys(table)
        if LABEL not in table:
            raise SourceError(f"it has no column {LABEL}; it has {', '.join(map(str, table.columns))}")
        require_unique([key for key in keys if key], "spot")
        label_of = {key: _label(text) for key, text in zip(keys, table[LABEL], strict=True) if key}
        by_id = any(name in table for name in _ID_COLUMNS)
        names = [str(name) for name in spots.spot_id] if by_id else _array_names(spots.array_col, spots.array_row)
        found = np.array([label_of.get(name) for name in names], object)
        if not any(found):
            num_known = len(set(names) & label_of.keys())
            fault = f"its {num_known} rows for the section's spots have no label (empty or NA)"
            if not num_known:
                examples = ", ".join(names[:3])
                fault = (
                    f"none of its {len(table)} rows names one of the section's {len(spots)} spots (such as {examples})"
                )
            raise SourceError(f"{fault}; give the labels of this section, or leave the sheet's column labels empty")
        return found


def _label(text: str) -> str | None:
    name = text.strip()
    return None if name.lower() in NO_LABEL else name


def _keys(table: pd.DataFrame) -> list[str]:
    """Returns the name of each row's spot; empty for a row without array position."""
    for name in _ID_COLUMNS:
        if name in table:
            return table[name].str.strip().tolist()
    if not set(_ARRAY_COLUMNS) <= set(table):
        raise SourceError(f"it has neither spot_id or barcode nor x and y; it has {', '.join(map(str, table.columns))}")
    array_xy = table[[*_ARRAY_COLUMNS]].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    return _array_names(array_xy[:, 0], array_xy[:, 1])


def _array_names(column: np.ndarray, row: np.ndarray) -> list[str]:
    return [
        f"{round(x)}x{round(y)}" if np.isfinite(x + y) else ""
        for x, y in zip(column.tolist(), row.tolist(), strict=True)
    ]
