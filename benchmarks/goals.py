"""What `make bench` and `make bench-gpu` aim at, and how one of their measurements states what it found.

Each file `ratios/r*.py` measures one ratio or more in a process of its own, both sides in turn, and calls `say` for
each. Each file `gpu_steps/h*.py` measures figures of one GPU, and calls `state` for each as soon as it has it.
"""

import datetime
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

FOUND, FIGURE, COSTS = "ratio: ", "figure: ", "costs: "
"""Begin the lines that state a ratio, a figure of a GPU, and the largest costs of some work."""


VERDICTS = ("met", "floor met", "**missed**")
"""From best to worst."""


def today() -> str:
    """Returns the date, such as 2026-11-29."""
    return datetime.date.today().isoformat()


@dataclass(frozen=True)
class Goal:
    """What a ratio, ours / theirs, or a figure should be."""

    what: str
    floor: float
    target: float
    lower_is_better: bool = False
    unit: str = ""
    """Of a figure; a ratio has none."""

    def verdict(self, value: float) -> str:
        """Returns which goal a ratio or a figure meets."""
        reached = [value <= goal if self.lower_is_better else value >= goal for goal in (self.target, self.floor)]
        return VERDICTS[reached.index(True) if any(reached) else 2]


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

BESIDE = {"R11 wide view": "wide views read per CPU-second from storage tiles of JPEG: ours / ours over OpenSlide"}
"""Rows without a goal."""

GPU_GOALS = {
    "H1": Goal("tiles embedded per second: DenseNet-121, bf16, 224 px", 12_000, 20_000, unit="tiles/s"),
    "H2": Goal("tiles trained on per second, in memory: the whole step", 3_500, 6_000, unit="tiles/s"),
    "H3": Goal("tiles trained on per second: from a tile table / in memory", 0.90, 0.95),
    "H4": Goal("tiles decoded per second on all cores", 40_000, 60_000, unit="tiles/s"),
    "H5 plain": Goal("largest batch with the exact loss: as it is", 1_536, 1_792, unit="tiles"),
    "H5 memory-efficient": Goal("largest batch with the exact loss: encoder in parts", 3_072, 3_584, unit="tiles"),
    "H5 cached-gradient": Goal("largest batch with the exact loss: micro-batches", 16_384, 32_768, unit="tiles"),
    "H6": Goal("tiles searched per second, exactly, in 1,000,000 keys", 20_000, 60_000, unit="tiles/s"),
    "H7": Goal("tiles searched per second, exactly, in 10,000,000 keys", 2_000, 6_000, unit="tiles/s"),
    "H8": Goal("tiles predicted per second, from slides to files", 4_000, 8_000, unit="tiles/s"),
    "H9": Goal("slides of 10,000 tiles predicted per hour", 1_400, 2_900, unit="slides/h"),
    "H10": Goal("share of the time that the GPU is busy in training", 0.85, 0.92),
    "H11": Goal("time to the first batch of training on a warm cluster", 15, 6, lower_is_better=True, unit="s"),
}
"""Of one H200 with 16 cores."""


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
    date: str = field(default_factory=today)
    """When it was measured."""

    @property
    def goal(self) -> Goal | None:
        """What it should be; None for a row that stands beside others."""
        return None if self.id in BESIDE else GOALS[self.id.split()[0]]

    @property
    def ratios(self) -> list[float]:
        """Ours / theirs of each round, sorted."""
        return sorted(ours / theirs for ours, theirs in self.rounds)

    @property
    def ratio(self) -> float:
        """The median of all rounds."""
        return statistics.median(self.ratios)

    @property
    def verdict(self) -> str:
        """Which goal the ratio meets; nothing without a goal."""
        return self.goal.verdict(self.ratio) if self.goal else ""

    def row(self) -> str:
        """Returns the row of docs/performance.md."""
        goal = self.goal
        ours, theirs = (f"{statistics.median(side):.4g}" for side in zip(*self.rounds, strict=True))
        cells = [
            self.id,
            f"{goal.what if goal else BESIDE[self.id]} ({self.detail})",
            f"{ours} and {theirs} {self.unit}",
            f"{self.ratio:.3g}",
            f"{self.ratios[0]:.3g} to {self.ratios[-1]:.3g}",
            f"{len(self.rounds)}",
            f"{'at most ' * goal.lower_is_better}{goal.target}" if goal else "",
            self.verdict,
            self.date,
        ]
        return f"| {' | '.join(cells)} |"


def say(id: str, rounds: Sequence[tuple[float, float]], unit: str, detail: str) -> None:
    """States a ratio: what `Found` has."""
    found = Found(id, list(rounds), unit, detail)
    print(found.row(), file=sys.stderr, flush=True)
    print(FOUND + json.dumps(asdict(found)), flush=True)


@dataclass(frozen=True)
class Figure:
    """What one measurement on a GPU found."""

    id: str
    """Of GPU_GOALS; with words behind it for a variant, such as `H1 compiled`."""
    values: list[float]
    """Of each round, in the goal's unit; none: it could not be measured."""
    detail: str
    """Data and sizes in a few words, or why there is no value."""
    date: str = field(default_factory=today)
    """When it was measured."""

    @property
    def goal(self) -> Goal:
        """What it should be."""
        return GPU_GOALS.get(self.id) or GPU_GOALS[self.id.split()[0]]

    def row(self) -> str:
        """Returns the row of docs/performance.md."""
        goal, sign = self.goal, "at most " if self.goal.lower_is_better else ""
        target = f"{sign}{_short(goal.target)} {goal.unit}".rstrip()
        if not self.values:
            return f"| {self.id} | {goal.what} | not measured: {self.detail} | | {target} | | {self.date} |"
        value, spread = statistics.median(self.values), f"{_short(min(self.values))} to {_short(max(self.values))}"
        what, median = f"{goal.what} ({self.detail})", f"{_short(value)} {goal.unit}".rstrip()
        return f"| {self.id} | {what} | {median} | {spread} | {target} | {goal.verdict(value)} | {self.date} |"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def state(id: str, values: Sequence[float], detail: str) -> None:
    """States a figure: what `Figure` has."""
    print(FIGURE + json.dumps(asdict(Figure(id, list(values), detail))), flush=True)
