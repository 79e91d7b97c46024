"""Untrained models of programs or of contrastive towers, with random banks: predicting costs what trained ones do."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from mclstexp.config import Config, override
from mclstexp.data.genes import GenePanel
from mclstexp.model.bank import Bank
from mclstexp.model.blend import ProgramModel
from mclstexp.model.frozen import frozen_encoder
from mclstexp.model.level import Level
from mclstexp.model.programs import NUM_PROGRAMS, Programs
from mclstexp.model.standardise import Standardiser
from mclstexp.model.tower_keys import TowerKeys, join_keys
from mclstexp.model.towers import TwoTowers, build_network, feature_width
from mclstexp.model.version import ModelVersion, TrainingRecord

NUM_PATIENTS = 8
NEIGHBOUR_TILES, WIDE = 0.75, 3.0
"""Width of the Gaussian over neighbours, and edge of the wide view, in tiles."""
SETTINGS = {
    "model.predictor": "programs",
    "model.freeze_encoder": True,
    "model.image_views": ["image", "image_wide"],
    "model.image_directions": 48,
    "model.position": "distance",
    "model.spot_layers": 1,
    "model.spot_width": 32,
    "model.embedding_dim": 32,
    "retrieval.weighting": "fixed_number",
}
NOBODY = TrainingRecord(
    manifest_digest="untrained",
    protocol="patient",
    sections=(),
    patients=(),
    validation_sections=(),
    test_sections=(),
    epochs=0,
)


def save_untrained(folder: Path, settings: Mapping[str, object], num_genes: int, num_spots: int, seed: int = 0) -> None:
    """Saves a version of genes GENE00, GENE01, ... into a new folder; `settings` name tiles.size_px and tiles.mpp."""
    torch.manual_seed(seed)
    rng, config = np.random.default_rng(seed), override(Config(), SETTINGS | dict(settings))
    size_px, mpp = config.tiles.size_px, config.tiles.mpp
    assert mpp is not None, "the settings name tiles.mpp"
    network = build_network(config.model, num_genes, 0, size_px).eval()
    assert isinstance(network, TwoTowers), "a program model's network is two towers"
    programs = _programs(config, network, NEIGHBOUR_TILES * size_px * mpp, rng, num_genes, num_spots)
    own = rng.normal(size=(num_spots, programs.key_weights.shape[1]))
    keys = join_keys(own, rng.normal(size=(num_spots, config.model.embedding_dim)), 0.5)
    spots = np.array([f"spot{number}" for number in range(num_spots)], object)
    patients = np.array([f"P{number % NUM_PATIENTS}" for number in range(num_spots)], object)
    payload = rng.normal(size=(num_spots, num_genes)).astype(np.float32)
    folder.mkdir()
    ModelVersion(
        config,
        GenePanel.from_names([f"GENE{number:02d}" for number in range(num_genes)]),
        (size_px, mpp),
        0,
        NOBODY,
        dict(network.state_dict()),
        Bank.of(keys, payload, patients, patients, spots),
        ood_similarity=0.5,
        encoder=frozen_encoder(config.model, size_px, seed),
        wide=(size_px, WIDE * mpp),
        programs=programs,
    ).save(folder)


def save_untrained_towers(folder: Path, settings: Mapping[str, object], num_genes: int, num_spots: int) -> None:
    """Saves a version of contrastive towers, as `save_untrained` does one of programs."""
    torch.manual_seed(0)
    rng, config = np.random.default_rng(0), override(Config(), settings)
    size_px, mpp = config.tiles.size_px, config.tiles.mpp
    assert mpp is not None, "the settings name tiles.mpp"
    network = build_network(config.model, num_genes, 0, size_px).eval()
    names = np.array([f"spot{number}" for number in range(num_spots)], object)
    widths = (config.model.embedding_dim, num_genes)
    keys, payload = (rng.normal(size=(num_spots, width)).astype(np.float32) for width in widths)
    panel = GenePanel.from_names([f"GENE{number:02d}" for number in range(num_genes)])
    bank, geometry = Bank.of(keys, payload, names, names, names), (size_px, mpp)
    folder.mkdir()
    ModelVersion(config, panel, geometry, 0, NOBODY, dict(network.state_dict()), bank, ood_similarity=0.0).save(folder)


def _programs(
    config: Config,
    network: TwoTowers,
    neighbour_um: float,
    rng: np.random.Generator,
    num_genes: int,
    num_spots: int,
) -> ProgramModel:
    width, num_programs = feature_width(config.model, config.tiles.size_px), min(NUM_PROGRAMS, num_genes)
    scale = Standardiser(np.zeros(width), np.ones(width), np.full(width, width**-0.5))
    loadings = np.linalg.qr(rng.normal(size=(num_genes, num_programs)))[0]
    weights = [rng.normal(size=(width, num_programs)) for _ in range(2)]
    mean = rng.uniform(size=num_genes)
    return ProgramModel(
        own=scale,
        near=scale,
        near_columns=np.arange(width),
        level_columns=np.arange(width),
        neighbour_um=neighbour_um,
        own_weights=weights[0],
        near_weights=weights[1],
        key_weights=rng.normal(size=(width, min(width, 224))).astype(np.float32),
        retrieved_scale=0.25,
        donor_scores=rng.normal(size=(num_spots, num_programs)).astype(np.float32),
        share=0.25,
        programs=Programs(loadings, loadings.T.copy()),
        level=Level(rng.normal(size=(width, 8)), rng.normal(size=(8, num_genes)), mean, mean, share=1.0),
        towers=TowerKeys(0.5, network.image_head),
    )
