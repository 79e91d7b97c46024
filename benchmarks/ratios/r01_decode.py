"""CPU time of decoding a stored tile, beside Pillow and torchvision, in one thread (R1).

    python benchmarks/bench.py --only R1 --data DATA

All decode the same stored tiles, in turn: those of DATA/samples.csv as `prepare` stores them, painted ones
without.
"""

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "platform"), str(ROOT / "benchmarks")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from goals import say  # noqa: E402
from PIL import Image  # noqa: E402
from tile_stream import tile_table  # noqa: E402
from torchvision.io import decode_jpeg  # noqa: E402

from mclstexp.data.table import read_sentence  # noqa: E402
from mclstexp.slides.codec import decode_tile  # noqa: E402

MAX_TILES = 1000


def with_pillow(data: bytes) -> np.ndarray:
    """Returns a tile as Pillow decodes it."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def with_torchvision(data: bytes) -> torch.Tensor:
    """Returns a tile as torchvision decodes it."""
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def rate(decode: Callable[[bytes], object], tiles: list[bytes]) -> float:
    """Returns tiles per CPU-second."""
    started = time.process_time()
    for tile in tiles:
        decode(tile)
    return len(tiles) / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with samples.csv")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        table = tile_table(arguments.data, folder)
        tiles: list[bytes] = []
        for name, group in table.manifest.sentences(table.section_ids):
            tiles += read_sentence(table.root, table.manifest.section(name), group)["image"].to_pylist()
    tiles = tiles[:MAX_TILES]
    ways = (decode_tile, with_pillow, with_torchvision)
    rates = [[rate(way, tiles) for way in ways] for _ in range(arguments.rounds)]
    third = statistics.median(each[2] for each in rates)
    detail = f"{table.detail}, {np.mean([len(tile) for tile in tiles]) / 1024:.1f} KiB each; torchvision {third:.0f}"
    say("R1", [(ours, pillow) for ours, pillow, _ in rates], "tiles/CPU-s", detail)


if __name__ == "__main__":
    main()
