"""The cohort of `chaos.py` on S3, through `ray job submit` on a cluster of two nodes: one dies and is replaced.

    python benchmarks/chaos_submitted.py --out DIR

Predicts all slides calmly on this machine, then by a submitted job, whose second node dies with all its processes once
some slides are done and is followed by another. The job is submitted again until all slides are settled. Ends with an
error unless both ways give the same files.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import psutil  # noqa: E402
from chaos import entries, job_command, require_ledger, require_same, settled  # noqa: E402
from chaos_inputs import make_model, make_slides  # noqa: E402
from chaos_run import ChaosError, run_calmly  # noqa: E402
from chaos_store import free_port, on_s3  # noqa: E402

from mclstexp import storage  # noqa: E402

DONE_BEFORE_THE_KILL = 5
MAX_STARTS = 3
_JOINED_S = 15.0
"""Within which a node is taken to have joined."""
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="new folder with a short path, for sockets")
    arguments = parser.parse_args()
    folder = arguments.out.absolute()
    folder.mkdir(parents=True)
    try:
        with on_s3(folder) as store:
            expected = make_slides(folder, arguments.slides, arguments.seed)
            make_model(folder / "model", arguments.seed)
            store.copy(folder, ("slides", "model"))
            calm, submitted = (storage.join(store.root, name) for name in ("calm", "submitted"))
            calmly = run_calmly(job_command(folder, store.root, calm), folder / "calm.log")
            print(f"{calmly.seconds:.0f} s on this machine", flush=True)
            starts = _predict_on_a_cluster(folder, job_command(folder, store.root, submitted), submitted, set(expected))
            require_ledger(submitted, expected)
            print(f"{starts} submission(s); {require_same(calm, submitted)} files, all the same")
    except ChaosError as error:
        sys.exit(f"error: {error}")


def _predict_on_a_cluster(folder: Path, command: list[str], out: str, slides: set[str]) -> int:
    """Submits the job until all slides are settled, kills a node in the first try, and returns the submissions."""
    port, dashboard = free_port(), free_port()
    head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    job = [*RAY, "job", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--working-dir", str(ROOT)]
    inside = ["python", "jobs/predict.py", *command[2 : command.index("--cluster.local_cpus")]]
    with _node(folder, "head", head), _node(folder, "second", [f"--address=127.0.0.1:{port}"]) as second:
        for start in range(1, MAX_STARTS + 1):
            with open(folder / "submitted.log", "ab") as log:
                running = subprocess.Popen([*job, "--", *inside], stdout=log, stderr=log)
            if start == 1:
                while sum(entry["state"] == "done" for entry in entries(out).values()) < DONE_BEFORE_THE_KILL:
                    if running.poll() is not None:
                        raise ChaosError(f"the job ended before the kill, see {folder}/submitted.log")
                    time.sleep(0.2)
                _kill(second)
                print(f"killed the second node with {len(settled(out))} slides settled", flush=True)
            with _node(folder, f"node{start}", [f"--address=127.0.0.1:{port}"]):
                running.wait(1800)
            if settled(out) == slides:
                return start
    raise ChaosError(f"after {MAX_STARTS} submissions some slides are not settled, see {folder}/submitted.log")


@contextmanager
def _node(folder: Path, name: str, options: list[str]) -> Iterator[psutil.Popen]:
    """A node of three CPUs, killed with all that it runs at the end."""
    options = [*options, "--num-cpus=3", f"--object-store-memory={300 * 2**20}", f"--temp-dir={folder}/{name}"]
    options += [f"--dashboard-agent-listen-port={free_port()}", "--node-ip-address=127.0.0.1"]
    environment = os.environ | {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    with open(folder / f"{name}.log", "w") as log:
        node = psutil.Popen([*RAY, "start", "--block", *options], env=environment, stdout=log, stderr=log)
    try:
        time.sleep(_JOINED_S)
        yield node
    finally:
        _kill(node)


def _kill(node: psutil.Popen) -> None:
    with suppress(psutil.NoSuchProcess):
        family = [*node.children(recursive=True), node]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=30)


if __name__ == "__main__":
    main()
