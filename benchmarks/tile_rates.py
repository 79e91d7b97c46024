"""CPU time per tile of reading a slide in storage tiles of JPEG, beside OpenSlide alone, in one thread.

    python benchmarks/tile_rates.py SLIDE --rounds 5

Both read the same tiles in the order of prediction, each round through new handles, in turn: tiles that are storage
tiles, those moved by one pixel, which touch four, and adjoining tiles of another size. Then wide views, through the
engine over OpenSlide and over storage tiles; and the JPEG round trip of a predicted tile, which both have in common.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import openslide  # noqa: E402
import tifffile  # noqa: E402

from mclstexp.prediction.tile_reader import as_stored  # noqa: E402
from mclstexp.settings import TilesConfig  # noqa: E402
from mclstexp.slides.pyramid import Pyramid  # noqa: E402
from mclstexp.slides.slide import Slide, open_slide  # noqa: E402
from mclstexp.slides.tiles import curve_order  # noqa: E402

MAX_TILES = 1000
WIDE_PX, WIDE_SCALE = 112, 8.0
Corners = list[tuple[int, int]]


def corners(path: Path, step: int, size: int, offset: int) -> Corners:
    """Returns the corners of a square of tiles in the order of prediction."""
    with open_slide(path) as slide:
        edge = min(slide.width, slide.height, int(MAX_TILES**0.5) * step)
    left, top = (axis.ravel() for axis in np.meshgrid(*[np.arange(offset, edge - size - 1, step)] * 2))
    order = curve_order(left.astype(float), top.astype(float))
    return list(zip(left[order].tolist(), top[order].tolist(), strict=True))


def alone(path: Path, tiles: Corners, size: int) -> None:
    slide = openslide.OpenSlide(path)
    for left, top in tiles:
        np.asarray(slide.read_region((left, top), 0, (size, size)).convert("RGB"))
    slide.close()


def engine(path: Path, tiles: Corners, size: int) -> None:
    with open_slide(path) as slide:
        for left, top in tiles:
            slide.read_tile(left, top, size, 1.0)


def wide(slide: Slide, tiles: Corners) -> None:
    with slide:
        for left, top in tiles:
            slide.read_wide(left, top, WIDE_PX, WIDE_SCALE)


def cpu_s(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def compare(
    name: str, num_tiles: int, rounds: int, theirs: Callable[[], None], ours: Callable[[], None]
) -> list[float]:
    """Prints the median rates of both and the ratios of the rounds, and returns these."""
    times = [(cpu_s(theirs), cpu_s(ours)) for _ in range(rounds)]
    rates = [num_tiles / statistics.median(side) for side in zip(*times, strict=True)]
    ratios = sorted(first / second for first, second in times)
    print(
        f"{name:24} {num_tiles:5} tiles  {rates[0]:7.0f} and {rates[1]:7.0f} tiles/CPU-s  "
        f"ratio {statistics.median(ratios):5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        flush=True,
    )
    return ratios


def measure(path: Path, size: int, rounds: int) -> dict[str, list[float]]:
    """Returns the ratios of all rounds, ours to OpenSlide's, by how tiles meet storage tiles."""
    with tifffile.TiffFile(path) as file:
        edge = file.pages.first.tilewidth
    layouts = {"aligned": (edge, edge, 0), "unaligned": (edge, edge, 1), f"{size} of {edge} px": (size, size, 0)}
    ratios = {}
    for name, (step, tile, offset) in layouts.items():
        found = corners(path, step, tile, offset)
        sides = [lambda side=side, found=found, tile=tile: side(path, found, tile) for side in (alone, engine)]
        ratios[name] = compare(name, len(found), rounds, *sides)
    found = corners(path, size, size, 0)
    ratios["wide view"] = compare(
        "wide view",
        len(found),
        rounds,
        lambda: wide(Slide(Pyramid(str(path)), path.name), found),
        lambda: wide(open_slide(path), found),
    )
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--size-px", type=int, default=224, help="edge of the tiles of another size")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{arguments.slide.name}: OpenSlide alone and the engine")
    measure(arguments.slide, arguments.size_px, arguments.rounds)
    with open_slide(arguments.slide) as slide:
        tile = slide.read_tile(slide.width // 2, slide.height // 2, arguments.size_px, 1.0)
    assert tile is not None
    trip = cpu_s(lambda: [as_stored(tile, TilesConfig(size_px=arguments.size_px)) for _ in range(200)]) / 200
    print(f"JPEG round trip of a tile: {1e3 * trip:.2f} ms, {1 / trip:.0f} tiles/CPU-s")


if __name__ == "__main__":
    main()
