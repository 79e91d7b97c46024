"""CPU time of a tile in the training stream, and the wait for an epoch's first batch, beside other ways (R2, R3, R4).

    python benchmarks/bench.py --only R2,R3,R4 --data DATA

All read the same stored tiles, in turn, on one Ray with two CPUs for data:

- the training stream: all columns, checksums, counts to expression, padding, in exact order;
- a bare loop in one process: row groups by pyarrow, the image column alone, decoded by the same decoder;
- Ray by rows: `ray.data.read_parquet`, `map` with Pillow to float32, batches of 256;
- stock Ray: `ray.data.read_parquet`, `map_batches` with the same decoder to uint8; its first batch counts.

CPU time is that of all processes of the tree, Ray's own included (psutil, sampled once a second). An epoch has
every sentence `REPEATS` times, for both Datasets too. For R4 each epoch is a Dataset of its own, as on tables
of at least 1 GiB of decoded tiles; epochs of smaller ones share one, and the wait for the second is stated too.
"""

import argparse
import io
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "platform"), str(ROOT / "benchmarks")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import ray.data  # noqa: E402
from goals import say  # noqa: E402
from PIL import Image  # noqa: E402
from tile_stream import SIZE_PX, TileTable, cpu_meter, tile_table  # noqa: E402

from mclstexp.data import stream  # noqa: E402
from mclstexp.data.spots import SentenceLoader  # noqa: E402
from mclstexp.slides.codec import decode_tile  # noqa: E402

REPEATS, BATCH_TILES = 12, 256


def copies(table: TileTable, folder: str) -> list[str]:
    """Returns `REPEATS` copies of each of a table's files: Ray reads a file once, however often it is named."""
    return [
        shutil.copy(path, f"{folder}/{number}-{Path(path).name}") for number in range(REPEATS) for path in table.files
    ]


def bare_loop(files: list[str]) -> None:
    """Decodes every tile of some files in this process."""
    for path in files:
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            tiles = file.read_row_group(group, columns=["image"])["image"]
            images = np.empty((len(tiles), SIZE_PX, SIZE_PX, 3), np.uint8)
            for index, tile in enumerate(tiles):
                images[index] = decode_tile(tile.as_py())


def without_ray(loader: SentenceLoader, rows: stream.Rows) -> None:
    """Loads the rows of an epoch in this process, a step at a time."""
    for start in range(0, len(rows), TileTable.batch_sentences):
        part = rows[start : start + TileTable.batch_sentences]
        loader({name: np.array([row[name] for row in part]) for name in part[0]})


def by_rows(files: list[str]) -> Iterable[Any]:
    """Returns batches as Ray's own image benchmarks make them."""

    def decoded(row: dict[str, Any]) -> dict[str, np.ndarray]:
        image = Image.open(io.BytesIO(row["image"])).convert("RGB")
        return {"image": np.asarray(image, np.float32) / 255}

    return ray.data.read_parquet(files).select_columns(["image"]).map(decoded).iter_batches(batch_size=BATCH_TILES)


def stock(files: list[str]) -> ray.data.Dataset:
    """Returns the tiles of some files by Ray's own reader, decoded in batches."""

    def decoded(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"image": np.stack([decode_tile(tile) for tile in batch["image"]])}

    tiles = ray.data.read_parquet(files).select_columns(["image"])
    return tiles.map_batches(decoded, batch_size=BATCH_TILES)  # type: ignore[arg-type]


def taken_by(batches: Iterable[Any], num_tiles: int) -> float:
    """Returns the CPU-milliseconds per tile of draining batches; the number of tiles is checked."""
    with cpu_meter() as meter:
        seen = sum(int(batch["mask"].sum()) if "mask" in batch else len(batch["image"]) for batch in batches)
        assert seen == num_tiles, f"{seen} tiles came instead of {num_tiles}"
        return 1e3 * meter.seconds / num_tiles


def first_s(batches: Iterable[Any]) -> float:
    """Returns the seconds until the first batch; the rest is drained, so that nothing runs on beside what follows."""
    started = time.perf_counter()
    iterator = iter(batches)
    next(iterator)
    elapsed = time.perf_counter() - started
    for _ in iterator:
        pass
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with samples.csv")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = tile_table(arguments.data, folder)
        loader, num_tiles = table.loader(), REPEATS * table.num_tiles
        epochs = [table.rows(epoch, REPEATS) for epoch in range(2)]
        files = copies(table, folder)
        stocked = stock(files)
        for _ in table.batches(loader, epochs[:1]):  # starts the workers
            pass
        for _ in stocked.iter_batches(batch_size=BATCH_TILES):  # the first epoch of all
            pass
        bare, rows, first, joined, loads = [], [], [], [], []
        for _ in range(arguments.rounds):
            started = time.process_time()
            bare_loop(files)
            alone = 1e3 * (time.process_time() - started) / num_tiles
            started = time.process_time()
            without_ray(loader, epochs[0])
            loads.append(1e3 * (time.process_time() - started) / num_tiles)
            ours = taken_by(table.batches(loader, epochs[:1]), num_tiles)
            rowwise = taken_by(by_rows(files), num_tiles)
            bare.append((ours, alone))
            rows.append((rowwise, ours))
            first.append(
                (first_s(table.batches(loader, epochs[1:])), first_s(stocked.iter_batches(batch_size=BATCH_TILES)))
            )
            both = table.batches(loader, epochs)
            for _ in range(len(epochs[0]) // 2):
                next(both)
            joined.append(first_s(both))
        detail = f"{table.detail}, each {REPEATS} times"
        loaded = f"{detail}; the stream's own loading without Ray {statistics.median(loads):.2f}"
        say("R2", bare, "CPU-ms", loaded)
        say("R3", rows, "CPU-ms", detail)
        waits = f"{detail}; where epochs share a Dataset {1e3 * statistics.median(joined):.0f} ms"
        say("R4", first, "s", waits)


if __name__ == "__main__":
    main()
