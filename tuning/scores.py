"""After the trials: each becomes a model version with a score card on the validation patients, beside the floors.

Also those that were stopped early, from their last checkpoint, so that a sweep's table compares all of them. What is
scored is not scored again.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace

from rich.progress import Progress

from mclstexp import storage, tracking
from mclstexp.config import Config
from mclstexp.evaluation.cross_validation import FEATURES, RESULT, SCORES
from mclstexp.evaluation.evaluate import evaluate
from mclstexp.inference.model_version import ModelVersion
from mclstexp.training import finish, trainer
from mclstexp.training.validation import VALIDATION_PCC
from tuning.sweep import FAILED, STOPPED, Sweep, Trial
from tuning.trial import open_trial

_STATUS = {FAILED: "FAILED", STOPPED: "KILLED"}


def score_trials(sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Scores every trial that did not fail, and ends every trial's MLflow run with what became of it."""
    with Progress() as bar:
        task = bar.add_task("scores on the validation patients", total=len(trials))
        for trial in trials:
            try:
                _settle(sweep, trial)
            except Exception as error:  # whatever is wrong with one trial costs no other, nor the sweep its table
                bar.console.print(f"trial {trial.name}: no score card ({error})", soft_wrap=True, highlight=False)
            bar.advance(task)


def _settle(sweep: Sweep, trial: Trial) -> None:
    run = open_trial(trial.name, trial.settings, sweep.plan)
    if trial.state != FAILED:
        _complete_curve(run, trial)
    tags = {"trial.state": trial.state, "trial.reason": trial.reason}
    if trial.state != FAILED:
        score_run(run, storage.join(sweep.uri, FEATURES))
    tracking.finish_run(run.config.tracking, run.mlflow_run_id, _STATUS.get(trial.state, "FINISHED"), tags)


def _complete_curve(run: trainer.Run, trial: Trial) -> None:
    """Adds a trial's last score, which its process may not have lived to log."""
    config, newest = run.config.tracking, trainer.last_checkpoint(run)
    if newest is None or newest.metrics["epoch"] + 1 != trial.epochs:  # it went on, and logged that score
        return
    step = int(newest.metrics["step"])
    if step not in tracking.curves(config, run.mlflow_run_id, (VALIDATION_PCC,))["step"].to_list():
        metrics = tracking.metric_log(config, run.mlflow_run_id)
        metrics.log(step, {VALIDATION_PCC: trial.score})
        metrics.close()


def score_run(run: trainer.Run, feature_cache: str) -> None:
    """Finishes a run that has a checkpoint and scores it on its validation sections."""
    model = finished_model(run)
    if model is not None and not storage.exists(storage.join(run.uri, SCORES, RESULT)):
        _score(run, model, feature_cache)


def finished_model(run: trainer.Run) -> ModelVersion | None:
    """Returns the model version of a run's last checkpoint, made here if need be; None where it has none."""
    if not finish.is_finished(run):
        checkpoint = trainer.last_checkpoint(run)
        if checkpoint is None:
            return None
        finish.finish(run, checkpoint.uri)
    with tempfile.TemporaryDirectory() as scratch:
        return ModelVersion.load(tracking.fetch_model(run.config.tracking, finish.model_uri(run), scratch))


def _score(run: trainer.Run, model: ModelVersion, feature_cache: str) -> None:
    card = evaluate(model, run.reader.root, lambda *_: None, feature_cache=feature_cache, on_validation=True)
    card = replace(card, training_runs={run.name: run.mlflow_run_id})
    config: Config = run.config
    metrics = tracking.metric_log(config.tracking, run.mlflow_run_id)
    metrics.log(0, {name.replace("test/", "validation/", 1): value for name, value in card.metrics().items()})
    metrics.close()
    with tempfile.TemporaryDirectory() as folder:
        card.save(folder)
        tracking.log_artifacts(config.tracking, run.mlflow_run_id, folder, "score_card")
        storage.upload_folder(folder, storage.join(run.uri, SCORES), last=RESULT)
