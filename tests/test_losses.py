"""Each loss against a NumPy reference written from its formula, on one process and over gloo ranks."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from mclstexp.config import Config, override
from mclstexp.errors import ConfigError
from mclstexp.model import infonce
from mclstexp.model.losses import LOSSES, REGRESSION, gather, pairs_loss, regression_loss, require_loss, soft_loss
from mclstexp.model.towers import TwoTowers
from mclstexp.settings import ModelConfig, TrainConfig
from mclstexp.training.forward import Forward

SENTENCES, LENGTH, GENES, SIZE = 4, 6, 5, 16
MODEL = ModelConfig(
    image_encoder="small_cnn", spot_width=16, spot_layers=1, spot_dropout=0.0, embedding_dim=8, batch_norm="frozen"
)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _reference(images: np.ndarray, spots: np.ndarray, scale: float) -> tuple[float, np.ndarray, np.ndarray]:
    """Returns the loss and its gradients for images and spots, from the formula in double precision."""
    count = len(images)
    logits, identity = scale * spots @ images.T, np.eye(count)
    by_row, by_column = _log_softmax(logits), _log_softmax(logits.T)
    loss = -(np.trace(by_row) + np.trace(by_column)) / (2 * count)
    d_logits = ((np.exp(by_row) - identity) + (np.exp(by_column) - identity).T) / (2 * count)
    return loss, scale * d_logits.T @ spots, scale * d_logits @ images


@pytest.mark.parametrize("num_slots", [1, 2, 7, 64])
@pytest.mark.parametrize("scale", [1.0, 14.3])
@pytest.mark.parametrize("empty_share", [0.0, 0.4])
def test_loss_and_gradients_equal_the_formula(num_slots: int, scale: float, empty_share: float) -> None:
    rng = np.random.default_rng(num_slots)
    valid = rng.random(num_slots) >= empty_share
    valid[0] = True
    images, spots = (torch.tensor(rng.normal(size=(num_slots, 8)), dtype=torch.float32) for _ in range(2))
    images.requires_grad_()
    spots.requires_grad_()
    loss = pairs_loss(images, spots, torch.from_numpy(valid), torch.tensor(scale))
    loss.backward()
    inputs = (tensor.detach().numpy().astype(np.float64)[valid] for tensor in (images, spots))
    expected, d_images, d_spots = _reference(*inputs, scale)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for tensor, gradient in ((images, d_images), (spots, d_spots)):
        assert tensor.grad is not None
        np.testing.assert_allclose(tensor.grad.numpy()[valid], gradient, rtol=1e-3, atol=1e-5)
        assert not tensor.grad.numpy()[~valid].any()


@pytest.mark.parametrize("block_numbers", [1, 7 * 40, 10**6])
@pytest.mark.parametrize("scale", [0.5, 300.0])
def test_blocks_of_rows_give_the_loss_and_gradients_of_the_whole_matrix(
    block_numbers: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infonce, "BLOCK_NUMBERS", block_numbers)
    rng = np.random.default_rng(1)
    valid = rng.random(40) < 0.7
    images, spots = (torch.tensor(rng.normal(size=(40, 8)), dtype=torch.float32) for _ in range(2))
    images[~valid] = torch.inf
    spots[~valid] = torch.nan
    tensors = [images.requires_grad_(), spots.requires_grad_(), torch.tensor(scale, requires_grad=True)]
    loss = pairs_loss(tensors[0], tensors[1], torch.from_numpy(valid), tensors[2])
    loss.backward()
    whole = [tensor.detach().double().requires_grad_() for tensor in tensors]
    rows, own = torch.from_numpy(np.flatnonzero(valid)), torch.arange(int(valid.sum()))
    logits = whole[2] * whole[1][rows] @ whole[0][rows].T
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for tensor, reference in zip(tensors, whole, strict=True):
        assert tensor.grad is not None
        assert reference.grad is not None
        error = (tensor.grad.double() - reference.grad).norm() / reference.grad.norm()
        assert error < 1e-5


@pytest.mark.parametrize("name", LOSSES)
def test_no_number_of_an_empty_slot_reaches_a_loss(name: str) -> None:
    rng = np.random.default_rng(2)
    images, spots = (torch.tensor(rng.normal(size=(12, 4)), dtype=torch.float32) for _ in range(2))
    valid, scale = torch.arange(12) % 3 > 0, torch.tensor(2.0)
    expected = LOSSES[name](images[valid], spots[valid], torch.ones(8, dtype=torch.bool), scale)
    images[~valid], spots[~valid] = torch.inf, torch.nan
    images.requires_grad_()
    loss = LOSSES[name](images, spots, valid, scale)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert images.grad is not None
    assert images.grad[valid].abs().min() > 0
    assert not images.grad[~valid].any()


def test_soft_positives_follow_similarity_within_either_side() -> None:
    rng = np.random.default_rng(0)
    images, spots, scale = rng.normal(size=(6, 4)), rng.normal(size=(6, 4)), 2.5
    similarity = (images @ images.T + spots @ spots.T) / (2 * scale)
    target = np.exp(_log_softmax(similarity))
    logits = scale * spots @ images.T
    expected = -((target * _log_softmax(logits)).sum() + (target * _log_softmax(logits.T)).sum()) / 12
    tensors = (torch.tensor(values, dtype=torch.float32) for values in (images, spots))
    loss = soft_loss(*tensors, torch.ones(6, dtype=torch.bool), torch.tensor(scale))
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_regression_counts_valid_slots_only() -> None:
    predicted, truth = torch.tensor([[1.0, 2.0], [9.0, 9.0]], requires_grad=True), torch.zeros(2, 2)
    loss = regression_loss(predicted, truth, torch.tensor([True, False]), torch.tensor(5.0))
    loss.backward()
    assert loss.item() == pytest.approx(2.5)
    assert predicted.grad is not None
    assert predicted.grad.tolist() == [[1.0, 2.0], [0.0, 0.0]]


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_valid_slots_has_zero_loss_and_gradient(name: str) -> None:
    images, spots = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    loss = LOSSES[name](images, spots, torch.zeros(3, dtype=torch.bool), torch.tensor(2.0))
    loss.backward()
    assert loss.item() == 0
    assert images.grad is not None
    assert not images.grad.any()
    assert spots.grad is None or not spots.grad.any()


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({}, pairs_loss),
        ({"train.positives": "soft", "model.l2_normalise": False, "retrieval.weighting": "mean"}, soft_loss),
        ({"model.predictor": "regression"}, regression_loss),
    ],
)
def test_the_settings_choose_the_loss(settings: dict[str, object], loss: object) -> None:
    assert require_loss(override(Config(), settings)) is loss


def test_help_names_every_loss_between_images_and_spots() -> None:
    text = TrainConfig.model_fields["positives"].description or ""
    assert [name for name in LOSSES.keys() - {REGRESSION} if f"`{name}`" not in text] == []


@pytest.mark.parametrize(
    ("name", "hint"),
    [("pair", "did you mean pairs"), ("regression", "known: pairs, soft"), ("x", "known: pairs, soft")],
)
def test_an_unknown_loss_is_refused_with_the_known_ones(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.positives={name} is not a loss; {hint}"):
        require_loss(override(Config(), {"train.positives": name}))


def test_equal_embeddings_lose_the_logarithm_of_the_batch() -> None:
    same = torch.ones(128, 4)
    loss = pairs_loss(same, same, torch.ones(128, dtype=torch.bool), torch.tensor(1.0))
    assert loss.item() == pytest.approx(np.log(128), rel=1e-5)


def _batch() -> dict[str, torch.Tensor]:
    """Returns four sentences, one short and one empty (the filler of a last step)."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(SENTENCES, LENGTH, dtype=torch.bool)
    mask[1, 4:] = False
    mask[3] = False
    return {
        "image": torch.randint(256, (SENTENCES, LENGTH, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator),
        "expression": torch.rand(SENTENCES, LENGTH, GENES, generator=generator),
        "position": 500 * torch.randn(SENTENCES, LENGTH, 2, generator=generator),
        "mask": mask,
    }


def _forward(towers: TwoTowers) -> Forward:
    return Forward(towers, Config(model=MODEL, train=TrainConfig(augmentation="none", precision="fp32")))


def _loss(model: torch.nn.Module, towers: TwoTowers, part: dict[str, torch.Tensor], one_sentence: bool) -> torch.Tensor:
    """Returns the global loss as a training step computes it: towers on the own part, loss on all parts."""
    mask = part["mask"]
    sentence = (part["expression"], part["position"], mask)
    if one_sentence:
        flat = (part["expression"].flatten(0, 1), part["position"].flatten(0, 1), mask.reshape(-1, 1).float())
        expression, position, everybody = (gather(values)[None] for values in flat)
        sentence = (expression, position, everybody.squeeze(-1) > 0)
    images, spots = model(part["image"].flatten(0, 1), [], *sentence)
    spots = spots.flatten(0, 1)
    valid = gather(mask.reshape(-1, 1).float()).squeeze(1) > 0
    return pairs_loss(gather(images), spots if one_sentence else gather(spots), valid, towers.logit_scale)


def _towers() -> TwoTowers:
    torch.manual_seed(1)
    return TwoTowers(MODEL, GENES, 0, SIZE).train()


def _run_rank(rank: int, world_size: int, port: int, one_sentence: bool, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    towers = _towers()
    share = SENTENCES // world_size
    part = {name: values[rank * share : (rank + 1) * share] for name, values in _batch().items()}
    parallel = DistributedDataParallel(_forward(towers))  # must outlive backward, or nothing is averaged
    loss = _loss(parallel, towers, part, one_sentence)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in towers.named_parameters()}
    torch.save({"loss": loss.item(), "gradients": gradients}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "one_sentence"), [(2, True), (4, False)])
def test_ranks_together_equal_one_process_on_the_joined_batch(
    world_size: int, one_sentence: bool, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_run_rank, (world_size, port, one_sentence, str(tmp_path)), nprocs=world_size)
    towers, batch = _towers(), _batch()
    expected = _loss(_forward(towers), towers, batch, one_sentence)
    expected.backward()
    with torch.no_grad():
        _agrees_with_numpy(towers, batch, one_sentence, expected.item())
    for rank in range(world_size):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
        for name, parameter in towers.named_parameters():
            torch.testing.assert_close(found["gradients"][name], parameter.grad, rtol=1e-3, atol=1e-5)


def _agrees_with_numpy(towers: TwoTowers, batch: dict[str, torch.Tensor], one_sentence: bool, loss: float) -> None:
    valid = batch["mask"].flatten()
    sentence = [batch[name] for name in ("expression", "position", "mask")]
    if one_sentence:
        sentence = [values.flatten(0, 1)[None] for values in sentence]
    images = _forward(towers).embed_images(batch["image"].flatten(0, 1))[valid].double().numpy()
    spots = towers.embed_spots(*sentence).flatten(0, 1)[valid].double().numpy()
    assert loss == pytest.approx(_reference(images, spots, towers.logit_scale.item())[0], rel=1e-4)


@pytest.mark.odd
@pytest.mark.parametrize("unknown", [0.0, 0.3, 1.0])
def test_genes_that_are_not_measured_have_no_error_and_no_gradient(unknown: float) -> None:
    rng = np.random.default_rng(0)
    predicted = torch.tensor(rng.normal(size=(20, GENES)), dtype=torch.float32, requires_grad=True)
    measured = rng.normal(size=(20, GENES)).astype(np.float32)
    measured[rng.random(measured.shape) < unknown] = np.nan
    valid = np.arange(20) % 4 > 0
    loss = regression_loss(predicted, torch.from_numpy(measured), torch.from_numpy(valid), torch.tensor(1.0))
    loss.backward()
    assert predicted.grad is not None
    gap = np.where(valid[:, None], predicted.detach().numpy() - measured, np.nan).astype(np.float64)
    known = ~np.isnan(gap)
    if unknown == 1:
        assert (loss.item(), predicted.grad.abs().sum().item()) == (0, 0)
        return
    assert loss.item() == pytest.approx(np.nanmean(gap**2), rel=1e-6)
    np.testing.assert_allclose(predicted.grad.numpy(), np.where(known, 2 * gap, 0) / known.sum(), rtol=1e-5, atol=1e-9)
    if unknown == 0:
        expected = F.mse_loss(predicted[valid], torch.from_numpy(measured)[valid])
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
