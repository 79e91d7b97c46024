"""What a person sees of a sweep while it runs: a bar over its trials and a line for each score."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import tune
from rich.progress import Progress

from mclstexp.training.validation import VALIDATION_PCC
from tuning.trial import EPOCHS

_shown: list[tuple[Progress, Any]] = []  # Ray Tune stores its callbacks, and a bar cannot be stored


@contextmanager
def shown(num_trials: int) -> Iterator[None]:
    """Shows the bar while the block runs."""
    with Progress() as bar:
        _shown.append((bar, bar.add_task("trials", total=num_trials)))
        try:
            yield
        finally:
            _shown.pop()


class ShowTrials(tune.Callback):
    """Tells the bar of a sweep that is `shown`."""

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """A trial has validated."""
        for bar, _task in _shown:
            line = f"trial {trial.trial_id}: epoch {result[EPOCHS]}, validation PCC {result[VALIDATION_PCC]:.4f}"
            bar.console.print(line, soft_wrap=True, highlight=False)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial has ended or was stopped."""
        _advance()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial has failed."""
        for bar, _task in _shown:
            bar.console.print(f"trial {trial.trial_id}: failed", soft_wrap=True, highlight=False)
        _advance()


def _advance() -> None:
    for bar, task in _shown:
        bar.advance(task)
