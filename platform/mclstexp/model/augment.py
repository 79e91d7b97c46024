"""Augmentation of tiles, batched on the training device, with one draw per tile.

It runs beside the network and not on the CPUs that decode: reproducible from a generator, at the price of device time.

Shapes: N tiles; all maps take and return float (N, 3, size, size) in [0, 1].
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache

import torch
import torch.nn.functional as F

# Ruifrok and Johnston 2001: optical densities of haematoxylin, eosin and DAB (rows) in red, green, blue.
STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
GREY = (0.299, 0.587, 0.114)
STAIN_JITTER, LIGHT_JITTER, REFERENCE_JITTER = 0.05, 0.1, 0.5


_DRAWS = {"none": (), "flips": (1, 1, 1), "default": (1, 1, 1, 3, 3, 1, 1, 1), "reference": (1, 1, 1, 1, 1)}
"""Random numbers of a tile that each kind of augmentation takes in turn: of each draw."""


def augment(tiles: torch.Tensor, kind: str, generator: torch.Generator) -> torch.Tensor:
    """Returns tiles, uint8 (N, size, size, 3), as float (N, 3, size, size) in [0, 1], augmented.

    Args:
        tiles: on the device that augments them.
        kind: `none`; `default`: flips, quarter turns, mild stain jitter (Tellez et al. 2018,
            https://doi.org/10.1109/TMI.2018.2820199) and light jitter; `reference`: colour jitter of 0.5, horizontal
            flip, rotation by any angle with black corners (mclSTExp 2024, https://arxiv.org/abs/2407.08216); `flips`:
            only flips and quarter turns (the same paper's code, Visium).
        generator: of the same device; fixes every draw.
    """
    return augmented(tiles, kind, draw(kind, len(tiles), generator))


def draw(kind: str, num_tiles: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Returns what `augmented` takes for some tiles: numbers from [-1, 1), each float32 (num_tiles, C, 1, 1)."""
    shapes = [(num_tiles, channels, 1, 1) for channels in _DRAWS[kind]]
    return [2 * torch.rand(shape, generator=generator, device=generator.device) - 1 for shape in shapes]


def augmented(tiles: torch.Tensor, kind: str, draws: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns `augment` of tiles with the draws given, so that parts of a batch are augmented as the whole would be."""
    images, left = tiles.permute(0, 3, 1, 2).float() / 255, iter(draws)
    if kind == "none":
        return images
    if kind == "reference":
        images = colour_jitter(images, REFERENCE_JITTER, left)
        return rotate(_flip(images, 3, left), left)
    images = _flip(_flip(images, 3, left), 2, left)
    images = _where(images.transpose(2, 3), images, left)
    if kind == "flips":
        return images
    return colour_jitter(stain_jitter(images, STAIN_JITTER, left), LIGHT_JITTER, left)


def colour_jitter(images: torch.Tensor, strength: float, draws: Iterator[torch.Tensor]) -> torch.Tensor:
    """Scales brightness, contrast and saturation, each by a factor uniform in 1 +- strength, in this order."""
    brightness, contrast, saturation = (1 + strength * next(draws) for _ in range(3))
    weights = _grey(images.device)
    images = (images * brightness).clamp(0, 1)
    mean = (images * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    images = torch.lerp(mean, images, contrast).clamp(0, 1)
    grey = (images * weights).sum(1, keepdim=True)
    return torch.lerp(grey, images, saturation).clamp(0, 1)


def stain_jitter(images: torch.Tensor, strength: float, draws: Iterator[torch.Tensor]) -> torch.Tensor:
    """Scales each stain's optical density by 1 +- strength and shifts it by +- strength / 10, drawn per tile."""
    to_rgb, from_rgb = _stains(images.device)
    density = -torch.log10(images.clamp(min=1 / 255))
    stains = torch.einsum("nchw,cs->nshw", density, from_rgb)
    scale = 1 + strength * next(draws)
    shift = strength / 10 * next(draws)
    return (10 ** -torch.einsum("nshw,sc->nchw", stains * scale + shift, to_rgb)).clamp(0, 1)


def rotate(images: torch.Tensor, draws: Iterator[torch.Tensor]) -> torch.Tensor:
    """Rotates each tile by an angle uniform in +-180 degrees; corners become black."""
    angle = math.pi * next(draws).flatten()
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turn = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


@cache
def _grey(device: torch.device) -> torch.Tensor:
    return torch.tensor(GREY, device=device).view(1, 3, 1, 1)


@cache
def _stains(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the maps from stains to red, green and blue and back; copying them to a GPU each time would stop it."""
    to_rgb = F.normalize(torch.tensor(STAINS), dim=1)
    return to_rgb.to(device), torch.linalg.inv(to_rgb).to(device)


def _flip(images: torch.Tensor, dim: int, draws: Iterator[torch.Tensor]) -> torch.Tensor:
    return _where(images.flip(dim), images, draws)


def _where(changed: torch.Tensor, images: torch.Tensor, draws: Iterator[torch.Tensor]) -> torch.Tensor:
    return torch.where(next(draws) < 0, changed, images)
