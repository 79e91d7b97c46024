"""Which spots get a tile: those whose tile lies on the slide and on tissue; the others are named with the reason.

When most measured spots fail, positions and image do not belong together (exchanged axes, another resolution), and
the section is refused instead of being thinned out in silence.
"""

import numpy as np
from scipy.spatial import cKDTree

from ingest.expression import Reject, Spots, require_places
from ingest.slides import Slide
from ingest.tiling import grid, inside, tile_names
from ingest.tissue import find_tissue
from mclstexp.data.images import tile_corner
from mclstexp.errors import SourceError

_LEAST_SHARE = 0.5  # of measured spots on the slide, and on tissue
_PITCH_OVER_DIAMETER = (0.9, 5.0)  # spots do not overlap; arrays leave at most a few diameters between them
_LEAST_FOR_PITCH = 16  # spots


def grid_spots(slide: Slide, size_px: int, scale: float) -> Spots:
    """Returns all whole tiles of a slide as spots named `{column}x{row}`."""
    column, row, x, y = grid(slide.width, slide.height, size_px, scale)
    spots = Spots(tile_names(column, row), x, y, array_row=row.astype(np.float64), array_col=column.astype(np.float64))
    require_places(spots)
    return spots


def require_pitch(spots: Spots, diameter_um: float | None, mpp: float) -> None:
    """Checks the distance of neighbouring spots against their diameter: a wrong resolution shows there.

    Raises:
        SourceError: the distance is below 0.9 or above 5 diameters; gives both in micrometres.
    """
    if diameter_um is None or len(spots) < _LEAST_FOR_PITCH:
        return
    place = np.stack([spots.x_px, spots.y_px], axis=1)
    pitch_um = float(np.median(cKDTree(place).query(place, k=2)[0][:, 1])) * mpp
    low, high = _PITCH_OVER_DIAMETER
    if not low * diameter_um <= pitch_um <= high * diameter_um:
        raise SourceError(
            f"its spots lie {pitch_um:.3g} um apart at {mpp:.4g} um/px but are {diameter_um:.4g} um wide (allowed "
            f"{low} to {high} diameters): mend mpp or spot_diameter_um, or give positions in full-resolution pixels"
        )


def screen(
    spots: Spots, slide: Slide, size_px: int, scale: float, mpp: float, min_tissue: float
) -> tuple[Spots, np.ndarray, list[Reject]]:
    """Returns the spots that get a tile, their share of tissue, float32 (n,), and the rejects.

    Reasons are `outside_image` (the centre is), `crosses_edge` (its tile does) and `no_tissue` (less than
    `min_tissue`).

    Raises:
        SourceError: less than half of the measured spots lie on the slide, or less than half of those on tissue.
    """
    edge = size_px * scale
    left, top = tile_corner(spots.x_px, size_px, scale), tile_corner(spots.y_px, size_px, scale)
    whole = inside(left, top, edge, slide.width, slide.height)
    centred = inside(spots.x_px, spots.y_px, 0, slide.width, slide.height)
    if spots.counts is not None:
        _require_on_slide(spots, centred, slide)
    share = find_tissue(slide, mpp).share(left, top, edge)
    on_tissue = share >= min_tissue
    if spots.counts is not None:
        _require_on_tissue(int((whole & on_tissue).sum()), int(whole.sum()), min_tissue)
    rejects = spots.rejects(~centred, "outside_image") + spots.rejects(centred & ~whole, "crosses_edge")
    rejects += spots.rejects(whole & ~on_tissue, "no_tissue")
    return spots.take(whole & on_tissue), share[whole & on_tissue], rejects


def _require_on_slide(spots: Spots, on_slide: np.ndarray, slide: Slide) -> None:
    if on_slide.sum() >= _LEAST_SHARE * len(spots):
        return
    exchanged = inside(spots.y_px, spots.x_px, 0, slide.width, slide.height).sum()
    raise SourceError(
        f"only {on_slide.sum()} of {len(spots)} spots lie on its image of {slide.width} x {slide.height} px "
        f"({exchanged} with x and y exchanged): give positions in pixels of this very image"
    )


def _require_on_tissue(num_on_tissue: int, num_whole: int, min_tissue: float) -> None:
    if num_on_tissue < _LEAST_SHARE * num_whole:
        raise SourceError(
            f"only {num_on_tissue} of {num_whole} spots lie on tissue: are x and y exchanged or positions of another "
            f"image? With an unusual stain set tiles.min_tissue (now {min_tissue}) to 0"
        )
