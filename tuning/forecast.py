"""What a sweep will take, before it is started.

The time is measured on one step here and scaled, an estimate at best: nothing of the cluster is timed. A run that
finds its own size of micro-batches takes longer: the forward passes of n parts are 2n - 1.
"""

import time

import numpy as np
import torch

from mclstexp import cluster
from mclstexp.config import Config
from mclstexp.data.folds import make_split
from mclstexp.data.schema import Manifest
from mclstexp.data.spots import Batch
from mclstexp.messages import duration
from mclstexp.model.programs import NUM_PROGRAMS
from mclstexp.model.towers import build_network, feature_width
from mclstexp.training.complete import training_plan
from mclstexp.training.share import on_device
from mclstexp.training.step import lone_rank, train_step
from tuning.space import Space
from tuning.sweep import at_once

_TILES, _ROUNDS = 16, 2
_FORWARD = 1 / 3
"""A spot's forward pass as a share of a step."""


def plan(manifest: Manifest, config: Config, space: Space, search: str, trials: int) -> str:
    """Returns the space, the trials, the resources of each and the time it takes here, in words. Needs Ray."""
    split = make_split(manifest, config.split)
    spots, validated = manifest.num_spots(split.train), manifest.num_spots(split.validation)
    spot_s, epochs = spot_seconds(config, manifest), config.train.epochs
    epoch_s = spot_s * (spots + validated * _FORWARD)
    fewest, most = (duration(epoch_s * passes) for passes in (expected_epochs(config, trials), trials * epochs))
    lines = [f"{name}: {entry}" for name, entry in space.items()]
    stored = " on stored features (jobs/embed.py --dry-run tells what missing ones take)"
    work = f"a step{stored if config.model.freeze_encoder else ''}"
    return "\n".join(
        [
            *lines,
            f"{trials} trials ({search}) of at most {epochs} epochs, stopped by halving from epoch "
            f"{min(config.tune.grace_epochs, epochs)} on, one in {config.tune.reduction} continues",
            f"trained on {', '.join(split.train)} ({spots} spots), validated on {', '.join(split.validation)}, never "
            f"seen: {', '.join(split.test) or 'no section'}",
            f"each trial: {cluster.plan(config)}; {at_once(config)} at once",
            f"a finished trial: {training_plan(config, manifest, split.train)}",
            f"{1000 * spot_s:.3g} ms per spot of {work} on one CPU core or GPU here: {fewest} to {most} of one core or "
            "GPU for steps and validations, divided among those of the trials; each trial takes some seconds to start",
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


def spot_seconds(config: Config, manifest: Manifest) -> float:
    """Returns the seconds per spot of a training step with random numbers, on one CPU core or on a GPU.

    A step that encodes has a few tiles: more of them would take as long each. One on stored features has a whole batch.
    """
    torch.set_num_threads(1)  # with other work on a core, several threads wait for each other, up to 50 times as long
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = _batch(config, manifest)
    network = build_network(config.model, batch["expression"].shape[-1], 1, manifest.tile_size_px)
    network = network.to(device).to(memory_format=torch.channels_last).train()
    rank_state, share = lone_rank(config, network, _ROUNDS), on_device(iter([batch]), device)
    _, tensors = next(share)
    times = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        loss, num_spots = train_step(rank_state, tensors)
        loss.item()  # waits for a GPU
        times.append(time.perf_counter() - started)
    return min(times) / int(num_spots)


def _batch(config: Config, manifest: Manifest) -> Batch:
    """Returns a batch of random spots, all in one place."""
    model, train, rng = config.model, config.train, np.random.default_rng(0)
    shape, size = (1, _TILES), manifest.tile_size_px
    if model.freeze_encoder:
        by_sentence = train.batching == "sentences"
        shape = (train.batch_sentences, manifest.sentence_length) if by_sentence else (train.batch_spots, 1)
        images = {"features": rng.standard_normal((*shape, feature_width(model, size)), np.float32)}
    else:
        images = {"image": rng.integers(0, 256, (*shape, size, size, 3), np.uint8)}
    num_genes = min(config.genes.num_genes, manifest.num_genes)
    if model.predictor == "programs":
        images["scores"] = rng.standard_normal((*shape, NUM_PROGRAMS), np.float32)
    return images | {
        "expression": rng.random((*shape, num_genes), np.float32),
        "position": np.zeros((*shape, 2), np.float32),
        "mask": np.ones(shape, bool),
    }
