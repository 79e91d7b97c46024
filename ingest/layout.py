"""What a section's layout says: the resolution from its array, and whether positions, array and image fit each other.

The checks belong to what a section has, not to its format: whatever has array positions gets the fit of pixels over the
array.
"""

import math

import numpy as np
from scipy.spatial import cKDTree

from ingest.readers.spots import Layout

VISIUM_PITCH_UM = 100.0
_HEXAGONAL_STEPS = (0.5, math.sqrt(3) / 2)  # in pitches along array_col and array_row: columns count half pitches
_MIN_SPOTS = 16
_STEP_TOLERANCE = 0.1


def layout_mpp(layout: Layout, pitch_um: float | None = None) -> float | None:
    """Returns the micrometres per full-resolution pixel that the files state, or else the array gives; None if neither.

    Args:
        layout: the section's.
        pitch_um: distance of neighbouring spots; None: known for Visium's hexagonal array only.
    """
    if layout.mpp is not None:
        return layout.mpp
    if _is_hexagonal(layout):
        return array_mpp(layout.array_xy * _HEXAGONAL_STEPS, layout.xy_px, pitch_um or VISIUM_PITCH_UM)
    return array_mpp(layout.array_xy, layout.xy_px, pitch_um) if pitch_um else None


def array_mpp(array_xy: np.ndarray, xy_px: np.ndarray, pitch_um: float) -> float | None:
    """Returns the micrometres per pixel, or None if there are fewer than 16 spots or all are on a line.

    Args:
        array_xy: positions on the array, float64 (n, 2), in any unit in which neighbours are equally far apart.
        xy_px: the same spots on the image, float64 (n, 2), in pixels; the array may be rotated or mirrored.
        pitch_um: distance of neighbouring spots in micrometres.
    """
    if len(array_xy) < _MIN_SPOTS:
        return None
    area = abs(float(np.linalg.det(px_per_step(array_xy, xy_px))))
    neighbour = float(np.median(cKDTree(array_xy).query(array_xy, k=2)[0][:, 1]))
    return pitch_um / (neighbour * math.sqrt(area)) if area > 0 and neighbour > 0 else None


def _is_hexagonal(layout: Layout) -> bool:
    """Returns whether the array is Visium's: rows alternate between even and odd columns, in steps of a hexagon.

    The steps tell it from a square array of which every second position is used (cSCC).
    """
    column, row = layout.array_xy.T
    known = np.isfinite(column + row)
    if not known.any() or not known.all() or ((column + row) % 2).any() or not (row % 2).any():
        return False
    along_column, along_row = np.linalg.norm(px_per_step(layout.array_xy, layout.xy_px), axis=1)
    return bool(abs(along_column / along_row * math.sqrt(3) - 1) < _STEP_TOLERANCE)


def px_per_step(array_xy: np.ndarray, xy_px: np.ndarray) -> np.ndarray:
    """Returns the affine fit of pixels over the array: pixels (x, y) per array column and row, float64 (2, 2)."""
    return np.linalg.lstsq(array_xy - array_xy.mean(axis=0), xy_px - xy_px.mean(axis=0))[0]
