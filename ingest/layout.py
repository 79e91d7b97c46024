"""What a section's layout says: its resolution, and whether positions, array, scale factors and image fit each other.

The checks belong to what a section has, not to its format. Nothing is repaired: files that contradict each other are
refused with the change that would fit, because only their owner knows which one is wrong.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

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
_MAX_SHARED = 0.1  # of spots with the array position of another, as some rounded ones have
_MAX_RATIO = 1.05  # of two lengths that are to be the same
_PITCH_OVER_DIAMETER = (0.9, 5.0)  # spots do not overlap; arrays leave at most a few diameters between them
_VISIUM_PITCH_OVER_DIAMETER = (1.25, 2.25)  # files state 45 to 80 um for spots of 55 um
_MAX_PATTERN_RATIO = 1.1  # of two pitches, one of them without a fit
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
    _require_own_places(layout)
    fit = fit_array(layout)
    if fit is not None:
        _require_order(layout, fit)
    resolution = _resolution(row, layout, fit, slide)
    _require_diameter(row, layout, fit, resolution.mpp)
    if fit is None:
        _require_pitch(row, layout, resolution.mpp)
    else:
        require_upright(row, layout, fit, slide, resolution.mpp)
    return resolution


def array_mpp(layout: Layout, pitch_um: float) -> float | None:
    """Returns the micrometres per pixel that an array of known pitch gives; None without an array."""
    fit = fit_array(layout)
    return pitch_um / fit.pitch_px if fit else None


def _require_own_places(layout: Layout) -> None:
    array_xy, _ = on_array(layout)
    shared = pd.DataFrame(array_xy).duplicated()
    if len(array_xy) >= MIN_SPOTS and shared.mean() > _MAX_SHARED:
        raise SourceError(
            f"{shared.sum()} of {len(array_xy)} spots have the array position of another: give the files of one "
            "section, and each spot's own array position or none"
        )


def _require_order(layout: Layout, fit: ArrayFit) -> None:
    array_xy, xy_px = on_array(layout)
    if fit.explains(array_xy, xy_px):
        return
    num_off = fit.off(array_xy, xy_px).sum()
    if num_off:
        raise SourceError(
            f"{num_off} of {len(xy_px)} spots are not where their array positions put them: "
            "positions are mixed up; join tables by the spots' names, never by their order"
        )
    raise SourceError(
        f"the pixel positions of its {len(xy_px)} spots are on a line, and their array is not: give each spot's x and y"
    )


def _resolution(row: SectionRow, layout: Layout, fit: ArrayFit | None, slide: Slide | None) -> Resolution:
    stated = {"sheet": row.mpp, "image": slide.mpp if slide else None, "scale factors": layout.mpp}
    pitches_um = _pitches_um(row, layout, fit) if fit else ()
    if any(stated.values()):
        resolution = Resolution(*resolve_mpp(stated))
        is_sure = row.pitch_um is not None or layout.bin_um is not None or _has_scale(layout)
        return _PitchCheck(resolution, layout, fit, slide, pitches_um, is_sure).judged() if fit else resolution
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
    if layout.bin_um is not None:
        return (layout.bin_um,)
    if fit.is_hexagonal or fit.is_exchanged:
        return (VISIUM_PITCH_UM,)
    return () if layout.mpp is not None else _SQUARE_PITCHES_UM


def _has_scale(layout: Layout) -> bool:
    """Returns whether scale factors come with the positions, as Space Ranger writes them."""
    return layout.mpp is not None or layout.spot_diameter_px is not None or bool(layout.pictures)


@dataclass(frozen=True)
class _PitchCheck:
    """A stated resolution beside an array whose spots are a known distance apart, or one of some usual distances."""

    stated: Resolution
    layout: Layout
    fit: ArrayFit
    slide: Slide | None
    pitches_um: tuple[float, ...]
    is_sure: bool
    """Whether a hexagon must be Visium's, and the pitch what the sheet says."""

    @property
    def pitch_um(self) -> float:
        """Distance of neighbouring spots by the stated resolution."""
        return self.fit.pitch_px * self.stated.mpp

    def judged(self) -> Resolution:
        """Returns the stated resolution, with a remark if it gives a pitch that is only unusual.

        Raises:
            SourceError: it gives the array a pitch that it cannot have.
        """
        if not self.pitches_um or any(_agree(self.pitch_um, allowed) for allowed in self.pitches_um):
            return self.stated
        allowed = " or ".join(f"{value:g}" for value in self.pitches_um)
        other_unit = next(filter(None, map(self._other_unit, self.pitches_um)), "")
        if self._is_possible(other_unit):
            usual = f"usual are {allowed}: check mpp, or confirm it by the sheet's column pitch_um"
            remark = f"spots are {self.pitch_um:.4g} um apart by the mpp of the {self.stated.source}; {usual}"
            return self.stated._replace(remark=remark)
        by_array = " or ".join(f"{value / self.fit.pitch_px:.4g}" for value in self.pitches_um)
        raise SourceError(
            f"mpp is {self.stated.mpp:.4g} in the {self.stated.source} and {by_array} in the array of spots "
            f"(neighbours are {self.fit.pitch_px:.4g} px and {allowed} um apart): {self._remedy(other_unit)}"
        )

    def _is_possible(self, other_unit: str) -> bool:
        """Returns whether the array may have the pitch, since it is no known one and the positions fit the image."""
        if len(self.pitches_um) > 1:
            return not other_unit and _is_between(self.pitch_um, _POSSIBLE_PITCH_UM)
        return not self.is_sure and not (self.slide and self._on_image(self.pitch_um / self.pitches_um[0]))

    def _remedy(self, other_unit: str) -> str:
        """Returns what to change; `other_unit` is what `_other_unit` found."""
        diameter_px = self.layout.spot_diameter_px
        if (
            self.fit.is_hexagonal
            and diameter_px
            and _is_between(self.fit.pitch_px / diameter_px, _VISIUM_PITCH_OVER_DIAMETER)
        ):
            return "the spots' diameter confirms the array: fix mpp, or give the image that belongs to it"
        if len(self.pitches_um) > 1:
            return f"{other_unit or 'fix mpp'}; or confirm that spots are {self.pitch_um:.3g} um apart by pitch_um"
        factor = self.pitch_um / self.pitches_um[0]
        if not other_unit and self._on_image(factor):
            other_unit = f"multiply the positions by {1 / factor:.4g} if they are in other pixels"
        return f"fix mpp, or {other_unit or 'give the image that belongs to it'}"

    def _other_unit(self, pitch_um: float) -> str:
        """Returns how to change positions that seem to be in another unit; empty if they are in none that is known."""
        factor = self.pitch_um / pitch_um
        if not self._on_image(factor):
            return ""
        for picture in self.layout.pictures:
            if _agree(picture.scale, factor):
                return other_pixels(picture)
        if _agree(self.fit.pitch_px, pitch_um):
            return f"divide the positions by mpp ({self.stated.mpp:.4g}), since they are in micrometres"
        return ""

    def _on_image(self, factor: float) -> bool:
        """Returns whether the positions could be `factor` times those in full-resolution pixels."""
        return self.slide is None or share_inside(self.layout.xy_px / factor, self.slide) >= _MIN_INSIDE


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


def _require_pitch(row: SectionRow, layout: Layout, mpp: float) -> None:
    """Checks the distance of neighbouring spots, if they are in a regular pattern without array, against the sheet's.

    Raises:
        SourceError: they differ by more than 10 %; gives both in micrometres.
    """
    pitch_px = _pitch_px(layout.xy_px, regular=True)
    if row.pitch_um is None or pitch_px is None:
        return
    ratio = row.pitch_um / (pitch_px * mpp)
    if not _is_between(ratio, (1 / _MAX_PATTERN_RATIO, _MAX_PATTERN_RATIO)):
        raise SourceError(
            f"its spots are {pitch_px * mpp:.4g} um apart at {mpp:.4g} um/px but {row.pitch_um:g} um by the sheet's "
            f"column pitch_um: fix mpp or pitch_um, or multiply positions in other pixels by {ratio:.4g}"
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
