"""An untrained model version with a random bank: predicting with it costs what a trained one costs."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from mclstexp.config import Config, override
from mclstexp.data.genes import GenePanel
from mclstexp.model.bank import Bank
from mclstexp.model.towers import TwoTowers
from mclstexp.model.version import ModelVersion, TrainingRecord

NUM_PATIENTS = 8
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
    rng, config = np.random.default_rng(seed), override(Config(), dict(settings))
    widths = (config.model.embedding_dim, num_genes)
    keys, payload = (rng.normal(size=(num_spots, width)).astype(np.float32) for width in widths)
    spots = np.array([f"spot{number}" for number in range(num_spots)], object)
    patients = np.array([f"P{number % NUM_PATIENTS}" for number in range(num_spots)], object)
    panel = GenePanel.from_names([f"GENE{number:02d}" for number in range(num_genes)])
    weights = TwoTowers(config.model, num_genes, 0, config.tiles.size_px).state_dict()
    bank, geometry = Bank.of(keys, payload, patients, patients, spots), (config.tiles.size_px, config.tiles.mpp)
    folder.mkdir()
    ModelVersion(config, panel, geometry, 0, NOBODY, weights, bank, ood_similarity=0.5).save(folder)
