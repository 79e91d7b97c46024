"""The whole `reference` recipe against `numpy_reference`, which was written from a description of the method alone.

Inputs, batch statistics and affine parameters are random, so that a wrong order of operations shows. The towers run in
float64 and agree to 1e-9; float32 parts agree to 1e-4.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import numpy_reference as reference
import pytest
import torch
from numpy_reference import Floats, Integers, Weights
from rough_inputs import GENES, POSITIONS, SIZE_PX, Section, rough_section, roughen

from mclstexp.config import Config, load_config, override
from mclstexp.data.genes import normalisers
from mclstexp.data.spots import Batch, SpotReader
from mclstexp.evaluation.metrics import pearson_per_gene
from mclstexp.evaluation.scores import gene_scores, gene_sets, set_table
from mclstexp.model.augment import augment
from mclstexp.model.bank import Bank, build_bank
from mclstexp.model.embed import ImageNetwork
from mclstexp.model.losses import require_loss
from mclstexp.model.retrieval import resolve, retrieve
from mclstexp.model.towers import ImageTower, TwoTowers, build_network, plain_tensors
from mclstexp.settings import RetrievalConfig

NEIGHBOURS = 12
NUM_SPOTS = {"A1": 23, "A2": 30, "B1": 18, "B2": 14}
TEST = "B2"
LOOSE = {"rtol": 1e-4, "atol": 1e-4}
SPOT_NAMES = {
    "position.x.weight": "x_table",
    "position.y.weight": "y_table",
    "blocks.": "",
    "attention_norm": "norm1",
    "attention.qkv": "qkv",
    "attention.out": "out",
    "ffn_norm": "norm2",
    "ffn.0": "ffn1",
    "ffn.2": "ffn2",
}
HEAD_NAMES = {"project": "first", "refine": "second"}


@pytest.fixture(scope="module")
def config() -> Config:
    settings = Path(__file__).parents[1] / "jobs" / "configs" / "reference.yaml"
    return override(load_config(settings), {"model.image_weights": "random", "retrieval.k": NEIGHBOURS})


@pytest.fixture(scope="module")
def visium() -> Config:
    settings = Path(__file__).parents[1] / "jobs" / "configs" / "reference_alex10x.yaml"
    return override(load_config(settings), {"model.image_weights": "random"})


@pytest.fixture(scope="module")
def sections() -> dict[str, Section]:
    rng = np.random.default_rng(1)
    return {name: rough_section(rng, num_spots) for name, num_spots in NUM_SPOTS.items()}


@pytest.fixture(scope="module")
def model(config: Config, sections: dict[str, Section]) -> Iterator[TwoTowers]:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        towers = build_network(config.model, GENES, POSITIONS, SIZE_PX)
        assert isinstance(towers, TwoTowers)
        roughen(towers, sections["A1"].tiles)
        yield towers.eval()


def _weights(module: torch.nn.Module, prefix: str = "", names: dict[str, str] | None = None) -> Weights:
    """Returns a module's state under the reference's names, float64."""
    found = {}
    for name, value in module.state_dict().items():
        name = name.removeprefix(prefix)
        for own, other in (names or {}).items():
            name = name.replace(own, other)
        found[name] = value.double().numpy()
    return found


def _images(model: TwoTowers, tiles: np.ndarray) -> Floats:
    """The image side of the chain."""
    weights = _weights(model.image_tower, "encoder.network.")
    features = reference.densenet121(reference.scaled_images(tiles), weights)
    return reference.head(features, _weights(model.image_head, names=HEAD_NAMES))


def _spots(model: TwoTowers, expression: Floats, position: Integers) -> Floats:
    """The spot side of the chain, for one sentence."""
    features = reference.spot_tower(expression, position, _weights(model.spot_tower, names=SPOT_NAMES))
    return reference.head(features, _weights(model.spot_head, names=HEAD_NAMES))


def _close(got: np.ndarray | torch.Tensor, wanted: Floats, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=rtol, atol=atol)


def _expression(config: Config, section: Section) -> tuple[np.ndarray, np.ndarray]:
    """The project's input and target; totals over all genes are deliberately more than those over the panel."""
    totals = section.counts.sum(axis=1) + 500
    both = normalisers(config.genes)
    return cast(
        tuple[np.ndarray, np.ndarray], tuple(n.apply(section.counts, totals, section.counts.sum(0)) for n in both)
    )


def test_expression(config: Config, visium: Config, sections: dict[str, Section]) -> None:
    for section in sections.values():
        entered, target = _expression(config, section)
        _close(entered, reference.per_spot(section.counts), 1e-6, 1e-6)
        _close(target, reference.per_gene(section.counts), 1e-6, 1e-6)
        for value in _expression(visium, section):
            _close(value, reference.per_gene(section.counts), 1e-6, 1e-6)


def test_image_tower(model: TwoTowers, sections: dict[str, Section]) -> None:
    tiles = sections[TEST].tiles[:6]
    features = reference.densenet121(reference.scaled_images(tiles), _weights(model.image_tower, "encoder.network."))
    assert (features < 0).mean() > 0.1  # no final ReLU to hide behind
    assert features.std(axis=0).mean() > 0.01  # tiles tell themselves apart
    images = augment(torch.from_numpy(tiles), "none", torch.Generator())
    with torch.no_grad():
        _close(model.image_tower.double()(torch.from_numpy(reference.scaled_images(tiles))), features)
        _close(model.image_tower.float()(images), features, **LOOSE)


def test_image_tower_of_visium(visium: Config, model: TwoTowers, sections: dict[str, Section]) -> None:
    tiles = sections[TEST].tiles[:6]
    tower = ImageTower(visium.model, SIZE_PX)
    tower.load_state_dict(model.image_tower.state_dict())
    wanted = reference.densenet121(reference.visium_images(tiles), _weights(tower, "encoder.network."))
    images = augment(torch.from_numpy(tiles), "none", torch.Generator())
    with torch.no_grad():
        _close(tower.double().eval()(images.double()), wanted, 1e-5, 1e-2)  # of features up to 1e4


def test_spot_tower(model: TwoTowers, sections: dict[str, Section]) -> None:
    section = sections["A1"]
    expression = reference.per_spot(section.counts)
    wanted = reference.spot_tower(expression, section.position, _weights(model.spot_tower, names=SPOT_NAMES))
    mask = torch.ones(1, len(expression), dtype=torch.bool)
    with torch.no_grad():
        got = model.spot_tower.double()(torch.tensor(expression)[None], torch.tensor(section.position)[None], mask)
        model.spot_tower.float()
    _close(got[0], wanted)


@pytest.mark.parametrize("side", ["image", "spot"])
def test_heads(model: TwoTowers, side: str) -> None:
    head = model.image_head if side == "image" else model.spot_head
    features = np.random.default_rng(3).normal(0, 2, (9, head.project.in_features))
    with torch.no_grad():
        got = head(torch.from_numpy(features).float())
    _close(got, reference.head(features, _weights(head, names=HEAD_NAMES)), 1e-5, 1e-5)


def test_training_loss_of_a_short_batch(config: Config, model: TwoTowers, sections: dict[str, Section]) -> None:
    """A global minibatch across sections with empty slots, which neither attend nor count."""
    parts = [sections["A1"], sections["B1"]]
    tiles, counts, position = (
        np.concatenate([getattr(part, name)[:8] for part in parts]) for name in ("tiles", "counts", "position")
    )
    expression = reference.per_spot(counts)
    wanted = reference.contrastive_loss(_spots(model, expression, position), _images(model, tiles))
    valid = torch.arange(len(tiles) + 3) < len(tiles)
    padded = [torch.tensor(np.pad(v, ((0, 3), (0, 0)))).float()[None] for v in (expression, position)]
    with torch.no_grad():
        images = model.embed_images(augment(torch.from_numpy(tiles), "none", torch.Generator()))
        spots = model.embed_spots(*padded, valid[None])
        images = torch.cat([images, torch.zeros(3, images.shape[1])])
        loss = require_loss(config)(images, spots[0], valid, model.logit_scale)
    assert wanted > 1  # far from a fit, where any loss is zero
    _close(loss, np.float64(wanted), **LOOSE)


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_retrieval(distance: str) -> None:
    rng = np.random.default_rng(4)
    keys, queries = (rng.normal(0, 1, (n, 16)) * rng.uniform(0.5, 4, (n, 1)) for n in (80, 11))
    payload = rng.normal(0, 1, (80, GENES))
    settings = RetrievalConfig(k=9, weighting="inverse_square", distance=distance)
    bank = _bank(keys.astype(np.float32), payload.astype(np.float32))
    got = retrieve(queries.astype(np.float32), bank, resolve(settings, len(bank))).prediction
    _close(got, reference.retrieve(queries, keys, payload, 9, distance), 1e-5, 1e-5)


def _bank(keys: np.ndarray, payload: np.ndarray) -> Bank:
    names = np.array([f"s{spot}" for spot in range(len(keys))], object)
    return Bank.of(keys, payload, names, names, names)


def test_metrics() -> None:
    rng = np.random.default_rng(5)
    truth = rng.normal(rng.uniform(0, 4, GENES), 1, (25, GENES))
    predicted = truth + rng.normal(0, rng.uniform(0.1, 5, GENES), truth.shape)
    truth[:, 3], predicted[:, 4] = 2.5, 1.5  # undefined on either side
    _close(pearson_per_gene(truth, predicted), reference.pearson_per_gene(predicted, truth))
    _same_scores(truth, predicted, reference.section_scores(predicted, truth), 1e-9)


def _same_scores(truth: np.ndarray, predicted: np.ndarray, wanted: dict[str, float], tolerance: float) -> None:
    table = set_table(gene_scores(truth, predicted, np.ones(len(truth))), gene_sets(truth, {})).set_index("gene_set")
    got = table.loc["all", ["pcc", "undefined", "mse", "mae"]].to_dict() | {"heg50": table.loc["heg50", "pcc"]}
    names = {"pcc": "all", "heg50": "highest"}
    for name, value in got.items():
        assert value == pytest.approx(wanted[names.get(name, name)], rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_from_tiles_and_counts_to_scores(
    config: Config, model: TwoTowers, sections: dict[str, Section], distance: str
) -> None:
    """One fold: keys of the other sections in batches of 32 across their borders, scores of the held-out one."""
    config = override(config, {"retrieval.distance": distance})
    training, held_out = [name for name in sections if name != TEST], sections[TEST]
    bank = build_bank(model, _reader(config, sections), training, random_spots=True)
    keys, payload, queries = _reference_bank(model, [sections[name] for name in training], held_out)
    _close(bank.keys, keys, **LOOSE)
    _close(bank.payload, payload, 1e-6, 1e-6)

    embeddings = _image_network(config, model).build(torch.device("cpu"))(held_out.tiles)
    _close(embeddings, queries, **LOOSE)

    predicted = retrieve(embeddings, bank, resolve(config.retrieval, len(bank))).prediction
    wanted = reference.retrieve(queries, keys, payload, NEIGHBOURS, distance)
    _close(predicted, wanted, **LOOSE)

    scores = reference.section_scores(wanted, reference.per_gene(held_out.counts))
    assert scores["undefined"] == 1
    _same_scores(_expression(config, held_out)[1], predicted, scores, 1e-3)


def _reference_bank(model: TwoTowers, training: list[Section], held_out: Section) -> tuple[Floats, Floats, Floats]:
    """Keys, payload and queries; the keys' batches of 32 run over the bank's own sections."""
    expression = np.concatenate([reference.per_spot(section.counts) for section in training])
    position = np.concatenate([section.position for section in training])
    starts = range(0, len(expression), 32)
    keys = [_spots(model, expression[start : start + 32], position[start : start + 32]) for start in starts]
    payload = np.concatenate([reference.per_gene(section.counts) for section in training])
    return np.concatenate(keys), payload, _images(model, held_out.tiles)


def _reader(config: Config, sections: dict[str, Section]) -> SpotReader:
    """Stands in for a tile table: sections in memory, each of one row group."""

    def read_section(name: str) -> Batch:
        section = sections[name]
        expression, payload = _expression(config, section)
        names = np.full(len(payload), name, object)
        position = section.position.astype(np.float32)
        return {"expression": expression, "payload": payload, "position": position} | dict.fromkeys(
            ("section_id", "patient_id", "spot_id"), names
        )

    def entry(name: str) -> SimpleNamespace:
        return SimpleNamespace(row_groups=[SimpleNamespace(num_rows=len(sections[name].counts))])

    return cast(SpotReader, SimpleNamespace(read_section=read_section, manifest=SimpleNamespace(section=entry)))


def _image_network(config: Config, model: TwoTowers) -> ImageNetwork:
    tower, head = (plain_tensors(part.state_dict()) for part in (model.image_tower, model.image_head))
    return ImageNetwork(config.model.model_dump(mode="json"), SIZE_PX, tower, head, config.train.precision)
