"""The overview of a slide: maps in the position of the tiles, in the colours of their values, and not too large."""

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from staged_slides import INFO, TILE_PX, publish, stage, write

from mclstexp.data.genes import GenePanel
from mclstexp.prediction.draw import draw_slide
from mclstexp.prediction.writers.overview import MAX_GENES, draw_overview, paint
from mclstexp.prediction.writers.slide import RECORD_KEY, PredictedSlide


def test_a_gradient_shows_at_its_position_in_the_overview(tmp_path: Path) -> None:
    """Two pictures that differ in one gene differ exactly on its map, whose tiles then have their own colours."""
    slide, pictures = stage(tmp_path, "G", 20, 12), {}
    column, row = ((slide.grid[name].to_numpy() // TILE_PX) for name in ("x_px", "y_px"))
    ramp = column + (row == 2) * (column == 15) * -10.0
    for name, values in {"seen": ramp, "other": 19 - ramp}.items():
        slide.answer.values[:, 1] = values
        write(slide)
        publish(slide, tmp_path / name)
        draw_slide(str(tmp_path / name), "G", ["FASN"])
        pictures[name] = np.asarray(Image.open(tmp_path / name / "overviews" / "G.png").convert("RGB")).astype(int)
    differ = (pictures["seen"] != pictures["other"]).any(axis=2)
    top, bottom, left, right = (edge for axis in (1, 0) for edge in np.flatnonzero(differ.any(axis=axis))[[0, -1]])
    assert (right - left) / (bottom - top) == pytest.approx(20 / 12, rel=0.03)
    assert left > 0.45 * pictures["seen"].shape[1], "the slide itself comes first"
    limits = np.quantile(ramp, [0.01, 0.99])
    for tile in range(len(ramp)):
        shade = (ramp[tile] - limits[0]) / (limits[1] - limits[0])
        y = top + (row[tile] + 0.5) / 12 * (bottom - top)
        x = left + (column[tile] + 0.5) / 20 * (right - left)
        expected = 255 * np.array(matplotlib.colormaps["viridis"](shade)[:3])
        assert pictures["seen"][round(y), round(x)] == pytest.approx(expected, abs=2), (row[tile], column[tile])


@pytest.mark.slow
def test_of_a_hundred_genes_over_a_long_slide_the_first_are_drawn(tmp_path: Path) -> None:
    slide = stage(tmp_path, "L", 2, 60)
    names = [f"GENE{number}" for number in range(100)]
    centres = {name: slide.grid[name].to_numpy() for name in ("x_px", "y_px")}
    table = pa.table(centres | dict.fromkeys(names, slide.answer.values[:, 0]))
    table = table.replace_schema_metadata({RECORD_KEY: slide.record.model_dump_json()})
    pq.write_table(table, tmp_path / "table.parquet")
    info, thumbnail = replace(INFO, panel=GenePanel.from_names(names)), np.full((384, 13, 3), 230, np.uint8)
    predicted = PredictedSlide("", tmp_path / "table.parquet", info, thumbnail)
    sizes = []
    for num_genes in (MAX_GENES, 100):
        draw_overview(tmp_path / "map.png", predicted, range(num_genes))
        sizes.append(Image.open(tmp_path / "map.png").size)
    assert sizes[0][1] == pytest.approx(30_000, abs=1), "the most pixels that an edge may have"
    assert sizes[1] == pytest.approx(sizes[0], abs=5), "one more line in the heading, and no more maps"


def test_paint_fills_boxes_and_means_where_they_overlap() -> None:
    rng = np.random.default_rng(3)
    first, values = rng.integers(0, (18, 9), (40, 2)), rng.normal(size=40)
    last = first + rng.integers(1, 3, (40, 2))
    expected = np.full((10, 20), np.nan)
    for y in range(10):
        for x in range(20):
            over = [k for k in range(40) if first[k, 0] <= x < last[k, 0] and first[k, 1] <= y < last[k, 1]]
            expected[y, x] = np.mean(values[over]) if over else np.nan
    boxes = [np.stack([first[:, axis], last[:, axis]]) for axis in (0, 1)]
    assert paint(*boxes, values, (10, 20)) == pytest.approx(expected, nan_ok=True)
