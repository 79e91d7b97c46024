"""What the measurements of `make bench` aim at, and how one of them states what it found.

Each file `ratios/r*.py` measures one ratio or more in a process of its own, both sides in turn, and calls `say` for each.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

FOUND = "ratio: "
"""Begins the line that states a ratio."""


@dataclass(frozen=True)
class Goal:
    """What a ratio, ours / theirs, should be."""

    what: str
    floor: float
    target: float
    lower_is_better: bool = False

    def verdict(self, ratio: float) -> str:
        """Returns which goal a ratio meets."""
        reached = [ratio <= goal if self.lower_is_better else ratio >= goal for goal in (self.target, self.floor)]
        return "met" if reached[0] else "floor met" if reached[1] else "**missed**"


GOALS = {
    "R1": Goal("tiles decoded per CPU-second: ours / Pillow", 1.7, 2.0),
    "R2": Goal("CPU time of a tile: our stream on Ray / a bare loop", 3.0, 2.2, lower_is_better=True),
    "R3": Goal("CPU time of a tile: Ray by rows, Pillow and float32 / our stream", 2.0, 2.7),
    "R4": Goal("time to the first batch of a second epoch: our stream / `ray.data.read_parquet`", 0.5, 0.2, True),
    "R5": Goal("training steps per second: real tiles / one batch in memory", 0.90, 0.95),
    "R6": Goal("bytes of a stored tile / raw uint8", 0.15, 0.10, lower_is_better=True),
    "R7": Goal("peak memory of the stream: 8 times the tiles / once", 1.3, 1.1, lower_is_better=True),
    "R8": Goal("training steps per second: ours / the published step in float32", 1.6, 2.0),
    "R9": Goal("time of InfoNCE over 12,288 spots: in blocks / the full matrix", 1.2, 0.9, lower_is_better=True),
    "R10": Goal("tiles searched per CPU-second in 100,000 keys: ours / one argsort each", 8.0, 15.0),
    "R11": Goal("tiles read per CPU-second from storage tiles of JPEG: ours / OpenSlide", 2.0, 3.5),
    "R12": Goal("prediction's tiles per second / those of its slowest stage alone", 0.75, 0.85),
    "R13": Goal("training on two workers of a core each / twice one worker's rate", 0.70, 0.85),
    "R14": Goal("time of a sweep / that of its trials divided by their slots", 1.3, 1.2, lower_is_better=True),
    "R15": Goal("work of a cohort killed half way and resumed / one calm pass", 1.15, 1.05, lower_is_better=True),
    "R16": Goal("steps repeated after a worker is killed / steps between checkpoints", 1.0, 0.6, True),
}


@dataclass(frozen=True)
class Found:
    """What one measurement found."""

    id: str
    """Of GOALS; with a word behind it for a variant, such as `R11 unaligned`."""
    rounds: list[tuple[float, float]]
    """Ours and theirs in each round, in `unit`."""
    unit: str
    detail: str
    """Data and sizes, in a few words."""

    @property
    def goal(self) -> Goal:
        """What it should be."""
        return GOALS[self.id.split()[0]]

    @property
    def ratios(self) -> list[float]:
        """Ours / theirs of each round, sorted."""
        return sorted(ours / theirs for ours, theirs in self.rounds)

    def row(self) -> str:
        """Returns the row of docs/performance.md."""
        median, sides = statistics.median(self.ratios), zip(*self.rounds, strict=True)
        ours, theirs = (f"{statistics.median(side):.4g}" for side in sides)
        spread = f"{self.ratios[0]:.3g} to {self.ratios[-1]:.3g}"
        sign = "at most " if self.goal.lower_is_better else ""
        what = f"{self.goal.what} ({self.detail})"
        sizes = f"{ours} and {theirs} {self.unit}"
        return f"| {self.id} | {what} | {sizes} | {median:.3g} | {spread} | {sign}{self.goal.target} | " + (
            f"{self.goal.verdict(median)} |"
        )


def say(id: str, rounds: Sequence[tuple[float, float]], unit: str, detail: str) -> None:
    """States a ratio: what `Found` has."""
    found = Found(id, list(rounds), unit, detail)
    print(found.row(), file=sys.stderr, flush=True)
    print(FOUND + json.dumps(asdict(found)), flush=True)
