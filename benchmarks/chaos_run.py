"""One command that is run again until it is done, while processes of its own are killed at random times.

Only descendants of the driver that was started here are ever killed: other Rays of the machine are left alone.
"""

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

KINDS = ("reader", "embedder", "worker", "raylet", "driver")
"""What is killed: an actor of either step, any of Ray's workers, the node's own process, the job itself."""
STORE = "store"
"""The S3 server, where there is one: killed and started again."""
FATAL = ("raylet", "driver")
"""After these the job must be started again."""
_WORDS = {"reader": "(Read)", "embedder": "(Answer)", "worker": "ray::"}
_MIN_PAUSE_S = 1.0
_POLL_S = 0.2
_GONE_S = 300.0
"""Time limit for a job without its raylet to end, and then for everything that it had started."""
_STUCK_S = 1800.0
"""Time limit for one start of the job."""


class ChaosError(Exception):
    """Something happened under faults that must not happen."""


@dataclass(frozen=True)
class Kills:
    """What is killed, one after the other."""

    kinds: tuple[str, ...]
    longest_pause_s: float
    """Longest pause between two kills, while slides are read."""
    rng: np.random.Generator
    restart_store: Callable[[], None] | None = None


@dataclass
class Outcome:
    """How a command ended."""

    starts: int = 0
    unfinished: int = 0
    """Starts that ended by themselves before all slides were settled."""
    kills: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


def run_calmly(command: list[str], log: Path) -> Outcome:
    """Runs a command to its end once."""
    return run_under_kills(command, log, Kills((), 0.0, np.random.default_rng()), lambda: True)


def run_under_kills(command: list[str], log: Path, kills: Kills, is_done: Callable[[], bool]) -> Outcome:
    """Runs a command until it has ended by itself and `is_done`, and meanwhile kills processes of its own.

    Raises:
        ChaosError: it hung, left processes behind, needed too many starts, or was over before all kills.
    """
    outcome, left, started = Outcome(), list(kills.kinds), time.monotonic()
    most = 3 + len(left)
    while True:
        outcome.starts += 1
        if outcome.starts > most:
            raise ChaosError(f"after {most} starts some slides are not settled; the end of {log}:\n{_tail(log)}")
        with _Job(command, log) as job:
            ended_itself = _kill_while_running(job, left, kills, outcome)
        if ended_itself and is_done():
            break
        outcome.unfinished += ended_itself
    outcome.seconds = time.monotonic() - started
    if left:
        raise ChaosError(f"the run was over before these kills: {', '.join(left)}; give more --slides or fewer --kills")
    return outcome


def _kill_while_running(job: "_Job", left: list[str], kills: Kills, outcome: Outcome) -> bool:
    """Kills one process after another in the order of `left`; returns whether the job ended by itself."""
    while job.wait_until(job.has_begun) and left:
        due = time.monotonic() + kills.rng.uniform(_MIN_PAUSE_S, max(_MIN_PAUSE_S, kills.longest_pause_s))
        if not job.wait_until(lambda: time.monotonic() > due and _kill_one(job, left[0], kills)):  # noqa: B023
            return True
        kind = left.pop(0)
        outcome.kills[kind] += 1
        print(f"  start {outcome.starts}: killed the {kind}", flush=True)
        if kind in FATAL:
            return False
    job.wait_until(lambda: False)
    return True


def _kill_one(job: "_Job", kind: str, kills: Kills) -> bool:
    """Kills a process of a kind; returns whether there was one."""
    if kind != STORE or kills.restart_store is None:
        return job.kill_one(kind, kills.rng)
    kills.restart_store()
    return True


class _Job:
    """One start of the command; at the end of the block it and all that it started are gone, or it is a fault."""

    def __init__(self, command: list[str], log: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self._log = log
        with open(log, "ab") as file:
            self._driver = psutil.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        self._started = time.monotonic()
        self._family: dict[int, psutil.Process] = {}
        self._has_begun = False

    def __enter__(self) -> "_Job":
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            for process in [*self._descendants(), self._driver]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            return
        try:
            self._driver.wait(_GONE_S)
        except psutil.TimeoutExpired:
            self.__exit__(ChaosError)
            raise ChaosError(f"the job lived on for {_GONE_S:.0f} s without its raylet:\n{_tail(self._log)}") from None
        _, alive = psutil.wait_procs(list(self._family.values()), _GONE_S)
        names = [name for process in alive for name in _title(process)]
        if names:
            self.__exit__(ChaosError)
            raise ChaosError(f"{_GONE_S:.0f} s after the job there are still: {', '.join(names)}")

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Waits until a condition holds; returns whether it did before the job ended by itself."""
        while True:
            if time.monotonic() - self._started > _STUCK_S:
                raise ChaosError(f"a start of the job took more than {_STUCK_S:.0f} s:\n{_tail(self._log)}")
            self._descendants()
            if self._driver.poll() is not None:
                return False
            if condition():
                return True
            time.sleep(_POLL_S)

    def has_begun(self) -> bool:
        """Returns whether slides are being read: earlier there is nothing to lose."""
        self._has_begun = self._has_begun or bool(self._targets("reader"))
        return self._has_begun

    def kill_one(self, kind: str, rng: np.random.Generator) -> bool:
        """Kills a random process of a kind; returns whether there was one."""
        targets = self._targets(kind)
        if not targets:
            return False
        with suppress(psutil.NoSuchProcess):
            targets[rng.integers(len(targets))].kill()
            return True
        return False

    def _targets(self, kind: str) -> list[psutil.Process]:
        if kind == "driver":
            return [self._driver]
        if kind == "raylet":
            is_own = {process.pid for process in self._driver.children()}  # a raylet's forks bear its name at first
            return [process for process in self._descendants() if process.pid in is_own and _name(process) == "raylet"]
        found = ((process, title) for process in self._descendants() for title in _title(process))
        return [process for process, title in found if title.startswith("ray::") and _WORDS[kind] in title]

    def _descendants(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            self._family |= {process.pid: process for process in self._driver.children(recursive=True)}
        return [process for process in self._family.values() if process.is_running()]


def _title(process: psutil.Process) -> Iterator[str]:
    """Yields a process's title; nothing where it is gone."""
    with suppress(psutil.Error):
        if process.status() != psutil.STATUS_ZOMBIE:
            yield " ".join(process.cmdline()).strip()


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.name()
    return ""


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]
