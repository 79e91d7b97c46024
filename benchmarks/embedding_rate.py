"""Tiles per second that an encoder embeds, by batch size: the network alone, tiles in memory, one thread or a GPU.

    python benchmarks/embedding_rate.py --encoder densenet121 --size-px 224 --batches 16,32,64,128,256

Batch sizes take turns. Prints median and range over the rounds, of wall time and, without a GPU, of CPU time, which
other work on the machine hardly changes. Pixels are noise and weights random; neither affects the time.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from mclstexp.cluster import KEEPING_MEMORY  # noqa: E402
from mclstexp.config import Config, override  # noqa: E402
from mclstexp.model.embed import ImageNetwork  # noqa: E402
from mclstexp.model.towers import ImageTower  # noqa: E402


def network(encoder: str, size_px: int, precision: str) -> ImageNetwork:
    """Returns an encoder with random weights and no head."""
    config = override(Config(), {"model.image_encoder": encoder}).model
    tower = ImageTower(config, size_px).state_dict()
    return ImageNetwork(config.model_dump(mode="json"), size_px, tower, None, precision)


def timed(embed: Callable[[np.ndarray], np.ndarray], tiles: np.ndarray) -> tuple[float, float]:
    """Returns tiles per second of wall time and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    embed(tiles)
    return len(tiles) / (time.perf_counter() - wall), len(tiles) / (time.process_time() - cpu)


def main() -> None:
    keeping = KEEPING_MEMORY["env_vars"]  # as the processes have that embed
    if not keeping.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | keeping)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="densenet121", help="as model.image_encoder")
    parser.add_argument("--size-px", type=int, default=224, help="edge of a tile")
    parser.add_argument("--batches", default="16,32,64,128,256")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = [int(size) for size in arguments.batches.split(",")]
    shape = (max(sizes), arguments.size_px, arguments.size_px, 3)
    tiles = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    built = network(arguments.encoder, arguments.size_px, arguments.precision)
    embedders = {size: built.build(device, size) for size in sizes}
    rates: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    for count in range(arguments.rounds + 1):
        for size in sizes:
            rate = timed(embedders[size], tiles[:size])
            if count:  # the first round warms up
                rates[size].append(rate)
    print(
        f"{arguments.encoder}, {arguments.size_px} px, {arguments.precision}, {device.type}, {arguments.rounds} rounds"
    )
    for size, found in rates.items():
        wall, cpu = np.array(found).T
        print(
            f"batch {size:3}  {_spread(wall)} tiles/s" + ("" if device.type == "cuda" else f", {_spread(cpu)} /CPU-s")
        )


def _spread(rates: np.ndarray) -> str:
    return f"{np.median(rates):7.1f} ({rates.min():.1f} to {rates.max():.1f})"


if __name__ == "__main__":
    main()
