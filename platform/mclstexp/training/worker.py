"""What each training worker does: build, resume, step, validate, checkpoint.

All ranks take the same decisions from the same state, so that none waits for another that has left the loop. Rank 0
alone writes checkpoints and posts metrics, at the price that the others wait while it does.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import CheckpointConsistencyMode

from mclstexp.config import config_from
from mclstexp.data.spots import Batch
from mclstexp.data.stream import Rows, StreamShare
from mclstexp.model.towers import build_network
from mclstexp.progress import Metrics
from mclstexp.settings import TrainConfig
from mclstexp.training.checkpoint import TrainState, load_checkpoint, save_checkpoint
from mclstexp.training.feed import Feed, open_batches, short_steps
from mclstexp.training.forward import Forward
from mclstexp.training.history import local_checkpoint, newest_checkpoint
from mclstexp.training.memory import micro_batch
from mclstexp.training.share import Share, on_device
from mclstexp.training.step import RankState, check_losses, make_optimizer, train_step
from mclstexp.training.validation import VALIDATION_PCC, ValidationSet, validate

POST_EVERY_S = 0.5
CHECKPOINT_SHARE = 0.05
"""Largest share of its time that a run on stored features gives to checkpoints without a score."""
PLACEMENT_GROUP = "placement_group"
"""Reported beside the metrics: id in hex of what reserves the workers' CPUs and GPUs, for those who stop the workers
from outside."""


@dataclass(frozen=True)
class TrainPlan:
    """All that a worker needs; crosses process borders."""

    config: dict[str, object]
    run_uri: str
    feed: Feed
    share: StreamShare
    num_genes: int
    num_positions: int
    tile_size_px: int
    initial_weights: ray.ObjectRef
    """State dict of the network, made on the driver: other nodes need no file of weights."""
    board: ray.actor.ActorHandle
    validation: ValidationSet | None
    """Sections to score during training; None: no score."""


def train_worker(settings: dict[str, TrainPlan]) -> None:
    """Runs the rest of a training run on one rank; Ray Train calls it on every worker."""
    plan = settings["plan"]
    rank_state = build(plan)
    resume(rank_state, plan.run_uri)
    batches = open_batches(plan.feed, epochs_left(rank_state, plan.feed), rank_state.world_size, plan.share)
    shares = on_device(batches, rank_state.device)
    plan = replace(plan, validation=plan.validation and plan.validation.keeping())
    for epoch in range(rank_state.state.epoch, rank_state.config.train.epochs):
        if is_out_of_patience(rank_state):
            return
        if epoch != rank_state.state.epoch:
            rank_state.state.epoch, rank_state.state.consumed, rank_state.fresh_ids = epoch, [], []
        run_epoch(rank_state, plan, shares)


def build(plan: TrainPlan) -> RankState:
    """Returns the rank's model and optimiser at step 0, and its position in the group."""
    config = config_from(plan.config)
    context = ray.train.get_context()
    torch.manual_seed(config.train.seed)
    device = ray.train.torch.get_device()
    model = build_network(config.model, plan.num_genes, plan.num_positions, plan.tile_size_px)
    model.load_state_dict(ray.get(plan.initial_weights))
    model = model.to(device).to(memory_format=torch.channels_last)
    forward, num_tiles = Forward(model, config), plan.feed.tiles_per_step(context.get_world_size())
    forward.micro_batch = micro_batch(forward, config, num_tiles, plan.tile_size_px, context.get_local_world_size())
    if config.train.compile:
        model.image_tower.compile()
    return RankState(
        config=config,
        model=model,
        parallel=ray.train.torch.prepare_model(forward),
        optimizer=make_optimizer(model, config.train),
        device=device,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        total_steps=config.train.epochs * plan.feed.num_steps(),
        state=TrainState(plan.config),
        micro_batch=forward.micro_batch,
    )


def resume(rank_state: RankState, run_uri: str) -> None:
    """Loads the run's newest sound checkpoint, if there is one; rank 0 chooses it for all."""
    chosen = [newest_checkpoint(run_uri) if rank_state.rank == 0 else None]
    if rank_state.world_size > 1:
        dist.broadcast_object_list(chosen, src=0)
    if chosen[0] is not None:
        with local_checkpoint(chosen[0].uri) as folder:
            rank_state.state = load_checkpoint(folder, rank_state.model, rank_state.optimizer)


def is_out_of_patience(rank_state: RankState) -> bool:
    """Returns whether early stopping ends the training; the same on all ranks, and again after a resume."""
    patience = rank_state.config.train.patience
    return bool(patience) and rank_state.state.num_worse >= patience


def epochs_left(rank_state: RankState, feed: Feed) -> Iterator[Rows]:
    """Returns what the rank loads in the rest of the current epoch, and in each later one."""
    first, consumed = rank_state.state.epoch, tuple(rank_state.state.consumed)
    return (
        feed.rows(epoch, consumed if epoch == first else (), rank_state.rank, rank_state.world_size)
        for epoch in range(first, rank_state.config.train.epochs)
    )


def run_epoch(rank_state: RankState, plan: TrainPlan, batches: Iterator[tuple[Batch, Share]]) -> None:
    """Trains on the rest of the current epoch, with checkpoints on the way and one at its end."""
    state, train = rank_state.state, rank_state.config.train
    steps_left = plan.feed.num_steps(len(state.consumed))
    rank_state.parallel.train()
    short = steps_without_statistics(rank_state, plan.feed)
    meter = Meter(plan.board if rank_state.rank == 0 else None)
    for num_steps, ((batch, share), waited_s) in enumerate(timed(islice(batches, steps_left)), start=1):
        rank_state.model.image_tower.train(num_steps - 1 not in short)
        loss, num_spots = train_step(rank_state, share)
        rank_state.fresh_ids += plan.feed.ids(batch)
        state.step += 1
        meter.count(num_spots, waited_s)

        is_last, scores = num_steps == steps_left, Metrics()
        if is_last and plan.validation and is_validated(state.epoch, train):
            check_losses(rank_state)
            scores = {VALIDATION_PCC: validate(rank_state, plan.validation)}
            state.judge(scores[VALIDATION_PCC])
        is_end = is_last and state.epoch + 1 == train.epochs
        if scores or is_end or ((is_last or num_steps % train.checkpoint_every == 0) and is_due(rank_state)):
            checkpoint(rank_state, loss, scores)
        meter.post(rank_state, loss, scores, is_last)


def steps_without_statistics(rank_state: RankState, feed: Feed) -> set[int]:
    """Returns the steps of the rest of the epoch in which batch norm uses running statistics, counted from 0.

    Those are steps in which a rank has fewer than two tiles. All ranks do the same, so that synchronised statistics
    wait for no rank.
    """
    model = rank_state.config.model
    if model.freeze_encoder or model.batch_norm == "frozen":
        return set()
    return short_steps(feed, rank_state.state.epoch, rank_state.state.consumed, rank_state.world_size)


def is_validated(epoch: int, train: TrainConfig) -> bool:
    """Returns whether the model is scored after an epoch, counted from 0: each `validate_every`-th and the last."""
    return (epoch + 1) % train.validate_every == 0 or epoch + 1 == train.epochs


def is_due(rank_state: RankState) -> bool:
    """Returns whether it is time for a checkpoint; every rank must call it, rank 0 decides.

    An epoch on stored features may take less time than its checkpoint. There a checkpoint follows another one only when
    both have taken at most `CHECKPOINT_SHARE` of the time; a crash costs as little as twenty checkpoints take.
    """
    if not rank_state.config.model.freeze_encoder:
        return True
    due = [time.monotonic() >= rank_state.next_checkpoint]
    if rank_state.world_size > 1:
        dist.broadcast_object_list(due, src=0)
    return due[0]


def checkpoint(rank_state: RankState, loss: torch.Tensor, scores: Metrics) -> None:
    """Stores the state and reports loss and scores; every rank takes part, rank 0 writes.

    All ranks wait until Ray Train's controller has recorded the checkpoint. The controller polls; without the wait a
    crash right after could lose several checkpoints.
    """
    started = time.monotonic()
    check_losses(rank_state)
    rank_state.state.consumed += _all_ids(rank_state)
    group = ray.util.get_current_placement_group()
    state = {"step": rank_state.state.step, "epoch": rank_state.state.epoch}
    # With early stopping Ray orders the checkpoints by their scores, so that each needs one.
    unscored = {VALIDATION_PCC: float("nan")} if rank_state.config.train.patience else {}
    numbers = {"loss": loss.item(), **state, **unscored, **scores, **in_micro_batches(rank_state)}
    metrics = {**numbers, PLACEMENT_GROUP: group.id.hex() if group else ""}
    rank_state.state.metrics = metrics
    if rank_state.rank == 0:
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(folder, rank_state.model, rank_state.optimizer, rank_state.state)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
    else:
        ray.train.report(metrics)
    ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED)
    ended = time.monotonic()
    rank_state.next_checkpoint = ended + (ended - started) / CHECKPOINT_SHARE


def in_micro_batches(rank_state: RankState) -> Metrics:
    """Returns what a run records of how its image tower was run; nothing if it took whole batches."""
    return {"micro_batch": rank_state.micro_batch} if rank_state.micro_batch else {}


def timed(batches: Iterator[tuple[Batch, Share]]) -> Iterator[tuple[tuple[Batch, Share], float]]:
    """Yields each batch with the seconds of waiting for it."""
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started


class Meter:
    """Rank 0's rates since its last post. It counts on the device, and looks only when it posts."""

    def __init__(self, board: ray.actor.ActorHandle | None) -> None:
        self._board = board
        self._spots: int | torch.Tensor = 0
        self._clear()

    def count(self, num_spots: torch.Tensor, waited_s: float) -> None:
        """Adds one step."""
        self._spots = self._spots + num_spots
        self._waited_s += waited_s

    def post(self, rank_state: RankState, loss: torch.Tensor, scores: Metrics, is_last: bool) -> None:
        """Posts loss, scores and rates, at most every `POST_EVERY_S` and at an epoch's last step."""
        elapsed_s = time.perf_counter() - self._since
        if self._board is None or (elapsed_s < POST_EVERY_S and not is_last):
            return
        check_losses(rank_state)
        metrics = {
            "epoch": rank_state.state.epoch,
            "loss": loss.item(),
            "spots_per_s": int(self._spots) / elapsed_s,
            "data_wait_share": self._waited_s / elapsed_s,
            **in_micro_batches(rank_state),
            **scores,
        }
        self._board.post.remote(rank_state.state.step, metrics)
        self._clear()

    def _clear(self) -> None:
        self._spots, self._waited_s, self._since = 0, 0.0, time.perf_counter()


def _all_ids(rank_state: RankState) -> list[str | int]:
    """Returns what all ranks consumed since the last checkpoint."""
    ids, rank_state.fresh_ids = rank_state.fresh_ids, []
    if rank_state.world_size == 1:
        return ids
    gathered: list[list[str | int]] = [[] for _ in range(rank_state.world_size)]
    dist.all_gather_object(gathered, ids)
    return [name for part in gathered for name in part]
