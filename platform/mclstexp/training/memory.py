"""How many tiles the image tower takes at a time in training: what fits into the memory that is there.

Nothing is known of an encoder beforehand: what autograd keeps of a tile is counted in a pass over two of them.
"""

import math

import psutil
import torch
from ray._private.utils import estimate_available_memory
from torch.autograd.graph import saved_tensors_hooks

from mclstexp.config import Config
from mclstexp.model.augment import draw
from mclstexp.training.forward import Forward

SHARE = 0.5
"""Of the free memory, for what the image tower keeps. The rest is for its passing results, the data stream, the loss
and other processes."""
_COPIES = 4
"""Of what is learnt: gradients, DistributedDataParallel's copy of them, and two moments of the optimiser."""


def micro_batch(forward: Forward, config: Config, num_tiles: int, size_px: int, workers_here: int) -> int | None:
    """Returns the tiles of a micro-batch: `train.micro_batch`, or a power of two that fits; None for the whole batch.

    Only an encoder that is trained, and does not mix the tiles of a batch, is cut.

    Args:
        forward: on the device that trains, before it is compiled.
        config: the settings.
        num_tiles: tiles of a rank's batch, at most.
        size_px: edge of a tile.
        workers_here: training workers of this node, which share its memory.
    """
    if config.model.freeze_encoder or config.model.batch_norm != "frozen":
        return None
    size = config.train.micro_batch
    if size is None:
        device = next(forward.parameters()).device
        learnt = sum(each.numel() * each.element_size() for each in forward.parameters() if each.requires_grad)
        part = config.train.gpus_per_worker if device.type == "cuda" else 1 / workers_here
        free = part * free_bytes(device) - _COPIES * learnt
        size = fitting(SHARE * free / max(1, activation_bytes(forward, config, size_px)), num_tiles)
    return size if size < num_tiles else None


def fitting(room: float, num_tiles: int) -> int:
    """Returns all tiles if there is room for as many, else the largest power of two that there is room for, at least 1.

    A power of two, so that a run that goes on with a little more or less memory computes the same.
    """
    return num_tiles if room >= num_tiles else 2 ** max(0, math.floor(max(1, room)).bit_length() - 1)


def activation_bytes(forward: Forward, config: Config, size_px: int) -> int:
    """Returns what autograd keeps of a tile for the backward pass: the difference between two tiles and one."""
    one, two = (_kept_bytes(forward, config, size_px, num_tiles) for num_tiles in (1, 2))
    return two - one


def free_bytes(device: torch.device) -> int:
    """Returns the memory of a device that is free, or kept by torch for reuse.

    That of the CPU is limited by a container, and by what processes outside it use.
    """
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    return min(int(estimate_available_memory()), psutil.virtual_memory().available)


def _kept_bytes(forward: Forward, config: Config, size_px: int, num_tiles: int) -> int:
    device, kept = next(forward.parameters()).device, dict[int, int]()

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tiles = torch.zeros(num_tiles, size_px, size_px, 3, dtype=torch.uint8, device=device)
    draws = draw(config.train.augmentation, num_tiles, torch.Generator(device).manual_seed(0))
    with saved_tensors_hooks(count, lambda tensor: tensor):
        _alive = forward.embed_images(tiles, *draws)  # until all is counted, so that no address is used twice
        return sum(kept.values())
