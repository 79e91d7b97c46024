"""Measures every ratio of `goals.py` on this machine, and writes what it found where people and tools read it.

    make bench                        all of them, about half an hour on two cores
    make bench ONLY=R1,R9 ROUNDS=3    some of them

Each measurement is a process of its own, `ratios/r*.py`; both sides take turns in it. Nothing else should run meanwhile.
Writes benchmarks/results/DATE-MACHINE.json and the table of docs/performance.md; ratios that are not measured now keep
their rows.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from goals import FOUND, GOALS, Found

HERE = Path(__file__).resolve().parent
PAGE, RESULTS = HERE.parent / "docs/performance.md", HERE / "results"
TABLE = re.compile(r"(<!-- ratios -->\n).*?(<!-- /ratios -->)", re.DOTALL)
HEAD = "| | ours / theirs | medians | ratio | range | target | |\n|---|---|---|---|---|---|---|\n"


def scripts(only: list[str]) -> list[Path]:
    """Returns the scripts that measure the ratios of these ids, such as r02_r03_stream.py."""
    numbers = {int(name.removeprefix("R")) for name in only}
    found = sorted(HERE.glob("ratios/r*.py"))
    return [path for path in found if numbers & {int(number) for number in re.findall(r"r(\d+)", path.stem)}]


def measure(script: Path, rounds: int, data: str | None) -> list[Found]:
    """Runs one script and returns what it states.

    Raises:
        RuntimeError: it failed.
    """
    print(f"{script.stem} ...", flush=True)
    started = time.monotonic()
    command = [sys.executable, str(script), "--rounds", str(rounds), *(["--data", data] if data else [])]
    paths = os.pathsep.join(str(path) for path in (HERE, HERE.parent / "platform", HERE.parent))
    environment = os.environ | {"PYTHONPATH": paths, "RAY_DEDUP_LOGS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}")
    lines = [line for line in done.stdout.splitlines() if line.startswith(FOUND)]
    print(f"{script.stem}: {time.monotonic() - started:.0f} s", flush=True)
    return [Found(**json.loads(line.removeprefix(FOUND))) for line in lines]


def machine() -> dict[str, object]:
    """Returns what the figures depend on."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "bf16": torch.cpu._is_avx512_bf16_supported(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(found: list[Found]) -> Path:
    """Writes the file of results, joined to what it held of other ratios, and the table; returns the file."""
    about, today = machine(), datetime.date.today().isoformat()
    name = re.sub(r"[^a-z0-9]+", "-", f"{about['cores']} {about['cpu']}".lower()).strip("-")
    path = RESULTS / f"{today}-{name}.json"
    earlier = json.loads(path.read_text())["ratios"] if path.exists() else []
    joined = {each["id"]: Found(**each) for each in earlier} | {each.id: each for each in found}
    ordered = [joined[name] for name in sorted(joined, key=lambda name: (int(name.split()[0][1:]), name))]
    RESULTS.mkdir(exist_ok=True)
    path.write_text(
        json.dumps({"date": today, "machine": about, "ratios": [asdict(each) for each in ordered]}, indent=1)
    )
    said = f"{about['cores']} cores of {about['cpu']}, no GPU" if about["gpu"] is None else f"{about['gpu']}"
    rows = "\n".join(each.row() for each in ordered)
    table = (
        f"Measured on {today} on {said}, torch {about['torch']}: `benchmarks/results/{path.name}`.\n\n{HEAD}{rows}\n"
    )
    PAGE.write_text(TABLE.sub(lambda found: found[1] + table + found[2], PAGE.read_text()))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(GOALS), help="ids of ratios, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", default=os.environ.get("MCLSTEXP_DATA"), help="folder of real slides, for R11")
    arguments = parser.parse_args()
    found: list[Found] = []
    for script in scripts(arguments.only.split(",")):
        found += measure(script, arguments.rounds, arguments.data)
        path = write(found)
    met = sum(each.goal.verdict(sorted(each.ratios)[len(each.ratios) // 2]) == "met" for each in found)
    print(f"{met} of {len(found)} ratios meet their target\n{path}\n{PAGE}")


if __name__ == "__main__":
    main()
