"""The largest costs of a training step, or of predicting a slide, by torch's profiler.

    python benchmarks/costs.py train      contrastive towers on DenseNet-121: one step on tiles in memory
    python benchmarks/costs.py predict    the default recipe: a slide, its stages in turn in one process

On a GPU the share of an operation is that of the device's time; `--device cpu` leaves a GPU out. The share of a stage
of prediction is that of all stages, with waiting for the device. Weights are random and pixels synthetic.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from goals import COSTS
from synthetic_slide import MPP, write_slide
from synthetic_step import SyntheticStep, small
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from untrained_model import save_untrained

from mclstexp.cluster import KEEPING_MEMORY
from mclstexp.model.answer import TileAnswers, answerer_of
from mclstexp.model.version import ModelVersion
from mclstexp.prediction.cohort import plan_of
from mclstexp.prediction.inspect import inspect
from mclstexp.prediction.parts import PART_TILES, encode_part, num_parts, read_grid, write_part
from mclstexp.prediction.plan import SlideSource
from mclstexp.prediction.publish import publish_slide
from mclstexp.prediction.tile_reader import TileReader
from mclstexp.prediction.writers.slide import OutputInfo
from mclstexp.settings import PredictConfig

STAGE = "stage: "
EMBED, SEARCH = f"{STAGE}embed tiles", f"{STAGE}search the bank and weigh"
SHOWN = 8
Answer = Callable[[tuple[np.ndarray, ...], np.ndarray], TileAnswers]
GENES, KEYS = 1000, 20_000
RECIPE = {
    "model.image_encoder": "densenet121",
    "model.image_layers": ["transition2", "transition3", "norm"],
    "tiles.size_px": 224,
    "tiles.mpp": MPP,
}


@dataclass(frozen=True)
class Cost:
    """What some operation, or a stage of prediction, takes."""

    what: str
    share: float
    host_ms: float
    device_ms: float
    calls: int


@contextmanager
def profiled(device: torch.device) -> Iterator[Callable[[], list[Any]]]:
    """Profiles the block; what it yields then returns the averages by name."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as profiler:
        yield lambda: list(profiler.key_averages())
        if device.type == "cuda":
            torch.cuda.synchronize()


def operations(averages: list[Any], device: torch.device) -> list[Cost]:
    """Returns the operations by their own time on the device, largest first, without stages.

    An operation's time on a GPU is that of the kernels that it starts, which have averages of their own.
    """
    kept = [each for each in averages if each.device_type == DeviceType.CPU and not each.key.startswith(STAGE)]
    own = {each.key: _own_ms(each, device) for each in kept}
    total = sum(own.values())
    costs = [Cost(each.key, own[each.key] / total, *_ms(each, "self_"), each.count) for each in kept]
    return sorted(costs, key=lambda cost: -cost.share)


def stages(averages: list[Any]) -> list[Cost]:
    """Returns the stages by the time that they take, with waiting for the device, largest first."""
    kept = {each.key: each for each in averages if each.device_type == DeviceType.CPU and each.key.startswith(STAGE)}
    host, on_device = ({name: _ms(each, "")[index] for name, each in kept.items()} for index in (0, 1))
    for times in (host, on_device):
        times[SEARCH] -= times[EMBED]  # which it contains
    total = sum(host.values())
    costs = [
        Cost(name.removeprefix(STAGE), host[name] / total, host[name], on_device[name], each.count)
        for name, each in kept.items()
    ]
    return sorted(costs, key=lambda cost: -cost.share)


def _own_ms(average: Any, device: torch.device) -> float:
    host, on_device = _ms(average, "self_")
    return on_device if device.type == "cuda" else host


def _ms(average: Any, which: str) -> tuple[float, float]:
    return getattr(average, f"{which}cpu_time_total") / 1e3, getattr(average, f"{which}device_time_total") / 1e3


def tell(work: str, costs: list[Cost]) -> None:
    """Prints costs as a table and as one line of JSON."""
    print(f"\n| {work} | share | ms on the host | ms on the device | calls |\n|---|---|---|---|---|")
    for cost in costs[:SHOWN]:
        print(f"| {cost.what} | {cost.share:.0%} | {cost.host_ms:,.1f} | {cost.device_ms:,.1f} | {cost.calls} |")
    print(COSTS + json.dumps({"work": work, "costs": [vars(cost) for cost in costs[:SHOWN]]}), flush=True)


def train(device: torch.device, is_toy: bool) -> None:
    """Profiles a training step after one that warms up."""
    settings: dict[str, object] = {"tiles.size_px": 224, "train.augmentation": "default"}
    step = SyntheticStep(small(settings) if is_toy else settings, device)
    length = 8 if is_toy else 128 if device.type == "cuda" else 16
    batch = step.batch(4 * length, length)
    step.take(batch)
    with profiled(device) as averages:
        step.take(batch)
    tell(f"a training step of {4 * length} tiles", operations(averages(), device))


class Labelled:
    """An image network whose work is a stage of its own."""

    def __init__(self, network: Any) -> None:
        self._network = network

    def build(self, device: torch.device) -> Callable[..., np.ndarray]:
        """Returns what embeds tiles."""
        embed = self._network.build(device)

        def labelled(*inputs: np.ndarray) -> np.ndarray:
            with record_function(EMBED):
                return embed(*inputs)

        return labelled


def predict(device: torch.device, is_toy: bool) -> None:
    """Profiles the prediction of a slide by the default recipe, after one of a tenth of its tiles that warms up."""
    num_tiles = 40 if is_toy else 10 * PART_TILES if device.type == "cuda" else PART_TILES
    toy = {
        "model.image_encoder": "small_cnn",
        "model.image_layers": [],
        "tiles.size_px": 32,
        "model.image_directions": 8,
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings = RECIPE | (toy if is_toy else {})
        save_untrained(folder / "model", settings, GENES, 100 if is_toy else KEYS)
        model = ModelVersion.load(folder / "model")
        answerer = answerer_of(model)
        answer = replace(answerer, network=cast(Any, Labelled(answerer.network))).build(device)
        for name, number in (("first", num_tiles // 10), ("slide", num_tiles)):
            (folder / name).mkdir()
            write_slide(folder / name / "slide.tif", number, model.tile_size_px)
        predict_slide(model, answer, folder / "first")
        with profiled(device) as averages:
            predict_slide(model, answer, folder / "slide")
        tell("predicting a slide, by stage", stages(averages()))
        tell("predicting a slide, by operation", operations(averages(), device))


def predict_slide(model: ModelVersion, answer: Answer, folder: Path) -> None:
    """Predicts the slide of a folder stage by stage."""
    plan = plan_of(model, str(folder), PredictConfig(), None)
    image = str(folder / "slide.tif")
    with record_function(f"{STAGE}inspect the slide"):
        found = inspect(SlideSource("slide", "slide", "", image, None), plan)
    grid = read_grid(found.staging, found.record.num_tiles)
    with TileReader(plan) as reader:
        for part in range(num_parts(found.record.num_tiles)):
            tiles = grid.slice(part * PART_TILES, PART_TILES)
            with record_function(f"{STAGE}read tiles"):
                columns = reader.read_part(image, tiles, found.record)
            complete = columns.pop("complete")[: len(tiles)]
            with record_function(SEARCH):
                answered = answer(tuple(column[: len(tiles)] for column in columns.values()), complete)
            with record_function(f"{STAGE}write parts"):
                write_part(found.staging, part, encode_part(answered, complete))
    with record_function(f"{STAGE}finish the slide"):
        publish_slide(found.staging, str(folder / "published"), OutputInfo.of_model(model, False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["train", "predict"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="in tiny sizes, on a CPU")
    arguments = parser.parse_args()
    keeping = KEEPING_MEMORY["env_vars"]  # as the processes have that train and embed
    if not keeping.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | keeping)
    device = torch.device("cpu" if arguments.toy else arguments.device)
    {"train": train, "predict": predict}[arguments.work](device, arguments.toy)


if __name__ == "__main__":
    main()
