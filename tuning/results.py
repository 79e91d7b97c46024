"""Writes what a sweep came to: table, best settings and pictures, beside its trials and into its MLflow run."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from mclstexp import storage, tracking
from mclstexp.errors import RunError
from mclstexp.training.validation import VALIDATION_PCC
from tuning import pictures, summary
from tuning.sweep import FAILED, Sweep, Trial
from tuning.trial import tracked_run


def publish(sweep: Sweep, trials: Sequence[Trial]) -> Trial:
    """Prints the table, best trial first, writes all files, and returns the best trial.

    Raises:
        RunError: no trial had all its epochs; the table is written, and the sweep's MLflow run has failed.
    """
    config, run_id, table = sweep.plan.config, sweep.plan.mlflow_run_id, summary.trial_table(trials)
    Console(width=120).print(_printed(table))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table.to_csv(folder / summary.TABLE, index=False)
        try:
            best = summary.best_trial(trials)
        except RunError:
            storage.upload_folder(name, sweep.uri, last=summary.TABLE)
            tracking.finish_run(config.tracking, run_id, "FAILED")
            raise
        heading = _heading(sweep, best)
        (folder / summary.BEST).write_text(summary.best_config(best, config))
        pictures.draw_parallel(folder / pictures.PARALLEL, table, sweep.space, heading)
        pictures.draw_temperature_depth(folder / pictures.MAP, table, sweep.space, heading)
        pictures.draw_curves(folder / pictures.CURVES, _curves(sweep, trials), heading)
        storage.upload_folder(name, sweep.uri, last=summary.BEST)
        tracking.log_artifacts(config.tracking, run_id, name, "sweep")
    metrics = tracking.metric_log(config.tracking, run_id)
    metrics.log(0, {f"best/{VALIDATION_PCC}": best.score})
    metrics.close()
    return best


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
