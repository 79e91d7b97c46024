"""Tiles of slides, with the pixels that a tile table would store.

An open pyramid is kept, because opening one costs as much as reading dozens of tiles; the price is that whoever reads
must release it.
"""

from contextlib import ExitStack
from types import TracebackType

import numpy as np
import pyarrow as pa

from mclstexp.errors import SourceError
from mclstexp.prediction.inspect import corners
from mclstexp.prediction.parts import PART_TILES
from mclstexp.prediction.plan import CohortPlan
from mclstexp.prediction.slide_cache import staged
from mclstexp.settings import TilesConfig
from mclstexp.slides.codec import decode_tile, encode_tile
from mclstexp.slides.slide import Slide, open_slide


class TileReader:
    """Reads tiles from slides and keeps the last one open; a context manager that releases it."""

    def __init__(self, plan: CohortPlan) -> None:
        self._plan = plan
        self._resources = ExitStack()
        self._image: str | None = None
        self._slide: Slide | None = None

    def __enter__(self) -> "TileReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def read(self, image: str, left: np.ndarray, top: np.ndarray, scale: float) -> list[np.ndarray | None]:
        """Returns tiles by their corners, each uint8 (size, size, 3); None where the slide has no pixels.

        Args:
            image: URI of the slide.
            left, top: level-0 pixels, float64 (n,).
            scale: level-0 pixels along a tile pixel.

        Raises:
            SourceError: the slide cannot be read, even through a new handle.
            FileNotFoundError, ResourceError, StorageError: its file is not available now.
        """
        return [self._tile(image, x, y, scale) for x, y in zip(left.tolist(), top.tolist(), strict=True)]

    def read_part(self, image: str, table: pa.Table, scale: float) -> dict[str, np.ndarray]:
        """Returns the columns of a part in the pipeline: `pixels` and `complete`, zero and False without pixels.

        Args:
            image: URI of the slide.
            table: the tiles, GRID_SCHEMA, at most PART_TILES.
            scale: level-0 pixels along a tile pixel.

        Raises:
            As `read`.
        """
        columns = self.empty_part()
        left, top = corners(table, self._plan.tiles.size_px, scale)
        for index, tile in enumerate(self.read(image, left, top, scale)):
            if tile is not None:
                columns["pixels"][index], columns["complete"][index] = tile, True
        return columns

    def empty_part(self) -> dict[str, np.ndarray]:
        """Returns the columns of a part without tiles."""
        size_px = self._plan.tiles.size_px
        pixels = np.zeros((PART_TILES, size_px, size_px, 3), np.uint8)
        return {"pixels": pixels, "complete": np.zeros(PART_TILES, bool)}

    def open(self, image: str) -> Slide:
        """Returns the open slide of a URI, after copying a remote one to this node."""
        if self._slide is None or self._image != image:
            self.release()
            path = self._resources.enter_context(staged(image, self._plan.scratch, self._plan.scratch_budget_bytes))
            self._slide, self._image = self._resources.enter_context(open_slide(path)), image
        return self._slide

    def release(self) -> None:
        """Closes the open slide, if any, and frees the copy of a remote one."""
        self._slide = None
        self._resources.close()

    def _tile(self, image: str, left: float, top: float, scale: float) -> np.ndarray | None:
        size_px = self._plan.tiles.size_px
        try:
            tile = self.open(image).read_tile(left, top, size_px, scale)
        except SourceError:  # OpenSlide repeats its first error for ever: only a new handle shows whether it passed
            self.release()
            tile = self.open(image).read_tile(left, top, size_px, scale)
        return None if tile is None else as_stored(tile, self._plan.tiles)


def as_stored(tile: np.ndarray, tiles: TilesConfig) -> np.ndarray:
    """Returns a tile, uint8 (size, size, 3), with the pixels that it would have in a tile table."""
    if tiles.encoding == "png":  # exact
        return tile
    return decode_tile(encode_tile(tile, tiles.encoding, tiles.jpeg_quality))
