"""What a job does before it starts: it hides log lines that a user cannot act on, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).parents[1] / "jobs"
CORE = "[2026-11-28 21:34:47,990 E 3034 3034] core_worker.cc:2465: Actor with class name: 'A' and ID: '1' has ..."


def _written(script: str) -> tuple[str, int]:
    """Returns what a script leaves on standard error after it hid Ray's log lines, and its exit code."""
    whole = f"import os, sys; sys.path.insert(0, {str(JOBS)!r}); import _launch; _launch.hide_logs_of_ray()\n{script}"
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, timeout=60, check=False)
    return done.stderr, done.returncode


def test_lines_of_the_core_are_hidden_and_all_others_pass() -> None:
    script = f"os.write(2, {CORE.encode()!r} + b'\\n'); os.write(2, b'plain\\n'); print('python', file=sys.stderr)"
    assert sorted(_written(script)[0].splitlines()) == ["plain", "python"]


def test_the_last_words_of_a_crash_pass() -> None:
    fatal = CORE.replace(" E ", " F ")
    written, code = _written(f"os.write(2, {fatal.encode()!r} + b'\\n'); os.abort()")
    assert written.splitlines() == [fatal]
    assert code < 0
    written, code = _written("raise ValueError('a fault')")
    assert written.rstrip().endswith("ValueError: a fault")
    assert code == 1


def test_an_interrupt_does_not_end_the_filter_first() -> None:
    # A shell's background jobs ignore SIGINT, and what they start inherits that.
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    whole = (
        f"{heeds}\nimport os, sys; sys.path.insert(0, {str(JOBS)!r}); import _launch; _launch.hide_logs_of_ray()\n"
        "os.killpg(os.getpgrp(), signal.SIGINT)"
    )
    started = subprocess.Popen([sys.executable, "-c", whole], stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert started.communicate(timeout=60)[1].rstrip().endswith("KeyboardInterrupt")


@pytest.mark.ray
@pytest.mark.slow
def test_a_local_ray_says_nothing_of_tokens_and_bars() -> None:
    script = (
        "from _launch import connect; from mclstexp.config import Config; from mclstexp.cluster import ordered\n"
        "connect(Config(), 2)\nimport ray\n"
        "with ordered(): data = ray.data.range(4).map_batches(lambda rows: rows, num_cpus=1)\n"
        "print(data.count() and len(data.take_all()))"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    whole = f"import os, sys; sys.path.insert(0, {str(JOBS)!r}); import _launch; _launch.hide_logs_of_ray()\n{script}"
    done = subprocess.run(
        [sys.executable, "-c", whole], capture_output=True, text=True, timeout=240, check=False, env=environment
    )
    assert (done.stdout.strip(), done.stderr) == ("4", "")
