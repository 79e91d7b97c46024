"""Training of a frozen encoder's heads: features are made once, and the loss is that of encoding in every step."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train as train_job
from safetensors.torch import load_file

from mclstexp.config import Config, override
from mclstexp.data.features import FEATURES
from mclstexp.data.schema import load_manifest
from mclstexp.errors import ConfigError
from mclstexp.model import embed, extract
from mclstexp.model.towers import FeatureTower, ImageTower, build_network
from mclstexp.training import complete, finish, trainer
from mclstexp.training.checkpoint import OPTIMIZER, STATE, WEIGHTS
from mclstexp.training.feed import make_feed
from mclstexp.training.run import Run, open_run
from mclstexp.training.share import share_of
from mclstexp.training.step import RankState, lone_rank, train_step
from mclstexp.training.stored import store_features, with_features
from mclstexp.training.validation import VALIDATION_PCC

SETTINGS = {
    "genes.num_genes": 20,
    "split.test_patients": ["P3"],
    "split.validation_patients": ["P2"],
    "model.image_encoder": "small_cnn",
    "model.freeze_encoder": True,
    "model.spot_width": 16,
    "model.spot_layers": 1,
    "model.embedding_dim": 16,
    "train.precision": "fp32",
    "train.augmentation": "none",
    "train.batch_sentences": 2,
    "train.epochs": 2,
}
pytestmark = pytest.mark.ray


def _open(tiles: str, folder: Path, **changed: object) -> Run:
    config = override(Config(), SETTINGS | {name.replace("__", "."): value for name, value in changed.items()})
    return open_run(tiles, str(folder), "run", config, lambda *_: "untracked")


def _rank_state(run: Run) -> RankState:
    torch.manual_seed(0)
    model = build_network(run.config.model, len(run.panel), 0, run.manifest.tile_size_px)
    return lone_rank(run.config, model, 100)


def _losses(run: Run, encode: ImageTower | None) -> list[float]:
    """Losses of two epochs; with `encode` every batch's tiles go through the encoder, as without stored features."""
    feed, rank_state = make_feed(run.config, run.reader, run.split.train), _rank_state(run)
    losses = []
    for epoch in range(2):
        rank_state.state.epoch = epoch
        rows = feed.rows(epoch, (), 0, 1)
        for start in range(0, len(rows), 2):
            parts = [feed.loader({name: np.array([value]) for name, value in row.items()}) for row in rows[start:][:2]]
            batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            if encode is not None:
                images = torch.from_numpy(batch.pop("image")).flatten(0, 1).permute(0, 3, 1, 2) / 255
                with torch.no_grad():
                    batch["features"] = encode(images).unflatten(0, batch["mask"].shape).numpy()
            losses.append(train_step(rank_state, share_of(batch))[0].item())
            rank_state.state.step += 1
    return losses


@pytest.mark.parametrize("predictor", ["retrieval", "regression"])
def test_the_loss_on_features_is_that_of_encoding_in_every_step(tiles: str, tmp_path: Path, predictor: str) -> None:
    run = _open(tiles, tmp_path, model__predictor=predictor)
    stored = with_features(run)
    assert run.encoder is not None
    encoder = ImageTower(run.config.model, run.manifest.tile_size_px).eval()
    encoder.encoder.load_state_dict(run.encoder.state())
    on_features, encoded = _losses(stored, None), _losses(run, encoder)
    assert on_features == pytest.approx(encoded, rel=1e-5, abs=1e-5)
    assert on_features[-1] < on_features[0]


@pytest.mark.slow
def test_a_run_ends_with_learnt_tensors_alone_and_nothing_is_encoded_twice(
    tiles: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[str]] = []
    plainly = extract.make_features

    def noted(root: str, manifest: object, section_ids: list[str], *rest: object) -> object:
        made.append(list(section_ids))
        return plainly(root, manifest, section_ids, *rest)

    monkeypatch.setattr(extract, "make_features", noted)
    posted = []
    run = _open(tiles, tmp_path, train__seed=11)  # an encoder of its own
    complete.train_and_finish(run, lambda step, metrics: posted.append(metrics))
    assert made == [[*run.split.train, *run.split.validation]]
    scores = [metrics[VALIDATION_PCC] for metrics in posted if VALIDATION_PCC in metrics]
    assert len(scores) == 2
    assert np.isfinite(scores).all()

    checkpoints = sorted(path for path in Path(run.uri).glob("checkpoint_*") if path.is_dir())
    for folder in checkpoints:
        assert not [name for name in load_file(folder / WEIGHTS) if name.startswith("image_tower.")]
        assert {WEIGHTS, OPTIMIZER, STATE} <= {file.name for file in folder.iterdir()}
    assert json.loads((checkpoints[-1] / STATE).read_text())["epoch"] == 1
    model = finish.load_model(run)
    assert model.encoder is not None
    assert model.encoder.record.digest == run.encoder.record.digest
    assert model.bank is not None
    assert len(model.bank) == run.manifest.num_spots(run.split.train)
    monkeypatch.setattr(extract, "make_features", None)
    monkeypatch.setattr(embed, "embed_sections", None)
    reader = with_features(run).reader.features
    for name, arrays in embed.embed_model(tiles, run.manifest, run.split.validation, model):
        features = torch.from_numpy(reader.read_section(name))
        with torch.no_grad():
            assert np.allclose(arrays["embedding"], model.towers().embed_images(features).numpy(), atol=1e-6)
        assert np.array_equal(arrays["rgb"], reader.read_colours(name))
    store_features(tiles, run.split.train, [run.config], make=False)


@pytest.mark.slow
def test_random_spots_and_draws_train_on_features_too(tiles: str, tmp_path: Path) -> None:
    run = _open(
        tiles,
        tmp_path,
        **{
            "train.batching": "random_spots",
            "train.batch_spots": 16,
            "model.position": "none",
            "train.feature_draws": 2,
            "train.augmentation": "flips",
            "train.num_workers": 2,
            "split.validation_patients": [],
        },
    )
    losses = []
    checkpoint = trainer.fit(run, lambda step, metrics: losses.append(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert json.loads(Path(checkpoint, STATE).read_text())["epoch"] == 1
    consumed = json.loads(Path(checkpoint, STATE).read_text())["consumed"]
    assert sorted(consumed) == list(range(run.manifest.num_spots(run.split.train)))


def test_missing_features_are_refused_with_the_command_that_makes_them(tiles: str, tmp_path: Path) -> None:
    config = override(Config(), SETTINGS | {"train.seed": 77})
    sections = [entry.section_id for entry in load_manifest(tiles).sections][:2]
    with pytest.raises(ConfigError, match=r"2 section\(s\) have no stored features.*jobs/embed\.py --data"):
        store_features(tiles, sections, [config], make=False)
    trained = override(config, {"model.freeze_encoder": False})
    with pytest.raises(ConfigError, match=r"--features require needs model\.freeze_encoder=true"):
        store_features(tiles, sections, [trained], make=False)
    before = list(Path(tiles, FEATURES).iterdir())
    store_features(tiles, sections, [trained])
    assert list(Path(tiles, FEATURES).iterdir()) == before


class _JoinsRay(Exception):
    """What the job does next."""


@pytest.mark.parametrize(
    ("features", "seed", "outcome", "message"),
    [
        ("require", 0, _JoinsRay, "now"),
        ("require", 77, ConfigError, r"4 section\(s\) have no stored features.*jobs/embed\.py --data"),
        ("make", 77, _JoinsRay, "now"),
        ("some", 0, ConfigError, "--features='some': Input should be 'make' or 'require'"),
    ],
)
def test_the_job_looks_for_required_features_before_it_joins_ray(
    tiles: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    features: str,
    seed: int,
    outcome: type[Exception],
    message: str,
) -> None:
    """Those of seed 0 are stored."""
    with_features(_open(tiles, tmp_path))

    def connect(_: Config) -> None:
        raise _JoinsRay("now")

    monkeypatch.setattr(train_job._launch, "connect", connect)
    texts = {name: ",".join(value) if isinstance(value, list) else str(value) for name, value in SETTINGS.items()}
    options = [part for name, text in texts.items() for part in (f"--{name}", text)]
    options += ["--train.seed", str(seed), "--features", features, "--verbose"]
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--config", os.devnull, "--data", tiles, "--out", str(tmp_path), *options]
    )
    with pytest.raises(outcome, match=message):
        train_job.main()


def test_the_network_of_features_has_no_encoder(tiles: str, tmp_path: Path) -> None:
    run = with_features(_open(tiles, tmp_path))
    weights = trainer.initial_weights(run)
    assert not [name for name in weights if name.startswith("image_tower.")]
    tower = build_network(run.config.model, 20, 0, 32).image_tower
    assert isinstance(tower, FeatureTower)
    assert tower.num_features == run.reader.features.num_features
    assert with_features(run) is run
