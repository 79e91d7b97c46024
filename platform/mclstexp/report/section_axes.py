"""Spots of a section at their true size and place, over the slide where there is a picture of it.

All coordinates are level-0 pixels of the slide, y downwards.
"""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection

from mclstexp.evaluation.domains import spot_pitch

SPOT_PITCHES = 0.8
"""How wide a spot is drawn."""
_THUMBNAIL_ALPHA = 0.6
_MARGIN_PITCHES = 1.5
_MAP_WIDTH_IN = 3.6
_TITLE_IN = 0.4


@dataclass(frozen=True)
class Thumbnail:
    """A small picture of a slide, from its level-0 corner on."""

    rgb: np.ndarray
    """uint8 (height, width, 3)."""
    scale: float
    """Level-0 pixels per thumbnail pixel."""


def map_size_in(place_px: np.ndarray) -> tuple[float, float]:
    """Returns width and height in inches of one map of the spots (N, 2) with its title."""
    (left, top), (right, bottom) = window(place_px)
    return _MAP_WIDTH_IN, _MAP_WIDTH_IN * (bottom - top) / (right - left) + _TITLE_IN


def draw_spots(axes: Axes, place_px: np.ndarray, thumbnail: Thumbnail | None) -> EllipseCollection:
    """Draws spots (N, 2), 0.8 pitches wide, over the slide and returns them, still to be coloured.

    The map ends one and a half pitches beyond the outermost spots.
    """
    if thumbnail is not None:
        height, width = (side * thumbnail.scale for side in thumbnail.rgb.shape[:2])
        axes.imshow(thumbnail.rgb, extent=(0, width, height, 0), alpha=_THUMBNAIL_ALPHA)
    diameter = np.full(len(place_px), SPOT_PITCHES * spot_pitch(place_px))
    spots = EllipseCollection(
        diameter, diameter, np.zeros(len(place_px)), units="xy", offsets=place_px, offset_transform=axes.transData
    )
    axes.add_collection(spots)
    (left, top), (right, bottom) = window(place_px)
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], aspect="equal")
    return spots


def window(place_px: np.ndarray) -> np.ndarray:
    """Returns the upper left and the lower right corner of what is drawn, (2, 2)."""
    margin = _MARGIN_PITCHES * spot_pitch(place_px)
    return np.stack([place_px.min(axis=0) - margin, place_px.max(axis=0) + margin])
