"""Chosen genes of a slide as GeoJSON for QuPath: one square per tile, with its values as measurements.

QuPath reads a FeatureCollection whose coordinates are pixels of the full-resolution image. They count from the upper
left corner of the scanned region if the file states one, as those of some scanners do (openslide.bounds-x), else from
the corner of the whole image; tables and h5ad files always count from the corner of the whole image (File > Import
objects from file; https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html).
`properties` hold `objectType` ("detection": QuPath keeps hundreds of thousands of them without asking to edit each),
`name`, `isLocked` and `measurements`, an object of numbers since QuPath 0.4; Measure > Show measurement maps colours
the squares by them. Text takes about ten times the space of the table, so it is written for chosen genes only.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from mclstexp.data.genes import AFTER_NAME, unique_labels
from mclstexp.prediction.writers.slide import PredictedSlide, provenance, tile_edge, tile_left
from mclstexp.prediction.writers.table import row_groups

_SPOT_COLUMNS = ["spot_id", "x_px", "y_px", "similarity"]


def write_geojson(path: Path, slide: PredictedSlide, columns: Sequence[int]) -> None:
    """Writes a FeatureCollection of the slide's tiles, one line each, with one row group in memory at a time.

    JSON has no NaN, so a measurement that is NaN (the similarity of a model without a bank) is left out. The member
    `prediction` of the collection holds `provenance`; readers of GeoJSON ignore members that they do not know (RFC
    7946, https://datatracker.ietf.org/doc/html/rfc7946#section-6.1).

    Args:
        path: local file to write.
        slide: its table is written.
        columns: chosen columns of its panel.
    """
    chosen = slide.info.panel.take(columns)
    names = chosen.gene_id
    shown = unique_labels(chosen.names(), names, form=AFTER_NAME)
    labels = dict(zip(["similarity", *names], ["similarity", *shown], strict=True))
    with open(path, "w", encoding="utf-8") as file:
        origin = json.dumps(provenance(slide), ensure_ascii=False)
        file.write(f'{{"type":"FeatureCollection","prediction":{origin},"features":[')
        separator = "\n"
        for rows in row_groups(slide.table, [*_SPOT_COLUMNS, *names]):
            for feature in _features(rows, slide, labels):
                file.write(separator + json.dumps(feature, separators=(",", ":"), ensure_ascii=False))
                separator = ",\n"
        file.write("\n]}\n")


def _features(rows: pa.Table, slide: PredictedSlide, labels: dict[str, str]) -> Iterator[dict[str, object]]:
    """Yields one feature per row; `labels` names its measurements by column."""
    corners = [tile_left(rows[name].to_numpy(), slide).tolist() for name in ("x_px", "y_px")]
    values = zip(*(_shortest(rows[name].to_numpy()) for name in labels), strict=True)
    edge, (x, y) = tile_edge(slide), slide.record.scanned_from_px
    for name, left, top, row in zip(rows["spot_id"].to_pylist(), *corners, values, strict=True):
        measured = {label: value for label, value in zip(labels.values(), row, strict=True) if np.isfinite(value)}
        properties = {"objectType": "detection", "name": name, "isLocked": False, "measurements": measured}
        yield {"type": "Feature", "geometry": _square(left - x, top - y, edge), "properties": properties}


def _square(left: float, top: float, edge: float) -> dict[str, object]:
    right, bottom = left + edge, top + edge
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    return {"type": "Polygon", "coordinates": [ring]}


def _shortest(values: np.ndarray) -> list[float]:
    """Returns float32 values as floats with the fewest digits that mean the same float32."""
    return [float(str(value)) for value in values]
