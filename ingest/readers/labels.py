"""A pathologist's labels of a section's spots.

They come as a table of their own beside the measurement, so they are joined by what the spot is called: its id, or its
rounded place in the array. They serve evaluation alone; nothing is trained on them.
"""

import io

import numpy as np
import pandas as pd

from ingest.readers.spots import Spots, naming, require_unique
from mclstexp.data.schema import NO_LABEL
from mclstexp.errors import SourceError
from mclstexp.slides.slide import open_unpacked

LABEL = "label"
_ID_COLUMNS = ("spot_id", "barcode", "Barcode")
_PLACE_COLUMNS = ("x", "y")
_KIND = "table of labels"


def read_labels(path: str, spots: Spots) -> np.ndarray:
    """Returns each spot's label from a local file, object (n,) of str; None where the file has none for it.

    None has a spot without a row, with an empty cell, or with NA or NaN, as R and pandas write it.

    The file is a table with commas or tabs, plain or gzip, with a column `label` and either the spots' ids (`spot_id`
    or `barcode`) or their array column and row (`x`, `y`; rounded, as HER2+ has them). Other spots' rows are left out.

    Raises:
        SourceError: the file is no such table, names a spot twice, or has a label for none of the spots.
    """
    with naming(path, _KIND):
        with open_unpacked(path) as file:
            data = file.read()
        separator = "\t" if b"\t" in data.partition(b"\n")[0] else ","
        table = pd.read_csv(io.BytesIO(data), sep=separator, dtype=str, keep_default_na=False)
        keys = _keys(table)
        if LABEL not in table:
            raise SourceError(f"it has no column {LABEL}; it has {', '.join(map(str, table.columns))}")
        require_unique([key for key in keys if key], "spot")
        label_of = {key: _label(text) for key, text in zip(keys, table[LABEL], strict=True) if key}
        by_id = any(name in table for name in _ID_COLUMNS)
        names = [str(name) for name in spots.spot_id] if by_id else _places(spots.array_col, spots.array_row)
        found = np.array([label_of.get(name) for name in names], object)
        if not any(found):
            num_met = len(set(names) & label_of.keys())
            fault = f"its {num_met} rows of the section's spots have no label (empty or NA)"
            if not num_met:
                spots_named = f"the section's {len(spots)} spots (such as {', '.join(names[:3])})"
                fault = f"none of its {len(table)} rows is of one of {spots_named}"
            raise SourceError(f"{fault}; give the labels of this section, or leave the sheet's column labels empty")
        return found


def _label(text: str) -> str | None:
    name = text.strip()
    return None if name.lower() in NO_LABEL else name


def _keys(table: pd.DataFrame) -> list[str]:
    """Returns what each row's spot is called; empty for a row without a place."""
    for name in _ID_COLUMNS:
        if name in table:
            return table[name].str.strip().tolist()
    if not set(_PLACE_COLUMNS) <= set(table):
        raise SourceError(f"it has neither spot_id or barcode nor x and y; it has {', '.join(map(str, table.columns))}")
    place = table[[*_PLACE_COLUMNS]].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    return _places(place[:, 0], place[:, 1])


def _places(column: np.ndarray, row: np.ndarray) -> list[str]:
    return [
        f"{round(x)}x{round(y)}" if np.isfinite(x + y) else ""
        for x, y in zip(column.tolist(), row.tolist(), strict=True)
    ]
