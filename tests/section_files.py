"""Writes one section (`any_section`) in each format, in the many ways that people write it; no code of the product.

Every file has its own order of spots, genes and columns. Each `write_*` returns the cells of its row of the sheet.
"""

import gzip
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import tifffile
from any_section import NO_COUNTS, NO_POSITION, NOT_SELECTED, OTHERS, AnySection
from PIL import Image
from scipy import sparse
from scipy.io import mmwrite
from slide_files import write_pyramid

ID_STYLES = ("plain", "version", "genome")
"""A stable id as it is, with a version, or with the genome before it."""


@dataclass(frozen=True)
class ImageForm:
    """How an image is stored."""

    kind: str = "png"
    """`png`, `jpeg`, `tiff`, `pyramid` or `ome`."""
    states_mpp: bool = False
    """In TIFF files."""


@dataclass(frozen=True)
class LegacyForm:
    """Counts and selection of legacy ST."""

    names: str = "symbol"
    """Of genes: `id` or `symbol`."""
    ids: str = "plain"
    corner: str | None = ""
    """Name of the index column; None leaves it out."""
    columns: tuple[str, ...] = ("x", "y", "new_x", "new_y", "pixel_x", "pixel_y", "selected")
    packed: bool = True
    others: bool = False


@dataclass(frozen=True)
class VisiumForm:
    """Space Ranger's folder."""

    matrix: str = "h5"
    """`h5`, `mtx`, or `genes` (Matrix Market with a genes.tsv of two columns)."""
    ids: str = "plain"
    positions: str = "tissue_positions.csv"
    columns: tuple[str, ...] = ("in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
    """After the barcode, where there is a header."""
    outs: bool = False
    pictures: tuple[str, ...] = ()
    """`hires`, `lowres`."""
    others: bool = False


@dataclass(frozen=True)
class H5adForm:
    """An AnnData file."""

    counts_in: str = "X"
    """`X`, `layers` or `raw`; X then holds logarithms."""
    matrix: str = "csr"
    """`csr`, `csc` or `dense`."""
    index: str = "symbol"
    """Names of genes in var's index: `symbol` or `id`."""
    beside: str | None = "gene_ids"
    """Column with the other names; None leaves it out."""
    ids: str = "plain"
    spatial: tuple[str, str] | None = None
    """obsm["spatial"] as a frame with these names of x and y, in reverse order; None: an array x, y."""
    tissue: str = "int"
    """Kind of in_tissue: `int`, `bool`, `float` or `text`."""
    array: bool = True
    uns: str | None = "visium"
    """`visium`, `hest` or None."""
    others: bool = False


Form = LegacyForm | VisiumForm | H5adForm


def gene_names(genes: Sequence[tuple[str, str]], style: str) -> tuple[list[str], list[str]]:
    """Returns ids and symbols as a file of that style has them."""
    ids, symbols = ([gene[part] for gene in genes] for part in (0, 1))
    if style == "version":
        return [f"{name}.{number}" for number, name in enumerate(ids, 2)], symbols
    if style == "genome":
        return [f"GRCh38_{name}" for name in ids], [f"GRCh38_{name}" for name in symbols]
    return ids, symbols


def write_section(
    section: AnySection,
    folder: Path,
    name: str,
    form: Form,
    image: ImageForm | None = None,
    seed: int = 0,
    pixels: np.ndarray | None = None,
    **cells: object,
) -> dict[str, object]:
    """Writes a section's files in a folder of its own and returns its row of the sheet.

    Args:
        section: the section.
        folder: the sheet's.
        name: id of the section.
        form: of counts and positions.
        image: form of the image; PNG by default.
        seed: of what the files leave open.
        pixels: another image than the section's, uint8 (h, w, 3).
        cells: other cells of the row.
    """
    own = folder / name
    own.mkdir()
    written = _WRITERS[type(form)](section, own, form, seed)
    files = {column: f"{name}/{file}" for column, file in written.items() if column != "format"}
    shown = section if pixels is None else section.with_(pixels=pixels)
    files["image"] = f"{name}/{write_image(shown, own, 'image', image or ImageForm())}"
    row = {"section_id": name, "patient_id": "P", "format": written["format"], "positions": ""}
    return row | {"mpp": "", "pitch_um": "", "spot_diameter_um": ""} | files | cells


def write_image(section: AnySection, folder: Path, name: str, form: ImageForm) -> str:
    """Writes the image and returns its name."""
    tags = {"resolution": (1e4 / section.mpp,) * 2, "resolutionunit": "CENTIMETER"} if form.states_mpp else {}
    if form.kind in ("png", "jpeg"):
        path = folder / f"{name}.{form.kind}"
        options = {"quality": 100, "subsampling": 0} if form.kind == "jpeg" else {"compress_level": 1}
        Image.fromarray(section.pixels).save(path, **options)
    elif form.kind == "pyramid":
        path = folder / f"{name}.tif"
        write_pyramid(path, section.pixels, num_levels=2, mpp=section.mpp if form.states_mpp else None)
    elif form.kind == "ome":
        path = folder / f"{name}.ome.tif"
        _write_ome(path, section, form.states_mpp)
    else:
        path = folder / f"{name}.tiff"
        tifffile.imwrite(path, section.pixels, photometric="rgb", compression="deflate", **tags)
    return path.name


def _write_ome(path: Path, section: AnySection, states_mpp: bool) -> None:
    """A pyramid in sub-IFDs, with the resolution in the OME-XML alone, in nanometres."""
    size = {f"PhysicalSize{axis}": section.mpp * 1000 for axis in "XY"} if states_mpp else {}
    size |= {f"PhysicalSize{axis}Unit": "nm" for axis in "XY"} if states_mpp else {}
    options = {"tile": (128, 128), "photometric": "rgb", "compression": "deflate"}
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(section.pixels, subifds=1, metadata={"axes": "YXS", **size}, **options)
        file.write(section.pixels[::2, ::2], subfiletype=1, **options)


def write_legacy(section: AnySection, folder: Path, form: LegacyForm, seed: int = 0) -> dict[str, object]:
    """Writes counts and selection; a spot without position is missing from the selection."""
    rng = np.random.default_rng(seed)
    ids, symbols = gene_names(section.genes, form.ids)
    names, counts = _features(section, ids if form.names == "id" else symbols, form.others)
    genes = rng.permutation(len(names))
    counted = _counted(section, rng)
    header = [*([] if form.corner is None else [form.corner]), *(names[gene] for gene in genes)]
    lines = ["\t".join(header)]
    for spot in counted:
        near = f"{section.col[spot] + rng.choice([0, 0.04])}x{section.row[spot]}".replace(".0x", "x")
        lines.append("\t".join([near, *map(str, counts[spot, genes])]))
    end = ".gz" if form.packed else ""
    _write(folder / f"counts.tsv{end}", "\n".join(lines) + "\n")
    table = pd.DataFrame({"x": section.col, "y": section.row, "new_x": section.col + 0.03, "new_y": section.row - 0.02})
    table = table.assign(pixel_x=section.x, pixel_y=section.y, selected=(section.fate != NOT_SELECTED).astype(int))
    listed = _shuffled(np.flatnonzero(section.fate != NO_POSITION), rng)
    text = table.iloc[listed][[*form.columns]].to_csv(sep="\t", index=False)
    _write(folder / f"selection.tsv{end}", text)
    return {"format": "legacy_st", "expression": f"counts.tsv{end}", "positions": f"selection.tsv{end}"}


def write_visium(section: AnySection, folder: Path, form: VisiumForm, seed: int = 0) -> dict[str, object]:
    """Writes Space Ranger's folder; a spot without position is missing from the positions."""
    rng = np.random.default_rng(seed)
    outs = folder / "outs" if form.outs else folder
    (outs / "spatial").mkdir(parents=True, exist_ok=True)
    ids, symbols = gene_names(section.genes, form.ids)
    features, counts = _features(section, ids, form.others)
    names = [*symbols, *features[len(symbols) :]]
    kinds = [*["Gene Expression"] * len(ids), *(kind for _, kind in OTHERS)][: len(features)]
    genes, counted = rng.permutation(len(features)), _counted(section, rng)
    columns = [[column[gene] for gene in genes] for column in (features, names, kinds)]
    matrix = sparse.csr_matrix(counts[np.ix_(counted, genes)])
    barcodes = [section.barcodes[spot] for spot in counted]
    if form.matrix == "h5":
        _write_h5(outs / "filtered_feature_bc_matrix.h5", matrix, columns, barcodes)
    else:
        _write_mtx(outs / "filtered_feature_bc_matrix", matrix, columns, barcodes, form.matrix == "genes")
    listed = _shuffled(np.flatnonzero(section.fate != NO_POSITION), rng)
    _write_positions(section, outs / "spatial" / form.positions, listed, form.columns)
    scale = {"spot_diameter_fullres": section.spot_um / section.mpp}
    for step, name in enumerate(form.pictures, 2):
        scale[f"tissue_{name}_scalef"] = 1 / step
        Image.fromarray(_picture(section, step)).save(outs / "spatial" / f"tissue_{name}_image.png")
    (outs / "spatial/scalefactors_json.json").write_text(json.dumps(scale))
    return {"format": "visium", "expression": "."}


def _write_h5(path: Path, matrix: sparse.csr_matrix, columns: list[list[str]], barcodes: list[str]) -> None:
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
        group["shape"] = matrix.shape[::-1]
        group["barcodes"] = np.array(barcodes, "S32")
        for name, values in zip(("id", "name", "feature_type"), columns, strict=True):
            group[f"features/{name}"] = np.array(values, "S64")


def _write_mtx(
    folder: Path, matrix: sparse.csr_matrix, columns: list[list[str]], barcodes: list[str], old: bool
) -> None:
    folder.mkdir()
    mmwrite(folder / "matrix.mtx", matrix.T.tocoo())
    lines = ["\t".join(cells) for cells in zip(*columns[: 2 if old else 3], strict=True)]
    _write(folder / ("genes.tsv" if old else "features.tsv.gz"), "\n".join(lines) + "\n")
    _write(folder / ("barcodes.tsv" if old else "barcodes.tsv.gz"), "\n".join(barcodes) + "\n")


def _write_positions(section: AnySection, path: Path, listed: np.ndarray, columns: Sequence[str]) -> None:
    table = pd.DataFrame({"barcode": section.barcodes, "in_tissue": (section.fate != NOT_SELECTED).astype(int)})
    table = table.assign(array_row=section.row, array_col=section.col)
    table = table.assign(pxl_row_in_fullres=section.y, pxl_col_in_fullres=section.x).iloc[listed]
    if path.suffix == ".parquet":
        table[["barcode", *columns]].to_parquet(path)
    elif "list" in path.name:
        _write(path, table.to_csv(index=False, header=False))
    else:
        _write(path, table[["barcode", *columns]].to_csv(index=False))


def write_h5ad(section: AnySection, folder: Path, form: H5adForm, seed: int = 0) -> dict[str, object]:
    """Writes an AnnData file; a spot without position has NaN there."""
    rng = np.random.default_rng(seed)
    spots = rng.permutation(len(section))
    ids, symbols = gene_names(section.genes, form.ids)
    features, counts = _features(section, ids, form.others)
    names = [*symbols, *features[len(symbols) :]]
    genes = rng.permutation(len(features))
    index, other = (features, names) if form.index == "id" else (names, features)
    var = pd.DataFrame({form.beside: other} if form.beside else {}, index=index)
    if form.others:
        var["feature_types"] = pd.Categorical(["Gene Expression"] * len(ids) + [kind for _, kind in OTHERS])
    kind = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}[form.matrix]
    matrix = counts[np.ix_(spots, genes)].astype(np.float32)
    whole = anndata.AnnData(kind(matrix), _obs(section, form, spots), var.iloc[genes])
    data = whole if form.counts_in == "X" else anndata.AnnData(kind(np.log1p(matrix)), whole.obs, whole.var)
    if form.counts_in == "layers":
        data.layers["counts"] = whole.X
    elif form.counts_in == "raw":
        data.raw = whole
        data = data[:, : len(genes) // 2].copy()
    xy = np.stack([section.x, section.y], axis=1)
    xy[section.fate == NO_POSITION] = np.nan
    data.obsm["spatial"] = xy[spots]
    if form.spatial is not None:
        data.obsm["spatial"] = pd.DataFrame(xy[spots], data.obs.index, [*form.spatial])[[*form.spatial[::-1]]]
    if form.uns is not None:
        data.uns["spatial"] = {"L1": _uns(section, form.uns)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # symbols may repeat
        data.write_h5ad(folder / "section.h5ad")
    return {"format": "h5ad", "expression": "section.h5ad"}


def _obs(section: AnySection, form: H5adForm, spots: np.ndarray) -> pd.DataFrame:
    selected = section.fate != NOT_SELECTED
    text = pd.Categorical(np.where(selected, "True", "False"))
    obs = pd.DataFrame({"in_tissue": text if form.tissue == "text" else selected.astype(form.tissue)})
    if form.array:
        obs = obs.assign(array_row=section.row, array_col=section.col)
    if form.uns == "hest":
        obs = obs.assign(pxl_col_in_fullres=section.x, pxl_row_in_fullres=section.y)
    return obs.set_axis(section.barcodes).iloc[spots]


def _uns(section: AnySection, kind: str) -> dict[str, dict[str, object]]:
    name, factor = {
        "visium": ("hires", "tissue_hires_scalef"),
        "hest": ("downscaled_fullres", "tissue_downscaled_fullres_scalef"),
    }[kind]
    scale = {factor: 0.5, "spot_diameter_fullres": section.spot_um / section.mpp}
    return {"images": {name: _picture(section, 2)}, "scalefactors": scale}


def _features(section: AnySection, names: list[str], others: bool) -> tuple[list[str], np.ndarray]:
    """Returns names of genes, perhaps with features that are none, and counts, int (n, features)."""
    if not others:
        return names, section.counts
    return [*names, *(name for name, _ in OTHERS)], np.hstack([section.counts, section.other_counts])


def _counted(section: AnySection, rng: np.random.Generator) -> np.ndarray:
    """Returns the spots in a file of counts: of those without counts or off the tissue it may leave some out."""
    may_miss = np.isin(section.fate, [NO_COUNTS, NOT_SELECTED])
    return _shuffled(np.flatnonzero(~may_miss | (rng.random(len(section)) < 0.5)), rng)


def _shuffled(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return values[rng.permutation(len(values))]


def _picture(section: AnySection, step: int) -> np.ndarray:
    """Returns the image shrunk by a whole number, uint8 (h, w, 3)."""
    height, width = section.pixels.shape[:2]
    return np.asarray(Image.fromarray(section.pixels).resize((round(width / step), round(height / step))))


def _write(path: Path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode(), 1) if path.suffix == ".gz" else text.encode())


_WRITERS = {LegacyForm: write_legacy, VisiumForm: write_visium, H5adForm: write_h5ad}
