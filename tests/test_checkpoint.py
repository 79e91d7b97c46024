"""A checkpoint is the whole state: what goes on from it is what would have gone on without it."""

from pathlib import Path

import pytest
import torch

from mclstexp.errors import RunError
from mclstexp.model.towers import TwoTowers
from mclstexp.settings import ModelConfig, TrainConfig
from mclstexp.training.checkpoint import STATE, TrainState, load_checkpoint, save_checkpoint
from mclstexp.training.step import make_optimizer

GENES, SIZE = 6, 32


def _model_and_optimizer(optimizer: str, seed: int) -> tuple[TwoTowers, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    config = ModelConfig(image_encoder="small_cnn", spot_width=16, spot_layers=1, spot_dropout=0, embedding_dim=8)
    model = TwoTowers(config, GENES, 0, SIZE).to(memory_format=torch.channels_last)
    return model, make_optimizer(model, TrainConfig(optimizer=optimizer))


def _step(model: TwoTowers, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = (torch.rand(4, 3, SIZE, SIZE), torch.rand(1, 4, GENES), torch.rand(1, 4, 2), torch.ones(1, 4).bool())
    images, spots = model(*inputs)
    optimizer.zero_grad()
    ((images - spots[0]) ** 2 * torch.rand(8)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_steps_after_a_checkpoint_are_those_without_it(optimizer: str, tmp_path: Path) -> None:
    calm = _model_and_optimizer(optimizer, seed=0)
    for seed in range(3):
        _step(*calm, seed)
    save_checkpoint(str(tmp_path), *calm, TrainState({}, epoch=1, step=3, consumed=["A/0", 7]))
    again = _model_and_optimizer(optimizer, seed=1)
    assert load_checkpoint(str(tmp_path), *again) == TrainState({}, epoch=1, step=3, consumed=["A/0", 7])
    for seed in range(3, 6):
        _step(*calm, seed)
        _step(*again, seed)
    for name, value in calm[0].state_dict().items():
        assert torch.equal(again[0].state_dict()[name], value), name


def test_half_a_checkpoint_is_refused(tmp_path: Path) -> None:
    last = _model_and_optimizer("adam", seed=0)
    _step(*last, seed=0)
    save_checkpoint(str(tmp_path), *last, TrainState({}))
    (tmp_path / STATE).unlink()
    with pytest.raises(RunError, match="not a complete checkpoint"):
        load_checkpoint(str(tmp_path), *last)


def test_a_score_that_is_not_better_counts_as_worse() -> None:
    state = TrainState({})
    for score, num_worse in ((-0.1, 0), (-0.2, 1), (-0.1, 2), (0.3, 0), (0.2, 1)):
        state.judge(score)
        assert state.num_worse == num_worse
    assert state.best_score == 0.3
