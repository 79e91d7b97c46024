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


def layout_mpp(layout: Layout, pitch_um: float | None = None) -> float | None:
    """Returns the micrometres per full-resolution pixel that the files state, or else the array gives; None if neither.

    Args:
        layout: the section's.
        pitch_um: distance of neighbouring spots; None: known for Visium's hexagonal array only.
    """
    if layout.mpp is not None:
        return layout.mpp
    if _is_hexagonal(layout.array_xy):
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
    px_per_unit = np.linalg.lstsq(array_xy - array_xy.mean(axis=0), xy_px - xy_px.mean(axis=0))[0]
    area = abs(float(np.linalg.det(px_per_unit)))
    neighbour = float(np.median(cKDTree(array_xy).query(array_xy, k=2)[0][:, 1]))
    return pitch_um / (neighbour * math.sqrt(area)) if area > 0 and neighbour > 0 else None


def _is_hexagonal(array_xy: np.ndarray) -> bool:
    """Returns whether rows alternate between even and odd columns, as on Visium's array."""
    column, row = array_xy.T if len(array_xy) else np.zeros((2, 0))
    known = np.isfinite(column + row)
    return bool(known.any() and known.all() and ((column + row) % 2 == 0).all() and (row % 2 == 1).any())
