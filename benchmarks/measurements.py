"""Runs measurements in processes of their own; keeps what they state in benchmarks/results/ and docs/performance.md."""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from goals import today

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGE, RESULTS = ROOT / "docs/performance.md", HERE / "results"


def stated(command: Sequence[str], kinds: Sequence[str], limit_s: float | None = None) -> Iterator[tuple[str, Any]]:
    """Runs a Python script and yields what it states as it comes: the beginning of the line, and the JSON behind it.

    Its other lines are printed.

    Args:
        command: the script and its arguments.
        kinds: beginnings of lines that state something.
        limit_s: seconds after which it is killed with all processes that it started.

    Raises:
        RuntimeError: it failed, or took longer; with its last line.
    """
    paths = [str(path) for path in (HERE, ROOT / "platform", ROOT, ROOT / "jobs")]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "RAY_DEDUP_LOGS": "1", "TQDM_DISABLE": "1"}
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    late = threading.Event()
    timer = threading.Timer(limit_s or threading.TIMEOUT_MAX, _kill, (process, late))
    timer.start()
    assert process.stdout is not None
    last = ""
    try:
        for line in process.stdout:
            kind = next((kind for kind in kinds if line.startswith(kind)), None)
            if kind is not None:
                yield kind, json.loads(line.removeprefix(kind))
                continue
            print(line, end="", file=sys.stderr, flush=True)
            last = line.strip() or last
        code = process.wait()
    finally:
        timer.cancel()
        _kill(process)
    if late.is_set():
        raise RuntimeError(f"it took longer than {limit_s:g} s")
    if code:
        raise RuntimeError(f"it ended with {code}: {last}")


def _kill(process: subprocess.Popen[str], late: threading.Event | None = None) -> None:
    """Kills what is left of a process and of those that it started."""
    if late is not None and process.poll() is None:
        late.set()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def machine() -> dict[str, object]:
    """Returns what the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "bf16": torch.cpu._is_avx512_bf16_supported(),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _gpu() -> str | None:
    """Returns the name of the GPU, from its driver where possible: this process should take none of its memory."""
    if not torch.cuda.is_available():
        return None
    if shutil.which("nvidia-smi") is None:
        return torch.cuda.get_device_name()
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    listed = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    names = [] if listed.returncode else listed.stdout.split("\n")
    return (names and names[0].strip()) or torch.cuda.get_device_name()


def named(about: dict[str, Any]) -> str:
    """Returns a machine and its torch in words."""
    cores = f"{about['cores']} cores of {about['cpu']}"
    place = f"{cores}, no GPU" if about["gpu"] is None else f"one {about['gpu']} and {cores}"
    return f"{place}, torch {about['torch']}"


def results_file(folder: Path, about: dict[str, Any]) -> Path:
    """Returns the file of today's results on a machine with its torch: other versions have files of their own."""
    name = f"{about['gpu'] or ''} {about['cores']} {about['cpu']} torch {about['torch']}".lower()
    return folder / f"{today()}-{re.sub(r'[^a-z0-9]+', '-', name).strip('-')}.json"


def load(path: Path) -> dict[str, Any]:
    """Returns what a file of results has; a new one begins with what the last one of its machine and torch has."""
    dated = f"????-??-??{path.name.removeprefix(today())}"
    files = [path] if path.exists() else sorted(path.parent.glob(dated))
    return json.loads(files[-1].read_text()) if files else {"machine": machine()}


def save(path: Path, results: dict[str, Any]) -> None:
    """Writes a file of results; a process that is killed meanwhile leaves the former one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def write_table(mark: str, text: str) -> None:
    """Replaces what docs/performance.md has between the marks of a table."""
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    PAGE.write_text(pattern.sub(lambda found: found[1] + text + found[2], PAGE.read_text()))


def in_order(ids: Sequence[str]) -> list[str]:
    """Returns ids such as `R11 unaligned` by number, then by name."""
    return sorted(ids, key=lambda name: (int(name.split()[0][1:]), name))


def ids(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Returns what reads ids with commas, such as `R1,R9`, for argparse."""
    names = list(dict.fromkeys(name.split()[0] for name in known))

    def read(text: str) -> list[str]:
        wanted = text.split(",")
        if unknown := [name for name in wanted if name not in names]:
            raise argparse.ArgumentTypeError(f"nothing measures {', '.join(unknown)}; there are {', '.join(names)}")
        return wanted

    return read


def chosen(folder: Path, letter: str, only: Sequence[str]) -> list[Path]:
    """Returns the scripts of a folder that measure some of these ids, such as r02_r03_stream.py."""
    numbers = {int(name.removeprefix(letter)) for name in only}
    found = sorted(folder.glob(f"{letter.lower()}*.py"))
    return [path for path in found if numbers & set(numbers_of(path, letter))]


def numbers_of(script: Path, letter: str) -> list[int]:
    """Returns the numbers of the ids that a script measures, by its name."""
    return [int(number) for number in re.findall(rf"{letter.lower()}(\d+)", script.stem)]
