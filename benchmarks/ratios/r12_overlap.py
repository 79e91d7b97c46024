"""R12: the rate of a prediction whose stages sleep, beside that of its slowest stage alone.

    python benchmarks/bench.py --only R12

Slides, readers, search, parts and pipeline are real; network, weighing and store sleep (tests/sleeping_stages.py). A
part would take 2.5 s if one stage waited for the other, the network alone takes 0.6 s.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "platform"), str(ROOT / "benchmarks"), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:4])  # of Ray's workers
os.environ.setdefault("RAY_AUTH_MODE", "token")

import numpy as np  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402
from goals import say  # noqa: E402
from sleeping_stages import SleepingNetwork, Slow, predict_slowly  # noqa: E402

from mclstexp.prediction.parts import PART_TILES  # noqa: E402

SLOW = Slow(network=0.6, weighing=0.4, store=1.5)
NUM_SLIDES = 8


def alone() -> float:
    """Returns the parts per second of the slowest stage."""
    embed = SleepingNetwork(SLOW.network, 8).build(torch.device("cpu"))
    tiles, started = np.zeros((PART_TILES, 1, 1, 3), np.uint8), time.monotonic()
    for _ in range(5):
        embed(tiles)
    return 5 / (time.monotonic() - started)


def together() -> float:
    """Returns the parts per second of all stages."""
    with tempfile.TemporaryDirectory() as folder:
        return predict_slowly(Path(folder), SLOW, NUM_SLIDES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", help="not used")
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=4, object_store_memory=400 * 2**20, include_dashboard=False, log_to_driver=False)
    rounds = [(together(), alone()) for _ in range(arguments.rounds)]
    detail = f"sleeping: network {SLOW.network} s, weighing {SLOW.weighing} s, store {SLOW.store} s per part"
    say("R12", rounds, "parts/s", detail)


if __name__ == "__main__":
    main()
