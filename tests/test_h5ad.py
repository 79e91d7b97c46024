"""Sections in AnnData files: where counts, genes and positions come from, and what is refused."""

from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from section_reading import COUNTS, POSITIONS, read, refused

from ingest.readers.files import read_preview
from mclstexp.data.sheet import SectionRow


@pytest.fixture
def h5ad(tmp_path):
    (tmp_path / "b.tif").touch()
    return SectionRow(
        section_id="B1",
        patient_id="B",
        image=str(tmp_path / "b.tif"),
        format="h5ad",
        expression=str(tmp_path / "b.h5ad"),
    )


def make_anndata(values=None, **parts):
    values = np.array(list(COUNTS.values()), np.float32) if values is None else values
    obs = pd.DataFrame(index=[f"AAC{i}-1" for i in range(4)])
    data = anndata.AnnData(values, obs=obs, var=pd.DataFrame(index=["GNAS", "FASN", "ERBB2"]), **parts)
    data.obsm["spatial"] = np.array(list(POSITIONS.values()), float)
    return data


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_h5ad(h5ad, tmp_path, kind):
    make_anndata(kind(np.array(list(COUNTS.values()), np.float32))).write_h5ad(h5ad.expression)
    found = read(h5ad, tmp_path)
    assert found.spots.counts.toarray().tolist() == list(COUNTS.values())
    assert found.spots.counts.dtype == np.int32
    assert found.spots.spot_id.tolist() == [f"AAC{i}-1" for i in range(4)]
    assert found.spots.x_px.tolist() == [100.5, 110, 100, 120]
    assert found.spots.y_px.tolist() == [200.25, 200, 210, 200]
    assert np.isnan(found.spots.array_row).all()
    assert [gene.gene_id for gene in found.genes] == ["GNAS", "FASN", "ERBB2"]
    assert read_preview(h5ad, str(tmp_path)).genes == found.genes


def test_hest_style_file(h5ad, tmp_path):
    data = make_anndata(sp.csr_matrix(np.array(list(COUNTS.values()), np.float32)))
    data.obs["in_tissue"] = [1, 1, 0, 1]
    data.obs["array_row"] = [20, 20, 21, 20]
    data.obs["array_col"] = [10, 11, 10, 12]
    data.obs["pxl_col_in_fullres"] = data.obsm["spatial"][:, 0]
    data.var["gene_ids"] = ["ENSG00000087460", "ENSG00000169710", "ENSG00000141736"]
    scale = {"tissue_downscaled_fullres_scalef": 0.1, "spot_diameter_fullres": 30.0}
    image = {"downscaled_fullres": np.zeros((8, 8, 3), np.uint8)}
    data.uns["spatial"] = {"ST": {"images": image, "scalefactors": scale}}
    data.write_h5ad(h5ad.expression)
    found = read(h5ad, tmp_path)
    assert found.genes[0] == ("ENSG00000087460", "GNAS", "ENSG00000087460")
    assert found.spots.array_col.tolist() == [10, 11, 12]
    assert found.spots.array_row.tolist() == [20, 20, 20]
    assert [(reject.spot_id, reject.reason) for reject in found.rejected] == [("AAC2-1", "not_selected")]


def test_ensembl_index_with_symbols_beside_it(h5ad, tmp_path):
    data = make_anndata()
    data.var.index = ["ENSG00000087460.24", "ENSG00000169710", "ENSG00000141736"]
    data.var["feature_name"] = pd.Categorical(["GNAS", "FASN", "ERBB2"])
    data.write_h5ad(h5ad.expression)
    assert read_preview(h5ad, str(tmp_path)).genes[0] == ("ENSG00000087460", "GNAS", "ENSG00000087460")


def test_genes_without_a_symbol_get_none(h5ad, tmp_path):
    data = make_anndata()
    data.var.index = ["ENSG00000087460", "ENSG00000169710", "ENSG00000141736"]
    data.var["gene_name"] = ["GNAS", np.nan, "ERBB2"]
    data.write_h5ad(h5ad.expression)
    assert [gene.symbol for gene in read_preview(h5ad, str(tmp_path)).genes] == ["GNAS", "", "ERBB2"]


def test_raw_counts_are_found_in_layers_raw_or_x(h5ad, tmp_path):
    counts = np.array(list(COUNTS.values()), np.float32)
    data = make_anndata(np.log1p(counts))
    data.layers["counts"] = counts
    data.write_h5ad(h5ad.expression)
    assert read(h5ad, tmp_path).spots.counts.toarray().tolist() == counts.tolist()
    whole = make_anndata(counts)
    data = make_anndata(np.log1p(counts))
    data.raw = whole
    data = data[:, :2].copy()
    data.write_h5ad(h5ad.expression)
    found = read(h5ad, tmp_path)
    assert found.spots.counts.toarray().tolist() == counts.tolist()
    assert len(found.genes) == 3


@pytest.mark.parametrize("value", [np.nan, np.inf, -1, 1.5])
@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_h5ad_value_that_is_not_a_count_is_named(h5ad, tmp_path, value, kind):
    counts = np.array(list(COUNTS.values()), np.float32)
    counts[2, 1] = value
    make_anndata(kind(counts)).write_h5ad(h5ad.expression)
    assert "gene FASN of spot AAC2-1" in refused(h5ad, tmp_path)


@pytest.mark.filterwarnings("ignore:(Observation|Variable) names are not unique")
def test_h5ad_repeated_names_are_named(h5ad, tmp_path):
    data = make_anndata()
    data.var.index = ["GNAS", "FASN", "GNAS"]
    data.write_h5ad(h5ad.expression)
    assert "gene appears more than once: GNAS" in refused(h5ad, tmp_path)
    data = make_anndata()
    data.obs.index = ["a", "b", "a", "c"]
    data.write_h5ad(h5ad.expression)
    assert "spot appears more than once: a" in refused(h5ad, tmp_path)


def test_h5ad_without_positions_or_with_broken_ones(h5ad, tmp_path):
    data = make_anndata()
    del data.obsm["spatial"]
    data.write_h5ad(h5ad.expression)
    assert "it has no obsm/spatial" in refused(h5ad, tmp_path)
    data = make_anndata()
    data.obsm["spatial"][1:, 0] = np.nan
    data.write_h5ad(h5ad.expression)
    expected = "column 0 of obsm['spatial']: 3 of 4 cells cannot be used, such as nan (spot AAC1-1); allowed: finite"
    assert expected in refused(h5ad, tmp_path)


def test_damaged_h5ad_is_refused(h5ad, tmp_path):
    make_anndata().write_h5ad(h5ad.expression)
    path = Path(h5ad.expression)
    whole = path.read_bytes()
    for broken in (b"", b"garbage" * 100, whole[: len(whole) // 2]):
        path.write_bytes(broken)
        assert "b.h5ad cannot be read" in refused(h5ad, tmp_path)
    with h5py.File(path, "w") as file:
        file["X"] = np.zeros((2, 2))
    assert "b.h5ad: it has no obs" in refused(h5ad, tmp_path)


def test_h5ad_that_claims_more_than_it_names_is_refused_unread(h5ad, tmp_path):
    make_anndata().write_h5ad(h5ad.expression)
    with h5py.File(h5ad.expression, "r+") as file:
        del file["X"]
        file.create_dataset("X", shape=(10**6, 10**6), dtype="f4", chunks=(100, 100))
    assert "X is (1000000, 1000000), but there are names for (4, 3)" in refused(h5ad, tmp_path)
