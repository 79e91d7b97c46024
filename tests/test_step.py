"""One optimiser step, on one rank: every kind of network learns what it is shown, and padding is no data."""

import numpy as np
import pytest
import torch

from mclstexp.config import Config, override
from mclstexp.data.spots import Batch
from mclstexp.model.towers import build_network
from mclstexp.training.checkpoint import TrainState
from mclstexp.training.step import RankState, make_optimizer, train_step

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
    losses = [train_step(rank_state, batch)[0].item() for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("predictor", ["retrieval", "regression"])
def test_what_stands_in_empty_slots_changes_nothing(predictor: str) -> None:
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
