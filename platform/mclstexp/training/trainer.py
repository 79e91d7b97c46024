"""Training from the driver's side: check, start or resume a named run, and hand over its last checkpoint.

A run's name is its identity: the same command finds its record and goes on, another configuration under the same
name is refused. Ray Train restarts workers and keeps the checkpoints; the record keeps what they stand on.
"""

import math
from collections.abc import Callable, Sequence

import ray
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from mclstexp import cluster, storage
from mclstexp.data.spots import num_positions
from mclstexp.data.stream import StreamShare
from mclstexp.errors import RunError, UserError
from mclstexp.model.losses import require_loss
from mclstexp.model.retrieval import resolve
from mclstexp.model.towers import build_network, plain_tensors
from mclstexp.progress import Metrics, ProgressBoard, followed
from mclstexp.training.feed import make_feed
from mclstexp.training.run import Run, _uri
from mclstexp.training.validation import VALIDATION_PCC, ValidationSet
from mclstexp.training.worker import TrainPlan, train_worker

GROUP_TIMEOUT_S = 300
GLIBC_MALLOC_ENV = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_ARENA_MAX": "1"}
"""Lets glibc keep freed memory; else each batch's activations are fetched from the system anew.

One arena, since Ray Train calls the worker in a thread, and the arenas of threads hold no block of over 64 MiB.
"""


def fit(
    run: Run,
    log: Callable[[int, Metrics], None],
    callbacks: Sequence[UserCallback] = (),
    board_name: str | None = None,
) -> str:
    """Trains the run to its end and returns the URI of the checkpoint to be its model; finished work is not repeated.

    That is the last one or, with early stopping, the one that scored best on the validation patients.

    Args:
        run: as `open_run` returns it.
        log: told each metric.
        callbacks: Ray Train's, told of each report.
        board_name: name of an actor that lives as long as the caller or the training does.

    Raises:
        UserError: what the workers raised, where a user can mend it.
        RunError: the workers failed more often than train.max_failures allows.
        ModelError: retrieval.k exceeds the training spots.
        ConfigError: train.positives names no loss.
    """
    train = run.config.train
    require_loss(run.config)
    if run.config.model.predictor == "retrieval":
        resolve(run.config.retrieval, sum(run.manifest.section(name).num_spots for name in run.split.train))
    plan = make_plan(run, board_name)
    early_stopping = bool(plan.validation and train.patience)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"plan": plan},
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=train.use_gpu,
            resources_per_worker=cluster.worker_resources(run.config),
            label_selector=cluster.worker_nodes(run.config),  # type: ignore[call-arg]  # typed as the older one
        ),
        torch_config=TorchConfig(backend="nccl" if train.use_gpu else "gloo", timeout_s=GROUP_TIMEOUT_S),
        run_config=RunConfig(  # type: ignore[call-arg]  # typed as the older one
            name=run.name,
            storage_path=storage.filesystem(run.out)[1],
            storage_filesystem=storage.filesystem(run.out)[0],
            checkpoint_config=CheckpointConfig(
                num_to_keep=train.keep_checkpoints,
                checkpoint_score_attribute=VALIDATION_PCC if early_stopping else None,
            ),
            failure_config=FailureConfig(max_failures=train.max_failures),
            callbacks=list(callbacks),  # type: ignore[arg-type]  # the same
            worker_runtime_env={"env_vars": GLIBC_MALLOC_ENV},
        ),
    )
    with followed(plan.board, train.epochs * plan.feed.num_steps(), log):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _cause(error, train.max_failures) from error
    if result.checkpoint is None:
        raise RunError(f"the run {run.name} ended without a checkpoint; see its log")
    return _uri(run, _best(result) if early_stopping else result.checkpoint)


def _best(result: ray.train.Result) -> ray.train.Checkpoint:
    """Returns the checkpoint that scored best on the validation patients, and says which it is."""
    kept = result.best_checkpoints or []
    scored = [(found, metrics) for found, metrics in kept if math.isfinite(metrics.get(VALIDATION_PCC, math.nan))]
    best, metrics = max(scored, key=lambda one: one[1][VALIDATION_PCC])
    epoch, score = metrics["epoch"] + 1, metrics[VALIDATION_PCC]
    print(f"the model is the checkpoint after epoch {epoch}, best on the validation patients (PCC {score:.3f})")
    return best


def make_plan(run: Run, board_name: str | None = None) -> TrainPlan:
    """Returns what the workers need, with each rank's share of the cluster for its stream."""
    config = run.config
    store_bytes = int(ray.cluster_resources().get("object_store_memory", 0) / (2 * config.train.num_workers))
    return TrainPlan(
        config=config.model_dump(mode="json"),
        feed=make_feed(config, run.reader, run.split.train),
        share=StreamShare(config.cluster.data_cpus, store_bytes, config.cluster.data_pool),
        num_genes=len(run.panel.gene_id),
        num_positions=num_positions(run.reader),
        tile_size_px=run.manifest.tile_size_px,
        initial_weights=ray.put(initial_weights(run)),
        board=ProgressBoard.options(name=board_name).remote(),  # type: ignore[attr-defined]
        validation=_validation(run),
    )


def _validation(run: Run) -> ValidationSet | None:
    if not (run.config.train.validate_every and run.split.validation):
        return None
    return ValidationSet(run.reader, run.split.train, run.split.validation)


def initial_weights(run: Run) -> dict[str, torch.Tensor]:
    """Returns the state dict of the network before the first step, fixed by train.seed and model.image_weights.

    Raises:
        ModelError, ConfigError: the image encoder's weights cannot be had or do not fit it.
    """
    torch.manual_seed(run.config.train.seed)
    positions = num_positions(run.reader)
    network = build_network(run.config.model, len(run.panel), positions, run.manifest.tile_size_px)
    return plain_tensors(network.state_dict())


def _cause(error: ray.train.TrainingFailedError, max_failures: int) -> UserError:
    for failure in getattr(error, "worker_failures", {}).values():
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, UserError):
            return cause
    return RunError(f"training failed after {max_failures} restarts (train.max_failures): {error}")
