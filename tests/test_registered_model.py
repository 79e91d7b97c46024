"""A model version in MLflow's registry: registered once, found by alias, and what MLflow itself makes of it."""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from random_version import SETTINGS, random_version

from mclstexp import tracking
from mclstexp.config import Config, override
from mclstexp.errors import ModelError
from mclstexp.model.embed import network_of
from mclstexp.model.retrieval import retrieve
from mclstexp.model.version import ModelVersion
from mclstexp.slides.codec import encode_tile


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[str], Path]:
    """A registry with two runs and their versions; returns settings, run ids and the registered folder."""
    path = tmp_path_factory.mktemp("registry")
    config = override(Config(), SETTINGS | {"tracking.uri": f"sqlite:///{path}/mlflow.db"})
    folder = path / "version"
    folder.mkdir()
    random_version().save(folder)
    runs = [tracking.start_run(config, name, {"a": "b"}) for name in ("first", "second")]
    log = tracking.metric_log(config.tracking, runs[0])
    for step in range(5):
        log.log(step, {"loss": 5.0 - step})
    log.close()
    return config, runs, folder


def test_a_run_registers_once_and_the_first_version_is_champion(
    registry: tuple[Config, list[str], Path], tmp_path: Path
) -> None:
    config, (first, second), folder = registry
    register = [tracking.register(config.tracking, run, str(folder), {}) for run in (first, first, second, second)]
    assert register == ["1", "1", "2", "2"]
    champion = tracking.fetch_model(config.tracking, "models:/mclstexp@champion", str(tmp_path))
    assert ModelVersion.load(champion).digest == ModelVersion.load(folder).digest
    assert tracking.tag_version(config.tracking, "models:/mclstexp@champion", {"score": "1"}) == first
    for uri, hint in (
        ("models:/mclstexp@best", "has the versions 1, 2"),
        ("models:/mclstexp/3", "has the versions 1, 2"),
        ("models:/other@champion", "the models are mclstexp"),
    ):
        with pytest.raises(ModelError, match=hint):
            tracking.fetch_model(config.tracking, uri, str(tmp_path))


def test_metrics_and_parameters_reach_mlflow(registry: tuple[Config, list[str], Path]) -> None:
    import mlflow

    config, (first, _), _ = registry
    client = mlflow.MlflowClient(config.tracking.uri)
    history = client.get_metric_history(first, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(step, 5.0 - step) for step in range(5)]
    assert client.get_run(first).data.params["model.image_encoder"] == "small_cnn"


def test_a_dead_tracking_server_does_not_hold_up_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "FLUSH_S", 1.0)
    config = override(Config(), {"tracking.uri": "http://127.0.0.1:9"})
    log = tracking.metric_log(config.tracking, "no-run")
    started = time.monotonic()
    for step in range(100):
        log.log(step, {"loss": 1.0})
    assert time.monotonic() - started < 5
    log.close()


def test_mlflows_own_means_give_the_same_prediction(
    registry: tuple[Config, list[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    config, (first, _), folder = registry
    tracking.register(config.tracking, first, str(folder), {})
    mlflow.set_tracking_uri(config.tracking.uri)
    tiles = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)
    frame = pd.DataFrame({"image": [encode_tile(tile, "png", 90) for tile in tiles]})
    found = mlflow.pyfunc.load_model("models:/mclstexp/1").predict(frame)
    version = ModelVersion.load(folder)
    embed = network_of(version).build(torch.device("cpu"))
    expected = retrieve(embed(tiles), version.bank, version.config.retrieval).prediction
    assert list(found.columns) == list(version.panel.names())
    np.testing.assert_allclose(found.to_numpy(), expected, rtol=1e-3, atol=1e-3)
    too_large = pd.DataFrame({"image": [encode_tile(np.zeros((64, 64, 3), np.uint8), "png", 90)]})
    with pytest.raises(ModelError, match=r"takes tiles of 32 px at 0\.5 um/px, got 64 x 64 px"):
        mlflow.pyfunc.load_model("models:/mclstexp/1").predict(too_large)
