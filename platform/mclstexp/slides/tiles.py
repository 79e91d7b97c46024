"""Geometry of tiles and sentences, and small pictures of slides.

At native resolution a tile is the exact crop around the floor of its centre; otherwise it is resampled around the same
point. Sentences are cut evenly from a Hilbert curve, which keeps neighbours together without a clustering step; in
return, a sentence's outline is ragged where the curve folds.
"""

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from mclstexp.slides.codec import encode_tile
from mclstexp.slides.slide import Slide

NATIVE_RATIO = 1.02
"""Ratio of source and target resolution up to which tiles are exact crops."""
MAX_UPSAMPLING = 1.5
"""Largest enlargement without `allow_upsampling`."""
THUMBNAIL_PX, THUMBNAIL_QUALITY = 1024, 85
"""Longer edge of a slide's small picture, and its JPEG quality."""
_CURVE_BITS = 16
_TILE_COLOUR, _TISSUE_COLOUR = np.array([0, 160, 90]), np.array([0, 60, 30])  # green contrasts with H&E
_TINT = 0.3


def tile_scale(target_mpp: float, source_mpp: float) -> float:
    """Returns the level-0 pixels along a tile pixel: exactly 1 if the resolutions agree within `NATIVE_RATIO`."""
    ratio = target_mpp / source_mpp
    return 1.0 if 1 / NATIVE_RATIO <= ratio <= NATIVE_RATIO else ratio


def tile_corner(centre_px: np.ndarray, size_px: int, scale: float) -> np.ndarray:
    """Returns the left (or top) edges of tiles around centres (n,), in level-0 pixels, float64 (n,)."""
    return np.floor(centre_px) - (size_px // 2 if scale == 1 else size_px * scale / 2)


def inside(left: np.ndarray, top: np.ndarray, edge_px: float, width: int, height: int) -> np.ndarray:
    """Returns which square tiles are entirely on a slide of width x height pixels, bool (n,)."""
    return (left >= 0) & (top >= 0) & (left + edge_px <= width) & (top + edge_px <= height)


def grid(
    width: int, height: int, size_px: int, scale: float, overlap: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns all whole tiles of a slide: column, row (int32) and centre x, y in level-0 pixels, (n,) each.

    Neighbours share `overlap` of their edge, 0 <= overlap < 1; with 0 they adjoin. Their centres are at least one pixel
    apart.
    """
    edge = size_px * scale
    step = edge if overlap == 0 else max(1.0, edge * (1 - overlap))
    indices = [np.arange(max(0, int((length - edge) // step) + 1), dtype=np.int32) for length in (width, height)]
    column, row = (axis.ravel() for axis in np.meshgrid(*indices))
    half = size_px // 2 if scale == 1 else edge / 2
    x, y = (np.ceil(index * step + half) for index in (column, row))
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
    """Returns `order` in the fewest runs of at most `max_length`; run lengths differ by at most one."""
    num_runs = -(-len(order) // max_length)
    return np.array_split(order, num_runs) if num_runs else []


def small_picture(slide: Slide) -> tuple[np.ndarray, float]:
    """Returns a slide's small picture, uint8 (h, w, 3), and its scale: level-0 pixels along one of its pixels.

    Raises:
        SourceError: the slide is damaged.
    """
    scale = max(1.0, max(slide.width, slide.height) / THUMBNAIL_PX)
    return slide.thumbnail(scale), scale


def encode_picture(picture: np.ndarray) -> bytes:
    """Returns a small picture, uint8 (h, w, 3), as JPEG."""
    return encode_tile(picture, "jpeg", THUMBNAIL_QUALITY)


def preview(
    picture: np.ndarray, scale: float, is_tissue: np.ndarray, left: np.ndarray, top: np.ndarray, edge_px: float
) -> np.ndarray:
    """Returns a small picture, uint8 (h, w, 3), with the tissue outlined and the tiles' area tinted.

    Args:
        picture: the small picture.
        scale: level-0 pixels along one of its pixels.
        is_tissue: the slide's tissue mask, bool of any resolution.
        left, top: (n,) corners of the tiles in level-0 pixels.
        edge_px: edge of a tile in level-0 pixels.
    """
    size = picture.shape[1], picture.shape[0]
    area = Image.new("1", size)
    draw = ImageDraw.Draw(area)
    for x, y in zip((left / scale).tolist(), (top / scale).tolist(), strict=True):
        draw.rectangle((x, y, x + edge_px / scale, y + edge_px / scale), fill=1)
    tissue = np.asarray(Image.fromarray(is_tissue).resize(size, Image.Resampling.NEAREST))
    drawn = np.where(np.asarray(area)[..., None], (1 - _TINT) * picture + _TINT * _TILE_COLOUR, picture)
    outline = tissue & ~ndimage.binary_erosion(tissue, iterations=2)
    return np.where(outline[..., None], _TISSUE_COLOUR, drawn).round().astype(np.uint8)
