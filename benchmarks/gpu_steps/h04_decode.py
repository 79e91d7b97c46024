"""H4: stored tiles decoded per second by all cores, a process each."""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
from goals import state
from gpu_setting import ROUNDS, setting

from ingest.texture import draw_stain, paint, smooth_field
from mclstexp.slides.codec import decode_tile, encode_tile


def tissue(size_px: int) -> np.ndarray:
    """Returns a tile of synthetic tissue, uint8 (size, size, 3)."""
    rng = np.random.default_rng(0)
    latents, density = np.stack([smooth_field(rng, size_px, 64) for _ in range(3)]), smooth_field(rng, size_px, 64)
    return paint(rng, latents, density, np.ones((size_px, size_px), bool), draw_stain(rng))


def decode(tile: bytes, begin: float, seconds: float) -> int:
    """Returns how many times this process decodes a tile within `seconds` from a moment that all wait for."""
    time.sleep(max(0.0, begin - time.time()))
    count = 0
    while time.time() < begin + seconds:
        decode_tile(tile)
        count += 1
    return count


def main() -> None:
    here = setting(__doc__)
    cores, size_px, seconds = len(os.sched_getaffinity(0)), here.choose(224, 32), here.choose(2.0, 0.1)
    tile = encode_tile(tissue(size_px), "jpeg", 85)
    rates = []
    with ProcessPoolExecutor(cores, get_context("fork")) as pool:  # before anything has started a thread
        for _ in range(here.choose(ROUNDS, 1) + 1):
            begin = time.time() + 0.5
            counts = pool.map(decode, [tile] * cores, [begin] * cores, [seconds] * cores)
            rates.append(sum(counts) / seconds)
    state("H4", rates[1:], f"JPEG 85, {len(tile) / 1024:.1f} KiB, {size_px} px, {cores} cores")


if __name__ == "__main__":
    main()
