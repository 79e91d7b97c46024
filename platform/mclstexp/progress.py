"""How progress reaches the person at the driver: the library reports to a `Show`, and `bars` shows it.

A training run reports through a tiny actor that rank 0 writes and the driver reads. Workers never print or talk to
MLflow, so that a slow tracking server or terminal cannot hold up training; the price is that a metric of the last half
second before a crash may be lost.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import ray

Metrics = dict[str, float]
Log = Callable[[int, Metrics], None]
"""Takes the metrics of an optimiser step."""
POLL_S = 0.5
_BAR_WIDTH = 20  # characters; leaves room for notes on a terminal of 80
LINE_EVERY_S = 10.0
"""How often a line is printed where no bar can be drawn (a log file, a submitted job)."""


class Show(Protocol):
    """Takes reports of progress."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """Reports that `done` of `total` are done; `what` names the work and its bar, `note` follows the bar."""


def hidden(what: str, done: int, total: int, note: str = "") -> None:
    """A `Show` that shows nothing."""


@contextmanager
def bars() -> Iterator[Show]:
    """Yields a `Show` that draws one bar for each kind of work while the block runs.

    Where no bar can be drawn it prints the notes, at most one every `LINE_EVERY_S`.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    note_column = TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, ratio=1))
    columns = (TextColumn("{task.description}"), BarColumn(_BAR_WIDTH), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), note_column, expand=True) as bar:
        tasks: dict[str, TaskID] = {}
        printed = time.monotonic()

        def show(what: str, done: int, total: int, note: str = "") -> None:
            nonlocal printed
            if what not in tasks:
                tasks[what] = bar.add_task(what, note="")
            bar.update(tasks[what], completed=done, total=total, note=note)
            if note and not bar.console.is_terminal and time.monotonic() - printed > LINE_EVERY_S:
                bar.console.print(f"{what}: {note}", soft_wrap=True, highlight=False)
                printed = time.monotonic()

        yield show


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Keeps the metrics that rank 0 posted since the driver last took them."""

    def __init__(self) -> None:
        self._posted: list[tuple[int, Metrics]] = []

    def post(self, step: int, metrics: Metrics) -> None:
        """Adds the metrics of a step."""
        self._posted.append((step, metrics))

    def take(self) -> list[tuple[int, Metrics]]:
        """Returns the metrics posted since the last call, in order."""
        posted, self._posted = self._posted, []
        return posted


@contextmanager
def followed(board: ray.actor.ActorHandle, total_steps: int, log: Log, show: Show = hidden) -> Iterator[None]:
    """Hands each posted metric to `log` and shows the steps while the block runs."""
    show("training", 0, total_steps, "starting workers")
    stop = threading.Event()
    follower = threading.Thread(target=_follow, args=(board, stop, total_steps, log, show), daemon=True)
    follower.start()
    try:
        yield
    finally:
        stop.set()
        follower.join(timeout=10)


def _follow(board: ray.actor.ActorHandle, stop: threading.Event, total_steps: int, log: Log, show: Show) -> None:
    while True:
        is_last_round = stop.wait(POLL_S)
        posted: list[tuple[int, Metrics]] = ray.get(board.take.remote())
        for step, metrics in posted:
            log(step, metrics)
            show("training", step, total_steps, _line(step, metrics))
        if is_last_round:
            return


def _line(step: int, metrics: Metrics) -> str:
    return (
        f"epoch {metrics['epoch']:.0f}, step {step}, loss {metrics['loss']:.3f}, "
        f"{metrics['spots_per_s']:.0f} spots/s, waiting for data {metrics['data_wait_share']:.0%}"
    )
