"""R10: the nearest of 100,000 keys for each tile, in tiles per CPU-second: ours, or a sorted list of all keys each.

    python benchmarks/bench.py --only R10

Keys and tiles are clustered as in bank_scale.py. Theirs is NumPy in float32: a product with all keys and a stable
argsort per tile, as ours lets the lower of two equal keys come first. NumPy's default argsort, which has vector
instructions but no order among equals, is stated beside it. Both find the same keys; where two cosines are closer than
float32 can tell, either may come first.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "platform"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from goals import say  # noqa: E402

from mclstexp.model.nearest import Keys, directions  # noqa: E402

NUM_KEYS, WIDTH, K = 100_000, 256, 200
NUM_CLUSTERS = 1000
NUM_TILES, NUM_SORTED = 512, 48  # one of ours takes a twentieth of one of theirs
TOO_CLOSE = 2 * WIDTH * 2.0**-24


def vectors(seed: int, count: int) -> np.ndarray:
    """Returns clustered vectors, float32 (count, WIDTH); the clusters are the same for every seed."""
    common, own = np.random.default_rng(0), np.random.default_rng(seed)
    centres = common.normal(size=(NUM_CLUSTERS, WIDTH))
    return (centres[own.integers(0, NUM_CLUSTERS, count)] + 0.5 * own.normal(size=(count, WIDTH))).astype(np.float32)


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def by_sorting(tiles: np.ndarray, keys: np.ndarray, kind: Literal["stable", "quicksort"] = "stable") -> np.ndarray:
    """Returns the ids of the K keys of highest cosine, int64 (tiles, K)."""
    return np.stack([np.argsort(-(keys @ tile), kind=kind)[:K] for tile in tiles])


def rate(count: int, work: Callable[[], object]) -> float:
    """Returns tiles per CPU-second."""
    started = time.process_time()
    work()
    return count / (time.process_time() - started)


def require_equal(tiles: np.ndarray, keys: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Raises if both disagree on more than the order of keys that float32 cannot tell apart."""
    exact = tiles.astype(np.float64) @ keys.T.astype(np.float64)
    gaps = np.take_along_axis(exact, ours, axis=1) - np.take_along_axis(exact, theirs, axis=1)
    if np.abs(gaps).max() > TOO_CLOSE:
        raise SystemExit(f"both find other keys: cosines differ by up to {np.abs(gaps).max():.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", help="not used")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keys, tiles = vectors(1, NUM_KEYS), vectors(2, NUM_TILES)
    bank, unit_keys, unit_tiles = Keys(directions(keys)), unit(keys), unit(tiles)[:NUM_SORTED]
    found = bank.nearest(tiles, K)[0][:NUM_SORTED], by_sorting(unit_tiles, unit_keys)
    require_equal(unit_tiles, unit_keys, *found)
    rounds = [
        (
            rate(NUM_TILES, lambda: bank.nearest(tiles, K)),
            rate(NUM_SORTED, lambda: by_sorting(unit_tiles, unit_keys)),
        )
        for _ in range(arguments.rounds)
    ]
    same = (found[0] == found[1]).mean()
    default = rate(NUM_SORTED, lambda: by_sorting(unit_tiles, unit_keys, "quicksort"))
    detail = f"256 wide, {K} nearest, {same:.2%} of the ids in the same place; NumPy's default argsort: {default:.0f}"
    say("R10", rounds, "tiles/CPU-s", detail)


if __name__ == "__main__":
    main()
