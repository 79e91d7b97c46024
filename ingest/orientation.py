"""Whether spots lie on the image as they should: not mirrored, with exchanged axes, or turned by half.

An array tells whether the positions are mirrored. All else only the tissue tells: an orientation that puts clearly more
spots on tissue than the given one. The limit is a section of which both look the same.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from ingest.array_fit import MIN_SPOTS, ArrayFit
from ingest.readers.spots import Layout
from mclstexp.data.sheet import SectionRow
from mclstexp.errors import SourceError
from mclstexp.slides.slide import Slide
from mclstexp.slides.tissue import TissueMask, find_tissue

_ENOUGH_ON_TISSUE = 0.9
_MIN_GAIN = 0.1  # more spots on tissue, as a share of all
_MAX_REST = 0.5  # spots off tissue, as a share of those as given


class _Change(NamedTuple):
    """A change of the sources that moves all spots."""

    words: str
    move: Callable[[np.ndarray, Slide], np.ndarray]
    """Maps positions, float64 (n, 2), on a slide."""


_EXCHANGED = _Change("exchange x and y of the positions", lambda xy, slide: xy[:, ::-1])


def _mirrored(what: str) -> tuple[_Change, _Change]:
    """Returns both ways to mirror the image or the positions."""
    return (
        _Change(f"mirror the {what} left to right", lambda xy, slide: np.array([slide.width, 0]) + xy * [-1, 1]),
        _Change(f"mirror the {what} upside down", lambda xy, slide: np.array([0, slide.height]) + xy * [1, -1]),
    )


_TURNED = (
    _Change("turn the image by 180 degrees", lambda xy, slide: np.array([slide.width, slide.height]) - xy),
    _Change("turn the image to the left", lambda xy, slide: np.array([slide.width, 0]) + xy[:, ::-1] * [-1, 1]),
    _Change("turn the image to the right", lambda xy, slide: np.array([0, slide.height]) + xy[:, ::-1] * [1, -1]),
)


def require_upright(row: SectionRow, layout: Layout, fit: ArrayFit, slide: Slide | None, mpp: float) -> None:
    """Checks that the image shows the array as it is, or as the mirror image that the sheet says it is.

    Visium HD is left to the tissue, because Space Ranger numbers its bins as from the back of many images.

    Raises:
        SourceError: array and positions contradict that; gives the change that would fit.
    """
    if layout.bin_um is not None:
        return
    mirrored = bool(row.mirrored)
    if fit.is_exchanged:
        also = "" if fit.is_mirrored != mirrored else ", and x and y of the positions"
        raise SourceError(
            f"array_row and array_col are exchanged, as the steps of the hexagon show: exchange them{also}"
        )
    if fit.is_mirrored and not mirrored:
        raise SourceError(
            f"its positions show the array as in a mirror: {_unmirrored(layout, fit, slide, mpp)}; if the image really "
            "is a mirror image of the tissue, set the sheet's column mirrored to true"
        )
    if mirrored and not fit.is_mirrored:
        raise SourceError(
            "the sheet says mirrored, but its positions show the array as it is: leave the column mirrored empty, or "
            "give the positions on the mirrored image"
        )


def require_best_orientation(
    xy_px: np.ndarray, layout: Layout, fit: ArrayFit | None, slide: Slide, mask: TissueMask
) -> None:
    """Checks that no other orientation puts clearly more spots on tissue.

    Args:
        xy_px: centres of the usable spots, float64 (n, 2).
        layout: the section's.
        fit: of its array, which excludes that x and y are exchanged unless it is Visium HD's.
        slide: the image.
        mask: its tissue.

    Raises:
        SourceError: one does; names it, with the numbers of spots.
    """
    by_array = fit is not None and layout.bin_um is None
    mirrored = _mirrored("image") if by_array else (_EXCHANGED, *_mirrored("image or the positions"))
    if found := _better(xy_px, (*mirrored, *_TURNED), slide, mask):
        given = int(_on_tissue(xy_px, slide, mask).sum())
        change, number = found
        advice = "do so" if number >= _ENOUGH_ON_TISSUE * len(xy_px) else "do so if it is the image of this section"
        raise SourceError(
            f"only {given} of {len(xy_px)} spots are on tissue, but {number} if you {change.words}: {advice} (if "
            "positions are right and tissue is only faint, set tiles.min_tissue to 0)"
        )


def _unmirrored(layout: Layout, fit: ArrayFit, slide: Slide | None, mpp: float) -> str:
    """Returns in words what to change on mirrored positions."""
    changes = (_EXCHANGED, *_mirrored("positions"))
    if slide is not None:
        mask = find_tissue(slide, mpp)
        if found := _better(layout.xy_px, changes, slide, mask):
            change, number = found
            given = int(_on_tissue(layout.xy_px, slide, mask).sum())
            return f"{change.words} ({number} of {len(layout.xy_px)} spots are on tissue then, {given} as given)"
    array = () if fit.is_hexagonal else ("exchange array_row and array_col",)
    return ", or ".join([*(change.words for change in changes), *array])


def _better(
    xy_px: np.ndarray, changes: Iterable[_Change], slide: Slide, mask: TissueMask
) -> tuple[_Change, int] | None:
    """Returns the change that puts most spots on tissue, and how many, if these are clearly more than as given."""
    number, given = len(xy_px), int(_on_tissue(xy_px, slide, mask).sum())
    counts = [(int(_on_tissue(change.move(xy_px, slide), slide, mask).sum()), change) for change in changes]
    most, change = max(counts, key=lambda counted: counted[0])
    is_clear = most - given >= _MIN_GAIN * number and number - most <= _MAX_REST * (number - given)
    enough = number < MIN_SPOTS or given >= _ENOUGH_ON_TISSUE * number
    return (change, most) if is_clear and not enough else None


def _on_tissue(xy_px: np.ndarray, slide: Slide, mask: TissueMask) -> np.ndarray:
    """Returns which positions, float64 (n, 2), are on the slide and its tissue, bool (n,)."""
    on_slide = ((xy_px >= 0) & (xy_px < [slide.width, slide.height])).all(axis=1)
    height, width = mask.is_tissue.shape
    column, row = np.clip((xy_px / mask.scale).astype(int), 0, [width - 1, height - 1]).T
    return on_slide & mask.is_tissue[row, column]
