"""One optimiser step of one rank.

Every rank computes the same full loss over the gathered embeddings (the matrix is small, the image tower dominates),
so that loss and gradients equal those of one process on the joined batch.

Shapes: S sentences of the rank's share, L spots of a sentence, G genes, D embedding, N = S * L slots.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

from mclstexp.config import Config
from mclstexp.data.spots import Batch
from mclstexp.errors import RunError
from mclstexp.model.augment import augment
from mclstexp.model.losses import gather, program_loss, require_loss
from mclstexp.model.towers import Network, uses_bf16
from mclstexp.settings import TrainConfig
from mclstexp.training.checkpoint import TrainState


@dataclass
class RankState:
    """One rank's model and optimiser, its position in the group, and how far the run is."""

    config: Config
    model: Network
    parallel: torch.nn.Module
    """`model`, inside DistributedDataParallel if there are several ranks."""
    optimizer: torch.optim.Optimizer
    device: torch.device
    rank: int
    world_size: int
    total_steps: int
    state: TrainState
    fresh_ids: list[str | int] = field(default_factory=list)
    """Ids that this rank consumed since the last checkpoint of the epoch."""
    next_checkpoint: float = 0.0
    """Time of the monotonic clock from which the next checkpoint is due; only rank 0's counts."""


def train_step(rank_state: RankState, batch: Batch) -> tuple[torch.Tensor, int]:
    """Takes one optimiser step; returns the global loss (scalar) and the global number of spots.

    Raises:
        RunError: the loss is not finite.
    """
    _set_learning_rate(rank_state)
    _seed(rank_state)
    mask_SL = torch.as_tensor(batch["mask"], device=rank_state.device)
    valid_N = gather(mask_SL.reshape(-1, 1).float()).squeeze(1) > 0
    _choose_statistics(rank_state, int(valid_N.view(rank_state.world_size, -1).sum(dim=1).min()))
    images = prepare_images(rank_state, batch, mask_SL)
    loss = _global_loss(rank_state, batch, images, mask_SL, valid_N)
    if not torch.isfinite(loss):
        raise RunError(f"the loss is {loss.item()} at step {rank_state.state.step}; lower train.tower_lr or use fp32")
    rank_state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    rank_state.optimizer.step()
    rank_state.model.bound_logit_scale()
    return loss.detach(), int(valid_N.sum())


def prepare_images(rank_state: RankState, batch: Batch, mask_SL: torch.Tensor) -> torch.Tensor:
    """Returns the real tiles of a batch, augmented, float (n, 3, size, size), or their stored features, float32 (n, F).

    A rank that has none gets a blank one.
    """
    reads_features = "features" in batch
    tiles = torch.as_tensor(batch["features" if reads_features else "image"]).flatten(0, 1)
    tiles = tiles[mask_SL.flatten().cpu()].to(rank_state.device)
    if not len(tiles):
        tiles = tiles.new_zeros(1, *tiles.shape[1:])
    if reads_features:
        return tiles
    generator = torch.Generator(rank_state.device).manual_seed(_step_seed(rank_state, rank_state.rank))
    images = augment(tiles, rank_state.config.train.augmentation, generator)
    return images.contiguous(memory_format=torch.channels_last)


def autocast(rank_state: RankState) -> AbstractContextManager[object]:
    """Returns the arithmetic of the towers, as `train.precision` chooses it for the device."""
    enabled = uses_bf16(rank_state.config.train.precision, rank_state.device)
    return torch.autocast(rank_state.device.type, torch.bfloat16, enabled=enabled)


def make_optimizer(model: Network, config: TrainConfig) -> torch.optim.Optimizer:
    """Returns the optimiser; each group's `initial_lr` is its peak learning rate.

    Towers learn at `tower_lr`, projection heads and the temperature at `head_lr`. With adamw (Loshchilov and Hutter
    2019, https://arxiv.org/abs/1711.05101) vectors and scalars (norms, biases, temperature) are not decayed.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_head = name.startswith(("image_head.", "spot_head.")) or name == "log_scale"
        spared = config.optimizer == "adamw" and parameter.ndim < 2
        key = (config.head_lr if is_head else config.tower_lr, 0.0 if spared else config.weight_decay)
        groups.setdefault(key, []).append(parameter)
    settings = [
        {"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]
    optimizer = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return optimizer(settings, fused=True)


def learning_rate_factor(step: int, total_steps: int, config: TrainConfig) -> float:
    """Returns the share of the peak learning rate at a step (from 0): linear warm-up, then cosine to 0 or constant.

    Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983.
    """
    warmup_steps = round(config.warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _set_learning_rate(rank_state: RankState) -> None:
    factor = learning_rate_factor(rank_state.state.step, rank_state.total_steps, rank_state.config.train)
    for group in rank_state.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def _seed(rank_state: RankState) -> None:
    """Seeds dropout; ranks that all run the same global sentence must drop the same values."""
    is_shared = rank_state.config.train.batching == "random_spots"
    torch.manual_seed(_step_seed(rank_state, 0 if is_shared else rank_state.rank))


def _step_seed(rank_state: RankState, rank: int) -> int:
    return hash((rank_state.config.train.seed, rank_state.state.epoch, rank_state.state.step, rank)) % 2**63


def _choose_statistics(rank_state: RankState, fewest_images: int) -> None:
    """Makes batch norm use running statistics when a rank's batch is too small (fewer than two tiles).

    That happens only in an epoch's last step. All ranks do the same, so that synchronised statistics wait for no rank.
    """
    rank_state.model.image_tower.train(fewest_images > 1)


def _global_loss(
    rank_state: RankState, batch: Batch, images: torch.Tensor, mask_SL: torch.Tensor, valid_N: torch.Tensor
) -> torch.Tensor:
    """Returns the loss over all ranks' spots; the towers run on the rank's own share."""
    train, regresses = rank_state.config.train, rank_state.config.model.predictor == "regression"
    sentence = _sentence(rank_state, batch, mask_SL)
    with autocast(rank_state):
        outputs = (rank_state.parallel(images), sentence[0]) if regresses else rank_state.parallel(images, *sentence)
    image_ND = gather(_in_slots(outputs[0].float(), mask_SL))
    spot_ND = outputs[1].float().flatten(0, 1)
    if train.batching == "sentences":
        spot_ND = gather(spot_ND)
    scale = rank_state.model.logit_scale
    if rank_state.config.model.predictor == "programs":
        scores_NR = gather(torch.as_tensor(batch["scores"], device=rank_state.device).flatten(0, 1))
        sentence_N = torch.arange(len(valid_N), device=rank_state.device) // mask_SL.shape[1]
        return program_loss(image_ND, spot_ND, valid_N, scale, scores_NR, sentence_N)
    return require_loss(rank_state.config)(image_ND, spot_ND, valid_N, scale)


def _sentence(
    rank_state: RankState, batch: Batch, mask_SL: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (expression, position, mask) of the rank's sentences, or of the one global sentence of random spots."""
    expression, position = (
        torch.as_tensor(batch[name], device=rank_state.device) for name in ("expression", "position")
    )
    if rank_state.config.train.batching == "sentences":
        return expression, position, mask_SL
    parts = (expression.flatten(0, 1), position.flatten(0, 1), mask_SL.reshape(-1, 1).float())
    expression, position, mask = (gather(part)[None] for part in parts)
    return expression, position, mask.squeeze(-1) > 0


def _in_slots(features: torch.Tensor, mask_SL: torch.Tensor) -> torch.Tensor:
    """Returns the features of the real tiles, (n, D), in their slots, (S * L, D), with zeros in the empty ones."""
    slots = features.new_zeros(mask_SL.numel(), features.shape[1])
    return slots.masked_scatter(mask_SL.reshape(-1, 1), features[: int(mask_SL.sum())])
