"""Small model versions of random weights and a random bank, made for no table."""

import numpy as np
import torch

from mclstexp.config import Config, override
from mclstexp.data.genes import GenePanel
from mclstexp.model.bank import Bank
from mclstexp.model.frozen import frozen_encoder
from mclstexp.model.towers import TwoTowers
from mclstexp.model.version import ModelVersion, TrainingRecord

SETTINGS = {"model.image_encoder": "small_cnn", "model.spot_width": 16, "retrieval.k": 5, "retrieval.temperature": 0.1}
GENES = ("GATA3", "ERBB2", "ENSG00000141736")


def random_version(seed: int = 0) -> ModelVersion:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    config = override(Config(), SETTINGS)
    names = np.array([str(i) for i in range(30)], object)
    bank = Bank.of(*(rng.normal(size=(30, width)).astype(np.float32) for width in (256, 3)), names, names, names)
    record = TrainingRecord(
        manifest_digest="m",
        protocol="patient",
        sections=("A1",),
        patients=("A",),
        validation_sections=(),
        test_sections=(),
        epochs=1,
    )
    weights = TwoTowers(config.model, 3, 0, 32).state_dict()
    panel = GenePanel(GENES, ("GATA3", "ERBB2", ""), ("", "", GENES[2]))
    return ModelVersion(config, panel, (32, 0.5), 0, record, weights, bank, ood_similarity=0.25)


def frozen_version() -> ModelVersion:
    """Returns a version on the features of a frozen encoder."""
    version = random_version()
    version.config = override(version.config, {"model.freeze_encoder": True, "train.precision": "fp32"})
    torch.manual_seed(1)
    version.weights = TwoTowers(version.config.model, 3, 0, 32).state_dict()
    version.encoder = frozen_encoder(version.config.model, 32, 2)
    return version
