"""Encoding and decoding of single tiles; free of torch, because decode tasks import it."""

import io

import numpy as np
import simplejpeg
from PIL import Image

from mclstexp.errors import TableError

_JPEG_START = b"\xff\xd8"


def encode_tile(tile: np.ndarray, encoding: str, jpeg_quality: int) -> bytes:
    """Returns a tile, uint8 (height, width, 3) RGB, as JPEG (4:2:0 chroma) or PNG bytes."""
    if encoding == "jpeg":
        return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(tile), quality=jpeg_quality, colorsubsampling="420"))
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_tile(data: bytes) -> np.ndarray:
    """Returns an encoded tile as uint8 (height, width, 3) RGB.

    Raises:
        TableError: the bytes are no whole JPEG or PNG.
    """
    try:
        if data[:2] == _JPEG_START:
            return simplejpeg.decode_jpeg(data, colorspace="RGB")
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise TableError(f"a stored tile of {len(data)} bytes cannot be decoded: {error}") from error
