"""Common parts of all pictures: a figure with its heading, and the range of a colour scale.

Separate from `report/maps.py`, which measures distances between spots and therefore takes seconds to import.
"""

import textwrap

import numpy as np
from matplotlib.figure import Figure

_HEADING_PT = 9
_HEADING_LINE_IN, _HEADING_LETTER_IN = 0.17, 0.075
_SHARES = (0.01, 0.99)


def new_figure(width_in: float, height_in: float, heading: str) -> Figure:
    """Returns a figure with its heading above, wrapped to its width; the heading adds to `height_in`."""
    num_letters = int(width_in / _HEADING_LETTER_IN)
    lines = [line for part in heading.splitlines() for line in textwrap.wrap(part, num_letters)]
    figure = Figure(figsize=(width_in, height_in + _HEADING_LINE_IN * len(lines)), layout="constrained")
    if lines:
        figure.suptitle("\n".join(lines), fontsize=_HEADING_PT)
    return figure


def colour_limits(values: np.ndarray) -> tuple[float, float]:
    """Returns the 1st and 99th percentile of values of any shape without NaN, or their range if these are equal."""
    values = values[~np.isnan(values)]
    low, high = np.quantile(values, _SHARES)
    return (float(low), float(high)) if low < high else (float(values.min()), float(values.max()))
