"""What each training worker does: build, resume, step, checkpoint."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import CheckpointConsistencyMode

from mclstexp.config import config_from
from mclstexp.data.spots import Batch
from mclstexp.data.stream import StreamShare, stream
from mclstexp.model.towers import build_network
from mclstexp.progress import Metrics
from mclstexp.settings import TrainConfig
from mclstexp.training.checkpoint import TrainState, load_checkpoint, save_checkpoint
from mclstexp.training.feed import Feed
from mclstexp.training.step import RankState, make_optimizer, train_step
from mclstexp.training.validation import VALIDATION_PCC, ValidationSet, validate

POST_EVERY_S = 0.5
PLACEMENT_GROUP = "placement_group"
"""Reported beside the metrics: what holds the workers' CPUs and GPUs, in hex, for whoever stops them from outside."""


@dataclass(frozen=True)
class TrainPlan:
    """All that a worker needs; crosses process borders."""

    config: dict[str, object]
    feed: Feed
    share: StreamShare
    num_genes: int
    num_positions: int
    tile_size_px: int
    initial_weights: ray.ObjectRef
    """State dict of the network, made on the driver: a weights file need not be on every node."""
    board: ray.actor.ActorHandle
    validation: ValidationSet | None
    """What is scored on the way; None where nothing is."""


def train_worker(settings: dict[str, TrainPlan]) -> None:
    """Runs the rest of a training run on one rank; Ray Train calls it on every worker."""
    plan = settings["plan"]
    trainee = build(plan)
    resume(trainee)
    for epoch in range(trainee.state.epoch, trainee.config.train.epochs):
        if is_out_of_patience(trainee):
            return
        if epoch != trainee.state.epoch:
            trainee.state.epoch, trainee.state.consumed = epoch, []
        run_epoch(trainee, plan)


def is_out_of_patience(trainee: RankState) -> bool:
    """Tells whether early stopping ends the training: on all ranks alike, and again when it is resumed."""
    patience = trainee.config.train.patience
    return bool(patience) and trainee.state.num_worse >= patience


def build(plan: TrainPlan) -> RankState:
    """Returns the rank's model, optimiser and place in the group, at step 0."""
    config = config_from(plan.config)
    context = ray.train.get_context()
    torch.manual_seed(config.train.seed)
    device = ray.train.torch.get_device()
    settings = config.model.model_copy(update={"image_weights": "random"})
    model = build_network(settings, plan.num_genes, plan.num_positions, plan.tile_size_px)
    model.load_state_dict(ray.get(plan.initial_weights))
    model = model.to(device).to(memory_format=torch.channels_last)
    if config.train.compile:
        model.image_tower.compile()
    return RankState(
        config=config,
        model=model,
        parallel=ray.train.torch.prepare_model(model),
        optimizer=make_optimizer(model, config.train),
        device=device,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        total_steps=config.train.epochs * plan.feed.num_steps(),
        state=TrainState(plan.config),
    )


def resume(trainee: RankState) -> None:
    """Goes to the run's newest checkpoint, if there is one."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            trainee.state = load_checkpoint(folder, trainee.model, trainee.optimizer)


def run_epoch(trainee: RankState, plan: TrainPlan) -> None:
    """Trains on what the current epoch has left, with checkpoints on the way and one at its end."""
    state, train = trainee.state, trainee.config.train
    rows = plan.feed.rows(state.epoch, state.consumed, trainee.rank, trainee.world_size)
    steps_left = plan.feed.num_steps(len(state.consumed))
    trainee.parallel.train()
    meter = Meter(plan.board if trainee.rank == 0 else None)
    batches = stream(rows, plan.feed.loader, plan.feed.rows_per_step(trainee.world_size), plan.share)
    for place, (batch, waited_s) in enumerate(timed(batches), start=1):
        loss, num_spots = train_step(trainee, batch)
        trainee.fresh_ids += plan.feed.ids(batch)
        state.step += 1
        meter.count(num_spots, waited_s)
        last, scores = place == steps_left, Metrics()
        if last and plan.validation and is_validated(state.epoch, train):
            scores = {VALIDATION_PCC: validate(trainee, plan.validation)}
            state.judge(scores[VALIDATION_PCC])
        if last or place % train.checkpoint_every == 0:
            checkpoint(trainee, loss, scores)
        meter.post(state, loss, scores, last)


def is_validated(epoch: int, train: TrainConfig) -> bool:
    """Tells whether the model is scored after an epoch, counted from 0: each `train.validate_every`-th and the last."""
    return (epoch + 1) % train.validate_every == 0 or epoch + 1 == train.epochs


def checkpoint(trainee: RankState, loss: torch.Tensor, scores: Metrics) -> None:
    """Stores the state and reports loss and scores; every rank takes part, rank 0 writes.

    None goes on before the controller knows of it: without that wait a crash right after could fall back by several
    checkpoints, for the controller polls.
    """
    trainee.state.consumed += _all_ids(trainee)
    group = ray.util.get_current_placement_group()
    state = {"step": trainee.state.step, "epoch": trainee.state.epoch}
    unscored = {VALIDATION_PCC: float("nan")} if trainee.config.train.patience else {}  # Ray orders checkpoints by it
    metrics = {"loss": loss.item(), **state, **unscored, **scores, PLACEMENT_GROUP: group.id.hex() if group else ""}
    if trainee.rank == 0:
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(folder, trainee.model, trainee.optimizer, trainee.state)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
    else:
        ray.train.report(metrics)
    ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED)


def timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Yields each batch with the seconds that were spent waiting for it."""
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started


class Meter:
    """Rank 0's rates since its last post."""

    def __init__(self, board: ray.actor.ActorHandle | None) -> None:
        self._board = board
        self._clear()

    def count(self, num_spots: int, waited_s: float) -> None:
        """Adds one step."""
        self._spots += num_spots
        self._waited_s += waited_s

    def post(self, state: TrainState, loss: torch.Tensor, scores: Metrics, last: bool) -> None:
        """Posts loss, scores and rates, at most every half second and at an epoch's last step."""
        elapsed_s = time.perf_counter() - self._since
        if self._board is None or (elapsed_s < POST_EVERY_S and not last):
            return
        metrics = {
            "epoch": state.epoch,
            "loss": loss.item(),
            "spots_per_s": self._spots / elapsed_s,
            "data_wait_share": self._waited_s / elapsed_s,
            **scores,
        }
        self._board.post.remote(state.step, metrics)
        self._clear()

    def _clear(self) -> None:
        self._spots, self._waited_s, self._since = 0, 0.0, time.perf_counter()


def _all_ids(trainee: RankState) -> list[str | int]:
    ids, trainee.fresh_ids = trainee.fresh_ids, []
    if trainee.world_size == 1:
        return ids
    gathered: list[list[str | int]] = [[] for _ in range(trainee.world_size)]
    dist.all_gather_object(gathered, ids)
    return [name for part in gathered for name in part]
