"""The sample sheet is validated as a whole: every fault is listed with row and column."""

import pytest

from ingest.readers import READERS
from mclstexp import storage
from mclstexp.data import sheet
from mclstexp.data.sheet import read_sheet
from mclstexp.errors import SheetError

HEADER = "section_id,patient_id,image,format,expression,positions,mpp,spot_diameter_um,labels,site"


@pytest.fixture
def folder(tmp_path):
    for name in ("a.tif", "a.tsv.gz", "a_sel.tsv", "b.tif", "b.h5ad", "c.svs", "a_labels.tsv"):
        (tmp_path / name).touch()
    return tmp_path


def write(folder, *lines, header=HEADER):
    path = folder / "samples.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return str(path)


def faults(path):
    with pytest.raises(SheetError) as caught:
        read_sheet(path, READERS)
    return str(caught.value)


def test_good_sheet(folder):
    rows = read_sheet(
        write(
            folder,
            "A1,A,a.tif,legacy_st,a.tsv.gz,a_sel.tsv,0.69,100,a_labels.tsv,Uppsala (SE)",
            f"B-1,B,{folder}/b.tif,h5ad,b.h5ad,,,55,,",
            "C.1,C,c.svs,slide,,,,,,",
        ),
        READERS,
    )
    assert [row.section_id for row in rows] == ["A1", "B-1", "C.1"]
    assert rows[0].files == {
        "image": f"{folder}/a.tif",
        "expression": f"{folder}/a.tsv.gz",
        "positions": f"{folder}/a_sel.tsv",
        "labels": f"{folder}/a_labels.tsv",
    }
    assert (rows[0].mpp, rows[0].spot_diameter_um, rows[0].site) == (0.69, 100.0, "Uppsala (SE)")
    assert (rows[1].mpp, rows[1].positions, rows[1].measured) == (None, None, True)
    assert not rows[2].measured


def test_columns_in_any_order_with_byte_order_mark(folder):
    path = folder / "samples.csv"
    path.write_bytes("﻿format,image,patient_id,section_id\r\nslide,c.svs,C,C1\r\n".encode())
    assert read_sheet(str(path), READERS)[0].section_id == "C1"


def test_all_faults_at_once_with_row_and_column(folder):
    text = faults(
        write(
            folder,
            "A1,A,a.tif,legacy_st,a.tsv.gz,,0.69,100,,",
            "A1,,none.tif,xenium,,,-1,inf,,",
            "../up,A,c.svs,slide,b.h5ad,,x,,,",
        )
    )
    for fault in (
        "row 2: format legacy_st needs positions",
        "row 3, column section_id: 'A1' is already in row 2",
        "row 3, column patient_id: it is empty",
        "row 3, column image: there is no file none.tif",
        "row 3, column format, got 'xenium'",
        "row 3, column mpp, got '-1'",
        "row 3, column spot_diameter_um, got 'inf'",
        "row 4, column section_id, got '../up'",
        "row 4, column mpp, got 'x'",
    ):
        assert fault in text
    assert "has 9 fault(s)" in text


def test_an_empty_format_is_one_fault(folder):
    text = faults(write(folder, "C1,C,c.svs,,,,,,,"))
    assert "has 1 fault(s):\n  row 2, column format: it is empty" in text


@pytest.mark.parametrize(
    "name",
    ["../x", "..", ".hidden", "a/b", "a\\b", "%2e%2e", "/abs", "a b", "=1+1", "é", "А1", "x" * 129, "", "a#b", "a\tb"],
)
def test_section_ids_cannot_leave_the_table(folder, name):
    assert "column section_id" in faults(write(folder, f'"{name}",C,c.svs,slide,,,,,,'))


def test_longest_section_id(folder):
    assert read_sheet(write(folder, f"{'x' * 128},C,c.svs,slide,,,,,,"), READERS)[0].section_id == "x" * 128


def test_slides_take_no_expression(folder):
    assert "format slide takes no expression" in faults(write(folder, "C1,C,c.svs,slide,b.h5ad,,,,,"))


def test_header_faults_come_with_the_nearest_name(folder):
    text = faults(write(folder, "x,x,x,x", header="section,patient_id,imgae,site,site"))
    assert "column 'imgae' is unknown; did you mean image?" in text
    assert "column site appears twice" in text
    assert "column section_id is missing" in text
    assert "column format is missing" in text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (HEADER.encode() + b"\n", "no rows"),
        (b"", "column section_id is missing"),
        (HEADER.encode() + b"\nC1,C,\xff.svs,slide\n", "not a CSV file in UTF-8"),
        (HEADER.encode() + b'\nC1,C,"c.svs,slide\n', "not a CSV file"),
        (HEADER.encode() + b"\nC1,C,c.svs,slide,,,,,,,too,many\n", "row 2.* more cells"),
    ],
)
def test_other_files_are_refused(folder, content, reason):
    path = folder / "samples.csv"
    path.write_bytes(content)
    with pytest.raises(SheetError, match=reason):
        read_sheet(str(path), READERS)


def test_missing_and_huge_sheets_are_refused(folder, monkeypatch):
    assert "there is no sample sheet" in faults(str(folder / "none.csv"))
    monkeypatch.setattr(sheet, "MAX_SHEET_BYTES", 10)
    assert "larger than 10 bytes" in faults(write(folder, "C1,C,c.svs,slide,,,,,,"))


@pytest.mark.odd
@pytest.mark.parametrize(
    "path",
    [
        *("s3://key:secret@bucket/c.svs", "gs://bucket/c.svs", "~no_such_user/c.svs"),
        *(pytest.param(f"{letter * 300}.svs", id=f"a name of 300 {letter}") for letter in "uü"),
    ],
)
def test_paths_that_cannot_be_resolved(folder, path):
    assert "row 2, column image, got" in faults(write(folder, f"C1,C,{path},slide,,,,,,"))


def test_sheet_in_object_storage(s3):
    storage.write(f"{s3}/cohort/images/c.svs", b"")
    storage.write(f"{s3}/cohort/samples.csv", f"{HEADER}\nC1,C,images/c.svs,slide,,,,,,\n".encode())
    assert read_sheet(f"{s3}/cohort/samples.csv", READERS)[0].image == f"{s3}/cohort/images/c.svs"
    storage.delete(f"{s3}/cohort/images/c.svs")
    assert "row 2, column image: there is no file images/c.svs" in faults(f"{s3}/cohort/samples.csv")


@pytest.mark.odd
@pytest.mark.parametrize("numbers", ["01", "12"])
def test_row_numbers_that_pandas_or_r_writes_first_are_passed_over(folder, numbers):
    rows = ["C1,C,c.svs,slide,,,,,,", "D1,D,c.svs,slide,,,0.25,,,"]
    text = "".join(f"{cell},{row}\n" for cell, row in zip(("", *numbers), (HEADER, *rows), strict=True))
    (folder / "samples.csv").write_text(text)
    first, second = read_sheet(str(folder / "samples.csv"), READERS)
    assert (first.section_id, first.patient_id, second.section_id, second.mpp) == ("C1", "C", "D1", 0.25)


@pytest.mark.odd
def test_a_nameless_first_column_of_anything_else_is_refused(folder):
    (folder / "samples.csv").write_text(f",{HEADER}\nx,C1,C,c.svs,slide,,,,,,\n")
    assert "row 2, cell 1, got 'x': its column has no name in the header" in faults(str(folder / "samples.csv"))


@pytest.mark.odd
@pytest.mark.parametrize("missing", ["NA", "nan", "N/A", "NULL"])
def test_what_r_and_pandas_write_for_a_missing_cell_is_an_empty_one(folder, missing):
    (row,) = read_sheet(write(folder, f"C1,C,c.svs,slide,{missing},{missing},{missing},{missing},,"), READERS)
    assert (row.expression, row.positions, row.mpp, row.spot_diameter_um) == (None, None, None, None)
    assert "format h5ad needs expression" in faults(write(folder, f"C1,C,c.svs,h5ad,{missing},,,,,"))
