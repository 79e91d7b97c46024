"""H6 and H7: tiles per second searched exactly for their 200 nearest keys, in banks of 1 M and of 10 M."""

import numpy as np
from goals import state
from gpu_setting import setting

from mclstexp.model.nearest import Keys, directions

WIDTH, NEAREST = 256, 200


def key_directions(num_keys: int, num_drawn: int) -> np.ndarray:
    """Returns directions of random keys: drawn ones, and again with shifted channels, which takes less time."""
    drawn = directions(np.random.default_rng(0).normal(size=(num_drawn, WIDTH)).astype(np.float32))
    return np.concatenate([np.roll(drawn, shift, axis=1) for shift in range(num_keys // num_drawn)])


def main() -> None:
    here = setting(__doc__)
    queries = np.random.default_rng(1).normal(size=(here.choose(4096, 16), WIDTH)).astype(np.float32)
    for name, num_keys in here.choose((("H6", 10**6), ("H7", 10**7)), (("H6", 1000), ("H7", 4000))):
        keys = Keys(key_directions(num_keys, min(num_keys, here.choose(10**6, 1000))), here.device)
        rates = here.rates(lambda keys=keys: keys.nearest(queries, NEAREST), len(queries), rounds=3)
        state(name, rates, f"{NEAREST} nearest of {num_keys:,} random keys, {len(queries)} tiles at once")
        del keys


if __name__ == "__main__":
    main()
