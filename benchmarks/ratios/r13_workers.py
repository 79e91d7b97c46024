"""Training rate on 1, 2 and 4 workers of a core each, at equal work per worker (weak) and at equal batch (strong).

    python benchmarks/bench.py --only R13

DenseNet-121 on tiles of 224 px, streamed and trained by the product. Rates are those of the steps behind the eighth,
for the first are slower, and within one epoch, because its end scores and stores. CPU time is that of the
workers, from their start. On fewer cores than workers the cores are shared, and an ideal rate is that of the cores.
What the cores themselves lose is stated beside: the rate of two processes that take such steps from memory and share
nothing, over twice that of one.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "platform"), str(ROOT / "benchmarks")]

import psutil  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402
from goals import say  # noqa: E402
from painted_table import SETTINGS, SPOTS, configuration, make_table  # noqa: E402
from synthetic_step import SyntheticStep  # noqa: E402

from mclstexp.cluster import KEEPING_MEMORY  # noqa: E402
from mclstexp.config import Config  # noqa: E402
from mclstexp.progress import Metrics  # noqa: E402
from mclstexp.training.run import open_run  # noqa: E402
from mclstexp.training.trainer import fit  # noqa: E402

SENTENCES, SKIPPED = 4, 8
"""Sentences of a worker's step, and first steps that are not counted."""
ARRAY_SIDE = 16
"""Spots along a section: an epoch has 32 steps of one worker."""
ALONE_S = 10.0
"""Seconds for which a process takes steps from memory, behind the first ones."""
NUM_UNSHARED = 2
NUM_CPUS = 12  # logical ones: each worker and each stream takes one
WORKER = "RayTrainWorker"


@dataclass
class Watch:
    """What the driver sees of a training."""

    steps: list[Metrics] = field(default_factory=list)
    cpu_s: float = 0.0
    """Of all workers, when last looked at."""
    _stop: threading.Event = field(default_factory=threading.Event)

    def log(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step."""
        self.steps.append(metrics)

    def follow(self) -> None:
        """Looks at the workers until `stop`."""
        while not self._stop.wait(0.2):
            running = psutil.process_iter(["cmdline", "cpu_times"])
            workers = [each.info for each in running if WORKER in " ".join(each.info["cmdline"] or [])]
            self.cpu_s = max(self.cpu_s, sum(sum(each["cpu_times"][:2]) for each in workers))

    def stop(self) -> None:
        """Ends `follow`."""
        self._stop.set()

    @property
    def spots_per_s(self) -> float:
        """Median rate."""
        return median(metrics["spots_per_s"] for metrics in self.steps[SKIPPED:])

    @property
    def data_wait(self) -> float:
        """Median share of a step that waits for data."""
        return median(metrics["data_wait_share"] for metrics in self.steps[SKIPPED:])


def train(data: str, out: str, name: str, config: Config) -> Watch:
    """Trains from the start and returns what was seen."""
    watch = Watch()
    follower = threading.Thread(target=watch.follow, daemon=True)
    follower.start()
    fit(open_run(data, out, name, config, lambda *_: ""), watch.log)
    watch.stop()
    follower.join()
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", help="unused")
    parser.add_argument("--all", action="store_true", help="4 workers and equal batches too")
    parser.add_argument("--alone", action="store_true", help="take steps from memory in this process, print the rate")
    arguments = parser.parse_args()
    if arguments.alone:
        print(steps_alone())
        return
    kinds = {"1": (1, SENTENCES), "2 weak": (2, 2 * SENTENCES)}
    if arguments.all:
        kinds |= {"2 strong": (2, SENTENCES), "4 weak": (4, 4 * SENTENCES), "4 strong": (4, 2 * SENTENCES)}
    with tempfile.TemporaryDirectory() as scratch:
        ray.init(address="local", num_cpus=NUM_CPUS, log_to_driver=False)
        found = measure(scratch, kinds, arguments.rounds)
        ray.shutdown()
    for kind, watches in found.items():
        rates = [watch.spots_per_s for watch in watches]
        print(
            f"{kind}: {median(rates):.1f} tiles/s ({min(rates):.1f} to {max(rates):.1f}), waiting for data "
            f"{median(watch.data_wait for watch in watches):.0%}, {median(watch.cpu_s for watch in watches):.0f} CPU-s"
        )
    unshared = [rate_of_processes(2) / (2 * rate_of_processes(1)) for _ in range(NUM_UNSHARED)]
    pairs = [(two.spots_per_s, 2 * one.spots_per_s) for two, one in zip(found["2 weak"], found["1"], strict=True)]
    detail = f"DenseNet-121, 224 px, {SPOTS * SENTENCES} tiles a worker and step"
    say("R13", pairs, "tiles/s", f"{detail}; two processes that share nothing {median(unshared):.2f}")


def steps_alone() -> float:
    """Returns the tiles per second of steps over one batch in memory."""
    step = SyntheticStep(SETTINGS, torch.device("cpu"), configuration().genes.num_genes)
    batch = step.batch(SPOTS * SENTENCES, SPOTS)
    for _ in range(SKIPPED):
        step.take(batch)
    taken, started = 0, time.perf_counter()
    while time.perf_counter() - started < ALONE_S:
        step.take(batch)
        taken += 1
    return taken * SPOTS * SENTENCES / (time.perf_counter() - started)


def rate_of_processes(number: int) -> float:
    """Returns the tiles per second of processes that run `steps_alone` at once."""
    command = [sys.executable, __file__, "--alone"]
    environment = os.environ | KEEPING_MEMORY["env_vars"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(number)]
    rates = [float(process.communicate()[0]) for process in running]
    assert not any(process.returncode for process in running)
    return sum(rates)


def measure(scratch: str, kinds: dict[str, tuple[int, int]], rounds: int) -> dict[str, list[Watch]]:
    """Trains each kind in turn, in each round."""
    data = make_table(scratch, ARRAY_SIDE)
    found: dict[str, list[Watch]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind, (workers, sentences) in kinds.items():
            config = configuration(train__num_workers=workers, train__batch_sentences=sentences)
            started = time.monotonic()
            found[kind].append(train(data, f"{scratch}/runs", f"{kind.replace(' ', '-')}-{number}", config))
            print(f"{kind}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
