"""Measures every ratio of `goals.py` on this machine, and writes what it found where people and tools read it.

    make bench                        all of them, about half an hour on two cores
    make bench ONLY=R1,R9 ROUNDS=3    some of them

Each measurement is a process of its own, `ratios/r*.py`; both sides take turns in it. Nothing else should run
meanwhile. Writes benchmarks/results/DATE-MACHINE.json and the table of docs/performance.md; ratios that are not
measured now keep their rows.
"""

import argparse
import os
import time
from dataclasses import asdict
from pathlib import Path

from goals import FOUND, GOALS, Found
from measurements import (
    HERE,
    PAGE,
    RESULTS,
    chosen,
    in_order,
    load,
    machine,
    named,
    results_file,
    save,
    stated,
    write_table,
)

HEAD = "| | ours / theirs | medians | ratio | range | target | |\n|---|---|---|---|---|---|---|\n"


def measure(script: Path, rounds: int, data: str | None) -> list[Found]:
    """Runs one script and returns what it states.

    Raises:
        RuntimeError: it failed.
    """
    print(f"{script.stem} ...", flush=True)
    started = time.monotonic()
    command = [str(script), "--rounds", str(rounds), *(["--data", data] if data else [])]
    found = [Found(**fields) for _, fields in stated(command, [FOUND])]
    print(f"{script.stem}: {time.monotonic() - started:.0f} s", flush=True)
    return found


def write(found: list[Found]) -> Path:
    """Writes the file of results, joined to what it held of other ratios, and the table; returns the file."""
    about = machine()
    path = results_file(RESULTS, about)
    results = load(path)
    joined = {each["id"]: Found(**each) for each in results.get("ratios", [])} | {each.id: each for each in found}
    ordered = [joined[name] for name in in_order(list(joined))]
    save(path, results | {"ratios": [asdict(each) for each in ordered]})
    rows = "\n".join(each.row() for each in ordered)
    measured = f"Measured on {results['date']} on {named(about)}, torch {about['torch']}"
    write_table("ratios", f"{measured}: `benchmarks/results/{path.name}`.\n\n{HEAD}{rows}\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(GOALS), help="ids of ratios, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", default=os.environ.get("MCLSTEXP_DATA"), help="folder of real slides, for R11")
    arguments = parser.parse_args()
    found: list[Found] = []
    for script in chosen(HERE / "ratios", "R", arguments.only.split(",")):
        found += measure(script, arguments.rounds, arguments.data)
        path = write(found)
    met = sum(each.goal.verdict(sorted(each.ratios)[len(each.ratios) // 2]) == "met" for each in found)
    print(f"{met} of {len(found)} ratios meet their target\n{path}\n{PAGE}")


if __name__ == "__main__":
    main()
