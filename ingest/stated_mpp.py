"""The resolution that an image file states, where it can be believed."""

import math

from mclstexp.errors import SourceError

_PLAUSIBLE_MPP = (0.05, 20.0)  # 72 dpi, which many programs write where they know nothing, would be 353
_SQUARE = 1.02  # ratio of both edges of a pixel


def stated_mpp(values: list[float]) -> float | None:
    """Returns the micrometres per pixel of a file that states `values` along its axes; None where no scan has that.

    Raises:
        SourceError: a value is no resolution, or pixels are not square.
    """
    if not values:
        return None
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise SourceError(f"its resolution is {values} micrometres per pixel; mend the file")
    if max(values) > _SQUARE * min(values):
        raise SourceError(f"its pixels are not square: {values} micrometres along x and y")
    mpp = sum(values) / len(values)
    return mpp if _PLAUSIBLE_MPP[0] <= mpp <= _PLAUSIBLE_MPP[1] else None
