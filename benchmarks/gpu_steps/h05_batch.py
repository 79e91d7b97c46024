"""H5: the largest batch that takes a step with its exact loss: as it is, with layers computed again, in micro-batches.

Found by bisection over whole sentences; a try ends with the device's lack of memory. Micro-batches are tried in growing
sizes, each stated at once, because a large one takes long.
"""

import gc
from collections.abc import Callable, Sequence

import torch
from goals import state
from gpu_setting import Setting, setting
from synthetic_step import SyntheticStep, small

SETTINGS: dict[str, object] = {"tiles.size_px": 224, "model.batch_norm": "frozen"}
MICRO_BATCH = 512


def largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """Returns the largest of some ascending sizes that fits, or 0."""
    low, high = 0, len(sizes)  # those before low fit, those from high on do not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low - 1] if low else 0


class Tries:
    """Steps of one kind, and why the last one did not fit."""

    def __init__(self, here: Setting, step: SyntheticStep) -> None:
        self._here, self._step, self.fault = here, step, "no larger one was tried"

    def __call__(self, num_tiles: int) -> bool:
        """Returns whether a step over so many tiles fits."""
        try:
            self._step.take(self._step.batch(num_tiles, self._here.choose(128, 8)))
            self._here.wait()
        except RuntimeError as error:  # lack of memory, or a kernel that cannot count so far
            self.fault = f"{num_tiles:,} end with {type(error).__name__}"
            return False
        finally:
            self._step.rank_state.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            if self._here.device.type == "cuda":
                torch.cuda.empty_cache()
        return True


def computes_again(step: SyntheticStep) -> None:
    """Makes the layers of a DenseNet keep their inputs alone, and compute the rest again in the backward pass."""
    for module in step.rank_state.model.image_tower.modules():
        if hasattr(module, "memory_efficient"):
            module.memory_efficient = True


def main() -> None:
    here = setting(__doc__)
    step = SyntheticStep(here.choose(SETTINGS, small(SETTINGS)), here.device)
    sizes = here.choose(range(256, 6144 + 1, 128), range(8, 24 + 1, 8))
    for name, change in (("H5 plain", lambda _: None), ("H5 memory-efficient", computes_again)):
        change(step)
        tries = Tries(here, step)
        found = largest(sizes, tries)
        state(name, [found], f"frozen batch norm; {tries.fault}")
    del step
    micro = SETTINGS | {"train.micro_batch": here.choose(MICRO_BATCH, 8)}
    tries = Tries(here, SyntheticStep(here.choose(micro, small(micro)), here.device))
    found: list[float] = []
    for size in here.choose((4096, 8192, 16384, 32768), (16, 32)):
        found = [size] if tries(size) else found
        state("H5 cached-gradient", found, f"micro-batches of {micro['train.micro_batch']}; {tries.fault}")


if __name__ == "__main__":
    main()
