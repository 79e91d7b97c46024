"""A frozen encoder on a device: from the tiles of a sentence to the columns of a feature table."""

import hashlib
import json

import numpy as np
import torch

from mclstexp.data.features import RGB, EncoderRecord, FeatureManifest
from mclstexp.data.spots import Batch
from mclstexp.model.augment import augment
from mclstexp.model.tile_stream import TILES_AT_ONCE
from mclstexp.model.towers import ImageTower
from mclstexp.settings import ModelConfig


class Extractor:
    """A frozen encoder on a device, which maps the tiles of a sentence to the columns of a feature table."""

    def __init__(self, state: dict[str, torch.Tensor], plain: FeatureManifest, device: torch.device) -> None:
        tower = _tower_of(plain.encoder)
        tower.encoder.load_state_dict(state)
        self._tower = tower.eval().to(device).to(memory_format=torch.channels_last)
        self._plain, self._device = plain, device

    @torch.inference_mode()
    def __call__(self, views: Batch, sentence: str) -> Batch:
        """Returns every block of one sentence, float32 (n, width) by column.

        Args:
            views: tiles by view, uint8 (n, size, size, 3).
            sentence: name of the sentence, which with seed and number fixes each draw.
        """
        blocks: Batch = {}
        for view in self._plain.views:
            blocks[f"{view}/{RGB}"] = colours(views[view])
            for draw in (None, *range(self._plain.num_draws)):
                kind = "none" if draw is None else self._plain.augmentation
                # The views of a spot are augmented alike, because each begins with the same generator.
                generator = torch.Generator(self._device).manual_seed(_seed(self._plain.seed, sentence, draw))
                joined = self._encoded(views[view], kind, generator)
                ends = np.cumsum(self._plain.encoder.widths)[:-1]
                blocks |= dict(zip(self._plain.encoder.blocks(view, draw), np.split(joined, ends, axis=1), strict=True))
        return blocks

    def _encoded(self, tiles: np.ndarray, kind: str, generator: torch.Generator) -> np.ndarray:
        size, parts = TILES_AT_ONCE[self._device.type], []
        for start in range(0, len(tiles), size):
            images = augment(torch.from_numpy(tiles[start : start + size]).to(self._device), kind, generator)
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._plain.arithmetic == "bf16"):
                parts.append(self._tower(images).float().cpu().numpy())
        return np.concatenate(parts)


def colours(tiles: np.ndarray) -> np.ndarray:
    """Returns the mean and standard deviation of red, green and blue in [0, 1] of tiles, uint8 (n, size, size, 3)."""
    pixels = tiles.reshape(len(tiles), -1, 3) / np.float32(255)
    return np.concatenate([pixels.mean(axis=1), pixels.std(axis=1)], axis=1).astype(np.float32)


def _tower_of(record: EncoderRecord) -> ImageTower:
    """Returns the network of a record with random weights, behind its transform."""
    scaling = None if record.scaling == "encoder" else record.scaling
    settings = {"image_encoder": record.name, "image_layers": record.layers, "input_scaling": scaling}
    return ImageTower(ModelConfig.model_validate(settings), record.tile_size_px)


def _seed(seed: int, sentence: str, draw: int | None) -> int:
    text = json.dumps([seed, sentence, draw])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little")
