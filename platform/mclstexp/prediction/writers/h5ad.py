"""A slide's prediction as an AnnData file that scanpy and squidpy draw over the slide.

AnnData's own writer needs the whole matrix; this one appends group by group to growing HDF5 datasets in AnnData's
on-disk format (https://anndata.readthedocs.io/en/stable/fileformat-prose.html), so that memory does not grow with
the slide. The price is that the format's encodings are written out here.
"""

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
from anndata.io import write_elem

from mclstexp.prediction.parts import PART_TILES
from mclstexp.prediction.writers.gather import GROUP_TILES
from mclstexp.prediction.writers.slide import OutputInfo, PredictedSlide, provenance, tile_edge
from mclstexp.prediction.writers.table import SCALE, row_groups, spot_schema, table_schema

_INDEX = "spot_id"
_CHUNK_GENES = 1024
_PACKED = {"compression": "gzip"}
_VERSIONS = {"array": "0.2.0", "string-array": "0.2.0", "categorical": "0.2.0", "dataframe": "0.2.0"}


def write_h5ad(path: Path, slide: PredictedSlide) -> None:
    """Writes an AnnData file of the slide's table.

    X float32 (n, G); obs by spot id with the table's other columns; var by gene id with symbol and ensembl_id;
    obsm["spatial"] float64 (n, 2) in level-0 pixels; uns["prediction"] with `provenance`; uns["spatial"][slide_id]
    in the layout of Space Ranger's readers, with a tile's edge as the spot diameter. A calibrated model adds what it
    knows of each gene to var (`trust.parquet` of the version) and, if `slide.info.intervals`, the ends of intervals as
    layers `lower` and `upper`, float32 (n, G).

    Args:
        path: local file to write.
        slide: its table is written.
    """
    record = slide.record
    with h5py.File(path, "w") as file:
        _mark(file, "anndata", "0.1.0")
        obs, obsm = file.create_group("obs"), file.create_group("obsm")
        _mark(obs, "dataframe")
        _mark(obsm, "dict", "0.1.0")
        obs.attrs.update(
            {"_index": _INDEX, "column-order": [name for name in spot_schema(slide.info).names if name != _INDEX]}
        )
        for name, constant in (("section_id", record.slide_id), ("patient_id", record.patient_id)):
            _create_constant(obs, name, constant)
        _append_rows(file, table_schema(slide.info).empty_table(), slide.info)  # makes all datasets, even without a row
        for rows in row_groups(slide.table):
            _append_rows(file, rows, slide.info)
        write_elem(file, "var", _genes(slide.info))
        write_elem(file, "uns", _unstructured(slide), dataset_kwargs=_PACKED)
        for name in ("layers", "obsp", "varm", "varp"):
            if name not in file:
                write_elem(file, name, {})


def published_thumbnail(path: Path, slide_id: str) -> np.ndarray:
    """Returns the picture of a slide, uint8 (height, width, 3), from the file that `write_h5ad` wrote."""
    with h5py.File(path) as file:
        return np.asarray(file["uns"]["spatial"][slide_id]["images"]["hires"])


def _append_rows(file: h5py.File, rows: pa.Table, info: OutputInfo) -> None:
    expression = _matrix(rows, list(info.panel.gene_id))
    _append(file, "X", expression)
    if info.intervals and info.calibration is not None:
        half_width = rows[SCALE].to_numpy()[:, None] * info.calibration.half_width
        layers = file.require_group("layers")
        _mark(layers, "dict", "0.1.0")
        _append(layers, "lower", (expression - half_width).astype(np.float32))
        _append(layers, "upper", (expression + half_width).astype(np.float32))
    _append(file["obsm"], "spatial", _matrix(rows, ["x_px", "y_px"]))
    for field in spot_schema(info):
        _append_column(file["obs"], field.name, rows[field.name])


def _genes(info: OutputInfo) -> pd.DataFrame:
    """Returns what is known of each gene, by gene id."""
    panel, columns = info.panel, {"symbol": info.panel.symbol, "ensembl_id": info.panel.ensembl_id}
    if info.calibration is None:
        return pd.DataFrame(columns, index=list(panel.gene_id))
    return pd.DataFrame(columns | info.calibration.columns(), index=list(panel.gene_id))


def _matrix(rows: pa.Table, columns: list[str]) -> np.ndarray:
    return np.stack([rows[name].to_numpy() for name in columns], axis=1)


def _append_column(obs: h5py.Group, name: str, values: pa.ChunkedArray) -> None:
    """Appends to a column of the data frame; integers and booleans may be missing."""
    if name == _INDEX:
        _append(obs, name, values.to_numpy())
    elif pa.types.is_string(values.type):
        _append(obs[name], "codes", np.zeros(len(values), np.int8))
    elif pa.types.is_floating(values.type):
        _append(obs, name, values.to_numpy())
    else:
        kind, filler = ("boolean", False) if pa.types.is_boolean(values.type) else ("integer", -1)
        group = obs.require_group(name)
        _mark(group, f"nullable-{kind}", "0.1.0")
        _append(group, "values", values.fill_null(filler).to_numpy())
        _append(group, "mask", values.is_null().to_numpy())


def _create_constant(obs: h5py.Group, name: str, value: str) -> None:
    """Makes a categorical column with a single category."""
    group = obs.create_group(name)
    _mark(group, "categorical")
    group.attrs["ordered"] = False
    _append(group, "categories", np.array([value], object))


def _append(group: h5py.Group, name: str, values: np.ndarray) -> None:
    """Appends to a dataset along its first axis, and makes it if there is none."""
    data = group[name] if name in group else _create(group, name, values)
    if len(values):
        data.resize(len(data) + len(values), axis=0)
        data[len(data) - len(values) :] = values


def _create(group: h5py.Group, name: str, like: np.ndarray) -> h5py.Dataset:
    """Makes an empty dataset of the type and width of an array, in chunks of about 1 MB at most."""
    is_text = like.dtype == object
    chunks = (PART_TILES, min(like.shape[1], _CHUNK_GENES)) if like.ndim == 2 else (GROUP_TILES,)
    sizes = {"shape": (0, *like.shape[1:]), "maxshape": (None, *like.shape[1:]), "chunks": chunks}
    data = group.create_dataset(name, dtype=h5py.string_dtype() if is_text else like.dtype, **sizes, **_PACKED)
    _mark(data, "string-array" if is_text else "array")
    return data


def _mark(element: h5py.Group | h5py.Dataset, encoding: str, version: str = "") -> None:
    element.attrs.update({"encoding-type": encoding, "encoding-version": version or _VERSIONS[encoding]})


def _unstructured(slide: PredictedSlide) -> dict[str, object]:
    record = slide.record
    factors = {
        "tissue_hires_scalef": 1 / record.thumbnail_scale,
        "spot_diameter_fullres": tile_edge(slide),
    }
    return {
        "prediction": provenance(slide) | {"spatial_unit": "px at slide level 0"},
        "spatial": {record.slide_id: {"images": {"hires": slide.thumbnail}, "scalefactors": factors}},
    }
