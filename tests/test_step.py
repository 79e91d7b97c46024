"""One optimiser step on one rank: every kind of network learns, padding is no data; optimiser and learning rate."""

import numpy as np
import pytest
import torch

from mclstexp.config import Config, override
from mclstexp.data.spots import Batch
from mclstexp.model.towers import TwoTowers, build_network
from mclstexp.settings import ModelConfig, TrainConfig
from mclstexp.training.checkpoint import TrainState
from mclstexp.training.step import RankState, learning_rate_factor, make_optimizer, train_step

SENTENCES, LENGTH, GENES, SIZE = 2, 8, 5, 32
SETTINGS = {
    "model.image_encoder": "small_cnn",
    "model.spot_width": 16,
    "model.spot_layers": 1,
    "model.spot_dropout": 0.0,
    "model.embedding_dim": 8,
    "train.augmentation": "none",
    "train.precision": "fp32",
    "train.tower_lr": 3e-3,
    "train.schedule": "constant",
    "train.warmup": 0.0,
}


def _rank_state(**changes: object) -> RankState:
    config = override(Config(), SETTINGS | {name.replace("__", "."): value for name, value in changes.items()})
    torch.manual_seed(0)
    model = build_network(config.model, GENES, 0, SIZE).to(memory_format=torch.channels_last)
    return RankState(
        config=config,
        model=model,
        parallel=model,
        optimizer=make_optimizer(model, config.train),
        device=torch.device("cpu"),
        rank=0,
        world_size=1,
        total_steps=100,
        state=TrainState({}),
    )


def _batch(num_spots: int = SENTENCES * LENGTH) -> Batch:
    """Tiles whose brightness is their expression; the slots after `num_spots` are empty."""
    rng = np.random.default_rng(0)
    expression = rng.random((SENTENCES, LENGTH, GENES)).astype(np.float32)
    image = np.tile((255 * expression[..., :3])[:, :, None, None], (1, 1, SIZE, SIZE, 1)).astype(np.uint8)
    mask = (np.arange(SENTENCES * LENGTH) < num_spots).reshape(SENTENCES, LENGTH)
    position = rng.normal(0, 300, (SENTENCES, LENGTH, 2)).astype(np.float32)
    return {"image": image, "expression": expression, "position": position, "mask": mask}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "train__positives": "soft",
            "model__l2_normalise": False,
            "model__temperature": 1.0,
            "model__learn_temperature": False,
            "retrieval__weighting": "mean",
        },
        {"model__freeze_encoder": True},
        {"model__predictor": "regression"},
        {"train__batching": "random_spots", "train__batch_spots": 16, "model__position": "none"},
    ],
    ids=["contrastive", "soft", "frozen", "regression", "random spots"],
)
def test_the_loss_of_a_batch_falls_as_it_is_repeated(changes: dict[str, object]) -> None:
    rank_state, batch = _rank_state(**changes), _batch()
    if rank_state.config.model.freeze_encoder:
        batch["features"] = np.tile(batch.pop("image")[..., 0, 0, :] / np.float32(255), 43)[..., :128]
    losses = [train_step(rank_state, batch)[0].item() for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("predictor", ["retrieval", "regression"])
def test_the_content_of_empty_slots_changes_nothing(predictor: str) -> None:
    clean, dirty = _batch(num_spots=11), _batch(num_spots=11)
    for name in ("image", "expression", "position"):
        dirty[name][~dirty["mask"]] = 99
    losses = [train_step(_rank_state(model__predictor=predictor), batch)[0].item() for batch in (clean, dirty)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_regression_is_the_mean_squared_error_of_the_valid_spots() -> None:
    rank_state, batch = _rank_state(model__predictor="regression"), _batch(num_spots=11)
    images = torch.from_numpy(batch["image"][batch["mask"]]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        predicted = rank_state.model(images).numpy()
    rank_state = _rank_state(model__predictor="regression")  # the forward above moved its batch statistics
    expected = ((predicted - batch["expression"][batch["mask"]]) ** 2).mean()
    loss, num_spots = train_step(rank_state, batch)
    assert num_spots == 11
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("num_spots", [0, 1])
def test_a_step_without_a_batch_leaves_batch_statistics_alone(num_spots: int) -> None:
    rank_state = _rank_state()
    before = {name: value.clone() for name, value in rank_state.model.named_buffers()}
    train_step(rank_state, _batch(num_spots))
    assert all(torch.equal(value, before[name]) for name, value in rank_state.model.named_buffers())
    train_step(rank_state, _batch())
    changed = [name for name, value in rank_state.model.named_buffers() if not torch.equal(value, before[name])]
    assert changed, "a full batch must move them again"


def test_groups_have_their_rates_and_norms_no_decay() -> None:
    model = TwoTowers(ModelConfig(image_encoder="small_cnn", spot_width=16), 8, 0, 32)
    config = TrainConfig(tower_lr=1e-4, head_lr=1e-3, weight_decay=0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, config).param_groups
    settings = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert settings.keys() == set(names.values())
    assert settings["log_scale"] == (1e-3, 0.0)
    assert settings["image_head.project.weight"] == (1e-3, 0.05)
    assert settings["spot_tower.blocks.0.ffn.0.weight"] == (1e-4, 0.05)
    assert settings["spot_tower.blocks.0.ffn_norm.weight"] == (1e-4, 0.0)
    published = make_optimizer(model, TrainConfig(optimizer="adam", weight_decay=1e-3)).param_groups
    assert {group["weight_decay"] for group in published} == {1e-3}


def test_the_rate_rises_then_falls_to_zero_or_stays() -> None:
    cosine, constant = TrainConfig(warmup=0.1), TrainConfig(warmup=0.0, schedule="constant")
    factors = [learning_rate_factor(step, 100, cosine) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[10] == 1.0
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0)
    assert {learning_rate_factor(step, 100, constant) for step in range(100)} == {1.0}
