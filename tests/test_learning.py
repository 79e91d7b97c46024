"""What a model learns is in the texture: on a cohort with a known answer, and nothing where pairs are shuffled."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mclstexp import tracking
from mclstexp.config import Config, override
from mclstexp.data.spots import SpotReader
from mclstexp.data.stream import Batch
from mclstexp.evaluation.baselines import RidgeFloor
from mclstexp.evaluation.metrics import Scores, score
from mclstexp.inference.embed import network_of
from mclstexp.inference.model_version import ModelVersion
from mclstexp.inference.retrieval import retrieve
from mclstexp.training import finish, trainer

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SETTINGS = {
    "tiles.size_px": 32,
    "tiles.sentence_length": 32,
    "tiles.jpeg_quality": 95,
    "genes.num_genes": 60,
    "split.test_patients": ["P4", "P5"],
    "model.image_encoder": "small_cnn",
    "model.spot_width": 64,
    "model.spot_layers": 1,
    "train.epochs": 10,
    "train.tower_lr": 2e-3,
    "train.checkpoint_every": 1000,
    "retrieval.k": 100,
}


@pytest.fixture(scope="module")
def learnable_tiles(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    from ingest.prepare import prepare
    from ingest.synthetic import CohortSpec, make_cohort

    folder = tmp_path_factory.mktemp("learnable")
    sheet = make_cohort(folder / "cohort", CohortSpec.small())
    prepare(sheet, str(folder / "tiles"), override(Config(), SETTINGS), progress=False)
    return str(folder / "tiles")


def _scores(tiles: str, folder: Path, shuffle_pairs: bool) -> dict[str, Scores]:
    """Trains on three patients and scores model and floors on the spots of two others."""
    changed = {"train.shuffle_pairs": shuffle_pairs, "tracking.uri": f"sqlite:///{folder}/mlflow.db"}
    config = override(Config(), SETTINGS | changed)
    run = trainer.open_run(tiles, str(folder), "run", config, lambda name: tracking.start_run(config, name, {}))
    finish.finish(run, trainer.fit(run, lambda step, metrics: None))
    model = ModelVersion.load(finish.model_uri(run))
    train, test = (_spots(run.reader, names) for names in (run.split.train, run.split.test))
    embed = network_of(model).build(torch.device("cpu"))
    found = retrieve(embed(test["image"]), model.bank, model.config.retrieval)
    colour = RidgeFloor(_colour(train["image"]), train["payload"], np.arange(len(train["image"])) % 3)
    mean = np.tile(train["payload"].mean(axis=0), (len(test["image"]), 1))
    said = {"model": found.prediction, "ridge on RGB": colour.predict(_colour(test["image"])), "train mean": mean}
    return {method: score(test["payload"], prediction) for method, prediction in said.items()}


def _spots(reader: SpotReader, names: tuple[str, ...]) -> Batch:
    groups = [(name, group) for name in names for group in range(len(reader.manifest.section(name).row_groups))]
    parts = [reader.read(*place) for place in groups]
    return {column: np.concatenate([part[column] for part in parts]) for column in ("image", "payload")}


def _colour(tiles: np.ndarray) -> np.ndarray:
    return np.concatenate([tiles.mean(axis=(1, 2)), tiles.std(axis=(1, 2))], axis=1)


def test_a_tiny_model_reads_texture(learnable_tiles: str, tmp_path: Path) -> None:
    scores = _scores(learnable_tiles, tmp_path, shuffle_pairs=False)
    assert scores["model"].mse < 0.9 * scores["train mean"].mse
    assert scores["model"].pcc_all > scores["ridge on RGB"].pcc_all + 0.2


def test_shuffled_pairs_teach_nothing(learnable_tiles: str, tmp_path: Path) -> None:
    scores = _scores(learnable_tiles, tmp_path, shuffle_pairs=True)
    assert abs(scores["model"].pcc_all) < 0.05
    assert scores["model"].mse > 0.98 * scores["train mean"].mse
