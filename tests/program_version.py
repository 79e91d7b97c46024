"""A program model on the features of a random frozen encoder, fitted to random sections without training or Ray.

Half of the similarity by which its spots are found is that of towers with random weights.
"""

from dataclasses import replace

import numpy as np
import torch

from mclstexp.config import Config, override
from mclstexp.data.genes import GenePanel, normalisers
from mclstexp.data.measured import MeasuredSection
from mclstexp.model.bank import Bank
from mclstexp.model.embed import ImageNetwork
from mclstexp.model.fit_blend import fit_program_model
from mclstexp.model.fit_calibration import fit_calibration
from mclstexp.model.frozen import frozen_encoder
from mclstexp.model.spot_keys import SpotKeys, TowerEmbeddings, TrainedTowers
from mclstexp.model.tower_keys import TowerKeys
from mclstexp.model.towers import TwoTowers, build_network
from mclstexp.model.training_spots import FeatureBlocks, TrainingSpots
from mclstexp.model.version import ModelVersion, TrainingRecord
from mclstexp.settings import ModelConfig

TILE_PX, PITCH_UM = 32, 40.0
NUM_SPOTS, NUM_GENES = 36, 20
TOWER_SHARE = 0.5
SETTINGS = {
    "tiles.size_px": TILE_PX,
    "tiles.mpp": 1.0,
    "model.image_encoder": "small_cnn",
    "model.predictor": "programs",
    "model.freeze_encoder": True,
    "model.image_directions": 8,
    "model.position": "distance",
    "model.spot_layers": 1,
    "model.spot_width": 8,
    "model.embedding_dim": 6,
    "retrieval.weighting": "fixed_number",
    "retrieval.effective_donors": 10.0,
    "train.epochs": 0,
    "train.precision": "fp32",
}


def program_version(**settings: object) -> ModelVersion:
    """Returns a version for tiles of 32 px at 1 um/px; settings are the model's, such as `image_layers`."""
    config = override(Config(), SETTINGS | {f"model.{name}": value for name, value in settings.items()})
    encoder = frozen_encoder(config.model, TILE_PX, 0)
    tiles = {name: _tiles(seed) for seed, name in enumerate(("P1S1", "P2S1", "P3S1", "P3S2"))}
    sections = [_section(name, images) for name, images in tiles.items()]
    tower = {f"encoder.{name}": value for name, value in encoder.state().items()}
    encode = ImageNetwork(config.model.model_dump(mode="json"), TILE_PX, tower, None, "fp32").build(torch.device("cpu"))
    features = {name: encode(images) for name, images in tiles.items()}
    num_blocks, target = len(encoder.record.widths), normalisers(config.genes)[1]
    spots = TrainingSpots(
        sections,
        features.__getitem__,
        FeatureBlocks(encoder.record.widths, near=tuple(range(num_blocks)), level=0),
        target,
    )
    fitted = fit_program_model(spots, config.retrieval)
    network, keys = _towers(config.model, spots)
    towers = TowerKeys(TOWER_SHARE, network.image_head)
    names = {
        name: np.concatenate([_names(each, name) for each in sections])
        for name in ("section_id", "patient_id", "spot_id")
    }
    genes = tuple(f"ENSG{gene:011d}" for gene in range(NUM_GENES))
    panel = GenePanel(genes, tuple(f"G{gene}" for gene in range(NUM_GENES)), genes)
    bank = Bank.of(keys.whole(TOWER_SHARE), spots.expression, **names)
    return ModelVersion(
        config,
        panel,
        (TILE_PX, 1.0),
        0,
        _record(tiles),
        dict(network.state_dict()),
        bank,
        0.2,
        encoder,
        programs=replace(fitted.model, towers=towers, key_weights=keys.directions),
        calibration=fit_calibration(spots, fitted),
    )


def _towers(config: ModelConfig, spots: TrainingSpots) -> tuple[TwoTowers, SpotKeys]:
    torch.manual_seed(0)
    network = build_network(config, NUM_GENES, 0, TILE_PX).eval()
    assert isinstance(network, TwoTowers)
    torch.nn.init.normal_(network.image_head[0].directions, std=0.1)
    of_spots = np.random.default_rng(8).normal(size=(len(spots.section_id), config.embedding_dim)).astype(np.float32)
    return network, SpotKeys(spots, TrainedTowers(network.image_head, TowerEmbeddings(of_spots, of_spots), ()))


def _tiles(seed: int) -> np.ndarray:
    """Tiles of several colours and grains, uint8 (n, size, size, 3)."""
    rng = np.random.default_rng(seed)
    colour = rng.uniform(60, 220, (NUM_SPOTS, 1, 1, 3)) + 10 * seed
    grain = rng.normal(size=(NUM_SPOTS, TILE_PX, TILE_PX, 1)) * rng.uniform(0, 40, (NUM_SPOTS, 1, 1, 1))
    return (colour + grain).clip(0, 255).astype(np.uint8)


def _section(name: str, tiles: np.ndarray) -> MeasuredSection:
    """Counts follow the tiles' colours; spots are a square array."""
    rng = np.random.default_rng(len(name) + int(tiles[0, 0, 0, 0]))
    colour = tiles.mean(axis=(1, 2)) / 255
    rate = 20 * np.exp(colour @ np.random.default_rng(5).normal(size=(3, NUM_GENES)))
    counts = rng.poisson(rate).astype(np.float32)
    side = round(NUM_SPOTS**0.5)
    xy = np.stack(np.divmod(np.arange(NUM_SPOTS), side)[::-1], axis=1) * PITCH_UM
    spots = np.array([f"{name}:{spot}" for spot in range(NUM_SPOTS)], object)
    none = np.full(NUM_SPOTS, None)
    return MeasuredSection(name, name[:2], spots, xy, xy, none, counts, counts.sum(axis=1, dtype=np.float64))


def _names(section: MeasuredSection, what: str) -> np.ndarray:
    value = getattr(section, what)
    return value if what == "spot_id" else np.full(len(section), value, object)


def _record(sections: dict[str, np.ndarray]) -> TrainingRecord:
    return TrainingRecord(
        manifest_digest="m",
        protocol="patient",
        sections=tuple(sections),
        patients=("P1", "P2", "P3"),
        validation_sections=(),
        test_sections=(),
        epochs=0,
    )
