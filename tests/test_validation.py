"""The score of a model while it trains, the choice of k and temperature, and early stopping.

The score of a model in training must be that of its finished version.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mclstexp.config import Config, override
from mclstexp.data.spots import decode_tiles
from mclstexp.evaluation.metrics import pearson_per_gene
from mclstexp.model.bank import Bank
from mclstexp.model.embed import network_of
from mclstexp.model.retrieval import retrieve
from mclstexp.model.version import ModelVersion
from mclstexp.settings import RetrievalConfig, TrainConfig
from mclstexp.training import finish, trainer, validation
from mclstexp.training.checkpoint import STATE, save_checkpoint
from mclstexp.training.run import Run, open_run
from mclstexp.training.step import RankState, lone_rank
from mclstexp.training.validation import VALIDATION_PCC, ValidationSection, ValidationSet, validate
from mclstexp.training.worker import is_validated

SETTINGS = {
    "genes.num_genes": 30,
    "split.test_patients": ["P3"],
    "split.validation_patients": ["P2"],
    "model.image_encoder": "small_cnn",
    "model.spot_width": 16,
    "model.spot_layers": 1,
    "train.precision": "fp32",
}
REGRESSION = {"model.predictor": "regression"}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, REGRESSION], ids=["retrieval", "regression"])
def test_the_score_is_that_of_the_finished_version(tiles: str, tmp_path: Path, changes: dict[str, object]) -> None:
    run = _open(tiles, tmp_path, changes)
    rank_state = _rank_state(run)
    found = validate(rank_state, ValidationSet(run.reader, run.split.train, run.split.validation))
    assert rank_state.model.training, "training goes on where it was"
    folder = tmp_path / "last"
    folder.mkdir()
    save_checkpoint(str(folder), rank_state.model, rank_state.optimizer, rank_state.state)
    finish.finish(run, str(folder))
    assert found == pytest.approx(_score(run, finish.load_model(run)), abs=1e-5)


@pytest.mark.ray
@pytest.mark.slow
def test_training_that_gets_no_better_stops_and_the_model_is_its_best_checkpoint(tiles: str, tmp_path: Path) -> None:
    wild = {"train.tower_lr": 0.1, "train.head_lr": 0.1, "train.schedule": "constant"}
    workers = {"train.num_workers": 2, "train.batch_sentences": 2}  # each with batch statistics of its own
    patience = {"train.epochs": 9, "train.patience": 1, "train.keep_checkpoints": 1}
    run = _open(tiles, tmp_path, wild | workers | patience)
    checkpoint, scores = _fit(run)
    best = int(np.argmax(scores))
    assert best == len(scores) - 2, "the first score that is not better ends training"
    assert len(scores) < 9, "chosen so that some score is not better"
    assert json.loads((Path(checkpoint) / STATE).read_text())["epoch"] == best
    assert trainer.fit(run, lambda step, metrics: None) == checkpoint, "a run without patience left trains no more"
    finish.finish(run, checkpoint)
    model = finish.load_model(run)
    assert model.training.epochs == best + 1
    assert _score(run, model) == pytest.approx(scores[best], abs=1e-5)


@pytest.mark.parametrize(("every", "scored"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (5, [4]), (10, [4])])
def test_the_last_epoch_is_always_scored(every: int, scored: list[int]) -> None:
    train = TrainConfig(epochs=5, validate_every=every)
    assert [epoch for epoch in range(5) if is_validated(epoch, train)] == scored


def _open(tiles: str, folder: Path, changes: dict[str, object]) -> Run:
    config = override(Config(), SETTINGS | changes)
    return open_run(tiles, str(folder), "run", config, lambda *_: "untracked")


def _fit(run: Run) -> tuple[str, list[float]]:
    """Trains a run; returns its model's checkpoint and the scores on the way."""
    posted: list[dict[str, float]] = []
    best = trainer.fit(run, lambda step, metrics: posted.append(metrics))
    return best, [metrics[VALIDATION_PCC] for metrics in posted if VALIDATION_PCC in metrics]


def _rank_state(run: Run) -> RankState:
    from mclstexp.model.towers import build_network

    model = build_network(run.config.model, len(run.panel), 0, run.manifest.tile_size_px)
    model.load_state_dict(trainer.initial_weights(run))
    model = model.to(memory_format=torch.channels_last).train()
    return lone_rank(run.config, model, 10)


def _score(run: Run, model: ModelVersion) -> float:
    """The mean over P2's sections of the PCC over each one's 50 (here: all 30) highest genes."""
    embed = network_of(model).build(torch.device("cpu"))
    scores = []
    for name in ("P2S1", "P2S2"):
        parts = [run.reader.read(*sentence) for sentence in run.manifest.sentences([name])]
        truth = run.reader.read_section(name)["payload"]
        embedding = np.concatenate([embed(decode_tiles(part["image"], run.manifest.tile_size_px)) for part in parts])
        predicted = model.predict(embedding, np.zeros((len(embedding), 2))).prediction
        scores.append(np.nan_to_num(pearson_per_gene(truth, predicted)).mean())
    return float(np.mean(scores))


def _bank(num_keys: int) -> Bank:
    rng = np.random.default_rng(0)
    names = np.array([str(i) for i in range(num_keys)], object)
    keys, payload = (rng.normal(size=(num_keys, width)).astype(np.float32) for width in (8, 5))
    return Bank.of(keys, payload, names, names, names)


def test_choice_finds_the_settings_that_predict_best() -> None:
    """The truth is the prediction with ten neighbours at temperature 0.5, which must win."""
    rng = np.random.default_rng(3)
    bank = _bank(500)
    queries = rng.normal(size=(200, 8)).astype(np.float32)
    truth = retrieve(queries, bank, RetrievalConfig(k=10, temperature=0.5)).prediction
    sections = [ValidationSection("P", queries, truth)]
    chosen = validation.choose_retrieval(sections, bank, RetrievalConfig())
    assert (chosen.k, chosen.temperature) == (10, 0.5)
    assert validation.choose_retrieval(sections, bank, RetrievalConfig(k=3)).k == 3


def test_choice_scores_within_sections_and_weighs_patients_equally() -> None:
    """A large section of P prefers few neighbours, two small ones of Q many; a section's own level must not matter."""
    rng = np.random.default_rng(3)
    bank = _bank(500)
    preferences = [("P", 300, 10, 0.0), ("Q", 60, 400, 50.0), ("Q", 60, 400, 90.0), ("R", 60, 400, 0.0)]
    sections = []
    for patient, num, k, level in preferences:
        queries = rng.normal(size=(num, 8)).astype(np.float32)
        predicted = retrieve(queries, bank, RetrievalConfig(k=k, temperature=0.5)).prediction
        sections.append(ValidationSection(patient, queries, predicted + level))
    best = {}
    for k in (10, 400):
        config, of_patients = RetrievalConfig(k=k, temperature=0.5), {}
        for section in sections:
            predicted = retrieve(section.queries, bank, config).prediction
            genes = np.argsort(-section.truth.mean(axis=0))[:50]
            pcc = [np.corrcoef(section.truth[:, gene], predicted[:, gene])[0, 1] for gene in genes]
            of_patients.setdefault(section.patient_id, []).append(np.mean(pcc))
        best[k] = np.mean([np.mean(values) for values in of_patients.values()])
    assert abs(best[10] - best[400]) > 0.02, "the two must differ clearly"
    config = RetrievalConfig(temperature=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "TRIED_K", (10, 400))
        assert validation.choose_retrieval(sections, bank, config).k == max(best, key=best.__getitem__)


@pytest.mark.odd
def test_settings_are_chosen_over_the_genes_that_a_section_measures() -> None:
    """Two of five genes are unknown: the first in the truth, the second in half of the bank."""
    rng = np.random.default_rng(3)
    bank, queries = _bank(500), rng.normal(size=(200, 8)).astype(np.float32)
    payload = bank.payload.copy()
    payload[::2, 1] = np.nan
    partial = Bank.of(bank.keys, payload, bank.section_id, bank.patient_id, bank.spot_id)
    truth = retrieve(queries, bank, RetrievalConfig(k=10, temperature=0.5)).prediction
    unknown = truth.copy()
    unknown[:, 0] = np.nan
    config = RetrievalConfig(k=20, temperature=0.2)
    predicted = retrieve(queries, partial, config).prediction
    expected = np.mean([np.corrcoef(truth[:, gene], predicted[:, gene])[0, 1] for gene in range(1, 5)])
    assert validation.best_score([ValidationSection("P", queries, unknown)], partial, config) == pytest.approx(expected)
    chosen = validation.choose_retrieval([ValidationSection("P", queries, unknown)], bank, RetrievalConfig())
    assert (chosen.k, chosen.temperature) == (10, 0.5)
