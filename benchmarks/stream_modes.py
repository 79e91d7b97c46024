"""Two ways to feed training ranks, in turn on two node processes: one split stream, or one stream per rank.

    python benchmarks/stream_modes.py --sentences 5000 --ranks 4 --rounds 3

Prints for each mode and round the time to the first batch of each epoch, sentences/s, CPU time of a sentence over all
processes, peak object store, and how many of the other ranks finish when one is killed. Both modes load as many
sentences in a task. The result and the choice are in docs/decisions.md.
"""

import argparse
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import ray  # noqa: E402
from ray._private.internal_api import memory_summary  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from mclstexp.data import spots, stream  # noqa: E402
from mclstexp.slides.codec import encode_tile  # noqa: E402

SPOTS, SIZE, GENES, EPOCHS, STEP = 16, 64, 200, 3, 4
BATCH = stream.BatchShape(STEP, SPOTS * 3 * SIZE**2)
TASK_ROWS = STEP * (stream._TASK_BYTES // (STEP * BATCH.row_bytes))


def load(rows: dict[str, np.ndarray]) -> spots.Batch:
    """Reads and decodes sentences (a row group each), as the training stream does."""
    sentences = [read(str(row["section_id"]), row["group"]) for row in spots.each_row(rows)]
    empty = np.zeros((SPOTS, GENES), np.float32)
    batch = spots.joined([spots.pad({"expression": empty[: len(tiles)]}, SPOTS) for tiles in sentences])
    return batch | {"image": spots.decode_sentences(sentences, SPOTS, SIZE), "sentence_id": rows["sentence_id"]}


def read(path: str, group: int) -> list[bytes]:
    """Returns a sentence's encoded tiles; none of the filler of a last step."""
    return pq.ParquetFile(path).read_row_group(group)["image"].to_pylist() if group >= 0 else []


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

    def ready(self) -> None:
        """Returns when the rank has started."""

    def split_stream(self, iterator: ray.data.DataIterator) -> dict[str, list[Any]]:
        """Drains its share of the one dataset."""
        return self._drain(iterator.iter_batches(batch_size=STEP, batch_format="numpy") for _ in range(EPOCHS))

    def own(
        self, index: list[stream.Sentence], rank: int, world_size: int, share: stream.StreamShare
    ) -> dict[str, list[Any]]:
        """Drains its own stream over its slice of the index, as a training worker does."""
        orders = [stream.epoch_order(index, 0, epoch) for epoch in range(EPOCHS)]
        epochs = [stream.rank_slice(order, STEP * world_size, rank, world_size, 0) for order in orders]
        batches = stream.stream(epochs, load, BATCH, share)
        return self._drain(islice(batches, len(rows) // STEP) for rows in epochs)

    def _drain(self, epochs: Iterable[Iterable[spots.Batch]]) -> dict[str, list[Any]]:
        first, seen, seconds = [], [], []
        started = time.perf_counter()
        for batches in epochs:
            ids: list[str] = []
            for batch in batches:
                if not ids:
                    first.append(round(time.perf_counter() - started, 2))
                ids += [str(name) for name in batch["sentence_id"] if name]
            seconds.append(time.perf_counter() - started)
            seen.append(ids)
            started = time.perf_counter()
        return {"first": first, "seen": seen, "seconds": seconds}


def cpu_seconds() -> float:
    """Returns the CPU time that this process and all below it have taken; those that have ended count no more."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with suppress(psutil.Error):
            total += sum(process.cpu_times()[:2])
    return total


def peak_store_mb(stop: threading.Event, peak: list[float]) -> None:
    """Samples the object store's use until `stop` is set."""
    while not stop.wait(0.5):
        used = re.search(r"Plasma memory usage (\d+) MiB", memory_summary(stats_only=True))
        peak.append(float(used[1]) if used else 0.0)


def start(mode: str, index: list[stream.Sentence], num_ranks: int) -> tuple[list[Any], list[Any]]:
    """Starts all ranks in a mode; returns the actors and their results' references."""
    ranks = [Rank.remote() for _ in range(num_ranks)]
    ray.get([rank.ready.remote() for rank in ranks])
    if mode == "own":
        store = int(ray.cluster_resources()["object_store_memory"] / (2 * num_ranks))
        share = stream.StreamShare(1, store, None)
        return ranks, [actor.own.remote(index, rank, num_ranks, share) for rank, actor in enumerate(ranks)]
    rows = stream.rank_slice(stream.epoch_order(index, 0, 0), 1, 0, 1, 0)
    dataset = (
        ray.data.from_items(rows, override_num_blocks=-(-len(rows) // TASK_ROWS))
        .randomize_block_order()
        .map_batches(load, batch_size=None)
    )
    splits = dataset.streaming_split(num_ranks, equal=True)
    return ranks, [actor.split_stream.remote(part) for actor, part in zip(ranks, splits, strict=True)]


def measure(mode: str, index: list[stream.Sentence], num_ranks: int) -> str:
    """Runs one mode to its end and describes it in one line."""
    stop, peak = threading.Event(), [0.0]
    sampler = threading.Thread(target=peak_store_mb, args=(stop, peak), daemon=True)
    ranks, references = start(mode, index, num_ranks)
    sampler.start()
    before, started = cpu_seconds(), time.perf_counter()
    results = ray.get(references)
    elapsed, taken = time.perf_counter() - started, cpu_seconds() - before
    stop.set()
    sampler.join()
    for rank in ranks:
        ray.kill(rank)
    distinct = {len({name for result in results for name in result["seen"][epoch]}) for epoch in range(EPOCHS)}
    read = EPOCHS * len(index)
    return (
        f"{mode}: first batch of epochs {results[0]['first']} s, {read / elapsed:.0f} sentences/s "
        f"({SPOTS * read / elapsed:.0f} tiles/s), {1000 * taken / read:.2f} CPU-ms a sentence, {distinct} distinct of "
        f"{len(index)} sentences, peak object store {max(peak):.0f} MiB"
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
    parser.add_argument("--rounds", type=int, default=3, help="times that each mode runs")
    parser.add_argument("--death-wait", type=float, default=120, help="seconds given to the ranks that survive")
    arguments = parser.parse_args()
    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=arguments.ranks, object_store_memory=500 * 2**20)
    ray.init(address=cluster.address, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        index = write_tables(folder, arguments.sentences)
        for mode in ("own", "split") * arguments.rounds:
            print(measure(mode, index, arguments.ranks), flush=True)
        for mode in ("own", "split"):
            print(measure_death(mode, index, arguments.ranks, after_s=8, wait_s=arguments.death_wait), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
