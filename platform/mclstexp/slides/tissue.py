"""Where the tissue is: a mask on a thumbnail, and each tile's share of it.

Haematoxylin and eosin both absorb green more than red or blue, so the difference of optical densities marks stained
tissue and excludes grey shadows, black pen and cut-out borders. The threshold is Otsu's (1979,
https://doi.org/10.1109/TSMC.1979.4310076) within bounds, so that an empty slide stays empty and a full one full. Pale
adipose tissue counts if stained strands surround it. The limit: coloured pen looks like tissue.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from mclstexp.errors import SourceError
from mclstexp.slides.slide import Slide

PIXEL_UM = 8.0
"""Edge of a mask pixel in micrometres (larger on slides beyond `_MAX_MASK_PX`, never finer than the slide)."""
_MAX_MASK_PX = 4096
_SMOOTHING_UM = 10.0
_CLOSING_UM = 80.0  # about an adipocyte: between strands closer than twice this there is tissue
_MIN_HOLE_UM2 = 500.0**2
_MIN_OBJECT_UM2 = 100.0**2
_THRESHOLD_BOUNDS = (0.02, 0.05)  # optical density
_GREY_SPREAD = 6  # largest difference of channels that compression alone causes
_BLACK = 40  # brightest channel of pixels without light: borders, cut-outs


@dataclass(frozen=True)
class TissueMask:
    """Tissue on a slide; each mask pixel covers `scale` level-0 pixels along an edge."""

    is_tissue: np.ndarray
    """bool (height, width)."""
    scale: float

    def share(self, left: np.ndarray, top: np.ndarray, edge_px: float) -> np.ndarray:
        """Returns the share of tissue in square tiles, float32 (n,), from their left and top edges (n,) in pixels."""
        height, width = self.is_tissue.shape
        summed = np.pad(self.is_tissue.cumsum(0, dtype=np.int64).cumsum(1), ((1, 0), (1, 0)))
        x0, y0 = (np.floor(np.asarray(edge) / self.scale).astype(int) for edge in (left, top))
        x1, y1 = (np.ceil((np.asarray(edge) + edge_px) / self.scale).astype(int) for edge in (left, top))
        x0, x1, y0, y1 = x0.clip(0, width), x1.clip(0, width), y0.clip(0, height), y1.clip(0, height)
        inside = summed[y1, x1] - summed[y0, x1] - summed[y1, x0] + summed[y0, x0]
        return (inside / np.maximum((x1 - x0) * (y1 - y0), 1)).astype(np.float32)


def find_tissue(slide: Slide, mpp: float) -> TissueMask:
    """Returns the tissue mask of a slide whose level-0 pixels have an edge of `mpp` micrometres.

    Raises:
        SourceError: the slide is damaged, or greyscale.
    """
    return find_tissue_on_thumbnail(slide, mpp)[0]


def find_tissue_on_thumbnail(slide: Slide, mpp: float) -> tuple[TissueMask, np.ndarray]:
    """Returns the tissue mask as `find_tissue` does, and the thumbnail that it was found on, uint8 (h, w, 3).

    Raises:
        SourceError: the slide is damaged, or greyscale.
    """
    scale = max(1.0, PIXEL_UM / mpp, max(slide.width, slide.height) / _MAX_MASK_PX)
    thumbnail = slide.thumbnail(scale)
    _require_colour(thumbnail)
    return TissueMask(tissue_mask(thumbnail, scale * mpp), scale), thumbnail


def tissue_mask(thumbnail: np.ndarray, pixel_um: float) -> np.ndarray:
    """Returns where an RGB thumbnail, uint8 (h, w, 3), shows stained tissue, bool (h, w)."""
    lit = thumbnail.max(axis=2) >= _BLACK
    if not lit.any():
        return lit
    stain = ndimage.gaussian_filter(stain_density(thumbnail, lit), _SMOOTHING_UM / pixel_um)
    found = (stain > np.clip(otsu(stain[lit]), *_THRESHOLD_BOUNDS)) & lit
    closed = _closed(found, _CLOSING_UM / pixel_um) & lit
    holes = ndimage.binary_fill_holes(closed) & ~closed & lit
    filled = closed | (holes & ~_without_small(holes, _MIN_HOLE_UM2 / pixel_um**2))
    return _without_small(filled, _MIN_OBJECT_UM2 / pixel_um**2)


def _require_colour(thumbnail: np.ndarray) -> None:
    """Refuses greyscale stored as colour, as some viewers do; a pure white, empty slide is not greyscale."""
    brightest = thumbnail.max(axis=2)
    if (brightest - thumbnail.min(axis=2)).max() <= _GREY_SPREAD < np.ptp(brightest):
        raise SourceError(
            "its image is greyscale: red, green and blue are equal everywhere. Give the colour image of the H&E stain "
            "in the sheet's column image (fluorescence and grey exports show no stain)"
        )


def stain_density(thumbnail: np.ndarray, lit: np.ndarray) -> np.ndarray:
    """Returns how much more green than red or blue is absorbed, relative to the background, float32 (h, w)."""
    brightness = thumbnail.mean(axis=2)
    background = np.median(thumbnail[lit & (brightness >= np.percentile(brightness[lit], 90))], axis=0)
    density = np.log10((background + 1) / (thumbnail.astype(np.float32) + 1))
    excess = density[..., 1] - np.minimum(density[..., 0], density[..., 2])
    return np.where(lit, excess, 0).astype(np.float32)


def otsu(values: np.ndarray, num_bins: int = 256) -> float:
    """Returns the threshold that splits `values` into the two classes of largest between-class variance."""
    histogram, edges = np.histogram(values, num_bins)
    centres = (edges[:-1] + edges[1:]) / 2
    weight, moment = histogram.cumsum(), (histogram * centres).cumsum()
    rest = weight[-1] - weight
    valid = (weight > 0) & (rest > 0)
    if not valid.any():
        return float(centres[-1])
    between = (moment[-1] * weight - moment * weight[-1])[valid] ** 2 / (weight * rest)[valid].astype(float)
    return float(edges[1:][valid][between.argmax()])


def _closed(mask: np.ndarray, radius: float) -> np.ndarray:
    """Returns the mask after closing by a disk: gaps narrower than twice the radius are filled."""
    if not mask.any():
        return mask
    margin = int(radius) + 2
    padded = np.pad(mask, margin)  # so that closing works at the border too
    grown = ndimage.distance_transform_edt(~padded) <= radius
    return (ndimage.distance_transform_edt(grown) > radius)[margin:-margin, margin:-margin] | mask


def _without_small(mask: np.ndarray, min_pixels: float) -> np.ndarray:
    """Returns the mask without its connected parts of fewer than `min_pixels`."""
    labels, _ = ndimage.label(mask)
    large = np.bincount(labels.ravel()) >= min_pixels
    large[0] = False
    return large[labels]
