"""A pathologist's labels, joined by name or by array position."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from ingest.readers.labels import read_labels
from ingest.readers.spots import Spots
from mclstexp.errors import SourceError

SPOTS = Spots(
    spot_id=np.array(["9x21", "9x14", "10x3"], object),
    x_px=np.zeros(3),
    y_px=np.zeros(3),
    array_row=np.array([21.0, 14.0, 3.0]),
    array_col=np.array([9.0, 9.0, 10.0]),
)


@pytest.mark.parametrize(
    "text",
    [
        "Row.names\tx\ty\tlabel\n1x1\t9.02\t20.994\tcancer\n2x2\t9.018\t13.999\tfat\n3x3\t1\t1\tfat\n",
        "spot_id,label\n9x14,fat\n9x21,cancer\n",
        "Barcode,label\n9x14,fat\n9x21, cancer \n10x3,\n",
        "spot_id,label\n9x14,fat\n9x21,cancer\n10x3,NA\n",
        "spot_id\tlabel\n9x14\tfat\n9x21\tcancer\n10x3\tnan\n",
    ],
)
def test_labels_are_joined_by_id_or_rounded_array_position(tmp_path: Path, text: str) -> None:
    path = tmp_path / "labels.tsv"
    path.write_text(text)
    assert read_labels(str(path), SPOTS).tolist() == ["cancer", "fat", None]
    path.write_bytes(gzip.compress(text.encode()))
    assert read_labels(str(path), SPOTS).tolist() == ["cancer", "fat", None]


@pytest.mark.odd
@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize(
    "head", ["\ufeffspot_id,label", " spot_id , label ", '"spot_id","label"', '\ufeff"barcode",label']
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_labels_as_spreadsheets_save_them(tmp_path: Path, head: str, mark: str, end: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(f"{head}\n9x14,fat\n9x21,cancer\n".replace(",", mark).replace("\n", end).encode())
    assert read_labels(str(path), SPOTS).tolist() == ["cancer", "fat", None]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("spot_id,kind\n9x14,fat\n", "it has no column label; it has spot_id, kind"),
        ("name,label\n9x14,fat\n", "neither spot_id or barcode nor x and y; it has name, label"),
        ("x,y,label\n9,14,fat\n9.2,14,cancer\n", "spot appears more than once: 9x14"),
        ("spot_id,label\n1x1,fat\n", r"none of its 1 rows names one of the section's 3 spots \(such as 9x21"),
        ("spot_id,label\n9x14,NA\n10x3,\n1x1,a\n", r"its 2 rows for the section's spots have no label \(empty or NA\)"),
        ("", "cannot be read"),
    ],
)
def test_what_is_wrong_with_labels_is_named(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(SourceError, match=rf"labels.csv.*{reason}"):
        read_labels(str(path), SPOTS)
