"""Measures every ratio of `goals.py` on this machine, and writes what it found where people and tools read it.

    make bench                        all of them, about half an hour on two cores
    make bench ONLY=R1,R9 ROUNDS=3    some of them

Each measurement is a process of its own, `ratios/r*.py`; both sides take turns in it. Nothing else should run
meanwhile. Every ratio is written to benchmarks/results/DATE-MACHINE.json and into docs/performance.md as soon as it is
stated; those that are not measured now keep the rows, with their date, that this machine gave with the same torch. A
measurement that fails stops no other.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from goals import FOUND, GOALS, VERDICTS, Found
from measurements import (
    HERE,
    PAGE,
    RESULTS,
    chosen,
    ids,
    in_order,
    load,
    machine,
    named,
    results_file,
    save,
    stated,
    write_table,
)

HEAD = "| | ours / theirs | medians | ratio | range | rounds | target | | date |\n" + "|---" * 9 + "|\n"


def measure(script: Path, rounds: int, data: str | None) -> Iterable[Found]:
    """Runs one script and yields what it states.

    Raises:
        RuntimeError: it failed.
    """
    command = [str(script), "--rounds", str(rounds), *(["--data", data] if data else [])]
    return (Found(**fields) for _, fields in stated(command, [FOUND]))


def write(found: Found, path: Path) -> None:
    """Writes a ratio into a file of results, in place of an earlier one, and the table of all that the file has."""
    results = load(path)
    results.setdefault("ratios", {})[found.id] = asdict(found)
    save(path, results)
    write_table("ratios", page_of(results, path.name))


def page_of(results: dict[str, Any], file: str) -> str:
    """Returns what docs/performance.md shows."""
    ratios = results["ratios"]
    rows = "\n".join(Found(**ratios[name]).row() for name in in_order(list(ratios)))
    return f"Measured on {named(results['machine'])}: `benchmarks/results/{file}`.\n\n{HEAD}{rows}\n"


def summary(found: Iterable[Found]) -> str:
    """Returns how many goals are met; of several rows of a goal the worst counts."""
    worst: dict[str, int] = {}
    for each in found:
        if each.goal is not None:
            name = each.id.split()[0]
            worst[name] = max(worst.get(name, 0), VERDICTS.index(each.verdict))
    counts = [f"{list(worst.values()).count(index)} {verdict.strip('*')}" for index, verdict in enumerate(VERDICTS)]
    return f"{len(worst)} goals: {', '.join(counts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=ids(GOALS), default=list(GOALS), help="ids of ratios, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", default=os.environ.get("MCLSTEXP_DATA"), help="folder of real slides, for R11")
    arguments = parser.parse_args()
    path, found, faults = results_file(RESULTS, machine()), [], []
    for script in chosen(HERE / "ratios", "R", arguments.only):
        print(f"{script.stem} ...", flush=True)
        started = time.monotonic()
        try:
            for each in measure(script, arguments.rounds, arguments.data):
                found.append(each)
                write(each, path)
        except RuntimeError as error:
            faults.append(f"failed: {script.stem}: {error}")
        print(f"{script.stem}: {time.monotonic() - started:.0f} s", flush=True)
    print("\n".join([summary(found), str(path), str(PAGE), *faults]))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
