"""Marker genes: the shipped file, how genes are found in a panel, and what is refused."""

from pathlib import Path

import pytest

from mclstexp import storage
from mclstexp.data.genes import GenePanel
from mclstexp.errors import ConfigError
from mclstexp.evaluation.markers import load_markers, marker_columns, require_markers

SHIPPED = Path(__file__).parents[1] / "jobs" / "configs" / "markers.yaml"


def _file(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_the_shipped_file_names_the_papers_genes() -> None:
    breast = load_markers(SHIPPED, "her2st")
    assert {name: len(genes) for name, genes in breast.items()} == {"cancer": 8, "immune": 10, "most_significant": 24}
    assert {"GNAS", "FASN", "ERBB2"} <= set(breast["cancer"].names())
    assert {"HLA-DRA", "IGKC", "CD74"} <= set(breast["immune"].names())
    assert len(load_markers(SHIPPED, "cscc")["most_significant"]) == 15
    assert set(load_markers(SHIPPED, "alex10x")) == {"cancer", "immune"}


def test_genes_are_found_by_symbol_or_ensembl_id_and_missing_ones_are_named(tmp_path: Path) -> None:
    path = _file(tmp_path, "mine:\n  tumour: [KRT8, ENSG00000141736.14, NOPE]\n  none: [MUC1]\n")
    panel = GenePanel(("ENSG00000141736", "ENSG7", "KRT8"), ("ERBB2", "CD74", "KRT8"), ("ENSG00000141736", "ENSG7", ""))
    columns, missing = marker_columns(load_markers(path, "mine"), panel)
    assert {name: found.tolist() for name, found in columns.items()} == {"tumour": [2, 0], "none": []}
    assert missing == {"tumour": ["NOPE"], "none": ["MUC1"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("other:\n  a: [X]\n", "no marker genes of cohort mine; it has other: add a section"),
        ("- X\n", "the file is"),
        ("", "the file is None"),
        ("mine: [X]\n", r"mine is \['X'\]"),
        ("mine:\n  a: X\n", "mine.a is 'X'"),
        ("mine:\n  a: []\n", "mine.a is .*at least 1 item"),
        ("mine:\n  a: [X, NO, '']\n", r"mine.a.1 is False.*mine.a.2 is ''.*need quotes"),
        ("mine:\n  a: [X, Y, X]\n", "mine.a in .*mine.yaml names X more than once; keep one"),
        ("mine:\n  heg50: [X]\n", "mine.heg50 in .*every score card has all, heg50, hvg50 of its own"),
        ("mine: [\n", "cannot read the marker genes .*mine.yaml"),
    ],
)
def test_faults_are_named_with_their_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_markers(_file(tmp_path, text), "mine")


def test_the_file_may_be_in_object_storage(s3: str) -> None:
    storage.write(f"{s3}/mine.yaml", b"mine:\n  tumour: [KRT8]\n")
    assert load_markers(f"{s3}/mine.yaml", "mine")["tumour"].names() == ["KRT8"]
    with pytest.raises(ConfigError, match=rf"cannot read the marker genes {s3}/none\.yaml: there is no such file"):
        load_markers(f"{s3}/none.yaml", "mine")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the marker genes .*none.yaml"):
        load_markers(tmp_path / "none.yaml", "her2st")


@pytest.mark.odd
def test_markers_of_which_a_panel_has_none_are_refused_with_the_nearest_names(tmp_path: Path) -> None:
    panel = GenePanel(("KRT8", "Krt18"), ("KRT8", "Krt18"), ("", ""))
    wrong = load_markers(_file(tmp_path, "mine:\n  tumour: [krt8, KTR18]\n"), "mine")
    with pytest.raises(ConfigError, match=r"none of the 2 marker genes: krt8 \(did you mean KRT8\?\); KTR18 \(did you"):
        require_markers(wrong, panel)
    half = load_markers(_file(tmp_path, "mine:\n  tumour: [KRT8, NOPE]\n  none: [MUC1]\n"), "mine")
    require_markers(half, panel)
    require_markers({}, panel)
