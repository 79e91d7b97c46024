"""A run from its start to its model version."""

from ray.data import ExecutionResources

from mclstexp import cluster
from mclstexp.model.version import ModelVersion
from mclstexp.progress import Log, Show, hidden
from mclstexp.training.finish import finish, is_finished, load_model
from mclstexp.training.run import Run
from mclstexp.training.stored import with_features
from mclstexp.training.trainer import fit


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
