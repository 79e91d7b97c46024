"""Measures H1 to H11 of `goals.py` on one GPU, with the tests that need one and the largest costs.

    make bench-gpu                    all of them, at most 7 minutes
    make bench-gpu ONLY=H1,H6         some of them
    make bench-gpu TOY=1              every step on a CPU, in tiny sizes: shows that it runs, and measures nothing

Each step is a process of its own, `gpu_steps/h*.py`, with a time limit; one that fails or is late stops no other. Every
figure is written to benchmarks/results/DATE-MACHINE.json and into docs/performance.md as soon as it is stated, so that
a run that is cut off keeps it; what is not measured now keeps the row, with its date, that this machine gave with the
same torch. A toy run writes only a file of its own. Results that were brought from another machine
are entered by `python benchmarks/gpu.py --enter FILE`.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from goals import COSTS, FIGURE, GPU_GOALS, Figure, today
from measurements import (
    HERE,
    PAGE,
    RESULTS,
    ROOT,
    chosen,
    ids,
    in_order,
    load,
    machine,
    named,
    numbers_of,
    results_file,
    save,
    stated,
    write_table,
)

LIMIT_S, TOTAL_S = 90.0, 420.0
"""Most time of a step, and of all."""
HEAD = "| | figure | median | range | target | | date |\n" + "|---" * 7 + "|\n"
TESTS = ("-m", "pytest", "-m", "gpu", "-q", "-W", "ignore::pytest.PytestConfigWarning", str(ROOT / "tests/test_gpu.py"))
"""Without a plugin that pyproject.toml configures, pytest warns."""


@dataclass(frozen=True)
class Step:
    """A script that states figures."""

    name: str
    command: tuple[str, ...]
    goals: tuple[str, ...] = ()
    """What it measures."""

    @classmethod
    def of(cls, script: Path, options: Sequence[str] = ()) -> Self:
        """Returns the step of a script that is named after its goals."""
        numbers = {f"H{number}" for number in numbers_of(script, "H")}
        goals = tuple(name for name in GPU_GOALS if name.split()[0] in numbers)
        return cls(script.stem, (str(script), *options), goals)


def steps(only: Sequence[str], options: Sequence[str]) -> list[Step]:
    """Returns the steps of some goals, or of all with costs and tests; what takes long to compile comes last."""
    wanted = only or [name.split()[0] for name in GPU_GOALS]
    measuring = [Step.of(script, options) for script in chosen(HERE / "gpu_steps", "H", wanted)]
    compiled = [step for step in measuring if step.name.endswith("_compiled")]
    plain = [step for step in measuring if step not in compiled]
    if only:
        return plain + compiled
    works = [Step(f"costs {work}", (str(HERE / "costs.py"), work, *options)) for work in ("train", "predict")]
    return [*plain, Step("pytest -m gpu", TESTS), *works, *compiled]


class Record:
    """What was measured so far, in a file that is written at once, and on the page if there is one."""

    def __init__(self, path: Path, is_shown: bool) -> None:
        self.path, self._is_shown, self._results = path, is_shown, load(path)

    def figure(self, figure: Figure) -> None:
        """Adds a figure, or replaces an earlier one."""
        self.add("figures", figure.id, vars(figure))
        print(figure.row(), flush=True)

    def add(self, kind: str, name: str, value: Any) -> None:
        """Adds one result of a kind: a figure, the costs of some work, or why a step failed."""
        self._results.setdefault(kind, {})[name] = value
        self._write()

    def begin(self, step: Step) -> None:
        """Forgets an earlier fault of a step."""
        if self._results.get("faults", {}).pop(step.name, None):
            self._write()

    def rows(self) -> str:
        """Returns the table of all figures."""
        return table_of(self._results)

    def fail(self, step: Step, reason: str) -> None:
        """Adds why a step failed, and its goals that have no figure."""
        self.add("faults", step.name, reason)
        for name in step.goals:
            if name not in self._results.get("figures", {}):
                self.figure(Figure(name, [], reason))

    def _write(self) -> None:
        save(self.path, self._results)
        if self._is_shown:
            write_table("gpu", page_of(self._results, self.path.name))


def run_steps(planned: Sequence[Step], record: Record, limit_s: float = LIMIT_S, total_s: float = TOTAL_S) -> list[str]:
    """Runs steps one after the other; returns those that failed or were late, with the reason."""
    faults, until = [], time.monotonic() + total_s
    for step in planned:
        record.begin(step)
        started = time.monotonic()
        left_s = min(limit_s, until - started)
        try:
            if left_s <= 0:
                raise RuntimeError(f"no time was left of {total_s:g} s")
            for kind, found in stated(step.command, [FIGURE, COSTS], left_s):
                if kind == FIGURE:
                    record.figure(Figure(**found))
                else:
                    record.add("costs", found["work"], found | {"date": today()})
        except RuntimeError as error:
            faults.append(f"{step.name}: {error}")
            record.fail(step, str(error))
        print(f"{step.name}: {time.monotonic() - started:.0f} s", flush=True)
    return faults


def table_of(results: dict[str, Any]) -> str:
    figures = results.get("figures", {})
    rows = [Figure(**figures[name]).row() for name in in_order(list(figures))]
    return HEAD + "\n".join(rows) + "\n"


def page_of(results: dict[str, Any], file: str) -> str:
    """Returns what docs/performance.md shows."""
    lines = []
    for work, found in results.get("costs", {}).items():
        largest = ", ".join(f"{cost['what']} {cost['share']:.0%}" for cost in found["costs"][:3])
        lines.append(f"- largest costs of {work}, {found['date']}: {largest}")
    for step, reason in results.get("faults", {}).items():
        lines.append(f"- **failed**: {step}: {reason}")
    measured = f"Measured on {named(results['machine'])}: `benchmarks/results/{file}`."
    return "\n".join([measured, "", table_of(results), *lines]).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=ids(GPU_GOALS), default=[], help="ids such as H1,H6; then no costs and no tests")
    parser.add_argument("--toy", action="store_true", help="every step on a CPU, in tiny sizes")
    parser.add_argument("--out", type=Path, help="folder of the file of results; default benchmarks/results")
    parser.add_argument("--enter", type=Path, help="file of results from another machine: writes it into the page")
    arguments = parser.parse_args()
    if arguments.enter:
        results = json.loads(arguments.enter.read_text())
        save(RESULTS / arguments.enter.name, results)
        write_table("gpu", page_of(results, arguments.enter.name))
        return
    about = machine()
    if about["gpu"] is None and not arguments.toy:
        sys.exit("there is no CUDA device; `--toy` runs every step on a CPU, and measures nothing")
    folder = arguments.out or (Path(tempfile.mkdtemp()) if arguments.toy else RESULTS)
    record = Record(results_file(folder, about), is_shown=not arguments.toy)
    faults = run_steps(steps(arguments.only, ["--toy"] if arguments.toy else []), record)
    print("Toy sizes on a CPU, which measure nothing:\n" * arguments.toy + record.rows())
    print(
        "\n".join(
            [*(f"failed: {fault}" for fault in faults), str(record.path), *([] if arguments.toy else [str(PAGE)])]
        )
    )
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
