"""Whether a section's image is the one its positions belong to, from sizes alone.

A downscaled picture beside the positions tells the size of the full image: its own size over its scale factor.
"""

import numpy as np

from ingest.readers.spots import Layout, Picture
from mclstexp.errors import SourceError
from mclstexp.slides.slide import Slide
from mclstexp.slides.tiles import inside

_MAX_DIFFERENCE = 0.02  # of a full image's edges from those that a picture tells
_MIN_SHARE = 0.5  # of spots on the image


def require_same_image(layout: Layout, slide: Slide | None) -> None:
    """Checks the image's size, and the extent of the positions, against each picture of the section.

    Raises:
        SourceError: the image is a picture itself, or one of another image; or the positions reach beyond it.
    """
    for picture in layout.pictures:
        if picture.width > 0 and picture.height > 0:
            full = round(picture.width / picture.scale), round(picture.height / picture.scale)
            if slide is not None:
                _require_size(slide, picture, full)
            _require_extent(layout.xy_px, picture, full)


def require_on_image(xy_px: np.ndarray, layout: Layout, slide: Slide) -> None:
    """Checks that at least half of the spots are on the image.

    Args:
        xy_px: the spots' centres, float64 (n, 2).
        layout: the section's.
        slide: its image.

    Raises:
        SourceError: they are not; gives sizes, and the change that would fit.
    """
    if share_inside(xy_px, slide) >= _MIN_SHARE:
        return
    num_inside, num_exchanged = (
        int(inside(x, y, 0, slide.width, slide.height).sum()) for x, y in (xy_px.T, xy_px.T[::-1])
    )
    remedy = "give positions in pixels of this very image"
    for picture in layout.pictures:
        if share_inside(xy_px * picture.scale, slide) >= _MIN_SHARE:
            remedy = f"it may be {picture.name} (factor {picture.scale:.4g}); give the full-resolution image"
    right, bottom = np.ceil(xy_px.max(axis=0)).astype(int).tolist()
    raise SourceError(
        f"only {num_inside} of {len(xy_px)} spots are on its image of {_size(slide.width, slide.height)} "
        f"({num_exchanged} with x and y exchanged), and positions reach to {_size(right, bottom)}: {remedy}"
    )


def share_inside(xy_px: np.ndarray, slide: Slide) -> float:
    """Returns the share of positions, float64 (n, 2), that are on a slide."""
    return float(inside(xy_px[:, 0], xy_px[:, 1], 0, slide.width, slide.height).mean())


def other_pixels(picture: Picture) -> str:
    """Returns what to do with positions in pixels of a downscaled picture."""
    return (
        f"multiply the positions by {1 / picture.scale:.6g}, since they are in pixels of {picture.name} "
        f"(factor {picture.scale:.4g})"
    )


def _require_size(slide: Slide, picture: Picture, full: tuple[int, int]) -> None:
    size = slide.width, slide.height
    if _is_near(size, full):
        return
    fault = f"{_named(picture)} belongs to one of {_size(*full)}: give the image that was measured"
    if size == (picture.width, picture.height):
        fault = f"like {picture.name}, but positions are in pixels of the full image of {_size(*full)}: give that one"
    elif _is_near(size[::-1], full):
        fault = f"{_named(picture)} belongs to one of {_size(*full)}: turn it back"
    raise SourceError(f"its image is {_size(*size)}, {fault}")


def _require_extent(xy_px: np.ndarray, picture: Picture, full: tuple[int, int]) -> None:
    """Checks positions against the full image's size; some spots of an array may be off the image."""
    if len(xy_px) and inside(xy_px[:, 0], xy_px[:, 1], 0, *full).mean() < _MIN_SHARE:
        right, bottom = np.ceil(xy_px.max(axis=0)).astype(int).tolist()
        raise SourceError(
            f"positions reach to {_size(right, bottom)}, but by {_named(picture)} the full-resolution image is "
            f"{_size(*full)}: give positions in its pixels"
        )


def _is_near(got: tuple[int, int], expected: tuple[int, int]) -> bool:
    return all(abs(a - b) <= _MAX_DIFFERENCE * b + 1 for a, b in zip(got, expected, strict=True))


def _named(picture: Picture) -> str:
    return f"{picture.name} ({_size(picture.width, picture.height)}, factor {picture.scale:.4g})"


def _size(width: int, height: int) -> str:
    return f"{width:,} x {height:,} px"
