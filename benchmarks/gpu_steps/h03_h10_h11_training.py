"""H3, H10 and H11: training from a tile table, as `jobs/train.py` trains: rate beside that of tiles in memory, share of
the time that the GPU is busy, time to the first step.

The table is in a local folder, not in an object store. The first post of the worker is left out of the rate.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import _launch
from goals import state
from gpu_busy import busy_shares
from gpu_setting import Setting, setting
from synthetic_step import GENES, SyntheticStep, small
from synthetic_table import write_tile_table

from mclstexp.config import Config, override
from mclstexp.progress import Metrics
from mclstexp.training.run import open_run
from mclstexp.training.trainer import fit

SETTINGS = {"tiles.size_px": 224, "genes.num_genes": GENES, "train.epochs": 2, "train.validate_every": 0}


def rate_in_memory(here: Setting, settings: dict[str, object], num_spots: int, length: int) -> float:
    """Returns tiles per second of a training step on one batch in the device's memory."""
    step = SyntheticStep(settings, here.device)
    batch = step.batch(num_spots, length)
    repeats = here.choose(10, 1)
    return statistics.median(here.rates(lambda: [step.take(batch) for _ in range(repeats)], repeats * num_spots))


class Posts:
    """What the training worker posts, with the time of the clock."""

    def __init__(self) -> None:
        self.started = time.time()
        self.times: list[float] = []
        self.metrics: list[Metrics] = []

    def __call__(self, step: int, metrics: Metrics) -> None:
        """Takes what is posted, as a `Log` does."""
        self.times.append(time.time())
        self.metrics.append(metrics)

    @property
    def rates(self) -> list[float]:
        """Tiles per second, without the first post."""
        return [posted["spots_per_s"] for posted in self.metrics[1:]]


def train(settings: dict[str, object], table: Path, runs: Path) -> tuple[Posts, list[float]]:
    """Trains on a table; returns the worker's posts, and the GPU's busy shares while it took steps."""
    config = override(Config(), settings)
    _launch.connect(config)
    run = open_run(str(table), str(runs), "measured", config, lambda *_: "untracked")
    posts = Posts()
    with busy_shares() as samples:
        fit(run, posts)
    return posts, [share for moment, share in samples if posts.times[0] < moment < posts.times[-1]]


def main() -> None:
    here = setting(__doc__)
    length = here.choose(128, 8)
    sentences = here.choose(480, 32)
    own = SETTINGS | {
        "train.use_gpu": not here.is_toy,
        "cluster.local_cpus": here.choose(len(os.sched_getaffinity(0)), 2),
        "cluster.data_cpus": here.choose(max(1, len(os.sched_getaffinity(0)) - 2), 1),
        "cluster.object_store_mb": here.choose(8192, 128),
    }
    settings = here.choose(own, small(own))
    num_spots = 4 * length
    in_memory = rate_in_memory(here, settings, num_spots, length)
    state("H2 beside H3", [in_memory], f"{num_spots} tiles at once, in the process of the driver")
    with tempfile.TemporaryDirectory() as folder:
        write_tile_table(Path(folder, "table"), override(Config(), settings).tiles.size_px, sentences, length, GENES)
        posts, shares = train(settings, Path(folder, "table"), Path(folder, "runs"))
    waits = statistics.median(posted["data_wait_share"] for posted in posts.metrics)
    rate = statistics.median(posts.rates)
    detail = (
        f"table of {sentences * length:,} tiles in a local folder, {rate:,.0f} tiles/s, waiting for data {waits:.0%}"
    )
    state("H3", [each / in_memory for each in posts.rates], detail)
    state(
        "H11", [posts.times[0] - posts.started], "from the call to the end of the first step, on Ray that runs already"
    )
    if shares:
        state("H10", shares, f"{len(shares)} samples of nvidia-smi while {sentences * length:,} tiles were trained on")
    else:
        state("H10", [], "there is no nvidia-smi")


if __name__ == "__main__":
    main()
