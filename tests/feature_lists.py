"""One section in all formats with any list of features, and its counts by gene as the readers give them."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
from section_reading import read

from ingest.readers.files import read_preview
from ingest.readers.spots import Gene
from mclstexp.data.sheet import SectionRow

EXPRESSION = "Gene Expression"
SPOTS = 5
HUMAN = [f"ENSG{i:011d}" for i in range(1, 7)]
MOUSE = [f"ENSMUSG{i:011d}" for i in range(1, 4)]


@dataclass
class Listed:
    """The features of a section as a source lists them, and their counts, random and all different from 0."""

    ids: list[str]
    names: list[str]
    kinds: list[str] | None = None

    @property
    def counts(self):
        return np.random.default_rng(3).integers(1, 1000, (SPOTS, len(self.names)))

    def totals(self, *columns):
        """Counts of a gene that these columns are."""
        return self.counts[:, list(columns)].sum(axis=1).tolist()


def _row(folder: Path, kind: str, expression: Path) -> SectionRow:
    (folder / "i.png").touch()
    positions = str(folder / "positions.tsv") if kind == "legacy_st" else None
    row = {"section_id": "S1", "patient_id": "P1", "image": str(folder / "i.png"), "format": kind}
    return SectionRow(**row, expression=str(expression), positions=positions)


def _visium(folder: Path) -> Path:
    spatial = folder / "spatial"
    spatial.mkdir(parents=True)
    lines = [f"S{i}-1,1,{i % 2},{2 * i + i % 2},{100 * i},{50 * i}\n" for i in range(SPOTS)]
    (spatial / "tissue_positions_list.csv").write_text("".join(lines))
    scale = {"spot_diameter_fullres": 55.0, "tissue_hires_scalef": 0.1, "tissue_lowres_scalef": 0.03}
    (spatial / "scalefactors_json.json").write_text(json.dumps(scale))
    return folder


def visium_h5(folder, listed):
    with h5py.File(_visium(folder / "v") / "filtered_feature_bc_matrix.h5", "w") as file:
        matrix = file.create_group("matrix")
        values = sp.csr_array(listed.counts)
        matrix["barcodes"] = np.array([f"S{i}-1" for i in range(SPOTS)], "S")
        matrix["shape"] = np.array(values.shape[::-1])
        for name in ("data", "indices", "indptr"):
            matrix[name] = getattr(values, name)
        features = {
            "id": listed.ids,
            "name": listed.names,
            "feature_type": listed.kinds or [EXPRESSION] * len(listed.ids),
        }
        for name, values in features.items():
            matrix[f"features/{name}"] = np.array(values, "S")
    return _row(folder, "visium", folder / "v")


def visium_mtx(folder, listed):
    matrix = _visium(folder / "v") / "filtered_feature_bc_matrix"
    matrix.mkdir()
    columns = [listed.ids, listed.names, *([listed.kinds] if listed.kinds else [])]
    lines = "".join("\t".join(cells) + "\n" for cells in zip(*columns, strict=True))
    (matrix / "features.tsv.gz").write_bytes(gzip.compress(lines.encode()))
    (matrix / "barcodes.tsv").write_text("".join(f"S{i}-1\n" for i in range(SPOTS)))
    scipy.io.mmwrite(matrix / "matrix.mtx", sp.coo_array(listed.counts.T))
    return _row(folder, "visium", folder / "v")


def write_h5ad(folder, listed, var):
    data = anndata.AnnData(sp.csr_matrix(listed.counts.astype(np.float32)), pd.DataFrame(index=[*"abcde"]), var)
    if listed.kinds:
        data.var["feature_types"] = pd.Categorical(listed.kinds)
    data.obsm["spatial"] = np.array([[50.0 * i, 100.0 * i] for i in range(SPOTS)])
    data.write_h5ad(folder / "s.h5ad")
    return _row(folder, "h5ad", folder / "s.h5ad")


def h5ad_by_id(folder, listed, column="gene_name"):
    return write_h5ad(folder, listed, pd.DataFrame({column: listed.names}, index=listed.ids))


def h5ad_by_symbol(folder, listed, column="gene_ids"):
    return write_h5ad(folder, listed, pd.DataFrame({column: listed.ids}, index=listed.names))


def legacy_by_id(folder, listed):
    frame = pd.DataFrame(listed.counts, [f"{2 * i}x{i}" for i in range(SPOTS)], listed.ids)
    frame.to_csv(folder / "c.tsv", sep="\t")
    places = {name: range(0, 2 * SPOTS, 2) for name in ("x", "pixel_x")} | {n: range(SPOTS) for n in ("y", "pixel_y")}
    pd.DataFrame(places).to_csv(folder / "positions.tsv", sep="\t", index=False)
    return _row(folder, "legacy_st", folder / "c.tsv")


def legacy_by_symbol(folder, listed):
    return legacy_by_id(folder, Listed(listed.names, listed.names))


WITH_BOTH = [visium_h5, visium_mtx, h5ad_by_id, h5ad_by_symbol]
ALL = [*WITH_BOTH, legacy_by_id, legacy_by_symbol]
ignore_repeated_names = pytest.mark.filterwarnings("ignore:Variable names are not unique")


def counts_by_gene(row: SectionRow, folder: Path) -> dict[Gene, list[int]]:
    """Counts of each gene in the spots; the preview states the same genes."""
    found = read(row, folder)
    assert found.genes == read_preview(row, str(folder)).genes
    assert found.spots.counts.dtype == np.int32
    order = np.argsort(found.spots.x_px)
    return {gene: found.spots.counts[order][:, [i]].toarray().ravel().tolist() for i, gene in enumerate(found.genes)}


def left_out(row: SectionRow, folder: Path) -> dict[str, int]:
    return dict(read_preview(row, str(folder)).other_features)
