"""Encodes and decodes tiles: RGB arrays and JPEG (small, lossy) or PNG (exact) bytes.

JPEG uses libjpeg-turbo, twice as fast as Pillow; PNG uses Pillow, restricted to that format, so that the bytes cannot
choose another decoder. Sizes are checked before pixels are decoded.
"""

import io
import warnings
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image

from mclstexp.errors import TableError

MAX_TILE_PX = 4096
"""Largest edge of a tile that is decoded."""
_MIN_QUALITY_FULL_CHROMA = 95  # JPEG quality from which colour is not subsampled
_JPEG_START = b"\xff\xd8"


def encode_tile(image: np.ndarray, encoding: Literal["jpeg", "png"], jpeg_quality: int) -> bytes:
    """Returns the encoded bytes of an RGB tile, uint8 (height, width, 3).

    JPEG below quality 95 halves the resolution of colour (4:2:0); from 95 on it keeps it (4:4:4).
    """
    pixels = np.ascontiguousarray(image)
    if encoding == "jpeg":
        chroma = "444" if jpeg_quality >= _MIN_QUALITY_FULL_CHROMA else "420"
        return bytes(simplejpeg.encode_jpeg(pixels, jpeg_quality, "RGB", chroma, fastdct=False))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def decode_tile(data: bytes, into: np.ndarray | None = None) -> np.ndarray:
    """Returns an encoded tile as RGB, uint8 (height, width, 3).

    Args:
        data: the bytes.
        into: contiguous array of this shape that takes the pixels and is returned; None: a new one.

    Raises:
        TableError: the bytes are not a complete 8-bit RGB JPEG or PNG, the image is larger than `MAX_TILE_PX`, or has
            another size than `into`.
    """
    try:
        return (_decode_jpeg if data.startswith(_JPEG_START) else _decode_png)(data, into)
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TableError(f"a stored tile of {len(data)} bytes cannot be decoded: {error}") from None


def _decode_jpeg(data: bytes, into: np.ndarray | None) -> np.ndarray:
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    _require_size(height, width, into)
    return simplejpeg.decode_jpeg(data, "RGB", buffer=None if into is None else into.reshape(-1))


def _decode_png(data: bytes, into: np.ndarray | None) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            _require_size(image.height, image.width, into)
            if image.mode != "RGB":
                raise ValueError(f"it has mode {image.mode} instead of RGB")
            if into is None:
                return np.array(image)
            into[:] = image
            return into


def _require_size(height: int, width: int, into: np.ndarray | None) -> None:
    if into is not None and into.shape != (height, width, 3):
        raise ValueError(f"it has {width} x {height} px instead of {into.shape[1]} x {into.shape[0]}")
    if max(height, width) > MAX_TILE_PX:
        raise ValueError(f"it has {width} x {height} px; at most {MAX_TILE_PX} are allowed along an edge")
