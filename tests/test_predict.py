"""Prediction of real tile tables: rows, confidence, files, and what a second run does."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from mclstexp import storage
from mclstexp.config import Config, override
from mclstexp.data.genes import GenePanel, fit_panel
from mclstexp.data.images import decode_tile
from mclstexp.data.schema import load_manifest
from mclstexp.data.table import read_columns
from mclstexp.errors import ModelError
from mclstexp.inference import predict
from mclstexp.inference.bank import Bank
from mclstexp.inference.embed import embed_sections, network_of
from mclstexp.inference.model_version import ModelVersion, TrainingRecord
from mclstexp.inference.retrieval import Retrieved, retrieve
from mclstexp.model.towers import TwoTowers
from mclstexp.training.trainer import recorded_tiles

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "genes.num_genes": 10,
    "model.image_encoder": "small_cnn",
    "model.spot_layers": 1,
    "model.spot_width": 16,
    "model.embedding_dim": 8,
    "retrieval.k": 4,
    "retrieval.temperature": 0.1,
    "train.precision": "fp32",
}
pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tiles: str, tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    """An untrained model with a random bank, cut for the session's tile table."""
    manifest = load_manifest(tiles)
    config = override(Config(), SETTINGS | recorded_tiles(manifest))
    measured = [entry.section_id for entry in manifest.sections if entry.measured]
    panel: GenePanel = fit_panel(tiles, manifest, measured, config.genes)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    names = np.array([f"P{i % 3}" for i in range(40)], object)
    keys, payload = (rng.normal(size=(40, width)).astype(np.float32) for width in (8, len(panel)))
    record = TrainingRecord(
        manifest_digest="m",
        protocol="patient",
        sections=("A",),
        patients=("A",),
        validation_sections=(),
        test_sections=(),
        epochs=1,
    )
    weights = TwoTowers(config.model, len(panel), 0, manifest.tile_size_px).state_dict()
    geometry = (manifest.tile_size_px, manifest.mpp)
    version = ModelVersion(config, panel, geometry, 0, record, weights, Bank(keys, payload, names, names, names))
    folder = tmp_path_factory.mktemp("version")
    version.save(folder)
    return ModelVersion.load(folder)


@pytest.fixture(scope="module")
def predicted(model: ModelVersion, tiles: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all sections predicted."""
    out, shown = tmp_path_factory.mktemp("predicted"), []
    report = predict.predict_table(model, tiles, str(out), lambda done, total: shown.append((done, total)))
    spots = sum(entry.num_spots for entry in load_manifest(tiles).sections)
    assert shown[-1] == (spots, spots)
    assert (report.num_spots, report.skipped) == (spots, [])
    return out


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _expected(model: ModelVersion, tiles: str, name: str) -> Retrieved:
    """Embeds a section's tiles with the towers themselves, sentence by sentence, and asks the bank."""
    entry = load_manifest(tiles).section(name)
    images = [decode_tile(tile) for tile in read_columns(tiles, entry, ["image"])["image"].to_pylist()]
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        queries = model.towers().embed_images(batch).numpy()
    return retrieve(queries, model.bank, model.config.retrieval)


def test_every_tile_of_every_section_is_predicted_in_stored_order(
    model: ModelVersion, tiles: str, predicted: Path
) -> None:
    for entry in load_manifest(tiles).sections:
        table = pq.read_table(predicted / f"{entry.section_id}.parquet")
        stored = read_columns(tiles, entry, ["spot_id", "x_um"])
        assert table["spot_id"].to_pylist() == stored["spot_id"].to_pylist()
        assert table["x_um"].to_pylist() == stored["x_um"].to_pylist()
        expected = _expected(model, tiles, entry.section_id)
        found = np.stack([table[gene].to_numpy() for gene in model.panel.gene_id], axis=1)
        assert found.dtype == np.float32
        assert found == pytest.approx(expected.prediction, abs=1e-3)
        for column in ("similarity", "effective_donors", "donor_share"):
            assert table[column].to_numpy() == pytest.approx(getattr(expected, column), abs=1e-3), column
        assert len(np.unique(found.round(4), axis=0)) > len(found) // 2, "tiles must differ for this to mean anything"


def test_both_files_say_the_same_and_name_unit_and_origin(model: ModelVersion, tiles: str, predicted: Path) -> None:
    entry = load_manifest(tiles).sections[0]
    table = pq.read_table(predicted / f"{entry.section_id}.parquet")
    data = anndata.read_h5ad(predicted / f"{entry.section_id}.h5ad")
    frame = table.to_pandas()
    assert np.array_equal(data.X, frame[list(model.panel.gene_id)].to_numpy())
    assert data.X.dtype == np.float32
    assert list(data.obs_names) == frame["spot_id"].tolist()
    assert np.array_equal(data.obsm["spatial"], frame[["x_px", "y_px"]].to_numpy())
    assert data.var["symbol"].tolist() == list(model.panel.symbol)
    assert np.array_equal(data.obs["similarity"].to_numpy(), frame["similarity"].to_numpy())
    origin = dict(data.uns["prediction"])
    assert origin["unit"] == "ln(1 + 10000 * count / spot total over all genes)"
    assert (origin["model_digest"], origin["section_sha256"]) == (model.digest, entry.sha256)
    in_parquet = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert {key: in_parquet[key] for key in origin if key != "spatial_unit"} == {
        key: value for key, value in origin.items() if key != "spatial_unit"
    }
    assert in_parquet["genes"].split(",") == list(model.panel.gene_id)


def test_a_second_run_does_nothing(
    model: ModelVersion, tiles: str, predicted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "embed_sections", None)  # embedding anything would fail
    before = _digests(predicted)
    report = predict.predict_table(model, tiles, str(predicted), lambda done, total: None)
    assert report.predicted == []
    assert len(report.skipped) == len(load_manifest(tiles).sections)
    assert _digests(predicted) == before


def test_what_is_lost_or_of_another_model_is_done_again_to_the_same_bytes(
    model: ModelVersion, tiles: str, predicted: Path
) -> None:
    before = _digests(predicted)
    first, second = (entry.section_id for entry in load_manifest(tiles).sections[:2])
    (predicted / "ledger" / f"{first}.json").unlink()
    other = json.loads((predicted / "ledger" / f"{second}.json").read_text()) | {"model": "of another model"}
    (predicted / "ledger" / f"{second}.json").write_text(json.dumps(other))
    (predicted / f"{first}.parquet").write_bytes(b"half a file")
    report = predict.predict_table(model, tiles, str(predicted), lambda done, total: None)
    assert report.predicted == [first, second]
    assert _digests(predicted) == before


def test_a_section_that_is_being_replaced_counts_as_undone(
    model: ModelVersion, tiles: str, predicted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Killed between the files of a second model, the first model's entry must not vouch for them."""
    entry = load_manifest(tiles).sections[0]
    ledger = predicted / "ledger" / f"{entry.section_id}.json"
    before = ledger.read_bytes()

    def broken(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "write_h5ad", broken)
    found = _expected(model, tiles, entry.section_id)
    with pytest.raises(KeyboardInterrupt):
        predict._publish(str(predicted), tiles, entry, model, found)
    assert not predict.is_done(str(predicted), entry, model)
    ledger.write_bytes(before)


def test_a_table_of_another_geometry_is_refused(model: ModelVersion, tiles: str, tmp_path: Path) -> None:
    manifest = load_manifest(tiles)
    coarser = manifest.model_copy(update={"mpp": manifest.mpp * 1.03})
    storage.write(str(tmp_path / "manifest.json"), coarser.encode())
    with pytest.raises(ModelError, match=r"the model takes tiles of .* um/px, the table has"):
        predict.predict_table(model, str(tmp_path), str(tmp_path / "out"), lambda done, total: None)
    assert not (tmp_path / "out").exists()


def test_sections_are_embedded_in_the_order_asked_for_with_their_colours(model: ModelVersion, tiles: str) -> None:
    manifest, counted = load_manifest(tiles), []
    names = [entry.section_id for entry in manifest.sections][:3][::-1]
    embedded = dict(embed_sections(tiles, manifest, names, network_of(model), counted.append))
    assert list(embedded) == names
    assert sum(counted) == sum(manifest.section(name).num_spots for name in names)
    for name, arrays in embedded.items():
        stored = read_columns(tiles, manifest.section(name), ["image"])["image"].to_pylist()
        pixels = np.stack([decode_tile(tile) for tile in stored]) / 255
        expected = np.concatenate([pixels.mean(axis=(1, 2)), pixels.std(axis=(1, 2))], axis=1)
        assert arrays["rgb"] == pytest.approx(expected, abs=1e-4)
        norms = np.linalg.norm(arrays["embedding"], axis=1)
        assert norms == pytest.approx(np.ones(len(stored)), abs=1e-4)


def test_the_job_takes_a_sheet_of_slides(
    model: ModelVersion, cohort: str, tiles: str, predicted: Path, tmp_path: Path
) -> None:
    """The H&E-only slide, from its image to the same prediction as from the prepared table."""
    sheet = pd.read_csv(cohort, dtype=str, keep_default_na=False)
    slide = sheet[sheet["format"] == "slide"].copy()
    for column in ("image",):
        slide[column] = [str(Path(cohort).parent / value) for value in slide[column]]
    slide.to_csv(tmp_path / "slides.csv", index=False)
    (tmp_path / "model").mkdir()
    model.save(tmp_path / "model")
    command = [sys.executable, str(ROOT / "jobs" / "predict.py"), "--model", "model", "--samples", "slides.csv"]
    command += ["--out", "out", "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db", "--cluster.object_store_mb", "256"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    planned = subprocess.run([*command, "--dry-run"], cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert planned.returncode == 0, planned.stderr
    assert not (tmp_path / "out").exists()
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().splitlines()[-1] == "predictions out"
    name = slide["section_id"].iloc[0]
    table = pq.read_table(tmp_path / "out" / f"{name}.parquet")
    reference = pq.read_table(predicted / f"{name}.parquet")
    assert table["spot_id"].equals(reference["spot_id"])
    found, expected = (
        np.stack([one[gene].to_numpy() for gene in model.panel.gene_id], axis=1) for one in (table, reference)
    )
    assert found == pytest.approx(expected, abs=1e-4)
