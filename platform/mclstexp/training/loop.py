"""What each training worker does: build, resume, step, checkpoint.

Every rank computes the same full loss over the gathered embeddings (PERFORMANCE notes: the matrix is small, the
image tower dominates), so that loss and gradients equal those of one process on the joined batch.

Shapes: S sentences of the rank's share, L spots of a sentence, G genes, D embedding, N = S * L slots.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import CheckpointConsistencyMode

from mclstexp.config import Config, config_from
from mclstexp.data.stream import Batch, StreamShare, stream
from mclstexp.errors import RunError
from mclstexp.model.losses import contrastive_loss, gather
from mclstexp.model.towers import TwoTowers
from mclstexp.training.augment import augment
from mclstexp.training.checkpoint import TrainState, load_checkpoint, save_checkpoint
from mclstexp.training.feed import Feed
from mclstexp.training.optim import learning_rate_factor, make_optimizer, native_bf16

POST_EVERY_S = 0.5


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
    """State dict of TwoTowers, made on the driver: a weights file need not be on every node."""
    board: ray.actor.ActorHandle


@dataclass
class Trainee:
    """One rank's model and where it stands."""

    config: Config
    model: TwoTowers
    parallel: torch.nn.Module
    """`model`, inside DistributedDataParallel where there are several ranks."""
    optimizer: torch.optim.Optimizer
    device: torch.device
    rank: int
    world_size: int
    total_steps: int
    state: TrainState
    fresh_ids: list[str | int] = field(default_factory=list)
    """Ids that this rank consumed since the last checkpoint."""


def train_worker(settings: dict[str, TrainPlan]) -> None:
    """Runs the rest of a training run on one rank; Ray Train calls it on every worker."""
    plan = settings["plan"]
    trainee = build(plan)
    resume(trainee)
    for epoch in range(trainee.state.epoch, trainee.config.train.epochs):
        if epoch != trainee.state.epoch:
            trainee.state.epoch, trainee.state.consumed = epoch, []
        run_epoch(trainee, plan)


def build(plan: TrainPlan) -> Trainee:
    """Returns the rank's model, optimiser and place in the group, at step 0."""
    config = config_from(plan.config)
    context = ray.train.get_context()
    torch.manual_seed(config.train.seed)
    device = ray.train.torch.get_device()
    settings = config.model.model_copy(update={"image_weights": "random"})
    model = TwoTowers(settings, plan.num_genes, plan.num_positions, plan.tile_size_px)
    model.load_state_dict(ray.get(plan.initial_weights))
    model = model.to(device).to(memory_format=torch.channels_last)
    if config.train.compile:
        model.image_tower.compile()
    return Trainee(
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


def resume(trainee: Trainee) -> None:
    """Goes to the run's newest checkpoint, if there is one."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            trainee.state = load_checkpoint(folder, trainee.model, trainee.optimizer)


def run_epoch(trainee: Trainee, plan: TrainPlan) -> None:
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
        if place == steps_left or place % train.checkpoint_every == 0:
            checkpoint(trainee, loss)
        meter.post(state, loss, last=place == steps_left)


def train_step(trainee: Trainee, batch: Batch) -> tuple[torch.Tensor, int]:
    """Takes one optimiser step; returns the global loss (scalar) and the global number of spots.

    Raises:
        RunError: the loss is not finite.
    """
    train = trainee.config.train
    _set_learning_rate(trainee)
    _seed(trainee)
    mask_SL = torch.as_tensor(batch["mask"], device=trainee.device)
    valid_N = gather(mask_SL.reshape(-1, 1).float()).squeeze(1) > 0
    _choose_statistics(trainee, int(valid_N.view(trainee.world_size, -1).sum(dim=1).min()))
    images, num_images = prepare_images(trainee, batch, mask_SL)
    sentence = _sentence(trainee, batch, mask_SL)
    with autocast(trainee):
        image_features, spot_SLD = trainee.parallel(images, *sentence)
    image_ND = image_features.new_zeros(mask_SL.numel(), image_features.shape[1], dtype=torch.float32)
    image_ND = image_ND.masked_scatter(mask_SL.reshape(-1, 1), image_features[:num_images].float())
    spot_ND = spot_SLD.float().flatten(0, 1)
    if train.batching == "sentences":
        spot_ND = gather(spot_ND)
    loss = contrastive_loss(gather(image_ND), spot_ND, trainee.model.logit_scale, valid_N)
    if not torch.isfinite(loss):
        raise RunError(f"the loss is {loss.item()} at step {trainee.state.step}; lower train.tower_lr or use fp32")
    trainee.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    trainee.optimizer.step()
    trainee.model.bound_logit_scale()
    return loss.detach(), int(valid_N.sum())


def prepare_images(trainee: Trainee, batch: Batch, mask_SL: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Returns the real tiles of a batch, augmented, float (n, 3, size, size), and their number.

    A blank tile stands in where a rank has none; its features are dropped.
    """
    tiles = torch.as_tensor(batch["image"]).flatten(0, 1)[mask_SL.flatten().cpu()].to(trainee.device)
    num_images = len(tiles)
    if not num_images:
        tiles = tiles.new_zeros(1, *tiles.shape[1:])
    generator = torch.Generator(trainee.device).manual_seed(_step_seed(trainee, trainee.rank))
    images = augment(tiles, trainee.config.train.augmentation, generator)
    return images.contiguous(memory_format=torch.channels_last), num_images


def autocast(trainee: Trainee) -> AbstractContextManager[object]:
    """Returns the arithmetic of the towers: bf16 where asked for, or where native with `auto`."""
    precision = trainee.config.train.precision
    enabled = precision == "bf16" or (precision == "auto" and native_bf16(trainee.device))
    return torch.autocast(trainee.device.type, torch.bfloat16, enabled=enabled)


def checkpoint(trainee: Trainee, loss: torch.Tensor) -> None:
    """Stores the state; every rank takes part, rank 0 writes, and none goes on before the controller knows of it.

    Without that wait a crash right after could fall back by several checkpoints, for the controller polls.
    """
    trainee.state.consumed += _all_ids(trainee)
    metrics = {"loss": loss.item(), "step": trainee.state.step, "epoch": trainee.state.epoch}
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

    def post(self, state: TrainState, loss: torch.Tensor, last: bool) -> None:
        """Posts loss and rates, at most every half second and at an epoch's last step."""
        elapsed_s = time.perf_counter() - self._since
        if self._board is None or (elapsed_s < POST_EVERY_S and not last):
            return
        metrics = {
            "epoch": state.epoch,
            "loss": loss.item(),
            "spots_per_s": self._spots / elapsed_s,
            "data_wait_share": self._waited_s / elapsed_s,
        }
        self._board.post.remote(state.step, metrics)
        self._clear()

    def _clear(self) -> None:
        self._spots, self._waited_s, self._since = 0, 0.0, time.perf_counter()


def _choose_statistics(trainee: Trainee, fewest_images: int) -> None:
    """Lets batch norm use running statistics in a step that leaves a rank with no batch to speak of.

    That is an epoch's last step only. All ranks do alike, so that synchronised statistics wait for nobody.
    """
    if trainee.config.model.batch_norm != "frozen":
        trainee.model.image_tower.train(fewest_images > 1)


def _sentence(trainee: Trainee, batch: Batch, mask_SL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (expression, position, mask) of the rank's sentences, or of the one global sentence of random spots."""
    expression, position = (torch.as_tensor(batch[name], device=trainee.device) for name in ("expression", "position"))
    if trainee.config.train.batching == "sentences":
        return expression, position, mask_SL
    parts = (expression.flatten(0, 1), position.flatten(0, 1), mask_SL.reshape(-1, 1).float())
    expression, position, mask = (gather(part)[None] for part in parts)
    return expression, position, mask.squeeze(-1) > 0


def _all_ids(trainee: Trainee) -> list[str | int]:
    ids, trainee.fresh_ids = trainee.fresh_ids, []
    if trainee.world_size == 1:
        return ids
    gathered: list[list[str | int]] = [[] for _ in range(trainee.world_size)]
    dist.all_gather_object(gathered, ids)
    return [name for part in gathered for name in part]


def _set_learning_rate(trainee: Trainee) -> None:
    factor = learning_rate_factor(trainee.state.step, trainee.total_steps, trainee.config.train)
    for group in trainee.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def _seed(trainee: Trainee) -> None:
    """Seeds dropout; ranks that all run the same global sentence must drop the same."""
    alike = trainee.config.train.batching == "random_spots"
    torch.manual_seed(_step_seed(trainee, 0 if alike else trainee.rank))


def _step_seed(trainee: Trainee, rank: int) -> int:
    return hash((trainee.config.train.seed, trainee.state.epoch, trainee.state.step, rank)) % 2**63
