"""A checkpoint: weights and optimiser state as safetensors, the rest as JSON. Loading executes no code.

The random state is not stored: every step seeds itself from (seed, epoch, step, rank), so that a checkpoint suits any
number of workers.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mclstexp.errors import RunError
from mclstexp.model.towers import plain_tensors

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


@dataclass
class TrainState:
    """How far a run is."""

    config: dict[str, object]
    epoch: int = 0
    step: int = 0
    """Optimiser steps since the start of the run."""
    consumed: list[str | int] = field(default_factory=list)
    """Ids of this epoch's sentences (or spots) in the order of their use."""
    best_score: float | None = None
    """Highest score on the validation patients; None before the first score."""
    num_worse: int = 0
    """Number of scores since the best one."""

    def judge(self, score: float) -> None:
        """Records a score on the validation patients."""
        better = self.best_score is None or score > self.best_score
        self.best_score, self.num_worse = (score, 0) if better else (self.best_score, self.num_worse + 1)


def save_checkpoint(folder: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    """Writes a checkpoint into an existing local folder."""
    save_file(plain_tensors(model.state_dict()), Path(folder, WEIGHTS))
    save_file(plain_tensors(dict(_flat(optimizer.state_dict()["state"]))), Path(folder, OPTIMIZER))
    Path(folder, STATE).write_text(json.dumps(asdict(state)))


def load_checkpoint(folder: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Restores model and optimiser in place and returns the state.

    Raises:
        RunError: the folder is not a complete checkpoint.
    """
    try:
        weights, slots = load_file(Path(folder, WEIGHTS)), load_file(Path(folder, OPTIMIZER))
        state = TrainState(**json.loads(Path(folder, STATE).read_text()))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{folder} is not a complete checkpoint: {error}; delete it to go on from the one before"
        ) from error
    model.load_state_dict(weights)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": _nested(slots)})
    _match_memory_layout(optimizer)
    return state


def _match_memory_layout(optimizer: torch.optim.Optimizer) -> None:
    """Gives each moment the memory layout of its parameter.

    Fused optimisers walk both in memory order; a moment in its stored layout would be paired with the wrong elements
    of a channels-last weight.
    """
    for parameter, slots in optimizer.state.items():
        for name, value in slots.items():
            if value.shape == parameter.shape:
                slots[name] = torch.empty_like(parameter).copy_(value)


def _flat(slots: dict[int, dict[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for parameter, values in slots.items():
        for name, value in values.items():
            yield f"{parameter}.{name}", torch.as_tensor(value)


def _nested(flat: dict[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in flat.items():
        parameter, _, name = key.partition(".")
        slots.setdefault(int(parameter), {})[name] = value
    return slots
