"""One trial of a sweep: a distributed training run that reports its validation scores to Ray Tune."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray.train
from ray import tune
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.tune.integration.ray_train import TuneReportCallback

from mclstexp import storage, tracking
from mclstexp.config import Config, override
from mclstexp.training.run import RECORD, Run, RunRecord, last_checkpoint, open_run
from mclstexp.training.trainer import fit
from mclstexp.training.validation import VALIDATION_PCC
from mclstexp.training.worker import PLACEMENT_GROUP

EPOCHS = "epochs"
"""Metric: finished epochs of a trial."""


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a sweep share; crosses process borders."""

    data: str
    uri: str
    """Folder of the trials' records and checkpoints."""
    config: Config
    mlflow_run_id: str
    """The sweep's run, parent of each trial's."""


def run_trial(settings: dict[str, Any], plan: TrialPlan) -> None:
    """Trains with the plan's configuration and some settings changed; goes on where an earlier try was killed.

    Raises:
        UserError: as `open_run` and `fit`.
    """
    name = str(tune.get_context().get_trial_id())
    run = open_trial(name, settings, plan)
    if final := _final_report(run):  # it was killed between its last checkpoint and Ray Tune's record of it
        tune.report(final)
        return
    metrics = tracking.metric_log(run.config.tracking, run.mlflow_run_id)
    try:
        fit(run, metrics.log, callbacks=[ReportValidation()], board_name=name)
    finally:
        metrics.close()


def open_trial(name: str, settings: dict[str, Any], plan: TrialPlan) -> Run:
    """Returns a trial's run: a new one, or an earlier one as it was left.

    Raises:
        ConfigError: the settings contradict each other.
    """

    def track(config: Config, run_name: str, recorded: str | None) -> str:
        tags = {"mlflow.parentRunId": plan.mlflow_run_id, "protocol": config.split.protocol}
        return tracking.start_run(config, run_name, tags, recorded)

    config = override(plan.config, settings, "the search space")
    return open_run(plan.data, plan.uri, name, config, track)


def tracked_run(name: str, plan: TrialPlan) -> str:
    """Returns the MLflow run of a trial that has begun."""
    text = storage.read(storage.join(plan.uri, name, RECORD))
    return RunRecord.model_validate_json(text).mlflow_run_id


class ReportValidation(TuneReportCallback):
    """Passes each validation score on to Ray Tune, with the trial's epochs."""

    def after_report(
        self, run_context: TrainRunContext, metrics: Sequence[dict[str, Any]], checkpoint: ray.train.Checkpoint | None
    ) -> None:
        """Called by Ray Train with the metrics of every rank."""
        first = metrics[0]
        if VALIDATION_PCC in first:
            super().after_report(run_context, [_report(first)], None)


def _final_report(run: Run) -> dict[str, Any] | None:
    """Returns the report of a run that has all its epochs; None if it has not."""
    newest = last_checkpoint(run)
    metrics = newest.metrics if newest else {}
    if VALIDATION_PCC not in metrics or metrics["epoch"] + 1 < run.config.train.epochs:
        return None
    return _report(metrics)


def _report(metrics: dict[str, Any]) -> dict[str, Any]:
    """Returns what Ray Tune gets of a training's report."""
    return {EPOCHS: metrics["epoch"] + 1, **{name: metrics[name] for name in (VALIDATION_PCC, PLACEMENT_GROUP)}}
