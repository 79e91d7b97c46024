"""A registered model version, loaded by MLflow alone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from random_version import frozen_version, random_version

from mclstexp import tracking
from mclstexp.config import Config, override
from mclstexp.errors import ModelError
from mclstexp.model.embed import network_of
from mclstexp.model.retrieval import retrieve
from mclstexp.model.version import ModelVersion
from mclstexp.slides.codec import encode_tile


@pytest.mark.parametrize("make", [random_version, frozen_version])
def test_mlflow_alone_gives_the_same_prediction(
    tmp_path: Path, mlflow_template: Path, make: Callable[[], ModelVersion]
) -> None:
    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    config = override(Config(), {"tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"})
    folder = tmp_path / "version"
    folder.mkdir()
    make().save(folder)
    tracking.register(config.tracking, tracking.start_run(config, "run", {}), str(folder), {})
    mlflow.set_tracking_uri(config.tracking.uri)
    tiles = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)
    frame = pd.DataFrame({"image": [encode_tile(tile, "png", 90) for tile in tiles]})
    model = mlflow.pyfunc.load_model("models:/mclstexp/1")
    found = model.predict(frame)
    version = ModelVersion.load(folder)
    embed = network_of(version).build(torch.device("cpu"))
    expected = retrieve(embed(tiles), version.bank, version.config.retrieval).prediction
    assert list(found.columns) == list(version.panel.names())
    np.testing.assert_allclose(found.to_numpy(), expected, rtol=1e-3, atol=1e-3)
    too_large = pd.DataFrame({"image": [encode_tile(np.zeros((64, 64, 3), np.uint8), "png", 90)]})
    with pytest.raises(ModelError, match=r"takes tiles of 32 px at 0\.5 um/px as image, got 64 x 64 px"):
        model.predict(too_large)
