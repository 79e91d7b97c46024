"""CPU time per tile of reading a slide in storage tiles of JPEG, beside OpenSlide alone, in one thread.

    python benchmarks/tile_rates.py SLIDE --rounds 5

Both read the same tiles of tissue in the order of prediction, in turn, each round through new handles: tiles that are
storage tiles, those moved by one pixel, which touch four, and adjoining tiles of another size. Then wide views, through
the engine over OpenSlide and over storage tiles. What both have in common is stated beside: the opening of a slide, and
the JPEG round trip of a predicted tile.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
from mclstexp.slides.tissue import find_tissue  # noqa: E402

MAX_TILES, ASSUMED_MPP = 1000, 0.5
WIDE_PX, WIDE_SCALE = 112, 8.0
Corners = list[tuple[int, int]]


class Side(NamedTuple):
    """One way to read tiles."""

    open: Callable[[Path], Any]
    read: Callable[[Any, Corners, int], None]


def corners(path: Path, step: int, size: int, offset: int) -> Corners:
    """Returns the corners of tiles that show tissue, in the order of prediction: the first ones of a large slide."""
    with open_slide(path) as slide:
        edges = [np.arange(offset, edge - size, step) for edge in (slide.width, slide.height)]
        left, top = (axis.ravel() for axis in np.meshgrid(*edges))
        share = find_tissue(slide, slide.mpp or ASSUMED_MPP).share(left, top, float(size))
    kept = share >= TilesConfig().min_tissue
    left, top = left[kept], top[kept]
    order = curve_order(left.astype(float), top.astype(float))[:MAX_TILES]
    return list(zip(left[order].tolist(), top[order].tolist(), strict=True))


def alone(slide: openslide.OpenSlide, tiles: Corners, size: int) -> None:
    for left, top in tiles:
        np.asarray(slide.read_region((left, top), 0, (size, size)).convert("RGB"))


def engine(slide: Slide, tiles: Corners, size: int) -> None:
    for left, top in tiles:
        slide.read_tile(left, top, size, 1.0)


def wide(slide: Slide, tiles: Corners, size: int) -> None:
    for left, top in tiles:
        slide.read_wide(left, top, WIDE_PX, WIDE_SCALE)


def through_openslide(path: Path) -> Slide:
    return Slide(Pyramid(str(path)), path.name)


def cpu_s(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def read_s(side: Side, path: Path, tiles: Corners, size: int) -> float:
    """Returns the CPU-seconds of reading tiles through a new handle, without those of opening it."""
    with side.open(path) as slide:
        return cpu_s(lambda: side.read(slide, tiles, size))


def compare(name: str, sides: tuple[Side, Side], path: Path, tiles: Corners, size: int, rounds: int) -> list[float]:
    """Prints the median rates of both sides and the ratios of the rounds, and returns these."""
    times = [[read_s(side, path, tiles, size) for side in sides] for _ in range(rounds)]
    rates = [len(tiles) / statistics.median(seconds) for seconds in zip(*times, strict=True)]
    ratios = sorted(first / second for first, second in times)
    print(
        f"{name:16} {len(tiles):5} tiles  {rates[0]:7.0f} and {rates[1]:7.0f} tiles/CPU-s  "
        f"ratio {statistics.median(ratios):5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        flush=True,
    )
    return ratios


def measure(path: Path, size: int, rounds: int) -> dict[str, list[float]]:
    """Returns the ratios of all rounds, ours to OpenSlide's, by how tiles meet storage tiles."""
    with tifffile.TiffFile(path) as file:
        edge = file.pages.first.tilewidth
    layouts = {"aligned": (edge, edge, 0), "unaligned": (edge, edge, 1), f"{size} of {edge} px": (size, size, 0)}
    tiles, wide_tiles = (Side(openslide.OpenSlide, alone), Side(open_slide, engine)), corners(path, size, size, 0)
    ratios = {
        name: compare(name, tiles, path, corners(path, step, tile, offset), tile, rounds)
        for name, (step, tile, offset) in layouts.items()
    }
    views = Side(through_openslide, wide), Side(open_slide, wide)
    return ratios | {"wide view": compare("wide view", views, path, wide_tiles, size, rounds)}


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
    for name, opened in (("OpenSlide", openslide.OpenSlide), ("the engine", open_slide)):
        times = [cpu_s(lambda opened=opened: opened(arguments.slide)) for _ in range(arguments.rounds)]
        print(f"opening by {name}: {1e3 * statistics.median(times):.1f} ms")
    print(f"JPEG round trip of a tile: {1e3 * trip:.2f} ms, {1 / trip:.0f} tiles/CPU-s")


if __name__ == "__main__":
    main()
