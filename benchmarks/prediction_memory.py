"""Peak memory and CPU time of predicting a slide, small against large: the job with its driver, Ray and all workers.

    python benchmarks/prediction_memory.py --tiles 10000,100000

Each slide is a pyramid of one repeated encoded tile of synthetic tissue, so that it is made in seconds.
`jobs/predict.py` predicts it with an untrained model and a small random bank. `own` is memory of the processes
themselves, `store` shared pages, which are Ray's object store; pages of files, which the system may drop, are left out.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import psutil  # noqa: E402
from synthetic_slide import MPP, write_slide  # noqa: E402
from untrained_model import save_untrained  # noqa: E402

TILE_PX, NUM_SPOTS = 64, 2000
SETTINGS = {
    "tiles.size_px": TILE_PX,
    "tiles.mpp": MPP,
    "model.image_encoder": "small_cnn",
}
MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """Memory of a process tree at one moment, in MiB; each shared page is split among those who share it."""

    own: float
    store: float
    largest: tuple[str, ...]
    """The processes with the most memory of their own."""
    cpu_s: dict[int, float]
    """CPU-seconds that each process has taken so far."""

    @property
    def total(self) -> float:
        """Memory that no one else could use."""
        return self.own + self.store


def sample(root: psutil.Process) -> Sample:
    """Returns the memory of a process and all its descendants now."""
    held, cpu_s = [], {}
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.Error, OSError):  # it has just ended
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            fields = {name: int(value) / 1024 for name, value in re.findall(r"(Pss\w*):\s+(\d+) kB", text)}
            cpu_s[process.pid] = sum(process.cpu_times()[:2])
            held.append((fields.get("Pss_Anon", 0.0), fields.get("Pss_Shmem", 0.0), _title(process)))
    largest = tuple(f"{title} {own:.0f}" for own, _, title in sorted(held, reverse=True)[:6])
    return Sample(sum(own for own, _, _ in held), sum(store for _, store, _ in held), largest, cpu_s)


def _title(process: psutil.Process) -> str:
    words = process.cmdline() or [process.name()]
    return words[0] if words[0].startswith("ray::") else Path(words[min(1, len(words) - 1)]).name


@dataclass(frozen=True)
class Run:
    """Rate, CPU time and memory of predicting one slide."""

    num_tiles: int
    tiles_per_s: float
    cpu_s: float
    peak: Sample


def run_job(folder: Path, slide: Path, store_mb: int, every_s: float) -> Run:
    """Predicts a slide by the job, and samples its process tree meanwhile."""
    command = [sys.executable, str(ROOT / "jobs" / "predict.py"), "--model", str(folder / "model")]
    command += ["--samples", str(slide.parent), "--out", str(slide.parent / "out"), "--genes", "GENE00,GENE01"]
    command += ["--tracking.uri", f"sqlite:///{folder}/mlflow.db", "--cluster.object_store_mb", str(store_mb)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with open(folder / "log.txt", "w+") as log:
        job = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder)
        root, peak, cpu_s = psutil.Process(job.pid), Sample(0, 0, (), {}), {}
        while job.poll() is None:
            seen = sample(root)
            peak, cpu_s = max(peak, seen, key=lambda one: one.total), cpu_s | seen.cpu_s
            time.sleep(every_s)
        log.seek(0)
        text = log.read()
    done = re.search(r"([\d,]+) tiles in \d+ s \(([\d.]+) tiles/s", text)
    if job.returncode or not done:
        raise SystemExit(f"the job ended with code {job.returncode}:\n{text}")
    return Run(int(done[1].replace(",", "")), float(done[2]), sum(cpu_s.values()), peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", default="10000,100000", help="tiles of each slide, the smallest first")
    parser.add_argument("--genes", type=int, default=1000, help="genes of the model")
    parser.add_argument("--store-mb", type=int, default=512, help="Ray's object store")
    parser.add_argument("--every", type=float, default=0.5, help="seconds between two samples")
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_untrained(folder / "model", SETTINGS, arguments.genes, NUM_SPOTS)
        for num_tiles in map(int, arguments.tiles.split(",")):
            slide = folder / str(num_tiles) / f"slide{num_tiles}.tif"
            slide.parent.mkdir()
            write_slide(slide, num_tiles, TILE_PX)
            run = run_job(folder, slide, arguments.store_mb, arguments.every)
            runs.append(run)
            peak, size = run.peak, slide.stat().st_size / MIB
            print(f"{run.num_tiles:,} tiles ({size:.0f} MiB): {run.tiles_per_s:.0f} tiles/s, {run.cpu_s:.0f} CPU-s")
            print(f"  peak {peak.total:.0f} MiB = own {peak.own:.0f} + store {peak.store:.0f}")
            print(f"  most at the peak, MiB: {', '.join(peak.largest)}", flush=True)
    first, last = runs[0], runs[-1]
    print(f"peak of the last over the first: {last.peak.total / first.peak.total:.3f}")
    if last.num_tiles > first.num_tiles:
        tile_s = (last.cpu_s - first.cpu_s) / (last.num_tiles - first.num_tiles)
        print(f"each further tile takes the job {tile_s * 1000:.2f} CPU-ms: {1 / tile_s:.0f} tiles/CPU-s")


if __name__ == "__main__":
    main()
