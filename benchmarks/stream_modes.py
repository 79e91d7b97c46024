"""Two ways to feed training ranks, side by side on two node processes: one split stream, or one stream per rank.

    python benchmarks/stream_modes.py --sentences 5000 --ranks 4

Prints for each mode the time to the first batch of each epoch, sentences/s, peak object store, and how many of the
other ranks finish when one is killed. The result and the choice are in docs/decisions.md.
"""

import argparse
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import ray  # noqa: E402
from ray._private.internal_api import memory_summary  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from mclstexp.data import spots, stream  # noqa: E402
from mclstexp.slides.codec import decode_tile, encode_tile  # noqa: E402

SPOTS, SIZE, GENES, EPOCHS, STEP = 16, 64, 200, 3, 4


def load(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Reads and decodes one sentence (a row group), as the training stream does."""
    tiles: list[bytes] = []
    if rows["group"][0] >= 0:  # not the filler of a last step
        tiles = pq.ParquetFile(str(rows["section_id"][0])).read_row_group(int(rows["group"][0]))["image"].to_pylist()
    images = np.array([decode_tile(tile) for tile in tiles], np.uint8).reshape(-1, SIZE, SIZE, 3)
    sentence = {"image": images, "expression": np.zeros((len(images), GENES), np.float32)}
    return spots.pad(sentence, SPOTS) | {"sentence_id": rows["sentence_id"]}


def write_tables(folder: str, num_sentences: int, num_files: int = 10) -> list[stream.Sentence]:
    """Writes Parquet files of noise tiles with one row group per sentence and returns their index."""
    rng, index = np.random.default_rng(0), []
    tile = encode_tile(rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8), "jpeg", 85)
    table = pa.table({"image": pa.array([tile] * SPOTS, pa.binary())})
    for number in range(num_files):
        path = f"{folder}/{number}.parquet"
        with pq.ParquetWriter(path, table.schema, use_dictionary=False, compression="zstd") as writer:
            for group in range(num_sentences // num_files):
                writer.write_table(table)
                index.append(stream.Sentence(path, group, (path, group)))
    return index


@ray.remote(num_cpus=1)
class Rank:
    """A rank that takes batches and does nothing with them."""

    def split_stream(self, iterator: ray.data.DataIterator) -> dict[str, object]:
        """Drains its share of the one dataset."""
        return self._drain(lambda epoch: iterator.iter_batches(batch_size=STEP, batch_format="numpy"))

    def own(
        self, index: list[stream.Sentence], rank: int, world_size: int, share: stream.StreamShare
    ) -> dict[str, object]:
        """Drains its own dataset over its slice of the index."""

        def batches(epoch: int) -> Iterator[spots.Batch]:
            order = stream.epoch_order(index, 0, epoch)
            rows = stream.rank_slice(order, STEP * world_size, rank, world_size, epoch)
            return stream.stream(rows, load, STEP, share)

        return self._drain(batches)

    def _drain(self, make: object) -> dict[str, object]:
        first, seen, seconds = [], [], []
        for epoch in range(EPOCHS):
            started = time.perf_counter()
            ids: list[str] = []
            for batch in make(epoch):
                if not ids:
                    first.append(round(time.perf_counter() - started, 2))
                ids += [str(name) for name in batch["sentence_id"] if name]
            seconds.append(time.perf_counter() - started)
            seen.append(ids)
        return {"first": first, "seen": seen, "seconds": seconds}


def peak_store_mb(stop: threading.Event, peak: list[float]) -> None:
    """Samples the object store's use until `stop` is set."""
    while not stop.wait(0.5):
        used = re.search(r"Plasma memory usage (\d+) MiB", memory_summary(stats_only=True))
        peak.append(float(used[1]) if used else 0.0)


def start(mode: str, index: list[stream.Sentence], num_ranks: int) -> tuple[list[object], list[object]]:
    """Starts all ranks in a mode; returns the actors and their results' references."""
    ranks = [Rank.remote() for _ in range(num_ranks)]
    if mode == "own":
        store = int(ray.cluster_resources()["object_store_memory"] / (2 * num_ranks))
        share = stream.StreamShare(1, store, None)
        return ranks, [actor.own.remote(index, rank, num_ranks, share) for rank, actor in enumerate(ranks)]
    rows = stream.rank_slice(stream.epoch_order(index, 0, 0), 1, 0, 1, 0)
    dataset = (
        ray.data.from_items(rows, override_num_blocks=len(rows) // STEP)
        .randomize_block_order()
        .map_batches(load, batch_size=1)
    )
    splits = dataset.streaming_split(num_ranks, equal=True)
    return ranks, [actor.split_stream.remote(part) for actor, part in zip(ranks, splits, strict=True)]


def measure(mode: str, index: list[stream.Sentence], num_ranks: int) -> str:
    """Runs one mode to its end and describes it in one line."""
    stop, peak = threading.Event(), [0.0]
    sampler = threading.Thread(target=peak_store_mb, args=(stop, peak), daemon=True)
    sampler.start()
    _, references = start(mode, index, num_ranks)
    results = ray.get(references)
    stop.set()
    sampler.join()
    last = max(result["seconds"][-1] for result in results)
    distinct = len({name for result in results for name in result["seen"][-1]})
    return (
        f"{mode}: first batch of epochs {results[0]['first']} s, last epoch {len(index) / last:.0f} sentences/s "
        f"({SPOTS * len(index) / last:.0f} tiles/s), {distinct} of {len(index)} sentences, "
        f"peak object store {max(peak):.0f} MiB"
    )


def measure_death(mode: str, index: list[stream.Sentence], num_ranks: int, after_s: float, wait_s: float) -> str:
    """Kills one rank in mid-epoch and returns how many of the others still finish."""
    ranks, references = start(mode, index, num_ranks)
    time.sleep(after_s)
    ray.kill(ranks[-1])
    done, _ = ray.wait(references[:-1], num_returns=num_ranks - 1, timeout=wait_s)
    for actor in ranks[:-1]:
        ray.kill(actor)
    others = f"{len(done)} of {num_ranks - 1} others finished in {wait_s:.0f} s"
    return f"{mode}: one rank killed after {after_s:.0f} s; {others}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=5000, help="sentences of 16 tiles of 64 px")
    parser.add_argument("--ranks", type=int, default=4, help="ranks on two nodes")
    parser.add_argument("--death-wait", type=float, default=120, help="seconds given to the ranks that survive")
    arguments = parser.parse_args()
    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=arguments.ranks, object_store_memory=500 * 2**20)
    ray.init(address=cluster.address, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        index = write_tables(folder, arguments.sentences)
        for mode in ("own", "split"):
            print(measure(mode, index, arguments.ranks), flush=True)
        for mode in ("own", "split"):
            few = index[: len(index) // 5]  # so that the others have time to finish
            print(measure_death(mode, few, arguments.ranks, after_s=15, wait_s=arguments.death_wait), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
