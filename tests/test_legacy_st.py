"""Sections of legacy ST: what is joined, what is rejected with its reason, and what is refused."""

import gzip
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from section_reading import COUNTS, POSITIONS, read, refused

from ingest.readers import READERS, legacy_st
from ingest.readers.files import read_preview
from ingest.readers.spots import Expression
from mclstexp.data.sheet import SectionRow, read_sheet
from mclstexp.errors import SourceError

GENES = ["GNAS", "FASN", "ENSG00000141736.14"]
real_data = pytest.mark.skipif("MCLSTEXP_DATA" not in os.environ, reason="MCLSTEXP_DATA names no folder of real data")


def write_counts(path, counts=COUNTS, genes=GENES, corner=""):
    lines = ["\t".join([corner, *genes]) if corner is not None else "\t".join(genes)]
    lines += ["\t".join([spot, *map(str, row)]) for spot, row in counts.items()]
    text = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def write_positions(path, positions=POSITIONS, selected=None):
    rows = []
    for (x, y), (pixel_x, pixel_y) in positions.items():
        rows.append([x, y, x + 0.01, y - 0.02, pixel_x, pixel_y, (selected or {}).get((x, y), 1)])
    columns = ["x", "y", "new_x", "new_y", "pixel_x", "pixel_y", "selected"]
    pd.DataFrame(rows, columns=columns).to_csv(path, sep="\t", index=False)


@pytest.fixture
def st(tmp_path):
    (tmp_path / "a.tif").touch()
    row = SectionRow(
        section_id="A1",
        patient_id="A",
        image=str(tmp_path / "a.tif"),
        format="legacy_st",
        expression=str(tmp_path / "a.tsv.gz"),
        positions=str(tmp_path / "a_sel.tsv"),
    )
    write_counts(tmp_path / "a.tsv.gz")
    write_positions(tmp_path / "a_sel.tsv")
    return row


def test_legacy_st(st, tmp_path):
    found = read(st, tmp_path)
    assert found.genes == (("GNAS", "GNAS", ""), ("FASN", "FASN", ""), ("ENSG00000141736", "", "ENSG00000141736"))
    assert found.genes == read_preview(st, str(tmp_path)).genes
    assert found.spots.spot_id.tolist() == list(COUNTS)
    assert found.spots.counts.dtype == np.int32
    assert found.spots.counts.toarray().tolist() == list(COUNTS.values())
    assert found.spots.x_px.tolist() == [100.5, 110, 100, 120]
    assert found.spots.y_px.tolist() == [200.25, 200, 210, 200]
    assert found.spots.array_col.tolist() == [10, 11, 10, 12]
    assert found.spots.array_row.tolist() == [20, 20, 21, 20]
    assert found.rejected == ()


@pytest.mark.parametrize("name", ["plain.tsv", "packed.tsv.gz", "packed_without_saying_so.tsv"])
@pytest.mark.parametrize("corner", ["", "spot", None])
def test_counts_files_of_all_kinds(st, tmp_path, name, corner):
    path = tmp_path / name
    write_counts(path, corner=corner)
    if "without" in name:
        path.write_bytes(gzip.compress(path.read_bytes()))
    found = read(st.model_copy(update={"expression": str(path)}), tmp_path)
    assert found.spots.counts.toarray().tolist() == list(COUNTS.values())


def test_positions_are_joined_after_rounding(st, tmp_path):
    write_counts(tmp_path / "a.tsv.gz", {"10.02x19.98": [1, 0, 3], "11.4x20.4": [0, 2, 0]})
    write_positions(tmp_path / "a_sel.tsv", {(9.98, 20.3): (1, 2), (11, 20): (3, 4)})
    found = read(st, tmp_path)
    assert found.spots.spot_id.tolist() == ["10x20", "11x20"]
    assert found.spots.x_px.tolist() == [1, 3]


def test_every_rejected_spot_is_listed_with_the_reason(st, tmp_path):
    counts = COUNTS | {"1x1": [1, 1, 1], "13x20": [0, 0, 0], "14x20": [1, 1, 1]}
    positions = POSITIONS | {(13, 20): (130, 200), (14, 20): (140, 200), (15, 20): (150, 200), (16, 20): (160, 200)}
    write_counts(tmp_path / "a.tsv.gz", counts)
    write_positions(tmp_path / "a_sel.tsv", positions, {(14, 20): 0, (16, 20): 0})
    found = read(st, tmp_path)
    assert found.spots.spot_id.tolist() == list(COUNTS)
    reasons = {reject.spot_id: (reject.reason, reject.x_px) for reject in found.rejected}
    assert reasons["13x20"] == ("no_counts", 130)
    assert reasons["14x20"] == ("not_selected", 140)
    assert reasons["15x20"] == ("no_counts", 150)
    assert reasons["16x20"] == ("not_selected", 160)
    assert reasons["1x1"][0] == "no_position"
    assert np.isnan(reasons["1x1"][1])


def test_tables_as_r_writes_them(st, tmp_path):
    quoted = {f'"{spot}"': row for spot, row in COUNTS.items()}
    write_counts(tmp_path / "a.tsv.gz", quoted, [f'"{gene}"' for gene in GENES], corner=None)
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"\n", b"\r\n") + b"\r\n"))
    found = read(st, tmp_path)
    assert found.spots.spot_id.tolist() == list(COUNTS)
    assert found.genes[0].symbol == "GNAS"


def test_positions_without_selected_column_are_all_used(st, tmp_path):
    table = pd.read_csv(st.positions, sep="\t").drop(columns="selected")
    table.to_csv(st.positions, sep="\t", index=False)
    assert len(read(st, tmp_path).spots) == 4


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1.5", "NA", "", "2147483648", "one"])
def test_a_value_that_is_not_a_count_is_named(st, tmp_path, value):
    write_counts(tmp_path / "a.tsv.gz", COUNTS | {"10x21": [5, value, 7]})
    text = refused(st, tmp_path)
    assert "gene FASN of spot 10x21" in text
    assert "a.tsv.gz" in text


def test_logged_values_are_recognised(st, tmp_path):
    logged = {spot: np.log1p(row).tolist() for spot, row in COUNTS.items()}
    write_counts(tmp_path / "a.tsv.gz", logged)
    assert "normalised or log-transformed" in refused(st, tmp_path)


@pytest.mark.parametrize(
    ("genes", "named"),
    [(["GNAS", "FASN", "GNAS"], "GNAS"), (["ENSG00000141736.1", "FASN", "ENSG00000141736.2"], "ENSG00000141736")],
)
def test_repeated_genes_are_named(st, tmp_path, genes, named):
    write_counts(tmp_path / "a.tsv.gz", genes=genes)
    assert f"gene appears more than once: {named}" in refused(st, tmp_path)
    with pytest.raises(SourceError, match=named):
        read_preview(st, str(tmp_path))


def test_repeated_spots_are_named(st, tmp_path):
    write_counts(tmp_path / "a.tsv.gz", COUNTS | {"10.3x20": [1, 1, 1]})
    assert "spot appears more than once: 10x20" in refused(st, tmp_path)
    write_counts(tmp_path / "a.tsv.gz")
    write_positions(tmp_path / "a_sel.tsv", POSITIONS | {(10.3, 20): (1, 1)})
    assert "a_sel.tsv: spot appears more than once: 10x20" in refused(st, tmp_path)


@pytest.mark.odd
@pytest.mark.parametrize("xy", [(-1, 20), (70_000, 20)])
def test_an_array_position_out_of_range_costs_its_spot(st, tmp_path, xy):
    write_counts(tmp_path / "a.tsv.gz", COUNTS | {f"{xy[0]}x{xy[1]}": [1, 1, 1]})
    write_positions(tmp_path / "a_sel.tsv", POSITIONS | {xy: (1, 1)})
    found = read(st, tmp_path)
    assert (f"{xy[0]}x{xy[1]}", 1, 1, "no_array_position") in found.rejected
    assert xy not in map(tuple, found.layout.array_xy)


@pytest.mark.odd
def test_array_positions_mostly_out_of_range_are_refused(st, tmp_path):
    moved = {f"{70_000 + i}x20": count for i, count in enumerate(COUNTS.values())}
    write_counts(tmp_path / "a.tsv.gz", moved)
    write_positions(tmp_path / "a_sel.tsv", {(70_000 + i, 20): (10 * i, 1) for i in range(len(COUNTS))})
    assert "4 of 4 spots have array positions outside 0 to 65535" in refused(st, tmp_path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], "cannot be read"),
        (lambda data: data[:20] + bytes(8) + data[28:], "cannot be read"),
        (lambda _: b"", "has no spots"),
        (lambda _: gzip.compress(b"\tGNAS\tFASN\n10x20\t1\n"), "its header has 3 cells and its first spot 2"),
        (lambda _: gzip.compress(b"\tGNAS\tFASN\n10x20\t1\t2\n11x20\t1\n"), "1 values for 2 genes"),
        (lambda _: gzip.compress(b"\tGNAS\tFASN\n"), "has no spots"),
        (lambda _: gzip.compress(b"\tGNAS\tFASN\nspot1\t1\t2\n"), "no name like 10x21"),
        (lambda _: b"\x89PNG\r\n\x1a\n\x00\x01\xff\xfe", "cannot be read|header"),
    ],
)
def test_damaged_counts_are_refused(st, tmp_path, damage, reason):
    path = Path(st.expression)
    path.write_bytes(damage(path.read_bytes()))
    text = refused(st, tmp_path)
    assert "a.tsv.gz" in text
    with pytest.raises(SourceError, match=reason):
        read(st, tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("x\ty\tpixel_x\n1\t2\t3\n", "has no column pixel_y"),
        (
            "x\ty\tpixel_x\tpixel_y\n1\t2\t3\t\n",
            r"column pixel_y: 1 of 1 cells cannot be used, such as nan \(line 2\); allowed: finite numbers",
        ),
        ("x\ty\tpixel_x\tpixel_y\n1\t2\tinf\t3\n", r"column pixel_x: 1 of 1 .* such as 'inf' \(line 2\)"),
        (
            "x\ty\tpixel_x\tpixel_y\tselected\n1\t2\t3\t4\tmaybe\n",
            r"column selected: 1 of 1 .* such as 'maybe' \(line 2\); allowed: 1 or 0, true or false, yes or no",
        ),
        ("", "cannot be read"),
    ],
)
def test_damaged_positions_are_refused(st, tmp_path, content, reason):
    Path(st.positions).write_text(content)
    with pytest.raises(SourceError, match=rf"a_sel.tsv.*{reason}"):
        read(st, tmp_path)


def test_endless_lines_are_refused_before_they_fill_memory(st, tmp_path, monkeypatch):
    monkeypatch.setattr(legacy_st, "_MAX_LINE_BYTES", 1000)
    Path(st.expression).write_bytes(gzip.compress(b"\tGNAS\n10x20\t" + b"1" * 10**7))
    assert "a line of more than 1000 bytes" in refused(st, tmp_path)


def test_missing_file_is_named(st, tmp_path):
    Path(st.positions).unlink()
    assert "there is no file" in refused(st, tmp_path)


@real_data
def test_real_sections(tmp_path):
    """Spots and genes as the data's own description counts them."""
    root = Path(os.environ["MCLSTEXP_DATA"])
    expected = {"C2": (187, 15706), "C3": (180, 15821), "C4": (184, 15842), "C5": (181, 15721), "B4": (283, 15289)}
    for row in read_sheet(str(root / "samples.csv"), READERS):
        found = read(row, tmp_path)
        assert (len(found.spots), len(found.genes)) == expected[row.section_id]
        assert len(found.rejected) <= 3


@real_data
def test_real_selection_matters(tmp_path):
    root = Path(os.environ["MCLSTEXP_DATA"]) / "mob"
    row = SectionRow(
        section_id="MOB1",
        patient_id="M",
        image=str(root / "MOB1.jpg"),
        format="legacy_st",
        expression=str(root / "MOB1.tsv.gz"),
        positions=str(root / "MOB1_selection.tsv"),
    )
    found = read(row, tmp_path)
    assert len(found.spots) == 379
    assert Counter(reject.reason for reject in found.rejected)["not_selected"] > 1500
    assert found.genes[0].ensembl_id.startswith("ENSMUSG")
    assert "." not in found.genes[0].ensembl_id


LINES = "\tGNAS\tFASN\n10x20\t1\t2\n\n11x20\t3\t4\n"
POSITION_LINES = "x\ty\tpixel_x\tpixel_y\n10\t20\t1\t2\n\n  \n11\t20\t3\t4\n"


def _read_lines(folder: Path, counts: str = LINES, positions: str = POSITION_LINES) -> Expression:
    files = {"expression": str(folder / "a.tsv"), "positions": str(folder / "a_sel.tsv")}
    for path, text in zip(files.values(), (counts, positions), strict=True):
        Path(path).write_bytes(text.encode())
    return legacy_st.read(files, SectionRow(section_id="a", patient_id="A", image="a.png", format="legacy_st", **files))


def _refused_lines(folder: Path, **texts: str) -> str:
    with pytest.raises(SourceError) as caught:
        _read_lines(folder, **texts)
    return str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("12x20\t5\tone", "gene FASN of spot 12x20 (line 5) has the value 'one', which is not a count"),
        ("12x20\t5\t-1", "gene FASN of spot 12x20 (line 5) has the value -1.0, which is not a raw count"),
        ("12x20\t5", "spot 12x20 (line 5) has 1 values for 2 genes"),
        ("spot12\t5\t6", "spot spot12 (line 5) has no name like 10x21"),
    ],
)
def test_faults_in_counts_name_the_line(tmp_path: Path, line: str, message: str, end: str) -> None:
    text = _refused_lines(tmp_path, counts=(LINES + line + "\n").replace("\n", end))
    assert text.startswith(f"a.tsv: {message}")


@pytest.mark.odd
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("12\t20\t5\t", [("12x20", "no_position")]),
        ("12\t20\t5\tinf", [("12x20", "no_position")]),
        ("12\t20\tNA\t7", [("12x20", "no_position")]),
        ("12\t20\tleft\ttop", [("12x20", "no_position")]),
        ("\t20\t5\t7", [("12x20", "no_position"), ("line 6", "no_position")]),
        ("\t\t\t", [("12x20", "no_position")]),
    ],
)
def test_a_spot_without_position_is_rejected(
    tmp_path: Path, row: str, expected: list[tuple[str, str]], end: str
) -> None:
    positions = (POSITION_LINES + row + "\n13\t20\t1\t1\n").replace("\n", end)
    found = _read_lines(tmp_path, LINES + "12x20\t5\t6\n13x20\t7\t8\n", positions)
    assert found.spots.spot_id.tolist() == ["10x20", "11x20", "13x20"]
    assert found.spots.x_px.tolist() == [1, 3, 1]
    assert [(reject.spot_id, reject.reason) for reject in found.rejected] == expected
    assert np.isnan([found.rejected[0].x_px, found.rejected[0].y_px]).all()
    assert found.layout.array_xy.tolist() == [[10, 20], [11, 20], [13, 20]]


@pytest.mark.odd
@pytest.mark.parametrize(
    ("yes", "no"), [("1", "0"), ("1.0", "0.0"), ("True", "False"), ("TRUE", "FALSE"), ("yes", "no"), ("T", "F")]
)
def test_selected_as_people_write_it(tmp_path: Path, yes: str, no: str) -> None:
    rows = [f"{10 + i}\t20\t{i}\t{i}\t{cell}\n" for i, cell in enumerate([yes, no, yes, "?", yes])]
    counts = "\tGNAS\n" + "".join(f"{10 + i}x20\t{i + 1}\n" for i in range(5))
    found = _read_lines(tmp_path, counts, "x\ty\tpixel_x\tpixel_y\tselected\n" + "".join(rows))
    assert found.spots.spot_id.tolist() == ["10x20", "12x20", "14x20"]
    assert found.spots.counts is not None
    assert found.spots.counts.toarray().ravel().tolist() == [1, 3, 5]
    reasons = [(reject.spot_id, reject.reason) for reject in found.rejected]
    assert reasons == [("11x20", "not_selected"), ("13x20", "unclear_selection")]


MARK = b"\xef\xbb\xbf"


@pytest.mark.odd
@pytest.mark.parametrize("mark", ["\t", ",", ";"])
@pytest.mark.parametrize(
    "rewrite",
    [
        lambda data: data,
        lambda data: MARK + data,
        lambda data: gzip.compress(MARK + data.replace(b"\n", b"\r\n")),
        lambda data: data.replace(b"pixel_x\t", b" pixel_x \t").replace(b"GNAS", b" GNAS "),
        lambda data: data.replace(b"GNAS", b'"GNAS"').replace(b"pixel_x", b'"pixel_x"'),
    ],
    ids=["plain", "byte_order_mark", "windows_gzip", "spaces", "quotes"],
)
def test_tables_as_people_pass_them_on(st, tmp_path, mark, rewrite):
    write_counts(tmp_path / "a.tsv")
    for source, name in ((tmp_path / "a.tsv", "expression"), (Path(st.positions), "positions")):
        data = rewrite(source.read_bytes())
        packed = data.startswith(b"\x1f\x8b")
        data = (gzip.decompress(data) if packed else data).replace(b"\t", mark.encode())
        Path(getattr(st, name)).write_bytes(gzip.compress(data) if packed else data)
    found = read(st, tmp_path)
    assert found.spots.spot_id.tolist() == list(COUNTS)
    assert found.spots.counts.toarray().tolist() == list(COUNTS.values())
    assert found.spots.x_px.tolist() == [100.5, 110, 100, 120]
    assert [gene.gene_id for gene in found.genes] == ["GNAS", "FASN", "ENSG00000141736"]
    assert read_preview(st, str(tmp_path)).genes == found.genes


@pytest.mark.odd
def test_positions_with_row_names_of_r(st, tmp_path):
    lines = Path(st.positions).read_text().splitlines()
    Path(st.positions).write_text("\n".join([lines[0], *(f"{i}\t{line}" for i, line in enumerate(lines[1:]))]))
    assert read(st, tmp_path).spots.x_px.tolist() == [100.5, 110, 100, 120]


@pytest.mark.odd
@pytest.mark.parametrize("corner", ["", None, "gene"])
@pytest.mark.parametrize("mark", ["\t", ","])
def test_transposed_counts_are_named_as_such(st, tmp_path, corner, mark):
    write_counts(tmp_path / "a.tsv", {gene: [1, 2, 3, 4] for gene in GENES}, list(COUNTS), corner)
    Path(st.expression).write_text((tmp_path / "a.tsv").read_text().replace("\t", mark))
    expected = "a.tsv.gz: its columns are spots (10x20, 11x20, ...), so it is a table of genes x spots: transpose it"
    assert expected in refused(st, tmp_path)
    with pytest.raises(SourceError, match="transpose it"):
        read_preview(st, str(tmp_path))


@pytest.mark.odd
def test_tables_of_two_sections_are_refused(st, tmp_path):
    write_counts(tmp_path / "a.tsv.gz", {"1x1": [1, 2, 3]})
    assert "the positions (10x20, ...) have none of the spots of the counts (1x1, ...)" in refused(st, tmp_path)


def test_blank_lines_are_skipped(tmp_path: Path) -> None:
    assert _read_lines(tmp_path).spots.spot_id.tolist() == ["10x20", "11x20"]


def _capital_headers(text):
    header, _, rest = text.partition("\n")
    return f"{header.upper()}\n{rest}".encode()


def _utf_16(text):
    return text.encode("utf-16")


def _of_a_european_spreadsheet(text):
    return text.replace("\t", ";").replace(".", ",").encode("utf-16")


@pytest.mark.odd
@pytest.mark.parametrize("rewrite", [_capital_headers, _utf_16, _of_a_european_spreadsheet])
def test_positions_that_a_spreadsheet_saved(st, tmp_path, rewrite):
    path = Path(st.positions)
    path.write_bytes(rewrite(path.read_text()))
    found = read(st, tmp_path)
    assert dict(zip(found.spots.spot_id, zip(found.spots.x_px, found.spots.y_px, strict=True), strict=True)) == {
        f"{x}x{y}": xy for (x, y), xy in POSITIONS.items()
    }


@pytest.mark.odd
def test_names_of_spots_that_r_put_an_x_before(st, tmp_path):
    write_counts(Path(st.expression), {f"X{name}": row for name, row in COUNTS.items()})
    found = read(st, tmp_path)
    counts = dict(zip(found.spots.spot_id, found.spots.counts.toarray().tolist(), strict=True))
    assert counts == COUNTS
