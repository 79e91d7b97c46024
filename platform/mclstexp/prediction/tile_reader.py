"""Tiles of slides, with the pixels that a tile table would store.

An open pyramid is kept, because opening one costs as much as reading dozens of tiles; the price is that whoever reads
must release it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import TypeVar

import numpy as np
import pyarrow as pa

from mclstexp.data.schema import IMAGE, IMAGE_WIDE
from mclstexp.errors import SourceError
from mclstexp.prediction.inspect import corners
from mclstexp.prediction.parts import PART_TILES, SlideRecord
from mclstexp.prediction.plan import CohortPlan
from mclstexp.prediction.slide_cache import staged
from mclstexp.settings import TilesConfig
from mclstexp.slides.codec import decode_tile, encode_tile
from mclstexp.slides.slide import Slide, open_slide
from mclstexp.slides.tiles import tile_scale

Pixels = TypeVar("Pixels")


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

    def read_part(self, image: str, table: pa.Table, record: SlideRecord) -> dict[str, np.ndarray]:
        """Returns the columns of a part in the pipeline: each view's pixels and `complete`, zero and False without.

        Each tile is put into its column at once, because fresh memory for all of them costs as much as reading them.

        Args:
            image: URI of the slide.
            table: the tiles, GRID_SCHEMA, at most PART_TILES.
            record: of the slide.

        Raises:
            SourceError: the slide cannot be read, even through a new handle.
            FileNotFoundError, ResourceError, StorageError: its file is not available now.
        """
        columns = self.empty_part()
        complete, seen = columns["complete"], dict(zip(self._plan.views, columns.values(), strict=False))
        for row, tile in enumerate(self._read(image, table, record)):
            complete[row] = tile is not None
            if tile is not None and IMAGE in seen:
                seen[IMAGE][row] = tile
        if self._plan.wide is not None:
            rows = np.flatnonzero(complete)
            wide = self._read_wide(image, table.take(rows), record, self._plan.wide)
            for row, tile in zip(rows.tolist(), wide, strict=True):
                seen[IMAGE_WIDE][row] = tile
        return columns

    def empty_part(self) -> dict[str, np.ndarray]:
        """Returns the columns of a part without tiles."""
        wide_px = 0 if self._plan.wide is None else self._plan.wide[0]
        sizes = {IMAGE: self._plan.tiles.size_px, IMAGE_WIDE: wide_px}
        columns = {
            name: np.zeros((PART_TILES, sizes[view], sizes[view], 3), np.uint8)
            for name, view in zip(("pixels", "second_pixels"), self._plan.views, strict=False)
        }
        return columns | {"complete": np.zeros(PART_TILES, bool)}

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

    def _read(self, image: str, table: pa.Table, record: SlideRecord) -> Iterator[np.ndarray | None]:
        """Yields tiles, each uint8 (size_px, size_px, 3); None where the slide has no pixels."""
        size_px, scale = self._plan.tiles.size_px, record.scale
        left, top = (edge.tolist() for edge in corners(table, size_px, scale))
        for x, y in zip(left, top, strict=True):
            tile = self._again(image, partial(Slide.read_tile, left=x, top=y, size_px=size_px, scale=scale))
            yield None if tile is None else as_stored(tile, self._plan.tiles)

    def _read_wide(
        self, image: str, table: pa.Table, record: SlideRecord, wide: tuple[int, float]
    ) -> Iterator[np.ndarray]:
        """Yields the wide view of tiles, each uint8 (wide_px, wide_px, 3)."""
        size_px, scale = wide[0], tile_scale(wide[1], record.mpp)
        left, top = (edge.tolist() for edge in corners(table, size_px, scale))
        for x, y in zip(left, top, strict=True):
            tile = self._again(image, partial(Slide.read_wide, left=x, top=y, size_px=size_px, scale=scale))
            yield as_stored(tile, self._plan.tiles)

    def _again(self, image: str, read: Callable[[Slide], Pixels]) -> Pixels:
        """Reads from a slide; after a fault through a new handle: OpenSlide repeats its first error for ever."""
        try:
            return read(self.open(image))
        except SourceError:
            self.release()
            return read(self.open(image))


def as_stored(tile: np.ndarray, tiles: TilesConfig) -> np.ndarray:
    """Returns a tile, uint8 (size, size, 3), with the pixels that it would have in a tile table."""
    if tiles.encoding == "png":  # exact
        return tile
    return decode_tile(encode_tile(tile, tiles.encoding, tiles.jpeg_quality))
