"""Training from the driver's side: start or resume a run's workers.

Ray Train restarts workers and keeps the checkpoints, the run's record keeps what they depend on: whoever calls `fit`
again goes on from the newest checkpoint.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import ray
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from mclstexp import cluster, storage
from mclstexp.config import config_from
from mclstexp.data.spots import num_positions
from mclstexp.data.stream import StreamShare
from mclstexp.errors import RunError
from mclstexp.model.losses import require_loss
from mclstexp.model.retrieval import resolve
from mclstexp.model.towers import ImageTower, build_network, plain_tensors
from mclstexp.model.training_spots import TrainingSpots
from mclstexp.model.weights import load_weights
from mclstexp.progress import Log, ProgressBoard, Show, followed, hidden
from mclstexp.training.failures import cause_of
from mclstexp.training.feed import Feed, make_feed, tower_feed
from mclstexp.training.fitted_parts import fitted_parts
from mclstexp.training.history import StoredCheckpoint, best_checkpoint, mend_snapshot, newest_checkpoint
from mclstexp.training.run import Run, of_min_steps
from mclstexp.training.stored import with_features
from mclstexp.training.tower_loader import tower_loader
from mclstexp.training.training_sections import training_spots
from mclstexp.training.validation import VALIDATION_PCC, ValidationSet
from mclstexp.training.worker import TrainPlan, train_worker

GROUP_TIMEOUT_S = 300


@dataclass(frozen=True)
class LeftOutFold:
    """A fold of the training spots that towers are trained without."""

    spots: TrainingSpots
    fold: int


def fit(
    run: Run,
    log: Log,
    show: Show = hidden,
    callbacks: Sequence[UserCallback] = (),
    board_name: str | None = None,
    left_out: LeftOutFold | None = None,
) -> str:
    """Trains the run to its end and returns the URI of the checkpoint for its model; finished work is not repeated.

    That is the last checkpoint or, with early stopping, the one that scored best on the validation patients.

    Args:
        run: as `open_run` returns it.
        log: called with the metrics of each step that rank 0 posts.
        show: called with the progress.
        callbacks: callbacks of Ray Train, called at each report.
        board_name: name of an actor that lives as long as the caller or the training does.
        left_out: what the towers of programs do not see; None: they see all training spots.

    Raises:
        UserError: an error of the workers that a user can fix.
        RunError: the workers failed more often than train.max_failures allows, training diverged, or all checkpoints
            are damaged.
        ModelError: retrieval.k exceeds the training spots.
        ConfigError: train.positives names no loss.
    """
    run, train = with_features(run, show), run.config.train
    require_loss(run.config)
    if run.config.model.predictor == "retrieval":
        resolve(run.config.retrieval, run.manifest.num_spots(run.split.train))
    plan = make_plan(run, board_name, left_out)
    early_stopping = bool(plan.validation and train.patience)
    mend_snapshot(run.uri, by_score=early_stopping)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"plan": plan},
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=train.use_gpu,
            resources_per_worker=cluster.worker_resources(run.config),
            label_selector=cluster.worker_nodes(run.config),  # type: ignore[call-arg]  # Ray's stubs describe Train v1
        ),
        torch_config=TorchConfig(backend="nccl" if train.use_gpu else "gloo", timeout_s=GROUP_TIMEOUT_S),
        run_config=RunConfig(  # type: ignore[call-arg]  # the same
            name=run.name,
            storage_path=storage.filesystem(run.out)[1],
            storage_filesystem=storage.filesystem(run.out)[0],
            checkpoint_config=CheckpointConfig(
                num_to_keep=train.keep_checkpoints,
                checkpoint_score_attribute=VALIDATION_PCC if early_stopping else None,
            ),
            failure_config=FailureConfig(max_failures=train.max_failures),
            callbacks=list(callbacks),  # type: ignore[arg-type]  # the same
            worker_runtime_env=cluster.KEEPING_MEMORY,
        ),
    )
    with followed(plan.board, config_from(plan.config).train.epochs * plan.feed.num_steps(), log, show):
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise cause_of(error, run.config) from error
    return _best(run, says=left_out is None) if early_stopping else _known(run, newest_checkpoint(run.uri)).uri


def make_plan(run: Run, board_name: str | None = None, left_out: LeftOutFold | None = None) -> TrainPlan:
    """Returns what the workers need, with each rank's share of the cluster for its stream."""
    spots, towers = None, None
    if run.config.model.predictor == "programs":
        spots = left_out.spots if left_out else training_spots(run.reader, run.split.train, run.config.train)
        towers = tower_loader(run.config, run.reader, spots, left_out.fold if left_out else None)
        feed: Feed = tower_feed(run.config, towers)
    else:
        feed = make_feed(run.config, run.reader, run.split.train)
    config = of_min_steps(run.config, feed.num_steps())  # a fold has fewer sentences than the whole
    store_bytes = int(ray.cluster_resources().get("object_store_memory", 0) / (2 * config.train.num_workers))
    validates = config.train.validate_every and run.split.validation
    return TrainPlan(
        config=config.model_dump(mode="json"),
        run_uri=run.uri,
        feed=feed,
        share=StreamShare(config.cluster.data_cpus, store_bytes, config.cluster.data_pool),
        num_genes=len(run.panel.gene_id),
        num_positions=num_positions(run.reader),
        tile_size_px=run.manifest.tile_size_px,
        initial_weights=ray.put(initial_weights(run, spots)),
        board=ProgressBoard.options(name=board_name).remote(),  # type: ignore[attr-defined]
        validation=ValidationSet(run.reader, run.split.train, run.split.validation, towers) if validates else None,
    )


def initial_weights(run: Run, spots: TrainingSpots | None = None) -> dict[str, torch.Tensor]:
    """Returns the state dict of the network before the first step, fixed by train.seed and model.image_weights.

    Args:
        run: the run.
        spots: its training sections, if they were read before.

    Raises:
        ModelError, ConfigError: the image encoder's weights cannot be read or do not fit it.
    """
    torch.manual_seed(run.config.train.seed)
    positions = num_positions(run.reader)
    network = build_network(run.config.model, len(run.panel), positions, run.manifest.tile_size_px)
    if isinstance(network.image_tower, ImageTower):
        load_weights(network.image_tower.encoder, run.config.model)
    return plain_tensors(network.state_dict()) | fitted_parts(run.config, run.reader, run.split.train, spots)


def _best(run: Run, says: bool) -> str:
    """Returns the checkpoint that scored best on the validation patients, and perhaps prints which it is."""
    best = _known(run, best_checkpoint(run.uri))
    epoch, score = best.metrics["epoch"] + 1, best.metrics.get(VALIDATION_PCC, math.nan)
    if says:
        print(f"the model is the checkpoint after epoch {epoch}, best on the validation patients (PCC {score:.3f})")
    return best.uri


def _known(run: Run, checkpoint: StoredCheckpoint | None) -> StoredCheckpoint:
    if checkpoint is None:
        raise RunError(f"the run {run.name} ended without a checkpoint; see its log")
    return checkpoint
