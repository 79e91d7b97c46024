"""The training stream beside other loaders over the same tiles, in turn on this machine: torch, WebDataset, LitData.

    python benchmarks/peers.py --data DATA --rounds 5

Prints a table in Markdown for docs/performance.md. All have two workers and yield the tiles of an epoch as uint8, in
random order, decoded from the same JPEG bytes. The peers read nothing else and verify nothing; the stream also reads
counts, normalises them, checks every tile and keeps an order that no number of workers changes. WebDataset and LitData
read formats of their own, written here from the same bytes; torch's DataLoader reads the row groups of the same Parquet
files. The peers decode by torchvision. Workers stay from epoch to epoch; the first epoch does not count. Ray's
processes count for the stream alone.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform"), str(ROOT / "benchmarks")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])

import litdata  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
import webdataset  # noqa: E402
from tile_stream import TileTable, cpu_meter, tile_table  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torchvision.io import decode_jpeg  # noqa: E402

REPEATS, BATCH_TILES, WORKERS, SHARDS = 3, 256, 2, 8
CHUNK_BYTES = 16 * 2**20


def decoded(data: bytes) -> torch.Tensor:
    """Returns a tile, uint8 (3, size, size)."""
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))


class RowGroups(Dataset[torch.Tensor]):
    """The row groups of Parquet files, decoded."""

    def __init__(self, files: list[str]) -> None:
        groups = [(path, group) for path in files for group in range(pq.ParquetFile(path).num_row_groups)]
        self._groups = groups * REPEATS

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> torch.Tensor:
        path, group = self._groups[index]
        tiles = pq.ParquetFile(path).read_row_group(group, columns=["image"])["image"]
        return torch.stack([decoded(tile.as_py()) for tile in tiles])


class LitTiles(litdata.StreamingDataset):
    """Tiles that LitData stored as bytes, decoded."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        return decoded(super().__getitem__(index)["tile"])


class Loader(NamedTuple):
    """A way to read all tiles."""

    name: str
    epoch: Callable[[int], Iterable[Any]]
    """Returns the batches of an epoch."""


def of_parquet(table: TileTable) -> Loader:
    """Returns torch's loader over the table's own files; a batch is a row group."""
    loader = DataLoader(
        RowGroups(table.files), batch_size=None, shuffle=True, num_workers=WORKERS, persistent_workers=True
    )
    return Loader("torch DataLoader, the same Parquet", lambda _: loader)


def of_shards(tiles: list[bytes], folder: str) -> Loader:
    """Returns WebDataset's loader over tar files, which it shuffles with a buffer of tiles."""
    Path(folder).mkdir()
    pattern = f"{folder}/%02d.tar"
    with webdataset.ShardWriter(pattern, maxcount=-(-len(tiles) // SHARDS), verbose=0) as writer:
        for index, tile in enumerate(tiles):
            writer.write({"__key__": f"{index:07d}", "jpg": tile})
    files = sorted(str(path) for path in Path(folder).glob("*.tar"))
    dataset = webdataset.WebDataset(files, shardshuffle=len(files)).shuffle(BATCH_TILES).to_tuple("jpg")
    batched = dataset.map_tuple(decoded).batched(BATCH_TILES)
    loader = DataLoader(batched, batch_size=None, num_workers=WORKERS, persistent_workers=True)
    return Loader("WebDataset", lambda _: loader)


def as_item(tile: bytes) -> dict[str, bytes]:
    """Returns a tile as LitData stores it."""
    return {"tile": tile}


def of_chunks(tiles: list[bytes], folder: str) -> Loader:
    """Returns LitData's loader over its chunks."""
    litdata.optimize(fn=as_item, inputs=tiles, output_dir=folder, chunk_bytes=CHUNK_BYTES, num_workers=1, verbose=False)
    dataset = LitTiles(folder, shuffle=True)
    loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH_TILES, num_workers=WORKERS, persistent_workers=True)
    return Loader("LitData", lambda _: loader)


def ours(table: TileTable) -> Loader:
    """Returns the training stream; each epoch is a Dataset of its own."""
    loader = table.loader()
    return Loader("the training stream", lambda epoch: table.batches(loader, [table.rows(epoch, REPEATS)]))


def stored_tiles(table: TileTable) -> list[bytes]:
    """Returns the encoded tiles of the table."""
    columns = [pq.read_table(path, columns=["image"])["image"] for path in table.files]
    return [tile for column in columns for tile in column.to_pylist()]


def measure(loader: Loader, epoch: int, num_tiles: int, left_out: list[psutil.Process]) -> tuple[float, float, float]:
    """Returns tiles per CPU-second and per second of an epoch, and the seconds until its first batch."""
    with cpu_meter(left_out) as meter:
        started, first, seen = time.perf_counter(), 0.0, 0
        for batch in loader.epoch(epoch):
            first = first or time.perf_counter() - started
            seen += _num_tiles(batch)
        elapsed = time.perf_counter() - started
        assert seen == num_tiles, f"{loader.name} gave {seen} tiles instead of {num_tiles}"
        return num_tiles / meter.seconds, num_tiles / elapsed, first


def _num_tiles(batch: Any) -> int:
    if isinstance(batch, dict):
        return int(batch["mask"].sum())
    return len(batch[0]) if isinstance(batch, (tuple, list)) else len(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with samples.csv")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        table = tile_table(arguments.data, folder)
        ray = psutil.Process().children()  # so far no other: its idle work is none of the peers'
        tiles = stored_tiles(table) * REPEATS
        loaders = [
            ours(table),
            of_parquet(table),
            of_shards(tiles, f"{folder}/shards"),
            of_chunks(tiles, f"{folder}/chunks"),
        ]
        found: dict[str, list[tuple[float, float, float]]] = {loader.name: [] for loader in loaders}
        for epoch in range(1 + arguments.rounds):
            for loader in loaders:
                measured = measure(loader, epoch, len(tiles), [] if loader is loaders[0] else ray)
                if epoch:
                    found[loader.name].append(measured)
    print(f"{table.detail}, each {REPEATS} times an epoch; {WORKERS} workers, {arguments.rounds} rounds\n")
    print("| | tiles per CPU-second | tiles/s | first batch of an epoch |\n|---|---|---|---|")
    for name, rows in found.items():
        per_cpu, rate, first = np.median(rows, axis=0)
        spread = f"{min(row[0] for row in rows):,.0f} to {max(row[0] for row in rows):,.0f}"
        print(f"| {name} | {per_cpu:,.0f} ({spread}) | {rate:,.0f} | {first:.2f} s |")


if __name__ == "__main__":
    main()
