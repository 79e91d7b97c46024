"""Random sections, and towers with random statistics, in which no order of operations can hide."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy_reference import Floats, Integers

from mclstexp.model.augment import augment
from mclstexp.model.towers import TwoTowers

GENES, POSITIONS, SIZE_PX = 60, 16, 64
CONSTANT_GENE = 7


@dataclass(frozen=True)
class Section:
    """A fake section as it is measured: tiles uint8 (n, size, size, 3), counts (n, G), array column and row (n, 2)."""

    tiles: np.ndarray
    counts: Floats
    position: Integers


def rough_section(rng: np.random.Generator, num_spots: int) -> Section:
    """Tiles differ in colour and contrast, spots in depth, genes in level; one gene has the same count everywhere."""
    ground = rng.uniform(0.2, 0.8, (num_spots, 1, 1, 3))
    noise = rng.normal(0, 1, (num_spots, SIZE_PX, SIZE_PX, 3)) * rng.uniform(0.02, 0.25, (num_spots, 1, 1, 1))
    depth, level = rng.uniform(0.3, 3, (num_spots, 1)), rng.lognormal(0.5, 1, GENES)
    counts = rng.poisson(depth * level + 0.2).astype(np.float64)
    counts[0] += 1  # no gene is without counts
    counts[:, CONSTANT_GENE] = 3
    tiles = ((ground + noise).clip(0, 1) * 255).round().astype(np.uint8)
    return Section(tiles, counts, rng.integers(0, POSITIONS, (num_spots, 2)))


@torch.no_grad()
def roughen(towers: TwoTowers, tiles: np.ndarray) -> None:
    """Gives batch norms statistics of real features, then moves these and all vectors of weights at random."""
    norms = [module for module in towers.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    towers.image_tower.train()(augment(torch.from_numpy(tiles), "none", torch.Generator()))
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean += 0.3 * torch.randn_like(norm.running_mean) * norm.running_var.sqrt()
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.5, 2)
    for name, parameter in towers.named_parameters():
        if parameter.ndim == 1:
            parameter += 0.3 * torch.randn_like(parameter)
        elif name.startswith(("spot_", "image_head")) and "position" not in name:
            parameter *= 2
