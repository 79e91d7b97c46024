"""What only a CUDA device can show; skipped by name elsewhere. Run with `pytest -m gpu`.

Tests that take a device run on the CPU too, where they show no more than that they run.
"""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
from random_version import random_version

from mclstexp.config import Config, override
from mclstexp.model import nearest
from mclstexp.model.answer import answerer_of
from mclstexp.model.augment import augment
from mclstexp.model.losses import gather, pairs_loss
from mclstexp.model.towers import ImageTower, TwoTowers, build_network, native_bf16
from mclstexp.settings import ModelConfig, TrainConfig
from mclstexp.training.forward import Forward
from mclstexp.training.memory import micro_batch
from mclstexp.training.share import on_device, share_of
from mclstexp.training.step import RankState, check_losses, lone_rank, make_optimizer, train_step

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
on_each = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])


def needs_gpu(test: Callable[[], None]) -> Callable[[], None]:
    for mark in GPU:
        test = mark(test)
    return test


CONFIG = ModelConfig(spot_width=32, spot_layers=1, spot_dropout=0.0, batch_norm="frozen")
GENES, SIZE = 20, 64


def _batch(device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 3, SIZE, SIZE, generator=generator)
    sentence = (torch.rand(2, 6, GENES, generator=generator), 500 * torch.randn(2, 6, 2, generator=generator))
    return tuple(part.to(device) for part in (images, *sentence, torch.ones(2, 6, dtype=torch.bool)))


def _towers(device: str) -> TwoTowers:
    torch.manual_seed(0)
    return TwoTowers(CONFIG, GENES, 0, SIZE).to(device)


def _loss(towers: TwoTowers, device: str) -> torch.Tensor:
    tiles, *sentence = _batch(device)
    images, spots = towers.embed_images(tiles), towers.embed_spots(*sentence)
    valid = torch.ones(12, dtype=torch.bool, device=device)
    return pairs_loss(gather(images.float()), gather(spots.float().flatten(0, 1)), valid, towers.logit_scale)


@needs_gpu
def test_loss_and_gradients_equal_the_cpus() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    here, there = _towers("cpu"), _towers("cuda")
    losses = [_loss(towers, device) for towers, device in ((here, "cpu"), (there, "cuda"))]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-4)
    for (name, mine), theirs in zip(here.named_parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(
            theirs.grad.cpu(), mine.grad, rtol=1e-2, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@needs_gpu
def test_bf16_is_native_and_close() -> None:
    assert native_bf16(torch.device("cuda"))
    towers = _towers("cuda").to(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        loss = _loss(towers, "cuda")
    assert loss.item() == pytest.approx(_loss(_towers("cuda"), "cuda").item(), rel=0.05)


@needs_gpu
def test_a_compiled_tower_trains() -> None:
    towers = _towers("cuda")
    towers.image_tower.compile()
    optimizer = make_optimizer(towers, TrainConfig())
    before = _loss(towers, "cuda")
    for _ in range(5):
        optimizer.zero_grad()
        _loss(towers, "cuda").backward()
        optimizer.step()
    assert _loss(towers, "cuda") < before


@needs_gpu
def test_nccl_with_one_worker_gathers() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    dist.init_process_group("nccl", init_method=address, rank=0, world_size=1)
    try:
        towers, (images, *sentence) = _towers("cuda"), _batch("cuda")
        config = Config(model=CONFIG, train=TrainConfig(augmentation="none"))
        parallel = torch.nn.parallel.DistributedDataParallel(Forward(towers, config))
        tiles = (images.permute(0, 2, 3, 1) * 255).byte()
        image_nD, spot_SLD = parallel(tiles, [], *sentence)
        valid = torch.ones(12, dtype=torch.bool, device="cuda")
        loss = pairs_loss(image_nD, spot_SLD.flatten(0, 1), valid, towers.logit_scale)
        loss.backward()
        assert torch.isfinite(loss)
    finally:
        dist.destroy_process_group()


def _rank_state(device: str = "cuda", size: int | None = 5, **settings: object) -> RankState:
    fixed = {"model.batch_norm": "frozen", "model.spot_width": 32, "train.batch_sentences": 2}
    config = override(Config(), fixed | settings | {"train.micro_batch": size})
    torch.manual_seed(0)
    network = build_network(config.model, GENES, 0, SIZE).to(device).to(memory_format=torch.channels_last)
    return lone_rank(config, network, total_steps=10)


def _host_batches() -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    for num_spots in (12, 7, 0):
        yield {
            "image": rng.integers(0, 256, (2, 6, SIZE, SIZE, 3), np.uint8),
            "expression": rng.random((2, 6, GENES), np.float32),
            "position": rng.random((2, 6, 2), np.float32),
            "mask": (np.arange(12) < num_spots).reshape(2, 6),
        }


TINY = {"model.image_encoder": "small_cnn", "model.spot_layers": 1, "train.precision": "fp32"}


@on_each
def test_micro_batches_have_the_gradients_of_the_whole_batch(device: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    whole, parts = (_rank_state(device, size, **TINY) for size in (None, 5))
    share = {name: values.to(device) for name, values in share_of(next(_host_batches())).items()}
    losses = [train_step(rank_state, share)[0].item() for rank_state in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for (name, ours), theirs in zip(parts.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@needs_gpu
def test_batches_are_copied_ahead_unchanged() -> None:
    copied = list(on_device(_host_batches(), torch.device("cuda")))
    for (_, share), batch in zip(copied, _host_batches(), strict=True):
        for name, values in share_of(batch).items():
            assert share[name].is_cuda
            assert torch.equal(share[name].cpu(), values), name


@needs_gpu
def test_no_step_waits_for_the_gpu() -> None:
    rank_state = _rank_state()
    shares = [share for _, share in on_device(_host_batches(), torch.device("cuda"))]
    train_step(rank_state, shares[0])  # constants are copied once, and kernels are chosen
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for share in shares:
            train_step(rank_state, share)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_losses(rank_state)


@needs_gpu
def test_a_default_size_follows_from_the_free_memory() -> None:
    rank_state = _rank_state()
    config = override(rank_state.config, {"train.micro_batch": None})
    forward = Forward(rank_state.model, config)
    assert micro_batch(forward, config, 16, SIZE, workers_here=1) is None, "16 tiles fit"
    assert micro_batch(forward, config, 10**9, SIZE, workers_here=1) in {2**power for power in range(1, 30)}


@needs_gpu
def test_augmentation_runs_on_the_device() -> None:
    tiles = torch.randint(0, 256, (8, SIZE, SIZE, 3), dtype=torch.uint8, device="cuda")
    images = augment(tiles, "default", torch.Generator("cuda").manual_seed(0))
    assert images.is_cuda
    assert images.shape == (8, 3, SIZE, SIZE)


@on_each
@pytest.mark.parametrize("free_share", [1.0, 0.0], ids=["resident", "sent block by block"])
def test_search_gives_the_cpus_bits(device: str, free_share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "_MAX_FREE_SHARE", free_share)
    rng = np.random.default_rng(0)
    keys = nearest.directions(rng.normal(size=(40_000, 64)).astype(np.float32))
    keys[1::100] = keys[0]  # more ties than neighbours: the lower keys come first
    queries = np.concatenate([rng.normal(size=(40, 64)).astype(np.float32), keys[:2]])
    found, expected = (nearest.Keys(keys, torch.device(where)).nearest(queries, 200) for where in (device, "cpu"))
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours, theirs)


@on_each
def test_tiles_are_answered_as_on_the_cpu(device: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = random_version()
    model.config = override(model.config, {"train.precision": "fp32"})
    answerer, complete = answerer_of(model), np.ones(20, bool)
    tiles = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    answer, expected = (answerer.build(torch.device(where))((tiles,), complete) for where in (device, "cpu"))
    np.testing.assert_allclose(answer.values, expected.values, rtol=1e-2, atol=1e-3)
    for name, values in expected.confidence.items():
        np.testing.assert_allclose(answer.confidence[name], values, rtol=1e-2, atol=1e-3, err_msg=name)


@on_each
@pytest.mark.parametrize("free_share", [1.0, 0.0], ids=["resident", "sent block by block"])
def test_threads_answer_as_one_does(device: str, free_share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "_MAX_FREE_SHARE", free_share)
    monkeypatch.setitem(nearest._KEY_BLOCK, device, 8)  # of 30 keys
    answer = answerer_of(random_version()).build(torch.device(device))
    tiles = np.random.default_rng(0).integers(0, 256, (30, 4, 32, 32, 3), np.uint8)
    complete = np.ones(4, bool)
    expected = [answer((part,), complete) for part in tiles]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda part: answer((part,), complete), tiles))
    for found, alone in zip(answers, expected, strict=True):
        assert np.array_equal(found.values, alone.values)
        for name, values in alone.confidence.items():
            assert np.array_equal(found.confidence[name], values, equal_nan=True), name
    assert not np.array_equal(expected[0].values, expected[1].values), "parts differ"


@on_each
def test_a_compiled_tower_gives_what_it_gives_eagerly(device: str) -> None:
    torch.manual_seed(0)
    tower = ImageTower(ModelConfig(image_encoder="small_cnn"), 32).eval().to(device)
    tower = tower.to(memory_format=torch.channels_last)
    images = torch.rand(8, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = tower(images)
        tower.compile(backend="inductor" if device == "cuda" else "eager")
        torch.testing.assert_close(tower(images), expected, rtol=1e-2, atol=1e-2)
