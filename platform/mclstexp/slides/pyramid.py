"""Slides that OpenSlide reads, from their makers' own formats to pyramids in tiled TIFF."""

from collections.abc import Mapping

import numpy as np
import openslide

from mclstexp.errors import SourceError
from mclstexp.slides.resolution import stated_mpp

MAX_SLIDE_EDGE_PX = 2**22
"""Largest edge of a slide."""


class Pyramid:
    """Levels of a file that OpenSlide reads."""

    reads_regions = True

    def __init__(self, path: str, mpp: float | None = None) -> None:
        self._slide = openslide.OpenSlide(path)
        self.dimensions = self._slide.level_dimensions
        self.downsamples = self._slide.level_downsamples
        require_edges(*self.dimensions[0])
        properties = self._slide.properties
        names = (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
        stated = stated_mpp([float(properties[name]) for name in names if name in properties])
        self.mpp = stated if mpp is None else mpp
        self.scanned_from = scanned_from(properties)

    def read(self, level: int, left: int, top: int, width: int, height: int) -> tuple[np.ndarray, float, float]:
        """Returns a region with alpha, transparent where the slide has no pixels, and its exact left and top."""
        down = self.downsamples[level]
        x, y = round(left * down), round(top * down)
        return np.asarray(self._slide.read_region((x, y), level, (width, height))), x / down, y / down

    def close(self) -> None:
        """Closes the file."""
        self._slide.close()


def require_edges(width: int, height: int) -> None:
    """Refuses a slide that claims an edge beyond every scanner.

    Raises:
        SourceError: an edge is longer than `MAX_SLIDE_EDGE_PX`.
    """
    if max(width, height) > MAX_SLIDE_EDGE_PX:
        raise SourceError(f"it claims {width} x {height} px; at most {MAX_SLIDE_EDGE_PX} are allowed along an edge")


def scanned_from(properties: Mapping[str, str]) -> tuple[float, float]:
    """Returns x and y of the scanned region's corner in level-0 pixels, from OpenSlide's properties."""
    names = (openslide.PROPERTY_NAME_BOUNDS_X, openslide.PROPERTY_NAME_BOUNDS_Y)
    x, y = (float(properties.get(name, 0)) for name in names)
    return x, y
