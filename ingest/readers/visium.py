"""Reader of 10x Visium sections as Space Ranger writes them (v1, v2, HD bins), and of deposits in that shape.

Only gene expression is read; antibodies and other features are left out and counted. The resolution comes from the
array (HD states its own). `spot_diameter_fullres` is not used for it: Space Ranger writes
it for a theoretical spot of 65 um and older versions for others, while a spot on the glass has 55 um.
"""

import csv
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from PIL import Image
from scipy.io import mminfo, mmread
from scipy.sparse import csr_array

from ingest.readers.features import Features, named_features
from ingest.readers.spots import (
    PICTURES,
    Expression,
    Gene,
    Picture,
    Preview,
    Reject,
    Scale,
    Spots,
    file_errors,
    require_positions,
    require_unique,
    split_usable,
)
from mclstexp import storage
from mclstexp.data.sheet import SectionRow
from mclstexp.errors import SourceError

_MAX_TEXT_CHARS = 512 * 2**20
_NUMBERS = ("in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
_POSITION_COLUMNS = ("barcode", *_NUMBERS)
_BINS = "binned_outputs/square_016um"
_ROOTS = ("", "outs", _BINS, f"outs/{_BINS}")
_H5 = "filtered_feature_bc_matrix.h5"
_MATRIX_FOLDERS = ("filtered_feature_bc_matrix", "filtered_count_matrix")
_BESIDE_MATRIX = {
    "features": ("features.tsv.gz", "features.tsv", "genes.tsv.gz", "genes.tsv"),
    "barcodes": ("barcodes.tsv.gz", "barcodes.tsv"),
}
_SPATIAL = {
    "positions": ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv"),
    "scalefactors": ("scalefactors_json.json",),
}


def files(columns: Mapping[str, str]) -> dict[str, str]:
    """Returns the URIs of the files to read in the folder that the column `expression` names; see `find_files`."""
    return find_files(columns["expression"])


def preview(paths: Mapping[str, str], row: SectionRow) -> Preview:
    """Returns what a section's local files (all but `matrix` and `barcodes`) state before its counts are read."""
    if "h5" in paths:
        with file_errors(paths["h5"], "count matrix of Space Ranger"), h5py.File(paths["h5"], "r") as file:
            features = _h5_features(file["matrix/features"])
    else:
        features = _read_features(paths["features"])
    layout = _spots(_read_positions(paths["positions"])).layout(_read_scale(paths))
    return Preview(features.genes, features.left_out, layout)


def read(paths: Mapping[str, str], row: SectionRow) -> Expression:
    """Returns a section from its local files by part, as `find_files` names them.

    Raises:
        SourceError: a file is damaged, contradicts another or holds a value that is not a count or position; names file
            and line.
    """
    barcodes, genes, counts = _read_h5(paths["h5"]) if "h5" in paths else _read_mtx(paths)
    positions = _read_positions(paths["positions"])
    usable, rejected = _joined(barcodes, counts, positions)
    return Expression(usable, genes, tuple(sorted(rejected)), _spots(positions).layout(_read_scale(paths)))


def find_files(folder: str) -> dict[str, str]:
    """Returns a section's files by part: `h5`, or `matrix`, `features` and `barcodes`; `positions`, `scalefactors`;
    `hires` and `lowres` if they are there.

    Args:
        folder: Space Ranger's `outs`, its parent folder, or the folder of one bin size of Visium HD (of a whole HD run,
            the 16 um bins are used); local or `s3://`.

    Raises:
        SourceError: lists what is missing.
    """
    for root in (storage.join(folder, name) if name else folder for name in _ROOTS):
        if storage.exists(h5 := storage.join(root, _H5)):
            return _complete({"h5": h5}, [(storage.join(root, "spatial"), _SPATIAL)]) | _pictures(root)
        for matrix_folder in (storage.join(root, name) for name in _MATRIX_FOLDERS):
            if matrix := _first(matrix_folder, ("matrix.mtx.gz", "matrix.mtx")):
                beside = [(matrix_folder, _BESIDE_MATRIX), (storage.join(root, "spatial"), _SPATIAL)]
                return _complete({"matrix": matrix}, beside) | _pictures(root)
    raise SourceError(
        f"{folder} has neither {_H5} nor matrix.mtx.gz in {' or '.join(_MATRIX_FOLDERS)}; looked in it and in "
        f"{', '.join(_ROOTS[1:])}: give Space Ranger's outs folder, or the folder of other bins of Visium HD"
    )


def _complete(found: dict[str, str], wanted: Sequence[tuple[str, dict[str, tuple[str, ...]]]]) -> dict[str, str]:
    """Returns `found` with the wanted parts of each folder."""
    missing = []
    for folder, parts in wanted:
        for part, names in parts.items():
            if uri := _first(folder, names):
                found = found | {part: uri}
            else:
                missing.append(f"{folder} has no {' or '.join(names)}")
    if missing:
        raise SourceError("; ".join(missing))
    return found


def _pictures(root: str) -> dict[str, str]:
    uris = {part: storage.join(root, "spatial", f"tissue_{part}_image.png") for part in PICTURES}
    return {part: uri for part, uri in uris.items() if storage.exists(uri)}


def _first(folder: str, names: Sequence[str]) -> str | None:
    return next((uri for name in names if storage.exists(uri := storage.join(folder, name))), None)


def _joined(barcodes: list[str], counts: csr_array, positions: pd.DataFrame) -> tuple[Spots, list[Reject]]:
    """Returns the spots on tissue with counts, and all others of either file as rejects."""
    row_of = {name: row for row, name in enumerate(positions.index)}
    row = np.array([row_of.get(name, -1) for name in barcodes], np.int64)
    known = row >= 0
    if not known.any():
        raise SourceError(
            f"the positions ({positions.index[0]}, ...) have none of the barcodes of the counts ({barcodes[0]}, ...): "
            "give counts and positions of the same section"
        )
    in_tissue = positions["in_tissue"].to_numpy() == 1
    spots = _spots(positions.iloc[row[known]], counts[known])
    require_positions(spots)
    usable, rejected = split_usable(spots, in_tissue[row[known]])
    rejected += [Reject(name, np.nan, np.nan, "no_position") for name in np.array(barcodes, object)[~known]]
    uncounted = ~np.isin(np.arange(len(positions)), row)
    all_spots = _spots(positions)
    rejected += all_spots.rejects(uncounted & in_tissue, "no_counts")
    rejected += all_spots.rejects(uncounted & ~in_tissue, "not_selected")
    return usable, rejected


def _spots(positions: pd.DataFrame, counts: csr_array | None = None) -> Spots:
    x, y, array_row, array_col = (
        positions[name].to_numpy() for name in ("pxl_col_in_fullres", "pxl_row_in_fullres", "array_row", "array_col")
    )
    return Spots(positions.index.to_numpy(object), x, y, array_row, array_col, counts)


def _read_h5(path: str) -> tuple[list[str], tuple[Gene, ...], csr_array]:
    with file_errors(path, "count matrix of Space Ranger"), h5py.File(path, "r") as file:
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
        barcodes = [line for line in _text(files["barcodes"]).splitlines() if line]
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
        lines = [line.split("\t") for line in _text(path).splitlines()]
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


def _read_positions(path: str) -> pd.DataFrame:
    """Returns `_NUMBERS` as float64 by barcode."""
    with file_errors(path, "table of tissue positions"):
        table, unit = (_parquet(path), "row") if path.endswith(".parquet") else (_csv(path), "line")
        missing = [name for name in _POSITION_COLUMNS if name not in table]
        if missing:
            raise SourceError(f"it has no column {', '.join(missing)}; it has {', '.join(table.columns)}")
        if table.empty:
            raise SourceError("it has no spots")
        number = table[[*_NUMBERS]].apply(pd.to_numeric, errors="coerce").astype(np.float64)
        _require_numbers(table, number, unit)
        require_unique(table["barcode"].tolist(), "barcode")
        return number.set_axis(table["barcode"].to_numpy(object))


def _require_numbers(table: pd.DataFrame, number: pd.DataFrame, unit: str) -> None:
    wrong = ~np.isfinite(number.to_numpy())
    wrong[:, 0] |= ~number["in_tissue"].isin([0, 1]).to_numpy()
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        name = _NUMBERS[column]
        allowed = "0 or 1" if name == "in_tissue" else "a number"
        raise SourceError(
            f"{unit} {table.index[row]}, column {name}: got {table[name].iloc[row]!r}, allowed: {allowed}"
        )


def _csv(path: str) -> pd.DataFrame:
    """Returns the cells as text by line number; the first cell of a header (v2) is `barcode`."""
    lines = {number: cells for number, cells in enumerate(csv.reader(_text(path).splitlines()), 1) if cells}
    header = list(_POSITION_COLUMNS)
    if lines and (first := next(iter(lines.items())))[1][0] == "barcode":
        header = lines.pop(first[0])
    for number, cells in lines.items():
        if len(cells) != len(header):
            raise SourceError(f"line {number} has {len(cells)} cells, expected {len(header)}: {', '.join(header)}")
    return pd.DataFrame(list(lines.values()), index=list(lines), columns=header, dtype=str)


def _parquet(path: str) -> pd.DataFrame:
    table = pq.read_table(path).to_pandas(ignore_metadata=True)
    return table.set_axis(range(1, len(table) + 1))


def _read_scale(paths: Mapping[str, str]) -> Scale:
    with file_errors(paths["scalefactors"], "JSON file of scale factors"):
        tree = json.loads(_text(paths["scalefactors"]))
        if not isinstance(tree, dict) or "spot_diameter_fullres" not in tree:
            raise SourceError("it has no spot_diameter_fullres")
        named = [f"tissue_{part}_scalef" for part in PICTURES]
        found = {name: tree.get(name) for name in ("spot_diameter_fullres", "microns_per_pixel", *named)}
        for name, value in found.items():
            if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise SourceError(f"{name} is {value!r}; allowed is a number above 0")
    pictures = [
        _picture(paths[part], scale)
        for part, name in zip(PICTURES, named, strict=True)
        if part in paths and (scale := found[name])
    ]
    return Scale(found["microns_per_pixel"], float(tree["spot_diameter_fullres"]), tuple(pictures))


def _picture(path: str, scale: float) -> Picture:
    """Reads the size of a picture; its pixels stay unread."""
    with file_errors(path, "picture of the slide"), Image.open(path) as picture:
        return Picture(Path(path).name, picture.width, picture.height, scale)


def _text(path: str) -> str:
    """Returns a text file, decompressed if its name ends with .gz."""
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        text = file.read(_MAX_TEXT_CHARS + 1)
    if len(text) > _MAX_TEXT_CHARS:
        raise SourceError(f"it holds more than {_MAX_TEXT_CHARS} characters")
    return text
