"""A section of which one thing is wrong is refused in every format: no tile of another place gets into a table.

Array, scale factors, resolution, size of the image, and tissue tell what is wrong. An image that is mirrored or belongs
to another section of the same size is told by its tissue alone, so the tissue of these sections is on one side.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from any_section import any_section
from hypothesis import given
from hypothesis import strategies as st
from prepared_here import prepare_here, tile
from prepared_tables import write_sheet
from section_checks import names
from section_files import H5adForm, LegacyForm, VisiumForm, write_section
from section_strategies import FORMS, images, property_test, sections

from mclstexp.errors import SourceError

ONE_SIDE = 1.2
COMPLETE = {
    "legacy_st": LegacyForm(),
    "visium": VisiumForm(pictures=("hires",)),
    "h5ad": H5adForm(uns="visium"),
    "hest": H5adForm(uns="hest", index="id", beside="feature_name"),
}
ARRAYS = {
    "hexagonal": {"hexagonal": True, "pitch_um": 100.0, "mpp": 2.0},
    "square": {"hexagonal": False, "pitch_um": 200.0, "mpp": 4.0},
}


def moved(section, x, y):
    """Other positions in the files."""
    return section.with_(x=x, y=y), {}


def shown(section, pixels):
    """Another image."""
    return section, {"pixels": pixels}


def with_mpp(section, factor):
    return section, {"mpp": section.mpp * factor}


def of_another(section):
    """The image of a section on the other side of its slide."""
    far = int(np.ptp(section.x) * 1.3)
    kind = {"hexagonal": section.hexagonal, "pitch_um": section.pitch_um, "mpp": section.mpp}
    return shown(section, any_section(99, angle=10, edge_px=far, **kind).pixels)


OTHER_IMAGE = "on tissue|belongs to one of|pixels of the full image of"
ARRAY_SAYS = "mpp is .* in the sheet and [24] in the array of spots"
DAMAGES = {
    "half": (lambda section: moved(section, section.x * 0.5, section.y * 0.5), "multiply the positions by 2"),
    "quarter": (lambda section: moved(section, section.x * 0.25, section.y * 0.25), "multiply the positions by 4"),
    "double": (
        lambda section: moved(section, section.x * 2, section.y * 2),
        "(divide the positions by|multiply the positions by 0.5)",
    ),
    "micrometres": (
        lambda section: moved(section, section.x * section.mpp, section.y * section.mpp),
        r"divide the positions by mpp \([24]\), since they are in micrometres|give positions in its pixels",
    ),
    "exchanged": (lambda section: moved(section, section.y, section.x), "exchange x and y"),
    "mirrored_x": (
        lambda section: moved(section, section.pixels.shape[1] - section.x, section.y),
        "mirror the positions left to right",
    ),
    "mirrored_y": (
        lambda section: moved(section, section.x, section.pixels.shape[0] - section.y),
        "mirror the positions upside down",
    ),
    "array_exchanged": (
        lambda section: (section.with_(row=section.col, col=section.row), {}),
        "exchange array_row and array_col|array_row and array_col are exchanged",
    ),
    "mixed_up": (lambda section: moved(section, section.x[::-1], section.y[::-1]), "positions are mixed up"),
    "mpp_half": (lambda section: with_mpp(section, 0.5), ARRAY_SAYS),
    "mpp_double": (lambda section: with_mpp(section, 2), ARRAY_SAYS),
    "mpp_a_little": (lambda section: with_mpp(section, 1.12), ARRAY_SAYS),
    "small_image": (lambda section: shown(section, section.pixels[::2, ::2]), OTHER_IMAGE),
    "image_of_another": (of_another, OTHER_IMAGE),
    "image_mirrored": (lambda section: shown(section, section.pixels[:, ::-1]), "on tissue"),
    "image_upside_down": (lambda section: shown(section, section.pixels[::-1]), "on tissue"),
    "image_turned": (lambda section: shown(section, np.rot90(section.pixels)), OTHER_IMAGE),
}
"""What is changed, and what the message says of it."""


def prepare_damaged(folder, section, form, damage, **cells):
    """Prepares a section after one change to its files, and of those changes of the sheet that state its resolution."""
    changed, changes = DAMAGES[damage][0](section)
    row = write_section(changed, folder, "S", form, **(cells | changes))
    return prepare_here(write_sheet(folder, [row]), folder / "out")


@pytest.mark.slow
@pytest.mark.odd
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("form", COMPLETE)
def test_damage_is_refused(tmp_path, form, array, damage):
    section = any_section(3, angle=12.0, glass=ONE_SIDE, **ARRAYS[array])
    pitch = {} if array == "hexagonal" else {"pitch_um": section.pitch_um}
    with pytest.raises(SourceError, match=f"section S: .*({DAMAGES[damage][1]})"):
        prepare_damaged(tmp_path, section, COMPLETE[form], damage, **({"mpp": section.mpp} | pitch))


@pytest.mark.odd
@pytest.mark.parametrize("damage", ["half", "quarter", "double"])
@pytest.mark.parametrize("form", ["visium", "h5ad", "hest"])
def test_spots_of_another_size_than_the_array_allows(tmp_path, form, damage):
    """Nothing states a resolution; only the spots' diameter contradicts the array."""
    section = any_section(3, mpp=2.0, glass=ONE_SIDE)
    with pytest.raises(SourceError, match=r"um apart at .* um/px but .* um wide|is .* px, .* belongs to one of"):
        prepare_damaged(tmp_path, section, COMPLETE[form], damage)


@st.composite
def damaged(draw):
    section = draw(sections()) | {"glass": ONE_SIDE}
    form = draw(st.sampled_from(list(FORMS.values())).flatmap(lambda make: make("plain")))
    if isinstance(form, H5adForm):
        form = replace(form, array=True)  # without it, nothing tells pixels of one image from those of another
    return section, form, draw(images()), draw(st.sampled_from(sorted(DAMAGES)))


def check_damaged(case):
    """Each tile shows its spot, if there is any: turned by a half, a section may be its own mirror image."""
    arguments, form, image, damage = case
    section = any_section(**arguments)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            stated = {"mpp": section.mpp, "pitch_um": section.pitch_um, "image": image}
            prepared = prepare_damaged(Path(scratch), section, form, damage, **stated)
        except SourceError:
            return
        spots = prepared.spots("S")
        assert prepared.entries["S"].source_mpp == pytest.approx(section.mpp, rel=0.05)
        shown = {name: section.spot_of(tile(spot)[16, 16]) for name, spot in spots.items()}
        number = {name: i for i, name in enumerate(names(section, form))}
        assert shown == {name: number[name] for name in spots}


@property_test(4)
@given(damaged())
def test_a_few_damaged_sections(case):
    check_damaged(case)


@pytest.mark.slow
@property_test(25)
@given(damaged())
def test_many_damaged_sections(case):
    check_damaged(case)
