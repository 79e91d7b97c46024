"""Sample sheets and tables of spots as spreadsheets save them: read with the same values, or refused in words."""

import gzip
import unicodedata
import zipfile

import pytest

from ingest.readers import READERS
from mclstexp import storage
from mclstexp.data.sheet import read_sheet
from mclstexp.errors import SheetError
from mclstexp.prediction.cohort import list_slides, read_positions

pytestmark = pytest.mark.odd
SHEET = "section_id,patient_id,image,format,mpp,site\nA1,A,a.svs,slide,0.5,Umeå\nB1,B,b.svs,slide,0.325,\n"
SPOTS = "section_id,x_px,y_px\nA1,0.5,20.25\nA1,12.125,3\n"
FORMS = {
    "as is": lambda text: text.encode(),
    "byte order mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16": lambda text: text.replace(",", "\t").encode("utf-16"),
    "UTF-16, big endian": lambda text: ("\ufeff" + text.replace(",", "\t")).encode("utf-16-be"),
    "semicolons, decimal commas": lambda text: (
        text.replace(",", ";").replace(".", ",").replace(",svs", ".svs").encode()
    ),
    "semicolons, decimal points": lambda text: text.replace(",", ";").encode(),
    "tabs": lambda text: text.replace(",", "\t").encode(),
    "separator named": lambda text: b"sep=;\r\n" + text.replace(",", ";").encode(),
    "line ends of Windows": lambda text: text.replace("\n", "\r\n").encode(),
    "line ends of old Macs": lambda text: text.replace("\n", "\r").encode(),
    "no last line end": lambda text: text.rstrip().encode(),
    "blank rows": lambda text: text.replace("\n", "\n\n").encode(),
    "rows of commas": lambda text: (text + ",,,,,\r\n" * 3).encode(),
    "rows of commas first": lambda text: (",,,\n\n" + text).encode(),
    "rows of commas and spaces": lambda text: (text + " , ,\t,\n").encode(),
    "blank columns": lambda text: text.replace("\n", ",,\n").encode(),
    "a blank column first": lambda text: "".join(f",{line}\n" for line in text.splitlines()).encode(),
    "a longer blank row": lambda text: (text + "," * 30 + "\n").encode(),
    "spaces": lambda text: text.replace(",", " , ").encode(),
    "protected spaces": lambda text: text.replace(",", "\u00a0,\u00a0").encode(),
    "header in capitals": lambda text: (text.partition("\n")[0].upper() + "\n" + text.partition("\n")[2]).encode(),
    "header in words": lambda text: _in_words(text).encode(),
    "quoted cells": lambda text: "\n".join(
        ",".join(f'"{cell}"' for cell in line.split(",")) for line in text.splitlines()
    ).encode(),
}


def _in_words(text):
    header, _, rows = text.partition("\n")
    return header.replace("_", " ").title() + "\n" + rows


@pytest.mark.parametrize("form", FORMS)
def test_a_sheet_in_any_form_has_the_same_rows(tmp_path, form):
    path = tmp_path / "samples.csv"
    path.write_bytes(FORMS[form](SHEET))
    rows = [(row.section_id, row.patient_id, row.image, row.mpp, row.site) for row in read_sheet(str(path))]
    assert rows == [("A1", "A", f"{tmp_path}/a.svs", 0.5, "Umeå"), ("B1", "B", f"{tmp_path}/b.svs", 0.325, "")]


@pytest.mark.parametrize("form", FORMS)
def test_a_table_of_spots_in_any_form_has_the_same_places(tmp_path, form):
    path = tmp_path / "spots.csv"
    path.write_bytes(FORMS[form](SPOTS))
    assert read_positions(str(path))["A1"].to_pydict() == {
        "spot_id": ["0", "1"],
        "x_px": [0.5, 12.125],
        "y_px": [20.25, 3.0],
    }


def _workbook(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("xl/workbook.xml", bytes(500))
    return path.read_bytes()


OTHER_FILES = {
    "workbook": (_workbook, "is a workbook .*CSV UTF-8"),
    "old workbook": (lambda _: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), r"old Excel \(.xls\).*CSV UTF-8"),
    "gzip": (lambda _: gzip.compress(SHEET.encode()), "compressed with gzip"),
    "Latin-1": (lambda _: SHEET.encode("latin-1"), "row 2 has characters of another encoding.*CSV UTF-8"),
    "Mac Roman": (lambda _: SHEET.encode("mac-roman"), "row 2 has characters of another encoding.*CSV UTF-8"),
    "UTF-16 without mark": (lambda _: "section_id".encode("utf-16-le"), "null characters.*CSV UTF-8"),
    "UTF-32": (lambda _: SHEET.encode("utf-32"), "null characters|another encoding"),
    "picture": (lambda _: b"\x89PNG\r\n\x1a\n\0\0", "row 1 has characters of another encoding"),
}


@pytest.mark.parametrize("read", [read_sheet, read_positions])
@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_are_refused_without_their_bytes(tmp_path, name, read):
    make, expected = OTHER_FILES[name]
    path = tmp_path / "table.csv"
    path.write_bytes(make(path))
    with pytest.raises(SheetError, match=expected) as caught:
        read(str(path))
    assert str(caught.value).isprintable()
    assert "\\x" not in str(caught.value)


FAULTS = {
    "no line breaks": ("x" * 200_000, "is not a CSV file: its header has 200000 characters"),
    "a cell without end": (SHEET + "x" * 200_000, "is not a CSV file: row 4: field larger"),
    "thousands between tabs": (SHEET.replace(",", "\t").replace("0.325", "1,325"), "row 3, column mpp, got '1,325'"),
    "decimal comma between commas": (SHEET.replace("0.325", '"0,325"'), "row 3, column mpp, got '0,325'"),
    "rows of the file are counted": ("\n\n" + SHEET.replace("B1", "B/1"), "row 5, column section_id, got 'B/1'"),
    "named separator": (
        "sep=;\n" + SHEET.replace(",", ";").replace("B1", "B/1"),
        "row 4, column section_id, got 'B/1'",
    ),
    "a cell outside": (SHEET.replace("0.325,", "0.325,,x"), "row 3, cell 7, got 'x': the row has more cells"),
    "a cell without header": (SHEET.replace("site", ""), "row 2, cell 6, got 'Umeå': its column has no name"),
    "an error of Excel": (
        SHEET.replace("0.325", "#REF!"),
        "row 3, cell 5, got '#REF!': that is the error of a formula",
    ),
    "an id made a number": (SHEET.replace("B1", "1E+05"), r"row 3, column section_id, got '1E\+05'"),
    "a missing patient in R": (SHEET.replace(",B,", ",NA,"), "row 3, column patient_id, got 'NA': this stands for"),
    "a missing patient in pandas": (SHEET.replace(",B,", ",nan,"), "row 3, column patient_id, got 'nan': this stands"),
    "columns twice": (SHEET.replace("site", "MPP"), "column mpp appears twice"),
    "bars": (SHEET.replace(",", "|"), "column 'section_id|patient_id"),
    "a path of Windows": (SHEET.replace("b.svs", "slides\\b.svs"), "row 3, column image, got .*path of Windows"),
    "a drive of Windows": (
        SHEET.replace("b.svs", "C:/b.svs"),
        "row 3, column image, got 'C:/b.svs': .*path of Windows",
    ),
    "a file of another host": (
        SHEET.replace("b.svs", "file://host/b.svs"),
        "file URI has an absolute path on this mach",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_could_be_read_in_two_ways_is_refused(tmp_path, name):
    text, expected = FAULTS[name]
    (tmp_path / "samples.csv").write_text(text)
    with pytest.raises(SheetError, match=expected.replace("|", r"\|")):
        read_sheet(str(tmp_path / "samples.csv"))


def test_thousands_between_tabs_are_no_place(tmp_path):
    (tmp_path / "spots.csv").write_text("section_id\tx_px\ty_px\n\nA\t12,345\t0,5\n")
    with pytest.raises(SheetError, match=r"1 fault\(s\):\n  row 3, column x_px, got '12,345'"):
        read_positions(str(tmp_path / "spots.csv"))


def test_a_sheet_of_slides_may_have_another_ending(tmp_path):
    (tmp_path / "slides.txt").write_text(SHEET.replace(",", "\t"))
    assert [slide.mpp for slide in list_slides(str(tmp_path / "slides.txt"))[0]] == [0.5, 0.325]


@pytest.mark.parametrize("own", ["NFC", "NFD"])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
@pytest.mark.parametrize("place", ["local", "s3"])
def test_names_with_accents_are_found_in_either_spelling(tmp_path, request, place, written, own):
    root = str(tmp_path) if place == "local" else request.getfixturevalue("s3")
    image = storage.join(root, unicodedata.normalize(own, "Präparate/Schnitt é.svs"))
    storage.write(image, b"x")
    name = unicodedata.normalize(written, "Präparate/Schnitt é.svs")
    storage.write(f"{root}/samples.csv", f"section_id,patient_id,image,format\nA,A,{name},slide\n".encode())
    assert [row.image for row in read_sheet(f"{root}/samples.csv", READERS)] == [image]


def test_a_name_that_two_files_share_but_for_their_spelling_is_the_written_one(tmp_path):
    names = [unicodedata.normalize(form, "é.svs") for form in ("NFC", "NFD")]
    for name in names:
        (tmp_path / name).touch()
        (tmp_path / "samples.csv").write_text(f"section_id,patient_id,image,format\nA,A,{name},slide\n")
        assert read_sheet(str(tmp_path / "samples.csv"), READERS)[0].image == f"{tmp_path}/{name}"


@pytest.mark.parametrize("start", ["file://", "file://localhost", "file:"])
@pytest.mark.parametrize("name", ["a b.svs", "100%.svs", "a#1.svs", "é.svs", "what?.svs"])
def test_file_uris_are_decoded(tmp_path, start, name):
    (tmp_path / name).touch()
    uri = start + (tmp_path / name).as_uri().removeprefix("file://")
    (tmp_path / "samples.csv").write_text(f"section_id,patient_id,image,format\nA,A,{uri},slide\n")
    assert read_sheet(str(tmp_path / "samples.csv"), READERS)[0].image == f"{tmp_path}/{name}"


@pytest.mark.parametrize(
    "name", ["what?.svs", "a?v=2&b.svs", "a#1.svs", "100%.svs", "%20.svs", "a b+c.svs", "a;b=.svs"]
)
def test_keys_may_have_any_characters(s3, tmp_path, name):
    storage.write(f"{s3}/in put?/{name}", b"slide")
    storage.write(f"{s3}/in put?/samples.csv", f"section_id,patient_id,image,format\nA,A,{name},slide\n".encode())
    uri = read_sheet(f"{s3}/in put?/samples.csv", READERS)[0].image
    assert uri == f"{s3}/in put?/{name}"
    assert storage.list_files(f"{s3}/in put?") == sorted([uri, f"{s3}/in put?/samples.csv"])
    with storage.local_copy(uri, tmp_path) as path, open(path, "rb") as file:
        assert file.read() == b"slide"
    storage.delete(uri)
    assert not storage.exists(uri)


@pytest.mark.parametrize("options", ["?endpoint_override=host", "?region=eu", "?scheme=http&access_key=a&secret_key=b"])
def test_options_in_a_uri_are_refused_without_repeating_them(options):
    with pytest.raises(storage.StorageError, match="put endpoint and profile into") as caught:
        storage.absolute(f"s3://bucket/key{options}")
    assert options not in str(caught.value)
