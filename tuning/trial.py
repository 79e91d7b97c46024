"""One trial: a distributed training run that reports its validation score to Ray Tune."""

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
"""Metric: epochs that a trial has behind it."""


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a sweep share; crosses process borders."""

    data: str
    uri: str
    """Where trials keep their records and checkpoints."""
    config: Config
    mlflow_run_id: str
    """The sweep's run, parent of each trial's."""


def run_trial(settings: dict[str, Any], plan: TrialPlan) -> None:
    """Trains under the plan's configuration with some settings changed; goes on where an earlier try was killed.

    Raises:
        UserError: as `trainer.open_run` and `trainer.fit`.
    """
    name = str(tune.get_context().get_trial_id())
    run = open_trial(name, settings, plan)
    if done := _last_scores(run):  # it was killed between its last checkpoint and Ray Tune's record of it
        tune.report(done)
        return
    metrics = tracking.metric_log(run.config.tracking, run.mlflow_run_id)
    try:
        fit(run, metrics.log, [ReportValidation()], board_name=name)
    finally:
        metrics.close()


def _last_scores(run: Run) -> dict[str, Any] | None:
    """Returns what a run that has all its epochs has to report."""
    newest = last_checkpoint(run)
    metrics = newest.metrics if newest else {}
    if VALIDATION_PCC not in metrics or metrics["epoch"] + 1 < run.config.train.epochs:
        return None
    return _said(metrics)


def _said(metrics: dict[str, Any]) -> dict[str, Any]:
    """Returns what Ray Tune is told of a training's report."""
    return {EPOCHS: metrics["epoch"] + 1, **{name: metrics[name] for name in (VALIDATION_PCC, PLACEMENT_GROUP)}}


def tracked_run(name: str, plan: TrialPlan) -> str:
    """Returns the MLflow run of a trial that has begun."""
    text = storage.read(storage.join(plan.uri, name, RECORD))
    return RunRecord.model_validate_json(text).mlflow_run_id


def open_trial(name: str, settings: dict[str, Any], plan: TrialPlan) -> Run:
    """Returns a trial's run, new or as it was left.

    Raises:
        ConfigError: the settings do not go together.
    """

    def start(config: Config, run_name: str) -> str:
        tags = {"mlflow.parentRunId": plan.mlflow_run_id, "protocol": config.split.protocol}
        return tracking.start_run(config, run_name, tags)

    config = override(plan.config, settings, "the search space")
    return open_run(plan.data, plan.uri, name, config, start)


class ReportValidation(TuneReportCallback):
    """Hands a trial's epochs and validation score to Ray Tune, of those reports that hold one."""

    def after_report(
        self, run_context: TrainRunContext, metrics: Sequence[dict[str, Any]], checkpoint: ray.train.Checkpoint | None
    ) -> None:
        """Called by Ray Train with the metrics of every rank."""
        first = metrics[0]
        if VALIDATION_PCC in first:
            super().after_report(run_context, [_said(first)], None)
