"""Slides of a run: sheets, folders and prefixes; given spots; keys; fingerprints of images."""

import pytest

from mclstexp import storage
from mclstexp.errors import SheetError
from mclstexp.prediction.cohort import left_out_files, list_slides, read_positions, require_positions
from mclstexp.prediction.plan import fingerprint


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_a_sheet_gives_the_images_of_all_formats(tmp_path):
    touch(tmp_path, "a.svs", "b.jpg", "counts.tsv", "spots.tsv")
    (tmp_path / "samples.csv").write_text(
        "section_id,patient_id,image,format,expression,positions,mpp,site\n"
        "S1,P1,a.svs,slide,,,0.25,left\nS2,P1,b.jpg,legacy_st,counts.tsv,spots.tsv,,\n"
    )
    (first, second), left_out = list_slides(str(tmp_path / "samples.csv"))
    assert left_out == {}
    assert (first.slide_id, first.patient_id, first.site, first.mpp) == ("S1", "P1", "left", 0.25)
    assert first.image == str(tmp_path / "a.svs")
    assert (second.slide_id, second.mpp, second.image) == ("S2", None, str(tmp_path / "b.jpg"))


def test_a_sheet_may_name_a_missing_image(tmp_path):
    (tmp_path / "slides.csv").write_text("section_id,patient_id,format,image\nA,P,slide,away.svs\n")
    assert [slide.image for slide in list_slides(str(tmp_path / "slides.csv"))[0]] == [str(tmp_path / "away.svs")]


def test_a_folder_gives_its_images_at_any_depth(tmp_path):
    touch(tmp_path, "b.SVS", "deep/er/a b&c.tif", "notes.txt", ".hidden.svs", "svs", "x.mrxs", "d.dcm")
    touch(tmp_path, "out/previews/b.jpg", "outside.png")
    found, left_out = list_slides(str(tmp_path), f"{tmp_path}/out")
    assert {slide.slide_id for slide in found} == {"b", "a_b_c", "x", "outside"}
    assert left_out == {"txt": 1, "": 1, "dcm": 1}
    assert all(slide.patient_id == slide.slide_id and slide.mpp is None for slide in found)
    assert next(slide.image for slide in found if slide.slide_id == "a_b_c") == str(tmp_path / "deep/er/a b&c.tif")


@pytest.mark.odd
def test_files_that_are_no_slides_are_counted_by_ending(tmp_path):
    touch(tmp_path, "hd.btf", "a.ome.tif", "b.jp2", "other.qptiff", "c.CZI", "d/e.czi", "notes", "metadata.csv")
    touch(tmp_path, "x.mrxs", "x/Data0000.dat", "x/Slidedat.ini", "y/Data0000.dat", ".DS_Store", "out/a.parquet")
    found, left_out = list_slides(str(tmp_path), f"{tmp_path}/out")
    assert {slide.slide_id for slide in found} == {"hd", "a.ome", "b", "x"}
    assert left_out == {"czi": 2, "csv": 1, "dat": 1, "qptiff": 1, "": 1}
    assert left_out_files({"czi": 2, "": 1}) == "left out 3 files with other endings: .czi 2, none 1"
    assert left_out_files({"qptiff": 1}) == "left out 1 file with other endings: .qptiff 1"


@pytest.mark.odd
@pytest.mark.parametrize("name", ["a.qptiff", "a.czi", "a.dcm", "a.SVS.part", "svs", "a.zip"])
def test_a_folder_without_slides_names_the_endings_that_it_has(tmp_path, name):
    touch(tmp_path, name, "b.txt")
    ending = name.rpartition(".")[2] if "." in name else "none"
    with pytest.raises(SheetError, match=rf"no slide under .*left out 2 files with other endings: .*{ending} 1"):
        list_slides(str(tmp_path))


def test_names_stay_within_the_output(tmp_path):
    touch(tmp_path, "a/x/..%2e.svs", "a/x..%2e.svs", "é\n.png", f"{'y' * 200}.jpg")
    ids = sorted(slide.slide_id for slide in list_slides(str(tmp_path))[0])
    assert ids == ["__", "x.._2e", "y" * 128]  # what begins with a dot is hidden


def test_two_files_of_one_name_are_refused_by_name(tmp_path):
    touch(tmp_path, "a.svs", "b/a.tif", "c.svs")
    with pytest.raises(SheetError, match=r"(?s)same slide id.*a: .*a\.svs, .*b/a\.tif"):
        list_slides(str(tmp_path))


@pytest.mark.parametrize("name", ["empty", "none"])
def test_no_slide_is_an_error(tmp_path, name):
    (tmp_path / "empty").mkdir()
    touch(tmp_path / "empty", "a.txt")
    with pytest.raises(SheetError, match="no slide under"):
        list_slides(str(tmp_path / name))


def test_a_prefix_is_a_folder(s3):
    for key in ("slides/a.svs", "slides/deep/b.jpg", "slides/b.txt", "other/c.svs"):
        storage.write(f"{s3}/{key}", b"x")
    found, left_out = list_slides(f"{s3}/slides/")
    assert [(slide.slide_id, slide.image) for slide in found] == [
        ("a", f"{s3}/slides/a.svs"),
        ("b", f"{s3}/slides/deep/b.jpg"),
    ]
    assert left_out == {"txt": 1}
    before = fingerprint(f"{s3}/slides/a.svs")
    assert before == fingerprint(f"{s3}/slides/a.svs")
    assert before.startswith("1-")
    assert '"' not in before
    storage.write(f"{s3}/slides/a.svs", b"y")
    assert fingerprint(f"{s3}/slides/a.svs") != before


def spots(tmp_path, text):
    path = tmp_path / "spots.csv"
    path.write_text(text)
    return str(path)


def test_spots_by_slide(tmp_path):
    found = read_positions(spots(tmp_path, "section_id,x_px,y_px\nS2,1.5,2\nS1,3,4\nS2, 5 ,6e2\n"))
    assert list(found) == ["S2", "S1"]
    assert found["S2"].to_pydict() == {"spot_id": ["0", "1"], "x_px": [1.5, 5.0], "y_px": [2.0, 600.0]}
    named = read_positions(spots(tmp_path, "spot_id,y_px,section_id,x_px\nA,2,S,1\n"))
    assert named["S"].to_pylist() == [{"spot_id": "A", "x_px": 1.0, "y_px": 2.0}]


def test_all_faults_of_spots_are_listed_at_once(tmp_path):
    table = "section_id,spot_id,x_px,y_px\nS,a,1,2\nS,a,nan,2\n,b,1,here\nT,a,1,inf\nS,,1,2\n"
    with pytest.raises(SheetError) as error:
        read_positions(spots(tmp_path, table))
    message = str(error.value)
    assert "6 fault(s)" in message
    for part in (
        "row 3, column x_px, got 'nan'",
        "row 3, column spot_id: 'a' is already",
        "row 4, column y_px, got 'here'",
        "row 4, column section_id: it is empty",
        "row 5, column y_px, got 'inf'",
        "row 6, column spot_id: it is empty",
    ):
        assert part in message


def test_many_faults_are_counted(tmp_path):
    with pytest.raises(SheetError, match=r"(?s)50 fault\(s\).*and 30 more"):
        read_positions(spots(tmp_path, "section_id,x_px,y_px\n" + "S,a,1\n" * 50))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("section_id,x_px\nS,1\n", "column y_px is missing"),
        ("section_id,x_px,y_px,z\nS,1,2,3\n", "column 'z' is unknown"),
        ("section_id,x_px,y_px\n", "no rows"),
        ("section_id,x_px,y_px\nS,1,2,3,4\nS,1\n", "spots.csv"),
        ("", "column x_px is missing"),
    ],
)
def test_files_that_are_no_table_of_spots_are_refused(tmp_path, text, message):
    with pytest.raises(SheetError, match=message):
        read_positions(spots(tmp_path, text))


def test_spots_and_slides_must_match(tmp_path):
    touch(tmp_path, "S1.svs", "S2.svs")
    slides, _ = list_slides(str(tmp_path))
    require_positions(slides, {})
    require_positions(slides, {"S1": 0, "S2": 0})
    with pytest.raises(SheetError, match=r"1 slides have no row.*: S2"):
        require_positions(slides, {"S1": 0})
    with pytest.raises(SheetError, match=r"1 sections .* not slides of this run: S3"):
        require_positions(slides, {"S1": 0, "S2": 0, "S3": 0})


def test_a_fingerprint_sees_length_and_both_ends(tmp_path):
    path = tmp_path / "a.svs"
    content = bytearray(3 * 2**20)
    path.write_bytes(content)
    seen = {fingerprint(str(path))}
    for index in (0, 2**20 - 1, 2 * 2**20, len(content) - 1):
        changed = bytearray(content)
        changed[index] = 1
        path.write_bytes(changed)
        seen.add(fingerprint(str(path)))
    path.write_bytes(content + b"\0")
    seen.add(fingerprint(str(path)))
    assert len(seen) == 6
    path.write_bytes(content)
    assert fingerprint(str(path)) in seen
    with pytest.raises(FileNotFoundError):
        fingerprint(str(tmp_path / "none"))
