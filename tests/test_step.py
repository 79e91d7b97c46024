"""One optimiser step on one rank: every kind of network learns, no step waits for a GPU, padding is no data."""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mclstexp.config import Config, override
from mclstexp.data.spots import Batch
from mclstexp.errors import RunError
from mclstexp.model.towers import TwoTowers, build_network
from mclstexp.settings import ModelConfig, TrainConfig
from mclstexp.training import worker
from mclstexp.training.share import Share, share_of
from mclstexp.training.step import CHECK_EVERY, RankState, learning_rate_factor, lone_rank, make_optimizer, train_step

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
    return lone_rank(config, model, total_steps=100)


def _batch(num_spots: int = SENTENCES * LENGTH) -> Batch:
    """Tiles whose brightness is their expression; the slots after `num_spots` are empty."""
    rng = np.random.default_rng(0)
    expression = rng.random((SENTENCES, LENGTH, GENES)).astype(np.float32)
    image = np.tile((255 * expression[..., :3])[:, :, None, None], (1, 1, SIZE, SIZE, 1)).astype(np.uint8)
    mask = (np.arange(SENTENCES * LENGTH) < num_spots).reshape(SENTENCES, LENGTH)
    position = rng.normal(0, 300, (SENTENCES, LENGTH, 2)).astype(np.float32)
    return {"image": image, "expression": expression, "position": position, "mask": mask}


KINDS: dict[str, dict[str, object]] = {
    "contrastive": {},
    "soft": {
        "train__positives": "soft",
        "model__l2_normalise": False,
        "model__temperature": 1.0,
        "model__learn_temperature": False,
        "retrieval__weighting": "mean",
    },
    "frozen": {"model__freeze_encoder": True},
    "regression": {"model__predictor": "regression"},
    "random spots": {"train__batching": "random_spots", "train__batch_spots": 16, "model__position": "none"},
}
IN_PARTS: dict[str, object] = {"model__batch_norm": "frozen", "train__micro_batch": 3}


def _share(changes: dict[str, object]) -> Share:
    batch = _batch()
    if changes.get("model__freeze_encoder"):
        batch["features"] = np.tile(batch.pop("image")[..., 0, 0, :] / np.float32(255), 43)[..., :128]
    return share_of(batch)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_the_loss_of_a_batch_falls_as_it_is_repeated(changes: dict[str, object]) -> None:
    rank_state, share = _rank_state(**changes), _share(changes)
    losses = [train_step(rank_state, share)[0].item() for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("predictor", ["retrieval", "regression"])
def test_the_content_of_empty_slots_changes_nothing(predictor: str) -> None:
    clean, dirty = _batch(num_spots=11), _batch(num_spots=11)
    for name in ("image", "expression", "position"):
        dirty[name][~dirty["mask"]] = 99
    losses = [
        train_step(_rank_state(model__predictor=predictor), share_of(batch))[0].item() for batch in (clean, dirty)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_regression_is_the_mean_squared_error_of_the_valid_spots() -> None:
    rank_state, batch = _rank_state(model__predictor="regression"), _batch(num_spots=11)
    images = torch.from_numpy(batch["image"][batch["mask"]]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        predicted = rank_state.model(images).numpy()
    rank_state = _rank_state(model__predictor="regression")  # the forward above moved its batch statistics
    expected = ((predicted - batch["expression"][batch["mask"]]) ** 2).mean()
    loss, num_spots = train_step(rank_state, share_of(batch))
    assert num_spots == 11
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("num_spots", [0, 1])
def test_a_step_of_less_than_two_tiles_can_be_taken_without_batch_statistics(num_spots: int) -> None:
    rank_state = _rank_state()
    before = {name: value.clone() for name, value in rank_state.model.named_buffers()}
    rank_state.model.image_tower.train(False)
    train_step(rank_state, share_of(_batch(num_spots)))
    assert all(torch.equal(value, before[name]) for name, value in rank_state.model.named_buffers())


class _NoSync(TorchDispatchMode):
    """Refuses what makes a host wait for its GPU: reading a number, taking rows by a mask, copying from Python."""

    WAITING: ClassVar = {
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "is_nonzero",
        "equal",
        "lift_fresh",
        "unique",
    }

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        assert name not in self.WAITING, f"{func} makes a GPU wait"
        assert not by_mask, f"{func} takes rows by a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("operation", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool((x > 0).all())])
def test_what_waits_for_a_gpu_is_noticed(operation: Callable[[torch.Tensor], object]) -> None:
    with _NoSync(), pytest.raises(AssertionError, match=r"wait|by a mask"):
        operation(torch.arange(3.0))


@pytest.mark.parametrize("augmentation", ["default", "reference", "flips"])
def test_a_step_never_waits_for_a_gpu(augmentation: str) -> None:
    _step_without_waiting({"train__augmentation": augmentation})


@pytest.mark.parametrize("changes", [*KINDS.values(), IN_PARTS], ids=[*KINDS, "micro-batches"])
def test_a_step_of_any_kind_never_waits_for_a_gpu(changes: dict[str, object]) -> None:
    _step_without_waiting(changes)


def _step_without_waiting(changes: dict[str, object]) -> None:
    rank_state, share = _rank_state(**changes), _share(changes)
    train_step(rank_state, share)  # constants are copied once
    with _NoSync():
        train_step(rank_state, share)


def test_a_loss_that_is_not_finite_is_noticed_after_ten_steps_and_named() -> None:
    rank_state, share = _rank_state(), share_of(_batch())
    train_step(rank_state, share)
    with torch.no_grad():
        next(rank_state.model.parameters()).fill_(torch.nan)
    for rank_state.state.step in range(1, CHECK_EVERY - 1):
        train_step(rank_state, share)
    rank_state.state.step = CHECK_EVERY - 1
    with pytest.raises(RunError, match=r"the loss is nan at step 1; lower train\.tower_lr"):
        train_step(rank_state, share)


def test_a_loss_that_is_not_finite_is_noticed_before_anything_is_stored() -> None:
    rank_state, share = _rank_state(), share_of(_batch())
    share["expression"][0, 0, 0] = torch.nan
    train_step(rank_state, share)
    with pytest.raises(RunError, match="the loss is nan at step 0"):
        worker.checkpoint(rank_state, torch.tensor(0.0), {})


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
