"""One level of a slide shrunk by a whole factor, in blocks that are made when first needed.

The wide views of neighbouring spots overlap many times, and a plain image or a pyramid of few levels has no level as
coarse as they are. Here every pixel is read and shrunk once; the price is the memory of the blocks that are kept.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image

BACKGROUND = (240, 240, 240)
"""Colour of what a wide view shows beyond the image and of missing pixels: that of bright glass."""
_BLOCK_PX = 256  # edge of a block
_KEPT_BLOCKS = 512  # 100 MB

ReadRegion = Callable[[int, int, int, int], Image.Image]
"""Returns a level's region by left, top, width and height, RGB."""


class Blocks:
    """A shrunken level, endless in all directions: background lies around it."""

    def __init__(self, read: ReadRegion, size: tuple[int, int], shrink: int) -> None:
        """Takes a level's reader, its width and height, and the factor by which it is shrunk."""
        self._read, self._size, self._shrink = read, size, shrink
        self._block = lru_cache(_KEPT_BLOCKS)(self._shrunken)

    def region(self, left: int, top: int, width: int, height: int) -> Image.Image:
        """Returns a region in shrunken pixels, RGB; it may extend beyond the level."""
        whole = Image.new("RGB", (width, height), BACKGROUND)
        for row in range(top // _BLOCK_PX, -(-(top + height) // _BLOCK_PX)):
            for column in range(left // _BLOCK_PX, -(-(left + width) // _BLOCK_PX)):
                block = self._block(column, row)
                if block is not None:
                    whole.paste(block, (column * _BLOCK_PX - left, row * _BLOCK_PX - top))
        return whole

    def _shrunken(self, column: int, row: int) -> Image.Image | None:
        """Returns a block, or None if no pixel of it is on the level."""
        edge = _BLOCK_PX * self._shrink
        corner = np.array([column * edge, row * edge])
        size = np.minimum(edge, self._size - corner)
        if (corner < 0).any() or (size <= 0).any():
            return None
        region = self._read(*corner.tolist(), *size.tolist())
        if region.size != (edge, edge):  # the edge's pixels are mixed with background by their share
            part, region = region, Image.new("RGB", (edge, edge), BACKGROUND)
            region.paste(part)
        return region.reduce(self._shrink)
