"""Inputs that people reported publicly, made small: each is read right, or refused in a sentence that says what to do.

They are seen as a user sees them, from the sheet to the tile table; the tests of the readers try more of each kind.
"""

import anndata
import h5py
import numpy as np
import pytest
import tifffile
from any_section import GENES, KEPT, OTHERS, any_section
from prepared_here import prepare_here
from prepared_tables import write_sheet
from scipy import sparse
from section_checks import check_section
from section_files import H5adForm, LegacyForm, VisiumForm, write_section

from ingest.prepare import dry_run
from mclstexp.config import Config
from mclstexp.errors import SheetError, SourceError
from mclstexp.prediction.cohort import list_slides

pytestmark = pytest.mark.odd
H5AD = H5adForm()


def section_of(seed=5, **arguments):
    return any_section(seed, angle=4.0, **arguments)


def prepared(folder, *rows, **settings):
    return prepare_here(write_sheet(folder, list(rows)), folder / "out", **settings)


def refused(folder, *rows, error=SourceError, **settings):
    with pytest.raises(error) as caught:
        prepared(folder, *rows, **settings)
    return str(caught.value)


def edit(path, change):
    """Changes an AnnData file in place."""
    data = anndata.read_h5ad(path)
    change(data)
    data.write_h5ad(path)


# ---------------------------------------------------------------- places


@pytest.mark.parametrize("form", [H5AD, VisiumForm(pictures=("hires",))], ids=["h5ad", "visium"])
def test_positions_in_pixels_of_the_hires_picture(tmp_path, form):
    section = section_of()
    halved = section.with_(x=section.x / 2, y=section.y / 2)
    message = refused(tmp_path, write_section(halved, tmp_path, "S", form, mpp=1.0))
    assert "hires" in message
    assert "multiply" in message
    assert "by 2" in message


def test_micrometres_in_place_of_pixels(tmp_path):
    section = section_of(mpp=0.5)
    in_um = section.with_(x=section.x * 0.5, y=section.y * 0.5)
    message = refused(tmp_path, write_section(in_um, tmp_path, "S", H5adForm(uns=None), mpp=0.5))
    assert "micrometres" in message
    assert "divide" in message
    assert "0.5" in message


def test_a_wrong_mpp_in_the_sheet(tmp_path):
    message = refused(tmp_path, write_section(section_of(), tmp_path, "S", H5AD, mpp=0.25))
    assert "0.25" in message
    assert "array of spots" in message
    assert "fix mpp" in message


def test_no_mpp_where_the_array_gives_it(tmp_path):
    section = section_of()
    found = prepared(tmp_path, write_section(section, tmp_path, "S", H5AD))
    check_section(found, section, "S", H5AD)
    assert found.entries["S"].source_mpp == pytest.approx(1.0, rel=1e-3)


# ---------------------------------------------------------------- genes


def write_visium_features(section, folder, name, ids, symbols):
    """A Visium folder whose features are called otherwise."""
    row = write_section(section.with_(genes=tuple(zip(ids, symbols, strict=True))), folder, name, VisiumForm())
    return row | {"patient_id": name}


def plain_neighbour(folder):
    """A section H with the plain ids, of another patient."""
    return write_section(section_of(6), folder, "H", VisiumForm(), patient_id="H")


def genes_of(found, section_id):
    return {gene for gene in found.plan.genes if gene.gene_id in found.measures(section_id)}


IDS, SYMBOLS = ([gene[part] for gene in GENES] for part in (0, 1))
MOUSE = [f"ENSMUSG{i:011d}" for i in range(4)]
TWICE = [*SYMBOLS[:3], "TBCE", "TBCE", *SYMBOLS[5:8]]  # TBCE is twice in GRCh38-2020-A


@pytest.mark.parametrize("human", [SYMBOLS[:8], TWICE], ids=["plain", "repeated_symbol"])
def test_two_genomes_in_one_run(tmp_path, human):
    section = section_of()
    ids = [*(f"GRCh38_{name}" for name in IDS[:8]), *(f"mm10___{name}" for name in MOUSE)]
    symbols = [*(f"GRCh38_{name}" for name in human), *(f"mm10___{name}" for name in MOUSE)]
    found = prepared(tmp_path, write_visium_features(section, tmp_path, "A", ids, symbols), plain_neighbour(tmp_path))
    expected = section.with_(genes=tuple(zip([*IDS[:8], *MOUSE], [""] * 12, strict=True)))
    assert found.measures("A") == {*IDS[:8], *MOUSE}
    assert found.measures("H") == set(IDS)
    check_counts_by_id(found, expected)


def check_counts_by_id(found, section):
    """Compares section A's counts with those of its stable ids; counts under one id are summed."""
    for name, spot in found.spots("A").items():
        i = section.barcodes.index(name)
        expected = {}
        for (gene_id, _), count in zip(section.genes, section.counts[i].tolist(), strict=True):
            expected[gene_id] = expected.get(gene_id, 0) + count
        assert found.counts(spot) == {gene_id: count for gene_id, count in expected.items() if count}


def test_the_copy_of_a_gene_on_chromosome_y(tmp_path):
    section = section_of()
    ids = [*(f"{name}.5" for name in IDS[:4]), f"{IDS[3]}.5_PAR_Y", *IDS[5:]]
    row = write_visium_features(section, tmp_path, "A", ids, [*SYMBOLS[:4], SYMBOLS[3], *SYMBOLS[5:]])
    found = prepared(tmp_path, row, plain_neighbour(tmp_path))
    expected = section.with_(genes=tuple(zip([*IDS[:4], IDS[3], *IDS[5:]], [""] * 12, strict=True)))
    assert found.measures("A") == set(IDS) - {IDS[4]}
    check_counts_by_id(found, expected)


def test_flybase_ids_with_a_symbol_twice(tmp_path):
    section = section_of()
    ids = [f"FBgn{i:07d}" for i in range(12)]
    row = write_visium_features(section, tmp_path, "A", ids, [*SYMBOLS[:3], "Sirup", "Sirup", *SYMBOLS[5:]])
    found = prepared(tmp_path, row)
    assert found.measures("A") == set(ids)
    check_counts_by_id(found, section.with_(genes=tuple(zip(ids, ids, strict=True))))


def test_features_that_are_no_genes(tmp_path):
    form, section = H5adForm(others=True), section_of()
    found = prepared(tmp_path, write_section(section, tmp_path, "S", form))
    check_section(found, section, "S", form)
    assert len(found.plan.genes) == 12
    for _, kind in OTHERS:
        assert f"left out   1 feature of {kind}" in found.plan.sources.replace("features of", "feature of")


def test_a_gene_without_probe_is_not_measured(tmp_path):
    """The tests of scores, bank and loss try what follows from it."""
    whole, part = section_of(1), section_of(2, genes=tuple(GENES[:8]))
    rows = [write_section(whole, tmp_path, "A1", H5AD), write_section(part, tmp_path, "B1", H5AD, patient_id="B")]
    found = prepared(tmp_path, *rows)
    check_section(found, whole, "A1", H5AD)
    check_section(found, part, "B1", H5AD)
    assert "8 in common of 8 to 12" in found.plan.sources


# ---------------------------------------------------------------- splits


def test_one_slide_under_two_patients(tmp_path):
    rows = []
    for name, patient in (("TENX128", "PA"), ("TENX155", "PB")):
        rows.append(write_section(section_of(), tmp_path, name, H5AD, patient_id=patient))
    message = refused(tmp_path, *rows)
    assert all(name in message for name in ("TENX128", "TENX155", "PA", "PB"))


def test_patients_that_differ_in_case_are_named(tmp_path):
    rows = [
        write_section(section_of(seed), tmp_path, f"S{seed}", H5AD, patient_id=patient)
        for seed, patient in ((1, "P1"), (2, "p1"))
    ]
    found = prepared(tmp_path, *rows)
    warning = next(line for line in found.plan.sources.splitlines() if "p1" in line)
    assert "P1" in warning


# ---------------------------------------------------------------- usable files


def test_an_anndata_file_of_before_0_7(tmp_path):
    section = section_of()
    row = write_section(section, tmp_path, "S", H5AD)
    section = section.with_(fate=np.where(section.fate == "no_position", KEPT, section.fate))
    write_old_anndata(tmp_path / "S/section.h5ad", section)
    check_section(prepared(tmp_path, row), section, "S", H5AD)


def write_old_anndata(path, section):
    """obs, var and obsm as compound tables, and X as a group marked by h5sparse."""
    selected = section.fate != "not_selected"
    obs = list(zip((name.encode() for name in section.barcodes), selected, section.row, section.col, strict=True))
    var = [(symbol.encode(), gene_id.encode()) for gene_id, symbol in section.genes]
    matrix = sparse.csr_matrix(section.counts.astype("f4"))
    with h5py.File(path, "w") as file:
        kinds = [("index", "S20"), ("in_tissue", "i8"), ("array_row", "i8"), ("array_col", "i8")]
        file["obs"] = np.array(obs, kinds)
        file["var"] = np.array(var, [("index", "S20"), ("gene_ids", "S20")])
        xy = [((x, y),) for x, y in zip(section.x, section.y, strict=True)]
        file["obsm"] = np.array(xy, [("spatial", "f8", (2,))])
        group = file.create_group("X")
        group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices, matrix.indptr
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", matrix.shape


def test_one_spot_without_any_place(tmp_path):
    """NaN in obs as well as in obsm, as squidpy's reader left it in files of Space Ranger 2."""
    section = section_of()
    first = int(np.flatnonzero(section.fate == KEPT)[0])
    fate = section.fate.copy()
    fate[first] = "no_position"
    row = write_section(section, tmp_path, "S", H5AD)

    def change(data):
        data.obs = data.obs.astype(float)
        data.obs.loc[section.barcodes[first]] = np.nan
        data.obsm["spatial"][data.obs_names.get_loc(section.barcodes[first])] = np.nan

    edit(tmp_path / "S/section.h5ad", change)
    check_section(prepared(tmp_path, row), section.with_(fate=fate), "S", H5AD)


def test_in_tissue_as_text(tmp_path):
    section, form = section_of(), H5adForm(tissue="text")
    check_section(prepared(tmp_path, write_section(section, tmp_path, "S", form)), section, "S", form)


def test_ome_tiff_with_its_pyramid_in_sub_ifds(tmp_path):
    """Only the OME-XML states the resolution."""
    section, form = section_of(), H5adForm(array=False, uns=None)
    row = write_section(section, tmp_path, "A", form)
    size = {f"PhysicalSize{axis}": section.mpp for axis in "XY"} | {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
    with tifffile.TiffWriter(tmp_path / "A/image.ome.tif", ome=True) as file:
        options = {"tile": (256, 256), "photometric": "rgb"}
        file.write(section.pixels, subifds=1, metadata={"axes": "YXS"} | size, **options)
        file.write(section.pixels[::2, ::2], subfiletype=1, **options)
    found = prepared(tmp_path, row | {"image": "A/image.ome.tif"})
    check_section(found, section, "A", form)
    assert found.entries["A"].source_mpp == pytest.approx(1.0)


def test_ome_tiff_with_colours_as_pages(tmp_path):
    section = section_of()
    row = write_section(section, tmp_path, "B", H5AD, mpp=section.mpp)
    with tifffile.TiffWriter(tmp_path / "B/image.ome.tif", ome=True) as file:
        planes = np.moveaxis(section.pixels, 2, 0)
        file.write(planes, tile=(256, 256), photometric="minisblack", metadata={"axes": "CYX"})
    check_section(prepared(tmp_path, row | {"image": "B/image.ome.tif"}), section, "B", H5AD)


def test_a_folder_with_other_endings(tmp_path):
    kinds = {"photometric": "rgb", "tile": (256, 256), "resolution": (10000, 10000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "plain.tif", section_of().pixels, **kinds)
    tifffile.imwrite(tmp_path / "hd.btf", section_of().pixels, bigtiff=True, **kinds)
    (tmp_path / "other.qptiff").write_bytes(b"x")
    slides, left_out = list_slides(str(tmp_path))
    assert {slide.slide_id for slide in slides} == {"plain", "hd"}
    assert left_out == {"qptiff": 1}


@pytest.mark.parametrize("fate", ["not_selected", "no_counts"])
@pytest.mark.parametrize("form", [LegacyForm(), VisiumForm(), H5AD], ids=["legacy_st", "visium", "h5ad"])
def test_a_section_without_any_usable_spot(tmp_path, form, fate):
    section = section_of()
    section = section.with_(fate=np.full(len(section), fate), counts=section.counts * (fate == "not_selected"))
    message = refused(tmp_path, write_section(section, tmp_path, "S", form, mpp=1.0))
    assert f"none of its {len(section)} spots can be used ({len(section)} {fate})" in message


# ---------------------------------------------------------------- sheets


SHEETS = {
    "blank_rows": lambda text: (text + ",,,,,,,,,\r\n" * 2).encode(),
    "blank_columns": lambda text: text.replace("\r\n", ",,\r\n").encode(),
    "semicolons": lambda text: text.replace(",", ";").replace("0.5", "0,5").encode(),
    "unicode_text": lambda text: text.replace(",", "\t").encode("utf-16"),
}


@pytest.mark.parametrize("kind", SHEETS)
def test_a_sheet_as_excel_saves_it(tmp_path, kind):
    section = section_of(mpp=0.5)
    sheet = write_sheet(tmp_path, [write_section(section, tmp_path, "S", H5AD, mpp=0.5)])
    with open(sheet, newline="") as file:
        text = file.read()
    (tmp_path / "samples.csv").write_bytes(SHEETS[kind](text))
    found = prepare_here(sheet, tmp_path / "out")
    check_section(found, section, "S", H5AD)
    assert found.entries["S"].source_mpp == 0.5


def test_a_workbook_as_sheet(tmp_path):
    (tmp_path / "samples.xlsx").write_bytes(b"PK\x03\x04" + bytes(500))
    with pytest.raises(SheetError) as caught:
        dry_run(str(tmp_path / "samples.xlsx"), str(tmp_path / "out"), Config())
    message = str(caught.value)
    assert message.isprintable()
    assert "workbook" in message
    assert "CSV" in message
