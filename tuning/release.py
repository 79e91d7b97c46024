"""Gives back what a stopped trial's training holds.

Ray Tune stops a trial by ending its process. The training's actors end with it, its placement group does not: Ray
Train's own cleaner asks Ray's dashboard, which a Ray on one machine may not have, and which it does not find where
two of them run.
"""

import time
from typing import Any

import ray
from ray import tune
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup, remove_placement_group

from mclstexp.training.loop import PLACEMENT_GROUP

_PATIENCE_S = 30.0


class ReleaseStopped(tune.Callback):
    """Removes the placement group of each trial that ended, once its process is gone.

    Not before: its training would take the loss of its workers for a fault and start others.
    """

    def __init__(self) -> None:
        self._ended: dict[str, str] = {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial has ended or was stopped."""
        self._remember(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial has failed."""
        self._remember(trial)

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Called many times a second."""
        for name in [name for name in self._ended if not _is_alive(name)]:
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(self._ended.pop(name))))

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
        """All trials have ended."""
        deadline = time.monotonic() + _PATIENCE_S
        while self._ended and time.monotonic() < deadline:
            self.on_step_end(0, trials)
            time.sleep(0.2)

    def _remember(self, trial: Any) -> None:
        held = (trial.last_result or {}).get(PLACEMENT_GROUP)
        if held:
            self._ended[trial.trial_id] = held


def _is_alive(trial: str) -> bool:
    """Tells whether a trial's board is there, which ends with its process."""
    try:
        ray.get_actor(trial)
    except ValueError:
        return False
    return True
