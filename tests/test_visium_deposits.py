"""Visium folders as they are passed on: names of samples, packed and marked files, columns in any order, bad cells."""

import gzip
import json

import numpy as np
import pytest
from PIL import Image
from section_reading import read, refused
from visium_folders import (
    GENE_ROWS,
    GENES,
    SECTION,
    hd,
    positions,
    section,
    v1_h5,
    v1_mtx,
    v2_mtx,
    write_h5,
    write_mtx,
    write_spatial,
)

from ingest.readers.files import read_preview
from mclstexp import storage

POSITIONS = "tissue_positions_list.csv"
MARK = b"\xef\xbb\xbf"


def require_right(row, tmp_path):
    """Each spot has its own counts, pixels and array position."""
    found = read(row, tmp_path)
    order = {name: i for i, name in enumerate(SECTION.barcode)}
    spots = [order[name] for name in found.spots.spot_id]
    assert sorted(spots) == SECTION.expected
    assert list(found.genes) == GENES
    np.testing.assert_array_equal(found.spots.counts.toarray(), SECTION.counts[np.ix_(spots, GENE_ROWS)])
    np.testing.assert_allclose(found.spots.x_px, SECTION.x[spots], rtol=1e-12)
    np.testing.assert_allclose(found.spots.y_px, SECTION.y[spots], rtol=1e-12)
    np.testing.assert_array_equal(found.spots.array_row, SECTION.row[spots])
    np.testing.assert_array_equal(found.spots.array_col, SECTION.column[spots])
    assert len(read_preview(row, str(tmp_path)).layout.xy_px) == 64


def rename(folder, change):
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.rename(path.with_name(change(path.name)))
    return folder


def flat(folder):
    """Moves all files of a folder's folders into it."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.rename(folder / path.name)
    return folder


def pack(path):
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


@pytest.mark.odd
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("in_one_folder", [False, True])
@pytest.mark.parametrize("prefix", ["", "GSM4284316_", "GSM123_P2_ST_rep1_", "sample.A.", "P2-"])
@pytest.mark.parametrize("layout", [v1_h5, v1_mtx])
def test_names_and_packing_of_deposits(tmp_path, layout, prefix, in_one_folder, packed):
    folder = layout(tmp_path / "S1")
    Image.new("RGB", (240, 200)).save(folder / "spatial/tissue_hires_image.png")
    if packed:
        for name in (POSITIONS, "scalefactors_json.json", "tissue_hires_image.png"):
            pack(folder / "spatial" / name)
    rename(flat(folder) if in_one_folder else folder, lambda name: prefix + name)
    row = section(tmp_path, folder)
    require_right(row, tmp_path)
    (picture,) = read(row, tmp_path).layout.pictures
    assert (picture.width, picture.height, picture.scale) == (240, 200, 0.1)


@pytest.mark.odd
@pytest.mark.parametrize("layout", [v1_h5, v1_mtx])
def test_companions_that_macos_leaves_are_no_files_of_a_section(tmp_path, layout):
    folder = rename(layout(tmp_path / "S1"), lambda name: f"GSM1_A_{name}")
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"Mac OS X")
    require_right(section(tmp_path, folder), tmp_path)


@pytest.mark.odd
def test_words_of_a_kind_before_a_name_are_no_samples(tmp_path):
    folder = tmp_path / "GSM1"
    write_mtx(folder)
    write_spatial(folder, POSITIONS)
    matrix = {
        name: f"GSM1_A_filtered_feature_bc_{name}" for name in ("matrix.mtx.gz", "features.tsv.gz", "barcodes.tsv.gz")
    }
    rename(folder, lambda name: matrix.get(name, f"GSM1_A_spatial_{name}"))
    require_right(section(tmp_path, folder), tmp_path)


@pytest.mark.odd
@pytest.mark.parametrize("name", [POSITIONS, "scalefactors_json.json"])
def test_files_of_two_samples_are_refused(tmp_path, name):
    folder = rename(flat(v1_h5(tmp_path / "S1")), lambda name: f"GSM1_{name}")
    (folder / f"GSM2_{name}").write_bytes((folder / f"GSM1_{name}").read_bytes())
    text = refused(section(tmp_path, folder), tmp_path)
    assert f"has files of several samples: GSM1_{name}, GSM2_{name}; make one folder for each section" in text


@pytest.mark.odd
@pytest.mark.parametrize("others", [("GSM1_A_", "GSM2_A_"), ("sample_A_", "sample_B_")])
def test_counts_of_one_sample_are_not_joined_with_positions_of_another(tmp_path, others):
    folder = flat(v1_h5(tmp_path / "S1"))
    rename(folder, lambda name: (others[0] if name.endswith("h5") else others[1]) + name)
    text = refused(section(tmp_path, folder), tmp_path)
    assert f"has files of several samples: {others[0]}filtered_feature_bc_matrix.h5, {others[1]}{POSITIONS}" in text


@pytest.mark.odd
def test_a_deposit_in_object_storage(s3, tmp_path):
    folder = rename(flat(v1_h5(tmp_path / "S1")), lambda name: f"GSM1_{name}")
    for path in (path for path in folder.iterdir() if path.is_file()):
        storage.upload(path, f"{s3}/deposit/{path.name}")
    require_right(section(tmp_path, f"{s3}/deposit"), tmp_path)


@pytest.mark.odd
@pytest.mark.parametrize("name", ["tissue_positions.csv.gz", "tissue_positions_list.csv.gz", "tissue_positions.csv"])
@pytest.mark.parametrize("marked", [False, True])
def test_positions_under_any_name(tmp_path, name, marked):
    folder = v2_mtx(tmp_path / "S1")
    plain = folder / "spatial/tissue_positions.csv"
    data = MARK * marked + plain.read_bytes()
    plain.unlink()
    (folder / "spatial" / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    require_right(section(tmp_path, folder), tmp_path)


@pytest.mark.odd
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("file", ["features.tsv.gz", "barcodes.tsv.gz"])
def test_marked_tables_beside_the_matrix(tmp_path, file, end):
    folder = v1_mtx(tmp_path / "S1")
    path = folder / "filtered_feature_bc_matrix" / file
    path.write_bytes(gzip.compress(MARK + gzip.decompress(path.read_bytes()).replace(b"\n", end)))
    require_right(section(tmp_path, folder), tmp_path)


@pytest.mark.odd
def test_marked_scale_factors(tmp_path):
    folder = v1_h5(tmp_path / "S1")
    path = folder / "spatial/scalefactors_json.json"
    path.write_bytes(MARK + path.read_bytes())
    require_right(section(tmp_path, folder), tmp_path)


ORDERS = [
    ["in_tissue", "barcode", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"],
    ["pxl_col_in_fullres", "pxl_row_in_fullres", "array_col", "array_row", "in_tissue", "barcode"],
    ["barcode", "pxl_col_in_fullres", "pxl_row_in_fullres", "in_tissue", "array_row", "array_col"],
]


@pytest.mark.odd
@pytest.mark.parametrize("mark", [",", "\t", ";"])
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("order", ORDERS, ids=[order[0] for order in ORDERS])
def test_columns_of_positions_in_any_order(tmp_path, order, marked, mark):
    folder = v1_h5(tmp_path / "S1")
    positions()[order].to_csv(
        folder / "spatial" / POSITIONS, sep=mark, index=False, encoding="utf-8-sig" if marked else None
    )
    require_right(section(tmp_path, folder), tmp_path)


@pytest.mark.odd
@pytest.mark.parametrize("order", ORDERS, ids=[order[0] for order in ORDERS])
def test_columns_of_parquet_in_any_order(tmp_path, order):
    folder = hd(tmp_path / "S1")
    positions()[order].to_parquet(folder / "binned_outputs/square_016um/spatial/tissue_positions.parquet")
    require_right(section(tmp_path, folder), tmp_path)


@pytest.mark.odd
@pytest.mark.parametrize("index", [False, True])
def test_positions_as_pandas_writes_them(tmp_path, index):
    """With the barcodes, or the numbers of the rows, in a first column without a name."""
    folder = v1_h5(tmp_path / "S1")
    table = positions() if index else positions().set_index("barcode")
    table.to_csv(folder / "spatial" / POSITIONS, index_label="")
    require_right(section(tmp_path, folder), tmp_path)


@pytest.mark.odd
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("mark", [",", "\t"])
def test_positions_without_header(tmp_path, marked, mark):
    folder = v1_h5(tmp_path / "S1")
    encoding = "utf-8-sig" if marked else None
    positions().to_csv(folder / "spatial" / POSITIONS, sep=mark, index=False, header=False, encoding=encoding)
    require_right(section(tmp_path, folder), tmp_path)


# ---------------------------------------------------------------- one bad cell


BAD = ["", "NA", "nan", "inf", "left"]


def write_with(folder, column, cells):
    """Writes positions with other cells in a column, by the index of the spot."""
    table = positions().astype(object)
    for spot, cell in cells.items():
        table.loc[spot, column] = cell
    table.to_csv(folder / "spatial" / POSITIONS, index=False)


@pytest.mark.odd
@pytest.mark.parametrize("cell", BAD)
@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ("pxl_row_in_fullres", "no_position"),
        ("pxl_col_in_fullres", "no_position"),
        ("array_row", "no_array_position"),
        ("array_col", "no_array_position"),
        ("in_tissue", "unclear_selection"),
    ],
)
def test_a_bad_cell_rejects_its_spot(tmp_path, column, reason, cell):
    folder = v1_h5(tmp_path / "S1")
    write_with(folder, column, {30: cell})
    found = read(section(tmp_path, folder), tmp_path)
    expected = {5: "not_selected", 7: "no_counts", 9: "not_selected", 20: "no_counts", 30: reason}
    assert {reject.spot_id: reject.reason for reject in found.rejected} == {
        SECTION.barcode[spot]: why for spot, why in expected.items()
    }
    kept = [SECTION.barcode[i] for i in SECTION.expected if i != 30]
    assert sorted(found.spots.spot_id) == kept
    at = {name: i for i, name in enumerate(found.spots.spot_id)}
    np.testing.assert_allclose(
        found.spots.x_px[[at[name] for name in kept]], SECTION.x[[i for i in SECTION.expected if i != 30]]
    )
    (bad,) = [reject for reject in found.rejected if reject.reason == reason]
    assert np.isnan(bad.x_px) == (reason == "no_position")
    assert len(found.layout.xy_px) == (64 if reason == "unclear_selection" else 63)


@pytest.mark.odd
def test_rows_without_barcode_are_rejected_by_their_line(tmp_path):
    folder = v1_h5(tmp_path / "S1")
    write_with(folder, "barcode", {30: "", 31: " "})
    found = read(section(tmp_path, folder), tmp_path)
    assert sorted(found.spots.spot_id) == [SECTION.barcode[i] for i in SECTION.expected if i not in (30, 31)]
    reasons = {reject.spot_id: reject.reason for reject in found.rejected}
    assert {name: reasons[name] for name in ("line 32", "line 33", SECTION.barcode[30], SECTION.barcode[31])} == {
        "line 32": "no_counts",
        "line 33": "no_counts",
        SECTION.barcode[30]: "no_position",
        SECTION.barcode[31]: "no_position",
    }


@pytest.mark.odd
def test_a_null_in_parquet_rejects_its_spot(tmp_path):
    folder = hd(tmp_path / "S1")
    table = positions()
    table.loc[30, "pxl_col_in_fullres"] = np.nan
    table["in_tissue"] = table["in_tissue"].astype(bool)
    table.to_parquet(folder / "binned_outputs/square_016um/spatial/tissue_positions.parquet")
    found = read(section(tmp_path, folder), tmp_path)
    assert sorted(found.spots.spot_id) == [SECTION.barcode[i] for i in SECTION.expected if i != 30]
    assert (SECTION.barcode[30], "no_position") in [(reject.spot_id, reject.reason) for reject in found.rejected]


@pytest.mark.odd
@pytest.mark.parametrize(
    ("yes", "no"), [("True", "False"), ("TRUE", "FALSE"), ("1.0", "0.0"), ("yes", "no"), ("t", "f")]
)
def test_in_tissue_as_people_write_it(tmp_path, yes, no):
    folder = v1_h5(tmp_path / "S1")
    write_with(folder, "in_tissue", {i: yes if SECTION.in_tissue[i] else no for i in range(64)})
    require_right(section(tmp_path, folder), tmp_path)


# ---------------------------------------------------------------- what else a folder may hold


def segmented(sample):
    """Space Ranger 4 on Visium HD, with cells alone."""
    (sample / "segmented_outputs/spatial").mkdir(parents=True)
    write_h5(sample / "segmented_outputs/filtered_feature_cell_matrix.h5")
    (sample / "segmented_outputs/spatial/scalefactors_json.json").write_text(json.dumps({"spot_diameter_fullres": 8.0}))
    return sample


@pytest.mark.odd
@pytest.mark.parametrize("folder", ["S1", "S1/segmented_outputs", "run"])
def test_segmented_cells_are_named_as_what_they_are(tmp_path, folder):
    segmented(tmp_path / ("run/outs" if folder == "run" else "S1"))
    text = refused(section(tmp_path, tmp_path / folder), tmp_path)
    assert "segmented_outputs holds segmented cells (filtered_feature_cell_matrix.h5), not spots or bins" in text
    assert "give the folder binned_outputs/square_016um or square_008um of the same run" in text


@pytest.mark.odd
def test_bins_are_read_beside_segmented_cells(tmp_path):
    require_right(section(tmp_path, segmented(hd(tmp_path / "S1"))), tmp_path)


@pytest.mark.odd
@pytest.mark.parametrize("bins", ["square_008um", "square_002um"])
def test_other_bins_are_named(tmp_path, bins):
    text = refused(section(tmp_path, hd(tmp_path / "S1", bins)), tmp_path)
    assert f"has no binned_outputs/square_016um: give the folder of the bins that it has, {tmp_path}/S1" in text
    assert text.endswith(f"binned_outputs/{bins}")


@pytest.mark.odd
def test_raw_counts_alone_are_named_as_what_they_are(tmp_path):
    folder = v1_h5(tmp_path / "S1")
    (folder / "filtered_feature_bc_matrix.h5").rename(folder / "raw_feature_bc_matrix.h5")
    text = refused(section(tmp_path, folder), tmp_path)
    assert "has only raw_feature_bc_matrix.h5, which lists all barcodes, most of them off the tissue" in text
    assert "give the folder with filtered_feature_bc_matrix.h5 of the same run" in text


@pytest.mark.odd
def test_a_file_in_place_of_its_folder_is_named(tmp_path):
    folder = v1_h5(tmp_path / "S1")
    text = refused(section(tmp_path, folder / "filtered_feature_bc_matrix.h5"), tmp_path)
    assert text.endswith("filtered_feature_bc_matrix.h5 is a file: give the folder that it is in")


@pytest.mark.odd
def test_a_packed_matrix_is_named_as_such(tmp_path):
    folder = v1_h5(tmp_path / "S1")
    path = folder / "filtered_feature_bc_matrix.h5"
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert "matrix.h5: it is compressed with gzip, and HDF5 is read in parts: unpack it" in refused(
        section(tmp_path, folder), tmp_path
    )
