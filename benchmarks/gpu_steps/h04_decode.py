"""H4: stored tiles decoded per second by all cores, a process each."""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from goals import state
from gpu_setting import ROUNDS, setting
from synthetic_table import JPEG_QUALITY, tissue

from mclstexp.slides.codec import decode_tile, encode_tile


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
    tile = encode_tile(tissue(size_px), "jpeg", JPEG_QUALITY)
    rates = []
    with ProcessPoolExecutor(cores, get_context("fork")) as pool:  # before anything has started a thread
        for _ in range(here.choose(ROUNDS, 1) + 1):
            begin = time.time() + 0.5
            counts = pool.map(decode, [tile] * cores, [begin] * cores, [seconds] * cores)
            rates.append(sum(counts) / seconds)
    state("H4", rates[1:], f"JPEG {JPEG_QUALITY}, {len(tile) / 1024:.1f} KiB, {size_px} px, {cores} cores")


if __name__ == "__main__":
    main()
