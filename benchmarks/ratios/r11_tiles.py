"""CPU time per tile of reading a slide in storage tiles of JPEG, beside OpenSlide alone, in one thread (R11).

    python benchmarks/bench.py --only R11 --data DATA

Both read the same tiles of tissue in the order of prediction, in turn, each round through new handles: tiles that are
storage tiles, those moved by one pixel, which touch four, and adjoining tiles of another size. Then wide views, through
the engine over OpenSlide and over storage tiles. What both have in common is stated beside: the opening of a slide, and
the JPEG round trip of a predicted tile. The slide is DATA/slides/C5_aperio.svs, a real section; a painted one without.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "platform"), str(ROOT / "benchmarks")]
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import openslide  # noqa: E402
import tifffile  # noqa: E402
from goals import say  # noqa: E402

from ingest.synthetic import CohortSpec, make_cohort  # noqa: E402
from mclstexp.prediction.tile_reader import as_stored  # noqa: E402
from mclstexp.settings import TilesConfig  # noqa: E402
from mclstexp.slides.pyramid import Pyramid  # noqa: E402
from mclstexp.slides.slide import Slide, open_slide  # noqa: E402
from mclstexp.slides.tiles import curve_order  # noqa: E402
from mclstexp.slides.tissue import find_tissue  # noqa: E402

MAX_TILES, ASSUMED_MPP, SIZE_PX = 1000, 0.5, 224
WIDE_PX, WIDE_SCALE = 112, 8.0
UNIT = "tiles/CPU-s"
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


def compare(sides: tuple[Side, Side], path: Path, tiles: Corners, size: int, rounds: int) -> list[tuple[float, float]]:
    """Returns the tiles per CPU-second of ours and of the other side in each round."""
    times = [[read_s(side, path, tiles, size) for side in sides] for _ in range(rounds)]
    return [(len(tiles) / ours, len(tiles) / theirs) for theirs, ours in times]


def measure(path: Path, rounds: int) -> None:
    """States the ratios, by how tiles meet storage tiles."""
    with tifffile.TiffFile(path) as file:
        edge = file.pages.first.tilewidth
    layouts = {
        "aligned": (edge, edge, 0),
        "unaligned": (edge, edge, 1),
        f"{SIZE_PX} of {edge} px": (SIZE_PX, SIZE_PX, 0),
    }
    tiles, views = (Side(openslide.OpenSlide, alone), Side(open_slide, engine)), Side(open_slide, wide)
    for name, (step, size, offset) in layouts.items():
        corner = corners(path, step, size, offset)
        say(f"R11 {name}", compare(tiles, path, corner, size, rounds), UNIT, f"{path.name}, {len(corner)} tiles")
    corner = corners(path, SIZE_PX, SIZE_PX, 0)
    found = compare((Side(through_openslide, wide), views), path, corner, SIZE_PX, rounds)
    say("R11 wide view", found, UNIT, f"{len(corner)} of {WIDE_PX} px at {WIDE_SCALE:.0f} px; through the engine both")


def state_costs(path: Path, rounds: int) -> None:
    """Prints what both sides pay besides."""
    with open_slide(path) as slide:
        tile = slide.read_tile(slide.width // 2, slide.height // 2, SIZE_PX, 1.0)
    assert tile is not None
    trip = cpu_s(lambda: [as_stored(tile, TilesConfig(size_px=SIZE_PX)) for _ in range(200)]) / 200
    for name, opened in (("OpenSlide", openslide.OpenSlide), ("the engine", open_slide)):
        times = [cpu_s(lambda opened=opened: opened(path)) for _ in range(rounds)]
        print(f"opening by {name}: {1e3 * statistics.median(times):.1f} ms")
    print(f"JPEG round trip of a tile: {1e3 * trip:.2f} ms, {1 / trip:.0f} tiles/CPU-s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with slides/C5_aperio.svs")
    parser.add_argument("--slide", type=Path, help="another slide")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = arguments.slide or (arguments.data and arguments.data / "slides/C5_aperio.svs")
        if path is None:
            make_cohort(scratch, CohortSpec(num_patients=1, sections_per_patient=1, pitch_px=256))
            path = sorted(Path(scratch).glob("*.tif"))[0]
        measure(path, arguments.rounds)
        state_costs(path, arguments.rounds)


if __name__ == "__main__":
    main()
