"""Which resolution of a slide counts: the sheet's, the image's, the array's or an assumed one."""

import pytest

from mclstexp.errors import SourceError
from mclstexp.slides.resolution import resolve_mpp


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"sheet": 0.5, "image": 0.51}, (0.5, "sheet")),
        ({"sheet": 0.5, "image": None}, (0.5, "sheet")),
        ({"sheet": None, "image": 0.51}, (0.51, "image")),
        ({"sheet": None, "image": None}, (2.0, "assumed")),
    ],
)
def test_the_first_source_that_states_a_resolution_counts(
    stated: dict[str, float | None], expected: tuple[float, str]
) -> None:
    assert resolve_mpp(stated, assumed=2.0) == expected


def test_a_resolution_that_nothing_states_is_refused() -> None:
    with pytest.raises(SourceError, match=r"no resolution: sheet and image state none; fill in .* mpp"):
        resolve_mpp({"sheet": None, "image": None})


def test_sources_that_disagree_are_refused_whatever_their_order() -> None:
    assert resolve_mpp({"sheet": 0.5, "image": None, "array of spots": 0.524}) == (0.5, "sheet")
    with pytest.raises(SourceError, match=r"mpp is 0\.5 in the sheet and 0\.25 in the image"):
        resolve_mpp({"sheet": 0.5, "image": 0.25})
    with pytest.raises(SourceError, match=r"mpp is 0\.5 in the image and 0\.53 in the array of spots"):
        resolve_mpp({"sheet": None, "image": 0.5, "array of spots": 0.53})
