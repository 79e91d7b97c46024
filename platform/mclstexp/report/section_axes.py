"""Spots of a section at their true size and place, over the slide where there is a picture of it.

All coordinates are level-0 pixels of the slide, y downwards.
"""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection

from mclstexp.evaluation.domains import spot_pitch

_SPOT_PITCHES = 0.8
_THUMBNAIL_ALPHA = 0.6
_MARGIN_PITCHES = 1.5


@dataclass(frozen=True)
class Thumbnail:
    """A small picture of a slide, from its level-0 corner on."""

    rgb: np.ndarray
    """uint8 (height, width, 3)."""
    scale: float
    """Level-0 pixels per thumbnail pixel."""


def draw_spots(axes: Axes, place_px: np.ndarray, thumbnail: Thumbnail | None) -> EllipseCollection:
    """Draws spots (N, 2) of 0.8 pitches over the slide and returns them, still to be coloured; others are cut off."""
    pitch = spot_pitch(place_px)
    if thumbnail is not None:
        height, width = (side * thumbnail.scale for side in thumbnail.rgb.shape[:2])
        axes.imshow(thumbnail.rgb, extent=(0, width, height, 0), alpha=_THUMBNAIL_ALPHA)
    diameter = np.full(len(place_px), _SPOT_PITCHES * pitch)
    spots = EllipseCollection(
        diameter, diameter, np.zeros(len(place_px)), units="xy", offsets=place_px, offset_transform=axes.transData
    )
    axes.add_collection(spots)
    (left, top), (right, bottom) = place_px.min(axis=0), place_px.max(axis=0)
    margin = _MARGIN_PITCHES * pitch
    axes.set(xlim=(left - margin, right + margin), ylim=(bottom + margin, top - margin))
    axes.set(xticks=[], yticks=[], aspect="equal")
    return spots
