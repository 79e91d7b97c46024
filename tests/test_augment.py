"""Augmentation: reproducible, bounded, one draw per tile; and the fixed turns of embedding."""

import numpy as np
import pytest
import torch

from mclstexp.model.augment import augment, augmented, colour_jitter, draw, rotate, stain_jitter
from mclstexp.model.embed import fixed_turns

TILES = torch.randint(0, 256, (16, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["none", "default", "reference", "flips"])
def test_tiles_become_images_in_bounds_fixed_by_the_generator(kind: str) -> None:
    images = augment(TILES, kind, _generator())
    assert images.shape == (16, 3, 24, 24)
    assert 0 <= images.min() <= images.max() <= 1
    assert torch.equal(images, augment(TILES, kind, _generator()))
    assert torch.equal(images, augment(TILES, kind, _generator(1))) == (kind == "none")


@pytest.mark.parametrize("kind", ["none", "default", "reference", "flips"])
def test_parts_are_augmented_as_the_whole(kind: str) -> None:
    draws = draw(kind, 16, _generator())
    parts = [augmented(TILES[at], kind, [each[at] for each in draws]) for at in (slice(0, 5), slice(5, 16))]
    assert torch.equal(torch.cat(parts), augment(TILES, kind, _generator()))


def test_none_only_scales() -> None:
    assert torch.equal(augment(TILES, "none", _generator()), TILES.permute(0, 3, 1, 2) / 255)


def test_each_tile_has_its_own_draw() -> None:
    same = TILES[:1].repeat(8, 1, 1, 1)
    assert len(torch.unique(augment(same, "default", _generator()), dim=0)) == 8


def _orientations(tile: np.ndarray) -> list[np.ndarray]:
    """The eight flips and quarter turns of a tile (size, size, 3)."""
    return [np.rot90(side, turns) for side in (tile, tile[::-1]) for turns in range(4)]


def _which(tile: np.ndarray, changed: np.ndarray) -> int:
    (found,) = (index for index, side in enumerate(_orientations(tile)) if np.array_equal(side, changed))
    return found


def test_flips_give_all_eight_orientations_and_keep_colours() -> None:
    tiles = TILES[:1].repeat(400, 1, 1, 1)
    changed = (augment(tiles, "flips", _generator()) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    drawn = np.bincount([_which(tile, side) for tile, side in zip(tiles.numpy(), changed, strict=True)], minlength=8)
    assert drawn.min() > 25


def test_a_fixed_turn_is_one_of_eight_and_the_tiles_own() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (400, 6, 6, 3), np.uint8)
    turned = fixed_turns(tiles)
    drawn = np.bincount([_which(tile, side) for tile, side in zip(tiles, turned, strict=True)], minlength=8)
    assert drawn.min() > 25
    order = np.random.default_rng(1).permutation(400)
    assert np.array_equal(fixed_turns(tiles[order]), turned[order])
    assert np.array_equal(fixed_turns(tiles[7:8]), turned[7:8])
    assert np.array_equal(fixed_turns(tiles[:, ::-1, ::-1].copy()[:, ::-1, ::-1]), turned), "strides must not matter"
    assert fixed_turns(tiles[:0]).shape == (0, 6, 6, 3)


def test_a_fixed_turn_is_the_same_in_every_process() -> None:
    tile = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)  # its CRC-32 ends in binary 101
    assert np.array_equal(fixed_turns(tile[None])[0], np.rot90(tile))


def test_a_turn_keeps_the_centre_and_blackens_corners() -> None:
    white = torch.ones(64, 3, 25, 25)
    turned = rotate(white, iter(draw("reference", 64, _generator())[-1:]))
    assert torch.allclose(turned[:, :, 12, 12], torch.ones(64, 3))
    assert (turned[:, 0, 0, 0] == 0).float().mean() > 0.8


def test_jitter_of_strength_0_changes_nothing() -> None:
    images = TILES.permute(0, 3, 1, 2).float() / 255
    assert torch.allclose(colour_jitter(images, 0.0, iter(draw("reference", 16, _generator()))), images, atol=1e-5)
    assert torch.allclose(
        stain_jitter(images, 0.0, iter(draw("default", 16, _generator())[3:])), images.clamp(min=1 / 255), atol=1e-3
    )
