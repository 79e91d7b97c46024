"""A checkpoint is the whole state: what goes on from it is what would have gone on without it."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mclstexp.errors import RunError
from mclstexp.model.towers import TwoTowers
from mclstexp.settings import ModelConfig, TrainConfig
from mclstexp.training.checkpoint import OPTIMIZER, STATE, WEIGHTS, TrainState, load_checkpoint, save_checkpoint
from mclstexp.training.step import make_optimizer

GENES, SIZE = 6, 32


def _model_and_optimizer(optimizer: str, seed: int) -> tuple[TwoTowers, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    config = ModelConfig(image_encoder="small_cnn", spot_width=16, spot_layers=1, spot_dropout=0, embedding_dim=8)
    model = TwoTowers(config, GENES, 0, SIZE).to(memory_format=torch.channels_last)
    return model, make_optimizer(model, TrainConfig(optimizer=optimizer))


def _step(model: TwoTowers, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    images = model.embed_images(torch.rand(4, 3, SIZE, SIZE))
    spots = model.embed_spots(torch.rand(1, 4, GENES), torch.rand(1, 4, 2), torch.ones(1, 4).bool())
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


def _edit(folder: Path, **changed: object) -> None:
    tree = json.loads((folder / STATE).read_text())
    (folder / STATE).write_text(json.dumps(tree | changed))


def _without_digests(folder: Path) -> None:
    """Makes a checkpoint one of an earlier version."""
    tree = json.loads((folder / STATE).read_text())
    del tree["digests"]
    (folder / STATE).write_text(json.dumps(tree))


def _flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 0x40
    file.write_bytes(data)


def _retyped(file: Path, old: bytes, new: bytes) -> None:
    assert old in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(old, new, 1))


def _poison(file: Path, value: float) -> None:
    tensors = load_file(file)
    next(tensor for tensor in tensors.values() if tensor.is_floating_point()).view(-1)[-1] = value
    save_file(tensors, file)


def _shortened(file: Path) -> None:
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.ndim)
    save_file(tensors | {name: tensors[name][:-1].clone()}, file)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    last = _model_and_optimizer("adam", seed=0)
    _step(*last, seed=0)
    save_checkpoint(str(tmp_path), *last, TrainState({"a": (1, 0.1)}, epoch=3, consumed=["A/0", 7], best_score=0.25))
    return tmp_path


FILES = (WEIGHTS, OPTIMIZER, STATE)
DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-20]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
    "bit at the end": lambda file: _flip(file, -9),
    "bit in the middle": lambda file: _flip(file, file.stat().st_size // 2),
    "bit at the start": lambda file: _flip(file, 0),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name_and_changes_nothing(saved: Path, file: str, damage: str) -> None:
    DAMAGE[damage](saved / file)
    model, optimizer = _model_and_optimizer("adam", seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RunError, match=f"{re.escape(str(saved))} is damaged: "):
        load_checkpoint(str(saved), model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.state


OLD_DAMAGE: dict[str, Callable[[Path], object]] = {
    "weights cut": lambda folder: DAMAGE["cut"](folder / WEIGHTS),
    "moments cut": lambda folder: DAMAGE["cut"](folder / OPTIMIZER),
    "weights NaN": lambda folder: _poison(folder / WEIGHTS, float("nan")),
    "moments infinite": lambda folder: _poison(folder / OPTIMIZER, float("inf")),
    "weights of whole numbers": lambda folder: _retyped(folder / WEIGHTS, b'"F32"', b'"I32"'),
    "moments of whole numbers": lambda folder: _retyped(folder / OPTIMIZER, b'"F32"', b'"U32"'),
    "weights of another shape": lambda folder: _shortened(folder / WEIGHTS),
    "moments of another shape": lambda folder: _shortened(folder / OPTIMIZER),
    "state of another key": lambda folder: _edit(folder, foo=1),
    "state of another type": lambda folder: _edit(folder, epoch="x"),
    "state that is no object": lambda folder: (folder / STATE).write_text("[]"),
}


@pytest.mark.parametrize("damage", OLD_DAMAGE)
def test_without_digests_types_shapes_and_numbers_are_still_checked(saved: Path, damage: str) -> None:
    _without_digests(saved)
    OLD_DAMAGE[damage](saved)
    with pytest.raises(RunError, match=re.escape(str(saved))):
        load_checkpoint(str(saved), *_model_and_optimizer("adam", seed=1))


def test_a_checkpoint_without_digests_loads(saved: Path) -> None:
    _without_digests(saved)
    state = load_checkpoint(str(saved), *_model_and_optimizer("adam", seed=1))
    assert (state.epoch, state.consumed, state.best_score) == (3, ["A/0", 7], 0.25)


def test_a_frozen_encoder_in_an_earlier_checkpoint_is_left_out(tmp_path: Path) -> None:
    head = torch.nn.ModuleDict({"image_head": torch.nn.Linear(3, 2)})
    optimizer = make_optimizer(head, TrainConfig())  # type: ignore[arg-type]
    encoder = torch.nn.ModuleDict({"encoder": torch.nn.Linear(4, 3)})
    earlier = torch.nn.ModuleDict({"image_tower": encoder, "image_head": torch.nn.Linear(3, 2)})
    save_checkpoint(str(tmp_path), earlier, optimizer, TrainState({}))
    _without_digests(tmp_path)
    load_checkpoint(str(tmp_path), head, optimizer)
    assert torch.equal(head["image_head"].weight, earlier["image_head"].weight)


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_numbers_that_are_not_finite_are_never_stored(where: str, tmp_path: Path) -> None:
    model, optimizer = _model_and_optimizer("adam", seed=0)
    _step(model, optimizer, seed=0)
    parameter = model.image_head.project.weight
    values = parameter if where == "weight" else optimizer.state[parameter]["exp_avg"]
    with torch.no_grad():
        values[1, 2] = float("inf")
    with pytest.raises(RunError, match=r"not finite after step 12: training has diverged; lower train\.tower_lr"):
        save_checkpoint(str(tmp_path), model, optimizer, TrainState({}, step=12))
    assert not list(tmp_path.iterdir())


def test_a_score_that_is_not_better_counts_as_worse() -> None:
    state = TrainState({})
    for score, num_worse in ((-0.1, 0), (-0.2, 1), (-0.1, 2), (0.3, 0), (0.2, 1)):
        state.judge(score)
        assert state.num_worse == num_worse
    assert state.best_score == 0.3
