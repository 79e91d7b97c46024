"""Gene maps in the page: one byte per value, so that a cohort's maps fit into one file.

A gene's measured and predicted values of a section are quantised over their shared colour limits, those of
`figures.colour_limits`: the colour scale has no more steps than that, so the page looks as it would with full floats.
"""

import base64
import io
from collections.abc import Collection, Sequence
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from mclstexp.evaluation.domains import spot_pitch
from mclstexp.evaluation.metrics import pearson_per_gene
from mclstexp.figures import colour_limits
from mclstexp.report.maps import SPOT_PITCHES, window
from mclstexp.report.result import Result, Section

_LEVELS = 255
_JPEG_QUALITY = 78
_BYTES_BESIDE = 120
"""Bytes for the name, limits and correlation of a gene, beside its values."""


def genes_that_fit(result: Result, names: Sequence[str], num_bytes: float) -> list[str]:
    """Returns the first names whose maps of all sections fit into `num_bytes`."""
    spots = sum(result.num_spots[name] for name in result.files)
    each = 2 * spots * 4 / 3 + _BYTES_BESIDE * len(result.files)
    return list(names[: max(0, int(num_bytes / each))])


def slide_data(section: Section) -> dict[str, Any]:
    """Returns what a page needs to draw a section's spots over its slide, in thumbnail pixels.

    Keys: id, patient, unit; image, width, height; window (left, top, right, bottom of the map); x, y and diameter of
    the spots.
    """
    thumbnail = section.thumbnail
    xy = section.xy_px / thumbnail.scale
    height, width = thumbnail.rgb.shape[:2]
    return {
        "id": section.section_id,
        "patient": section.patient_id,
        "unit": section.unit,
        "image": _jpeg(thumbnail.rgb),
        "width": width,
        "height": height,
        "window": window(xy).ravel().round(1).tolist(),
        "x": xy[:, 0].round(1).tolist(),
        "y": xy[:, 1].round(1).tolist(),
        "diameter": round(SPOT_PITCHES * spot_pitch(xy), 2),
    }


def gene_data(section: Section, names: Sequence[str], wanted: Collection[str]) -> dict[str, dict[str, Any]]:
    """Returns the maps of those wanted genes that are in the section's panel, by name.

    Keys: low and high, the colour limits; pcc, None if undefined; levels, base64 of 2 N bytes, measured then predicted,
    0 at `low` and 255 at `high`; of N bytes if the section does not measure the gene.

    Args:
        section: the section.
        names: the names of its panel's genes, see `biology.section_names`.
        wanted: names of genes.
    """
    pcc = pearson_per_gene(section.measured, section.predicted)
    return {
        name: _gene(section.measured[:, column], section.predicted[:, column], float(pcc[column]))
        for column, name in enumerate(names)
        if name in wanted
    }


def colours() -> str:
    """Returns the colour scale's 256 colours as base64 of RGB bytes."""
    rgb = matplotlib.colormaps["viridis"](np.arange(256), bytes=True)[:, :3]
    return base64.b64encode(rgb.tobytes()).decode()


def _gene(measured: np.ndarray, predicted: np.ndarray, pcc: float) -> dict[str, Any]:
    shown = [predicted] if np.isnan(measured).all() else [measured, predicted]
    both = np.concatenate(shown).astype(np.float64)
    low, high = colour_limits(both)
    share = (both - low) / (high - low) if high > low else np.zeros(len(both))
    levels = np.clip(np.rint(share * _LEVELS), 0, _LEVELS).astype(np.uint8)
    return {
        "low": low,
        "high": high,
        "pcc": None if np.isnan(pcc) else pcc,
        "levels": base64.b64encode(levels.tobytes()).decode(),
    }


def _jpeg(rgb: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
