"""Retrieval from large banks: exact and approximate, in queries per CPU-second.

    python benchmarks/bank_scale.py --keys 100000,1000000 --bank-up-to 1000000
    python benchmarks/bank_scale.py --keys 10000000 --bank-up-to 0

Keys are made, searched and dropped block by block, so that any number fits into 6 GiB; only the search is timed. A key
is one of 1,000 random directions, plus variation along 16 common directions, plus noise; queries are made in the same
way. Up to `--bank-up-to` keys a bank with a payload is searched too, in memory and by memory map of its file; both must
give the same bits. The approximate index is Faiss's inverted lists of 8-bit codes (pip install -e ".[bench]").
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]
os.environ["OMP_NUM_THREADS"] = "1"  # as for an embedder on a CPU

import faiss  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from mclstexp.model.bank import Bank  # noqa: E402
from mclstexp.model.nearest import directions, nearest  # noqa: E402
from mclstexp.model.retrieval import Retrieved, resolve, retrieve  # noqa: E402
from mclstexp.settings import RetrievalConfig  # noqa: E402

WIDTH, NUM_CLUSTERS, SHARED = 256, 1000, 16
BLOCK = 2**18
VARIATION, NOISE = 0.5, 0.2  # lengths, relative to a cluster's direction
NUM_QUERIES, QUERY_SEED = 256, 10**9  # as many queries as a part has tiles
MAX_LISTS, POINTS_PER_LIST, TRAIN_ROUNDS = 4096, 64, 10
PROBES = (1, 4, 16, 64, 256)
MIB = 2**20


def make_keys(seed: int, count: int) -> np.ndarray:
    """Returns clustered vectors, float32 (count, WIDTH); the clusters are the same for every seed."""
    common, own = np.random.default_rng(0), np.random.default_rng(seed + 1)
    centres = common.normal(size=(NUM_CLUSTERS, WIDTH)) / WIDTH**0.5
    axes = common.normal(size=(SHARED, WIDTH)) / WIDTH**0.5
    along = own.normal(size=(count, SHARED)) * VARIATION / SHARED**0.5
    noise = own.normal(size=(count, WIDTH)) * NOISE / WIDTH**0.5
    return (centres[own.integers(0, NUM_CLUSTERS, count)] + along @ axes + noise).astype(np.float32)


def blocks(num_keys: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the first row and the keys of each block."""
    for start in range(0, num_keys, BLOCK):
        yield start, make_keys(start, min(BLOCK, num_keys - start))


class Timer:
    """CPU-seconds of this process, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        """Returns the work's result; adds its time to that of the same name."""
        started = time.process_time()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started
        return result

    def rate(self, name: str) -> float:
        """Returns queries per CPU-second."""
        return NUM_QUERIES / self.seconds[name]


def plain(queries: torch.Tensor, keys: torch.Tensor, k: int) -> torch.Tensor:
    """Returns the k keys of highest inner product in single precision, to compare exact retrieval with."""
    return (queries @ keys.T).topk(min(k, len(keys)), dim=1).indices


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def new_index(num_keys: int, timer: Timer) -> faiss.Index:
    """Returns a trained index without keys."""
    lists = min(MAX_LISTS, int(4 * num_keys**0.5))
    index = faiss.index_factory(WIDTH, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.max_points_per_centroid = TRAIN_ROUNDS, POINTS_PER_LIST
    wanted = min(num_keys, lists * POINTS_PER_LIST)
    sample = np.concatenate([unit(keys) for start, keys in blocks(num_keys) if start < wanted])[:wanted]
    timer.time("build", lambda: index.train(sample))
    return index


def search(num_keys: int, k: int) -> None:
    """Searches all keys exactly, in single precision and by the index, and prints the rates."""
    queries, timer = make_keys(QUERY_SEED, NUM_QUERIES), Timer()
    unit_queries = torch.from_numpy(unit(queries))
    index, found = new_index(num_keys, timer), []
    for start, keys in blocks(num_keys):
        whole = timer.time("directions", lambda keys=keys: directions(keys))
        ids, scores = timer.time("exact", lambda whole=whole: nearest(queries, whole, k))
        found.append((ids + start, scores))
        normed = unit(keys)
        timer.time("float32", lambda normed=normed: plain(unit_queries, torch.from_numpy(normed), k))
        timer.time("build", lambda normed=normed: index.add(normed))
    ids, scores = (np.concatenate(one, axis=1) for one in zip(*found, strict=True))
    best = np.take_along_axis(ids, np.argsort(-scores, axis=1, kind="stable")[:, :k], axis=1)
    lists, seconds, size_mib = index.nlist, timer.seconds, (index.code_size + 8) * num_keys / MIB
    print(f"{num_keys:,} keys, {k} neighbours; best cosine {scores.max(axis=1).mean():.3f} on average")
    print(f"  exact      {timer.rate('exact'):9.1f} queries/CPU-s; directions took {seconds['directions']:.1f} CPU-s")
    ratio = seconds["exact"] / seconds["float32"]
    print(f"  float32    {timer.rate('float32'):9.1f} queries/CPU-s, {ratio:.2f} times as many")
    print(f"  IVF{lists},SQ8 built in {seconds['build']:.0f} CPU-s, {size_mib:.0f} MiB")
    for probes in PROBES:
        index.nprobe, name = probes, f"{probes} probes"
        near = timer.time(name, lambda: index.search(unit(queries), k)[1])
        recall = np.mean([len(np.intersect1d(*pair)) / k for pair in zip(near, best, strict=True)])
        print(f"  {name:10} {timer.rate(name):9.1f} queries/CPU-s, recall@{k} {recall:.4f}", flush=True)


def whole_bank(num_keys: int, num_genes: int, k: int) -> None:
    """Searches a bank with its payload, in memory and by memory map of its file; both must give the same bits."""
    keys, payload = np.empty((num_keys, WIDTH), np.float32), np.empty((num_keys, num_genes), np.float32)
    for start, block in blocks(num_keys):
        keys[start : start + len(block)] = block
        payload[start : start + len(block)] = np.random.default_rng(start).random((len(block), num_genes), np.float32)
    donors = np.array([f"P{number}" for number in range(16)], object)[np.arange(num_keys) % 16]
    bank = Bank.of(keys, payload, donors, donors, donors)
    config, queries, timer = resolve(RetrievalConfig(k=k), num_keys), make_keys(QUERY_SEED, NUM_QUERIES), Timer()
    size_mib = (keys.nbytes + bank.directions.nbytes + payload.nbytes) / MIB
    resident: Retrieved = timer.time("in memory", lambda: retrieve(queries, bank, config))
    with tempfile.TemporaryDirectory() as folder:
        bank.save(folder, {})
        mapped = Bank.load(folder)
        read: Retrieved = timer.time("mapped", lambda: retrieve(queries, mapped, config))
    same = all(np.array_equal(values, vars(read)[name], equal_nan=True) for name, values in vars(resident).items())
    print(f"  bank with {num_genes} genes, {size_mib:.0f} MiB; answers {'identical' if same else 'DIFFER'}")
    for name in ("in memory", "mapped"):
        print(f"  {name:10} {timer.rate(name):9.1f} queries/CPU-s", flush=True)
    if not same:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", default="100000,1000000", help="sizes of the bank")
    parser.add_argument(
        "--bank-up-to", type=int, default=1_000_000, help="largest bank that is searched with its payload"
    )
    parser.add_argument("--genes", type=int, default=64, help="genes of that payload")
    parser.add_argument("--k", type=int, default=200, help="neighbours")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    for num_keys in map(int, arguments.keys.split(",")):
        search(num_keys, arguments.k)
        if num_keys <= arguments.bank_up_to:
            whole_bank(num_keys, arguments.genes, arguments.k)
    print(f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
