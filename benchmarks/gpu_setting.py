"""What the steps of `make bench-gpu` share: the device, tiny sizes on a CPU, and rates without the first round."""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

Value = TypeVar("Value")
ROUNDS = 5


@dataclass(frozen=True)
class Setting:
    """Where a step runs, and in which sizes."""

    device: torch.device
    is_toy: bool

    def choose(self, full: Value, toy: Value) -> Value:
        """Returns the size of a real run or of a toy run."""
        return toy if self.is_toy else full

    def rates(self, work: Callable[[], object], num_tiles: int, rounds: int = ROUNDS) -> list[float]:
        """Returns tiles per second of each round of `work`, which takes `num_tiles` tiles; a first one warms up."""
        return [num_tiles / seconds for seconds in self.times(work, rounds)]

    def times(self, work: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
        """Returns the seconds of each round of `work` with all that it starts on the device; a first one warms up."""
        times = []
        for _ in range(self.choose(rounds, 1) + 1):
            started = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - started)
        return times[1:]

    def wait(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def setting(description: str | None) -> Setting:
    """Returns the setting that the command line asks for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="on a CPU, in tiny sizes")
    is_toy = parser.parse_args().toy
    if not is_toy and not torch.cuda.is_available():
        sys.exit("there is no CUDA device; `--toy` runs on a CPU")
    return Setting(torch.device("cpu" if is_toy else "cuda"), is_toy)
