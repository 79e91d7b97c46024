"""A gene that a section's assay lacks is unknown there, not zero: from the section's files to the tile table."""

import base64
import gzip
import json
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse
from PIL import Image
from small_table import empty_manifest, section_entry

from ingest.header import gene_rows, merged_genes, read_header
from ingest.section import Recipe, cut_section
from mclstexp.config import Config, override
from mclstexp.data.schema import MANIFEST, Manifest, SectionEntry, decode_rows, encode_rows, load_manifest
from mclstexp.data.sheet import SectionRow
from mclstexp.errors import TableError

GENES = [("ENSG00000000001", "GNAS"), ("ENSG00000000002", "FASN"), ("ENSG00000000003", "ERBB2")]
OTHERS = [("ENSG00000000009", "MUC1"), GENES[2]]
ARRAY = np.array([(row, 2 * step + row % 2) for row in range(5) for step in range(5)])
XY = np.stack([60 + 50.0 * ARRAY[:, 1], 60 + np.round(50 * np.sqrt(3)) * ARRAY[:, 0]], axis=1)
FORMATS = ("h5ad", "legacy_st", "visium-h5", "visium-mtx")


def _counts(num_genes: int) -> np.ndarray:
    """Counts of 25 spots; the first gene is listed and never counted."""
    counts = 1 + np.random.default_rng(num_genes).poisson(3, (25, num_genes))
    counts[:, 0] = 0
    return counts


def _section(folder: Path, name: str, kind: str, genes: list[tuple[str, str]]) -> SectionRow:
    """A section of that format whose files list these genes alone."""
    picture = np.random.default_rng(0).integers(0, 40, (500, 600, 3)) + np.array([180, 80, 150])
    Image.fromarray(picture.astype(np.uint8)).save(folder / f"{name}.png")
    counts, path = _counts(len(genes)), folder / name
    row = {"section_id": name, "patient_id": name, "image": f"{folder}/{name}.png", "mpp": 1.0}
    if kind == "h5ad":
        var = pd.DataFrame({"gene_ids": [gene for gene, _ in genes]}, index=[symbol for _, symbol in genes])
        data = anndata.AnnData(scipy.sparse.csr_matrix(counts.astype(np.float32)), var=var, obsm={"spatial": XY})
        data.obs = pd.DataFrame(
            {"array_row": ARRAY[:, 0], "array_col": ARRAY[:, 1]}, index=[f"S{i}" for i in range(25)]
        )
        data.write_h5ad(f"{path}.h5ad")
        return SectionRow(**row, format="h5ad", expression=f"{path}.h5ad")
    if kind == "legacy_st":
        spots = [f"{column}x{line}" for line, column in ARRAY]
        pd.DataFrame(counts, spots, [gene for gene, _ in genes]).to_csv(f"{path}.tsv", sep="\t")
        places = {"x": ARRAY[:, 1], "y": ARRAY[:, 0], "pixel_x": XY[:, 0], "pixel_y": XY[:, 1], "selected": 1}
        pd.DataFrame(places).to_csv(f"{path}_spots.tsv", sep="\t", index=False)
        return SectionRow(**row, format="legacy_st", expression=f"{path}.tsv", positions=f"{path}_spots.tsv")
    _visium(path, counts, genes, kind)
    return SectionRow(**row, format="visium", expression=str(path))


def _visium(folder: Path, counts: np.ndarray, genes: list[tuple[str, str]], kind: str) -> None:
    (folder / "spatial").mkdir(parents=True)
    barcodes = [f"AAC{spot:02d}-1" for spot in range(25)]
    matrix = scipy.sparse.csc_matrix(counts.T)
    if kind == "visium-h5":
        with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
            group = file.create_group("matrix")
            for name in ("data", "indices", "indptr"):
                group[name] = getattr(matrix, name)
            group["shape"] = matrix.shape
            group["barcodes"] = np.array(barcodes, "S")
            features = {"id": [gene for gene, _ in genes], "name": [symbol for _, symbol in genes]}
            for name, values in (features | {"feature_type": ["Gene Expression"] * len(genes)}).items():
                group[f"features/{name}"] = np.array(values, "S")
    else:
        inside = folder / "filtered_feature_bc_matrix"
        inside.mkdir()
        with gzip.open(inside / "matrix.mtx.gz", "wb") as file:
            scipy.io.mmwrite(file, matrix, field="integer")
        lines = ["\t".join([*gene, "Gene Expression"]) for gene in genes]
        for name, text in (("features", lines), ("barcodes", barcodes)):
            (inside / f"{name}.tsv.gz").write_bytes(gzip.compress("\n".join(text).encode() + b"\n"))
    places = pd.DataFrame({"barcode": barcodes, "in": 1, "row": ARRAY[:, 0], "col": ARRAY[:, 1]})
    places.assign(y=XY[:, 1].astype(int), x=XY[:, 0].astype(int)).to_csv(
        folder / "spatial" / "tissue_positions_list.csv", header=False, index=False
    )
    scales = {"spot_diameter_fullres": 65.0, "tissue_hires_scalef": 1.0, "fiducial_diameter_fullres": 90.0}
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))


def _cut(rows: list[SectionRow], root: Path) -> tuple[Manifest, list[str]]:
    """The manifest of a table cut from sections, and its gene ids."""
    recipe = Recipe(override(Config(), {"tiles.size_px": 32, "tiles.min_tissue": 0}).tiles, 1.0)
    genes = merged_genes([], [read_header(row).preview.genes for row in rows])
    entries = tuple(cut_section(row, recipe, gene_rows(genes), str(root), "x-y") for row in rows)
    return empty_manifest().model_copy(update={"num_genes": len(genes), "sections": entries}), [
        g.gene_id for g in genes
    ]


@pytest.mark.odd
@pytest.mark.parametrize("kind", FORMATS)
def test_a_section_measures_the_genes_that_its_files_list(tmp_path: Path, kind: str) -> None:
    rows = [_section(tmp_path, "A", kind, GENES), _section(tmp_path, "B", kind, OTHERS)]
    manifest, gene_ids = _cut(rows, tmp_path / "tiles")
    listed = {
        name: {gene for gene, measured in zip(gene_ids, manifest.measures(name), strict=True) if measured}
        for name in "AB"
    }
    assert listed == {"A": {gene for gene, _ in GENES}, "B": {gene for gene, _ in OTHERS}}, "zeros are measurements"


def test_the_list_survives_the_manifests_file(tmp_path: Path) -> None:
    listed = np.random.default_rng(0).random(37_001) < 0.3
    entry = section_entry("A1", "A", genes=encode_rows(listed))
    manifest = empty_manifest().model_copy(update={"num_genes": 40_000, "sections": (entry,)})
    (tmp_path / MANIFEST).write_bytes(manifest.encode())
    loaded = load_manifest(str(tmp_path))
    assert loaded == manifest
    np.testing.assert_array_equal(loaded.measures("A1"), np.append(listed, np.zeros(2_999, bool)))
    assert len(str(entry.genes)) < 8_000, "about a bit for each gene"


def test_a_table_of_before_measures_every_gene_and_keeps_its_bytes(tmp_path: Path) -> None:
    tree = json.loads(empty_manifest().encode())
    tree |= {"schema_version": 3, "num_genes": 5, "sections": [json.loads(_plain(section_entry("A1", "A")))]}
    data = (json.dumps(tree, indent=1, sort_keys=True) + "\n").encode()
    (tmp_path / MANIFEST).write_bytes(data)
    manifest = load_manifest(str(tmp_path))
    assert manifest.encode() == data
    assert manifest.measures("A1").tolist() == [True] * 5


@pytest.mark.odd
@pytest.mark.parametrize("text", ["!", "AAAA", base64.b64encode(b"plain").decode()])
def test_a_damaged_list_of_genes_is_refused(tmp_path: Path, text: str) -> None:
    manifest = empty_manifest().model_copy(update={"sections": (section_entry("A1", "A"),)})
    tree = json.loads(manifest.encode())
    tree["sections"][0]["genes"] = text
    (tmp_path / MANIFEST).write_text(json.dumps(tree))
    with pytest.raises(TableError, match=r"manifest\.json is damaged"):
        load_manifest(str(tmp_path))


def test_rows_beyond_the_list_are_not_measured() -> None:
    assert decode_rows(encode_rows(np.array([True, False, True])), 12).tolist() == [True, False, True] + [False] * 9


def _plain(entry: SectionEntry) -> str:
    return entry.model_dump_json(exclude_none=True)
