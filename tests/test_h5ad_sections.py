"""Several sections in one AnnData file: chosen by `library_id` of the sheet, refused without a choice, never mixed."""

import anndata
import numpy as np
import pandas as pd
import pytest
from section_reading import read, refused

from ingest.readers import READERS
from ingest.readers.files import read_preview
from mclstexp.data.sheet import SectionRow, read_sheet
from mclstexp.errors import SheetError, SourceError

pytestmark = pytest.mark.filterwarnings("ignore:Observation names are not unique")
ROW, COLUMN = np.array([(row, 2 * step + row % 2) for row in range(5) for step in range(6)]).T
NAMES = ("A1", "B1")


@pytest.fixture
def row(tmp_path):
    path = str(tmp_path / "ab.h5ad")
    return SectionRow(section_id="S1", patient_id="P1", image=path, format="h5ad", expression=path)


def xy_of(section):
    return np.stack([COLUMN * 50 + 1000 * section, ROW * 87 + 2000 * section], axis=1).astype(float)


def counts_of(section):
    return np.stack([np.arange(30) + 1 + 100 * section, np.full(30, 2)], axis=1)


def make(column="library_id", names=NAMES, uns=NAMES, array=True, same_barcodes=True):
    """Both sections, of 30 spots each, on the same array; a name per section in a column of obs."""
    barcodes = [f"AAC{i:03d}-1" + ("" if same_barcodes else f"-{section}") for section in (0, 1) for i in range(30)]
    obs = pd.DataFrame(index=barcodes)
    if array:
        obs["array_row"], obs["array_col"] = np.tile(ROW, 2), np.tile(COLUMN, 2)
    if column:
        obs[column] = np.repeat(names, 30)
    values = np.concatenate([counts_of(0), counts_of(1)]).astype(np.float32)
    data = anndata.AnnData(values, obs, pd.DataFrame(index=["GNAS", "FASN"]))
    data.obsm["spatial"] = np.concatenate([xy_of(0), xy_of(1)])
    if uns:
        diameters = {name: 65.0 + section for section, name in enumerate(uns)}
        data.uns["spatial"] = {name: {"scalefactors": {"spot_diameter_fullres": d}} for name, d in diameters.items()}
    return data


def require_section(row, tmp_path, section, diameter):
    found, preview = read(row, tmp_path), read_preview(row, str(tmp_path))
    np.testing.assert_array_equal(np.stack([found.spots.x_px, found.spots.y_px], axis=1), xy_of(section))
    np.testing.assert_array_equal(found.spots.counts.toarray(), counts_of(section))
    assert found.rejected == ()
    for layout in (found.layout, preview.layout):
        np.testing.assert_array_equal(layout.xy_px, xy_of(section))
        assert layout.spot_diameter_px == diameter


@pytest.mark.odd
@pytest.mark.parametrize("section", [0, 1])
@pytest.mark.parametrize(
    ("column", "names", "uns", "diameters"),
    [
        ("library_id", NAMES, NAMES, (65, 66)),
        ("Library_ID", NAMES, NAMES, (65, 66)),
        ("library_id", NAMES, (), (None, None)),
        ("library_id", NAMES, NAMES[:1], (65, None)),
        ("library_id", (1, 2), ("1", "2"), (65, 66)),
        ("library_id", (1.0, 2.0), (), (None, None)),
        ("region", NAMES, NAMES, (65, 66)),
        ("sample", NAMES, (), (None, None)),
        ("sample_id", NAMES, ("left", "right"), (None, None)),
        ("batch", ("0", "1"), (), (None, None)),
        ("section", ("C2", "C3"), ("C2", "C3"), (65, 66)),
    ],
)
def test_the_sheet_chooses_a_section(row, tmp_path, column, names, uns, diameters, section):
    data = make(column, names, uns)
    data.write_h5ad(row.expression)
    name = str(names[section]).removesuffix(".0")
    require_section(row.model_copy(update={"library_id": name}), tmp_path, section, diameters[section])


@pytest.mark.odd
@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("same_barcodes", [False, True])
@pytest.mark.parametrize("column", ["library_id", "region", "sample", "slide"])
def test_several_sections_without_a_choice_are_refused(row, tmp_path, column, array, same_barcodes):
    make(column, array=array, same_barcodes=same_barcodes).write_h5ad(row.expression)
    expected = f"ab.h5ad: it holds 2 sections by obs['{column}']: A1, B1; choose one with the column library_id of the"
    assert expected in refused(row, tmp_path)
    with pytest.raises(SourceError, match="it holds 2 sections"):
        read_preview(row, str(tmp_path))


@pytest.mark.odd
@pytest.mark.parametrize(
    ("wanted", "advice"), [("A", "did you mean A1?"), ("b1", "did you mean B1?"), ("C9", "known: A1, B1")]
)
@pytest.mark.parametrize("uns", [NAMES, ()])
def test_a_section_that_is_not_there_is_refused(row, tmp_path, wanted, advice, uns):
    make(uns=uns).write_h5ad(row.expression)
    text = refused(row.model_copy(update={"library_id": wanted}), tmp_path)
    assert f"it has no section '{wanted}', which library_id of the sample sheet names; {advice}" in text


@pytest.mark.odd
@pytest.mark.parametrize("wanted", [None, "A1"])
def test_sections_that_nothing_tells_apart_are_refused(row, tmp_path, wanted):
    make(column=None, uns=("A1",)).write_h5ad(row.expression)
    text = refused(row.model_copy(update={"library_id": wanted}), tmp_path)
    assert "array positions or barcodes of its 60 spots repeat, so they are of several sections" in text
    assert "write one file per section" in text


@pytest.mark.odd
def test_several_libraries_that_no_column_names_are_refused(row, tmp_path):
    make(column=None, array=False).write_h5ad(row.expression)
    text = refused(row, tmp_path)
    assert "uns['spatial'] has the libraries A1, B1, and no column of obs states which one the spots belong to" in text


@pytest.mark.odd
@pytest.mark.parametrize("wanted", [None, "B1"])
@pytest.mark.parametrize("column", ["library_id", "region"])
def test_a_section_taken_out_of_a_joined_file_keeps_its_own_scale(row, tmp_path, column, wanted):
    data = make(column)
    data[data.obs[column] == "B1"].copy().write_h5ad(row.expression)
    require_section(row.model_copy(update={"library_id": wanted}), tmp_path, 1, 66)


@pytest.mark.odd
@pytest.mark.parametrize("wanted", [None, "A1"])
def test_a_file_of_one_section_may_be_named(row, tmp_path, wanted):
    make(column=None, uns=("A1",))[:30].copy().write_h5ad(row.expression)
    require_section(row.model_copy(update={"library_id": wanted}), tmp_path, 0, 65)


@pytest.mark.odd
def test_a_file_without_names_takes_no_name(row, tmp_path):
    make(column=None, uns=())[:30].copy().write_h5ad(row.expression)
    text = refused(row.model_copy(update={"library_id": "A1"}), tmp_path)
    assert (
        "it has no section 'A1', which library_id of the sample sheet names; it names none, so leave library_id" in text
    )


NAMED_APART = ["sampleid", "captureArea", "Library_ID", "donor_id", "condition"]
SEQUENCES = np.random.default_rng(0).choice(list("ACGT"), (30, 16))


def as_sequences(section):
    return [f"{'LR'[section]}_{''.join(sequence)}-1-{section}" for sequence in SEQUENCES]


def as_bins(section):
    return [f"s_016um_{row:05d}_{column:05d}-1_{section}" for row, column in zip(ROW, COLUMN, strict=True)]


def make_named(column, names_of):
    """Both sections without array positions, with barcodes as joining makes them."""
    data = make(column, uns=(), array=False)
    data.obs_names = [*names_of(0), *names_of(1)]
    return data


@pytest.mark.odd
@pytest.mark.parametrize("column", NAMED_APART)
@pytest.mark.parametrize("names_of", [None, as_sequences, as_bins])
def test_any_column_that_tells_sections_apart_names_them(row, tmp_path, column, names_of):
    data = make_named(column, names_of) if names_of else make(column, uns=())
    data.obs["leiden"] = pd.Categorical(["1", "2", "3"] * 20)
    data.write_h5ad(row.expression)
    assert f"it holds 2 sections by obs['{column}']: A1, B1; choose one with the column" in refused(row, tmp_path)
    for section, name in enumerate(NAMES):
        require_section(row.model_copy(update={"library_id": name}), tmp_path, section, None)


@pytest.mark.odd
@pytest.mark.parametrize("names_of", [as_sequences, as_bins])
def test_barcodes_that_repeat_are_of_several_sections(row, tmp_path, names_of):
    make_named(None, names_of).write_h5ad(row.expression)
    assert "array positions or barcodes of its 60 spots repeat" in refused(row, tmp_path)


@pytest.mark.odd
def test_scale_factors_without_the_name_of_a_section(row, tmp_path):
    data = make(None, uns=())[:30].copy()
    data.uns["spatial"] = {"scalefactors": {"spot_diameter_fullres": 65.0}, "images": {}}
    data.write_h5ad(row.expression)
    require_section(row, tmp_path, 0, 65)


@pytest.mark.odd
def test_parts_of_one_slide_are_one_section(row, tmp_path):
    """Array positions that do not repeat show that `sample` does not name slides."""
    data = make("sample", uns=())[:30].copy()
    data.obs["sample"] = ["left"] * 15 + ["right"] * 15
    data.write_h5ad(row.expression)
    require_section(row, tmp_path, 0, None)


@pytest.mark.odd
def test_a_spot_of_no_library_belongs_to_no_section(row, tmp_path):
    data = make()
    data.obs["library_id"] = data.obs["library_id"].astype(object)
    data.obs.iloc[3, data.obs.columns.get_loc("library_id")] = np.nan
    data.write_h5ad(row.expression)
    chosen = row.model_copy(update={"library_id": "A1"})
    assert read(chosen, tmp_path).spots.x_px.tolist() == np.delete(xy_of(0)[:, 0], 3).tolist()
    (remark,) = read_preview(chosen, str(tmp_path)).remarks
    assert remark == "1 of the file's 60 spots name no section and are in none"


@pytest.mark.odd
@pytest.mark.parametrize("name", ["visium", "legacy_st", "slide"])
def test_other_formats_take_no_library_id(tmp_path, name):
    sheet = "section_id,patient_id,image,format,library_id\nS1,P1,a.png,{},A1\n"
    (tmp_path / "samples.csv").write_text(sheet.format(name))
    with pytest.raises(SheetError, match=f"format {name} takes no library_id"):
        read_sheet(str(tmp_path / "samples.csv"), READERS)
