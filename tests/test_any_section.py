"""Random sections in all formats: each tile shows the place of its spot, and each count is under its gene.

The sections and their files are made without code of the product, so that what is prepared can be compared with what
they are in truth.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from any_section import FLY_GENES, GENES, any_section
from hypothesis import given
from hypothesis import strategies as st
from prepared_here import prepare_here
from prepared_tables import write_sheet
from section_checks import check_section
from section_files import Form, H5adForm, ImageForm, write_section
from section_strategies import FORMS, images, property_test, sections


@dataclass(frozen=True)
class Case:
    """A section in all formats, and another one beside it that measures other genes."""

    section: dict[str, object]
    """Arguments of `any_section`."""
    forms: tuple[Form, ...]
    images: tuple[ImageForm, ...]
    says: tuple[str, ...]
    """What of each file's row states its resolution, beside image and array: `mpp`, `pitch` or `nothing`."""
    neighbour: dict[str, object]
    neighbour_form: Form
    tile_ratio: float
    """Pixels of the image along one of a tile."""
    seed: int


@st.composite
def cases(draw):
    genes = draw(st.sampled_from([GENES, GENES, FLY_GENES]))
    ids = draw(st.sampled_from(["plain"] if genes is FLY_GENES else ["plain", "version", "genome"]))
    section = draw(sections(tuple(genes)))
    forms = tuple(draw(make(ids)) for make in FORMS.values())
    drawn = tuple(draw(images()) for _ in forms)
    says = tuple(
        draw(st.sampled_from(_sayings(section["hexagonal"], form, image)))
        for form, image in zip(forms, drawn, strict=True)
    )
    neighbour = draw(sections(tuple(genes))) | {"mpp": section["mpp"], "seed": section["seed"] + 1}
    neighbour_form = draw(st.sampled_from(list(FORMS.values())).flatmap(lambda make: make("plain")))
    ratio = draw(st.sampled_from([1.0, 2.0]))
    return Case(section, forms, drawn, says, neighbour, neighbour_form, ratio, draw(st.integers(0, 999)))


def _sayings(hexagonal, form, image):
    """What the sheet may say, if the image says the resolution or not."""
    has_array = not isinstance(form, H5adForm) or form.array
    enough = image.states_mpp or (hexagonal and has_array)
    return ["mpp", *(["pitch"] if has_array else []), *(["nothing"] if enough else [])]


def check_case(case: Case) -> None:
    section, neighbour = any_section(**case.section), any_section(**case.neighbour)
    with tempfile.TemporaryDirectory() as scratch:
        folder, rows = Path(scratch), []
        for seed, (form, image, says) in enumerate(zip(case.forms, case.images, case.says, strict=True), case.seed):
            stated = {"mpp": {"mpp": section.mpp}, "pitch": {"pitch_um": section.pitch_um}}.get(says, {})
            rows.append(write_section(section, folder, type(form).__name__, form, image, seed, **stated))
        rows.append(write_section(neighbour, folder, "N", case.neighbour_form, mpp=neighbour.mpp, patient_id="N"))
        own_mpp = section.mpp * case.tile_ratio
        prepared = prepare_here(write_sheet(folder, rows), folder / "out", **{"tiles.mpp": own_mpp})
        for form, image in zip(case.forms, case.images, strict=True):
            check_section(prepared, section, type(form).__name__, form, image, case.tile_ratio)
        check_section(prepared, neighbour, "N", case.neighbour_form, ratio=case.tile_ratio)


@property_test(3)
@given(cases())
def test_a_few_sections(case):
    check_case(case)


@pytest.mark.slow
@property_test(16)
@given(cases())
def test_many_sections(case):
    check_case(case)
