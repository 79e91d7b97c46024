"""Publishing of staged slides that are damaged or incomplete, and the memory that publishing may take."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from staged_slides import CONFIDENCE, GENES, INFO, PANEL, Slide, publish, stage, write

from mclstexp.data.genes import GenePanel
from mclstexp.errors import PartError, StorageError
from mclstexp.prediction.draw import draw_slide
from mclstexp.prediction.parts import parts_done
from mclstexp.prediction.publish import publish_slide
from mclstexp.prediction.writers.geojson import write_geojson
from mclstexp.prediction.writers.h5ad import write_h5ad
from mclstexp.prediction.writers.slide import PredictedSlide
from mclstexp.prediction.writers.table import info_of, write_table


@pytest.fixture(scope="module")
def slides(staged: dict[str, Slide]) -> dict[str, Slide]:
    return staged


def test_the_table_comes_last(slides: dict[str, Slide], tmp_path: Path) -> None:
    (tmp_path / "previews").write_text("a file where the folder should be")
    with pytest.raises(StorageError):
        publish_slide(str(slides["A"].staging), str(tmp_path), INFO)
    assert (tmp_path / "A.h5ad").exists()
    assert not (tmp_path / "A.parquet").exists()


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), "damaged and is removed"),
        (lambda path: path.write_bytes(b""), "damaged and is removed"),
        (lambda path: path.write_bytes((path.parent / "00002.safetensors").read_bytes()), r"float32 \(88, 6\)"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_damaged_part_is_named_and_counts_as_not_done(
    slides: dict[str, Slide], tmp_path: Path, damage: object, fault: str
) -> None:
    staging = tmp_path / "A-key"
    shutil.copytree(slides["A"].staging, staging)
    assert parts_done(str(staging)) == {0, 1, 2}
    damage(staging / "tiles" / "00001.safetensors")
    with pytest.raises(PartError, match=rf"A-key/tiles/00001.safetensors .*{fault}"):
        publish_slide(str(staging), str(tmp_path / "out"), INFO)
    assert parts_done(str(staging)) == {0, 2}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["grid.parquet", "slide.json", "thumbnail.jpg"])
def test_another_damage_of_the_staging_folder_is_named(slides: dict[str, Slide], tmp_path: Path, file: str) -> None:
    shutil.copytree(slides["A"].staging, tmp_path / "A")
    (tmp_path / "A" / file).write_bytes((slides["C"].staging / file).read_bytes()[:-30])
    with pytest.raises(StorageError, match=rf"A/{file} is damaged.*remove .*A and run the same command again"):
        publish_slide(str(tmp_path / "A"), str(tmp_path / "out"), INFO)
    if file == "thumbnail.jpg":
        return
    (tmp_path / "A" / file).write_bytes((slides["C"].staging / file).read_bytes())
    with pytest.raises(StorageError, match=r"grid.parquet is damaged: it has (256|600) tiles"):
        publish_slide(str(tmp_path / "A"), str(tmp_path / "out"), INFO)


def test_without_a_threshold_or_a_bank_nothing_is_called_out_of_distribution(tmp_path: Path) -> None:
    """A direct regression: no similarity, no donors."""
    slide = stage(tmp_path, "R", 5, 4)
    for name in CONFIDENCE:
        getattr(slide.answer, name)[:] = np.nan
    write(slide)
    publish_slide(str(slide.staging), str(tmp_path / "out"), replace(INFO, ood_similarity=None))
    table = pq.read_table(tmp_path / "out" / "R.parquet")
    assert table.schema.field("out_of_distribution").type == pa.bool_()
    assert table["out_of_distribution"].null_count == 20
    assert np.isnan(table["similarity"].to_numpy()).all()
    assert anndata.read_h5ad(tmp_path / "out" / "R.h5ad").obs["out_of_distribution"].isna().all()
    assert info_of(table.schema).ood_similarity is None


def test_a_slide_whose_tiles_all_lack_pixels_has_empty_files(tmp_path: Path) -> None:
    slide = stage(tmp_path, "E", 5, 4, missing=20)
    publish(slide, tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / "E.parquet").num_rows == 0
    assert anndata.read_h5ad(tmp_path / "out" / "E.h5ad").shape == (0, len(PANEL))
    draw_slide(str(tmp_path / "out"), "E", GENES)
    assert json.loads((tmp_path / "out" / "geojson" / "E.geojson").read_text())["features"] == []


@pytest.mark.slow
def test_memory_is_that_of_few_groups_of_tiles(tmp_path: Path) -> None:
    """Peak of Python and NumPy, and of Arrow, for a slide of six groups; the pictures' is that of the thumbnail."""
    num_genes, num_groups, peaks = 256, 6, {}
    info = replace(INFO, panel=GenePanel.from_names(f"G{index}" for index in range(num_genes)))
    slide = stage(tmp_path, "M", 64, 64 * num_groups)
    slide.answer.values = np.zeros((4096 * num_groups, num_genes), np.float32)
    write(slide)
    picture = np.zeros((10, 10, 3), np.uint8)
    predicted = PredictedSlide(str(slide.staging), tmp_path / "table", info, picture, slide.record)
    del slide
    writers = {
        "table": lambda: write_table(predicted.table, predicted),
        "h5ad": lambda: write_h5ad(tmp_path / "h5ad", predicted),
        "geojson": lambda: write_geojson(tmp_path / "geojson", predicted, [0]),
    }
    default = pa.default_memory_pool()
    for name, write_file in writers.items():
        pool = pa.proxy_memory_pool(default)
        pa.set_memory_pool(pool)
        tracemalloc.start()
        try:
            write_file()
            peaks[name] = (tracemalloc.get_traced_memory()[1], pool.max_memory())
        finally:
            tracemalloc.stop()
            pa.set_memory_pool(default)
    group = 4096 * num_genes * 4
    in_groups = {name: np.array(peak) / group for name, peak in peaks.items()}
    assert in_groups["table"].max() > 1, "a group has to be seen for this to mean anything"
    assert {name: peak.tolist() for name, peak in in_groups.items() if peak.max() > 4} == {}


def test_publishing_starts_without_torch() -> None:
    script = "import sys, mclstexp.prediction.publish; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "platform")}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
