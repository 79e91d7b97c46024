"""A slide of one repeated storage tile of synthetic tissue, made in seconds: reading it costs what a real one costs."""

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from synthetic_table import tissue

from mclstexp.slides.codec import encode_tile

MPP = 0.5
STORED_PX = 256  # edge of a tile of the TIFF at its finest level
SHRINKS = (1, 4, 16)
_JPEG_QUALITY = 80


def write_slide(path: Path, num_tiles: int, tile_px: int) -> None:
    """Writes a square pyramid of about `num_tiles` tiles of tissue with a white border of one stored tile."""
    side = round(num_tiles**0.5 * tile_px / STORED_PX)
    index = np.arange(side + 2)
    inner = (index > 0) & (index <= side)
    is_tissue = (inner[:, None] & inner).ravel().tolist()
    pixels = tissue(STORED_PX), np.full((STORED_PX,) * 2 + (3,), 245, np.uint8)
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for shrink in SHRINKS:
            edge = STORED_PX // shrink
            stained, white = (_encoded(tile, edge) for tile in pixels)
            file.write(
                (stained if inside else white for inside in is_tissue),
                shape=(len(index) * edge, len(index) * edge, 3),
                dtype=np.uint8,
                tile=(edge, edge),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                subfiletype=int(shrink > 1),
                resolution=(10_000 / MPP / shrink,) * 2,
                resolutionunit="CENTIMETER",
            )


def _encoded(tile: np.ndarray, edge: int) -> bytes:
    smaller = np.asarray(Image.fromarray(tile).resize((edge, edge), Image.Resampling.BOX))
    return encode_tile(smaller, "jpeg", _JPEG_QUALITY)
