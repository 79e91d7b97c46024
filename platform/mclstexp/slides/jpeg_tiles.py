"""Pyramids whose storage tiles are JPEG: each is decoded once, and regions are cut from them as OpenSlide shows them.

OpenSlide paints each region from its parts, which costs more than decoding. Here the last decoded storage tiles are
kept, because neighbouring tiles share them, in memory that is used again, because fresh memory costs nearly as much as
decoding. Only what is sound and usual is read so; OpenSlide reads every other region, so that it alone decides what an
odd or damaged file shows. The price is up to 64 MiB for each open slide.
"""

import math
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg
from tifffile import COMPRESSION, PHOTOMETRIC, PLANARCONFIG, TiffPage

from mclstexp.slides.pyramid import Pyramid

_CACHE_BYTES = 2**26
_CHANNELS = 3
_MAX_TILE_PX = _CACHE_BYTES // _CHANNELS // 4  # so that the four around a corner are kept
_START, _END = b"\xff\xd8", b"\xff\xd9"
_JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
_ADOBE_RGB = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"
_COLOURS = {PHOTOMETRIC.YCBCR: ("YCbCr", _JFIF), PHOTOMETRIC.RGB: ("RGB", _ADOBE_RGB)}
"""By what the TIFF states: the colours in its storage tiles, and the marker that states them in a JPEG."""


@dataclass(frozen=True)
class JpegLevel:
    """One level of a pyramid, in storage tiles of JPEG."""

    width: int
    height: int
    tile: tuple[int, int]
    """Width and height of a storage tile."""
    offsets: np.ndarray
    """Where each begins in the file, int64 (n,), row by row."""
    num_bytes: np.ndarray
    """Its length, int64 (n,)."""
    start: bytes
    """What makes one a JPEG of its own, in the place of its first two bytes: colours, and tables common to all."""
    colours: str
    """Of its pixels: YCbCr or RGB."""

    @property
    def num_columns(self) -> int:
        """Storage tiles side by side."""
        return -(-self.width // self.tile[0])


class JpegTiles:
    """Levels of a file that OpenSlide reads, in storage tiles of JPEG; its regions are `Pyramid`'s.

    They are the same, but for the seams of storage tiles (within 2 grey levels) where a region begins between a coarser
    level's pixels. Only at the end of a coarser level, where OpenSlide's are half transparent, these are not.
    """

    reads_regions = True

    def __init__(self, path: str, slide: Pyramid, levels: Sequence[JpegLevel]) -> None:
        self._slide, self._levels = slide, levels
        self.dimensions, self.downsamples = slide.dimensions, slide.downsamples
        self.mpp, self.scanned_from = slide.mpp, slide.scanned_from
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
        largest = max(math.prod(level.tile) for level in levels) * _CHANNELS
        self._spare = list(np.empty((_CACHE_BYTES // largest, largest), np.uint8))  # as one block, which comes fast
        self._kept: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        """Storage tiles by level and index, uint8 (largest,), the last used one last."""

    def read(self, level: int, left: int, top: int, width: int, height: int) -> tuple[np.ndarray, float, float]:
        """Returns a region, with alpha if some of it may be missing, and its exact left and top."""
        x, y = self._origin(level, left, top, width, height)
        first_x, first_y = math.floor(x), math.floor(y)
        is_between = (x, y) != (first_x, first_y)
        region = self._region(level, first_x, first_y, width + is_between, height + is_between)
        if region is None:
            return self._slide.read(level, left, top, width, height)
        return _blended(region, x - first_x, y - first_y) if is_between else region, x, y

    def close(self) -> None:
        """Closes the file."""
        self._kept.clear()
        self._spare.clear()
        self._file.close()
        self._slide.close()

    def _origin(self, level: int, left: int, top: int, width: int, height: int) -> tuple[float, float]:
        """Returns where a region begins, in the level's pixels: as OpenSlide's at a whole pixel of level 0.

        At the level's end, where OpenSlide's fades into nothing, at a whole pixel of its own.
        """
        down, (level_width, level_height) = self.downsamples[level], self.dimensions[level]
        x, y = round(left * down) / down, round(top * down) / down
        return (x, y) if max(x, left) + width < level_width and max(y, top) + height < level_height else (left, top)

    def _region(self, level: int, left: int, top: int, width: int, height: int) -> np.ndarray | None:
        """Returns a region, uint8 (height, width, 3), or None if it is not all on sound storage tiles."""
        stored = self._levels[level]
        tile_width, tile_height = stored.tile
        if min(left, top) < 0 or left + width > stored.width or top + height > stored.height:
            return None
        region = np.empty((height, width, _CHANNELS), np.uint8)
        for row in range(top // tile_height, -(-(top + height) // tile_height)):
            for column in range(left // tile_width, -(-(left + width) // tile_width)):
                tile = self._tile(level, row * stored.num_columns + column)
                if tile is None:
                    return None
                x, y = column * tile_width - left, row * tile_height - top
                to = region[max(y, 0) : y + tile_height, max(x, 0) : x + tile_width]
                to[:] = tile[max(-y, 0) :, max(-x, 0) :][: to.shape[0], : to.shape[1]]
        return region

    def _tile(self, level: int, index: int) -> np.ndarray | None:
        """Returns a storage tile, uint8 (height, width, 3), or None if it is missing, damaged or of another kind.

        It is overwritten later.
        """
        stored, memory = self._levels[level], self._kept.pop((level, index), None)
        is_decoded = memory is not None
        if memory is None:
            memory = self._spare.pop() if self._spare else self._kept.popitem(last=False)[1]
        width, height = stored.tile
        tile = memory[: height * width * _CHANNELS].reshape(height, width, _CHANNELS)
        if not is_decoded and not self._decode(stored, index, tile):
            self._spare.append(memory)
            return None
        self._kept[level, index] = memory
        return tile

    def _decode(self, stored: JpegLevel, index: int, to: np.ndarray) -> bool:
        """Decodes a storage tile into an array; returns whether it could."""
        data = os.pread(self._file.fileno(), int(stored.num_bytes[index]), int(stored.offsets[index]))
        if not data.startswith(_START):
            return False
        jpeg = stored.start + data[len(_START) :]
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(jpeg)
            if (width, height) != stored.tile or colours != stored.colours:
                return False
            simplejpeg.decode_jpeg(jpeg, "RGB", buffer=to)
        except ValueError:
            return False
        return True


def _blended(region: np.ndarray, x: float, y: float) -> np.ndarray:
    """Returns the pixels at an offset of less than one pixel, uint8 (height - 1, width - 1, 3), as OpenSlide's.

    It interpolates between neighbours, and maps [0, 1] to 0 .. 255 by the whole part of 256 times the value.
    """
    pixels = region.astype(np.float32)
    pixels = pixels[:, :-1] + np.float32(x) * (pixels[:, 1:] - pixels[:, :-1])
    pixels = pixels[:-1] + np.float32(y) * (pixels[1:] - pixels[:-1])
    pixels *= np.float32(256 / 255)
    return np.minimum(pixels, np.float32(255)).astype(np.uint8)


def jpeg_levels(sizes: Sequence[tuple[int, int]], pages: Sequence[TiffPage]) -> list[JpegLevel] | None:
    """Returns the levels of widths and heights if all of them are in storage tiles of JPEG with 8-bit colours.

    None if one is not, or if it is not clear which page it is.
    """
    levels = []
    for size in sizes:
        fitting = [page for page in pages if page.is_tiled and (page.imagewidth, page.imagelength) == size]
        if len(fitting) != 1 or not _is_usual(fitting[0]):
            return None
        levels.append(_level(fitting[0]))
    return levels


def _is_usual(page: TiffPage) -> bool:
    tables, num_bytes = page.jpegtables, page.parent.filehandle.size
    return (
        page.compression == COMPRESSION.JPEG
        and page.photometric in _COLOURS
        and page.planarconfig == PLANARCONFIG.CONTIG
        and (page.samplesperpixel, page.bitspersample) == (_CHANNELS, 8)
        and page.tilewidth * page.tilelength <= _MAX_TILE_PX
        and len(page.dataoffsets) == len(page.databytecounts) == math.prod(page.chunked)
        and min(page.databytecounts) > 0  # Aperio's missing tiles show in coarser levels too
        and max(map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))) <= num_bytes
        and (tables is None or (tables.startswith(_START) and tables.endswith(_END)))
    )


def _level(page: TiffPage) -> JpegLevel:
    colours, marker = _COLOURS[PHOTOMETRIC(page.photometric)]
    tables = page.jpegtables or _START + _END
    return JpegLevel(
        width=page.imagewidth,
        height=page.imagelength,
        tile=(page.tilewidth, page.tilelength),
        offsets=np.array(page.dataoffsets, np.int64),
        num_bytes=np.array(page.databytecounts, np.int64),
        start=_START + marker + tables[len(_START) : -len(_END)],
        colours=colours,
    )
