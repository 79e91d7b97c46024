"""Geometry of tiles and sentences: pure functions, no files.

At native resolution a tile is the exact crop around the floor of its centre; otherwise it is resampled, around the
same point. Sentences are cut evenly from a Hilbert curve, which keeps neighbours together without a clustering
step; its price is that a sentence's outline is ragged where the curve folds.
"""

import numpy as np

from mclstexp.data.images import tile_corner

NATIVE_RATIO = 1.02
"""Ratio of source and target resolution up to which tiles are exact crops."""
MAX_UPSAMPLING = 1.5
_CURVE_BITS = 16


def tile_scale(target_mpp: float, source_mpp: float) -> float:
    """Returns the level-0 pixels along a tile pixel: exactly 1 where the resolutions agree within `NATIVE_RATIO`."""
    ratio = target_mpp / source_mpp
    return 1.0 if 1 / NATIVE_RATIO <= ratio <= NATIVE_RATIO else ratio


def inside(left: np.ndarray, top: np.ndarray, edge_px: float, width: int, height: int) -> np.ndarray:
    """Returns which square tiles lie wholly on a slide of width x height pixels, bool (n,)."""
    return (left >= 0) & (top >= 0) & (left + edge_px <= width) & (top + edge_px <= height)


def grid(
    width: int, height: int, size_px: int, scale: float, overlap: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns all whole tiles of a slide: column, row (int32) and centre x, y in level-0 pixels (n,).

    Neighbours share `overlap` of their edge, 0 <= overlap < 1; 0 sets them edge to edge. They lie at least one pixel
    apart.
    """
    edge = size_px * scale
    step = edge if overlap == 0 else max(1.0, edge * (1 - overlap))
    places = [np.arange(max(0, int((length - edge) // step) + 1), dtype=np.int32) for length in (width, height)]
    column, row = (axis.ravel() for axis in np.meshgrid(*places))
    half = size_px // 2 if scale == 1 else edge / 2
    x, y = (np.ceil(place * step + half) for place in (column, row))
    whole = inside(tile_corner(x, size_px, scale), tile_corner(y, size_px, scale), edge, width, height)
    return column[whole], row[whole], x[whole], y[whole]


def tile_names(column: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Returns the names `{column}x{row}` of a grid's tiles, object (n,)."""
    return np.array([f"{c}x{r}" for c, r in zip(column.tolist(), row.tolist(), strict=True)], object)


def curve_order(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the order of points (n,) along a Hilbert curve over their bounding square, int64 (n,)."""
    if not len(x):
        return np.zeros(0, np.int64)
    extent = max(np.ptp(x), np.ptp(y)) or 1.0
    cells = [((axis - axis.min()) / extent * (2**_CURVE_BITS - 1)).astype(np.int64) for axis in (x, y)]
    return np.lexsort((x, y, hilbert_distance(*cells)))


def hilbert_distance(x: np.ndarray, y: np.ndarray, bits: int = _CURVE_BITS) -> np.ndarray:
    """Returns the distance along the Hilbert curve of cells (n,) of a 2^bits square grid, int64 (n,).

    The classic bitwise form (Hilbert 1891; https://en.wikipedia.org/wiki/Hilbert_curve), over whole arrays.
    """
    x, y = x.astype(np.int64), y.astype(np.int64)
    distance = np.zeros_like(x)
    for bit in reversed(range(bits)):
        side = np.int64(1) << bit
        right, up = (x & side) > 0, (y & side) > 0
        distance += side * side * ((3 * right) ^ up)
        flipped = right & ~up
        x, y = (np.where(flipped, (side - 1 - axis) & (side - 1), axis) for axis in (x, y))
        x, y = np.where(up, x, y), np.where(up, y, x)
    return distance


def cut_evenly(order: np.ndarray, max_length: int) -> list[np.ndarray]:
    """Returns `order` in the fewest runs of at most `max_length`, whose lengths differ by one at most."""
    num_runs = -(-len(order) // max_length)
    return np.array_split(order, num_runs) if num_runs else []
