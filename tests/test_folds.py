"""Who trains and who is held out, and every way in which a split would leak."""

import pytest
from small_table import section_entry

from mclstexp.data.folds import Split, make_split
from mclstexp.data.schema import Manifest
from mclstexp.errors import SplitError
from mclstexp.settings import SplitConfig

ENTRIES = [section_entry(f"{patient}{number}", patient) for patient in ("ANNA", "BELA", "CARL") for number in (1, 2)]
MANIFEST = Manifest(
    tile_size_px=8,
    mpp=1.0,
    encoding="jpeg",
    jpeg_quality=85,
    sentence_length=2,
    genes_file="",
    genes_sha256="",
    num_genes=1,
    sections=(*ENTRIES, section_entry("SLIDE", "DORA", measured=False)),
)


def _split(**settings: object) -> Split:
    return make_split(MANIFEST, SplitConfig.model_validate(settings))


def test_all_sections_of_a_patient_are_held_out() -> None:
    split = _split(test_patients=("BELA",), validation_patients=("CARL",))
    assert split == Split(train=("ANNA1", "ANNA2"), validation=("CARL1", "CARL2"), test=("BELA1", "BELA2"))


def test_nothing_held_out_trains_on_all_measured_sections() -> None:
    split = _split()
    assert split.train == tuple(entry.section_id for entry in ENTRIES)
    assert split.validation == split.test == ()


def test_naming_all_sections_of_a_patient_is_not_a_leak() -> None:
    assert _split(test_sections=("BELA2", "BELA1")) == _split(test_patients=("BELA",))


def test_a_trained_sibling_is_refused_under_patient_and_allowed_under_reference() -> None:
    with pytest.raises(SplitError) as error:
        _split(test_sections=("BELA1",))
    for expected in ("BELA2", "split.test_patients", "split.protocol=reference"):
        assert expected in str(error.value)
    split = _split(test_sections=("BELA1",), protocol="reference")
    assert split.test == ("BELA1",)
    assert "BELA2" in split.train


@pytest.mark.parametrize("protocol", ["patient", "reference"])
@pytest.mark.parametrize("test", [{"test_patients": ("BELA",)}, {"test_sections": ("BELA1",)}])
def test_a_validation_patient_is_never_tested(protocol: str, test: dict[str, object]) -> None:
    with pytest.raises(SplitError, match=r"share BELA.*num_validation_patients"):
        _split(protocol=protocol, validation_patients=("BELA",), **test)


@pytest.mark.parametrize(
    ("setting", "name", "near"),
    [
        ("test_patients", "BELLA", "did you mean BELA"),
        ("test_sections", "ANNA3", "did you mean ANNA"),
        ("validation_patients", "carl", "did you mean CARL"),
        ("test_sections", "SLIDE", "has no measured section SLIDE"),
        ("test_patients", "DORA", "has no measured patient DORA; known: ANNA, BELA, CARL"),
    ],
)
def test_unknown_names_get_the_nearest(setting: str, name: str, near: str) -> None:
    with pytest.raises(SplitError, match=near) as error:
        _split(**{setting: (name,)})
    assert str(error.value).startswith(f"split.{setting}: ")


def test_something_must_be_left_to_train_on() -> None:
    with pytest.raises(SplitError, match="no section is left to train on: 4 are held out, 2 validate"):
        _split(test_patients=("ANNA", "BELA"), validation_patients=("CARL",))


def test_drawn_validation_patients_are_never_tested_and_always_the_same() -> None:
    for tested, others in (("ANNA", "BC"), ("BELA", "AC"), ("CARL", "AB")):
        split = _split(test_patients=(tested,), num_validation_patients=1)
        validating = {name[0] for name in split.validation}
        assert validating < set(others)
        assert {name[0] for name in split.train} == set(others) - validating
        assert split == _split(test_patients=(tested,), num_validation_patients=1)


def test_siblings_of_a_tested_section_train_but_do_not_validate() -> None:
    split = _split(test_sections=("BELA1",), protocol="reference", num_validation_patients=1)
    assert "BELA2" in split.train
    assert {name[:4] for name in split.validation} <= {"ANNA", "CARL"}


def test_drawing_leaves_a_patient_to_train_on() -> None:
    with pytest.raises(
        SplitError, match=r"num_validation_patients=2 leaves no patient.* 2 are not held out \(ANNA, CARL\)"
    ):
        _split(test_patients=("BELA",), num_validation_patients=2)


def test_under_reference_siblings_of_a_tested_section_are_enough_to_train_on() -> None:
    held_out = {"protocol": "reference", "test_sections": ("BELA1",)}
    split = _split(num_validation_patients=2, **held_out)
    assert split == Split(train=("BELA2",), validation=("ANNA1", "ANNA2", "CARL1", "CARL2"), test=("BELA1",))
    with pytest.raises(SplitError, match="num_validation_patients=3 leaves no patient"):
        _split(num_validation_patients=3, **held_out)
    with pytest.raises(SplitError, match="no section is left to train on: 2 are held out, 4 validate"):
        _split(num_validation_patients=2, protocol="reference", test_patients=("BELA",))


def test_validation_patients_are_named_or_drawn() -> None:
    with pytest.raises(SplitError, match="not both"):
        _split(validation_patients=("BELA",), num_validation_patients=1)
