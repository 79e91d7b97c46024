"""Plain images, which have no regions and are decoded whole; gzip may have compressed a JPEG or PNG."""

import gzip
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from mclstexp.errors import SourceError
from mclstexp.slides.resolution import stated_mpp

MAX_PLAIN_PX = 2**30
"""Most pixels of a plain image."""
PLAIN_BYTES_PER_PX = 4
"""Memory of a decoded plain image."""
_OPAQUE = 255
_ORIENTATION_TAG = 0x0112
_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "F")
_GZIP_MAGIC = b"\x1f\x8b"
_GIT_LFS = b"version https://git-lfs"


class Plain:
    """The one level of a JPEG, PNG, JPEG 2000 or TIFF image, decoded at the first read."""

    downsamples: tuple[float, ...] = (1.0,)
    reads_regions = False
    scanned_from = (0.0, 0.0)

    def __init__(self, path: str, mpp: float | None = None) -> None:
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
        self.mpp = stated_mpp([25400.0 / value for value in dpi]) if mpp is None else mpp
        self._decoded = False

    def read(self, level: int, left: int, top: int, width: int, height: int) -> tuple[np.ndarray, float, float]:
        """Returns a region, and its left and top."""
        if not self._decoded:
            with _strict_pillow():
                self._image = _as_rgb(self._image)
            self._decoded = True
        return np.asarray(self._image.crop((left, top, left + width, top + height))), left, top

    def close(self) -> None:
        """Closes the file."""
        self._image.close()
        if self._unpacked:
            self._unpacked.close()


def _open_image(file: IO[bytes] | str) -> Image.Image:
    """Opens a plain image, or an unpacked one, which cannot be a TIFF: Pillow needs its file."""
    if isinstance(file, str):
        try:
            return Image.open(file, formats=["JPEG", "PNG", "TIFF", "JPEG2000"])
        except UnidentifiedImageError:
            raise SourceError(_unknown_kind(file)) from None
    try:
        return Image.open(file, formats=["JPEG", "PNG"])
    except UnidentifiedImageError:
        raise SourceError("it is compressed by gzip and contains no JPEG or PNG; decompress it with gunzip") from None


def _unknown_kind(path: str) -> str:
    """Returns what is wrong with a file that no library knows as an image."""
    with open(path, "rb") as file:
        start = file.read(len(_GIT_LFS))
    allowed = "give a slide that OpenSlide reads, or a TIFF, OME-TIFF, JPEG, PNG or JPEG 2000 image"
    if start == _GIT_LFS:
        return "it is a pointer of Git LFS instead of the image: fetch the image with git lfs pull"
    return f"it {'cannot be read, it is damaged or of another kind' if start else 'is empty'}: {allowed}"


def _require_plain(image: Image.Image) -> None:
    if getattr(image, "n_frames", 1) > 1:
        raise SourceError("it holds several images: store each in a file of its own")
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    if orientation not in (0, 1):
        raise SourceError(
            f"its EXIF orientation is {orientation}, which makes spot positions ambiguous; store it upright (1)"
        )
    if image.mode not in ("RGB", "RGBA", "P", "YCbCr"):
        grey = " (greyscale)" if image.mode in _GREY_MODES else ""
        raise wrong_colours(f"{image.mode}{grey}")


def wrong_colours(mode: str) -> SourceError:
    """Returns the error about an image whose pixels are not 8-bit colours."""
    return SourceError(
        f"its colour mode is {mode}; allowed is 8-bit colour (RGB, opaque RGBA, palette): give the colour image of the "
        "H&E stain"
    )


def _as_rgb(image: Image.Image) -> Image.Image:
    """Decodes an image; a palette becomes RGB, an opaque alpha channel is dropped."""
    image.load()
    if image.mode == "RGBA" or "transparency" in image.info:
        image = image.convert("RGBA")
        if not is_opaque(image):
            raise SourceError("it has transparent pixels, which are neither tissue nor background; store it opaque")
    return image if image.mode == "RGB" else image.convert("RGB")


def is_opaque(image: Image.Image) -> bool:
    """Returns whether no pixel of an RGBA image is transparent."""
    return image.getchannel("A").getextrema() == (_OPAQUE, _OPAQUE)


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Makes Pillow's warnings errors, and lifts its limit of pixels, of which `Plain` has its own."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
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
