"""The results of a sweep: table, best settings, pictures and score cards, beside its trials and in its MLflow run.

Every trial that did not fail is scored on the validation patients, stopped ones too, so that the table is complete at
the price of a bank for each.
"""

import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import yaml
from rich.console import Console
from rich.table import Table

from mclstexp import storage, tracking
from mclstexp.config import Config, override
from mclstexp.errors import RunError
from mclstexp.evaluation.evaluate import evaluate
from mclstexp.evaluation.save import RECORD, save_card
from mclstexp.model.version import ModelVersion
from mclstexp.progress import Show, hidden
from mclstexp.training.finish import finished_model
from mclstexp.training.run import Run, last_checkpoint
from mclstexp.training.validation import VALIDATION_PCC
from tuning import pictures
from tuning.cross_validation import SCORES
from tuning.sweep import FAILED, FINISHED, STOPPED, Sweep, Trial
from tuning.trial import EPOCHS, open_trial, tracked_run

TABLE, BEST = "trials.csv", "best.yaml"
_BLOCKS = {"genes", "split", "model", "train", "retrieval"}
_STATUS = {FAILED: "FAILED", STOPPED: "KILLED"}
log = logging.getLogger(__name__)


def score_trials(sweep: Sweep, trials: Sequence[Trial], show: Show = hidden) -> None:
    """Scores every trial that did not fail, and ends every trial's MLflow run with the trial's state."""
    what = "scores on the validation patients"
    show(what, 0, len(trials))
    for done, trial in enumerate(trials, start=1):
        try:
            _settle(sweep, trial)
        except Exception as error:  # a fault of one trial costs no other trial, and not the sweep its table
            log.warning("trial %s: no score card (%s)", trial.name, error)
        show(what, done, len(trials))


def publish(sweep: Sweep, trials: Sequence[Trial]) -> Trial:
    """Prints the table, best trial first, writes all files, and returns the best trial.

    Raises:
        RunError: no trial had all its epochs; the table is written, and the sweep's MLflow run is marked as failed.
    """
    config, run_id, table = sweep.plan.config, sweep.plan.mlflow_run_id, trial_table(trials)
    Console(width=120).print(_printed(table))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table.to_csv(folder / TABLE, index=False)
        try:
            best = best_trial(trials)
        except RunError:
            storage.upload_folder(name, sweep.uri, last=TABLE)
            tracking.finish_run(config.tracking, run_id, "FAILED")
            raise
        heading = _heading(sweep, best)
        (folder / BEST).write_text(best_config(best, config))
        pictures.draw_parallel(folder / pictures.PARALLEL, table, sweep.space, heading)
        pictures.draw_temperature_depth(folder / pictures.MAP, table, sweep.space, heading)
        pictures.draw_curves(folder / pictures.CURVES, _curves(sweep, trials), heading)
        storage.upload_folder(name, sweep.uri, last=BEST)
        tracking.log_artifacts(config.tracking, run_id, name, "sweep")
    metrics = tracking.metric_log(config.tracking, run_id)
    metrics.log(0, {f"best/{VALIDATION_PCC}": best.score})
    metrics.close()
    return best


def trial_table(trials: Sequence[Trial]) -> pd.DataFrame:
    """Returns one row per trial, best first: trial, state, epochs, validation_pcc, its settings, reason."""
    rows = [
        {"trial": trial.name, "state": trial.state, EPOCHS: trial.epochs, VALIDATION_PCC: trial.score}
        | trial.settings
        | {"reason": trial.reason}
        for trial in trials
    ]
    table = pd.DataFrame(rows, dtype=object).astype({EPOCHS: int, VALIDATION_PCC: float})
    return table.sort_values([VALIDATION_PCC, "trial"], ascending=[False, True], na_position="last", ignore_index=True)


def best_trial(trials: Sequence[Trial]) -> Trial:
    """Returns the trial with the highest last validation score among those that had all their epochs.

    Raises:
        RunError: no trial had.
    """
    whole = [trial for trial in trials if trial.state == FINISHED and math.isfinite(trial.score)]
    if not whole:
        reasons = "\n  ".join(f"{trial.name}: {trial.state} {trial.reason}" for trial in trials)
        raise RunError(f"no trial of {len(trials)} ended with a score:\n  {reasons}")
    return max(whole, key=lambda trial: (trial.score, trial.name))


def best_config(trial: Trial, config: Config) -> str:
    """Returns a trial's full settings as YAML for `jobs/train.py --config`."""
    full = override(config, trial.settings, "the best trial")
    tree = full.model_dump(mode="json", include=_BLOCKS)
    heading = (
        f"# Trial {trial.name}: validation PCC {trial.score:.4f} over the 50 highest genes; patients that chose it "
    )
    return f"{heading}are in split.validation_patients.\n{yaml.safe_dump(tree, sort_keys=False)}"


def _settle(sweep: Sweep, trial: Trial) -> None:
    run = open_trial(trial.name, trial.settings, sweep.plan)
    if trial.state != FAILED:
        _complete_curve(run, trial)
        if trial.state == FINISHED or run.config.model.predictor != "programs":
            _score_once(run)  # a program model is fitted to towers that are trained without each fold: for whole trials
    tags = {"trial.state": trial.state, "trial.reason": trial.reason}
    tracking.finish_run(run.config.tracking, run.mlflow_run_id, _STATUS.get(trial.state, "FINISHED"), tags)


def _complete_curve(run: Run, trial: Trial) -> None:
    """Adds a trial's last score, in case its process was stopped before it logged the score."""
    config, newest = run.config.tracking, last_checkpoint(run)
    if newest is None or newest.metrics["epoch"] + 1 != trial.epochs:  # it went on, and logged that score
        return
    step = int(newest.metrics["step"])
    if step not in tracking.curves(config, run.mlflow_run_id, (VALIDATION_PCC,))["step"].to_list():
        metrics = tracking.metric_log(config, run.mlflow_run_id)
        metrics.log(step, {VALIDATION_PCC: trial.score})
        metrics.close()


def _score_once(run: Run) -> None:
    """Finishes a run that has a checkpoint and scores it on its validation sections, unless that is done."""
    model = finished_model(run)
    if model is not None and not storage.exists(storage.join(run.uri, SCORES, RECORD)):
        _score(run, model)


def _score(run: Run, model: ModelVersion) -> None:
    card = evaluate(model, run.reader.root, hidden, on_validation=True)
    card = replace(card, training_runs={run.name: run.mlflow_run_id})
    config = run.config.tracking
    metrics = tracking.metric_log(config, run.mlflow_run_id)
    metrics.log(0, {name.replace("test/", "validation/", 1): value for name, value in card.metrics().items()})
    metrics.close()
    with tempfile.TemporaryDirectory() as folder:
        save_card(card, folder)
        tracking.log_artifacts(config, run.mlflow_run_id, folder, "score_card")
        storage.upload_folder(folder, storage.join(run.uri, SCORES), last=RECORD)


def _heading(sweep: Sweep, best: Trial) -> str:
    patients = ", ".join(sweep.plan.config.split.validation_patients)
    return (
        f"{sweep.trials} trials ({sweep.search}), validated on {patients}, which no trial trained on and which chose "
        f"the best: {best.name}, {best.score:.4f}"
    )


def _curves(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, pd.DataFrame]:
    tracked = sweep.plan.config.tracking
    begun = [trial for trial in trials if trial.state != FAILED or trial.epochs]
    runs = {trial.name: tracked_run(trial.name, sweep.plan) for trial in begun}
    return {name: tracking.curves(tracked, run_id, ("loss", VALIDATION_PCC)) for name, run_id in runs.items()}


def _printed(table: pd.DataFrame) -> Table:
    shown = Table(title="trials, best first")
    for name in table.columns:
        shown.add_column(name)
    for row in table.itertuples(index=False):
        shown.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    return shown
