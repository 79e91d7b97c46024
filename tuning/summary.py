"""What a sweep comes to: a table of its trials, the best of them, and its settings as a file for `jobs/train.py`."""

import math
from collections.abc import Sequence

import pandas as pd
import yaml

from mclstexp.config import Config, override
from mclstexp.errors import RunError
from mclstexp.training.validation import VALIDATION_PCC
from tuning.sweep import FINISHED, Trial
from tuning.trial import EPOCHS

TABLE, BEST = "trials.csv", "best.yaml"
_SECTIONS = {"genes", "split", "model", "train", "retrieval"}


def trial_table(trials: Sequence[Trial]) -> pd.DataFrame:
    """Returns a row a trial, best first: trial, state, epochs, validation_pcc, its settings, reason."""
    rows = [
        {"trial": trial.name, "state": trial.state, EPOCHS: trial.epochs, VALIDATION_PCC: trial.score}
        | trial.settings
        | {"reason": trial.reason}
        for trial in trials
    ]
    table = pd.DataFrame(rows, dtype=object).astype({EPOCHS: int, VALIDATION_PCC: float})
    return table.sort_values([VALIDATION_PCC, "trial"], ascending=[False, True], na_position="last", ignore_index=True)


def best_trial(trials: Sequence[Trial]) -> Trial:
    """Returns the trial of the highest last validation score among those that had all their epochs.

    Raises:
        RunError: none had.
    """
    whole = [trial for trial in trials if trial.state == FINISHED and math.isfinite(trial.score)]
    if not whole:
        reasons = "\n  ".join(f"{trial.name}: {trial.state} {trial.reason}" for trial in trials)
        raise RunError(f"no trial of {len(trials)} ended with a score:\n  {reasons}")
    return max(whole, key=lambda trial: (trial.score, trial.name))


def best_config(trial: Trial, config: Config) -> str:
    """Returns a trial's full settings as YAML that `jobs/train.py --config` takes."""
    full = override(config, trial.settings, "the best trial")
    tree = full.model_dump(mode="json", include=_SECTIONS)
    heading = (
        f"# Trial {trial.name}: validation PCC {trial.score:.4f} over the 50 highest genes; patients that chose it "
    )
    return f"{heading}are in split.validation_patients.\n{yaml.safe_dump(tree, sort_keys=False)}"
