"""Levels of a TIFF that tifffile and imagecodecs decode, storage tile by storage tile.

The last decoded storage tiles are kept, because neighbouring tiles share them; an image in strips is kept whole, as a
plain image is.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from tifffile import TiffFrame, TiffPage, TiffPageSeries

from mclstexp.errors import SourceError

TIFFFILE_FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, RuntimeError, TypeError),
)
"""What tifffile and imagecodecs raise on damaged files, besides ValueError and OSError."""
_CACHE_BYTES = 2**26
_MAX_ROUNDING_PX = 2  # of a level's edges
_MAX_CHANNELS, _OPAQUE = 4, 255


@dataclass(frozen=True)
class Plane:
    """Storage tiles (or strips) of a level in one page: those with all colours, or with one."""

    page: TiffPage | TiffFrame
    first: int
    """Index of the first of them in the page."""


@dataclass(frozen=True)
class PlaneLevel:
    """One level of a TIFF."""

    width: int
    height: int
    tile: tuple[int, int]
    """Width and height of a storage tile or strip."""
    is_tiled: bool
    decode: Callable[..., Any]
    """Decodes one of them; tifffile makes it while the file is open."""
    planes: tuple[Plane, ...]
    """One with all colours, or one for each colour."""

    @property
    def num_columns(self) -> int:
        """Storage tiles side by side."""
        return -(-self.width // self.tile[0])


def plane_levels(series: TiffPageSeries, order: tuple[int, ...]) -> list[PlaneLevel]:
    """Returns the levels of a colour image, without those that are no shrunken copies of the one before.

    Args:
        series: the image; its axes are YXS, SYX, or YX of three pages.
        order: where red, green and blue are among the pages.
    """
    kept = [_level(series, order)]
    for copy in series.levels[1:]:
        size = copy.keyframe.imagewidth, copy.keyframe.imagelength
        same = copy.axes == series.axes and copy.keyframe.photometric == series.keyframe.photometric
        if same and copy.dtype == series.dtype and is_shrunken(size, (kept[-1].width, kept[-1].height)):
            kept.append(_level(copy, order))
    return kept


def is_shrunken(size: tuple[int, int], of: tuple[int, int]) -> bool:
    """Returns whether an image of a width and height may be a smaller copy of another one: it has its aspect."""
    (width, height), (full_width, full_height) = size, of
    expected = width * full_height / full_width, height * full_width / full_height
    off = min(abs(height - expected[0]), abs(width - expected[1]))
    return width < full_width and height < full_height and off <= _MAX_ROUNDING_PX


class TiffLevels:
    """Levels of a TIFF that tifffile decodes."""

    scanned_from = (0.0, 0.0)

    def __init__(self, path: str, levels: list[PlaneLevel], mpp: float | None) -> None:
        self._levels, self.mpp = levels, mpp
        self.dimensions = tuple((level.width, level.height) for level in levels)
        width, height = self.dimensions[0]
        self.downsamples = tuple((width / w + height / h) / 2 for w, h in self.dimensions)
        self.reads_regions = all(level.is_tiled for level in levels)
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
        largest = max(math.prod(level.tile) for level in levels) * _MAX_CHANNELS
        self._tile = lru_cache(max(1, _CACHE_BYTES // largest) if self.reads_regions else None)(self._decoded)

    def read(self, level: int, left: int, top: int, width: int, height: int) -> tuple[np.ndarray, float, float]:
        """Returns a region with alpha, transparent where the file has no pixels, and its left and top."""
        (tile_width, tile_height), region = self._levels[level].tile, np.zeros((height, width, 4), np.uint8)
        for row in range(top // tile_height, -(-(top + height) // tile_height)):
            for column in range(left // tile_width, -(-(left + width) // tile_width)):
                tile = self._tile(level, row, column)
                if tile is not None:
                    _paste(tile, region, column * tile_width - left, row * tile_height - top)
        return region, left, top

    def close(self) -> None:
        """Closes the file."""
        self._tile.cache_clear()
        self._file.close()

    def _decoded(self, level: int, row: int, column: int) -> np.ndarray | None:
        """Returns a storage tile, uint8 (height, width, 3 or 4), or None if the file has none there."""
        stored = self._levels[level]
        index = row * stored.num_columns + column
        parts = [self._part(stored, plane.page, plane.first + index) for plane in stored.planes]
        found = [part for part in parts if part is not None]
        return np.concatenate(found, axis=2) if len(found) == len(parts) else None

    def _part(self, level: PlaneLevel, page: TiffPage | TiffFrame, index: int) -> np.ndarray | None:
        try:
            offset, num_bytes = page.dataoffsets[index], page.databytecounts[index]
            if not offset or not num_bytes:
                return None
            data = os.pread(self._file.fileno(), num_bytes, offset)
            pixels, _, (_, height, width, _) = level.decode(data, index, jpegtables=page.jpegtables)
        except TIFFFILE_FAULTS as error:
            raise SourceError(f"its storage tile {index} is damaged: {error}; copy or export it again") from None
        return None if pixels is None else np.asarray(pixels)[0, :height, :width]


def _level(series: TiffPageSeries, order: tuple[int, ...]) -> PlaneLevel:
    page = series.keyframe
    width, height = page.imagewidth, page.imagelength
    tile = (page.tilewidth, page.tilelength) if page.is_tiled else (width, min(page.rowsperstrip, height))
    num = -(-width // tile[0]) * -(-height // tile[1])
    if "S" not in series.axes:
        pages = [colour for colour in series.pages if colour is not None]
        planes = [Plane(pages[index], 0) for index in order]
    elif series.axes.startswith("S"):
        planes = [Plane(page, index * num) for index in range(series.shape[0])]
    else:
        planes = [Plane(page, 0)]
    return PlaneLevel(width, height, tile, page.is_tiled, page.decode, tuple(planes))


def _paste(tile: np.ndarray, region: np.ndarray, left: int, top: int) -> None:
    """Puts what overlaps of a storage tile into a region, uint8 (height, width, 4), at a place that may be outside."""
    to = region[max(top, 0) : top + tile.shape[0], max(left, 0) : left + tile.shape[1]]
    part = tile[max(-top, 0) :, max(-left, 0) :][: to.shape[0], : to.shape[1]]
    to[..., :3] = part[..., :3]
    to[..., 3] = part[..., 3] if part.shape[2] == _MAX_CHANNELS else _OPAQUE
