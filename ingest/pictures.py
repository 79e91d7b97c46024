"""Small pictures of a slide for people: the slide itself, and where tissue and tiles were found.

Tiles are filled rectangles on the small picture, so that the drawing's cost grows with their number and not with the
slide; below a pixel's size they merge into one area.
"""

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from ingest.slides import Slide
from mclstexp.data.images import encode_tile

THUMBNAIL_PX, THUMBNAIL_QUALITY = 1024, 85
"""Longer edge of a slide's small picture, and its JPEG quality."""
_TILES, _TISSUE = np.array([0, 160, 90]), np.array([0, 60, 30])  # green stands out from H&E
_TINT = 0.3


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
        is_tissue: the slide's tissue mask, bool of any resolution.
        left, top: (n,) corners of the tiles in level-0 pixels; each covers `edge_px` along an edge.
    """
    size = picture.shape[1], picture.shape[0]
    area = Image.new("1", size)
    draw = ImageDraw.Draw(area)
    for x, y in zip((left / scale).tolist(), (top / scale).tolist(), strict=True):
        draw.rectangle((x, y, x + edge_px / scale, y + edge_px / scale), fill=1)
    tissue = np.asarray(Image.fromarray(is_tissue).resize(size, Image.Resampling.NEAREST))
    drawn = np.where(np.asarray(area)[..., None], (1 - _TINT) * picture + _TINT * _TILES, picture)
    outline = tissue & ~ndimage.binary_erosion(tissue, iterations=2)
    return np.where(outline[..., None], _TISSUE, drawn).round().astype(np.uint8)
