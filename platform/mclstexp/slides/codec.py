"""Tiles: where they begin on a slide, and JPEG (small, lossy) or PNG (exact) bytes to RGB arrays and back.

JPEG goes through libjpeg-turbo, twice as fast as Pillow; PNG through Pillow, whose format list is closed so that
the bytes alone cannot choose another decoder. Sizes are checked before pixels are decoded.
"""

import io
import warnings
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image

from mclstexp.errors import TableError

MAX_TILE_PX = 4096
"""Largest edge that is decoded."""
_FULL_CHROMA_FROM = 95  # JPEG quality from which colour is not subsampled
_JPEG_START = b"\xff\xd8"


def encode_tile(image: np.ndarray, encoding: Literal["jpeg", "png"], jpeg_quality: int) -> bytes:
    """Returns the encoded bytes of an RGB tile, uint8 (height, width, 3).

    JPEG below quality 95 halves the colour's resolution (4:2:0), from 95 on it does not (4:4:4).
    """
    pixels = np.ascontiguousarray(image)
    if encoding == "jpeg":
        chroma = "444" if jpeg_quality >= _FULL_CHROMA_FROM else "420"
        return bytes(simplejpeg.encode_jpeg(pixels, jpeg_quality, "RGB", chroma, fastdct=False))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def decode_tile(data: bytes) -> np.ndarray:
    """Returns an encoded tile as RGB, uint8 (height, width, 3).

    Raises:
        TableError: the bytes are no whole 8-bit RGB JPEG or PNG, or larger than `MAX_TILE_PX`.
    """
    try:
        return _decode_jpeg(data) if data.startswith(_JPEG_START) else _decode_png(data)
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TableError(f"a stored tile of {len(data)} bytes cannot be decoded: {error}") from None


def _decode_jpeg(data: bytes) -> np.ndarray:
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    _require_size(height, width)
    return simplejpeg.decode_jpeg(data, "RGB")


def _decode_png(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            _require_size(image.height, image.width)
            if image.mode != "RGB":
                raise ValueError(f"it has mode {image.mode}, not RGB")
            return np.array(image)


def _require_size(height: int, width: int) -> None:
    if max(height, width) > MAX_TILE_PX:
        raise ValueError(f"it has {width} x {height} px, allowed are {MAX_TILE_PX}")
