"""H2: tiles per second of a training step with a compiled image tower, tiles in the device's memory."""

import time

from goals import state
from gpu_setting import setting
from synthetic_step import SyntheticStep, small


def main() -> None:
    here = setting(__doc__)
    step = SyntheticStep(here.choose({"tiles.size_px": 224, "train.compile": True}, small({})), here.device)
    if here.is_toy:
        step.rank_state.model.image_tower.compile(backend="eager")
    num_tiles, length, repeats = here.choose((512, 128, 10), (8, 8, 1))
    batch = step.batch(num_tiles, length)
    started = time.perf_counter()
    step.take(batch)
    here.wait()
    compiled_s = time.perf_counter() - started
    rates = here.rates(lambda: [step.take(batch) for _ in range(repeats)], repeats * num_tiles)
    state("H2 compiled", rates, f"{num_tiles // length} sentences of {length}, compiled in {compiled_s:.0f} s")


if __name__ == "__main__":
    main()
