"""What a model learns is in the texture: on a cohort with a known answer, and nothing where pairs are shuffled.

Steps, stream rows, bank and retrieval are the real ones; only Ray's processes around them are tested elsewhere.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mclstexp.config import Config, override
from mclstexp.data.spots import Batch, SpotReader, decode_tiles
from mclstexp.evaluation.scores import gene_scores
from mclstexp.model.embed import network_of
from mclstexp.model.probe import Probe
from mclstexp.model.retrieval import retrieve
from mclstexp.model.towers import TwoTowers
from mclstexp.model.version import ModelVersion
from mclstexp.training import finish, trainer
from mclstexp.training.checkpoint import save_checkpoint
from mclstexp.training.feed import make_feed
from mclstexp.training.run import Run, open_run
from mclstexp.training.share import share_of
from mclstexp.training.step import lone_rank, train_step

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SETTINGS = {
    "tiles.size_px": 32,
    "tiles.sentence_length": 32,
    "tiles.jpeg_quality": 95,
    "tiles.wide_um": None,
    "genes.num_genes": 60,
    "split.test_patients": ["P4", "P5", "P6", "P7", "P8"],
    "model.image_encoder": "small_cnn",
    "model.spot_width": 64,
    "model.spot_layers": 1,
    "train.epochs": 10,
    "train.tower_lr": 2e-3,
    "retrieval.k": 100,
}


@pytest.fixture(scope="module")
def learnable_tiles(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    from ingest.prepare import prepare
    from ingest.synthetic import CohortSpec, make_cohort

    folder = tmp_path_factory.mktemp("learnable")
    sheet = make_cohort(folder / "cohort", CohortSpec.small())
    prepare(sheet, str(folder / "tiles"), override(Config(), SETTINGS))
    return str(folder / "tiles")


def _trained(run: Run) -> ModelVersion:
    """Trains as one worker does and returns the finished version."""
    feed, train = make_feed(run.config, run.reader, run.split.train), run.config.train
    model = TwoTowers(run.config.model, len(run.panel), 0, run.manifest.tile_size_px)
    model.load_state_dict(trainer.initial_weights(run))
    model = model.to(memory_format=torch.channels_last).train()
    total_steps = train.epochs * feed.num_steps()
    rank_state = lone_rank(run.config, model, total_steps)
    state = rank_state.state
    for epoch in range(train.epochs):
        state.epoch = epoch
        rows = feed.rows(epoch, (), rank=0, world_size=1)
        for start in range(0, len(rows), train.batch_sentences):
            sentences = [feed.loader(_one(row)) for row in rows[start : start + train.batch_sentences]]
            batch = {name: np.concatenate([part[name] for part in sentences]) for name in sentences[0]}
            train_step(rank_state, share_of(batch))
            state.step += 1
    folder = Path(run.uri, "last")
    folder.mkdir()
    save_checkpoint(str(folder), model, rank_state.optimizer, state)
    finish.finish(run, str(folder))
    return finish.load_model(run)


def _one(row: dict[str, object]) -> dict[str, np.ndarray]:
    return {name: np.array([value]) for name, value in row.items()}


def _scores(tiles: str, folder: Path, shuffle_pairs: bool) -> dict[str, pd.Series]:
    """Trains on three patients and scores model and floors on the spots of five others."""
    config = override(Config(), SETTINGS | {"train.shuffle_pairs": shuffle_pairs})
    run = open_run(tiles, str(folder), "run", config, lambda *_: "untracked")
    model = _trained(run)
    train, test = (_spots(run.reader, names) for names in (run.split.train, run.split.test))
    embed = network_of(model).build(torch.device("cpu"))
    found = retrieve(embed(test["image"]), model.bank, model.config.retrieval)
    colour = Probe(_colour(train["image"]), train["payload"])
    mean = np.tile(train["payload"].mean(axis=0), (len(test["image"]), 1))
    predicted = {"model": found.prediction, "ridge on RGB": colour.predict(_colour(test["image"])), "train mean": mean}
    same_totals = np.ones(len(mean))
    return {method: gene_scores(test["payload"], values, same_totals).mean() for method, values in predicted.items()}


def _spots(reader: SpotReader, names: tuple[str, ...]) -> Batch:
    parts = [reader.read(*sentence)["image"] for sentence in reader.manifest.sentences(names)]
    payload = np.concatenate([reader.read_section(name)["payload"] for name in names])
    return {"image": decode_tiles(np.concatenate(parts), reader.manifest.tile_size_px), "payload": payload}


def _colour(tiles: np.ndarray) -> np.ndarray:
    return np.concatenate([tiles.mean(axis=(1, 2)), tiles.std(axis=(1, 2))], axis=1)


def test_a_tiny_model_reads_texture(learnable_tiles: str, tmp_path: Path) -> None:
    scores = _scores(learnable_tiles, tmp_path, shuffle_pairs=False)
    assert scores["model"]["mse"] < 0.9 * scores["train mean"]["mse"]
    assert scores["model"]["pcc"] > scores["ridge on RGB"]["pcc"] + 0.2


def test_shuffled_pairs_teach_nothing(learnable_tiles: str, tmp_path: Path) -> None:
    scores = _scores(learnable_tiles, tmp_path, shuffle_pairs=True)
    assert abs(scores["model"]["pcc"]) < 0.05
    assert scores["model"]["mse"] > 0.98 * scores["train mean"]["mse"]
