"""Predicts a cohort calmly, then again while its processes are killed at random, and compares what came out.

    python benchmarks/chaos.py --slides 50 --kills 12 --seed 0 [--s3]

Slides are synthetic, from a few tiles to thousands, some truncated, blank or without resolution. Readers, embedders,
any of Ray's workers, the raylet and the job itself are killed; a job that died is started again with the same command.
With --s3 slides, model and outputs are on an S3 server on this machine, which is killed and started again too. Ends
with an error unless every slide has the expected state, every published file is equal to the byte and staging is
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
from chaos_run import KINDS, STORE, ChaosError, Kills, Outcome, run_calmly, run_under_kills  # noqa: E402
from chaos_store import Store, on_disk, on_s3  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from mclstexp import storage  # noqa: E402

MIN_SLIDES = 8
STATES = ("done", "empty", "quarantined", "failed")
WHEN = "finished"
"""The ledger's only field that holds a time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=50, help=f"slides, at least {MIN_SLIDES}")
    parser.add_argument("--kills", type=int, default=12, help="processes that are killed, of each kind in turn")
    parser.add_argument("--seed", type=int, default=0, help="of slides, model, kills and their times")
    parser.add_argument("--s3", action="store_true", help="slides, model and outputs on an S3 server")
    parser.add_argument("--out", help="new folder for inputs, outputs and logs [a temporary one]")
    arguments = parser.parse_args()
    if arguments.slides < MIN_SLIDES:
        parser.error(f"--slides {arguments.slides} holds no slide of each kind; give at least {MIN_SLIDES}")
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        folder = Path(arguments.out or scratch).absolute()
        try:
            folder.mkdir(parents=True, exist_ok=not arguments.out)
            with on_disk(folder) if not arguments.s3 else on_s3(folder) as store:
                compare(folder, store, arguments.slides, arguments.kills, arguments.seed)
        except (ChaosError, FileExistsError) as error:
            sys.exit(f"error: {error}")


def compare(folder: Path, store: Store, num_slides: int, num_kills: int, seed: int) -> None:
    """Makes slides and a model, runs calmly and under kills, checks the results and prints them."""
    expected = make_slides(folder, num_slides, seed)
    make_model(folder / "model", seed)
    store.copy(folder, ("slides", "model"))
    calm, killed = storage.join(store.root, "calm"), storage.join(store.root, "killed")
    print(f"{num_slides} slides in {store.root}; a calm run", flush=True)
    calmly = run_calmly(job_command(folder, store.root, calm), folder / "calm.log")
    require_ledger(calm, expected)
    print(f"{calmly.seconds:.0f} s; the same under {num_kills} kills", flush=True)
    rng = np.random.default_rng(seed)
    every = (*KINDS, STORE) if store.restart else KINDS
    kinds = tuple(str(kind) for _ in range(0, num_kills, len(every)) for kind in rng.permutation(every))[:num_kills]
    kills = Kills(kinds, calmly.seconds / max(1, num_kills), rng, store.restart)
    command = job_command(folder, store.root, killed)
    hit = run_under_kills(command, folder / "killed.log", kills, lambda: settled(killed) == set(expected))
    require_ledger(killed, expected)
    num_files = require_same(calm, killed)
    _print(calmly, hit, killed, num_files)


def require_ledger(out: str, expected: dict[str, Expected]) -> None:
    """Checks what became of each slide, and that nothing is left in staging."""
    found = entries(out)
    faults = [f"{name} has no entry" for name in expected.keys() - found.keys()]
    for name, entry in found.items():
        wanted = expected[name]
        if entry["state"] != wanted.state or wanted.reason not in entry["reason"]:
            faults.append(f"{name} is {entry['state']} ({entry['reason']}), expected {wanted.state} {wanted.reason}")
    faults += [f"left in staging: {uri}" for uri in storage.list_files(storage.join(out, "staging"))]
    if faults:
        listed = "\n  ".join(faults)
        raise ChaosError(f"{out} is not as expected:\n  {listed}")


def require_same(calm: str, killed: str) -> int:
    """Checks that two outputs hold the same files, except for times; returns their number."""
    digests, others = _digests(calm), _digests(killed)
    differing = [name for name in sorted(digests.keys() | others.keys()) if digests.get(name) != others.get(name)]
    if differing:
        listed = "\n  ".join(differing)
        raise ChaosError(f"{len(differing)} of {len(digests)} files differ between {calm} and {killed}:\n  {listed}")
    return len(digests)


def job_command(folder: Path, root: str, out: str) -> list[str]:
    """Returns the job over slides and model below a root, on this machine."""
    return [
        *(sys.executable, str(ROOT / "jobs" / "predict.py"), "--model", storage.join(root, "model")),
        *("--samples", storage.join(root, "slides"), "--out", out, "--genes", "GENE03,GENE07"),
        *("--tracking.uri", f"sqlite:///{folder}/mlflow.db"),
        *("--cluster.local_cpus", "5", "--cluster.object_store_mb", "400"),  # two readers and two embedders
    ]


def settled(out: str) -> set[str]:
    """Returns the slides that no further run would take up."""
    return {name for name, entry in entries(out).items() if entry["state"] in STATES and entry["state"] != "failed"}


def entries(out: str) -> dict[str, dict[str, str]]:
    """Returns the ledger's entries by slide."""
    uris = [uri for uri in storage.list_files(storage.join(out, "ledger")) if uri.endswith(".json")]
    return {Path(uri).stem: json.loads(storage.read(uri)) for uri in uris}


def _digests(out: str) -> dict[str, str]:
    """Returns a digest by file, of ledger and summary without times; without locks and leftovers of writers."""
    found = {}
    for uri in storage.list_files(out):
        name = uri.removeprefix(f"{out}/")
        if Path(name).name.startswith(".") or name.endswith(".lock"):
            continue
        data = storage.read(uri)
        if name.startswith("ledger/"):
            data = json.dumps(json.loads(data) | {WHEN: ""}).encode()
        elif name == "summary.csv":
            data = str([row | {WHEN: ""} for row in csv.DictReader(data.decode().splitlines())]).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def _print(calmly: Outcome, hit: Outcome, out: str, num_files: int) -> None:
    states = Counter(entry["state"] for entry in entries(out).values())
    table = Table("", "calm run", "killed run", title="predict under kills")
    for kind in (*KINDS, STORE):
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
