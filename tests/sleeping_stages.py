"""A prediction whose network and store sleep instead of working: how much of its stages overlaps shows in its rate.

The slides, the readers, the search, the parts and the pipeline are real.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import round_slide
import tifffile
import torch
from random_version import random_version
from ray import cloudpickle
from round_slide import MPP, TILE, tissue_image

from mclstexp.model.answer import Answerer
from mclstexp.prediction import pipeline
from mclstexp.prediction.parts import PART_TILES
from mclstexp.prediction.pipeline import TILES, Row, WorkerCounts, Write
from mclstexp.prediction.plan import SlideSource
from mclstexp.settings import TilesConfig

NUM_ENDS = 3
"""First and last parts that are not timed: at first actors start, at the end rows come sooner than before."""


@dataclass(frozen=True)
class SleepingNetwork:
    """Embeds any tile as a random vector, after a time that grows with the number of tiles."""

    seconds: float
    """Of a whole part."""
    width: int

    def build(self, device: torch.device) -> Callable[[np.ndarray], np.ndarray]:
        """Returns the map from tiles to embeddings, float32 (n, width)."""

        def embed(tiles: np.ndarray) -> np.ndarray:
            time.sleep(self.seconds * len(tiles) / PART_TILES)
            return np.random.default_rng(0).normal(size=(len(tiles), self.width)).astype(np.float32)

        return embed


@dataclass(frozen=True)
class Slow:
    """Seconds that each stage sleeps for a whole part."""

    network: float
    weighing: float
    store: float

    def answerer(self, model: object, plan: object) -> "SlowAnswerer":
        """Returns what answers in the place of a model."""
        version = random_version()
        bank = version.searched_bank
        network = SleepingNetwork(self.network, bank.keys.shape[1])
        return SlowAnswerer(Answerer(network, bank, version.config.retrieval), self.weighing)  # type: ignore[arg-type]

    def write(self) -> type[Write]:
        """Returns the step that writes to a slow store."""
        seconds = self.store

        class SlowWrite(Write):
            def __call__(self, batch):
                if Row.of(batch).state == TILES:
                    time.sleep(seconds)
                return super().__call__(batch)

        return SlowWrite


@dataclass(frozen=True)
class SlowAnswerer:
    """An answerer that sleeps behind the search, outside of its turn on the device."""

    answerer: Answerer
    weighing: float

    def build(self, device: torch.device) -> Callable:
        """Returns the map from tiles to answers."""
        answer = self.answerer.build(device)

        def slowly(inputs, complete):
            found = answer(inputs, complete)
            time.sleep(self.weighing * len(complete) / PART_TILES)
            return found

        return slowly


def predict_slowly(folder: Path, slow: Slow, num_slides: int) -> float:
    """Predicts slides of about 3 parts each, and returns the rate in parts of 256 tiles per second, less the ends.

    It is the slope of a line through what was written by when, because rows come a few tenths of a second late.

    Ray must be connected, with at least 3 CPUs.
    """
    sources = []
    for number in range(num_slides):
        path, unit = folder / f"s{number}.tif", {"resolution": (1e4 / MPP,) * 2, "resolutionunit": "CENTIMETER"}
        tifffile.imwrite(path, tissue_image(number), tile=(128, 128), photometric="rgb", compression="deflate", **unit)
        sources.append(SlideSource(f"s{number}", "P", "", str(path), None))
    plan = round_slide.make_plan(folder, tiles=TilesConfig(size_px=TILE, min_tissue=0.3, jpeg_quality=85))
    answerer_for, write = pipeline.answerer_for, pipeline.Write
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not see this folder
    try:
        pipeline.answerer_for, pipeline.Write = slow.answerer, slow.write()
        written: list[tuple[float, int]] = []
        for row in pipeline.pipeline(sources, plan, random_version(), WorkerCounts(1, 1, False)).iter_rows():
            assert row["state"] == TILES, row["reason"]
            written.append((time.monotonic(), row["num_tiles"]))
    finally:
        pipeline.answerer_for, pipeline.Write = answerer_for, write
    when, num_tiles = np.array(written[NUM_ENDS:-NUM_ENDS]).T
    return float(np.polyfit(when - when[0], num_tiles.cumsum() / PART_TILES, 1)[0])
