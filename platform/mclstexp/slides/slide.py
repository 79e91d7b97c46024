"""One interface over whole-slide pyramids (OpenSlide, tifffile) and plain JPEG, PNG, JPEG 2000 and TIFF images.

A pyramid is read region by region from its best level; a plain image has no regions and is decoded whole, which
`MAX_PLAIN_PX` bounds. Colours are used as stored: embedded ICC profiles are not applied.
"""

import errno
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import openslide
from PIL import Image

from mclstexp.errors import SourceError, StorageError
from mclstexp.slides.blocks import BACKGROUND, Blocks
from mclstexp.slides.plain import Plain
from mclstexp.slides.pyramid import Pyramid
from mclstexp.slides.tiff import APERIO, GENERIC, is_tiff, open_tiff

_MAX_REGION_PX = 2048  # edge of one read from a level
_SAME_DOWNSAMPLE = 1.02  # ratio up to which downsamples count as equal
_MIN_RESAMPLED = 2  # stored or shrunken pixels along a pixel of a wide view: with fewer, the way they were shrunk shows
_MAX_SHRINK = 8  # bounds one read from a level
_WHITE = (255, 255, 255)
_MIN_ALPHA = 250  # of a pixel that is there: OpenSlide's seams between storage tiles come out with 253 or 254
_TRANSIENT = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EACCES, errno.EMFILE, errno.ENOMEM)
"""Faults of the file system or the machine; Pillow's own errors have no number."""
_FILE_FAULTS = (OSError, EOFError, SyntaxError, ValueError, Warning)


class _Levels(Protocol):
    """Pixels at several resolutions; level 0 is the finest."""

    @property
    def reads_regions(self) -> bool:
        """Whether a region can be read without decoding the whole image."""

    @property
    def downsamples(self) -> tuple[float, ...]:
        """Edge of each level's pixels in level-0 pixels."""

    @property
    def dimensions(self) -> tuple[tuple[int, int], ...]:
        """Width and height of each level."""

    @property
    def mpp(self) -> float | None:
        """Micrometres per level-0 pixel, if the file states it."""

    @property
    def scanned_from(self) -> tuple[float, float]:
        """x and y of the scanned region's corner."""

    def read(self, level: int, left: int, top: int, width: int, height: int) -> tuple[np.ndarray, float, float]:
        """Returns a region in the level's pixels, and its exact left and top.

        uint8 (height, width, 3), or (height, width, 4) with alpha if some pixels may be missing.
        """

    def close(self) -> None:
        """Closes the file."""


class Slide:
    """An open slide. Coordinates are level-0 pixels, x to the right and y down; use it as a context manager."""

    def __init__(self, levels: _Levels, name: str) -> None:
        self._levels = levels
        self._name = name
        self.width, self.height = levels.dimensions[0]
        self.mpp = levels.mpp
        """Micrometres per level-0 pixel as the file states it, or None."""
        self.reads_regions = levels.reads_regions
        """Whether a region can be read without decoding the whole image."""
        self.scanned_from = levels.scanned_from
        """x and y of the scanned region's corner, where some viewers place their origin; (0, 0) in most files."""
        self._blocks: dict[tuple[int, int], Blocks] = {}
        """Shrunken levels, by level and factor."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._levels.close()

    def read_tile(self, left: float, top: float, size_px: int, scale: float) -> np.ndarray | None:
        """Returns the tile with its corner at (left, top) that covers size_px * scale level-0 pixels along each edge.

        With scale 1 and whole coordinates it is the exact crop; otherwise it is resampled from the best level by
        area-weighted linear interpolation. uint8 (size_px, size_px, 3); None if the slide has no pixels there.

        Raises:
            SourceError: the file is damaged there.
        """
        pixels, complete = self._read_box(left, top, scale, size_px, size_px)
        return pixels if complete else None

    def read_wide(self, left: float, top: float, size_px: int, scale: float) -> np.ndarray:
        """Returns a coarse tile, uint8 (size_px, size_px, 3), as `read_tile`, which may extend beyond the image.

        There, and where pixels are missing, it shows `BACKGROUND`. It is resampled from at least two pixels along a
        pixel, of the coarsest level that has them, shrunk once in blocks that all wide tiles of the slide share.

        Raises:
            SourceError: the file is damaged there.
        """
        level = self._level(scale / _MIN_RESAMPLED)
        down = self._levels.downsamples[level]
        shrink = min(_MAX_SHRINK, max(1, int(scale / down / _MIN_RESAMPLED)))
        if (level, shrink) not in self._blocks:
            read = partial(self._read_region, level)
            self._blocks[level, shrink] = Blocks(read, self._levels.dimensions[level], shrink)
        pixel = down * shrink
        box = np.array([left, top, left + size_px * scale, top + size_px * scale]) / pixel
        margin = math.ceil(scale / pixel) + 1
        first = np.floor(box[:2]).astype(int) - margin
        last = np.ceil(box[2:]).astype(int) + margin
        region = self._blocks[level, shrink].region(*first.tolist(), *(last - first).tolist())
        box -= [*first, *first]
        return np.asarray(region.resize((size_px, size_px), Image.Resampling.BILINEAR, box=tuple(box.tolist())))

    def thumbnail(self, scale: float) -> np.ndarray:
        """Returns the slide shrunk by `scale`, uint8 (height, width, 3), white where it has no pixels.

        Raises:
            SourceError: the file is damaged.
        """
        width, height = (max(1, int(edge / scale)) for edge in (self.width, self.height))
        return self._read_box(0.0, 0.0, scale, width, height)[0]

    def _level(self, scale: float) -> int:
        """Returns the coarsest level that is not coarser than `scale`."""
        return max(i for i, down in enumerate(self._levels.downsamples) if i == 0 or down <= scale * _SAME_DOWNSAMPLE)

    def _read_region(self, level: int, left: int, top: int, width: int, height: int) -> Image.Image:
        """Returns a region within a level as RGB, with background where pixels are missing."""
        with _image_errors(self._name):
            region = self._levels.read(level, left, top, width, height)[0]
        return Image.fromarray(_opaque(region, BACKGROUND)[0])

    def _read_box(self, left: float, top: float, scale: float, width: int, height: int) -> tuple[np.ndarray, bool]:
        """Returns pixels of edge `scale`, uint8 (height, width, 3), and whether none is missing; bounds each read."""
        level = self._level(scale)
        step = max(1, int(_MAX_REGION_PX * self._levels.downsamples[level] / scale))
        if max(width, height) <= step:
            return self._read_part(level, left, top, scale, (width, height))
        whole, complete = np.empty((height, width, 3), np.uint8), True
        for y in range(0, height, step):
            for x in range(0, width, step):
                size = min(step, width - x), min(step, height - y)
                part, part_complete = self._read_part(level, left + x * scale, top + y * scale, scale, size)
                whole[y : y + size[1], x : x + size[0]] = part
                complete &= part_complete
        return whole, complete

    def _read_part(
        self, level: int, left: float, top: float, scale: float, size: tuple[int, int]
    ) -> tuple[np.ndarray, bool]:
        down = self._levels.downsamples[level]
        box = [edge / down for edge in (left, top, left + size[0] * scale, top + size[1] * scale)]
        exact = scale == down and all(edge == round(edge) for edge in box)
        margin = 0 if exact else math.ceil(scale / down) + 1
        level_width, level_height = self._levels.dimensions[level]
        x, width = _bounded(box[0], box[2], margin, level_width)
        y, height = _bounded(box[1], box[3], margin, level_height)
        with _image_errors(self._name):
            region, *origin = self._levels.read(level, x, y, width, height)
        pixels, complete = _opaque(region, _WHITE)
        if not exact:
            image = Image.fromarray(pixels)
            within = np.clip(np.subtract(box, [*origin, *origin]), 0, [*image.size, *image.size])
            pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=tuple(within.tolist())))
        return pixels, complete


def open_slide(path: str | Path) -> Slide:
    """Opens a local slide or image (JPEG and PNG also compressed by gzip); only its header is read.

    Raises:
        SourceError: it is not an image, or is damaged, too large, of an unsupported kind or contradictory.
        FileNotFoundError, StorageError: it cannot be read at the moment.
    """
    name = Path(path).name
    with _image_errors(name):
        with open(path, "rb") as file:  # OpenSlide reports a lost disk as a damaged file
            file.read(1)
        return Slide(_open_levels(str(path)), name)


def _open_levels(path: str) -> _Levels:
    detected = openslide.OpenSlide.detect_format(path)
    if is_tiff(path) and detected in (None, APERIO, GENERIC):
        return open_tiff(path, detected)
    return Plain(path) if detected is None else Pyramid(path)


@contextmanager
def _image_errors(name: str) -> Iterator[None]:
    """Turns what libraries raise into errors that name the image and separate its faults from the machine's."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(name) from None
    except (openslide.OpenSlideError, Image.DecompressionBombError, zlib.error, *_FILE_FAULTS) as error:
        if getattr(error, "errno", None) in _TRANSIENT:
            raise StorageError(f"image {name} cannot be read now: {error}") from error
        raise SourceError(f"image {name} cannot be read, it is damaged or not a slide: {error}") from error
    except SourceError as error:
        raise SourceError(f"image {name}: {error}") from None


def _bounded(start: float, end: float, margin: int, length: int) -> tuple[int, int]:
    """Returns the first and the number of a level's pixels along an axis that a box touches, with a margin."""
    first = min(max(math.floor(start) - margin, 0), length)
    last = min(max(math.ceil(end) + margin, first + 1), length)
    return first, last - first


def _opaque(region: np.ndarray, behind: tuple[int, int, int]) -> tuple[np.ndarray, bool]:
    """Returns a region as RGB over a colour, and whether no pixel is missing (OpenSlide leaves holes transparent)."""
    if region.shape[2] == 3 or region[..., 3].min() >= _MIN_ALPHA:
        return np.ascontiguousarray(region[..., :3]), True
    image = Image.fromarray(region)
    backdrop = Image.new("RGBA", image.size, behind)
    return np.asarray(Image.alpha_composite(backdrop, image).convert("RGB")), False
