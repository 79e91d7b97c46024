"""The manifest: spots, sentences and patients of sections."""

import pytest
from small_table import manifest_of

from mclstexp.errors import TableError


def test_spots_sentences_and_patients_of_sections() -> None:
    manifest = manifest_of({"A1": 2, "A2": 1, "B1": 3}, spots=7)
    assert manifest.num_spots(["A1", "B1"]) == 35
    assert manifest.sentences(["B1", "A2"]) == [("B1", 0), ("B1", 1), ("B1", 2), ("A2", 0)]
    assert manifest.patients(["A1", "A2"]) == {"A"}
    assert (manifest.num_spots([]), manifest.sentences([]), manifest.patients([])) == (0, [], set())


def test_an_unknown_section_gets_the_nearest() -> None:
    with pytest.raises(TableError, match=r"no section ANNA2; did you mean ANNA1\?"):
        manifest_of({"ANNA1": 2, "BELA1": 1}).section("ANNA2")
