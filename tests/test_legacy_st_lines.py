"""What is wrong with legacy ST tables is named with its line in the file, blank lines counted."""

from pathlib import Path

import pytest

from ingest.readers.legacy_st import read_legacy_st
from mclstexp.errors import SourceError

COUNTS = "\tGNAS\tFASN\n10x20\t1\t2\n\n11x20\t3\t4\n"
PLACES = "x\ty\tpixel_x\tpixel_y\n10\t20\t1\t2\n\n  \n11\t20\t3\t4\n"


def _refused(folder: Path, counts: str = COUNTS, places: str = PLACES) -> str:
    (folder / "a.tsv").write_bytes(counts.encode())
    (folder / "a_sel.tsv").write_bytes(places.encode())
    with pytest.raises(SourceError) as caught:
        read_legacy_st(str(folder / "a.tsv"), str(folder / "a_sel.tsv"))
    return str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("12x20\t5\tone", "gene FASN of spot 12x20 (line 5) has the value 'one', which is no count"),
        ("12x20\t5\t-1", "gene FASN of spot 12x20 (line 5) has the value -1.0, which is no raw count"),
        ("12x20\t5", "spot 12x20 (line 5) has 1 values for 2 genes"),
        ("spot12\t5\t6", "spot spot12 (line 5) is not named like 10x21"),
    ],
)
def test_counts(tmp_path: Path, line: str, said: str, end: str) -> None:
    text = _refused(tmp_path, counts=(COUNTS + line + "\n").replace("\n", end))
    assert text.startswith(f"a.tsv: {said}")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("row", ["12\t20\t5\t", "12\t20\t5\tinf", "\t\t\t"])
def test_positions(tmp_path: Path, row: str, end: str) -> None:
    text = _refused(tmp_path, places=(PLACES + row + "\n13\t20\t1\t1\n").replace("\n", end))
    assert text.startswith("a_sel.tsv: line 6 holds no position: ")


def test_blank_lines_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(COUNTS)
    (tmp_path / "a_sel.tsv").write_text(PLACES)
    found = read_legacy_st(str(tmp_path / "a.tsv"), str(tmp_path / "a_sel.tsv"))
    assert found.spots.spot_id.tolist() == ["10x20", "11x20"]
