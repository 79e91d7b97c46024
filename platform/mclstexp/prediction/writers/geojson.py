"""Chosen genes of a slide as GeoJSON that QuPath opens: one square a tile, with its values as measurements.

QuPath reads a FeatureCollection whose coordinates are pixels of the full-resolution image, from the upper left corner
of the scanned region where a file says it, as those of some scanners do (openslide.bounds-x), else of the whole image;
tables and h5ad files count from the whole image's (File > Import objects from file; https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html).
`properties` hold `objectType` ("detection": QuPath keeps hundreds of thousands of them without asking to edit each),
`name`, `isLocked` and `measurements`, an object of numbers since QuPath 0.4; Measure > Show measurement maps colours
the squares by them. Text takes about ten times the room of the table, so it is written for chosen genes alone.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from mclstexp.data.genes import AFTER_NAME, unique_labels
from mclstexp.prediction.parts import SlideRecord
from mclstexp.prediction.writers.table import OutputInfo, provenance, row_groups, tile_edge, tile_left

_SPOT_COLUMNS = ["spot_id", "x_px", "y_px", "similarity"]


def write_geojson(path: Path, table: Path, record: SlideRecord, facts: OutputInfo, columns: Sequence[int]) -> None:
    """Writes a FeatureCollection of the slide's tiles, one line each; a row group is in memory at a time.

    A measurement that is not a number (the similarity of a model without a bank) is left out, as JSON has no NaN.
    The member `prediction` of the collection holds `provenance`; readers of GeoJSON pass over members that they do
    not know (RFC 7946, https://datatracker.ietf.org/doc/html/rfc7946#section-6.1).

    Args:
        path: local file to write.
        table: what `slide_table.write_table` wrote.
        record: the slide, with the number of its missing tiles.
        facts: the model.
        columns: chosen columns of its panel.
    """
    chosen = facts.panel.take(columns)
    names = chosen.gene_id
    shown = unique_labels(chosen.names(), names, form=AFTER_NAME)
    labels = dict(zip(["similarity", *names], ["similarity", *shown], strict=True))
    with open(path, "w", encoding="utf-8") as file:
        origin = json.dumps(provenance(record, facts), ensure_ascii=False)
        file.write(f'{{"type":"FeatureCollection","prediction":{origin},"features":[')
        separator = "\n"
        for rows in row_groups(table, [*_SPOT_COLUMNS, *names]):
            for feature in _features(rows, record, facts, labels):
                file.write(separator + json.dumps(feature, separators=(",", ":"), ensure_ascii=False))
                separator = ",\n"
        file.write("\n]}\n")


def _features(
    rows: pa.Table, record: SlideRecord, facts: OutputInfo, labels: dict[str, str]
) -> Iterator[dict[str, object]]:
    """Yields a feature a row; `labels` names its measurements by column."""
    corners = [tile_left(rows[name].to_numpy(), record, facts).tolist() for name in ("x_px", "y_px")]
    values = zip(*(_shortest(rows[name].to_numpy()) for name in labels), strict=True)
    edge, (x, y) = tile_edge(record, facts), record.scanned_from_px
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
