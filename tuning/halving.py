"""Early stopping: asynchronous successive halving over epochs (Li et al. 2020, https://arxiv.org/abs/1810.05934)."""

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from mclstexp.config import Config
from tuning.trial import EPOCHS


def halving(config: Config) -> "Halving":
    """Returns the scheduler that a configuration's `tune` section asks for."""
    tuning, epochs = config.tune, config.train.epochs
    return Halving(
        time_attr=EPOCHS,
        max_t=epochs,
        grace_period=min(tuning.grace_epochs, epochs),
        reduction_factor=tuning.reduction,
        stop_last_trials=False,
    )


class Halving(ASHAScheduler):
    """Ray Tune's scheduler, but a trial is judged at a rung's own epoch alone, and never at its last.

    Ray's would judge a trial at whatever epoch it reports first after a rung: in a resumed sweep, where nobody
    knows the rungs that it had passed, trials of epoch 26 would be compared with those of epoch 12. And it would
    stop a trial for the score of its last epoch, before that is logged.
    """

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Tells whether a trial goes on."""
        done = result.get(EPOCHS)
        if done == self._max_t or done not in self.rungs():
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """A trial has ended; its rungs have been recorded as it passed them."""
        self._trial_info.pop(trial.trial_id, None)

    def rungs(self) -> set[int]:
        """Returns the epochs after which trials are compared."""
        return {int(milestone) for bracket in self._brackets for milestone, _ in bracket._rungs}
