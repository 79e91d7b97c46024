"""CPU time of decoding the stored tiles of a sentence to one array, beside Pillow and torchvision, in one thread (R1).

    python benchmarks/bench.py --only R1 --data DATA

All decode the same stored tiles, in turn: those of DATA/samples.csv as `prepare` stores them, painted ones
without.
"""

import argparse
import io
import os
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
import pyarrow as pa  # noqa: E402
import torch  # noqa: E402
from goals import say  # noqa: E402
from PIL import Image  # noqa: E402
from tile_stream import SIZE_PX, tile_table  # noqa: E402
from torchvision.io import decode_jpeg  # noqa: E402

from mclstexp.data.spots import decode_tiles  # noqa: E402
from mclstexp.data.table import read_sentence  # noqa: E402
from mclstexp.slides.codec import decode_tile  # noqa: E402


def with_pillow(data: bytes) -> np.ndarray:
    """Returns a tile as Pillow decodes it."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def with_torchvision(data: bytes) -> torch.Tensor:
    """Returns a tile as torchvision decodes it."""
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def here(tiles: pa.Array) -> np.ndarray:
    """Returns a sentence's tiles as the training stream decodes them."""
    return decode_tiles(tiles, SIZE_PX)


def by_pillow(tiles: pa.Array) -> np.ndarray:
    """Returns them as a loop around Pillow does."""
    return np.stack([with_pillow(tile.as_py()) for tile in tiles])


def by_torchvision(tiles: pa.Array) -> torch.Tensor:
    """Returns them as a loop around torchvision does."""
    return torch.stack([with_torchvision(tile.as_py()) for tile in tiles])


def one_by_one(decode: Callable[[bytes], object]) -> Callable[[pa.Array], None]:
    """Returns what decodes a sentence's tiles and keeps none."""

    def decode_all(tiles: pa.Array) -> None:
        for tile in tiles:
            decode(tile.as_py())

    return decode_all


def rate(decode: Callable[[pa.Array], object], sentences: list[pa.Array]) -> float:
    """Returns tiles per CPU-second."""
    started = time.process_time()
    for tiles in sentences:
        decode(tiles)
    return sum(map(len, sentences)) / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with samples.csv")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        table = tile_table(arguments.data, folder)
        tiles = [
            read_sentence(table.root, table.manifest.section(name), group)["image"].combine_chunks()
            for name, group in table.manifest.sentences(table.section_ids)
        ]
    ways = (here, by_pillow, by_torchvision, one_by_one(decode_tile), one_by_one(with_pillow))
    rates = [[rate(way, tiles) for way in ways] for _ in range(arguments.rounds)]
    size_kib = np.mean([len(tile.as_py()) for sentence in tiles for tile in sentence]) / 1024
    of_torchvision, alone, pillow_alone = np.median([each[2:] for each in rates], axis=0)
    detail = (
        f"sentences of {table.detail}, {size_kib:.1f} KiB each; torchvision {of_torchvision:.0f}; one by one and not "
        f"kept {alone:.0f} and {pillow_alone:.0f}"
    )
    say("R1", [(ours, theirs) for ours, theirs, *_ in rates], "tiles/CPU-s", detail)


if __name__ == "__main__":
    main()
