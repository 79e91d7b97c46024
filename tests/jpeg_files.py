"""Pyramids in storage tiles of JPEG, whose bytes a test may spoil or write as other programs do."""

from collections.abc import Callable, Iterator

import imagecodecs
import numpy as np
import tifffile

EDGE = 128
"""Of a storage tile, in pixels."""
APERIO = "Aperio Image Library v11.2.1\n{width}x{height} JPEG/RGB Q=85|AppMag = 20|MPP = 0.5"
RGB = {"outcolorspace": "rgb"}
"""Keeps tifffile from stating YCbCr."""
_TABLES, _APPLICATION = (0xDB, 0xC4), range(0xE0, 0xF0)  # markers
_FRAMES = (0xC0, 0xC1, 0xC2)


def storage_tiles(image: np.ndarray, edge: int = EDGE) -> Iterator[np.ndarray]:
    """Yields the storage tiles of an image, row by row, those at its border padded with black."""
    height, width = (-(-length // edge) * edge for length in image.shape[:2])
    padded = np.zeros((height, width, 3), np.uint8)
    padded[: image.shape[0], : image.shape[1]] = image
    for top in range(0, height, edge):
        for left in range(0, width, edge):
            yield padded[top : top + edge, left : left + edge]


def ycbcr(tile: np.ndarray, subsampling: str = "420", **options: object) -> bytes:
    return imagecodecs.jpeg8_encode(
        np.ascontiguousarray(tile),
        level=85,
        colorspace="RGB",
        outcolorspace="YCBCR",
        subsampling=subsampling,
        **options,
    )


def rgb(tile: np.ndarray) -> bytes:
    return imagecodecs.jpeg8_encode(
        np.ascontiguousarray(tile), level=85, colorspace="RGB", outcolorspace="RGB", subsampling="444"
    )


def segments(jpeg: bytes) -> list[tuple[int, bytes]]:
    """Returns the markers of a JPEG with their bytes; the last one has all pixels."""
    found, at = [], 2
    while jpeg[at + 1] != 0xDA:
        length = 2 + int.from_bytes(jpeg[at + 2 : at + 4])
        found.append((jpeg[at + 1], jpeg[at : at + length]))
        at += length
    return [*found, (0xDA, jpeg[at:])]


def bare(jpeg: bytes) -> tuple[bytes, bytes]:
    """Returns a JPEG's tables, and itself without them, without statements of colours and with components 0, 1, 2.

    So Aperio's scanners write RGB: only the TIFF states the colours.
    """
    parts = segments(jpeg)
    tables = b"".join(part for marker, part in parts if marker in _TABLES)
    rest = [_renumbered(marker, part) for marker, part in parts if marker not in (*_TABLES, *_APPLICATION)]
    return b"\xff\xd8" + tables + b"\xff\xd9", b"\xff\xd8" + b"".join(rest)


def _renumbered(marker: int, part: bytes) -> bytes:
    start, step = {**dict.fromkeys(_FRAMES, (10, 3)), 0xDA: (5, 2)}.get(marker, (0, 0))
    changed = bytearray(part)
    for component in range(3 if step else 0):
        changed[start + component * step] = component
    return bytes(changed)


def write_jpeg(
    path: object,
    *levels: np.ndarray,
    encode: Callable[[np.ndarray], bytes] = ycbcr,
    changed: dict[tuple[int, int], bytes] | None = None,
    photometric: str = "ycbcr",
    subsampling: tuple[int, int] = (2, 2),
    is_aperio: bool = False,
    form: dict[str, object] | None = None,
    **options: object,
) -> None:
    """Writes a pyramid; `changed` replaces storage tiles, by level and index; `form` is the TIFF's own."""
    with tifffile.TiffWriter(path, **(form or {})) as tiff:
        for level, image in enumerate(levels):
            height, width = image.shape[:2]
            tiles = [encode(tile) for tile in storage_tiles(image)]
            tiles = [(changed or {}).get((level, index), tile) for index, tile in enumerate(tiles)]
            description = APERIO.format(width=width, height=height) if is_aperio else None
            tiff.write(
                iter(tiles),
                shape=image.shape,
                dtype=np.uint8,
                tile=(EDGE, EDGE),
                photometric=photometric,
                compression="jpeg",
                description=description,
                metadata=None,
                subfiletype=0 if is_aperio else int(level > 0),
                **({"subsampling": subsampling} if photometric == "ycbcr" else {"compressionargs": RGB}),
                **options,
            )
