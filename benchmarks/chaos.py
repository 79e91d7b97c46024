"""Predicts a cohort calmly, then again while its processes are killed at random, and compares what came out.

    python benchmarks/chaos.py --slides 50 --kills 12 --seed 0

Slides are synthetic, from a few tiles to thousands, some truncated, blank or without resolution. Readers, embedders,
any of Ray's workers, the raylet and the job itself are killed; a job that died is started again with the same command.
Ends with an error unless every slide came to what it must, every published file is the same to the byte and staging is
empty.
"""

import argparse
import csv
import hashlib
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import numpy as np  # noqa: E402
from chaos_inputs import Expected, make_model, make_slides  # noqa: E402
from chaos_run import KINDS, ChaosError, Kills, Outcome, run_calmly, run_under_kills  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

LEAST_SLIDES = 8
STATES = ("done", "empty", "quarantined", "failed")
WHEN = "finished"
"""The ledger's only field that says when."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=50, help=f"slides, at least {LEAST_SLIDES}")
    parser.add_argument("--kills", type=int, default=12, help="processes that are killed, of each kind in turn")
    parser.add_argument("--seed", type=int, default=0, help="of slides, model, kills and their times")
    parser.add_argument("--out", help="new folder for inputs, outputs and logs [a temporary one]")
    arguments = parser.parse_args()
    if arguments.slides < LEAST_SLIDES:
        parser.error(f"--slides {arguments.slides} holds no slide of each kind; give at least {LEAST_SLIDES}")
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        folder = Path(arguments.out or scratch).absolute()
        try:
            folder.mkdir(parents=True, exist_ok=not arguments.out)
            compare(folder, arguments.slides, arguments.kills, arguments.seed)
        except (ChaosError, FileExistsError) as error:
            sys.exit(f"error: {error}")


def compare(folder: Path, num_slides: int, num_kills: int, seed: int) -> None:
    """Makes slides and a model, runs calmly and under kills, and checks and prints what came of it."""
    expected = make_slides(folder, num_slides, seed)
    make_model(folder / "model", seed)
    calm, killed = folder / "calm", folder / "killed"
    print(f"{num_slides} slides in {folder}; a calm run", flush=True)
    calmly = run_calmly(_command(folder, calm), folder / "calm.log")
    require_ledger(calm, expected)
    print(f"{calmly.seconds:.0f} s; the same under {num_kills} kills", flush=True)
    rng = np.random.default_rng(seed)
    kinds = tuple(kind for _ in range(0, num_kills, len(KINDS)) for kind in rng.permutation(KINDS))[:num_kills]
    kills = Kills(kinds, calmly.seconds / max(1, num_kills), rng)
    hit = run_under_kills(
        _command(folder, killed), folder / "killed.log", kills, lambda: _settled(killed) == set(expected)
    )
    require_ledger(killed, expected)
    num_files = require_same(calm, killed)
    _say(calmly, hit, killed, num_files)


def require_ledger(out: Path, expected: dict[str, Expected]) -> None:
    """Checks what became of each slide, and that nothing of it is left in staging."""
    found = _ledger(out)
    faults = [f"there is no entry of {name}" for name in expected.keys() - found.keys()]
    for name, entry in found.items():
        wanted = expected[name]
        if entry["state"] != wanted.state or wanted.reason not in entry["reason"]:
            faults.append(f"{name} is {entry['state']} ({entry['reason']}), expected {wanted.state} {wanted.reason}")
    faults += [f"left in staging: {path}" for path in (out / "staging").rglob("*")]
    if faults:
        listed = "\n  ".join(faults)
        raise ChaosError(f"{out} is not what it must be:\n  {listed}")


def require_same(calm: Path, killed: Path) -> int:
    """Checks that two outputs hold the same files, but for when slides were done; returns their number."""
    digests, others = _digests(calm), _digests(killed)
    differing = [name for name in sorted(digests.keys() | others.keys()) if digests.get(name) != others.get(name)]
    if differing:
        listed = "\n  ".join(differing)
        raise ChaosError(f"{len(differing)} of {len(digests)} files differ between {calm} and {killed}:\n  {listed}")
    return len(digests)


def _command(folder: Path, out: Path) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "jobs" / "predict.py"), "--model", str(folder / "model")),
        *("--samples", str(folder / "slides"), "--out", str(out), "--genes", "GENE03,GENE07"),
        *("--tracking.uri", f"sqlite:///{folder}/mlflow.db"),
        *("--cluster.local_cpus", "5", "--cluster.object_store_mb", "400"),  # two readers and two embedders
    ]


def _settled(out: Path) -> set[str]:
    return {name for name, entry in _ledger(out).items() if entry["state"] in STATES and entry["state"] != "failed"}


def _ledger(out: Path) -> dict[str, dict[str, str]]:
    return {path.stem: json.loads(path.read_text()) for path in (out / "ledger").glob("*.json")}


def _digests(out: Path) -> dict[str, str]:
    """Returns a digest by file; ledger and summary without when. Locks and what a killed writer left are no results."""
    found = {}
    for path in out.rglob("*"):
        if path.is_dir() or path.name.startswith(".") or path.suffix == ".lock":
            continue
        data = path.read_bytes()
        if path.parent.name == "ledger":
            data = json.dumps(json.loads(data) | {WHEN: ""}).encode()
        elif path.name == "summary.csv":
            data = str([row | {WHEN: ""} for row in csv.DictReader(data.decode().splitlines())]).encode()
        found[str(path.relative_to(out))] = hashlib.sha256(data).hexdigest()
    return found


def _say(calmly: Outcome, hit: Outcome, out: Path, num_files: int) -> None:
    states = Counter(entry["state"] for entry in _ledger(out).values())
    table = Table("", "calm run", "killed run", title="predict under kills")
    for kind in KINDS:
        table.add_row(f"{kind}s killed", "0", str(hit.kills[kind]))
    table.add_row("kills in all", "0", str(hit.kills.total()))
    table.add_row("starts of the job", str(calmly.starts), str(hit.starts))
    table.add_row("of them ended unfinished", str(calmly.unfinished), str(hit.unfinished))
    table.add_row("wall time", f"{calmly.seconds:.0f} s", f"{hit.seconds:.0f} s")
    for state in STATES:
        table.add_row(f"slides {state}", *[str(states[state])] * 2)
    table.add_row("identical files", "", f"{num_files} of {num_files}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
