"""What a section's layout says: its resolution, and whether positions, array, scale factors and image fit each other.

The checks belong to what a section has, not to its format. Nothing is repaired: files that contradict each other are
refused with the change that would fit, because only their owner knows which one is wrong.
"""

from typing import NamedTuple

import numpy as np

from ingest.array_fit import MIN_SPOTS, ArrayFit, fit_array, nearest_distances, on_array
from ingest.image_match import other_pixels, require_same_image, share_inside
from ingest.orientation import require_upright
from ingest.readers.spots import Layout
from mclstexp.data.sheet import SectionRow
from mclstexp.errors import SourceError
from mclstexp.slides.resolution import resolve_mpp
from mclstexp.slides.slide import Slide

VISIUM_PITCH_UM = 100.0
_SQUARE_PITCHES_UM = (200.0, 150.0)  # legacy ST with 1,000 and 2,000 spots
_POSSIBLE_PITCH_UM = (80.0, 400.0)  # of square arrays
_MIN_INSIDE = 0.5
_MAX_RATIO = 1.05  # of two lengths that are to be the same
_PITCH_OVER_DIAMETER = (0.9, 5.0)  # spots do not overlap; arrays leave at most a few diameters between them
_VISIUM_PITCH_OVER_DIAMETER = (1.25, 2.25)  # files state 45 to 80 um for spots of 55 um
_MAX_SPREAD = 1.5  # ratio of large to small distances of neighbours in a regular pattern


class Resolution(NamedTuple):
    """A section's resolution."""

    mpp: float
    """Micrometres per level-0 pixel."""
    source: str
    """What states it: `sheet`, `image`, `scale factors` or `array of spots`."""
    remark: str = ""
    """What the user should know of it."""


def judged_resolution(row: SectionRow, layout: Layout, slide: Slide | None) -> Resolution:
    """Returns a section's resolution after all checks of its layout.

    Args:
        row: the section in the sheet.
        layout: what its files state.
        slide: its open image; None while a remote image is not at hand: its checks then follow when it is cut.

    Raises:
        SourceError: nothing states a resolution, or sheet, files and image contradict each other.
    """
    require_same_image(layout, slide)
    fit = fit_array(layout)
    if fit is not None:
        _require_order(layout, fit)
    resolution = _resolution(row, layout, fit, slide)
    _require_diameter(row, layout, fit, resolution.mpp)
    if fit is not None:
        require_upright(row, layout, fit, slide, resolution.mpp)
    return resolution


def array_mpp(layout: Layout, pitch_um: float) -> float | None:
    """Returns the micrometres per pixel that an array of known pitch gives; None without an array."""
    fit = fit_array(layout)
    return pitch_um / fit.pitch_px if fit else None


def _require_order(layout: Layout, fit: ArrayFit) -> None:
    array_xy, xy_px = on_array(layout)
    if not fit.explains(array_xy, xy_px):
        raise SourceError(
            f"{fit.off(array_xy, xy_px).sum()} of {len(xy_px)} spots are not where their array positions put them: "
            "positions are mixed up; join tables by the spots' names, never by their order"
        )


def _resolution(row: SectionRow, layout: Layout, fit: ArrayFit | None, slide: Slide | None) -> Resolution:
    stated = {"sheet": row.mpp, "image": slide.mpp if slide else None, "scale factors": layout.mpp}
    pitches_um = _pitches_um(row, layout, fit) if fit else ()
    if any(stated.values()):
        resolution = Resolution(*resolve_mpp(stated))
        return _with_pitch(resolution, layout, fit, pitches_um, slide) if fit and pitches_um else resolution
    if fit and len(pitches_um) > 1:
        raise SourceError(
            f"no resolution: {', '.join(stated)} state none, and its array has no known pitch; fill in the sheet's "
            "column mpp, or pitch_um, the distance of neighbouring spots (200 or 150 um in legacy ST)"
        )
    array = pitches_um[0] / fit.pitch_px if fit else None
    return Resolution(*resolve_mpp(stated | {"array of spots": array}))


def _pitches_um(row: SectionRow, layout: Layout, fit: ArrayFit) -> tuple[float, ...]:
    """Returns what the distance of neighbouring spots may be; empty if anything may."""
    if row.pitch_um is not None:
        return (row.pitch_um,)
    if fit.is_hexagonal or fit.is_exchanged:
        return (VISIUM_PITCH_UM,)
    return () if layout.mpp is not None else _SQUARE_PITCHES_UM


def _with_pitch(
    stated: Resolution, layout: Layout, fit: ArrayFit, pitches_um: tuple[float, ...], slide: Slide | None
) -> Resolution:
    """Returns a stated resolution, with a remark if it gives an array of no known pitch an unusual one.

    Raises:
        SourceError: it gives the array a pitch that it does not have.
    """
    pitch_um = fit.pitch_px * stated.mpp
    if any(_agree(pitch_um, allowed) for allowed in pitches_um):
        return stated
    allowed = " or ".join(f"{value:g}" for value in pitches_um)
    other_unit = next(filter(None, (_other_unit(layout, fit, stated.mpp, each, slide) for each in pitches_um)), "")
    if len(pitches_um) > 1 and not other_unit and _POSSIBLE_PITCH_UM[0] <= pitch_um <= _POSSIBLE_PITCH_UM[1]:
        usual = f"usual are {allowed}: check mpp, or confirm it by the sheet's column pitch_um"
        return stated._replace(remark=f"spots are {pitch_um:.4g} um apart by the mpp of the {stated.source}; {usual}")
    by_array = " or ".join(f"{value / fit.pitch_px:.4g}" for value in pitches_um)
    raise SourceError(
        f"mpp is {stated.mpp:.4g} in the {stated.source} and {by_array} in the array of spots (neighbours are "
        f"{fit.pitch_px:.4g} px and {allowed} um apart): {_remedy(layout, fit, pitch_um, pitches_um, other_unit)}"
    )


def _remedy(layout: Layout, fit: ArrayFit, pitch_um: float, pitches_um: tuple[float, ...], other_unit: str) -> str:
    """Returns what to change where a stated resolution gives the array the pitch `pitch_um`."""
    if (
        fit.is_hexagonal
        and layout.spot_diameter_px is not None
        and _is_between(fit.pitch_px / layout.spot_diameter_px, _VISIUM_PITCH_OVER_DIAMETER)
    ):
        return "the spots' diameter confirms the array: fix mpp, or give the image that belongs to it"
    if len(pitches_um) > 1:
        return f"{other_unit or 'fix mpp'}; or confirm that spots are {pitch_um:.3g} um apart by the column pitch_um"
    factor = pitches_um[0] / pitch_um
    return f"fix mpp, or {other_unit or f'multiply the positions by {factor:.4g} if they are in other pixels'}"


def _other_unit(layout: Layout, fit: ArrayFit, mpp: float, pitch_um: float, slide: Slide | None) -> str:
    """Returns how to change positions that seem to be in another unit; empty if they are in none that is known."""
    factor = fit.pitch_px * mpp / pitch_um
    if slide and share_inside(layout.xy_px / factor, slide) < _MIN_INSIDE:
        return ""
    for picture in layout.pictures:
        if _agree(picture.scale, factor):
            return other_pixels(picture)
    is_um = _agree(fit.pitch_px, pitch_um)
    return f"divide the positions by mpp ({mpp:.4g}), since they are in micrometres" if is_um else ""


def _require_diameter(row: SectionRow, layout: Layout, fit: ArrayFit | None, mpp: float) -> None:
    """Checks the distance of neighbouring spots against their diameter, which reveals positions of other pixels.

    Raises:
        SourceError: spots overlap or are too far apart; gives both in micrometres.
    """
    by_sheet = row.spot_diameter_um is not None
    diameter_px = row.spot_diameter_um / mpp if row.spot_diameter_um is not None else layout.spot_diameter_px
    pitch_px = fit.pitch_px if fit else _pitch_px(layout.xy_px, regular=not by_sheet)
    if diameter_px is None or pitch_px is None:
        return
    allowed = _VISIUM_PITCH_OVER_DIAMETER if fit and fit.is_hexagonal and not by_sheet else _PITCH_OVER_DIAMETER
    if _is_between(pitch_px / diameter_px, allowed):
        return
    remedy = "fix mpp or spot_diameter_um, or give positions in full-resolution pixels"
    for picture in () if by_sheet else layout.pictures:
        if _is_between(pitch_px / picture.scale / diameter_px, allowed):
            remedy = other_pixels(picture)
    raise SourceError(
        f"its spots are {pitch_px * mpp:.3g} um apart at {mpp:.4g} um/px but {diameter_px * mpp:.4g} um wide (allowed "
        f"are {allowed[0]} to {allowed[1]} diameters): {remedy}"
    )


def _pitch_px(xy_px: np.ndarray, regular: bool) -> float | None:
    """Returns the distance of neighbours; None for few spots or, with `regular`, for spots in no pattern."""
    if len(xy_px) < MIN_SPOTS:
        return None
    distance = nearest_distances(xy_px)
    small, median, large = np.percentile(distance, (10, 50, 90)).tolist()
    return None if regular and large > _MAX_SPREAD * small else median


def _agree(got: float, expected: float) -> bool:
    return _is_between(got / expected, (1 / _MAX_RATIO, _MAX_RATIO))


def _is_between(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]
