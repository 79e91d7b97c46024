"""Steps that a training repeats when its worker is killed, beside the steps between two checkpoints (R16).

    python benchmarks/bench.py --only R16

The worker is killed 1, 3, 5, 7 and 9 steps after the checkpoint of step 10, one checkpoint every 10 steps; Ray Train
starts another. What is repeated is seen from the steps that the driver is told of, so that it counts what a user waits
for. A kill at a random time repeats what their median does.
"""

import argparse
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "platform"), str(ROOT / "benchmarks")]

import psutil  # noqa: E402
import ray  # noqa: E402
from goals import say  # noqa: E402
from painted_table import configuration, make_table  # noqa: E402

from mclstexp.progress import Metrics  # noqa: E402
from mclstexp.training.run import open_run  # noqa: E402
from mclstexp.training.trainer import fit  # noqa: E402

EVERY, AFTER = 10, (1, 3, 5, 7, 9)
WORKER, NUM_CPUS = "RayTrainWorker", 8


@dataclass
class Killer:
    """Kills the worker once, when the driver is told of a step."""

    at: int
    steps: list[int] = field(default_factory=list)
    is_done: threading.Event = field(default_factory=threading.Event)

    def log(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step."""
        self.steps.append(step)
        if step >= self.at and not self.is_done.is_set():
            self.is_done.set()
            for process in psutil.process_iter(["cmdline"]):
                if WORKER in " ".join(process.info["cmdline"] or []):
                    process.kill()

    @property
    def num_repeated(self) -> int:
        """Steps that were taken twice."""
        return sum(max(0, before - after + 1) for before, after in zip(self.steps, self.steps[1:], strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how many of the five kills")
    parser.add_argument("--data", help="unused")
    num_rounds = parser.parse_args().rounds
    config = configuration(train__num_workers=1, train__batch_sentences=1, train__checkpoint_every=EVERY)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        ray.init(address="local", num_cpus=NUM_CPUS, log_to_driver=False)
        data = make_table(scratch)
        for number, after in enumerate(AFTER[:num_rounds]):
            killer = Killer(EVERY + after)
            fit(open_run(data, f"{scratch}/runs", f"run-{number}", config, lambda *_: ""), killer.log)
            assert killer.is_done.is_set(), "nothing was killed"
            print(
                f"killed {after} steps after a checkpoint: {killer.num_repeated} repeated", file=sys.stderr, flush=True
            )
            found.append((float(killer.num_repeated), float(EVERY)))
        ray.shutdown()
    say("R16", found, "steps", f"DenseNet-121, 224 px, a checkpoint every {EVERY} steps, killed evenly between two")


if __name__ == "__main__":
    main()
