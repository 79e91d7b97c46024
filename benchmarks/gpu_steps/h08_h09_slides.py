"""H8 and H9: whole slides of tiled JPEG predicted as `jobs/predict.py` does, with contrastive towers on DenseNet-121.

All slides are one file under several names. Rates begin with the first tiles and are stated again and again, so that a
run that is cut off has those so far.
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

NUM_GENES, NUM_KEYS, STATE_EVERY_S = 1000, 20_000, 5.0


class Rates:
    """States the rates of prediction as tiles and slides are done; a `Show`."""

    def __init__(self) -> None:
        self._started = self._stated = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._num_done = 0

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """Takes the number of slides that are done, and tiles in words."""
        now, num_tiles = time.monotonic(), int(note.split()[0].replace(",", ""))
        if self._first is None:
            self._first = (now, num_tiles) if num_tiles else None
        elif done > self._num_done or now - self._stated > STATE_EVERY_S:
            self._stated, self._num_done = now, done
            self._state(now - self._first[0], num_tiles - self._first[1], total)

    def _state(self, seconds: float, num_tiles: int, total: int) -> None:
        start_s = time.monotonic() - seconds - self._started
        detail = f"{NUM_KEYS:,} keys, {NUM_GENES:,} genes; {self._num_done} of {total} slides, the first tiles after "
        detail += f"{start_s:.0f} s"
        state("H8", [num_tiles / seconds], detail)
        if self._num_done:
            state("H9", [3600 * self._num_done / seconds], detail)


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
        for number in range(1, here.choose(8, 2)):
            os.link(slides / "slide0.tif", slides / f"slide{number}.tif")
        _launch.connect(config, 3)
        model = ModelVersion.load(folder / "model")
        cohort = open_cohort(str(slides), model, str(folder / "out"), config.predict)
        report = predict_cohort(model, cohort, str(folder / "out"), Rates(), config.predict)
    if report.faults():
        raise SystemExit(f"{len(report.faults())} slides failed: {next(iter(report.faults().values()))}")


if __name__ == "__main__":
    main()
