"""What answers owe to how tiles are read: storage tiles decoded here, OpenSlide's, and no JPEG round trip.

    python benchmarks/slide_answers.py MODEL SLIDE... [--assume-mpp 0.5]

Tiles are read, answered and published as prediction does, but in one process. `as predicted` is compared with the same
slide through OpenSlide, and with tiles that skip the round trip through the table's JPEG: the largest and the mean
difference of a pixel, the correlation of each gene over the slide (lowest and median), and the largest difference of an
answer beside the deviation of its gene.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import numpy as np  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402

from mclstexp.evaluation.metrics import pearson_per_gene  # noqa: E402
from mclstexp.model.answer import answerer_of  # noqa: E402
from mclstexp.model.version import ModelVersion  # noqa: E402
from mclstexp.prediction.cohort import plan_of  # noqa: E402
from mclstexp.prediction.inspect import inspect  # noqa: E402
from mclstexp.prediction.parts import PART_TILES, Inspection, encode_part, read_grid, write_part  # noqa: E402
from mclstexp.prediction.plan import CohortPlan, SlideSource  # noqa: E402
from mclstexp.prediction.publish import publish_slide  # noqa: E402
from mclstexp.prediction.tile_reader import TileReader  # noqa: E402
from mclstexp.prediction.writers.slide import OutputInfo  # noqa: E402
from mclstexp.settings import PredictConfig  # noqa: E402

USUAL, BY_OPENSLIDE, WITHOUT = "as predicted", "through OpenSlide", "without round trip"
READ: dict[str, dict[str, object]] = {
    USUAL: {},
    BY_OPENSLIDE: {"mclstexp.slides.tiff.jpeg_levels": lambda *_: None},
    WITHOUT: {"mclstexp.prediction.tile_reader.as_stored": lambda tile, _: tile},
}


@dataclass(frozen=True)
class Seen:
    """A slide as one way of reading shows it."""

    tiles: list[np.ndarray]
    """Of each part and view, uint8 (n, size, size, 3)."""
    expression: np.ndarray
    """float32 (N, G)."""
    read_s: float
    """CPU-seconds of reading."""


@contextmanager
def replaced(changes: dict[str, object]) -> Iterator[None]:
    """Replaces functions by their dotted names while the block runs."""
    with ExitStack() as stack:
        for name, new in changes.items():
            stack.enter_context(patch(name, new))
        yield


def parts_of(found: Inspection, image: Path, plan: CohortPlan) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
    """Yields the tiles of each part by view, and which are complete."""
    table = read_grid(found.staging, found.record.num_tiles)
    with TileReader(plan) as reader:
        for start in range(0, len(table), PART_TILES):
            rows = table.slice(start, PART_TILES)
            columns = reader.read_part(str(image), rows, found.record)
            complete = columns.pop("complete")[: len(rows)]
            yield tuple(pixels[: len(rows)] for pixels in columns.values()), complete


def predict(model: ModelVersion, image: Path, assume_mpp: float | None) -> Seen:
    """Returns a slide's tiles and answers."""
    answer = answerer_of(model).build(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as out:
        found, plan = inspected(model, image, assume_mpp, out)
        started = time.process_time()
        parts = list(parts_of(found, image, plan))
        read_s = time.process_time() - started
        for number, (views, complete) in enumerate(parts):
            write_part(found.staging, number, encode_part(answer(views, complete), complete))
        publish_slide(found.staging, out, OutputInfo.of_model(model))
        (file,) = Path(out).glob("**/slide.parquet")
        predicted = pq.read_table(file)
    expression = np.stack([predicted[name].to_numpy() for name in model.panel.gene_id], axis=1)
    return Seen([view for views, _ in parts for view in views], expression, read_s)


def inspected(model: ModelVersion, image: Path, assume_mpp: float | None, out: str) -> tuple[Inspection, CohortPlan]:
    """Returns what is known of a slide before its tiles are read, and how they are cut."""
    plan = plan_of(model, out, PredictConfig(other_stains=True), assume_mpp)
    return inspect(SlideSource("slide", "slide", "", str(image), None), plan), plan


def as_read(model: ModelVersion, image: Path, assume_mpp: float | None) -> list[np.ndarray]:
    """Returns a slide's tiles before the round trip, as `Seen` has them."""
    with tempfile.TemporaryDirectory() as out:
        found, plan = inspected(model, image, assume_mpp, out)
        return [view for views, _ in parts_of(found, image, plan) for view in views]


def apart(one: list[np.ndarray], other: list[np.ndarray]) -> str:
    """Returns in words how far pixels differ."""
    differences = [np.abs(first.astype(np.int16) - second) for first, second in zip(one, other, strict=True)]
    mean = np.mean([each.mean() for each in differences])
    return f"pixels within {max(each.max() for each in differences)} ({mean:.3f} on average)"


def compare(usual: Seen, other: Seen) -> str:
    """Returns how far two ways are apart, in one line."""
    alike = pearson_per_gene(usual.expression, other.expression)
    answers = np.nanmax(np.abs(usual.expression - other.expression) / np.nanstd(usual.expression, axis=0))
    return (
        f"{apart(usual.tiles, other.tiles)}, genes correlate by {np.nanmin(alike):.5f} at least, "
        f"{np.nanmedian(alike):.5f} in the median; answers within {answers:.2g} deviations of their gene"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model version")
    parser.add_argument("slides", type=Path, nargs="+")
    parser.add_argument("--assume-mpp", type=float, help="um/px of slides that state none")
    arguments = parser.parse_args()
    model = ModelVersion.load(arguments.model)
    for image in arguments.slides:
        seen = {}
        for name, changes in READ.items():
            with replaced(changes):
                seen[name] = predict(model, image, arguments.assume_mpp)
        usual = seen.pop(USUAL)
        num_tiles = len(usual.expression)
        print(f"{image.name}: {num_tiles} tiles, read in {1000 * usual.read_s / num_tiles:.2f} CPU-ms each", flush=True)
        raw = []
        for changes in (READ[WITHOUT], READ[WITHOUT] | READ[BY_OPENSLIDE]):
            with replaced(changes):
                raw.append(as_read(model, image, arguments.assume_mpp))
        print(f"  {BY_OPENSLIDE}, before the round trip: {apart(*raw)}", flush=True)
        for name, other in seen.items():
            print(f"  {name}, {1000 * other.read_s / num_tiles:.2f} CPU-ms: {compare(usual, other)}", flush=True)


if __name__ == "__main__":
    main()
