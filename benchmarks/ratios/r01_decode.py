"""CPU time of decoding the stored tiles of a sentence to one array, beside Pillow and torchvision, in one thread (R1).

    python benchmarks/bench.py --only R1 --data DATA

Each way has a process of its own, as a loader's worker is, because the time of Pillow depends on whether the C library
keeps memory, hence on what else a process does. They decode the same stored tiles in turn; the first time does not
count. The tiles are those of DATA/samples.csv as `prepare` stores them; painted ones without.
"""

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
    return decode_tiles(tiles.to_pylist(), SIZE_PX)


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


WAYS = {
    "ours": here,
    "pillow": by_pillow,
    "torchvision": by_torchvision,
    "ours alone": one_by_one(decode_tile),
    "pillow alone": one_by_one(with_pillow),
}


def answer(root: str, way: str) -> None:
    """Prints the rate of a way over a tile table for each line of the input."""
    manifest = load_manifest(root)
    names = [entry.section_id for entry in manifest.sections if entry.measured]
    tiles = [
        read_sentence(root, manifest.section(name), group)["image"].combine_chunks()
        for name, group in manifest.sentences(names)
    ]
    print("ready", flush=True)
    for _ in sys.stdin:
        print(rate(WAYS[way], tiles), flush=True)


@contextmanager
def asked(root: str, way: str) -> Iterator[Callable[[], float]]:
    """Starts a process that decodes a tile table in a way, and gives what asks it for its rate."""
    command = [sys.executable, __file__, "--table", root, "--way", way]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        asks, answers = process.stdin, process.stdout
        assert asks is not None
        assert answers is not None

        def ask() -> float:
            print(file=asks, flush=True)
            return float(answers.readline())

        answers.readline()
        yield ask
        asks.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with samples.csv")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", help="what a process of its own decodes")
    parser.add_argument("--way", choices=WAYS, help="how")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.table:
        answer(arguments.table, arguments.way)
        return
    with tempfile.TemporaryDirectory() as folder:
        table = tile_table(arguments.data, folder)
        with ExitStack() as processes:
            ways = {way: processes.enter_context(asked(table.root, way)) for way in WAYS}
            first, *rounds = [{way: ask() for way, ask in ways.items()} for _ in range(1 + arguments.rounds)]
        stored = sum(stored_bytes(path) for path in table.files) / table.num_tiles
    median = {way: statistics.median(each[way] for each in rounds) for way in WAYS}
    detail = (
        f"sentences of {table.detail}, {stored / 1024:.1f} KiB each; torchvision {median['torchvision']:.0f}; one by "
        f"one and not kept {median['ours alone']:.0f} and {median['pillow alone']:.0f}; in new memory, the first time, "
        f"{first['ours']:.0f} and {first['pillow']:.0f}"
    )
    say("R1", [(each["ours"], each["pillow"]) for each in rounds], "tiles/CPU-s", detail)


if __name__ == "__main__":
    main()
