"""Scores of a slide's parts become expression when all are known: against plain NumPy over all pairs of tiles."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import anndata
import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.spatial.distance import cdist
from staged_slides import INFO, PANEL, Slide, stage, write

from mclstexp.data.genes import GenePanel
from mclstexp.errors import PartError
from mclstexp.model.decode import SlideDecoder
from mclstexp.model.level import Level
from mclstexp.prediction.parts import num_parts
from mclstexp.prediction.publish import publish_slide
from mclstexp.prediction.writers.slide import OutputInfo

ROOT = Path(__file__).parents[1]
NUM_PROGRAMS, NUM_COMPONENTS = 4, 7


def random_info(panel: GenePanel, num_programs: int = NUM_PROGRAMS, num_components: int = NUM_COMPONENTS) -> OutputInfo:
    """What finishing tasks get of a program model whose neighbourhood is two tiles wide."""
    rng, num_genes = np.random.default_rng(1), len(panel)
    level = Level(
        components=rng.normal(size=(9, num_components)),
        coefficients=rng.normal(size=(num_components, num_genes)),
        intercept=rng.normal(size=num_genes),
        mean=rng.normal(size=num_genes),
        share=0.7,
    )
    decoder = SlideDecoder(9.0, rng.normal(size=(num_programs, num_genes)), level)
    return replace(INFO, panel=panel, decoder=decoder)


def with_scores(slide: Slide, decoder: SlideDecoder) -> Slide:
    """Stages a slide with random scores and sums in the place of expression."""
    rng, num_tiles = np.random.default_rng(2), len(slide.grid)
    slide.answer.values = rng.normal(size=(num_tiles, decoder.num_values)).astype(np.float32)
    slide.answer.spread = rng.random(num_tiles, np.float32)
    scored = replace(slide, sums=rng.normal(size=(num_parts(num_tiles), decoder.num_sums)))
    write(scored)
    return scored


def expected(slide: Slide, info: OutputInfo) -> np.ndarray:
    """All tiles against all others, as the definition says."""
    decoder, complete = info.decoder, slide.complete
    own, given = np.split(slide.answer.values[complete].astype(np.float64), 2, axis=1)
    xy = slide.centre_px * slide.record.mpp
    distance = cdist(xy, xy)
    width = decoder.neighbour_um
    weight = np.exp(-(distance**2) / (2 * width**2)) * ((distance > 1) & (distance <= 4 * width))
    total = weight.sum(axis=1, keepdims=True)
    scores = own + np.divide(weight @ given, total, out=np.zeros_like(own), where=total > 0)
    level = decoder.level
    probed = slide.sums.sum(axis=0) / complete.sum() @ level.coefficients + level.intercept
    return level.mean + 0.7 * (probed - level.mean) + (scores - scores.mean(axis=0)) @ decoder.decoder


def table_of(slide: Slide, info: OutputInfo, out: Path) -> np.ndarray:
    publish_slide(str(slide.staging), str(out), info)
    table = pq.read_table(out / f"{slide.record.slide_id}.parquet")
    assert table["spot_id"].to_pylist() == slide.grid.loc[slide.complete, "spot_id"].tolist()
    return np.stack([table[gene].to_numpy() for gene in info.panel.gene_id], axis=1)


@pytest.mark.parametrize(("across", "down", "missing"), [(30, 20, 0), (30, 20, 37), (66, 64, 50)])
def test_a_table_has_what_all_tiles_of_the_slide_say_together(
    tmp_path: Path, across: int, down: int, missing: int
) -> None:
    """A last short part; tiles without pixels, which nobody counts; more than one row group."""
    info = random_info(PANEL)
    slide = with_scores(stage(tmp_path, "A", across, down, scale=1.37, missing=missing), info.decoder)
    found = table_of(slide, info, tmp_path / "out")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected(slide, info), atol=2e-5)
    np.testing.assert_array_equal(anndata.read_h5ad(tmp_path / "out" / "A.h5ad").X, found)


def test_a_tile_is_no_neighbour_of_one_at_the_same_place(tmp_path: Path) -> None:
    info = random_info(PANEL)
    slide = stage(tmp_path, "A", 20, 15, given=True)
    for columns, shift in ((["x_px", "y_px"], 0.2), (["x_um", "y_um"], 0.1)):
        slide.grid.loc[1::2, columns] = slide.grid.loc[0::2, columns].to_numpy() + shift
    slide = with_scores(slide, info.decoder)
    np.testing.assert_allclose(table_of(slide, info, tmp_path / "out"), expected(slide, info), atol=2e-5)


def test_one_tile_is_its_slides_level(tmp_path: Path) -> None:
    info = random_info(PANEL)
    slide = with_scores(stage(tmp_path, "A", 1, 1), info.decoder)
    level = info.decoder.level
    probed = slide.sums[0] @ level.coefficients + level.intercept
    np.testing.assert_allclose(table_of(slide, info, tmp_path / "out")[0], 0.7 * probed + 0.3 * level.mean, atol=1e-5)


def test_a_slide_whose_tiles_all_lack_pixels_has_empty_files(tmp_path: Path) -> None:
    info = random_info(PANEL)
    slide = with_scores(stage(tmp_path, "A", 20, 15, missing=300), info.decoder)
    assert table_of(slide, info, tmp_path / "out").shape == (0, len(PANEL))
    assert anndata.read_h5ad(tmp_path / "out" / "A.h5ad").shape == (0, len(PANEL))


def test_parts_of_another_kind_of_model_are_refused(tmp_path: Path) -> None:
    slide, info = stage(tmp_path, "A", 20, 15), random_info(PANEL)
    with pytest.raises(
        PartError, match=r"sums float64 \(0,\).*expected.*sums float64 \(7,\).*values float32 \(256, 8\)"
    ):
        publish_slide(str(slide.staging), str(tmp_path / "out"), info)


@dataclass(frozen=True)
class Finished:
    """How a process that finished a slide ended."""

    modules: list[str]
    """Heavy modules that it imported."""
    peak_kib: int


def finish_in_a_process(slide: Slide, info: OutputInfo, folder: Path) -> Finished:
    """Writes the table of a slide as a finishing task does, with its model's part by way of the object store."""
    (folder / "info.pkl").write_bytes(pickle.dumps((str(slide.staging), info)))
    code = """
import json, pickle, resource, sys
from pathlib import Path
from mclstexp.prediction.parts import read_record
from mclstexp.prediction.publish import publish_slide
from mclstexp.prediction.writers.slide import PredictedSlide
from mclstexp.prediction.writers.table import write_table
staging, info = pickle.loads(Path(sys.argv[1], "info.pkl").read_bytes())
table = Path(sys.argv[1], "table.parquet")
write_table(table, PredictedSlide(staging, table, info, None, read_record(staging)))
heavy = [name for name in ("torch", "sklearn", "mlflow") if name in sys.modules]
print(json.dumps([heavy, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return Finished(*json.loads(done.stdout))


def test_finishing_imports_neither_torch_nor_scikit_learn(tmp_path: Path) -> None:
    info = random_info(PANEL)
    slide = with_scores(stage(tmp_path, "A", 20, 15), info.decoder)
    assert finish_in_a_process(slide, info, tmp_path).modules == []
    assert pq.read_metadata(tmp_path / "table.parquet").num_rows == 300


@pytest.mark.slow
def test_memory_hardly_grows_with_the_slide(tmp_path: Path) -> None:
    """A model of usual size; scores of 10 times as many tiles cost 140 bytes each."""
    info = random_info(GenePanel.from_names(f"G{gene}" for gene in range(1000)), 16, 256)
    peaks = []
    for side in (100, 316):
        folder = tmp_path / str(side)
        folder.mkdir()
        slide = with_scores(stage(folder, "A", side, side), info.decoder)
        peaks.append(finish_in_a_process(slide, info, folder).peak_kib)
        shutil.rmtree(folder)
    assert peaks[1] < 1.2 * peaks[0], peaks
