"""A cohort predicted from feature files alone: each tile's answer, resuming, faults, the job."""

import contextlib
import io
import shutil
import sys
from pathlib import Path

import anndata
import numpy as np
import openslide
import predict as predict_job
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from predicted_cohort import TILE_PX, digests, ledger_entries, make_slides, predict, untrained_model
from trident_files import write_features

from mclstexp.config import Config, override
from mclstexp.data.genes import GenePanel
from mclstexp.errors import PredictError, SourceError
from mclstexp.model.encoders import build_encoder
from mclstexp.model.retrieval import retrieve
from mclstexp.model.version import ModelVersion
from mclstexp.prediction import run
from mclstexp.prediction.explain import explain_tile
from mclstexp.prediction.feature_cohort import open_feature_cohort
from mclstexp.prediction.forecast import forecast
from mclstexp.prediction.pipeline import WorkerCounts
from mclstexp.prediction.run import Report, predict_cohort
from mclstexp.progress import hidden
from mclstexp.slides.codec import decode_tile, encode_tile

pytestmark = [pytest.mark.ray, pytest.mark.slow]
AT_1_UM = {"encoder": "small_cnn", "patch_size": TILE_PX, "magnifications": (10, 10)}


@pytest.fixture(scope="module")
def model(tiles: str, tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    return untrained_model(tiles, tmp_path_factory.mktemp("frozen") / "model", freeze_encoder=True)


def random_features(model: ModelVersion, num_tiles: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    width = sum(model.encoder.record.widths)
    corners = np.stack([np.arange(num_tiles) % 20, np.arange(num_tiles) // 20], axis=1) * TILE_PX
    return rng.normal(size=(num_tiles, width)).astype(np.float32), corners


@pytest.fixture(scope="module")
def slides(cohort: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one slide."""
    folder = tmp_path_factory.mktemp("images") / "slides"
    make_slides(cohort, folder)
    for path in folder.iterdir():
        if path.stem != "small":
            path.unlink()
    return folder


@pytest.fixture(scope="module")
def by_slide(model: ModelVersion, slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table of that slide as it is predicted from its image."""
    out = tmp_path_factory.mktemp("by_slide")
    assert predict(model, slides, out).counts() == {"done": 1}
    return out / "small.parquet"


def extracted(model: ModelVersion, slide: Path, corners: np.ndarray) -> np.ndarray:
    """Tiles read by OpenSlide and stored as the model's were, through the encoder on its own."""
    image = openslide.OpenSlide(slide)
    crops = [np.asarray(image.read_region(tuple(c), 0, (TILE_PX, TILE_PX)).convert("RGB")) for c in corners.tolist()]
    quality = model.config.tiles.jpeg_quality
    stored = np.stack([decode_tile(encode_tile(crop, "jpeg", quality)) for crop in crops])
    record = model.encoder.record
    encoder = build_encoder(record.name, TILE_PX).eval()
    encoder.load_state_dict(model.encoder.state())
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (record.mean, record.std))
    with torch.inference_mode():
        return encoder((torch.from_numpy(stored).permute(0, 3, 1, 2) / 255 - mean) / std).numpy()


@pytest.fixture(scope="module")
def folder(model: ModelVersion, slides: Path, by_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of a slide of several parts, of a real one, one of a single tile, an empty one, and three refused."""
    folder = tmp_path_factory.mktemp("extracted") / "10x_32px_0px_overlap" / "features_small_cnn"
    table = pq.read_table(by_slide)
    corners = np.stack([table[name].to_numpy().astype(int) - TILE_PX // 2 for name in ("x_px", "y_px")], axis=1)
    write_features(folder / "real.h5", extracted(model, slides / "small.tif", corners), corners, **AT_1_UM)
    for seed, (name, num_tiles) in enumerate({"large": 700, "small": 1, "none": 0}.items()):
        write_features(folder / f"{name}.h5", *random_features(model, num_tiles, seed), slide_px=(800, 1200), **AT_1_UM)
    features, corners = random_features(model, 300, 9)
    write_features(folder / "coarse.h5", features, corners, **AT_1_UM | {"magnifications": (10, 5)})
    write_features(folder / "other.h5", features, corners, **AT_1_UM | {"encoder": "uni_v1"})
    features[280] = np.nan
    write_features(folder / "nan.h5", features, corners, **AT_1_UM)
    return folder


def predict_features(model: ModelVersion, folder: Path | str, out: Path | str, idle: bool = False) -> Report:
    config = override(Config(), {"predict.num_cpus": 3}).predict
    cohort = open_feature_cohort(str(folder), model, str(out), config)
    with pytest.MonkeyPatch.context() as patch:
        if idle:
            patch.setattr(run, "pipeline", None)
        return predict_cohort(model, cohort, str(out), hidden, config)


@pytest.fixture(scope="module")
def predicted(model: ModelVersion, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("from_features")
    assert predict_features(model, folder, out).counts() == {"done": 3, "empty": 1, "quarantined": 3}
    return out


def answers(table: Path, panel: GenePanel) -> np.ndarray:
    rows = pq.read_table(table)
    return np.stack([rows[gene].to_numpy() for gene in panel.gene_id], axis=1)


def test_a_tile_gets_the_models_answer_for_its_features(model: ModelVersion, folder: Path, predicted: Path) -> None:
    """Through the towers themselves."""
    for seed, (name, num_tiles) in enumerate({"large": 700, "small": 1}.items()):
        features, corners = random_features(model, num_tiles, seed)
        with torch.inference_mode():
            queries = model.towers().embed_images(torch.from_numpy(features)).numpy()
        expected = retrieve(queries, model.bank, model.config.retrieval)
        table = pq.read_table(predicted / f"{name}.parquet")
        assert answers(predicted / f"{name}.parquet", model.panel) == pytest.approx(expected.prediction, abs=1e-4)
        assert table["similarity"].to_numpy() == pytest.approx(expected.similarity, abs=1e-5)
        assert table["spot_id"].to_pylist() == [str(row) for row in range(num_tiles)]
        np.testing.assert_array_equal(table["x_px"].to_numpy(), corners[:, 0] + TILE_PX / 2)
        np.testing.assert_array_equal(table["y_um"].to_numpy(), corners[:, 1] + TILE_PX / 2)
        data = anndata.read_h5ad(predicted / f"{name}.h5ad")
        assert list(data.obs_names) == table["spot_id"].to_pylist()
        assert data.uns["prediction"]["slide_mpp_source"] == "magnification"
        assert np.asarray(Image.open(predicted / f"previews/{name}.jpg")).shape[2] == 3


def test_faulty_files_are_quarantined_with_both_values(predicted: Path) -> None:
    found = ledger_entries(predicted)
    assert {name: entry["state"] for name, entry in found.items()} == {
        **dict.fromkeys(("large", "real", "small"), "done"),
        "none": "empty",
        **dict.fromkeys(("coarse", "other", "nan"), "quarantined"),
    }
    assert "64 um wide (64 px at 1 um/px" in found["coarse"]["reason"]
    assert "takes 32 um" in found["coarse"]["reason"]
    assert "encoder uni_v1, the model takes small_cnn" in found["other"]["reason"]
    assert "tile 280 are not finite" in found["nan"]["reason"]
    assert {path.stem for path in predicted.glob("*.parquet")} == {"large", "real", "small"}
    assert not list((predicted / "staging").iterdir())


def test_a_second_run_does_nothing(model: ModelVersion, folder: Path, predicted: Path) -> None:
    before = digests(predicted)
    report = predict_features(model, folder, predicted, idle=True)
    assert (report.counts(), set(report.faults())) == ({"skipped": 7}, {"coarse", "other", "nan"})
    assert digests(predicted) == before


def test_a_run_that_stopped_midway_ends_with_the_same_bytes_and_a_new_file_is_predicted(
    model: ModelVersion, folder: Path, predicted: Path, tmp_path: Path
) -> None:
    """The driver dies at its second row: parts that are written stay, and are not made again."""
    out, features = tmp_path / "out", tmp_path / folder.name
    shutil.copytree(predicted, out)
    for path in out.rglob("large.*"):  # as if there had been no such file yet
        path.unlink()
    features.mkdir()
    shutil.copy(folder / "large.h5", features)
    rows = []

    def stop(_: object, row: dict) -> None:
        rows.append(row)
        if len(rows) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.CohortRun, "_take", stop)
        with pytest.raises(KeyboardInterrupt):
            predict_features(model, features, out)
    (staging,) = (out / "staging").iterdir()
    assert len(list((staging / "tiles").glob("*.safetensors"))) >= 2
    shutil.copytree(folder, features, dirs_exist_ok=True)
    write_features(features / "small.h5", *random_features(model, 2, 5), **AT_1_UM)
    report = predict_features(model, features, out)
    assert report.counts() == {"done": 2, "skipped": 5}
    assert report.num_tiles < 700
    assert pq.read_metadata(out / "small.parquet").num_rows == 2
    found, expected = (
        {name: digest for name, digest in digests(each).items() if "small" not in name} for each in (out, predicted)
    )
    assert found == expected
    assert "large.parquet" in found


def test_features_of_the_same_tiles_give_what_the_slide_gives(
    model: ModelVersion, by_slide: Path, predicted: Path
) -> None:
    found, expected = (answers(table, model.panel) for table in (predicted / "real.parquet", by_slide))
    assert found == pytest.approx(expected, abs=1e-3)


def test_an_output_takes_no_slides_beside_features(model: ModelVersion, predicted: Path, slides: Path) -> None:
    with pytest.raises(PredictError, match=r"tiles=features of small_cnn, this run uses .*tiles=a grid"):
        predict(model, slides, predicted)


def test_a_plan_and_an_explanation_need_no_slide(
    model: ModelVersion, folder: Path, predicted: Path, tmp_path: Path
) -> None:
    cohort = open_feature_cohort(str(folder), model, str(tmp_path), Config().predict)
    planned = forecast(cohort, model, WorkerCounts(1, 1, False))
    assert "7 slides, 7 of them inspected: 2 cannot be predicted" in planned
    assert "(0 to 700 per slide)" in planned
    name, votes = explain_tile(cohort, model, "large", 50, 20, ())
    best = pq.read_table(predicted / "large.parquet")["similarity"][1].as_py()
    assert (name, votes["similarity"].max()) == ("1", pytest.approx(best, abs=1e-4))
    features, corners = random_features(model, 300, 9)
    features[20] = np.nan  # among those that are timed
    write_features(tmp_path / folder.name / "nan.h5", features, corners, **AT_1_UM)
    faulty = open_feature_cohort(str(tmp_path / folder.name), model, str(tmp_path), Config().predict)
    with pytest.raises(SourceError, match="slide nan cannot be timed: features of tile"):
        forecast(faulty, model, WorkerCounts(1, 1, False))


def test_the_job_predicts_a_sheets_slides_from_their_features(
    model: ModelVersion, folder: Path, predicted: Path, tmp_path: Path
) -> None:
    """No image is there, and features of one slide alone; a file is named after the image."""
    sheet = tmp_path / "sheet.csv"
    sheet.write_text("section_id,patient_id,image,format\nS1,P1,large.ome.tif,slide\nS2,P2,gone.svs,slide\n")
    (tmp_path / "model").mkdir()
    model.save(tmp_path / "model")
    arguments = ["--model", tmp_path / "model", "--samples", sheet, "--features", folder, "--out", tmp_path / "out"]
    arguments += ["--genes", model.panel.names()[0], "--predict.num_cpus", 3, "--verbose"]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
        patch.setattr(predict_job._launch, "connect", lambda *_: None)
        with pytest.raises(PredictError, match="S2: there is no file"):
            predict_job.main()
    assert "1 done, 0 empty, 0 skipped, 0 quarantined, 1 failed" in printed.getvalue()
    found, expected = (
        answers(path, model.panel) for path in (tmp_path / "out/S1.parquet", predicted / "large.parquet")
    )
    assert found == pytest.approx(expected, abs=1e-5)
    assert pq.read_table(tmp_path / "out/S1.parquet")["patient_id"][0].as_py() == "P1"
    assert (tmp_path / "out/overviews/S1.png").is_file()
