"""What a sweep will take, before it is started.

The time is measured on one tower here and scaled, an estimate at best: nothing of the cluster is timed.
"""

import time

import numpy as np
import torch

from mclstexp import cluster
from mclstexp.config import Config
from mclstexp.data.folds import make_split
from mclstexp.data.schema import Manifest
from mclstexp.model.towers import ImageTower, uses_bf16
from tuning.space import Space
from tuning.sweep import at_once

_TILES, _ROUNDS = 16, 2
_FORWARD = 1 / 3
"""A tile's forward pass as a share of forward and backward pass."""


def plan(manifest: Manifest, config: Config, space: Space, search: str, trials: int) -> str:
    """Returns the space, the trials, the resources of each and the time it takes here, in words. Needs Ray."""
    split = make_split(manifest, config.split)
    spots, validated = manifest.num_spots(split.train), manifest.num_spots(split.validation)
    tile_s, epochs = tile_seconds(config, manifest.tile_size_px), config.train.epochs
    epoch_s = tile_s * (spots + validated * _FORWARD)
    hours = [epoch_s * passes / 3600 for passes in (expected_epochs(config, trials), trials * epochs)]
    lines = [f"{name}: {entry}" for name, entry in space.items()]
    return "\n".join(
        [
            *lines,
            f"{trials} trials ({search}) of at most {epochs} epochs, stopped by halving from epoch "
            f"{min(config.tune.grace_epochs, epochs)} on, one in {config.tune.reduction} continues",
            f"trained on {', '.join(split.train)} ({spots} spots), validated on {', '.join(split.validation)}, never "
            f"seen: {', '.join(split.test) or 'no section'}",
            f"each trial: {cluster.plan(config)}; {at_once(config)} at once",
            f"{1000 * tile_s:.1f} ms per tile forward and backward on one CPU core or GPU here: {hours[0]:.2f} to "
            f"{hours[1]:.2f} hours of one core or GPU for the image tower and its validations, divided among those of "
            "the trials; the spot tower adds a little, each trial takes some seconds to start",
        ]
    )


def expected_epochs(config: Config, trials: int) -> int:
    """Returns the epochs of all trials if halving keeps exactly its share at each rung."""
    epochs, left, total = config.train.epochs, float(trials), 0.0
    rung, done = min(config.tune.grace_epochs, epochs), 0
    while done < epochs:
        stop = min(rung, epochs)
        total += left * (stop - done)
        done, rung, left = stop, rung * config.tune.reduction, max(1.0, left / config.tune.reduction)
    return round(total)


def tile_seconds(config: Config, tile_size_px: int) -> float:
    """Returns the seconds per tile of a forward and backward pass of the image tower on one CPU core, or on a GPU."""
    torch.set_num_threads(1)  # with other work on a core, several threads wait for each other, up to 50 times as long
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tower = ImageTower(config.model, tile_size_px).to(device).to(memory_format=torch.channels_last).train()
    tiles = torch.rand(_TILES, 3, tile_size_px, tile_size_px, device=device).contiguous(
        memory_format=torch.channels_last
    )
    bf16 = uses_bf16(config.train.precision, device)
    times = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = tower(tiles).float().square().mean()
        if loss.requires_grad:
            loss.backward()
        loss.item()  # waits for a GPU
        times.append(time.perf_counter() - started)
    return float(np.min(times)) / _TILES
