"""Training of the towers beside a program model: what they read, whom they do not see, and a whole run."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from sklearn.decomposition import PCA

from mclstexp import storage
from mclstexp.config import Config, override
from mclstexp.data.schema import load_genes, load_manifest
from mclstexp.data.table import read_columns, read_counts
from mclstexp.model.left_out import planned_folds
from mclstexp.model.towers import TwoTowers, build_network
from mclstexp.training.complete import train_and_finish, training_plan
from mclstexp.training.feed import tower_feed
from mclstexp.training.finish import load_model
from mclstexp.training.fitted_parts import fitted_parts
from mclstexp.training.history import newest_checkpoint
from mclstexp.training.run import Run, open_run, planned
from mclstexp.training.step import lone_rank
from mclstexp.training.stored import with_features
from mclstexp.training.tower_loader import TowerLoader, fit_spot_inputs, spot_embeddings, tower_loader
from mclstexp.training.training_sections import training_spots
from mclstexp.training.validation import ValidationSet, validate

SETTINGS = {
    "genes.num_genes": 20,
    "split.test_patients": ["P3"],
    "model.predictor": "programs",
    "model.image_encoder": "small_cnn",
    "model.freeze_encoder": True,
    "model.image_directions": 6,
    "model.input_dropout": 0.3,
    "model.position": "distance",
    "model.spot_width": 16,
    "model.spot_layers": 1,
    "model.embedding_dim": 8,
    "retrieval.weighting": "fixed_number",
    "train.precision": "fp32",
    "train.augmentation": "none",
    "train.batch_sentences": 2,
    "train.epochs": 1,
}
pytestmark = pytest.mark.ray


def _open(tiles: str, folder: Path, **changed: object) -> Run:
    config = override(Config(), SETTINGS | {name.replace("__", "."): value for name, value in changed.items()})
    return open_run(tiles, str(folder), "run", config, lambda *_: "untracked")


@pytest.fixture(scope="module")
def run(tiles: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return with_features(_open(tiles, tmp_path_factory.mktemp("runs")))


def _expression(run: Run, section_id: str) -> np.ndarray:
    """ln(1 + 1e4 share) of the panel's genes, computed from the table's counts."""
    counts = np.asarray(
        read_counts(run.reader.root, run.manifest.section(section_id), run.manifest.num_genes).todense()
    )
    genes = load_genes(run.reader.root, run.manifest).column("gene_id").to_pylist()
    columns = [genes.index(gene) for gene in run.panel.gene_id]
    return np.log1p(1e4 * counts[:, columns] / counts.sum(axis=1, keepdims=True))


def test_spots_are_read_as_differences_from_their_section(run: Run) -> None:
    spots = training_spots(run.reader, run.split.train, run.config.train)
    loader = tower_loader(run.config, run.reader, spots)
    centred = {name: _expression(run, name) for name in run.split.train}
    centred = {name: values - values.mean(axis=0) for name, values in centred.items()}
    deviation = np.concatenate(list(centred.values())).std(axis=0)
    for name in run.split.train:
        table = read_columns(run.reader.root, run.manifest.section(name), ["x_um", "y_um"])
        xy = np.stack([table["x_um"], table["y_um"]], axis=1)
        start = 0
        for group, part in enumerate(run.manifest.section(name).row_groups):
            rows = slice(start, start + part.num_rows)
            found = loader.spots(name, group)
            np.testing.assert_allclose(found["expression"], centred[name][rows] / deviation, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(found["position"], xy[rows] - xy[rows].mean(axis=0), atol=0.01)
            start = rows.stop


def test_a_deeper_share_is_thinner(run: Run) -> None:
    spots = training_spots(run.reader, run.split.train, run.config.train)
    inputs = fit_spot_inputs(spots.sections, run.reader.input)
    name = run.split.train[0]
    shares = {name: (1.0, 0.3), **dict.fromkeys(run.split.train[1:], (1.0,))}
    means = {key: np.stack([value[0]] * 2) for key, value in inputs.means.items()}
    loader = replace(tower_loader(run.config, run.reader, spots), inputs=replace(inputs, shares=shares, means=means))
    whole, thin = (loader.spots(name, 0, depth)["expression"] for depth in (0, 1))
    assert not np.array_equal(whole, thin)
    correlation = np.corrcoef(whole.ravel(), thin.ravel())[0, 1]
    assert 0.5 < correlation < 1
    np.testing.assert_array_equal(thin, loader.spots(name, 0, 1)["expression"])


def test_left_out_spots_are_never_read(run: Run) -> None:
    spots = training_spots(run.reader, run.split.train, run.config.train)
    for fold in range(spots.folds.num_folds):
        feed = tower_feed(run.config, tower_loader(run.config, run.reader, spots, fold))
        left_out = set(spots.section_id[spots.folds.fold == fold])
        seen = {sentence.section_id for sentence in feed.sentences}
        assert seen == set(spots.section_id[spots.folds.fold != fold])
        assert not seen & left_out
    lone = replace(spots, sections=spots.sections[:1])
    assert lone.folds.kind == "blocks"
    feed = tower_feed(run.config, tower_loader(run.config, run.reader, lone, 0))
    assert isinstance(feed.loader, TowerLoader)
    outside = lone.folds.fold != 0
    batches = [_loaded(feed, epoch) for epoch in range(4)]
    for batch, row in itertools.chain.from_iterable(batches):
        group = int(row["group"])
        first = sum(part.num_rows for part in run.manifest.section(lone.sections[0].section_id).row_groups[:group])
        real = batch["mask"][0]
        scores = batch["scores"][0][real]
        own = lone.scores[first:][: run.manifest.section(lone.sections[0].section_id).row_groups[group].num_rows]
        allowed = own[outside[first : first + len(own)]].astype(np.float32)
        assert len(scores)
        assert all((allowed == each).all(axis=1).any() for each in scores)


def _loaded(feed: object, epoch: int) -> list[tuple[dict[str, np.ndarray], dict[str, object]]]:
    rows = [row for row in feed.rows(epoch, [], 0, 1) if row["group"] >= 0]
    return [(feed.loader({name: np.array([value]) for name, value in row.items()}), row) for row in rows]


def test_images_are_leading_directions_of_standardised_features(run: Run) -> None:
    fitted = fitted_parts(run.config, run.reader, run.split.train)
    network = build_network(run.config.model, len(run.panel), 0, run.manifest.tile_size_px)
    network.load_state_dict(network.state_dict() | fitted)
    assert isinstance(network, TwoTowers)
    features = np.concatenate([run.reader.features.read_section(name) for name in run.split.train])
    scores = ((features - features.mean(axis=0)) / (features.std(axis=0) + 1e-6)).clip(-8, 8)
    pca = PCA(6, svd_solver="full").fit(scores)
    found = network.image_head[0](torch.from_numpy(features)).numpy()
    assert (found**2).mean() == pytest.approx(1, rel=1e-3)
    correlation = np.corrcoef(found.T, pca.transform(scores).T)[:6, 6:]
    np.testing.assert_allclose(np.abs(np.diag(correlation))[:3], 1, atol=1e-2)
    xy = [read_columns(run.reader.root, run.manifest.section(name), ["x_um", "y_um"]) for name in run.split.train]
    centres = [np.stack([table["x_um"], table["y_um"]], axis=1) for table in xy]
    distances = [np.sort(np.linalg.norm(each[:, None] - each[None], axis=2), axis=1)[:, 1] for each in centres]
    assert network.spot_tower.pitch_um.item() == pytest.approx(np.median(np.concatenate(distances)), rel=1e-3)


def test_epochs_are_added_until_there_are_enough_steps(tiles: str) -> None:
    manifest = load_manifest(tiles)
    sections = [entry.section_id for entry in manifest.sections if entry.measured]
    sentences = len(manifest.sentences(sections))
    config = override(Config(), SETTINGS | {"train.min_steps": 41})
    epochs = planned(config, manifest, sections).train.epochs
    steps = -(-sentences // 2)
    assert epochs * steps >= 41 > (epochs - 1) * steps
    assert planned(override(config, {"train.epochs": 500}), manifest, sections).train.epochs == 500
    assert planned(override(config, {"train.epochs": 0}), manifest, sections).train.epochs == 0


def test_the_plan_counts_all_trainings(run: Run) -> None:
    words = training_plan(run.config, run.manifest, run.split.train)
    spots = training_spots(run.reader, run.split.train, run.config.train)
    steps = tower_feed(run.config, tower_loader(run.config, run.reader, spots)).num_steps()
    assert f"1 epochs of {steps} optimiser steps, {steps} in all, {1 + spots.folds.num_folds} times" in words
    assert f"parts of their {spots.folds.kind}" in words
    lone = replace(spots, sections=spots.sections[:1])
    assert planned_folds(1, 1) == (lone.folds.kind, lone.folds.num_folds)
    assert planned_folds(4, 9, 3) == ("patients", 3)
    assert "closed form" in training_plan(override(run.config, {"train.epochs": 0}), run.manifest, run.split.train)


@pytest.mark.slow
def test_a_run_trains_towers_with_and_without_each_fold(tiles: str, tmp_path: Path) -> None:
    """Two training patients: shares stay as stated, and the version keeps its towers."""
    run = with_features(_open(tiles, tmp_path, train__min_steps=6, train__cross_fit=3))
    train_and_finish(run, lambda step, metrics: None)
    model = load_model(run)
    assert model.programs is not None
    assert (model.programs.share, model.programs.tower_share) == (0.25, 0.5)
    spots = training_spots(run.reader, run.split.train, run.config.train)
    folders = [newest_checkpoint(storage.join(run.uri, f"without-{fold}")) for fold in range(spots.folds.num_folds)]
    assert all(folder is not None and folder.metrics["step"] >= 6 for folder in folders)
    loader = tower_loader(run.config, run.reader, spots)
    embedded = spot_embeddings(model.towers(), loader, run.split.train)
    np.testing.assert_allclose(model.bank.keys[:, -8:], np.sqrt(0.5) * embedded, atol=1e-5)
    features = run.reader.features.read_section(run.split.train[0])
    queries = model.programs.queries(features)
    with torch.no_grad():
        images = model.towers().embed_images(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(queries[:, -8:], np.sqrt(0.5) * images, atol=1e-5)
    answer = model.predict(features, np.random.default_rng(0).uniform(0, 500, (len(features), 2)))
    assert np.isfinite(answer.prediction).all()


def test_towers_are_scored_by_what_validation_patients_find_through_them(run: Run) -> None:
    """By hand: each tile takes the weighted mean of the spots that its embedding finds."""
    spots = training_spots(run.reader, run.split.train, run.config.train)
    loader = tower_loader(run.config, run.reader, spots)
    torch.manual_seed(0)
    network = build_network(run.config.model, len(run.panel), 0, run.manifest.tile_size_px)
    network.load_state_dict(network.state_dict() | fitted_parts(run.config, run.reader, run.split.train))
    assert isinstance(network, TwoTowers)
    state = lone_rank(run.config, network, 1)
    name = run.split.train[0]  # as if it were a validation section
    found = validate(state, ValidationSet(run.reader, run.split.train, (name,), loader))
    network.eval()
    with torch.no_grad():
        queries = network.embed_images(torch.from_numpy(run.reader.features.read_section(name))).numpy()
    cosines = queries @ spot_embeddings(network, loader, run.split.train).T
    measured = np.concatenate([_expression(run, each) for each in run.split.train])
    predicted = np.stack([_weights(each, 50) @ measured for each in cosines])
    truth = _expression(run, name)
    correlations = [np.corrcoef(predicted[:, gene], truth[:, gene])[0, 1] for gene in range(truth.shape[1])]
    assert found == pytest.approx(np.mean(correlations), abs=2e-3)  # of 20 genes, all are among the 50 highest


def _weights(cosines: np.ndarray, effective: float) -> np.ndarray:
    """A softmax whose temperature gives an effective number of spots."""

    def weight(log_temperature: float) -> np.ndarray:
        raw = np.exp((cosines - cosines.max()) / np.exp(log_temperature))
        return raw / raw.sum()

    return weight(brentq(lambda t: 1 / (weight(t) ** 2).sum() - min(effective, 0.99 * len(cosines)), -12, 6))
