"""Reader of 10x Visium sections as Space Ranger writes them (v1, v2, HD bins), and of deposits in that shape.

Only gene expression is read; antibodies and other features are left out and counted. The resolution comes from the
array (HD states its own). `spot_diameter_fullres` is not used for it: Space Ranger writes
it for a theoretical spot of 65 um and older versions for others, while a spot on the glass has 55 um.
"""

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from PIL import Image
from scipy.io import mminfo, mmread
from scipy.sparse import csr_array

from ingest.readers.cells import first_line, flags, numbers, read_text, separator, whole
from ingest.readers.features import Features, named_features
from ingest.readers.spots import (
    PICTURES,
    Expression,
    Gene,
    Picture,
    Preview,
    Scale,
    Spots,
    file_errors,
    join_counts,
    opened_hdf5,
    require_unique,
)
from ingest.readers.visium_files import find_files
from mclstexp.data.sheet import SectionRow
from mclstexp.errors import SourceError
from mclstexp.slides.plain import open_unpacked

_KIND = "count matrix of Space Ranger"
_ARRAY = ("array_row", "array_col")
_PIXELS = ("pxl_row_in_fullres", "pxl_col_in_fullres")
_POSITION_COLUMNS = ("barcode", "in_tissue", *_ARRAY, *_PIXELS)


def files(columns: Mapping[str, str]) -> dict[str, str]:
    """Returns the URIs of the files to read in the folder that the column `expression` names; see `find_files`."""
    return find_files(columns["expression"])


def preview(paths: Mapping[str, str], row: SectionRow) -> Preview:
    """Returns what a section's local files (all but `matrix` and `barcodes`) state before its counts are read."""
    if "h5" in paths:
        with opened_hdf5(paths["h5"], _KIND) as file:
            features = _h5_features(file["matrix/features"])
    else:
        features = _read_features(paths["features"])
    placed, _ = _read_positions(paths["positions"])
    return Preview(features.genes, features.left_out, placed.layout(_read_scale(paths)))


def read(paths: Mapping[str, str], row: SectionRow) -> Expression:
    """Returns a section from its local files by part, as `find_files` names them.

    Raises:
        SourceError: a file is damaged, contradicts another or holds a value that is not a count or position; names file
            and line.
    """
    barcodes, genes, counts = _read_h5(paths["h5"]) if "h5" in paths else _read_mtx(paths)
    placed, in_tissue = _read_positions(paths["positions"])
    usable, rejected = join_counts(barcodes, counts, placed, in_tissue)
    return Expression(usable, genes, tuple(sorted(rejected)), placed.layout(_read_scale(paths)))


def _read_h5(path: str) -> tuple[list[str], tuple[Gene, ...], csr_array]:
    with opened_hdf5(path, _KIND) as file:
        matrix = file["matrix"]
        features = _h5_features(matrix["features"])
        barcodes = _texts(matrix["barcodes"])
        named = len(features.gene_of), len(barcodes)
        _require_shape(tuple(map(int, matrix["shape"][:])), named)
        parts = (matrix[name][:] for name in ("data", "indices", "indptr"))
        counts = csr_array(tuple(parts), shape=named[::-1])  # a column of the matrix is a spot
        counts.check_format(full_check=True)
        return _checked(counts, features, barcodes)


def _read_mtx(files: Mapping[str, str]) -> tuple[list[str], tuple[Gene, ...], csr_array]:
    features = _read_features(files["features"])
    with file_errors(files["barcodes"], "list of barcodes"):
        barcodes = [name for line in read_text(files["barcodes"]).splitlines() if (name := line.strip('" '))]
    with file_errors(files["matrix"], "Matrix Market file"):
        num_rows, num_columns, num_entries, kind, *_ = mminfo(files["matrix"])
        if kind != "coordinate" or num_entries > num_rows * num_columns:
            raise SourceError(
                f"it claims {num_entries} entries in the format {kind}; give Space Ranger's sparse matrix"
            )
        _require_shape((num_rows, num_columns), (len(features.gene_of), len(barcodes)))
        return _checked(csr_array(mmread(files["matrix"], spmatrix=False).T), features, barcodes)


def _require_shape(claimed: tuple[int, ...], named: tuple[int, int]) -> None:
    if claimed != named:
        raise SourceError(
            f"the matrix is {claimed}, but there are names for {named} features x barcodes: is a file truncated?"
        )


def _checked(
    counts: csr_array, features: Features, barcodes: list[str]
) -> tuple[list[str], tuple[Gene, ...], csr_array]:
    if not barcodes:
        raise SourceError("it has no barcodes")
    require_unique(barcodes, "barcode")
    return barcodes, features.genes, features.counts(counts, barcodes)


def _read_features(path: str) -> Features:
    """Reads id, name and kind of each feature; files with fewer columns have only ids, or no kinds."""
    with file_errors(path, "table of features"):
        lines = [line.split("\t") for line in read_text(path).splitlines()]
        for number, cells in enumerate(lines, 1):
            if len(cells) != len(lines[0]) or not cells[0]:
                raise SourceError(
                    f"line {number} has {len(cells)} cells and line 1 has {len(lines[0])}; each needs an id first"
                )
        columns = list(zip(*lines, strict=True)) or [()]
        ids, names = columns[0], columns[min(1, len(columns) - 1)]
        return named_features(names, ids, columns[2] if len(columns) > 2 else ())


def _h5_features(group: h5py.Group) -> Features:
    ids, names, kinds = (_texts(group[name]) for name in ("id", "name", "feature_type"))
    return named_features(names, ids, kinds)


def _texts(node: h5py.Dataset) -> list[str]:
    return node.asstr()[:].tolist()


def _read_positions(path: str) -> tuple[Spots, np.ndarray]:
    """Returns all spots, and whether each is in tissue: 1, 0 or NaN where it is unclear, float64 (n,)."""
    with file_errors(path, "table of tissue positions"):
        table = _parquet(path) if path.endswith(".parquet") else _csv(path)
        missing = [name for name in _POSITION_COLUMNS if name not in table]
        if missing:
            raise SourceError(f"it has no column {', '.join(missing)}; it has {', '.join(table.columns)}")
        if table.empty:
            raise SourceError("it has no spots")
        cells = zip(table["barcode"], table.index, strict=True)
        barcodes = [str(name).strip() if pd.notna(name) and str(name).strip() else line for name, line in cells]
        require_unique(barcodes, "barcode")
        y_px, x_px = whole(numbers(table[name]) for name in _PIXELS).T
        array_row, array_col = whole(numbers(table[name]) for name in _ARRAY).T
        return Spots(np.array(barcodes, object), x_px, y_px, array_row, array_col), flags(table["in_tissue"])


def _csv(path: str) -> pd.DataFrame:
    """Returns the cells as text by line; a header (v2) is known by its names, which may be in any order."""
    text = read_text(path)
    rows = {
        number: [cell.strip() for cell in cells]
        for number, cells in enumerate(csv.reader(text.splitlines(), delimiter=separator(first_line(text))), 1)
        if any(cells)
    }
    header = list(_POSITION_COLUMNS)
    first = [cell.lower() for cell in next(iter(rows.values()), [])]
    if set(_POSITION_COLUMNS) & set(first):
        rows.pop(next(iter(rows)))
        header = first if "barcode" in first else [cell or "barcode" for cell in first]  # pandas names no index
    for number, cells in rows.items():
        if len(cells) != len(header):
            raise SourceError(f"line {number} has {len(cells)} cells, expected {len(header)}: {', '.join(header)}")
    index = [f"line {number}" for number in rows]
    return pd.DataFrame(list(rows.values()), index=index, columns=header, dtype=str)


def _parquet(path: str) -> pd.DataFrame:
    table = pq.read_table(path).to_pandas(ignore_metadata=True)
    return table.set_axis([f"row {number}" for number in range(1, len(table) + 1)])


def _read_scale(paths: Mapping[str, str]) -> Scale:
    with file_errors(paths["scalefactors"], "JSON file of scale factors"):
        tree = json.loads(read_text(paths["scalefactors"]))
        if not isinstance(tree, dict) or "spot_diameter_fullres" not in tree:
            raise SourceError("it has no spot_diameter_fullres")
        named = [f"tissue_{part}_scalef" for part in PICTURES]
        found = {name: tree.get(name) for name in ("spot_diameter_fullres", "microns_per_pixel", *named)}
        for name, value in found.items():
            if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise SourceError(f"{name} is {value!r}; allowed is a number above 0")
    pictures = [
        _picture(f"tissue_{part}_image.png", paths.get(part), scale)
        for part, name in zip(PICTURES, named, strict=True)
        if (scale := found[name])
    ]
    return Scale(found["microns_per_pixel"], float(tree["spot_diameter_fullres"]), tuple(pictures))


def _picture(name: str, path: str | None, scale: float) -> Picture:
    """Reads the size of a picture, if the folder has it; its pixels stay unread."""
    if path is None:
        return Picture(name, 0, 0, scale)
    with file_errors(path, "picture of the slide"), open_unpacked(path) as file, Image.open(file) as picture:
        return Picture(Path(path).name, picture.width, picture.height, scale)
