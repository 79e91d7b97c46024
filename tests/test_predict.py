"""Prediction of a cohort of real slide files: rows, files, what a second run does, and the job's plan."""

import json
import shutil
import subprocess
from pathlib import Path

import anndata
import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from PIL import Image
from predicted_cohort import BIG_PX, GOOD, TILE_PX, PredictedCohort, digests, job, ledger_entries, predict, write_slide

from mclstexp.errors import ConfigError, PredictError
from mclstexp.model.retrieval import retrieve
from mclstexp.model.version import ModelVersion
from mclstexp.slides.codec import decode_tile, encode_tile

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(predicted_cohort: PredictedCohort) -> ModelVersion:
    return predicted_cohort.model


@pytest.fixture(scope="module")
def slides(predicted_cohort: PredictedCohort) -> Path:
    return predicted_cohort.slides


@pytest.fixture(scope="module")
def predicted(predicted_cohort: PredictedCohort) -> Path:
    """All slides predicted in one calm run."""
    return predicted_cohort.out


def _crop(slide: Path, x_px: float, y_px: float) -> np.ndarray:
    import openslide

    corner = (int(x_px) - TILE_PX // 2, int(y_px) - TILE_PX // 2)
    return np.asarray(openslide.OpenSlide(slide).read_region(corner, 0, (TILE_PX, TILE_PX)).convert("RGB"))


@pytest.mark.parametrize("name", GOOD)
def test_a_tile_gets_what_the_model_says_of_its_pixels(
    model: ModelVersion, slides: Path, predicted: Path, name: str
) -> None:
    """Crops of some tiles, encoded as training tiles were, through the towers themselves."""
    table = pq.read_table(predicted / f"{name}.parquet")
    picked = np.linspace(0, table.num_rows - 1, 25).astype(int)
    places = [(table["x_px"][row].as_py(), table["y_px"][row].as_py()) for row in picked.tolist()]
    tiles = [
        encode_tile(_crop(slides / f"{name}.tif", *place), "jpeg", model.config.tiles.jpeg_quality) for place in places
    ]
    batch = torch.from_numpy(np.stack([decode_tile(tile) for tile in tiles])).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        queries = model.towers().embed_images(batch).numpy()
    expected = retrieve(queries, model.bank, model.config.retrieval)
    found = np.stack([table[gene].to_numpy()[picked] for gene in model.panel.gene_id], axis=1)
    assert found == pytest.approx(expected.prediction, abs=1e-3)
    assert table["similarity"].to_numpy()[picked] == pytest.approx(expected.similarity, abs=1e-3)
    assert len(np.unique(found.round(4), axis=0)) > 12, "tiles must differ for this to mean anything"


def test_every_whole_tile_on_tissue_is_there_once(predicted: Path) -> None:
    table = pq.read_table(predicted / "big1.parquet")
    spots = table["spot_id"].to_pylist()
    assert len(set(spots)) == len(spots) > 256, "several parts"
    assert len(spots) <= (BIG_PX // TILE_PX) ** 2
    data = anndata.read_h5ad(predicted / "big1.h5ad")
    assert list(data.obs_names) == spots
    assert Image.open(predicted / "overviews" / "big1.png").size[0] > 100
    assert (predicted / "geojson" / "big1.geojson").is_file()


def test_faulty_slides_are_set_aside_with_the_reason_and_blank_ones_are_empty(predicted: Path) -> None:
    found = ledger_entries(predicted)
    assert {name: entry["state"] for name, entry in found.items()} == {
        **dict.fromkeys(GOOD, "done"),
        "blank": "empty",
        "broken": "quarantined",
    }
    assert "broken.tif" in found["broken"]["reason"]
    assert found["big1"]["num_tiles"] == pq.read_metadata(predicted / "big1.parquet").num_rows
    assert {path.stem for path in predicted.glob("*.parquet")} == set(GOOD)
    assert not list((predicted / "staging").iterdir())


def test_a_second_run_does_nothing(model: ModelVersion, slides: Path, predicted: Path) -> None:
    before = digests(predicted)
    report = predict(model, slides, predicted, idle=True)
    assert (report.counts(), set(report.faults())) == ({"skipped": 5}, {"broken"})
    assert digests(predicted) == before


def test_a_run_with_other_genes_draws_what_is_done_and_predicts_nothing(
    model: ModelVersion, slides: Path, predicted: Path, tmp_path: Path
) -> None:
    shutil.copytree(predicted, tmp_path, dirs_exist_ok=True)
    names = model.panel.names()
    report = predict(model, slides, tmp_path, (names[1], names[4]), idle=True)
    assert (report.counts(), report.num_redrawn) == ({"skipped": 5}, 3)
    squares = json.loads((tmp_path / "geojson" / "big1.geojson").read_text())["features"]
    assert set(squares[0]["properties"]["measurements"]) == {"similarity", names[1], names[4]}
    after, before = digests(tmp_path), digests(predicted)
    drawn = {f"{folder}/{name}" for name in GOOD for folder in ("overviews", "geojson")}
    assert {path.rpartition(".")[0] for path in after if after[path] != before[path]} == drawn
    assert ledger_entries(tmp_path)["big1"]["genes"] == f"{names[1]},{names[4]}"
    assert predict(model, slides, tmp_path, (names[1], names[4]), idle=True).num_redrawn == 0
    assert predict(model, slides, tmp_path, idle=True).num_redrawn == 0
    (tmp_path / "small.h5ad").unlink()
    before = ledger_entries(tmp_path)["small"]
    report = predict(model, slides, tmp_path, (names[0],), idle=True)
    assert (report.num_redrawn, set(report.faults())) == (2, {"broken", "small"})
    assert "small.h5ad" in report.faults()["small"]
    assert ledger_entries(tmp_path)["small"] == before, "its pictures are still those that the ledger names"


def test_a_replaced_slide_is_done_again_and_no_other(
    model: ModelVersion, slides: Path, predicted: Path, tmp_path: Path
) -> None:
    for name in ("small", "blank"):
        (tmp_path / f"{name}.tif").write_bytes((slides / f"{name}.tif").read_bytes())
    out = tmp_path / "out"
    assert predict(model, tmp_path, out).counts() == {"done": 1, "empty": 1}
    first = digests(out)
    image = tifffile.imread(tmp_path / "small.tif")
    left = out / "staging" / "small-0123456789abcdef" / "slide.json"  # of a file that was replaced before it was done
    other = out / "staging" / "other-0123456789abcdef" / "slide.json"  # of a slide of another run
    for path in (left, other):
        path.parent.mkdir(parents=True)
        path.touch()
    write_slide(tmp_path / "small.tif", image[::-1])
    report = predict(model, tmp_path, out)
    assert report.counts() == {"done": 1, "skipped": 1}
    assert digests(out)["small.parquet"] != first["small.parquet"]
    assert list((out / "staging").iterdir()) == [other.parent]


def test_an_output_belongs_to_one_model_and_one_way_of_cutting(
    model: ModelVersion, slides: Path, predicted: Path
) -> None:
    before = digests(predicted)
    with pytest.raises(PredictError, match=r"holds predictions by .* overlap=0.0.*, asked for .*overlap=0.5"):
        predict(model, slides, predicted, overlap=0.5)
    with pytest.raises(ConfigError, match="panel"):
        predict(model, slides, predicted, ("NOGENE",))
    assert digests(predicted) == before


def test_the_job_plans_and_explains(model: ModelVersion, slides: Path, predicted: Path, tmp_path: Path) -> None:
    command, options = job(tmp_path, model, slides)
    planned = subprocess.run([*command, "--dry-run"], check=False, timeout=900, **options)
    assert planned.returncode == 0, planned.stdout
    assert "5 slides" in planned.stdout
    assert not (tmp_path / "out").exists()
    row = pq.read_table(predicted / "small.parquet").slice(5, 1).to_pylist()[0]
    asked = f"small,{row['x_px'] + 3},{row['y_px'] - 3}"
    gene = model.panel.names()[2]
    explained = subprocess.run([*command, "--explain", asked, "--genes", gene], check=False, timeout=900, **options)
    assert explained.returncode == 0, explained.stdout
    votes = np.genfromtxt(
        tmp_path / "out" / "explained" / f"small-{row['spot_id']}.csv",
        delimiter=",",
        names=True,
        dtype=None,
        encoding=None,
    )
    assert len(votes) == model.config.retrieval.k
    assert votes["weight"].sum() == pytest.approx(1, abs=1e-5)
    assert votes["weight"] @ votes[gene] == pytest.approx(row[model.panel.gene_id[2]], abs=1e-3)
