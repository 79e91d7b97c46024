"""A model version for a real tile table that took no training."""

import torch

from mclstexp.config import Config, override
from mclstexp.data.folds import make_split
from mclstexp.data.panel import fit_panel
from mclstexp.data.schema import load_manifest
from mclstexp.data.spots import make_reader, total_genes
from mclstexp.model.bank import build_bank
from mclstexp.model.frozen import frozen_encoder
from mclstexp.model.towers import TwoTowers, build_network
from mclstexp.model.version import ModelVersion, TrainingRecord


def untrained_version(tiles: str, settings: dict[str, object]) -> ModelVersion:
    """Returns a version of random weights with the bank of the training sections that its settings leave."""
    config = override(Config(), settings)
    manifest = load_manifest(tiles)
    split = make_split(manifest, config.split)
    panel = fit_panel(tiles, manifest, split.train, config.genes)
    torch.manual_seed(0)
    reader = make_reader(tiles, manifest, panel, config, split.train)
    record = TrainingRecord(
        manifest_digest=manifest.digest(),
        protocol=config.split.protocol,
        sections=split.train,
        patients=tuple(sorted({manifest.section(name).patient_id for name in split.train})),
        validation_sections=split.validation,
        test_sections=split.test,
        epochs=1,
    )
    geometry = (manifest.tile_size_px, manifest.mpp)
    network = build_network(config.model, len(panel), 0, manifest.tile_size_px).eval()
    retrieves = isinstance(network, TwoTowers)
    bank = build_bank(network, reader, split.train, False) if retrieves else None
    frozen = config.model.freeze_encoder
    encoder = frozen_encoder(config.model, manifest.tile_size_px, config.train.seed) if frozen else None
    weights, genes = network.state_dict(), total_genes(reader)
    return ModelVersion(config, panel, geometry, 0, record, weights, bank, encoder=encoder, total_genes=genes)
