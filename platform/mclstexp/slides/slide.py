"""One interface over whole-slide pyramids (OpenSlide) and plain JPEG, PNG and TIFF images.

A pyramid is read region by region from its best level; a plain image has no regions and is decoded whole, which
`MAX_PLAIN_PX` bounds. Colours are used as stored: embedded ICC profiles are not applied.
"""

import errno
import gzip
import math
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol, Self, cast

import numpy as np
import openslide
from PIL import Image, UnidentifiedImageError

from mclstexp.errors import SourceError, StorageError
from mclstexp.slides.resolution import stated_mpp

MAX_PLAIN_PX = 2**30
"""Most pixels of a plain image."""
PLAIN_BYTES_PER_PX = 4
"""Memory of a decoded plain image."""
_MAX_SLIDE_EDGE_PX = 2**22
_MAX_REGION_PX = 2048  # edge of one read from a level
_SAME_DOWNSAMPLE = 1.02  # ratio up to which downsamples count as equal
_OPAQUE = 255
_ORIENTATION_TAG = 0x0112
_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "F")
_GZIP_MAGIC = b"\x1f\x8b"
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

    def read(self, level: int, left: int, top: int, width: int, height: int) -> tuple[Image.Image, float, float]:
        """Returns a region in the level's pixels (RGB, or RGBA if some may be missing), and its exact left and top."""

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
        image, complete = self._read_box(left, top, scale, size_px, size_px)
        return np.asarray(image) if complete else None

    def thumbnail(self, scale: float) -> np.ndarray:
        """Returns the slide shrunk by `scale`, uint8 (height, width, 3), white where it has no pixels.

        Raises:
            SourceError: the file is damaged.
        """
        width, height = (max(1, int(edge / scale)) for edge in (self.width, self.height))
        return np.asarray(self._read_box(0.0, 0.0, scale, width, height)[0])

    def _read_box(self, left: float, top: float, scale: float, width: int, height: int) -> tuple[Image.Image, bool]:
        """Returns width x height pixels of edge `scale`, read in bounded parts, and whether no pixel is missing."""
        level = max(i for i, down in enumerate(self._levels.downsamples) if i == 0 or down <= scale * _SAME_DOWNSAMPLE)
        step = max(1, int(_MAX_REGION_PX * self._levels.downsamples[level] / scale))
        whole, complete = Image.new("RGB", (width, height)), True
        for y in range(0, height, step):
            for x in range(0, width, step):
                size = min(step, width - x), min(step, height - y)
                part, part_complete = self._read_part(level, left + x * scale, top + y * scale, scale, size)
                whole.paste(part, (x, y))
                complete &= part_complete
        return whole, complete

    def _read_part(
        self, level: int, left: float, top: float, scale: float, size: tuple[int, int]
    ) -> tuple[Image.Image, bool]:
        down = self._levels.downsamples[level]
        box = np.array([left, top, left + size[0] * scale, top + size[1] * scale]) / down
        exact = scale == down and np.array_equal(box, np.round(box))
        margin = 0 if exact else math.ceil(scale / down) + 1
        edges = np.array(self._levels.dimensions[level])
        first = np.clip(np.floor(box[:2]).astype(int) - margin, 0, edges)
        last = np.clip(np.ceil(box[2:]).astype(int) + margin, first + 1, edges)
        with _image_errors(self._name):
            region, *origin = self._levels.read(level, *first.tolist(), *(last - first).tolist())
        image, complete = _on_white(region)
        if not exact:
            box = np.clip(box - [*origin, *origin], 0, [*image.size, *image.size])
            image = image.resize(size, Image.Resampling.BILINEAR, box=tuple(box.tolist()))
        return image, complete


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
        pyramid = openslide.OpenSlide.detect_format(path) is not None
        return Slide(_Pyramid(str(path)) if pyramid else _Plain(str(path)), name)


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


def _on_white(region: Image.Image) -> tuple[Image.Image, bool]:
    """Returns a region as RGB, and whether no pixel is missing (OpenSlide leaves holes transparent)."""
    if region.mode == "RGB" or _is_opaque(region):
        return region.convert("RGB"), True
    white = Image.new("RGBA", region.size, "white")
    return Image.alpha_composite(white, region).convert("RGB"), False


class _Pyramid:
    """Levels of a file that OpenSlide reads."""

    reads_regions = True

    def __init__(self, path: str) -> None:
        self._slide = openslide.OpenSlide(path)
        self.dimensions = self._slide.level_dimensions
        self.downsamples = self._slide.level_downsamples
        if max(self.dimensions[0]) > _MAX_SLIDE_EDGE_PX:
            raise SourceError(
                f"it claims {self.dimensions[0]} px; at most {_MAX_SLIDE_EDGE_PX} are allowed along an edge"
            )
        properties = self._slide.properties
        names = (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
        self.mpp = stated_mpp([float(properties[name]) for name in names if name in properties])
        self.scanned_from = scanned_from(properties)

    def read(self, level: int, left: int, top: int, width: int, height: int) -> tuple[Image.Image, float, float]:
        down = self.downsamples[level]
        x, y = round(left * down), round(top * down)
        return self._slide.read_region((x, y), level, (width, height)), x / down, y / down

    def close(self) -> None:
        self._slide.close()


def scanned_from(properties: Mapping[str, str]) -> tuple[float, float]:
    """Returns x and y of the scanned region's corner in level-0 pixels, from OpenSlide's properties."""
    names = (openslide.PROPERTY_NAME_BOUNDS_X, openslide.PROPERTY_NAME_BOUNDS_Y)
    x, y = (float(properties.get(name, 0)) for name in names)
    return x, y


class _Plain:
    """The one level of a JPEG, PNG or TIFF image, decoded at the first read; gzip may have compressed JPEG and PNG."""

    downsamples: tuple[float, ...] = (1.0,)
    reads_regions = False
    scanned_from = (0.0, 0.0)

    def __init__(self, path: str) -> None:
        self._unpacked = open_unpacked(path) if is_packed(path) else None
        with _strict_pillow():
            self._image = _open_image(self._unpacked or path)
            self.dimensions = (self._image.size,)
            if math.prod(self._image.size) > MAX_PLAIN_PX:
                raise SourceError(
                    f"it has {self._image.width} x {self._image.height} px; at most {MAX_PLAIN_PX} are allowed in all: "
                    "convert it to a tiled, pyramidal TIFF"
                )
            _require_plain(self._image)
            dpi = [float(value) for value in self._image.info.get("dpi", ()) if value > 0]
        self.mpp = stated_mpp([25400.0 / value for value in dpi])
        self._decoded = False

    def read(self, level: int, left: int, top: int, width: int, height: int) -> tuple[Image.Image, float, float]:
        if not self._decoded:
            with _strict_pillow():
                self._image = _as_rgb(self._image)
            self._decoded = True
        return self._image.crop((left, top, left + width, top + height)), left, top

    def close(self) -> None:
        self._image.close()
        if self._unpacked:
            self._unpacked.close()


def _open_image(file: IO[bytes] | str) -> Image.Image:
    """Opens a plain image, or an unpacked one, which cannot be a TIFF: Pillow needs its file."""
    if isinstance(file, str):
        return Image.open(file, formats=["JPEG", "PNG", "TIFF"])
    try:
        return Image.open(file, formats=["JPEG", "PNG"])
    except UnidentifiedImageError:
        raise SourceError("it is compressed by gzip and contains no JPEG or PNG; decompress it with gunzip") from None


def _require_plain(image: Image.Image) -> None:
    if getattr(image, "n_frames", 1) > 1:
        raise SourceError("it holds several images and OpenSlide does not read it as a pyramid; store one image")
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    if orientation not in (0, 1):
        raise SourceError(
            f"its EXIF orientation is {orientation}, which makes spot positions ambiguous; store it upright (1)"
        )
    if image.mode not in ("RGB", "RGBA", "P", "YCbCr"):
        grey = " (greyscale)" if image.mode in _GREY_MODES else ""
        raise SourceError(
            f"its colour mode is {image.mode}{grey}; allowed is 8-bit colour (RGB, opaque RGBA, palette): give the "
            "colour image of the H&E stain"
        )


def _as_rgb(image: Image.Image) -> Image.Image:
    """Decodes an image; a palette becomes RGB, an opaque alpha channel is dropped."""
    image.load()
    if image.mode == "RGBA" or "transparency" in image.info:
        image = image.convert("RGBA")
        if not _is_opaque(image):
            raise SourceError("it has transparent pixels, which are neither tissue nor background; store it opaque")
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_opaque(image: Image.Image) -> bool:
    return image.getchannel("A").getextrema() == (_OPAQUE, _OPAQUE)


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Makes Pillow's warnings errors, and its limit of pixels `MAX_PLAIN_PX`."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = MAX_PLAIN_PX
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def is_packed(path: str | Path) -> bool:
    """Returns whether gzip compressed a local file, from its first bytes, whatever its name."""
    with open(path, "rb") as file:
        return file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC


def open_unpacked(path: str | Path) -> IO[bytes]:
    """Opens a local file for reading and decompresses gzip on the way."""
    return cast(IO[bytes], gzip.open(path)) if is_packed(path) else open(path, "rb")
