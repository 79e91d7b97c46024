"""AnnData files of before version 0.7, whose tables are compound data sets, of later ones, and packed ones."""

import gzip
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from h5ad_files import NUM_SPOTS, X, Y, make, require_right
from section_reading import read, refused
from visium_folders import SECTION

from ingest.readers.files import read_preview
from mclstexp.data.sheet import SectionRow

GENES = [("GNAS", "ENSG00000087460"), ("FASN", "ENSG00000169710")]


@pytest.fixture
def row(tmp_path):
    path = str(tmp_path / "a.h5ad")
    return SectionRow(section_id="S1", patient_id="P1", image=path, format="h5ad", expression=path)


def write_old(path, kind="csr", raw=False, attrs="h5sparse"):
    """A file as anndata 0.5 and 0.6 wrote it; with `raw`, X is scaled and the counts are in `raw.X`."""
    counts = make().X
    obs = list(
        zip([name.encode() for name in SECTION.barcode], [1] * 62 + [0] * 2, SECTION.row, SECTION.column, strict=True)
    )
    var = [tuple(text.encode() for text in gene) for gene in GENES]
    with h5py.File(path, "w") as file:
        file["obs"] = np.array(obs, [("index", "S16"), ("in_tissue", "i8"), ("array_row", "i8"), ("array_col", "i8")])
        file["var"] = np.array(var, [("index", "S16"), ("gene_ids", "S20")])
        file["obsm"] = np.array([((x, y),) for x, y in zip(X, Y, strict=True)], [("spatial", "f8", (2,))])
        if raw:
            file["raw.var"] = np.array(var, [("index", "S16"), ("gene_ids", "S20")])
            write_matrix(file, "raw.X", counts, kind, attrs)
        write_matrix(file, "X", np.log1p(counts) if raw else counts, kind, attrs)
        file["uns/spatial/S1/scalefactors/spot_diameter_fullres"] = 130.0


def write_matrix(file, name, values, kind, attrs):
    if kind == "dense":
        file[name] = values
        return
    matrix = {"csr": sp.csr_matrix, "csc": sp.csc_matrix}[kind](values)
    group = file.create_group(name)
    group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices, matrix.indptr
    group.attrs[f"{attrs}_format"], group.attrs[f"{attrs}_shape"] = kind, matrix.shape


@pytest.mark.odd
@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
@pytest.mark.parametrize("raw", [False, True])
def test_files_of_before_anndata_0_7(row, tmp_path, kind, raw):
    write_old(row.expression, kind, raw)
    found = read(row, tmp_path)
    require_right(found, range(62))
    assert [(reject.spot_id, reject.reason) for reject in found.rejected] == [
        (SECTION.barcode[i], "not_selected") for i in (62, 63)
    ]
    assert found.genes[0] == ("ENSG00000087460", "GNAS", "ENSG00000087460")
    preview = read_preview(row, str(tmp_path))
    assert preview.genes == found.genes
    assert preview.layout.spot_diameter_px == found.layout.spot_diameter_px == 130
    assert len(preview.layout.xy_px) == NUM_SPOTS


@pytest.mark.odd
def test_a_damaged_old_file_is_refused(row, tmp_path):
    write_old(row.expression)
    with h5py.File(row.expression, "r+") as file:
        del file["X/indptr"]
    assert "a.h5ad cannot be read, it is damaged or not a file of AnnData" in refused(row, tmp_path)


@pytest.mark.odd
def test_a_packed_file_is_named_as_such(row, tmp_path):
    make().write_h5ad(row.expression)
    path = Path(row.expression)
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert "a.h5ad: it is compressed with gzip, and HDF5 is read in parts: unpack it (gunzip)" in refused(row, tmp_path)


@pytest.mark.odd
@pytest.mark.parametrize("part", ["obs", "var", "X", "obsm/spatial"])
def test_what_a_later_anndata_wrote_is_named(row, tmp_path, part):
    make().write_h5ad(row.expression)
    with h5py.File(row.expression, "r+") as file:
        file[part].attrs["encoding-version"] = "9.0.0"
    assert f"a.h5ad: {part} cannot be read, it is damaged or of a later anndata: " in refused(row, tmp_path)
