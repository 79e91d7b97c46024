"""One optimiser step of one rank.

Every rank computes the same full loss over the gathered embeddings (the matrix is small, the image tower dominates),
so that loss and gradients equal those of one process on the joined batch.

Nothing here waits for a GPU but `check_losses`.

Shapes: S sentences of the rank's share, L spots of a sentence, n real tiles, D embedding, N slots of all ranks.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from mclstexp.config import Config
from mclstexp.errors import RunError
from mclstexp.model.augment import draw
from mclstexp.model.losses import gather, program_loss, require_loss
from mclstexp.model.towers import Network
from mclstexp.settings import TrainConfig
from mclstexp.training.checkpoint import TrainState
from mclstexp.training.forward import Forward
from mclstexp.training.share import Share

CHECK_EVERY = 10
"""Steps between looks at the losses: each look makes a GPU wait."""


@dataclass
class RankState:
    """One rank's model and optimiser, its position in the group, and how far the run is."""

    config: Config
    model: Network
    parallel: nn.Module
    """`Forward` of `model`, inside DistributedDataParallel if there are several ranks."""
    optimizer: torch.optim.Optimizer
    device: torch.device
    rank: int
    world_size: int
    total_steps: int
    state: TrainState
    micro_batch: int | None = None
    """Tiles that the image tower takes at a time; None: all of the rank's batch."""
    fresh_ids: list[str | int] = field(default_factory=list)
    """Ids that this rank consumed since the last checkpoint of the epoch."""
    next_checkpoint: float = 0.0
    """Time of the monotonic clock from which the next checkpoint is due; only rank 0's counts."""
    unchecked: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    """Newest steps and their losses, which nobody has looked at yet."""


def lone_rank(config: Config, model: Network, total_steps: int) -> RankState:
    """Returns the state of a run's only rank at step 0, on the device of the model."""
    device, state = next(model.parameters()).device, TrainState(config.model_dump(mode="json"))
    size = config.train.micro_batch
    forward, optimizer = Forward(model, config, size), make_optimizer(model, config.train)
    return RankState(config, model, forward, optimizer, device, 0, 1, total_steps, state, size)


def train_step(rank_state: RankState, share: Share) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes one optimiser step; returns the global loss and the global number of spots, scalars on the device.

    Raises:
        RunError: the loss of one of the last `CHECK_EVERY` steps is not finite.
    """
    _set_learning_rate(rank_state)
    _seed(rank_state)
    valid_N = gather(share["mask"].reshape(-1, 1).float()).squeeze(1) > 0
    loss = _global_loss(rank_state, share, valid_N)
    rank_state.unchecked.append((rank_state.state.step, loss.detach()))
    if len(rank_state.unchecked) >= CHECK_EVERY:
        check_losses(rank_state)
    rank_state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    rank_state.optimizer.step()
    rank_state.model.bound_logit_scale()
    return loss.detach(), valid_N.sum()


def check_losses(rank_state: RankState) -> None:
    """Looks at the losses of the newest steps; call it before anything of the model is stored, scored or posted.

    Raises:
        RunError: one is not finite.
    """
    unchecked, rank_state.unchecked = rank_state.unchecked, []
    losses = torch.stack([loss for _, loss in unchecked]).tolist() if unchecked else []
    for (step, _), loss in zip(unchecked, losses, strict=True):
        if not math.isfinite(loss):
            raise RunError(f"the loss is {loss} at step {step}; lower train.tower_lr or use fp32")


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


def _global_loss(rank_state: RankState, share: Share, valid_N: torch.Tensor) -> torch.Tensor:
    """Returns the loss over all ranks' spots; the towers run on the rank's own share."""
    train, mask_SL = rank_state.config.train, share["mask"]
    sentence = _sentence(train, share)
    image_nD, spot_SLD = rank_state.parallel(share["tiles"], _draws(rank_state, share), *sentence)
    image_ND = gather(_in_slots(image_nD.float(), share["slots"], mask_SL.numel()))
    spot_ND = (sentence[0] if spot_SLD is None else spot_SLD).float().flatten(0, 1)
    if train.batching == "sentences":
        spot_ND = gather(spot_ND)
    scale = rank_state.model.logit_scale
    if rank_state.config.model.predictor == "programs":
        scores_NR = gather(share["scores"].flatten(0, 1))
        sentence_N = torch.arange(len(valid_N), device=valid_N.device) // mask_SL.shape[1]
        return program_loss(image_ND, spot_ND, valid_N, scale, scores_NR, sentence_N)
    return require_loss(rank_state.config)(image_ND, spot_ND, valid_N, scale)


def _draws(rank_state: RankState, share: Share) -> list[torch.Tensor]:
    """Returns the random numbers that augment the rank's tiles in this step; none for stored features."""
    if rank_state.config.model.freeze_encoder:
        return []
    generator = torch.Generator(rank_state.device).manual_seed(_step_seed(rank_state, rank_state.rank))
    return draw(rank_state.config.train.augmentation, len(share["tiles"]), generator)


def _sentence(train: TrainConfig, share: Share) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (expression, position, mask) of the rank's sentences, or of the one global sentence of random spots."""
    expression, position, mask_SL = (share[name] for name in ("expression", "position", "mask"))
    if train.batching == "sentences":
        return expression, position, mask_SL
    parts = (expression.flatten(0, 1), position.flatten(0, 1), mask_SL.reshape(-1, 1).float())
    expression, position, mask = (gather(part)[None] for part in parts)
    return expression, position, mask.squeeze(-1) > 0


def _in_slots(image_nD: torch.Tensor, slots: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Returns what the real tiles became, (n, D), in their slots, (num_slots, D), with zeros in the empty ones."""
    empty = image_nD.new_zeros(num_slots, image_nD.shape[1])
    return empty.index_copy(0, slots, image_nD[: len(slots)])
