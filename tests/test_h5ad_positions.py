"""Positions in AnnData files as people have them: named columns in any order, cells that are missing, truth as text."""

import numpy as np
import pandas as pd
import pytest
from h5ad_files import NUM_SPOTS, X, Y, make, require_right
from section_reading import read, refused
from visium_folders import SECTION

from ingest.readers.files import read_preview
from mclstexp.data.sheet import SectionRow


@pytest.fixture
def row(tmp_path):
    path = str(tmp_path / "a.h5ad")
    return SectionRow(section_id="S1", patient_id="P1", image=path, format="h5ad", expression=path)


NAMES = [
    ("pxl_col_in_fullres", "pxl_row_in_fullres"),
    ("pxl_col", "pxl_row"),
    ("x", "y"),
    ("X", "Y"),
    ("pixel_x", "pixel_y"),
    ("x_px", "y_px"),
    ("imagecol", "imagerow"),
    ("pixel_col", "pixel_row"),
    ("pxl_x", "pxl_y"),
    ("image_x", "image_y"),
    ("col", "row"),
]


@pytest.mark.odd
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["x_first", "y_first"])
@pytest.mark.parametrize("names", NAMES, ids="-".join)
def test_named_columns_of_obsm_win_over_their_order(row, tmp_path, names, order):
    data = make()
    frame = pd.DataFrame({names[0]: X, names[1]: Y}, data.obs_names)
    data.obsm["spatial"] = frame[[names[i] for i in order]]
    data.write_h5ad(row.expression)
    require_right(read(row, tmp_path))
    np.testing.assert_array_equal(read_preview(row, str(tmp_path)).layout.xy_px, np.stack([X, Y], axis=1))


@pytest.mark.odd
@pytest.mark.parametrize("names", [("a", "b"), ("spatial2", "spatial1"), ("x_um", "y_um"), ("x", "b")], ids="-".join)
def test_unknown_columns_of_obsm_are_refused(row, tmp_path, names):
    data = make()
    data.obsm["spatial"] = pd.DataFrame(dict(zip(names, (X, Y), strict=True)), data.obs_names)
    data.write_h5ad(row.expression)
    text = refused(row, tmp_path)
    assert (
        f"a.h5ad: obsm['spatial'] has the columns {names[0]}, {names[1]}; give x, y in full-resolution pixels" in text
    )
    assert "pxl_col_in_fullres and pxl_row_in_fullres" in text


@pytest.mark.odd
@pytest.mark.parametrize("names", [*NAMES[:2], *NAMES[4:7]], ids="-".join)
@pytest.mark.parametrize("rounding", [0, 0.4])
def test_named_columns_of_obs_tell_the_order_of_obsm(row, tmp_path, names, rounding):
    data = make(**{names[1]: Y + rounding, names[0]: X - rounding})
    data.obsm["spatial"] = np.stack([Y, X], axis=1)
    data.write_h5ad(row.expression)
    require_right(read(row, tmp_path))
    (remark,) = read_preview(row, str(tmp_path)).remarks
    assert remark == f"obsm['spatial'] is y, x by {names[0]} and {names[1]} of obs, and was read so"


@pytest.mark.odd
@pytest.mark.parametrize("scale", [1, 0.5])
def test_named_columns_of_obs_that_say_nothing_new(row, tmp_path, scale):
    make(pxl_row_in_fullres=Y * scale, pxl_col_in_fullres=X * scale).write_h5ad(row.expression)
    require_right(read(row, tmp_path))
    assert read_preview(row, str(tmp_path)).remarks == ()


@pytest.mark.odd
def test_positions_in_obs_alone(row, tmp_path):
    data = make(pxl_row_in_fullres=Y, pxl_col_in_fullres=X)
    del data.obsm["spatial"]
    data.write_h5ad(row.expression)
    require_right(read(row, tmp_path))


@pytest.mark.odd
@pytest.mark.parametrize("key", ["X_spatial", "spatial_um"])
def test_positions_of_unknown_unit_are_refused(row, tmp_path, key):
    data = make()
    data.obsm[key] = data.obsm.pop("spatial")
    data.write_h5ad(row.expression)
    text = refused(row, tmp_path)
    assert (
        f"it has no obsm/spatial, but {key}, whose unit and order are not known; give x, y in full-resolution" in text
    )


@pytest.mark.odd
@pytest.mark.parametrize("axis", [0, 1, slice(None)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("named", [False, True])
def test_a_spot_without_position_is_rejected(row, tmp_path, axis, value, named):
    data = make()
    data.obsm["spatial"][3, axis] = value
    if named:
        data.obsm["spatial"] = pd.DataFrame(data.obsm["spatial"], data.obs_names, ["x", "y"])
    data.write_h5ad(row.expression)
    found = read(row, tmp_path)
    require_right(found, [i for i in range(NUM_SPOTS) if i != 3])
    assert [(reject.spot_id, reject.reason) for reject in found.rejected] == [(SECTION.barcode[3], "no_position")]
    assert np.isnan([found.rejected[0].x_px, found.rejected[0].y_px]).all()
    assert len(found.layout.xy_px) == NUM_SPOTS - 1


@pytest.mark.odd
def test_a_row_of_missing_values_is_one_reject(row, tmp_path):
    data = make(in_tissue=1)
    data.obs = data.obs.astype(float)
    data.obs.iloc[0] = np.nan
    data.obsm["spatial"][0] = np.nan
    data.write_h5ad(row.expression)
    found = read(row, tmp_path)
    require_right(found, range(1, NUM_SPOTS))
    assert [reject.reason for reject in found.rejected] == ["no_position"]


@pytest.mark.odd
@pytest.mark.parametrize("name", ["array_row", "array_col"])
@pytest.mark.parametrize("text", [False, True])
def test_a_spot_off_the_array_is_rejected(row, tmp_path, name, text):
    data = make()
    column = data.obs[name].astype(float)
    column.iloc[5] = np.nan
    data.obs[name] = column.map(lambda value: f"{value:.0f}") if text else column
    data.write_h5ad(row.expression)
    found = read(row, tmp_path)
    require_right(found, [i for i in range(NUM_SPOTS) if i != 5])
    (reject,) = found.rejected
    assert (reject.spot_id, reject.x_px, reject.reason) == (SECTION.barcode[5], X[5], "no_array_position")


@pytest.mark.odd
def test_array_positions_of_minus_one_are_none(row, tmp_path):
    data = make()
    data.obs.loc[data.obs.index[[5, 9]], ["array_row", "array_col"]] = -1
    data.write_h5ad(row.expression)
    found = read(row, tmp_path)
    require_right(found, [i for i in range(NUM_SPOTS) if i not in (5, 9)])
    assert [reject.reason for reject in found.rejected] == ["no_array_position"] * 2


@pytest.mark.odd
def test_an_array_that_is_nowhere_known_is_none(row, tmp_path):
    make(array_row=np.nan).write_h5ad(row.expression)
    found = read(row, tmp_path)
    assert len(found.spots) == NUM_SPOTS
    assert np.isnan(found.layout.array_xy).all()


TRUTHS = [
    (True, False),
    (1.0, 0.0),
    ("True", "False"),
    ("true", "false"),
    ("TRUE", "FALSE"),
    ("1", "0"),
    ("1.0", "0.0"),
    ("yes", "no"),
    (" Yes ", "No"),
]


@pytest.mark.odd
@pytest.mark.parametrize("as_category", [False, True])
@pytest.mark.parametrize(("yes", "no"), TRUTHS)
def test_in_tissue_as_people_write_it(row, tmp_path, yes, no, as_category):
    cells = pd.Series([yes] * 54 + [no] * 10, SECTION.barcode)
    make(in_tissue=cells.astype("category") if as_category else cells).write_h5ad(row.expression)
    found = read(row, tmp_path)
    require_right(found, range(54))
    assert [reject.reason for reject in found.rejected] == ["not_selected"] * 10
    assert len(found.layout.xy_px) == NUM_SPOTS


@pytest.mark.odd
@pytest.mark.parametrize("cell", ["maybe", "2", "", np.nan])
def test_an_unclear_selection_rejects_its_spot(row, tmp_path, cell):
    cells = pd.Series(["1"] * 63 + [cell], SECTION.barcode, dtype=object)
    make(in_tissue=cells.astype("category")).write_h5ad(row.expression)
    found = read(row, tmp_path)
    require_right(found, range(63))
    assert [(reject.spot_id, reject.reason) for reject in found.rejected] == [
        (SECTION.barcode[63], "unclear_selection")
    ]


@pytest.mark.odd
@pytest.mark.parametrize(
    ("column", "cells", "expected"),
    [
        (
            "in_tissue",
            ["inside"] * 64,
            "64 of 64 cells cannot be used, such as 'inside' (spot AAC0000-1); allowed: 1 or 0",
        ),
        ("in_tissue", [1.0] * 30 + [np.nan] * 34, "34 of 64 cells cannot be used, such as nan (spot AAC0313-1)"),
        ("in_tissue", [0.7] * 64, "64 of 64 cells cannot be used, such as 0.7 (spot AAC0000-1); allowed: 1 or 0"),
        ("array_row", [f"A{i}" for i in range(64)], "64 of 64 cells cannot be used, such as 'A0' (spot AAC0000-1)"),
        ("array_col", [*range(30)] + [np.nan] * 34, "34 of 64 cells cannot be used, such as nan (spot AAC0313-1)"),
    ],
)
def test_a_column_that_is_mostly_bad_is_refused(row, tmp_path, column, cells, expected):
    make(**{column: cells}).write_h5ad(row.expression)
    assert f"a.h5ad: column {column}: {expected}" in refused(row, tmp_path)
