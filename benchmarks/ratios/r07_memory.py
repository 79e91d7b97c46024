"""Peak memory of the training stream over a small table and one of eight times its tiles (R7).

    python benchmarks/bench.py --only R7

Each measurement is a fresh process with a Ray of its own that drains one epoch. Memory is that of the whole tree, Ray's
object store included, sampled twice a second: private pages and each one's share of common ones, without cached files.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "platform"), str(ROOT / "benchmarks")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])

import psutil  # noqa: E402
from goals import say  # noqa: E402
from prediction_memory import Sample, sample  # noqa: E402
from synthetic_table import write_tile_table  # noqa: E402
from tile_stream import SIZE_PX, TileTable, connect  # noqa: E402

from mclstexp.data.schema import load_manifest  # noqa: E402

SENTENCES, TIMES, LENGTH, GENES = 80, 8, 128, 200
_SAMPLE_S = 0.5


def drain(root: str) -> None:
    """Streams one epoch of a table and checks that all of it came."""
    connect()
    table = TileTable(root, load_manifest(root), "")
    seen = sum(int(batch["mask"].sum()) for batch in table.batches(table.loader(), [table.rows(0)]))
    assert seen == table.num_tiles, f"{seen} tiles came instead of {table.num_tiles}"


def peak_of(root: str) -> Sample:
    """Returns the memory at its peak of a process that drains a table, and of all below it."""
    job, peak = subprocess.Popen([sys.executable, __file__, "--drain", root]), Sample(0.0, 0.0, (), {})
    while job.poll() is None:
        peak = max(peak, sample(psutil.Process(job.pid)), key=lambda each: each.total)
        time.sleep(_SAMPLE_S)
    if job.returncode:
        raise RuntimeError(f"{__file__} --drain {root} ended with {job.returncode}")
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="unused: the size of the table matters, not its pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--drain", metavar="TABLE", help="what a fresh process does")
    arguments = parser.parse_args()
    if arguments.drain:
        drain(arguments.drain)
        return
    with tempfile.TemporaryDirectory() as folder:
        tables = {f"{folder}/{times}": times * SENTENCES for times in (TIMES, 1)}
        for root, num_sentences in tables.items():
            write_tile_table(Path(root), SIZE_PX, num_sentences, LENGTH, GENES)
        peaks = [[peak_of(root) for root in tables] for _ in range(arguments.rounds)]
    num_tiles = SENTENCES * LENGTH
    stores = " and ".join(f"{statistics.median(each.store for each in side):.0f}" for side in zip(*peaks, strict=True))
    detail = f"{num_tiles * TIMES:,} and {num_tiles:,} tiles of {SIZE_PX} px; of it object store {stores}"
    say("R7", [(large.total, small.total) for large, small in peaks], "MiB", detail)


if __name__ == "__main__":
    main()
