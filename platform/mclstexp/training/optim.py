"""Optimiser, learning-rate schedule and arithmetic of training."""

import math

import torch
from torch import nn

from mclstexp.model.build import Network
from mclstexp.settings import TrainConfig


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


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Tells whether `train.precision` means bf16 on a device."""
    return precision == "bf16" or (precision == "auto" and native_bf16(device))


def native_bf16(device: torch.device) -> bool:
    """Tells whether a device computes bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
