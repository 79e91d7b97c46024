"""Reader of AnnData files (`.h5ad`), those of HEST and scanpy included.

Only the necessary parts are read: counts, names and `obsm["spatial"]` (x, y in full-resolution pixels). Counts come
from `layers["counts"]`, else `raw`, else `X`; these must be raw counts, since no transformation is undone or rounded.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import h5py
import pandas as pd
from scipy.sparse import csr_array

from ingest.readers.features import Features, named_features
from ingest.readers.h5ad_file import opened, part, present
from ingest.readers.h5ad_spots import placed_spots
from ingest.readers.spots import Expression, Preview, require_unique, split_usable
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
    """Returns genes and layout of a section in the local AnnData file `expression`."""
    with opened(paths["expression"]) as file:
        placed, features = placed_spots(file, row.library_id), _features(file)
        return Preview(features.genes, features.left_out, placed.layout, placed.remarks)


def read(paths: Mapping[str, str], row: SectionRow) -> Expression:
    """Returns a section from the local AnnData file `expression`.

    Raises:
        SourceError: it is damaged, has no counts or positions, or values that are not counts; names gene and spot.
    """
    with opened(paths["expression"]) as file:
        placed, features = placed_spots(file, row.library_id), _features(file)
        spot_ids = placed.spots.spot_id.tolist()
        require_unique(spot_ids, "spot")
        values = _matrix(file, (len(placed.chosen), len(features.gene_of)))
        spots = replace(placed.spots, counts=features.counts(values[placed.chosen], spot_ids))
        usable, rejected = split_usable(spots, placed.selected)
        return Expression(usable, features.genes, tuple(sorted(rejected)), placed.layout)


def _counts_at(file: h5py.File) -> tuple[str, str]:
    """Returns where the file has its counts and their genes."""
    if "layers/counts" in file:
        return "layers/counts", "var"
    return ("raw/X", "raw/var") if "raw/X" in file else ("X", "var")


def _matrix(file: h5py.File, shape: tuple[int, int]) -> csr_array:
    where, _ = _counts_at(file)
    node = present(file, where)
    claimed = tuple(map(int, node.shape if isinstance(node, h5py.Dataset) else node.attrs["shape"]))
    if claimed != shape:
        raise SourceError(f"{where} is {claimed}, but there are names for {shape} spots x genes")
    return csr_array(part(file, where))


def _features(file: h5py.File) -> Features:
    var: pd.DataFrame = part(file, _counts_at(file)[1])
    names = _texts(var.index)
    ids, kinds = (_first_column(var, columns) for columns in (_ID_COLUMNS, _KIND_COLUMNS))
    symbols = _symbols(var)
    if not kinds:  # `raw` may have names alone
        whole: pd.DataFrame = part(file, "var")
        kind_of = dict(zip(_texts(whole.index), _first_column(whole, _KIND_COLUMNS), strict=False))
        kinds = [kind_of.get(name, "") for name in names]
    if symbols and not _are_made_of(names, symbols):
        ids = [own or name for own, name in zip(ids or names, names, strict=True)]
        names = [symbol or name for symbol, name in zip(symbols, names, strict=True)]
    return named_features(names, ids, kinds)


def _are_made_of(names: list[str], symbols: list[str]) -> bool:
    """Returns whether the index holds the symbols as well, perhaps made unique (`TBCE-1`), and not ids."""
    return all(
        symbol in ("", name) or name.startswith((f"{symbol}-", f"{symbol}."))
        for name, symbol in zip(names, symbols, strict=True)
    )


def _symbols(var: pd.DataFrame) -> list[str]:
    """Returns the column of symbols; none if its cells are numbers, yes and no, or mostly alike, whatever its name."""
    cells = _first_column(var.select_dtypes(exclude=["number", "bool"]), _SYMBOL_COLUMNS)
    filled = [cell for cell in cells if cell]
    return cells if 2 * len(set(filled)) > len(filled) else []


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
