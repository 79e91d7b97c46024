"""Which sections a model may be scored on: none of a patient that it was trained on or that chose its settings."""

import pytest
from small_table import section_entry

from mclstexp.config import Config
from mclstexp.data.genes import GenePanel
from mclstexp.data.schema import Manifest
from mclstexp.errors import SplitError
from mclstexp.evaluation.evaluate import _notes, held_out
from mclstexp.model.version import ModelVersion, TrainingRecord

TILES = {"tile_size_px": 224, "mpp": 1.0, "encoding": "jpeg", "jpeg_quality": 85, "sentence_length": 2}
RECORD = {"manifest_digest": "", "test_sections": ("D1",), "epochs": 1, "sections": ("A1",), "patients": ("A",)}
OF_B = {"validation_sections": ("B1",), "validation_patients": ("B",)}


def _manifest(*sections: str) -> Manifest:
    """Sections of the patient that their first letter names."""
    entries = tuple(section_entry(name, name[0]) for name in sections)
    return Manifest(**TILES, genes_file="", genes_sha256="", num_genes=1, sections=entries)


def _model(**record: object) -> ModelVersion:
    training = TrainingRecord.model_validate(RECORD | {"protocol": "patient"} | OF_B | record)
    return ModelVersion(Config(), GenePanel.from_names(["TP53"]), (224, 1.0), 0, training, {}, None)


ALL = _manifest("A1", "A2", "B1", "B2", "C1", "D1")
WITHOUT_VALIDATION = _manifest("A1", "A2", "B2", "C1", "D1")


def test_patients_that_the_model_has_not_seen_are_scored() -> None:
    assert held_out(_model(), ALL) == ["D1"]
    assert held_out(_model(), ALL, ["C1", "D1"]) == ["C1", "D1"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("A1", "was fitted on A1"),
        ("B1", "was fitted on B1"),
        ("A2", "was trained on other sections of the patients of A2; .* other patients only"),
        ("B2", "had its settings chosen on other sections of the patients of B2; .* other patients only"),
    ],
)
def test_patients_that_trained_or_chose_settings_are_refused(section: str, message: str) -> None:
    with pytest.raises(SplitError, match=message):
        held_out(_model(), ALL, ["C1", section])


def test_validation_patients_are_refused_even_if_their_sections_are_not_in_the_table() -> None:
    with pytest.raises(SplitError, match=r"settings chosen .* of B2"):
        held_out(_model(), WITHOUT_VALIDATION, ["B2"])


def test_an_older_version_has_the_validation_patients_of_its_sections() -> None:
    older = _model(validation_patients=())
    with pytest.raises(SplitError, match=r"settings chosen .* of B2"):
        held_out(older, ALL, ["B2"])
    assert held_out(older, WITHOUT_VALIDATION, ["B2"]) == ["B2"]  # nothing says whose they were


def test_validation_sections_are_scored_on_request() -> None:
    assert held_out(_model(), ALL, on_validation=True) == ["B1"]
    assert not any(note.startswith("LEAK") for note in _notes(_model(), ALL, ["B1"], {}))


def test_as_published_siblings_are_scored_and_the_card_names_the_leak() -> None:
    model, asked = _model(protocol="reference"), ["A2", "B2", "D1"]
    assert held_out(model, ALL, asked) == asked
    assert _notes(model, ALL, asked, {})[:2] == [
        "LEAK that this protocol allows: other sections of patients A trained",
        "LEAK that this protocol allows: other sections of patients B chose settings",
    ]
    assert not any(note.startswith("LEAK") for note in _notes(model, ALL, ["D1"], {}))
