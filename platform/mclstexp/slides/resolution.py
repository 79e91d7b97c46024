"""The resolution of a slide: micrometres per level-0 pixel, as its file states it, and whom to believe.

The sheet, the image and the array of spots may each state it. The first one counts, and a contradiction is refused
instead of averaged, because one of them then belongs to another image.
"""

import math
from collections.abc import Mapping

from mclstexp.errors import SourceError

ASSUMED = "assumed"
"""Source of a resolution that nothing states and the user assumes."""
_PLAUSIBLE_MPP = (0.05, 20.0)  # 72 dpi, which many programs write where they know nothing, would be 353
_MAX_ASPECT = 1.02  # ratio of both edges of a pixel
_MAX_DISAGREEMENT = 1.05  # ratio of the largest to the smallest resolution stated


def stated_mpp(values: list[float]) -> float | None:
    """Returns the micrometres per pixel of a file that states `values` along its axes; None if no scan has that.

    Raises:
        SourceError: a value is not a resolution, or pixels are not square.
    """
    if not values:
        return None
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise SourceError(f"its resolution is {values} micrometres per pixel; fix the file")
    if max(values) > _MAX_ASPECT * min(values):
        raise SourceError(f"its pixels are not square: {values} micrometres along x and y")
    mpp = sum(values) / len(values)
    return mpp if _PLAUSIBLE_MPP[0] <= mpp <= _PLAUSIBLE_MPP[1] else None


def agreed_mpp(stated: Mapping[str, float | None]) -> float | None:
    """Returns the first resolution that a file states of those in `stated`, by place, or None.

    Raises:
        SourceError: two places of the file disagree by more than 5 %.
    """
    known = {place: mpp for place, mpp in stated.items() if mpp is not None}
    _require_agreement(known, "write the file again with one resolution")
    return next(iter(known.values()), None)


def resolve_mpp(stated: Mapping[str, float | None], assumed: float | None = None) -> tuple[float, str]:
    """Returns the micrometres per level-0 pixel and its source: the first one that states it, else `assumed`.

    Args:
        stated: micrometres per pixel by source (`sheet`, `image`, ...), in order of trust.
        assumed: used only if no source states a resolution; its source is `ASSUMED`.

    Raises:
        SourceError: there is no resolution, or two sources disagree by more than 5 %.
    """
    known = {source: mpp for source, mpp in stated.items() if mpp is not None}
    if not known and assumed is not None:
        return assumed, ASSUMED
    if not known:
        raise SourceError(
            f"no resolution: {' and '.join(stated)} state none; fill in the sheet's column mpp (jobs/predict.py also "
            "takes --assume-mpp)"
        )
    _require_agreement(known, "fix the sheet, or give the image that belongs to it")
    source, mpp = next(iter(known.items()))
    return mpp, source


def _require_agreement(known: Mapping[str, float], mend: str) -> None:
    if known and max(known.values()) > _MAX_DISAGREEMENT * min(known.values()):
        listed = " and ".join(f"{mpp:.4g} in the {source}" for source, mpp in known.items())
        raise SourceError(f"mpp is {listed}: {mend}")
