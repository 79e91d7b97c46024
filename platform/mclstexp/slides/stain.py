"""Whether an image shows an H&E stain, by hue and saturation of its thumbnail.

The rule, on colours as stored (hue in degrees, saturation as in HSV):

1. At least 30 % of the image is dim (brightest channel below 80 of 255), and the median saturation of pixels that are
   not black (40 or more) is above 0.6: light on black, as in fluorescence. H&E that was cut out onto black keeps the
   pale colours of transmitted light.
2. Less than half of the tissue's pixels are coloured (saturation of 0.06 or more): greyscale. If the mask found no
   stain, pixels below 80 % of the background's brightness replace the tissue, provided they are 5 % of the image.
3. Less than 70 % of the coloured tissue has a hue from blue-violet through purple to pink (225 through 360 to 5), or at
   least 20 % of it is brown (5 to 60): another stain, such as immunohistochemistry with DAB, or an inverted image.

The rule avoids false alarms at the price of misses: an antibody that stained little, a nuclear counterstain alone, and
stains as pink as eosin (PAS) pass. `benchmarks/stain_rule.py` prints its figures.
"""

from dataclasses import dataclass

import numpy as np

_LIT, _DIM = 40, 80
_MAX_DIM, _MAX_GLOW = 0.3, 0.6
_COLOURED, _MIN_COLOURED = 0.06, 0.5
_ABSORBING, _MIN_ABSORBING = 0.8, 0.05
_HE_FROM, _HE_TO, _MIN_HE = 225.0, 5.0, 0.7
_BROWN_TO, _MAX_BROWN = 60.0, 0.2


@dataclass(frozen=True)
class StainFigures:
    """The figures that the rule uses; shares from 0 to 1."""

    dim: float
    """Share of the image's pixels with little light."""
    glow: float
    """Median saturation of pixels that are not black."""
    coloured: float
    """Share of tissue pixels with a colour; 1 if there is neither tissue nor anything dark in its place."""
    brown: float
    """Share of coloured tissue pixels with the hue of DAB; 0 if none has colour."""
    h_and_e: float
    """Share of coloured tissue pixels with a hue of H&E; 1 if none has colour."""


def not_h_and_e(thumbnail: np.ndarray, is_tissue: np.ndarray) -> str:
    """Returns why a thumbnail shows no H&E stain, in words with numbers; empty if it may show one.

    Args:
        thumbnail: RGB, uint8 (h, w, 3).
        is_tissue: its `tissue_mask`, bool (h, w); may be empty.
    """
    found = stain_figures(thumbnail, is_tissue)
    if found.dim >= _MAX_DIM and found.glow > _MAX_GLOW:
        return (
            f"{found.dim:.0%} of its image is dim and the rest has a saturation of {found.glow:.2f} (H&E: at most "
            f"{_MAX_GLOW}): it looks like fluorescence"
        )
    if found.coloured < _MIN_COLOURED:
        return f"only {found.coloured:.0%} of its tissue has a colour (H&E: {_MIN_COLOURED:.0%} or more): it looks grey"
    if found.h_and_e < _MIN_HE or found.brown >= _MAX_BROWN:
        return (
            f"{found.h_and_e:.0%} of its tissue is pink to blue-violet (H&E: {_MIN_HE:.0%} or more) and "
            f"{found.brown:.0%} brown (H&E: below {_MAX_BROWN:.0%}): it looks like another stain or an inverted image"
        )
    return ""


def stain_figures(thumbnail: np.ndarray, is_tissue: np.ndarray) -> StainFigures:
    """Returns the rule's figures for a thumbnail, uint8 (h, w, 3), and its tissue, bool (h, w)."""
    brightest = thumbnail.max(axis=2)
    lit = brightest >= _LIT
    saturation = (brightest - thumbnail.min(axis=2)) / np.maximum(brightest, 1)
    shown = _shown(brightest, lit, is_tissue & lit)
    coloured = shown & (saturation >= _COLOURED)
    hue = _hue(thumbnail[coloured])
    return StainFigures(
        dim=float((brightest < _DIM).mean()),
        glow=float(np.median(saturation[lit])) if lit.any() else 0.0,
        coloured=_share(coloured[shown], 1.0),
        brown=_share((hue >= _HE_TO) & (hue < _BROWN_TO), 0.0),
        h_and_e=_share((hue >= _HE_FROM) | (hue < _HE_TO), 1.0),
    )


def _shown(brightest: np.ndarray, lit: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """Returns the pixels to judge: the tissue, or dark pixels if the mask found no stain."""
    background = np.percentile(brightest[lit], 95) if lit.any() else 0.0
    absorbing = lit & (brightest < _ABSORBING * background)
    unexplained = absorbing.mean() >= _MIN_ABSORBING and tissue.mean() < _MIN_ABSORBING * absorbing.mean()
    return absorbing if unexplained else tissue


def _hue(pixels: np.ndarray) -> np.ndarray:
    """Returns the hue of coloured RGB pixels, uint8 (n, 3), in degrees from 0 to 360 (the hexagon of HSV)."""
    red, green, blue = pixels.astype(np.float64).T
    brightest = pixels.max(axis=1)
    spread = np.maximum(brightest - pixels.min(axis=1), 1).astype(np.float64)
    sector = np.select(
        [brightest == red, brightest == green],
        [(green - blue) / spread, 2 + (blue - red) / spread],
        4 + (red - green) / spread,
    )
    return sector * 60 % 360


def _share(chosen: np.ndarray, of_none: float) -> float:
    return float(chosen.mean()) if chosen.size else of_none
