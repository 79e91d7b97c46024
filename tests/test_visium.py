"""Visium folders of every kind: what is joined, what is left out and named, what is refused."""

import csv
import gzip
import json
import math
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from ingest.header import read_header
from ingest.prepare import plan
from ingest.readers import read_expression, read_preview
from ingest.section import Recipe, cut_section
from ingest.sheet import SectionRow, read_sheet
from ingest.sources import source_digests
from mclstexp import storage
from mclstexp.config import Config, override
from mclstexp.data.table import read_columns
from mclstexp.errors import SheetError, SourceError

MPP = 0.5
HD_MPP = 0.4  # said by the file; by its array it would be MPP
FEATURES = [
    ("ENSG00000087460.24", "GNAS", "Gene Expression"),
    ("ENSG00000169710", "FASN", "Gene Expression"),
    ("CD3_TotalSeqB", "CD3", "Antibody Capture"),
    ("ENSG00000999999", "ENSG00000999999", "Gene Expression"),
    ("GFP", "GFP", "Gene Expression"),
]
GENES = [
    ("ENSG00000087460", "GNAS", "ENSG00000087460"),
    ("ENSG00000169710", "FASN", "ENSG00000169710"),
    ("ENSG00000999999", "", "ENSG00000999999"),
    ("GFP", "GFP", ""),
]
GENE_ROWS = [0, 1, 3, 4]


class Section:
    """A hexagonal array of 8 x 8 spots, 100 um apart, turned by 3 degrees on an image of 0.5 um/px."""

    def __init__(self):
        rng = np.random.default_rng(0)
        places = [(row, 2 * step + row % 2) for row in range(8) for step in range(8)]
        self.barcode = [f"AAC{row:02d}{column:02d}-1" for row, column in places]
        self.row, self.column = np.array(places).T
        x_um, y_um = self.column * 50.0, self.row * 50.0 * math.sqrt(3)
        turn = math.radians(3)
        self.x = 300 + (x_um * math.cos(turn) - y_um * math.sin(turn)) / MPP
        self.y = 300 + (x_um * math.sin(turn) + y_um * math.cos(turn)) / MPP
        self.in_tissue = np.ones(64, int)
        self.in_tissue[[5, 9]] = 0
        self.counts = rng.poisson(2.0, (64, len(FEATURES))) + 1
        self.counts[7, GENE_ROWS] = 0  # an antibody alone is no expression
        self.counted = [i for i in range(64) if i not in (5, 20)]  # 9 is off the tissue and counted all the same

    @property
    def expected(self):
        return [i for i in self.counted if i not in (7, 9)]


SECTION = Section()


def zipped(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_mtx(folder, features="features.tsv.gz", columns=3, suffix=".gz"):
    order = SECTION.counted[::-1]  # of its own, unlike that of the positions
    part = SECTION.counts[order].T
    cells = [(f + 1, b + 1, part[f, b]) for f, b in zip(*np.nonzero(part), strict=True)]
    head = f"%%MatrixMarket matrix coordinate integer general\n%metadata_json: {{}}\n{part.shape[0]} {part.shape[1]} "
    zipped(folder / f"matrix.mtx{suffix}", f"{head}{len(cells)}\n" + "".join(f"{a} {b} {n}\n" for a, b, n in cells))
    lines = ["\t".join(f[1:2] if columns == 1 else f[:columns]) for f in FEATURES]
    zipped(folder / features, "\n".join(lines) + "\n")
    zipped(folder / f"barcodes.tsv{suffix}", "\n".join(SECTION.barcode[i] for i in order) + "\n")


def write_h5(path):
    order = SECTION.counted[::-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = [np.flatnonzero(SECTION.counts[i]) for i in order]
    with h5py.File(path, "w") as file:
        matrix = file.create_group("matrix")
        matrix["barcodes"] = np.array([SECTION.barcode[i] for i in order], "S18")
        matrix["data"] = np.concatenate([SECTION.counts[i, f] for i, f in zip(order, lists, strict=True)]).astype("i4")
        matrix["indices"] = np.concatenate(lists)
        matrix["indptr"] = np.cumsum([0, *map(len, lists)])
        matrix["shape"] = np.array([len(FEATURES), len(order)], "i4")
        for name, values in zip(("id", "name", "feature_type"), zip(*FEATURES, strict=True), strict=True):
            matrix[f"features/{name}"] = np.array(values, "S32")


def positions():
    cells = (SECTION.barcode, SECTION.in_tissue, SECTION.row, SECTION.column, SECTION.y, SECTION.x)
    names = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
    return pd.DataFrame(dict(zip(names, cells, strict=True)))


def write_spatial(folder, name, scale=None):
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        positions().to_parquet(folder / name)
    else:
        positions().to_csv(folder / name, index=False, header="list" not in name)
    scale = {"spot_diameter_fullres": 65 / MPP, "tissue_hires_scalef": 0.1} | (scale or {})
    (folder / "scalefactors_json.json").write_text(json.dumps(scale))


def v1_h5(sample):
    write_h5(sample / "outs/filtered_feature_bc_matrix.h5")
    write_spatial(sample / "outs/spatial", "tissue_positions_list.csv")
    return sample / "outs"


def v1_mtx(sample):
    write_mtx(sample / "filtered_feature_bc_matrix")
    write_spatial(sample / "spatial", "tissue_positions_list.csv")
    return sample


def v2_h5_in_sample_folder(sample):
    write_h5(sample / "outs/filtered_feature_bc_matrix.h5")
    write_spatial(sample / "outs/spatial", "tissue_positions.csv")
    return sample


def v2_mtx(sample):
    write_mtx(sample / "outs/filtered_feature_bc_matrix")
    write_spatial(sample / "outs/spatial", "tissue_positions.csv")
    return sample / "outs"


def hd(sample, bins="square_016um"):
    folder = sample / "binned_outputs" / bins
    write_h5(folder / "filtered_feature_bc_matrix.h5")
    write_spatial(folder / "spatial", "tissue_positions.parquet", {"microns_per_pixel": HD_MPP, "bin_size_um": 16.0})
    (sample / "spatial").mkdir()  # of the whole slide, without positions
    return sample


def hd_bin_folder(sample):
    return hd(sample, "square_008um") / "binned_outputs/square_008um"


LAYOUTS = [v1_h5, v1_mtx, v2_h5_in_sample_folder, v2_mtx, hd, hd_bin_folder]


def section(tmp_path, folder, **changes):
    image = tmp_path / "image.png"
    if not image.exists():
        Image.new("RGB", (8, 8)).save(image)
    row = SectionRow(section_id="S1", patient_id="P1", image=str(image), format="visium", expression=str(folder))
    return row.model_copy(update=changes)


def read(row, tmp_path):
    return read_expression(row, str(tmp_path))


def refused(row, tmp_path):
    with pytest.raises(SourceError) as caught:
        read(row, tmp_path)
    return str(caught.value)


@pytest.fixture
def mtx(tmp_path):
    return v1_mtx(tmp_path / "S1")


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    row = section(tmp_path, layout(tmp_path / "S1"))
    found = read(row, tmp_path)
    assert list(found.genes) == GENES
    at = {name: i for i, name in enumerate(found.spots.spot_id)}
    assert sorted(at) == sorted(SECTION.barcode[i] for i in SECTION.expected)
    order = [at[SECTION.barcode[i]] for i in SECTION.expected]
    assert found.spots.counts.dtype == np.int32
    expected = SECTION.counts[np.ix_(SECTION.expected, GENE_ROWS)]
    np.testing.assert_array_equal(found.spots.counts.toarray()[order], expected)
    np.testing.assert_allclose(found.spots.x_px[order], SECTION.x[SECTION.expected], rtol=1e-12)
    np.testing.assert_allclose(found.spots.y_px[order], SECTION.y[SECTION.expected], rtol=1e-12)
    np.testing.assert_array_equal(found.spots.array_row[order], SECTION.row[SECTION.expected])
    np.testing.assert_array_equal(found.spots.array_col[order], SECTION.column[SECTION.expected])
    assert found.array_mpp == pytest.approx(HD_MPP if layout in (hd, hd_bin_folder) else MPP, rel=1e-6)
    preview = read_preview(row, str(tmp_path))
    assert (list(preview.genes), preview.other_features) == (GENES, {"Antibody Capture": 1})
    assert preview.array_mpp == found.array_mpp


def test_everyone_left_out_is_named_with_the_reason(tmp_path, mtx):
    table = positions().drop(index=30)
    table.to_csv(mtx / "spatial/tissue_positions_list.csv", index=False, header=False)
    found = read(section(tmp_path, mtx), tmp_path)
    reasons = {reject.spot_id: reject.reason for reject in found.rejected}
    names = {5: "not_selected", 7: "no_counts", 9: "not_selected", 20: "no_counts", 30: "no_position"}
    assert reasons == {SECTION.barcode[i]: reason for i, reason in names.items()}
    places = {reject.spot_id: (reject.x_px, reject.y_px) for reject in found.rejected}
    assert places[SECTION.barcode[5]] == pytest.approx((SECTION.x[5], SECTION.y[5]))
    assert np.isnan(places[SECTION.barcode[30]][0])


@pytest.mark.parametrize(
    ("columns", "features", "genes"),
    [
        (2, "genes.tsv", ("CD3_TotalSeqB", "CD3", "")),
        (1, "features.tsv.gz", ("CD3", "CD3", "")),
    ],
)
def test_deposited_matrices_without_kinds_or_ids(tmp_path, columns, features, genes):
    folder = tmp_path / "CID4290"
    write_mtx(folder / "filtered_count_matrix", features, columns, suffix=".gz" if columns == 1 else "")
    write_spatial(folder / "spatial", "tissue_positions_list.csv")
    found = read(section(tmp_path, folder), tmp_path)
    assert len(found.genes) == len(FEATURES)
    assert found.genes[2] == (genes[1], genes[1], "")
    assert found.genes[0] == (GENES[0] if columns == 2 else ("GNAS", "GNAS", ""))
    spot = list(found.spots.spot_id).index(SECTION.barcode[0])
    assert found.spots.counts.toarray()[spot].tolist() == SECTION.counts[0].tolist()


def test_a_header_is_told_by_its_content_whatever_the_files_name(tmp_path, mtx):
    positions().to_csv(mtx / "spatial/tissue_positions_list.csv", index=False)
    assert len(read(section(tmp_path, mtx), tmp_path).spots) == len(SECTION.expected)


def test_folders_in_object_storage(s3, tmp_path):
    for layout in (v1_h5, v1_mtx):
        local = layout(tmp_path / layout.__name__)
        for path in (path for path in local.rglob("*") if path.is_file()):
            storage.upload(path, f"{s3}/{layout.__name__}/{path.relative_to(local)}")
        found = read(section(tmp_path, f"{s3}/{layout.__name__}"), tmp_path)
        assert len(found.spots) == len(SECTION.expected)
    storage.write(f"{s3}/image.png", b"")
    header = "section_id,patient_id,image,format,expression\n"
    storage.write(f"{s3}/samples.csv", f"{header}S1,P1,image.png,visium,v1_h5/\n".encode())
    assert read_sheet(f"{s3}/samples.csv")[0].expression == f"{s3}/v1_h5"


# ---------------------------------------------------------------- what is refused


MATRIX, POSITIONS = "filtered_feature_bc_matrix", "spatial/tissue_positions_list.csv"
SCALE, FEATURE_TABLE = "spatial/scalefactors_json.json", f"{MATRIX}/features.tsv.gz"
SPOT = "A-1,1,0,0,5,6\n"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (POSITIONS, "A-1,1,0,0,5\n", "positions_list.csv: line 1 has 5 cells, expected 6: barcode, in_tissue"),
        (POSITIONS, f"{SPOT}\nB-1,1,0,0,x,6\n", "line 3, column pxl_row_in_fullres: got 'x', allowed is a number"),
        (POSITIONS, f"{SPOT}B-1,2,0,0,5,6\n", "line 2, column in_tissue: got '2', allowed is 0 or 1"),
        (POSITIONS, f"{SPOT}{SPOT}", "tissue_positions_list.csv: barcode appears more than once: A-1"),
        (
            POSITIONS,
            "barcode,in_tissue,array_row\n",
            "it has no column array_col, pxl_row_in_fullres, pxl_col_in_fullres",
        ),
        (POSITIONS, "", "tissue_positions_list.csv: it has no spots"),
        (POSITIONS, SPOT, "no barcode of the counts (AAC0715-1, ...) is among those of the positions (A-1, ...)"),
        (SCALE, "{\n'a': 1}", "scalefactors_json.json cannot be read, it is damaged or no JSON file of scale factors"),
        (SCALE, "{\n'a': 1}", "line 2 column 1"),
        (SCALE, "{}", "scalefactors_json.json: it has no spot_diameter_fullres"),
        (SCALE, '{"spot_diameter_fullres": -1}', "spot_diameter_fullres is -1, allowed is a number above 0"),
        (FEATURE_TABLE, "E1\tA\tGene Expression\nE2\tB\n", "features.tsv.gz: line 2 has 2 cells, line 1 3"),
        (
            FEATURE_TABLE,
            "E1\tA\tAntibody Capture\n",
            "features.tsv.gz: it has no feature of the kind 'Gene Expression'",
        ),
        (FEATURE_TABLE, "E1\tA\nE2\tA\n", "features.tsv.gz: gene appears more than once: A"),
        (FEATURE_TABLE, "E1\tA\nE2\tB\n", "matrix.mtx.gz: the matrix is (5, 62), its names say (2, 62)"),
        (f"{MATRIX}/barcodes.tsv.gz", "A-1\n", "its names say (5, 1) features x barcodes: is a file cut short?"),
        (f"{MATRIX}/matrix.mtx.gz", "5 62 1\n", "matrix.mtx.gz cannot be read, it is damaged or no Matrix Market file"),
    ],
)
def test_broken_files_are_named(tmp_path, mtx, file, text, message):
    zipped(mtx / file, text)
    assert message in refused(section(tmp_path, mtx), tmp_path)


HEAD = "%%MatrixMarket matrix coordinate real general\n5 62 2\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{HEAD}1 1 3\n2 2 x\n", "matrix.mtx.gz cannot be read.*Line 4"),
        (f"{HEAD}1 1 3\n9 2 4\n", "matrix.mtx.gz cannot be read.*Line 4"),
        (f"{HEAD}1 1 3\n", "matrix.mtx.gz cannot be read"),
        (f"{HEAD}1 1 3\n2 1 1.5\n", "gene ENSG00000169710 of spot AAC0715-1 has the value 1.5, which is no raw count"),
        (f"{HEAD}1 1 3\n2 1 -1\n", "gene ENSG00000169710 of spot AAC0715-1 has the value -1"),
        ("%%MatrixMarket matrix array integer general\n1 1\n3\n", "it claims 1 entries in the format array"),
        ("%%MatrixMarket matrix coordinate real general\n5 62 999999999999\n1 1 3\n", "it claims 999999999999 entries"),
    ],
)
def test_broken_matrices_are_named_with_the_line(tmp_path, mtx, text, message):
    zipped(mtx / "filtered_feature_bc_matrix/matrix.mtx.gz", text)
    with pytest.raises(SourceError, match=message):
        read(section(tmp_path, mtx), tmp_path)


def test_truncated_files_are_named(tmp_path, mtx):
    for name in ("matrix.mtx.gz", "features.tsv.gz", "barcodes.tsv.gz"):
        path = mtx / "filtered_feature_bc_matrix" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert f"{name} cannot be read" in refused(section(tmp_path, mtx), tmp_path)
        path.write_bytes(whole)


def test_broken_h5_files_are_named(tmp_path):
    folder = v1_h5(tmp_path / "S1")
    path, row = folder / "filtered_feature_bc_matrix.h5", section(tmp_path, folder)
    whole = path.read_bytes()
    for index in (99, -2):
        with h5py.File(path, "r+") as file:
            file["matrix/indices"][3] = index
        assert "filtered_feature_bc_matrix.h5 cannot be read" in refused(row, tmp_path)
    with h5py.File(path, "r+") as file:
        file["matrix/shape"][:] = (5, 63)
    assert "the matrix is (5, 63), its names say (5, 62)" in refused(row, tmp_path)
    with h5py.File(path, "r+") as file:
        del file["matrix/features"]
    assert "no count matrix of Space Ranger" in refused(row, tmp_path)
    for broken in (b"", b"garbage" * 99, whole[: len(whole) // 2]):
        path.write_bytes(broken)
        assert "filtered_feature_bc_matrix.h5 cannot be read" in refused(row, tmp_path)
        with pytest.raises(SourceError, match="cannot be read"):
            read_preview(row, str(tmp_path))


def test_broken_parquet_positions_are_named_with_the_row(tmp_path):
    folder = hd(tmp_path / "S1")
    path = folder / "binned_outputs/square_016um/spatial/tissue_positions.parquet"
    table = positions()
    table.loc[3, "pxl_col_in_fullres"] = np.nan
    table.to_parquet(path)
    text = refused(section(tmp_path, folder), tmp_path)
    assert "tissue_positions.parquet: row 4, column pxl_col_in_fullres: got " in text
    path.write_bytes(b"PAR1")
    assert "tissue_positions.parquet cannot be read" in refused(section(tmp_path, folder), tmp_path)


def test_the_sheet_names_what_a_folder_lacks(tmp_path):
    v1_mtx(tmp_path / "S1")
    (tmp_path / "S1/spatial/scalefactors_json.json").unlink()
    (tmp_path / "S1/filtered_feature_bc_matrix/features.tsv.gz").unlink()
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "i.png")
    with open(tmp_path / "samples.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["section_id", "patient_id", "image", "format", "expression", "positions"],
                ["S1", "P1", "i.png", "visium", "S1", ""],
                ["S2", "P1", "i.png", "visium", "empty", ""],
                ["S3", "P1", "i.png", "visium", "", "i.png"],
            ]
        )
    with pytest.raises(SheetError) as caught:
        read_sheet(str(tmp_path / "samples.csv"))
    text = str(caught.value)
    assert "row 2, column expression, got 'S1':" in text
    assert "S1/filtered_feature_bc_matrix has no features.tsv.gz or features.tsv or genes.tsv.gz or genes.tsv" in text
    assert "S1/spatial has no scalefactors_json.json" in text
    assert "row 3, column expression, got 'empty':" in text
    assert "has neither filtered_feature_bc_matrix.h5 nor matrix.mtx.gz" in text
    assert "row 4: format visium needs expression; format visium takes no positions" in text


# ---------------------------------------------------------------- resolution, images, tiles


def paint(path, colour=(190, 120, 170), background=(243, 243, 243), **options):
    """A slide with all spots on one stained rectangle."""
    image = np.full((2000, 2400, 3), background, np.uint8)
    image[200:1900, 100:2200] = colour
    tifffile.imwrite(path, image, photometric="rgb", tile=(256, 256), compression="deflate", **options)


def test_resolution_comes_from_sheet_image_or_array_and_the_source_is_stated(tmp_path, mtx):
    paint(tmp_path / "plain.tif")
    paint(tmp_path / "tagged.tif", resolution=(1e4 / 0.49, 1e4 / 0.49), resolutionunit="CENTIMETER")
    cases = [("plain.tif", 0.51, 0.51, "the sheet"), ("tagged.tif", None, 0.49, "its image")]
    for image, mpp, expected, source in [*cases, ("plain.tif", None, MPP, "its array of spots")]:
        header = read_header(section(tmp_path, mtx, image=str(tmp_path / image), mpp=mpp))
        assert (header.mpp, header.mpp_source) == (pytest.approx(expected, rel=1e-3), source)
    with pytest.raises(SourceError, match=r"S1: mpp is 0\.25 in the sheet and 0\.5 in its array of spots"):
        read_header(section(tmp_path, mtx, image=str(tmp_path / "plain.tif"), mpp=0.25))


def test_scale_factors_of_another_image_are_refused(tmp_path, mtx):
    write_spatial(mtx / "spatial", "tissue_positions_list.csv", {"spot_diameter_fullres": 6.5})
    paint(tmp_path / "a.tif")
    with pytest.raises(SourceError, match=r"its spots lie 100 um apart at 0\.5 um/px but are 3\.25 um wide"):
        cut(section(tmp_path, mtx, image=str(tmp_path / "a.tif")), tmp_path / "table")


def cut(row, root):
    tiles = override(Config(), {"tiles.size_px": 64, "tiles.sentence_length": 16}).tiles
    return cut_section(row, Recipe(tiles, MPP), {gene[0]: i for i, gene in enumerate(GENES)}, str(root), "f")


def test_tiles_of_a_section_and_its_plan(tmp_path, mtx):
    paint(tmp_path / "a.tif")
    entry = cut(section(tmp_path, mtx, image=str(tmp_path / "a.tif")), tmp_path / "table")
    assert entry.num_spots == len(SECTION.expected)
    assert entry.rejected == dict(Counter(no_counts=2, not_selected=2))
    assert entry.source_mpp == pytest.approx(MPP, rel=1e-6)
    table = read_columns(str(tmp_path / "table"), entry, ["spot_id", "gene_index", "count"]).to_pandas()
    stored = table.set_index("spot_id").loc[SECTION.barcode[3]]
    expected = SECTION.counts[3, GENE_ROWS]
    assert stored["count"].tolist() == expected[expected > 0].tolist()
    sheet = tmp_path / "samples.csv"
    sheet.write_text("section_id,patient_id,image,format,expression\nS1,P1,a.tif,visium,S1\n")
    text = plan(str(sheet), str(tmp_path / "out"), Config())
    assert "S1: patient P1, visium, 0.5 um/px, exact crops" in text
    assert "resolution 0.5 um/px by its array of spots: 1 section(s) (S1)" in text
    assert "genes by   Ensembl ids (ENSG) and symbols, some by" in text
    assert "left out   1 features of Antibody Capture in 1 section(s) (S1)" in text


def test_greyscale_is_refused_by_name(tmp_path, mtx):
    grey = {"colour": (150, 150, 150)}
    paint(tmp_path / "grey.tif", **grey)
    with pytest.raises(SourceError, match="section S1: its image is greyscale"):
        cut(section(tmp_path, mtx, image=str(tmp_path / "grey.tif")), tmp_path / "table")
    row = section(tmp_path, None, image=str(tmp_path / "grey.tif"), format="slide", expression=None, mpp=MPP)
    with pytest.raises(SourceError, match="section S1: its image is greyscale"):
        cut(row, tmp_path / "table")
    Image.fromarray(np.full((64, 64), 100, np.uint8)).save(tmp_path / "grey.png")
    with pytest.raises(SourceError, match=r"grey.png: its colour mode is L \(greyscale\).* give the colour image"):
        read_header(section(tmp_path, mtx, image=str(tmp_path / "grey.png")))
    paint(tmp_path / "empty.tif", colour=(243, 243, 243))
    assert cut(row.model_copy(update={"image": str(tmp_path / "empty.tif")}), tmp_path / "table").num_spots == 0


def test_a_section_is_prepared_again_when_any_of_its_files_changes(tmp_path, mtx):
    row = section(tmp_path, mtx)
    seen = {source_digests([row], {})[0]["S1"]}
    for path in sorted(path for path in mtx.rglob("*") if path.is_file()):
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        seen.add(source_digests([row], {})[0]["S1"])
        path.write_bytes(before)
    assert len(seen) == 1 + 5
    moved = Path(mtx).rename(tmp_path / "elsewhere")
    assert source_digests([section(tmp_path, moved)], {})[0]["S1"] in seen
