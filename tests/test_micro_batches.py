"""Micro-batches of the image tower: loss and gradients of the whole batch on one rank and on two, and their size."""

import os
import socket
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from mclstexp.config import Config, override
from mclstexp.data.spots import Batch
from mclstexp.errors import ConfigError
from mclstexp.model.augment import draw
from mclstexp.model.towers import build_network
from mclstexp.training import memory
from mclstexp.training.forward import Forward
from mclstexp.training.share import share_of
from mclstexp.training.step import RankState, lone_rank, train_step

SENTENCES, LENGTH, GENES, SIZE = 4, 6, 5, 16
SETTINGS: dict[str, object] = {
    "model.image_encoder": "small_cnn",
    "model.batch_norm": "frozen",
    "model.spot_width": 16,
    "model.spot_layers": 1,
    "model.spot_dropout": 0.0,
    "model.embedding_dim": 8,
    "train.batch_sentences": SENTENCES,
    "train.precision": "fp32",
}
LOSSES: dict[str, dict[str, object]] = {
    "pairs": {},
    "soft": {"train.positives": "soft", "model.l2_normalise": False, "retrieval.weighting": "mean"},
    "regression": {"model.predictor": "regression"},
}


def _rank_state(**changes: object) -> RankState:
    config = override(Config(), SETTINGS | {name.replace("__", "."): value for name, value in changes.items()})
    torch.manual_seed(0)
    model = build_network(config.model, GENES, 0, SIZE).to(memory_format=torch.channels_last)
    return lone_rank(config, model, total_steps=100)


def _batch(mask: np.ndarray) -> Batch:
    rng = np.random.default_rng(0)
    expression = rng.random((*mask.shape, GENES), np.float32)
    image = rng.integers(0, 256, (*mask.shape, SIZE, SIZE, 3), np.uint8)
    position = rng.normal(0, 300, (*mask.shape, 2)).astype(np.float32)
    return {"image": image, "expression": expression, "position": position, "mask": mask}


def _mask(*num_spots: int) -> np.ndarray:
    return np.arange(LENGTH) < np.array(num_spots)[:, None]


def _step(rank_state: RankState, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Returns the loss and the gradients of a step."""
    loss, _ = train_step(rank_state, share_of(batch))
    named = rank_state.model.named_parameters()
    return loss.item(), {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def _require_same(
    found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]
) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    largest = max(gradient.norm() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-6 * largest, name


@pytest.mark.parametrize("size", [1, 5, 8])
@pytest.mark.parametrize("changes", LOSSES.values(), ids=LOSSES)
def test_parts_have_the_loss_and_gradients_of_the_whole_batch(changes: dict[str, object], size: int) -> None:
    batch = _batch(_mask(6, 4, 6, 1))
    _require_same(_step(_rank_state(**changes, train__micro_batch=size), batch), _step(_rank_state(**changes), batch))


def test_a_batch_without_tiles_has_no_gradient() -> None:
    loss, gradients = _step(_rank_state(train__micro_batch=2), _batch(_mask(0, 0, 0, 0)))
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


def _run_rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for loss, changes in LOSSES.items():
        for name, spots in RANKS.items():
            rank_state = _rank_state(**changes, train__micro_batch=4, train__augmentation="none")
            rank_state.parallel = DistributedDataParallel(rank_state.parallel)
            rank_state.rank, rank_state.world_size = rank, 2
            whole = _batch(_mask(*spots))
            part = {key: values[2 * rank : 2 * rank + 2] for key, values in whole.items()}
            torch.save(_step(rank_state, part), f"{folder}/{loss} {name} {rank}.pt")
    dist.destroy_process_group()


RANKS = {"unequal": (6, 5, 3, 0), "empty": (6, 6, 0, 0)}
"""Spots of the sentences of two ranks, two each."""


SHARED: dict[str, object] = {
    "train__batching": "random_spots",
    "train__num_workers": 2,
    "model__position": "none",
    "model__spot_dropout": 0.3,
}
"""Both ranks embed the one sentence of all spots, and drop values in it."""


def _run_shared(rank: int, folder: str) -> None:
    """Takes a step of random spots with dropout in both towers, on two ranks with unequally many tiles."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rank_state = _rank_state(**SHARED, train__batch_spots=2 * LENGTH, train__augmentation="none")
    rank_state.model.image_tower.register_forward_hook(lambda _, __, features: nn.functional.dropout(features, 0.5))
    rank_state.parallel = DistributedDataParallel(rank_state.parallel)
    rank_state.rank, rank_state.world_size = rank, 2
    part = {key: values[rank : rank + 1] for key, values in _batch(_mask(6, 3)).items()}
    loss, _ = train_step(rank_state, share_of(part))
    torch.save(loss, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_drop_the_same_values_of_shared_spots_however_many_images_they_have(tmp_path: Path) -> None:
    mp.spawn(_run_shared, (str(tmp_path),), nprocs=2)
    here, there = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert here == there


@pytest.mark.slow
def test_two_ranks_in_parts_equal_one_with_the_whole_batch(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_run_rank, (port, str(tmp_path)), nprocs=2)
    for loss, changes in LOSSES.items():
        for name, spots in RANKS.items():
            expected = _step(_rank_state(**changes, train__augmentation="none"), _batch(_mask(*spots)))
            for rank in range(2):
                _require_same(torch.load(tmp_path / f"{loss} {name} {rank}.pt", weights_only=True), expected)


def _forward(size: int | None, dropout: float = 0.0) -> tuple[Forward, torch.Tensor, list[torch.Tensor]]:
    """Returns the towers, tiles and draws; the image tower drops values if told to."""
    rank_state = _rank_state()
    tower = rank_state.model.image_tower
    tower.register_forward_hook(lambda _, __, features: nn.functional.dropout(features, dropout))
    tiles = torch.from_numpy(_batch(_mask(6, 6, 2, 0))["image"].reshape(-1, SIZE, SIZE, 3)[:14])
    draws = draw("default", len(tiles), torch.Generator().manual_seed(0))
    return Forward(rank_state.model, rank_state.config, size), tiles, draws


def _sentence() -> tuple[torch.Tensor, ...]:
    share = share_of(_batch(_mask(6, 6, 2, 0)))
    return share["expression"], share["position"], share["mask"]


def test_a_part_drops_the_same_values_when_it_runs_again() -> None:
    forward, tiles, draws = _forward(size=4, dropout=0.5)
    torch.manual_seed(1)
    images, _ = forward(tiles, draws, *_sentence())
    images.square().sum().backward()
    found = [parameter.grad for parameter in forward.model.image_tower.parameters()]
    forward.zero_grad()
    torch.manual_seed(1)
    parts = [forward.embed_images(tiles[at], *(each[at] for each in draws)) for at in torch.arange(14).split(4)]
    expected = torch.cat(parts)
    assert torch.equal(images, expected)
    expected.square().sum().backward()
    for gradient, parameter in zip(found, forward.model.image_tower.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def _count(forward: Forward, seen: list[int]) -> RemovableHandle:
    return forward.model.image_tower.register_forward_hook(lambda _, tiles, __: seen.append(len(tiles[0])))


def test_all_parts_but_the_last_run_twice_and_one_keeps_activations_at_a_time() -> None:
    forward, tiles, draws = _forward(size=4)
    seen: list[int] = []
    _count(forward, seen)
    images, _ = forward(tiles, draws, *_sentence())
    assert seen == [4, 4, 4, 2]
    images.sum().backward()
    assert seen == [4, 4, 4, 2, 4, 4, 4]


@pytest.mark.parametrize(
    ("room", "size"), [(-5, 1), (0.9, 1), (1, 1), (7.9, 4), (8, 8), (130, 128), (511.9, 256), (512, 512), (1e6, 600)]
)
def test_a_default_is_all_tiles_or_a_power_of_two_that_fits(room: float, size: int) -> None:
    assert memory.fitting(room, num_tiles=600) == size


def test_what_autograd_keeps_of_a_tile_is_counted() -> None:
    """By hand: of a linear map and a ReLU it keeps the input and the output."""
    forward, _, _ = _forward(None)
    tower = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 50), nn.ReLU())
    forward.model.image_tower = tower  # type: ignore[assignment]  # as simple as can be
    forward.model.image_head = nn.Identity()
    found = memory.activation_bytes(forward, _rank_state().config, SIZE)
    assert found == 4 * (3 * SIZE * SIZE + 50)


@pytest.mark.parametrize(
    ("changes", "room", "size"),
    [
        ({}, 24.5, None),
        ({}, 15.5, 8),
        ({}, -1.0, 1),
        ({"train__micro_batch": 7}, 0.0, 7),
        ({"train__micro_batch": 24}, 0.0, None),
        ({"model__batch_norm": "local"}, 0.0, None),
        ({"model__freeze_encoder": True}, 0.0, None),
    ],
)
def test_the_size_is_the_setting_or_fits_the_memory_that_is_free(
    changes: dict[str, object], room: float, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for that many tiles, for each of two workers, beside four copies of what is learnt."""
    rank_state = _rank_state(**changes)
    forward = Forward(rank_state.model, rank_state.config)
    learnt = 4 * sum(parameter.numel() for parameter in forward.parameters())
    plain = _rank_state()
    tile = memory.activation_bytes(Forward(plain.model, plain.config), plain.config, SIZE)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * (4 * learnt + 2 * room * tile))
    assert memory.micro_batch(forward, rank_state.config, 24, SIZE, workers_here=2) == size


def test_free_memory_is_the_machines() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory.free_bytes(torch.device("cpu")) < total


def test_memory_that_others_use_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    left = psutil.virtual_memory()._replace(available=12345)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: left)
    assert memory.free_bytes(torch.device("cpu")) == 12345


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"model__batch_norm": "local"},
            r"model\.batch_norm=local takes its statistics from the whole batch; use frozen",
        ),
        ({"model__freeze_encoder": True}, r"model\.freeze_encoder=true trains none; use false"),
    ],
)
def test_what_cannot_be_cut_is_refused(changes: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.micro_batch=4 runs a trained image tower in parts.*{fault}"):
        _rank_state(**changes, train__micro_batch=4)
