"""How a section's pixel positions follow its array: an affine fit that a few wrong spots do not move.

On the image an array may be turned, sheared or mirrored. Spots that are off are found by a robust fit and left out of a
second one, of least squares.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from ingest.readers.spots import Layout

MIN_SPOTS = 16
"""Fewer spots say nothing about a section's layout."""
_HEXAGONAL_STEPS = np.array([0.5, math.sqrt(3) / 2])  # in pitches along array_col and array_row: columns are half ones
_STEP_TOLERANCE = 0.1
_MIN_EVEN = 0.95  # share of a hexagonal array's spots with an even sum of column and row
_MIN_ODD_ROWS = 0.1
_MAX_OFF = 0.25
_MIN_SINE = 0.5  # of the angle between the array's axes on the image
_OFF_SHARE_OF_EXTENT = 0.01  # fine bins follow the bends of an image's registration
_EXTENT = (5, 95)  # percentiles of positions
_NUM_TRIPLES = 500
_MAX_JUDGES = 1000
_MAX_NEIGHBOURS = 5000


@dataclass(frozen=True, eq=False)
class ArrayFit:
    """Pixels as an affine function of array positions."""

    px_per_step: np.ndarray
    """Pixels (x, y) per array column and row, float64 (2, 2)."""
    origin_px: np.ndarray
    """Where array column and row 0 are, float64 (2,)."""
    is_hexagonal: bool
    """Whether the array is Visium's."""
    is_exchanged: bool
    """Whether it is Visium's with array_row and array_col exchanged."""
    pitch_px: float
    """Distance of neighbouring spots."""
    tolerance_px: float
    """A spot is off if it is farther from where the array puts it."""

    @property
    def is_mirrored(self) -> bool:
        """Whether the image shows the array as in a mirror."""
        return bool(np.linalg.det(self.px_per_step) < 0)

    def off(self, array_xy: np.ndarray, xy_px: np.ndarray) -> np.ndarray:
        """Returns which spots are not where the array puts them, bool (n,); False without an array position."""
        distance = np.linalg.norm(xy_px - self.origin_px - array_xy @ self.px_per_step, axis=1)
        return np.asarray(distance > self.tolerance_px)

    def explains(self, array_xy: np.ndarray, xy_px: np.ndarray) -> bool:
        """Returns whether the positions follow the array: few are off, and they are not on a line."""
        along_column, along_row = np.linalg.norm(self.px_per_step, axis=1)
        area = abs(float(np.linalg.det(self.px_per_step)))
        return bool(area > _MIN_SINE * along_column * along_row and self.off(array_xy, xy_px).mean() <= _MAX_OFF)


def fit_array(layout: Layout) -> ArrayFit | None:
    """Returns the fit; None if fewer than 16 spots have an array position, or nearly all of these are on a line."""
    array_xy, xy_px = on_array(layout)
    robust = _robust_fit(array_xy, xy_px) if len(array_xy) >= MIN_SPOTS else None
    if robust is None:
        return None
    first = _described(*robust, array_xy, xy_px)
    if not first.explains(array_xy, xy_px):
        return first
    kept = ~first.off(array_xy, xy_px)
    array_xy, xy_px = array_xy[kept], xy_px[kept]
    return _described(*_least_squares(array_xy, xy_px), array_xy, xy_px)


def on_array(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Returns array and pixel positions of the spots that have both, float64 (n, 2) each."""
    known = np.isfinite(layout.array_xy).all(axis=1)
    return layout.array_xy[known], layout.xy_px[known]


def nearest_distances(xy: np.ndarray) -> np.ndarray:
    """Returns the distance to the nearest other point of (at most 5,000 of) the points float64 (n, 2), float64 (m,)."""
    asked = xy[:: math.ceil(len(xy) / _MAX_NEIGHBOURS)]
    return np.asarray(cKDTree(xy).query(asked, k=2)[0][:, 1])


def _described(px_per_step: np.ndarray, origin_px: np.ndarray, array_xy: np.ndarray, xy_px: np.ndarray) -> ArrayFit:
    """Returns a fit with what it says about its array."""
    hexagonal, exchanged = _hexagonal(array_xy, px_per_step)
    unit = _HEXAGONAL_STEPS if hexagonal else _HEXAGONAL_STEPS[::-1] if exchanged else np.ones(2)
    px_per_unit = math.sqrt(abs(float(np.linalg.det(px_per_step))) / unit.prod())
    pitch_px = float(np.median(nearest_distances(array_xy * unit))) * px_per_unit
    extent_px = float(np.linalg.norm(np.ptp(np.percentile(xy_px, _EXTENT, axis=0), axis=0)))
    tolerance_px = max(pitch_px, _OFF_SHARE_OF_EXTENT * extent_px)
    return ArrayFit(px_per_step, origin_px, hexagonal, exchanged, pitch_px, tolerance_px)


def _hexagonal(array_xy: np.ndarray, px_per_step: np.ndarray) -> tuple[bool, bool]:
    """Returns whether the array is Visium's, and whether it is that with rows and columns exchanged.

    Rows alternate between even and odd columns, and the steps are a hexagon's: these tell it from a square array of
    which every second position is used (cSCC).
    """
    column, row = array_xy.T
    along_column, along_row = np.linalg.norm(px_per_step, axis=1)
    is_even = ((column + row) % 2 == 0).mean() >= _MIN_EVEN and (row % 2 != 0).mean() >= _MIN_ODD_ROWS
    half, full = _HEXAGONAL_STEPS
    upright, exchanged = (
        bool(is_even and abs(short * full - long * half) < _STEP_TOLERANCE * long * half)
        for short, long in ((along_column, along_row), (along_row, along_column))
    )
    return upright, exchanged


def _least_squares(array_xy: np.ndarray, xy_px: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixels per step (2, 2) and the origin (2,) of the affine fit."""
    centre_steps, centre_px = array_xy.mean(axis=0), xy_px.mean(axis=0)
    px_per_step = np.linalg.lstsq(array_xy - centre_steps, xy_px - centre_px)[0]
    return px_per_step, centre_px - centre_steps @ px_per_step


def _robust_fit(array_xy: np.ndarray, xy_px: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the affine fit through three spots that has the least median distance to all others.

    None if all random triples are on a line.

    Least median of squares (Rousseeuw 1984, https://doi.org/10.1080/01621459.1984.10477105) over random triples:
    neither wrong pixels nor wrong array positions of some spots move it.
    """
    rng = np.random.default_rng(0)
    triple = rng.integers(0, len(array_xy), (_NUM_TRIPLES, 3))
    steps, px = (xy[triple[:, 1:]] - xy[triple[:, :1]] for xy in (array_xy, xy_px))
    spans = np.abs(np.linalg.det(steps)) > 0
    if not spans.any():
        return None
    px_per_step = np.linalg.solve(steps[spans], px[spans])
    origin_px = xy_px[triple[spans, 0]] - np.einsum("ti,tij->tj", array_xy[triple[spans, 0]], px_per_step)
    judges = slice(None, None, math.ceil(len(array_xy) / _MAX_JUDGES))
    expected = array_xy[judges] @ px_per_step + origin_px[:, None]
    best = np.median(np.linalg.norm(xy_px[judges] - expected, axis=2), axis=1).argmin()
    return px_per_step[best], origin_px[best]
