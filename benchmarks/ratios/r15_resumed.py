"""Tiles that a cohort's prediction answers when it is killed half way and started again, beside a calm pass (R15).

    python benchmarks/bench.py --only R15

The driver, Ray and all workers are killed once half of the tiles are answered, and the same command goes on. Each
answer of a part counts where it is computed, so that answers which were lost with the kill count too. Both passes must
leave the same files: nothing is lost, nothing is there twice.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "platform"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402
from chaos import require_same  # noqa: E402
from chaos_inputs import make_model, make_slides  # noqa: E402
from goals import say  # noqa: E402

from mclstexp.config import Config  # noqa: E402
from mclstexp.model.answer import Answerer, TileAnswers, answerer_of  # noqa: E402
from mclstexp.model.version import ModelVersion  # noqa: E402
from mclstexp.prediction import pipeline  # noqa: E402
from mclstexp.prediction.cohort import open_cohort  # noqa: E402
from mclstexp.prediction.run import predict_cohort  # noqa: E402
from mclstexp.progress import hidden  # noqa: E402

SLIDES, NUM_CPUS = 24, 5


@dataclass(frozen=True)
class Counting:
    """Answers as a model does, and adds the number of tiles to a file."""

    answerer: Answerer
    file: str

    def build(self, device: torch.device) -> Callable[[tuple[np.ndarray, ...], np.ndarray], TileAnswers]:
        """Returns the map from tiles to answers."""
        build = self.answerer.build(device)

        def answer(inputs: tuple[np.ndarray, ...], complete: np.ndarray) -> TileAnswers:
            answered = build(inputs, complete)
            with open(self.file, "a") as file:
                file.write(f"{len(complete)}\n")
            return answered

        return answer


def predict(folder: Path, out: str, file: str) -> None:
    """Predicts the slides of a folder, as far as that is left to do."""
    model, config = ModelVersion.load(folder / "model"), Config()
    pipeline.answerer_for = lambda model, plan: Counting(answerer_of(model), file)  # type: ignore[assignment]
    ray.init(address="local", num_cpus=NUM_CPUS, object_store_memory=400 * 2**20, log_to_driver=False)
    predict_cohort(model, open_cohort(str(folder / "slides"), model, out, config.predict), out, hidden, config.predict)
    ray.shutdown()


def count(file: Path) -> int:
    """Returns the tiles answered so far."""
    return sum(map(int, file.read_text().split())) if file.exists() else 0


def kill_at(folder: Path, out: str, file: Path, tiles: float) -> None:
    """Starts a run in a process of its own and kills all of it once so many tiles are answered; waits for the end."""
    command = [sys.executable, __file__, "--run", str(folder), out, str(file)]
    with psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        while job.poll() is None and count(file) < tiles:
            time.sleep(0.05)
        family = [*job.children(recursive=True), job] if job.poll() is None else []
        for process in family:
            process.kill()
        psutil.wait_procs(family)


def measure(folder: Path, number: int) -> tuple[float, float]:
    """Returns the tiles answered with a kill, and calmly."""
    calm, killed = ((folder / f"{name}-{number}.txt") for name in ("calm", "killed"))
    outs = {file: str(folder / file.stem) for file in (calm, killed)}
    kill_at(folder, outs[calm], calm, np.inf)
    kill_at(folder, outs[killed], killed, count(calm) / 2)
    lost_at = count(killed)
    kill_at(folder, outs[killed], killed, np.inf)
    num_files = require_same(outs[calm], outs[killed])
    print(f"killed at {lost_at} of {count(calm)} tiles; {num_files} files are the same", file=sys.stderr, flush=True)
    return float(count(killed)), float(count(calm))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="at most 3")
    parser.add_argument("--data", help="unused")
    parser.add_argument("--run", nargs=3, metavar=("FOLDER", "OUT", "FILE"), help="one run; for this script itself")
    arguments = parser.parse_args()
    if arguments.run:
        folder, out, file = arguments.run
        predict(Path(folder), out, file)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_slides(folder, SLIDES, seed=0)
        make_model(folder / "model", seed=0)
        found = [measure(folder, number) for number in range(min(3, arguments.rounds))]
    say("R15", found, "tiles", f"{SLIDES} slides, 64 px, small_cnn with two views")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
