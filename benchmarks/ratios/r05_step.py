"""Rate of training on stored tiles through the stream, beside the same steps on one batch in memory (R5).

    python benchmarks/bench.py --only R5 --data DATA

Both take the same optimiser step, in one thread, in turn; the stream decodes on the other core. Each round opens a new
stream; its first batch, which also warms up the step, does not count. Rates are in tiles, as batches differ in size.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import repeat
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "platform"), str(ROOT / "benchmarks")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])

import torch  # noqa: E402
from goals import say  # noqa: E402
from synthetic_step import SyntheticStep  # noqa: E402
from tile_stream import SIZE_PX, tile_table  # noqa: E402

from mclstexp.data.spots import Batch  # noqa: E402
from mclstexp.training.share import share_of  # noqa: E402

SETTINGS = {"model.image_encoder": "small_cnn", "tiles.size_px": SIZE_PX, "train.augmentation": "none"}


def rate(step: SyntheticStep, batches: Iterable[Batch]) -> float:
    """Returns the tiles per second of steps on batches, without the first."""
    started, num_tiles = 0.0, 0
    for index, batch in enumerate(batches):
        step.take(share_of(batch))
        if index == 0:
            started = time.perf_counter()
        else:
            num_tiles += int(batch["mask"].sum())
    return num_tiles / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with samples.csv")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        table = replace(tile_table(arguments.data, folder), batch_sentences=1)
        loader, rows = table.loader(), table.rows(0)
        batch, *others = table.batches(loader, [rows], cpus=1)
        step = SyntheticStep(SETTINGS, torch.device("cpu"), batch["expression"].shape[-1])
        rounds = []
        for _ in range(arguments.rounds):
            in_memory = rate(step, repeat(batch, 1 + len(others)))
            rounds.append((rate(step, table.batches(loader, [rows], cpus=1)), in_memory))
        detail = (
            f"{len(others)} steps of about {table.num_tiles // (1 + len(others))} tiles by small_cnn, not augmented"
        )
        say("R5", rounds, "tiles/s", f"{table.detail}; {detail}")


if __name__ == "__main__":
    main()
