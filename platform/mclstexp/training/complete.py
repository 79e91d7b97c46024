"""A run from its plan to its model version."""

from collections.abc import Sequence

from ray.data import ExecutionResources

from mclstexp import cluster
from mclstexp.config import Config
from mclstexp.data.schema import Manifest
from mclstexp.model.left_out import planned_folds
from mclstexp.model.version import ModelVersion
from mclstexp.progress import Log, Show, hidden
from mclstexp.training.finish import finish, is_finished, load_model
from mclstexp.training.run import Run, planned, steps_per_epoch
from mclstexp.training.stored import with_features
from mclstexp.training.trainer import fit


def training_plan(config: Config, manifest: Manifest, train: Sequence[str]) -> str:
    """Returns in words what will be trained how often on some sections."""
    planned_config = planned(config, manifest, train)
    epochs, steps = planned_config.train.epochs, steps_per_epoch(config, manifest, train)
    if not epochs:
        return "nothing is trained: programs are fitted in closed form"
    what = f"{epochs} epochs of {steps} optimiser steps, {epochs * steps} in all"
    if config.model.predictor != "programs":
        return f"training: {what}"
    patients = {manifest.section(name).patient_id for name in train}
    kind, num_folds = planned_folds(len(patients), len(train), config.train.cross_fit)
    return (
        f"training of towers: {what}, {1 + num_folds} times: on all training spots, and without {num_folds} parts of "
        f"their {kind} in turn, to fit the towers' share; then programs are fitted in closed form"
    )


def train_to_end(run: Run, log: Log, show: Show = hidden, limits: ExecutionResources | None = None) -> ModelVersion:
    """Returns the run's model version, after training and finishing what is left to do (see `train_and_finish`)."""
    train_and_finish(run, log, show, limits)
    return load_model(run)


def train_and_finish(run: Run, log: Log, show: Show = hidden, limits: ExecutionResources | None = None) -> None:
    """Trains the run and publishes its model version, as far as that is left to do.

    Args:
        run: as `open_run` returns it.
        log: called with the metrics of training.
        show: called with the progress.
        limits: what finishing may use of the cluster, if other runs go on beside it.

    Raises:
        UserError: as `fit`.
    """
    if not is_finished(run):
        with cluster.ordered(limits):
            run = with_features(run, show)
        checkpoint = fit(run, log, show) if run.config.train.epochs else None
        with cluster.ordered(limits):
            finish(run, checkpoint, show)
