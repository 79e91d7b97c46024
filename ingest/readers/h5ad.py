"""Reader of AnnData files (`.h5ad`), those of HEST and scanpy included.

Only the necessary parts are read: counts, names and `obsm["spatial"]` (x, y in full-resolution pixels). Counts come
from `layers["counts"]`, else `raw`, else `X`; these must be raw counts, since no transformation is undone or rounded.
"""

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from scipy.sparse import csr_array

from ingest.readers.features import Features, named_features
from ingest.readers.spots import (
    Expression,
    Layout,
    Picture,
    Preview,
    Scale,
    Spots,
    file_errors,
    require_positions,
    require_unique,
    split_usable,
)
from mclstexp.data.sheet import SectionRow
from mclstexp.errors import SourceError

_ID_COLUMNS = ("gene_ids", "gene_id", "ensembl_id", "ensembl_ids", "ensembl", "ensembl_gene_id", "feature_id", "id")
_SYMBOL_COLUMNS = (
    *("gene_symbols", "gene_symbol", "symbol", "symbols", "gene_name", "gene_names", "feature_name", "gene_short_name"),
    *("hgnc_symbol", "mgi_symbol", "external_gene_name", "gene", "genes", "features"),
)
_KIND_COLUMNS = ("feature_types", "feature_type")
"""Columns of `var`, in any case and with or without underscores."""


def preview(paths: Mapping[str, str], row: SectionRow) -> Preview:
    """Returns genes and layout of the local AnnData file `expression`."""
    with _opened(paths["expression"]) as file:
        obs: pd.DataFrame = _part(file, "obs")
        features = _features(file)
        return Preview(features.genes, features.left_out, _layout(file, obs))


def read(paths: Mapping[str, str], row: SectionRow) -> Expression:
    """Returns a section from the local AnnData file `expression`.

    Raises:
        SourceError: it is damaged, has no counts or positions, or values that are not counts; names gene and spot.
    """
    with _opened(paths["expression"]) as file:
        obs: pd.DataFrame = _part(file, "obs")
        features = _features(file)
        spot_ids = [str(name) for name in obs.index]
        require_unique(spot_ids, "spot")
        counts = features.counts(_matrix(file, (len(spot_ids), len(features.gene_of))), spot_ids)
        spots = Spots(np.array(spot_ids, object), *_pixels(file, spot_ids), *_array(obs), counts)
        require_positions(spots)
        selected = (
            obs["in_tissue"].astype(float).fillna(0).to_numpy() != 0
            if "in_tissue" in obs
            else np.ones(len(spots), bool)
        )
        usable, rejected = split_usable(spots, selected)
        return Expression(usable, features.genes, tuple(sorted(rejected)), _layout(file, obs))


def _counts_at(file: h5py.File) -> tuple[str, str]:
    """Returns where the file has its counts and their genes."""
    if "layers/counts" in file:
        return "layers/counts", "var"
    return ("raw/X", "raw/var") if "raw/X" in file else ("X", "var")


def _matrix(file: h5py.File, shape: tuple[int, int]) -> csr_array:
    where, _ = _counts_at(file)
    node = _present(file, where)
    claimed = tuple(map(int, node.shape if isinstance(node, h5py.Dataset) else node.attrs["shape"]))
    if claimed != shape:
        raise SourceError(f"{where} is {claimed}, but there are names for {shape} spots x genes")
    return csr_array(_part(file, where))


def _features(file: h5py.File) -> Features:
    var: pd.DataFrame = _part(file, _counts_at(file)[1])
    names = _texts(var.index)
    ids, symbols, kinds = (_first_column(var, columns) for columns in (_ID_COLUMNS, _SYMBOL_COLUMNS, _KIND_COLUMNS))
    if not kinds:  # `raw` may have names alone
        whole: pd.DataFrame = _part(file, "var")
        kind_of = dict(zip(_texts(whole.index), _first_column(whole, _KIND_COLUMNS), strict=False))
        kinds = [kind_of.get(name, "") for name in names]
    if symbols and not _are_made_of(names, symbols):
        ids = ids or names
        names = [symbol or name for symbol, name in zip(symbols, names, strict=True)]
    return named_features(names, ids, kinds)


def _are_made_of(names: list[str], symbols: list[str]) -> bool:
    """Returns whether the index holds the symbols as well, perhaps made unique (`TBCE-1`), and not ids."""
    return all(
        symbol in ("", name) or name.startswith((f"{symbol}-", f"{symbol}."))
        for name, symbol in zip(names, symbols, strict=True)
    )


def _first_column(var: pd.DataFrame, names: tuple[str, ...]) -> list[str]:
    """Returns the cells of the first of these columns, empty where one is missing; no cells without such a column.

    Joined files have several, such as `gene_ids-0` and `gene_ids-1`, each filled for the genes of one of them.
    """
    columns = [_plain(str(column)) for column in var.columns]
    found = next((_plain(name) for name in names if _plain(name) in columns), None)
    cells = [_texts(var.iloc[:, i]) for i, column in enumerate(columns) if column == found]
    return [next(filter(None, row), "") for row in zip(*cells, strict=True)]


def _texts(values: Iterable[Any]) -> list[str]:
    return ["" if pd.isna(value) else str(value) for value in values]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def _pixels(file: h5py.File, spot_ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    xy_px = np.asarray(_part(file, "obsm/spatial"), np.float64)
    if xy_px.ndim != 2 or xy_px.shape[0] != len(spot_ids) or xy_px.shape[1] < 2:
        raise SourceError(f"obsm['spatial'] is {xy_px.shape}, expected ({len(spot_ids)}, 2): x, y in pixels")
    return xy_px[:, 0], xy_px[:, 1]


def _array(obs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Returns array row and column, float64 (n,); NaN if the file has none."""
    names = ("array_row", "array_col")
    if not all(name in obs for name in names):
        return np.full(len(obs), np.nan), np.full(len(obs), np.nan)
    row, column = (np.rint(pd.to_numeric(obs[name], errors="coerce").to_numpy(np.float64)) for name in names)
    return row, column


def _layout(file: h5py.File, obs: pd.DataFrame) -> Layout:
    spot_ids = [str(name) for name in obs.index]
    return Spots(np.array(spot_ids, object), *_pixels(file, spot_ids), *_array(obs)).layout(_scale(file))


def _scale(file: h5py.File) -> Scale:
    """Returns what `uns["spatial"]` states of the section; of several libraries, nothing."""
    spatial = file.get("uns/spatial", {})
    libraries = [node for node in spatial.values() if isinstance(node, h5py.Group)]
    if len(libraries) != 1:
        return Scale()
    factors = {name: _factor(node) for name, node in libraries[0].get("scalefactors", {}).items()}
    pictures = [
        Picture(f"uns['spatial'] image {name}", node.shape[1], node.shape[0], scale)
        for name, node in libraries[0].get("images", {}).items()
        if (scale := 1.0 if name == "fullres" else factors.get(f"tissue_{name}_scalef"))
        and isinstance(node, h5py.Dataset)
        and node.ndim > 1
    ]
    return Scale(factors.get("microns_per_pixel"), factors.get("spot_diameter_fullres"), tuple(pictures))


def _factor(node: h5py.Group | h5py.Dataset) -> float | None:
    """Returns a scale factor; None for anything but a number above 0, since writers fill in what they do not know."""
    try:
        value = float(np.asarray(read_elem(node)).item())
    except (TypeError, ValueError):
        return None
    return value if 0 < value < math.inf else None


def _part(file: h5py.File, where: str) -> Any:
    return read_elem(_present(file, where))


def _present(file: h5py.File, where: str) -> h5py.Group | h5py.Dataset:
    if where not in file:
        raise SourceError(f"it has no {where}")
    return file[where]


@contextmanager
def _opened(path: str) -> Iterator[h5py.File]:
    with file_errors(path, "AnnData file"), warnings.catch_warnings(), h5py.File(path, "r") as file:
        warnings.simplefilter("ignore")  # anndata on files of older versions
        yield file
