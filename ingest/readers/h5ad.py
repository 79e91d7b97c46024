"""Reader of AnnData files (`.h5ad`), those of HEST and scanpy included.

Only the parts that are needed are read: counts, names and `obsm["spatial"]` (x, y in full-resolution pixels). Counts
are taken from `layers["counts"]`, else `raw`, else `X`; that must hold raw counts, nothing is undone or rounded.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from scipy.sparse import csr_array

from ingest.readers.spots import (
    Expression,
    Gene,
    Spots,
    checked_counts,
    named_gene,
    naming,
    require_places,
    require_unique,
    split_usable,
)
from mclstexp.errors import SourceError

_ENSEMBL_COLUMNS = ("gene_ids", "gene_id", "ensembl_id", "ensembl")
_SYMBOL_COLUMNS = ("gene_symbols", "gene_symbol", "symbol", "gene_name", "feature_name")


def read_h5ad(path: str) -> Expression:
    """Returns a section from a local AnnData file.

    Raises:
        SourceError: it is damaged, lacks counts or positions, or holds values that are none; names gene and spot.
    """
    with _reading(path) as file:
        obs: pd.DataFrame = _part(file, "obs")
        genes = _genes(file)
        spot_ids = [str(name) for name in obs.index]
        require_unique(spot_ids, "spot")
        counts = checked_counts(_matrix(file, (len(spot_ids), len(genes))), spot_ids, genes)
        spots = Spots(np.array(spot_ids, object), *_pixels(file, spot_ids), *_array(obs), counts)
        require_places(spots)
        selected = (
            obs["in_tissue"].astype(float).fillna(0).to_numpy() != 0
            if "in_tissue" in obs
            else np.ones(len(spots), bool)
        )
        usable, rejected = split_usable(spots, selected)
        return Expression(usable, genes, tuple(sorted(rejected)))


def read_h5ad_genes(path: str) -> tuple[Gene, ...]:
    """Returns the genes of a local AnnData file."""
    with _reading(path) as file:
        return _genes(file)


def _counts_at(file: h5py.File) -> tuple[str, str]:
    """Returns where the counts and the genes' table lie."""
    if "layers/counts" in file:
        return "layers/counts", "var"
    return ("raw/X", "raw/var") if "raw/X" in file else ("X", "var")


def _matrix(file: h5py.File, shape: tuple[int, int]) -> csr_array:
    where, _ = _counts_at(file)
    node = _present(file, where)
    claimed = tuple(map(int, node.shape if isinstance(node, h5py.Dataset) else node.attrs["shape"]))
    if claimed != shape:
        raise SourceError(f"{where} is {claimed}, its names say {shape} spots x genes")
    return csr_array(_part(file, where))


def _genes(file: h5py.File) -> tuple[Gene, ...]:
    var: pd.DataFrame = _part(file, _counts_at(file)[1])
    ensembl, symbols = (_first_column(var, names) for names in (_ENSEMBL_COLUMNS, _SYMBOL_COLUMNS))
    genes = tuple(named_gene(*names) for names in zip(map(str, var.index), ensembl, symbols, strict=True))
    require_unique([gene.gene_id for gene in genes], "gene")
    return genes


def _first_column(var: pd.DataFrame, names: tuple[str, ...]) -> list[str]:
    found = next((name for name in names if name in var), None)
    if found is None:
        return [""] * len(var)
    return ["" if pd.isna(value) else str(value) for value in var[found]]


def _pixels(file: h5py.File, spot_ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    place = np.asarray(_part(file, "obsm/spatial"), np.float64)
    if place.ndim != 2 or place.shape[0] != len(spot_ids) or place.shape[1] < 2:
        raise SourceError(f"obsm['spatial'] is {place.shape}, expected ({len(spot_ids)}, 2): x, y in pixels")
    return place[:, 0], place[:, 1]


def _array(obs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Returns array row and column, NaN where the file has none."""
    names = ("array_row", "array_col")
    if not all(name in obs for name in names):
        return np.full(len(obs), np.nan), np.full(len(obs), np.nan)
    row, column = (np.rint(pd.to_numeric(obs[name], errors="coerce").to_numpy(np.float64)) for name in names)
    return row, column


def _part(file: h5py.File, where: str) -> Any:
    return read_elem(_present(file, where))


def _present(file: h5py.File, where: str) -> h5py.Group | h5py.Dataset:
    if where not in file:
        raise SourceError(f"it has no {where}")
    return file[where]


@contextmanager
def _reading(path: str) -> Iterator[h5py.File]:
    with naming(path, "AnnData file"), warnings.catch_warnings(), h5py.File(path, "r") as file:
        warnings.simplefilter("ignore")  # anndata on files of older versions
        yield file
