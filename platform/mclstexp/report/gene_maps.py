"""Maps of genes over a section, measured beside predicted.

Both share one colour scale: a prediction that varies less than the truth looks flatter, as it should. The scale spans
98 % of all values, so that one spot of few counts does not take it all; the arrows of its bar stand for the rest.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mclstexp.report.figures import colour_limits, new_figure
from mclstexp.report.section_axes import Thumbnail, draw_spots, map_size_in

_COLOUR_BAR_IN = 1.0
_DPI = 90


def draw_gene_maps(
    path: str | Path,
    place_px: np.ndarray,
    genes: Sequence[str],
    maps: Mapping[str, np.ndarray],
    unit: str,
    heading: str,
    thumbnail: Thumbnail | None = None,
) -> None:
    """Writes a PNG with one row of maps a gene; no display or global state of matplotlib is used.

    Args:
        path: local file to write.
        place_px: float (N, 2), spot centres in level-0 pixels.
        genes: names of the columns that are drawn.
        maps: (N, len(genes)) by title, in the order of the columns: "measured", "predicted".
        unit: unit of all values, for the colour bar.
        heading: what every picture says: what was held out, the protocol and its leaks.
        thumbnail: the slide, drawn beneath.
    """
    assert all(matrix.shape == (len(place_px), len(genes)) for matrix in maps.values())
    width, height = map_size_in(place_px)
    figure = new_figure(width * len(maps) + _COLOUR_BAR_IN, height * len(genes), heading)
    grid = figure.subplots(len(genes), len(maps), squeeze=False)
    for column, (gene, row) in enumerate(zip(genes, grid, strict=True)):
        values = {title: matrix[:, column] for title, matrix in maps.items()}
        limits = colour_limits(np.stack(list(values.values())))
        for axes, (title, shades) in zip(row, values.items(), strict=True):
            spots = draw_spots(axes, place_px, thumbnail)
            spots.set(array=shades, cmap="viridis", clim=limits)
            axes.set_title(f"{gene}, {title}")
        figure.colorbar(spots, ax=list(row), label=unit, shrink=0.8, extend="both")
    figure.savefig(path, dpi=_DPI)
