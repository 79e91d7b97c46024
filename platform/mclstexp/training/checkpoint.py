"""A checkpoint: learnt weights and optimiser state as safetensors, the rest as JSON. Loading executes no code.

`state.json` has the digests of all files, its own content among them. Only finite numbers are stored, and what was
changed, cut or lost is refused, at the price that saving and loading hash every byte. Checkpoints of earlier versions
have no digests; their tensors are still checked for type, shape and finite numbers.

The random state is not stored: every step seeds itself from (seed, epoch, step, rank), so that a checkpoint suits any
number of workers.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from pydantic import ConfigDict, TypeAdapter
from safetensors import SafetensorError

from mclstexp.errors import RunError
from mclstexp.messages import AGAINST_DIVERGENCE
from mclstexp.model.towers import plain_tensors

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
_DIGESTS = "digests"
_COUNTER = "num_batches_tracked"
"""Last part of the name of batch norm's counters, the only whole numbers among the tensors."""
_FROZEN = "image_tower."
"""Prefix of frozen encoders' tensors, which earlier versions stored."""


@dataclass
class TrainState:
    """How far a run is."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

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
    metrics: dict[str, Any] = field(default_factory=dict)
    """What was reported with the newest checkpoint."""

    def judge(self, score: float) -> None:
        """Records a score on the validation patients."""
        better = self.best_score is None or score > self.best_score
        self.best_score, self.num_worse = (score, 0) if better else (self.best_score, self.num_worse + 1)


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    weights: dict[str, torch.Tensor]
    slots: dict[str, torch.Tensor]
    """State of the optimiser by "parameter.slot"."""
    state: TrainState


def save_checkpoint(folder: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    """Writes a checkpoint into an existing local folder.

    Raises:
        RunError: a weight or a moment of the optimiser is not finite; nothing was written.
    """
    tensors = {
        WEIGHTS: plain_tensors(model.state_dict()),
        OPTIMIZER: plain_tensors(dict(_flat(optimizer.state_dict()["state"]))),
    }
    for file, values in tensors.items():
        if found := _not_finite(values):
            raise RunError(
                f"{found} of {file} is not finite after step {state.step}: training has diverged; {AGAINST_DIVERGENCE}"
            )
    digests = {}
    for file, values in tensors.items():
        data = safetensors.torch.save(values)
        Path(folder, file).write_bytes(data)
        digests[file] = hashlib.sha256(data).hexdigest()
    tree = asdict(state)
    digests[STATE] = _digest(tree)
    Path(folder, STATE).write_text(json.dumps(tree | {_DIGESTS: digests}))


def read_checkpoint(folder: str) -> Checkpoint:
    """Returns what a checkpoint in a local folder holds, checked.

    Raises:
        RunError: a file is missing, cut or changed, or has another content than a checkpoint.
    """
    try:
        tree = json.loads(Path(folder, STATE).read_bytes())
        digests = tree.pop(_DIGESTS, None)
        weights, slots = (_read_tensors(Path(folder, file), digests) for file in (WEIGHTS, OPTIMIZER))
        if digests is not None and digests[STATE] != _digest(tree):
            raise RunError(f"{STATE} was changed after it was written")
        state = TypeAdapter(TrainState).validate_json(json.dumps(tree))
    except FileNotFoundError as error:
        raise RunError(f"the checkpoint {folder} is damaged: {Path(error.filename).name} is missing") from error
    except (RunError, OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise RunError(f"the checkpoint {folder} is damaged: {error}") from error
    return Checkpoint(weights, slots, state)


def load_checkpoint(folder: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Restores model and optimiser in place and returns the state.

    Raises:
        RunError: the checkpoint is damaged (see `read_checkpoint`) or of another network.
    """
    weights, slots, state = read_checkpoint(folder)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _require_slots(folder, slots, parameters)
    try:
        model.load_state_dict(learnt(weights, model.state_dict()))
    except RuntimeError as error:
        raise RunError(f"the checkpoint {folder} is of another network: {error}") from error
    optimizer.load_state_dict(optimizer.state_dict() | {"state": _nested(slots)})
    _match_memory_layout(optimizer)
    return state


def _read_tensors(path: Path, digests: Mapping[str, str] | None) -> dict[str, torch.Tensor]:
    """Returns a file's tensors: those that were written, of numbers that training gives."""
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digests is not None and digests[path.name] != digest:
        expected = str(digests[path.name])
        raise RunError(f"{path.name} has SHA-256 {digest[:12]}..., {STATE} says {expected[:12]}...")
    tensors = safetensors.torch.load(data)
    for name, value in tensors.items():
        if value.is_floating_point() == name.endswith(_COUNTER):
            raise RunError(f"{name} of {path.name} is {value.dtype}")
    if found := _not_finite(tensors):
        raise RunError(f"{found} of {path.name} is not finite")
    return tensors


def _not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Returns the name of the first tensor with a number that is not finite."""
    return next((name for name, value in tensors.items() if not torch.isfinite(value).all()), None)


def _digest(tree: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def learnt(weights: dict[str, torch.Tensor], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Returns weights without those of a frozen encoder, if there are none among the names of a network's tensors."""
    if any(name.startswith(_FROZEN) for name in names):
        return weights
    return {name: value for name, value in weights.items() if not name.startswith(_FROZEN)}


def _require_slots(folder: str, slots: Mapping[str, torch.Tensor], parameters: list[torch.nn.Parameter]) -> None:
    """Checks that each slot is a number, or has the shape of an existing parameter."""
    for key, value in slots.items():
        index = int(first) if (first := key.partition(".")[0]).isdecimal() else len(parameters)
        shape = parameters[index].shape if index < len(parameters) else None
        if shape is None or value.shape not in (shape, ()):
            raise RunError(
                f"the checkpoint {folder} is of another network: {key} of {OPTIMIZER} has shape {tuple(value.shape)}, "
                + (f"its parameter {tuple(shape)}" if shape is not None else f"there are {len(parameters)} parameters")
            )


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
