"""H8 and H9: whole slides of tiled JPEG predicted as `jobs/predict.py` does, with contrastive towers on DenseNet-121.

All slides are one file under several names. Rates begin with the first tiles; they are stated again with each slide, so
that a run that is cut off has those so far.
"""

import os
import tempfile
import time
from pathlib import Path

import _launch
from goals import state
from gpu_setting import setting
from synthetic_slide import MPP, write_slide
from untrained_model import save_untrained_towers

from mclstexp.config import Config, override
from mclstexp.model.version import ModelVersion
from mclstexp.prediction.cohort import open_cohort
from mclstexp.prediction.run import predict_cohort

NUM_GENES, NUM_KEYS = 1000, 20_000


class Rates:
    """States the rates of prediction as slides are done; a `Show`."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._num_done = 0

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """Takes the number of slides that are done, and tiles in words."""
        now, num_tiles = time.monotonic(), int(note.split()[0].replace(",", "") or 0)
        if num_tiles and self._first is None:
            self._first = (now, num_tiles)
        if self._first is None or done == self._num_done:
            return
        self._num_done, (since, before) = done, self._first
        detail = (
            f"{done} of {total} slides, {num_tiles:,} tiles, {NUM_KEYS:,} keys, {NUM_GENES:,} genes, the first tiles "
        )
        detail += f"after {since - self._started:.0f} s"
        state("H8", [(num_tiles - before) / (now - since)], detail)
        state("H9", [3600 * done / (now - since)], detail)


def main() -> None:
    here = setting(__doc__)
    settings = {"tiles.size_px": 224, "tiles.mpp": MPP, "model.image_encoder": "densenet121"}
    toy = {"tiles.size_px": 32, "model.image_encoder": "small_cnn", "model.spot_width": 16}
    cluster = {
        "cluster.local_cpus": here.choose(len(os.sched_getaffinity(0)), 3),
        "cluster.object_store_mb": here.choose(16384, 128),
    }
    config = override(Config(), cluster)
    with tempfile.TemporaryDirectory() as scratch:
        folder, slides = Path(scratch), Path(scratch, "slides")
        model_settings = settings | here.choose({}, toy)
        save_untrained_towers(folder / "model", model_settings, here.choose(NUM_GENES, 20), here.choose(NUM_KEYS, 300))
        slides.mkdir()
        write_slide(slides / "slide0.tif", here.choose(10_000, 100), model_settings["tiles.size_px"])
        for number in range(1, here.choose(12, 2)):
            os.link(slides / "slide0.tif", slides / f"slide{number}.tif")
        _launch.connect(config, 3)
        model = ModelVersion.load(folder / "model")
        cohort = open_cohort(str(slides), model, str(folder / "out"), config.predict)
        report = predict_cohort(model, cohort, str(folder / "out"), Rates(), config.predict)
    if report.faults():
        raise SystemExit(f"{len(report.faults())} slides failed: {next(iter(report.faults().values()))}")


if __name__ == "__main__":
    main()
