"""H1: tiles per second through the image encoder: as prediction runs it, from host memory, and the encoder alone."""

import numpy as np
import torch
from embedding_rate import network
from goals import state
from gpu_setting import setting

from mclstexp.model.tile_stream import TILES_AT_ONCE
from mclstexp.model.towers import ImageTower
from mclstexp.prediction.parts import PART_TILES
from mclstexp.settings import ModelConfig


def main() -> None:
    here = setting(__doc__)
    encoder, size_px = here.choose(("densenet121", 224), ("small_cnn", 32))
    embed = network(encoder, size_px, "bf16").build(here.device)
    tiles = np.random.default_rng(0).integers(0, 256, (here.choose(8 * PART_TILES, 16), size_px, size_px, 3), np.uint8)
    parts = np.array_split(tiles, max(1, len(tiles) // PART_TILES))
    detail = f"as predicted, {TILES_AT_ONCE[here.device.type]} at once, from and to host memory"
    state("H1", here.rates(lambda: [embed(part) for part in parts], len(tiles)), detail)
    tower = ImageTower(ModelConfig(image_encoder=encoder), size_px).eval().to(here.device)
    tower = tower.to(memory_format=torch.channels_last)
    for size in here.choose((64, 256, 512), (4, 8)):
        images = torch.rand(size, 3, size_px, size_px, device=here.device).contiguous(memory_format=torch.channels_last)
        repeats = here.choose(20, 1)
        with torch.inference_mode(), torch.autocast(here.device.type, torch.bfloat16):
            rates = here.rates(lambda images=images, n=repeats: [tower(images) for _ in range(n)], repeats * size)
        state(f"H1 eager {size}", rates, f"encoder alone, {size} at once, channels-last")


if __name__ == "__main__":
    main()
