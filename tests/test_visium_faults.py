"""Broken or incomplete Visium folders: what is refused, and how the message names it."""

import csv

import h5py
import numpy as np
import pytest
from PIL import Image
from section_reading import read, refused
from visium_folders import hd, positions, section, v1_h5, v1_mtx, zipped

from ingest.readers import READERS
from ingest.readers.files import read_preview
from mclstexp import storage
from mclstexp.data.sheet import read_sheet
from mclstexp.errors import SheetError, SourceError


@pytest.fixture
def mtx(tmp_path):
    return v1_mtx(tmp_path / "S1")


MATRIX, POSITIONS = "filtered_feature_bc_matrix", "spatial/tissue_positions_list.csv"
SCALE, FEATURE_TABLE = "spatial/scalefactors_json.json", f"{MATRIX}/features.tsv.gz"
SPOT = "A-1,1,0,0,5,6\n"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (POSITIONS, "A-1,1,0,0,5\n", "positions_list.csv: line 1 has 5 cells, expected 6: barcode, in_tissue"),
        (
            POSITIONS,
            f"{SPOT}\nB-1,1,0,0,x,6\nC-1,1,0,0,,6\n",
            "list.csv: column pxl_row_in_fullres: 2 of 3 cells cannot be used, such as 'x' (line 3); allowed: finite",
        ),
        (
            POSITIONS,
            f"{SPOT}B-1,2,0,0,5,6\nC-1,2,0,0,5,6\n",
            "column in_tissue: 2 of 3 cells cannot be used, such as '2' (line 2); allowed: 1 or 0, true or false",
        ),
        (POSITIONS, "A-1,1,NA,0,5,6\n", "column array_row: 1 of 1 cells cannot be used, such as 'NA' (line 1)"),
        (POSITIONS, f"{SPOT}{SPOT}", "tissue_positions_list.csv: barcode appears more than once: A-1"),
        (
            POSITIONS,
            "barcode,in_tissue,array_row\n",
            "it has no column array_col, pxl_row_in_fullres, pxl_col_in_fullres",
        ),
        (POSITIONS, "", "tissue_positions_list.csv: it has no spots"),
        (POSITIONS, SPOT, "the positions (A-1, ...) have none of the spots of the counts (AAC0715-1, ...)"),
        (
            SCALE,
            "{\n'a': 1}",
            "scalefactors_json.json cannot be read, it is damaged or not a JSON file of scale factors",
        ),
        (SCALE, "{\n'a': 1}", "line 2 column 1"),
        (SCALE, "{}", "scalefactors_json.json: it has no spot_diameter_fullres"),
        (SCALE, '{"spot_diameter_fullres": -1}', "spot_diameter_fullres is -1; allowed is a number above 0"),
        (FEATURE_TABLE, "E1\tA\tGene Expression\nE2\tB\n", "features.tsv.gz: line 2 has 2 cells and line 1 has 3"),
        (
            FEATURE_TABLE,
            "E1\tA\tAntibody Capture\n",
            "features.tsv.gz: it has no feature of the kind 'Gene Expression'",
        ),
        (FEATURE_TABLE, "E1\tA\nE1\tA\n", "features.tsv.gz: gene appears more than once: A"),
        (FEATURE_TABLE, "ENSG1.1\tA\nENSG1.2\tB\n", "features.tsv.gz: gene appears more than once: ENSG1"),
        (FEATURE_TABLE, "E1\tA\nE2\tB\n", "matrix.mtx.gz: the matrix is (5, 62), but there are names for (2, 62)"),
        (
            f"{MATRIX}/barcodes.tsv.gz",
            "A-1\n",
            "but there are names for (5, 1) features x barcodes: is a file truncated?",
        ),
        (
            f"{MATRIX}/matrix.mtx.gz",
            "5 62 1\n",
            "matrix.mtx.gz cannot be read, it is damaged or not a Matrix Market file",
        ),
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
        (
            f"{HEAD}1 1 3\n2 1 1.5\n",
            "gene ENSG00000169710 of spot AAC0715-1 has the value 1.5, which is not a raw count",
        ),
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
    assert "the matrix is (5, 63), but there are names for (5, 62)" in refused(row, tmp_path)
    with h5py.File(path, "r+") as file:
        del file["matrix/features"]
    assert "not a count matrix of Space Ranger" in refused(row, tmp_path)
    for broken in (b"", b"garbage" * 99, whole[: len(whole) // 2]):
        path.write_bytes(broken)
        assert "filtered_feature_bc_matrix.h5 cannot be read" in refused(row, tmp_path)
        with pytest.raises(SourceError, match="cannot be read"):
            read_preview(row, str(tmp_path))


def test_broken_parquet_positions_are_named_with_the_row(tmp_path):
    folder = hd(tmp_path / "S1")
    path = folder / "binned_outputs/square_016um/spatial/tissue_positions.parquet"
    table = positions()
    table.loc[3:, "pxl_col_in_fullres"] = np.nan
    table.to_parquet(path)
    text = refused(section(tmp_path, folder), tmp_path)
    assert (
        "tissue_positions.parquet: column pxl_col_in_fullres: 61 of 64 cells cannot be used, such as nan (row 4)"
        in text
    )
    path.write_bytes(b"PAR1")
    assert "tissue_positions.parquet cannot be read" in refused(section(tmp_path, folder), tmp_path)


def test_the_sheet_lists_the_missing_files_of_a_folder(tmp_path):
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
        read_sheet(str(tmp_path / "samples.csv"), READERS)
    text = str(caught.value)
    assert "row 2, column expression, got 'S1':" in text
    assert "S1/filtered_feature_bc_matrix has no features.tsv.gz or features.tsv or genes.tsv.gz or genes.tsv" in text
    assert "S1/spatial has no scalefactors_json.json" in text
    assert "row 3, column expression, got 'empty':" in text
    assert "has neither filtered_feature_bc_matrix.h5 nor matrix.mtx.gz" in text
    assert "row 4: format visium needs expression; format visium takes no positions" in text


def test_the_sheet_lists_each_folder_once(tmp_path, monkeypatch):
    folder, list_folder, looked_up = v1_mtx(tmp_path / "S1"), storage.list_folder, []
    monkeypatch.setattr(storage, "list_folder", lambda uri: looked_up.append(uri) or list_folder(uri))
    Image.new("RGB", (8, 8)).save(tmp_path / "i.png")
    sheet = "section_id,patient_id,image,format,expression\nS1,P1,i.png,visium,S1\n"
    (tmp_path / "samples.csv").write_text(sheet)
    read_sheet(str(tmp_path / "samples.csv"), READERS)
    assert set(looked_up) == {str(folder), str(folder / MATRIX), str(folder / "spatial")}
    assert len(looked_up) == len(set(looked_up))
