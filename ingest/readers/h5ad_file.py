"""Access to an AnnData file by its parts, so that only what is needed is read.

Files of before anndata 0.7 have their tables as compound data sets. anndata itself reads them, but only as a whole;
they are therefore copied in memory in today's layout, which takes as much memory as the file holds data.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anndata
import h5py
from anndata.io import read_elem, write_elem

from ingest.readers.spots import opened_hdf5
from mclstexp.errors import SourceError

_TABLES = ("obs", "var", "obsm", "raw/var")


@contextmanager
def opened(path: str) -> Iterator[h5py.File]:
    """Yields a local AnnData file of any age in today's layout.

    Raises:
        SourceError: it is damaged, or anndata cannot read it; names the file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata on files of older versions
        with opened_hdf5(path, "file of AnnData") as file:
            if not _is_old(file):
                yield file
                return
            with h5py.File.in_memory() as copy:
                _copy(path, file, copy)
                yield copy


def part(file: h5py.File, where: str) -> Any:
    """Returns a part of the file, as anndata reads it.

    Raises:
        SourceError: the file lacks it, or anndata cannot read it.
    """
    node = present(file, where)
    try:
        return read_elem(node)
    except Exception as error:  # of any class, for example where a later anndata wrote what this one does not know
        raise SourceError(f"{where} cannot be read, it is damaged or of a later anndata: {error}") from error


def present(file: h5py.File, where: str) -> h5py.Group | h5py.Dataset:
    """Returns the node of a part.

    Raises:
        SourceError: the file lacks it.
    """
    if where not in file:
        raise SourceError(f"it has no {where}")
    return file[where]


def _is_old(file: h5py.File) -> bool:
    has_compounds = any(isinstance(file.get(name), h5py.Dataset) for name in _TABLES)
    return (
        has_compounds
        or "raw.X" in file
        or any("h5sparse_format" in file[name].attrs for name in ("X",) if name in file)
    )


def _copy(path: str, file: h5py.File, copy: h5py.File) -> None:
    """Copies the parts that are read."""
    data = anndata.read_h5ad(path)
    parts = {"obs": data.obs, "var": data.var, "X": data.X, "layers/counts": data.layers.get("counts")}
    parts |= {"obsm/spatial": data.obsm.get("spatial")}
    if data.raw is not None:
        parts |= {"raw/X": data.raw.X, "raw/var": data.raw.var}
    for where, values in parts.items():
        if values is not None:
            write_elem(copy, where, values)
    if isinstance(file.get("uns/spatial"), h5py.Group):
        file.copy("uns/spatial", copy.require_group("uns"))
