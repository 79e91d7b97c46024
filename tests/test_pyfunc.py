"""A registered model version, loaded by MLflow alone."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from program_version import TILE_PX, program_version
from random_version import frozen_version, random_version

from mclstexp import tracking
from mclstexp.config import Config, override
from mclstexp.errors import ModelError
from mclstexp.model.embed import network_of
from mclstexp.model.retrieval import resolve, retrieve
from mclstexp.model.version import ModelVersion
from mclstexp.slides.codec import encode_tile


def registered(version: ModelVersion, folder: Path, template: Path) -> tuple[mlflow.pyfunc.PyFuncModel, ModelVersion]:
    """Registers a version and returns what MLflow alone loads, and the version as it was saved."""
    config = override(Config(), {"tracking.uri": f"sqlite:///{folder}/mlflow.db"})
    shutil.copy(template, folder / "mlflow.db")
    (folder / "version").mkdir()
    version.save(folder / "version")
    tracking.register(config.tracking, tracking.start_run(config, "run", {}), str(folder / "version"), {})
    mlflow.set_tracking_uri(config.tracking.uri)
    _assert_trust_is_logged(version)
    return mlflow.pyfunc.load_model("models:/mclstexp/1"), ModelVersion.load(folder / "version")


def _assert_trust_is_logged(version: ModelVersion) -> None:
    """In the run that trained the version, where it is calibrated."""
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    files = [file.path for file in mlflow.artifacts.list_artifacts(run_id=run.info.run_id)]
    assert ("genes.csv" in files) == (version.calibration is not None)
    if version.calibration is None:
        assert "trusted_genes" not in run.data.metrics
        return
    text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/genes.csv")
    genes, trust = pd.read_csv(io.StringIO(text)), version.calibration.trust
    assert genes["gene_id"].tolist() == list(version.panel.gene_id)
    for name in ("correlation", "low", "high", "q_value", "trusted"):
        np.testing.assert_allclose(genes[name], getattr(trust, name), err_msg=name)
    assert run.data.metrics["trusted_genes"] == np.count_nonzero(trust.q_value <= 0.05)


@pytest.mark.parametrize("make", [random_version, frozen_version])
def test_mlflow_alone_gives_the_same_prediction(
    tmp_path: Path, mlflow_template: Path, make: Callable[[], ModelVersion]
) -> None:
    model, version = registered(make(), tmp_path, mlflow_template)
    tiles = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)
    frame = pd.DataFrame({"image": [encode_tile(tile, "png", 90) for tile in tiles]})
    found = model.predict(frame)
    embed = network_of(version).build(torch.device("cpu"))
    expected = retrieve(embed(tiles), version.bank, version.config.retrieval).prediction
    assert list(found.columns) == list(version.panel.names())
    np.testing.assert_allclose(found.to_numpy(), expected, rtol=1e-3, atol=1e-3)
    placed = frame.assign(x_um=[0.0, 9.0, 18.0], y_um=0.0, slide_id="A")
    pd.testing.assert_frame_equal(model.predict(placed), found)  # it looks at each tile alone
    too_large = pd.DataFrame({"image": [encode_tile(np.zeros((64, 64, 3), np.uint8), "png", 90)]})
    with pytest.raises(ModelError, match=r"takes tiles of 32 px at 0\.5 um/px as image, got 64 x 64 px"):
        model.predict(too_large)


@pytest.fixture(scope="module")
def program_model(
    tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path
) -> tuple[mlflow.pyfunc.PyFuncModel, ModelVersion]:
    return registered(program_version(), tmp_path_factory.mktemp("registered"), mlflow_template)


def frame_of(slides: dict[str, int]) -> tuple[pd.DataFrame, np.ndarray]:
    """Returns tiles of some slides on a grid, in no order, and their pixels."""
    rng, num_tiles = np.random.default_rng(0), sum(slides.values())
    colour = rng.integers(40, 220, (num_tiles, 1, 1, 3))
    tiles = (colour + rng.normal(0, 15, (num_tiles, TILE_PX, TILE_PX, 1))).clip(0, 255).astype(np.uint8)
    index = np.concatenate([np.arange(size) for size in slides.values()])
    frame = pd.DataFrame(
        {
            "image": [encode_tile(tile, "png", 90) for tile in tiles],
            "x_um": index % 12 * float(TILE_PX),
            "y_um": index // 12 * float(TILE_PX),
            "slide_id": np.repeat(list(slides), list(slides.values())),
        }
    )
    order = rng.permutation(num_tiles)
    return frame.iloc[order], tiles[order]


def test_rows_of_a_slide_are_answered_together(
    program_model: tuple[mlflow.pyfunc.PyFuncModel, ModelVersion],
) -> None:
    """As `ModelVersion.predict` answers all tiles of each slide; rows keep their order."""
    model, version = program_model
    frame, tiles = frame_of({"A": 170, "B": 30, "C": 1})
    found = model.predict(frame)
    assert list(found.columns) == [*version.panel.names(), "partial"]
    assert not found["partial"].any()
    embed = network_of(version).build(torch.device("cpu"))
    for slide in "ABC":
        rows = (frame["slide_id"] == slide).to_numpy()
        expected = version.predict(embed(tiles[rows]), frame.loc[rows, ["x_um", "y_um"]].to_numpy()).prediction
        np.testing.assert_allclose(found[list(version.panel.names())][rows], expected, atol=1e-5)
    is_first = (frame["slide_id"] == "A").to_numpy()
    alone = model.predict(frame[is_first].drop(columns="slide_id"))
    pd.testing.assert_frame_equal(alone, found[is_first].reset_index(drop=True))


def test_tiles_without_positions_are_answered_in_part(
    program_model: tuple[mlflow.pyfunc.PyFuncModel, ModelVersion],
) -> None:
    model, version = program_model
    frame, tiles = frame_of({"A": 20})
    found = model.predict(frame[["image"]])
    assert found["partial"].all()
    features = network_of(version).build(torch.device("cpu"))(tiles)
    bank, programs = version.searched_bank, version.programs
    retrieved = retrieve(programs.queries(features), bank, resolve(version.config.retrieval, len(bank))).prediction
    own = programs.own.apply(features) @ programs.own_weights + programs.retrieved_scale * retrieved[:, :-1]
    expected = programs.level.mean + own @ programs.programs.decoder
    np.testing.assert_allclose(found[list(version.panel.names())], expected, atol=1e-5)
    together = model.predict(frame).drop(columns="partial")
    assert np.abs(together - found[list(version.panel.names())]).to_numpy().max() > 0.01


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"y_um": None}, "x_um, slide_id without y_um: give both coordinates"),
        ({"x_um": None, "y_um": None}, "slide_id without x_um, y_um"),
        ({"x_um": [0.0, np.nan, 2.0]}, r"1 of 3 tiles have no x_um, rows 1"),
        ({"y_um": [np.inf, np.nan, 2.0]}, r"2 of 3 tiles have no y_um, rows 0, 1"),
        ({"slide_id": ["A", None, "A"]}, r"1 of 3 tiles have no slide_id, rows 1"),
    ],
)
def test_half_given_positions_are_refused(
    program_model: tuple[mlflow.pyfunc.PyFuncModel, ModelVersion], change: dict[str, list | None], fault: str
) -> None:
    frame = frame_of({"A": 3})[0].reset_index(drop=True)
    for name, values in change.items():
        frame = frame.drop(columns=name) if values is None else frame.assign(**{name: values})
    with pytest.raises(ModelError, match=fault):
        program_model[0].predict(frame)
