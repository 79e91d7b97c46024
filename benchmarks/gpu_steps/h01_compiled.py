"""H1: tiles per second through the compiled image encoder alone."""

import time

import torch
from goals import state
from gpu_setting import setting

from mclstexp.model.towers import ImageTower
from mclstexp.settings import ModelConfig


def main() -> None:
    here = setting(__doc__)
    encoder, size_px = here.choose(("densenet121", 224), ("small_cnn", 32))
    tower = ImageTower(ModelConfig(image_encoder=encoder), size_px).eval().to(here.device)
    tower = tower.to(memory_format=torch.channels_last)
    tower.compile(backend=here.choose("inductor", "eager"), dynamic=False)
    size, repeats = here.choose((256, 20), (8, 1))
    images = torch.rand(size, 3, size_px, size_px, device=here.device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast(here.device.type, torch.bfloat16):
        started = time.perf_counter()
        tower(images)
        here.wait()
        compiled_s = time.perf_counter() - started
        rates = here.rates(lambda: [tower(images) for _ in range(repeats)], repeats * size)
    detail = f"encoder alone, compiled in {compiled_s:.0f} s, {size} at once, channels-last"
    state(f"H1 compiled {size}", rates, detail)


if __name__ == "__main__":
    main()
