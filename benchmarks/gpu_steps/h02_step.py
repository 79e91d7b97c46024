"""H2: tiles per second of a training step, tiles in the device's memory: the whole step with its augmentation."""

from goals import state
from gpu_setting import setting
from synthetic_step import SyntheticStep, small


def main() -> None:
    here = setting(__doc__)
    settings = {"tiles.size_px": 224}
    step = SyntheticStep(here.choose(settings, small({})), here.device)
    for sentences in here.choose((4, 8), (1,)):
        length, repeats = here.choose((128, 10), (8, 1))
        batch = step.batch(sentences * length, length)
        rates = here.rates(lambda b=batch, n=repeats: [step.take(b) for _ in range(n)], repeats * sentences * length)
        name = "H2" if sentences == here.choose(4, 1) else f"H2 {sentences * length}"
        state(name, rates, f"{sentences} sentences of {length}, default augmentation, not compiled")


if __name__ == "__main__":
    main()
