"""A program model over slides: parts, however they were made, become the whole slide's answer."""

from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import openslide
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from predicted_cohort import BIG_PX, TILE_PX, digests, predict, write_slide
from program_version import program_version
from random_version import random_version
from staged_slides import stage, write

from mclstexp.config import Config
from mclstexp.errors import ModelError
from mclstexp.model.answer import answerer_of
from mclstexp.model.calibration import SPREAD
from mclstexp.model.embed import network_of
from mclstexp.model.retrieval import Retrieved
from mclstexp.model.version import ModelVersion
from mclstexp.prediction import run
from mclstexp.prediction.cohort import open_cohort, plan_of
from mclstexp.prediction.explain import explain_tile, shares
from mclstexp.prediction.feature_cohort import feature_needs
from mclstexp.prediction.forecast import forecast
from mclstexp.prediction.parts import CONFIDENCE, PART_TILES
from mclstexp.prediction.pipeline import WorkerCounts
from mclstexp.prediction.plan import SlideSource, key
from mclstexp.prediction.publish import publish_slide
from mclstexp.prediction.writers.slide import OutputInfo
from mclstexp.prediction.writers.table import info_of
from mclstexp.settings import PredictConfig
from mclstexp.slides.codec import decode_tile, encode_tile

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    """Two layers of the encoder, saved and loaded."""
    folder = tmp_path_factory.mktemp("model")
    program_version(image_layers=("third", "pooled")).save(folder)
    return ModelVersion.load(folder)


def expression(table: Path, model: ModelVersion) -> np.ndarray:
    rows = pq.read_table(table)
    return np.stack([rows[gene].to_numpy() for gene in model.panel.gene_id], axis=1)


def test_parts_are_answered_alone_and_equal_the_whole_slide(model: ModelVersion, tmp_path: Path) -> None:
    """Tiles next to a part's boundary too: neighbours, centring and level know no parts. Missing tiles do not count."""
    slide = stage(tmp_path, "A", 30, 20, scale=0.5, missing=11)
    rng = np.random.default_rng(0)
    tiles = (rng.integers(40, 220, (600, 1, 1, 3)) + rng.normal(0, 15, (600, TILE_PX, TILE_PX, 1))).clip(0, 255)
    tiles = tiles.astype(np.uint8)
    tiles[~slide.complete] = 0
    answer = answerer_of(model).build(CPU)
    starts = range(0, 600, PART_TILES)
    parts = [answer((tiles[at : at + PART_TILES],), slide.complete[at : at + PART_TILES]) for at in starts]
    slide.answer.values = np.concatenate([part.values for part in parts])
    for name in (*CONFIDENCE, SPREAD):
        setattr(slide.answer, name, np.concatenate([part.confidence[name] for part in parts]))
    slide = type(slide)(**vars(slide) | {"sums": np.stack([part.sums for part in parts])})
    write(slide)
    publish_slide(str(slide.staging), str(tmp_path / "out"), OutputInfo.of_model(model, intervals=True))
    embedding = network_of(model).build(CPU)(tiles[slide.complete])
    expected = model.predict(embedding, slide.centre_px * slide.record.mpp)
    table = tmp_path / "out" / "A.parquet"
    np.testing.assert_allclose(expression(table, model), expected.prediction, atol=1e-5)
    for name in (*CONFIDENCE, SPREAD):
        np.testing.assert_allclose(pq.read_table(table)[name].to_numpy(), getattr(expected, name), rtol=1e-5)
    assert expression(table, model).std(axis=0).min() > 0.01, "tiles must differ for this to mean anything"
    check_doubt(table, model, expected)


def check_doubt(table: Path, model: ModelVersion, expected: Retrieved) -> None:
    """Intervals and flags of a published slide, from the numbers in the version's files."""
    assert model.calibration is not None
    rows, data = pq.read_table(table), anndata.read_h5ad(table.with_suffix(".h5ad"))
    scale = model.calibration.scale
    signs = np.log(np.stack([expected.spread, 1 - expected.similarity], axis=1))
    of_tile = np.exp(scale.strength * ((signs.clip(scale.low, scale.high) - scale.median) @ scale.slopes))
    np.testing.assert_allclose(rows["interval_scale"].to_numpy(), of_tile, rtol=1e-3)
    abstain = (expected.similarity < 0.2) | (expected.spread > model.calibration.max_spread)
    assert rows["abstain"].to_pylist() == abstain.tolist() == data.obs["abstain"].tolist()
    assert 0 < abstain.sum() < len(abstain)
    half_width = of_tile[:, None] * model.calibration.half_width
    np.testing.assert_allclose(data.layers["lower"], expected.prediction - half_width, atol=1e-3)
    np.testing.assert_allclose(data.layers["upper"], expected.prediction + half_width, atol=1e-3)
    assert {values.dtype for values in data.layers.values()} == {np.dtype("float32")}
    metadata = {name.decode(): value.decode() for name, value in rows.schema.metadata.items()}
    stated = np.array(metadata["half_width"].split(","), float)
    np.testing.assert_array_equal(stated, model.calibration.half_width)
    np.testing.assert_array_equal(data.var["half_width"], model.calibration.half_width)
    assert float(metadata["level_mse"]) == model.programs.level.error
    assert float(metadata["level_mse_of_train_mean"]) == model.programs.level.mean_error
    np.testing.assert_array_equal(data.var["trusted"], model.calibration.trust.trusted)
    assert info_of(rows.schema).panel == model.panel


def test_without_intervals_a_table_is_the_same_and_the_file_has_no_layers(model: ModelVersion, tmp_path: Path) -> None:
    slide = stage(tmp_path, "A", 6, 5, scale=0.5)
    tiles = np.random.default_rng(0).integers(0, 255, (30, TILE_PX, TILE_PX, 3), np.uint8)
    found = answerer_of(model).build(CPU)((tiles,), slide.complete)
    vars(slide.answer).update({"values": found.values} | found.confidence)
    slide = type(slide)(**vars(slide) | {"sums": found.sums[None]})
    write(slide)
    for intervals in (False, True):
        info = OutputInfo.of_model(model, intervals)
        publish_slide(str(slide.staging), str(tmp_path / str(intervals)), info)
    plain, more = (tmp_path / name / "A.parquet" for name in ("False", "True"))
    assert plain.read_bytes() == more.read_bytes()
    assert list(anndata.read_h5ad(plain.with_suffix(".h5ad")).layers) == []


def test_intervals_are_refused_for_a_model_without_and_are_part_of_a_slides_key(
    model: ModelVersion, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"predict\.intervals=true.*model\.predictor=retrieval.*is not calibrated"):
        plan_of(random_version(), str(tmp_path), PredictConfig(intervals=True), None)
    source = SlideSource("A", "P", "", "a.tif", 0.5)
    with_, without = (
        key(source, "print", plan_of(model, str(tmp_path), PredictConfig(intervals=asked), None))
        for asked in (True, False)
    )
    assert with_ != without


def test_features_of_a_file_are_answered_as_their_tiles() -> None:
    model = program_version()
    tiles = np.random.default_rng(0).integers(0, 255, (5, TILE_PX, TILE_PX, 3), np.uint8)
    features, complete = network_of(model).build(CPU)(tiles), np.array([True] * 4 + [False])
    found = answerer_of(model, of_features=True).build(CPU)((features,), complete)
    expected = answerer_of(model).build(CPU)((tiles,), complete)
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.sums, expected.sums)
    np.testing.assert_allclose(
        found.values[:, 0], model.programs.tile_scores(features, *_own(model, features)).values[:, 0]
    )
    needs = feature_needs(model, "folder")
    assert (needs.layer, needs.width) == ("pooled", features.shape[1])


def _own(model: ModelVersion, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores retrieved by plain NumPy: ten effective donors of the bank, and that all tiles are complete."""
    from mclstexp.model.retrieval import resolve, retrieve

    bank = model.searched_bank
    found = retrieve(model.programs.queries(features), bank, resolve(model.config.retrieval, len(bank)))
    return found.prediction, np.ones(len(features), bool)


@pytest.fixture(scope="module")
def slides(cohort: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    texture = tifffile.imread(Path(cohort).parent / "P4S1.tif")
    times = -(-BIG_PX // texture.shape[0])
    write_slide(folder / "big.tif", np.tile(texture, (times, times, 1))[:BIG_PX, :BIG_PX])
    write_slide(folder / "small.tif", texture)
    write_slide(folder / "blank.tif", np.full_like(texture, 244))
    return folder


def test_votes_are_those_of_the_bank_and_their_share_is_named(
    model: ModelVersion, slides: Path, tmp_path: Path
) -> None:
    cohort = open_cohort(str(slides), model, str(tmp_path), Config().predict)
    gene = model.panel.names()[3]
    _, votes = explain_tile(cohort, model, "small", 100, 100, [gene])
    assert votes["weight"].sum() == pytest.approx(1)
    assert 1 / (votes["weight"] ** 2).sum() == pytest.approx(10, rel=1e-3)
    spots = {spot: row for row, spot in enumerate(model.bank.spot_id)}
    rows = [spots[spot] for spot in votes["spot_id"]]
    np.testing.assert_array_equal(votes[gene], model.bank.payload[rows, 3])
    assert "retrieval from these spots, found by towers to 50% and else by features, has 25%" in shares(model)
    assert "neighbours has 75%" in shares(model)


def test_a_forecast_times_the_answer_and_counts_scores(model: ModelVersion, slides: Path, tmp_path: Path) -> None:
    cohort = open_cohort(str(slides), model, str(tmp_path), PredictConfig(overlap=0.5, intervals=True))
    planned = forecast(cohort, model, WorkerCounts(1, 1, False))
    assert "3 slides, 3 of them inspected: 0 cannot be predicted" in planned
    most = max(
        int(line.split("to ")[1].split(" per")[0].replace(",", ""))
        for line in planned.split("\n")
        if "per slide" in line
    )
    assert f"meanwhile {most * 32 * 4 / 1e9:.3g} GB in its staging folder" in planned
    (total,) = (int(line.split()[1].replace(",", "")) for line in planned.split("\n") if line.startswith("tiles"))
    assert f"at most {total * 20 * (4 + 4 + 2 * 4) / 1e9:.3g} GB" in planned  # table, X, lower and upper


@pytest.fixture(scope="module")
def predicted(model: ModelVersion, slides: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    assert predict(model, slides, out, num_cpus=6, overlap=0.5, intervals=True).counts() == {"done": 2, "empty": 1}
    return out


@pytest.mark.ray
@pytest.mark.slow
def test_the_summary_states_the_error_of_levels(model: ModelVersion, predicted: Path) -> None:
    rows = pd.read_csv(predicted / "summary.csv").set_index("slide_id")
    level = model.programs.level
    for name in ("big", "small"):
        stated = rows.loc[name, ["level_mse", "level_mse_of_train_mean"]].tolist()
        assert stated == pytest.approx([level.error, level.mean_error])
    assert rows.loc[rows["state"] == "empty", "level_mse"].isna().all()


def tiles_of(slide: Path, table: Path, model: ModelVersion) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tiles of a predicted slide, read by OpenSlide and stored as the model's were, and their centres."""
    rows, image = pq.read_table(table), openslide.OpenSlide(slide)
    corners = np.stack([rows[name].to_numpy() for name in ("x_px", "y_px")], axis=1).astype(int) - TILE_PX // 2
    crops = [np.asarray(image.read_region(tuple(c), 0, (TILE_PX, TILE_PX)).convert("RGB")) for c in corners.tolist()]
    stored = [decode_tile(encode_tile(crop, "jpeg", model.config.tiles.jpeg_quality)) for crop in crops]
    return np.stack(stored), np.stack([rows[name].to_numpy() for name in ("x_um", "y_um")], axis=1)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", ["big", "small"])
def test_a_slide_gets_what_the_version_says_of_all_its_tiles(
    model: ModelVersion, slides: Path, predicted: Path, name: str
) -> None:
    """Overlapping tiles, of several parts and of one."""
    tiles, xy_um = tiles_of(slides / f"{name}.tif", predicted / f"{name}.parquet", model)
    expected = model.predict(network_of(model).build(CPU)(tiles), xy_um)
    np.testing.assert_allclose(expression(predicted / f"{name}.parquet", model), expected.prediction, atol=1e-4)
    assert model.calibration is not None
    half_width = model.calibration.half_widths(expected.spread, expected.similarity)
    layers = anndata.read_h5ad(predicted / f"{name}.h5ad").layers
    np.testing.assert_allclose(layers["upper"] - layers["lower"], 2 * half_width, rtol=2e-3)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_stopped_midway_ends_with_the_same_bytes(
    model: ModelVersion, slides: Path, predicted: Path, tmp_path: Path
) -> None:
    """The driver dies at its third row, and a part is lost: the next run reads other stretches, with fewer actors."""
    rows: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.CohortRun, "_take", _stopping(rows))
        with pytest.raises(KeyboardInterrupt):
            predict(model, slides, tmp_path, overlap=0.5, intervals=True, num_cpus=6)
    (staging,) = (tmp_path / "staging").glob("big-*")
    parts = sorted((staging / "tiles").glob("*.safetensors"))
    assert len(parts) >= 2
    parts[0].unlink()
    report = predict(model, slides, tmp_path, overlap=0.5, intervals=True)
    assert report.counts() == {"done": 2, "empty": 1}
    assert digests(tmp_path) == digests(predicted)


def _stopping(rows: list[object]) -> Callable[[object, dict], None]:
    def stop(_: object, row: dict) -> None:
        rows.append(row)
        if sum(each["slide_id"] == "big" for each in rows) == 3:
            raise KeyboardInterrupt

    return stop
