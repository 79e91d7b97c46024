"""CPU time of decoding the stored tiles of a sentence to one array, beside Pillow and torchvision, in one thread (R1).

    python benchmarks/bench.py --only R1 --data DATA

A round is a fresh process, in which all decode the same stored tiles, in turn: the time that Pillow takes depends on
whether the C library keeps its memory, hence on what a process did before. The tiles are those of DATA/samples.csv as
`prepare` stores them; painted ones without.
"""

import argparse
import io
import json
import os
import subprocess
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
from tile_stream import SIZE_PX, stored_bytes, tile_table  # noqa: E402
from torchvision.io import decode_jpeg  # noqa: E402

from mclstexp.data.schema import load_manifest  # noqa: E402
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


def rates(root: str) -> list[float]:
    """Returns the rates of all ways over a tile table, in this process."""
    manifest = load_manifest(root)
    names = [entry.section_id for entry in manifest.sections if entry.measured]
    tiles = [
        read_sentence(root, manifest.section(name), group)["image"].combine_chunks()
        for name, group in manifest.sentences(names)
    ]
    ways = (here, by_pillow, by_torchvision, one_by_one(decode_tile), one_by_one(with_pillow))
    return [rate(way, tiles) for way in ways]


def fresh_rates(root: str) -> list[float]:
    """Returns them of a fresh process."""
    command = [sys.executable, __file__, "--table", root]
    return list(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with samples.csv")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", help="what a fresh process measures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.table:
        print(json.dumps(rates(arguments.table)))
        return
    with tempfile.TemporaryDirectory() as folder:
        table = tile_table(arguments.data, folder)
        found = [fresh_rates(table.root) for _ in range(arguments.rounds)]
        stored = sum(stored_bytes(path) for path in table.files) / table.num_tiles
    of_torchvision, alone, pillow_alone = np.median([each[2:] for each in found], axis=0)
    detail = (
        f"sentences of {table.detail}, {stored / 1024:.1f} KiB each; torchvision {of_torchvision:.0f}; one by one and "
        f"not kept {alone:.0f} and {pillow_alone:.0f}"
    )
    say("R1", [(ours, theirs) for ours, theirs, *_ in found], "tiles/CPU-s", detail)


if __name__ == "__main__":
    main()
