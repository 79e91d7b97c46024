"""Prediction of a cohort of real slide files: rows, files, what a second run does, and the jobs."""

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
from predicted_cohort import (
    BIG_PX,
    GOOD,
    ROOT,
    TILE_PX,
    PredictedCohort,
    digests,
    job,
    ledger_entries,
    predict,
    write_slide,
)

from mclstexp.errors import PredictError
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
def test_a_tile_gets_the_models_answer_for_its_pixels(
    model: ModelVersion, slides: Path, predicted: Path, name: str
) -> None:
    """Crops of some tiles, encoded as training tiles were, through the towers themselves."""
    table = pq.read_table(predicted / f"{name}.parquet")
    picked = np.linspace(0, table.num_rows - 1, 25).astype(int)
    centres = [(table["x_px"][row].as_py(), table["y_px"][row].as_py()) for row in picked.tolist()]
    tiles = [
        encode_tile(_crop(slides / f"{name}.tif", *centre), "jpeg", model.config.tiles.jpeg_quality)
        for centre in centres
    ]
    batch = torch.from_numpy(np.stack([decode_tile(tile) for tile in tiles])).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        queries = model.towers().embed_images(batch).numpy()
    expected = retrieve(queries, model.bank, model.config.retrieval)
    found = np.stack([table[gene].to_numpy()[picked] for gene in model.panel.gene_id], axis=1)
    assert found == pytest.approx(expected.prediction, abs=1e-3)
    assert table["similarity"].to_numpy()[picked] == pytest.approx(expected.similarity, abs=1e-3)
    assert len(np.unique(found.round(4), axis=0)) > 12, "tiles must differ for this to mean anything"


def test_every_whole_tile_on_tissue_is_predicted_once(predicted: Path) -> None:
    table = pq.read_table(predicted / "big1.parquet")
    spots = table["spot_id"].to_pylist()
    assert len(set(spots)) == len(spots) > 256, "several parts"
    assert len(spots) <= (BIG_PX // TILE_PX) ** 2
    data = anndata.read_h5ad(predicted / "big1.h5ad")
    assert list(data.obs_names) == spots


def test_faulty_slides_are_quarantined_with_the_reason_and_blank_ones_are_empty(predicted: Path) -> None:
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


def test_ledger_entries_that_name_genes_are_read_as_they_are(
    model: ModelVersion, slides: Path, predicted: Path, tmp_path: Path
) -> None:
    """As earlier versions wrote them: chosen genes, or genes that were being drawn when the run died."""
    shutil.copytree(predicted, tmp_path, dirs_exist_ok=True)
    for name, genes in (("big1", "GNAS,FASN"), ("big2", "drawing GNAS"), ("small", "")):
        path = tmp_path / "ledger" / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"genes": genes}))
    before = digests(tmp_path)
    report = predict(model, slides, tmp_path, idle=True)
    assert (report.counts(), set(report.faults())) == ({"skipped": 5}, {"broken"})
    assert report.done() == list(GOOD)
    assert digests(tmp_path) == before
    assert "genes" not in Path(report.summary).read_text()


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
    with pytest.raises(PredictError, match=r"holds predictions by .* overlap=0.0.*, this run uses .*overlap=0.5"):
        predict(model, slides, predicted, overlap=0.5)
    assert digests(predicted) == before


def test_the_job_plans_and_explains(model: ModelVersion, slides: Path, predicted: Path, tmp_path: Path) -> None:
    shutil.copytree(slides, tmp_path / "slides")
    (tmp_path / "slides" / "other.qptiff").touch()
    command, options = job(tmp_path, model, tmp_path / "slides")
    planned = subprocess.run([*command, "--dry-run"], check=False, timeout=900, **options)
    assert planned.returncode == 0, planned.stdout
    assert "5 slides" in planned.stdout
    assert "left out 1 file with other endings: .qptiff 1" in planned.stdout
    assert not (tmp_path / "out").exists()
    row = pq.read_table(predicted / "small.parquet").slice(5, 1).to_pylist()[0]
    tile = f"small,{row['x_px'] + 3},{row['y_px'] - 3}"
    gene = model.panel.names()[2]
    explained = subprocess.run([*command, "--explain", tile, "--genes", gene], check=False, timeout=900, **options)
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


def test_the_job_draws_chosen_genes_at_the_end_and_another_job_draws_others(
    model: ModelVersion, slides: Path, predicted: Path, tmp_path: Path
) -> None:
    shutil.copytree(predicted, tmp_path / "out")
    (tmp_path / "out" / "big2.h5ad").unlink()
    names = model.panel.names()
    command, options = job(tmp_path, model, slides, "--genes", f"{names[1]},{names[4]}")
    drawn = subprocess.run(command, check=False, timeout=900, **options)
    assert drawn.returncode == 2, drawn.stdout
    assert "5 skipped" in drawn.stdout
    assert "2 slides drawn" in drawn.stdout
    assert "2 slide(s) could not be predicted or drawn" in drawn.stdout
    assert "big2: it could not be drawn: there is no file" in drawn.stdout
    after, before = digests(tmp_path / "out"), digests(predicted)
    pictures = {f"overviews/{name}.{kind}" for name in ("big1", "small") for kind in ("png", "json")}
    pictures |= {f"geojson/{name}.geojson" for name in ("big1", "small")}
    assert {path for path in after if after[path] != before.get(path)} == pictures

    again = [*command[:1], str(ROOT / "jobs" / "draw.py"), "--predictions", "out", "--slides", "small"]
    other = subprocess.run([*again, "--genes", names[0]], check=False, timeout=900, **options)
    assert other.returncode == 0, other.stdout
    out = tmp_path / "out"
    assert other.stdout.rstrip().endswith(f"pictures {out}/overviews and {out}/geojson")
    changed = {path for path, digest in digests(out).items() if digest != after[path]}
    assert changed == {"overviews/small.png", "overviews/small.json", "geojson/small.geojson"}
