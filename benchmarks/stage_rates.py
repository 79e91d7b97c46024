"""CPU time per tile of each stage of prediction except the encoder: reading, retrieval, writing, in one thread.

    python benchmarks/stage_rates.py SLIDE --size-px 224 --genes 1000 --keys 20000

Each stage runs the engine's own code alone, without Ray, in tiles per CPU-second; `benchmarks/embedding_rate.py`
measures the encoder. Bank and answers are random. Inspecting and publishing a slide have a part that does not grow
with its tiles, so give slides of several sizes. Publishing draws no pictures.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]
os.environ["OMP_NUM_THREADS"] = "1"  # as an embedder on a CPU has

import numpy as np  # noqa: E402
import torch  # noqa: E402

from mclstexp.data.genes import GenePanel  # noqa: E402
from mclstexp.model.answer import TileAnswers  # noqa: E402
from mclstexp.model.bank import Bank  # noqa: E402
from mclstexp.model.retrieval import resolve, retrieve  # noqa: E402
from mclstexp.prediction.inspect import Inspection, inspect  # noqa: E402
from mclstexp.prediction.parts import CONFIDENCE, PART_TILES, encode_part, num_parts, read_grid, write_part  # noqa: E402
from mclstexp.prediction.plan import CohortPlan, SlideSource  # noqa: E402
from mclstexp.prediction.publish import publish_slide  # noqa: E402
from mclstexp.prediction.tile_reader import TileReader  # noqa: E402
from mclstexp.prediction.writers.slide import OutputInfo  # noqa: E402
from mclstexp.settings import RetrievalConfig, TilesConfig  # noqa: E402

WIDTH = 256


def plan_for(out: str, size_px: int, mpp: float) -> CohortPlan:
    tiles = TilesConfig(size_px=size_px)
    return CohortPlan(out, tiles, mpp, "none", scratch=out, scratch_budget_bytes=10**12, assume_mpp=mpp)


def read(path: Path, plan: CohortPlan, found: Inspection) -> int:
    """Reads all tiles of a slide as a reader does; returns their number."""
    grid = read_grid(found.staging, found.record.num_tiles)
    with TileReader(plan) as reader:
        for start in range(0, len(grid), PART_TILES):
            reader.read_part(str(path), grid.slice(start, PART_TILES), found.record)
    return found.record.num_tiles


def random_bank(num_keys: int, num_genes: int) -> Bank:
    rng = np.random.default_rng(0)
    keys, payload = (rng.normal(size=(num_keys, width)).astype(np.float32) for width in (WIDTH, num_genes))
    donors = np.array([f"P{number}" for number in range(16)], object)[np.arange(num_keys) % 16]
    return Bank.of(keys, payload, donors, donors, donors)


def random_answer(rng: np.random.Generator, num_tiles: int, num_genes: int) -> TileAnswers:
    unknown = dict.fromkeys(CONFIDENCE, np.full(num_tiles, np.nan, np.float32))
    return TileAnswers(rng.random((num_tiles, num_genes), np.float32), np.zeros(0), unknown)


def timed(name: str, work: Callable[[], Any], num_tiles: int) -> Any:
    """Prints the rate of a stage and returns its result."""
    started = time.process_time()
    result = work()
    seconds = time.process_time() - started
    print(f"{name:9} {num_tiles / seconds:9.1f} tiles/CPU-s ({num_tiles:,} tiles in {seconds:.2f})", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--size-px", type=int, default=224, help="edge of a tile")
    parser.add_argument(
        "--mpp", type=float, default=0.5, help="um per tile pixel, and of slides that do not say theirs"
    )
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--keys", type=int, default=20_000, help="spots of the bank")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as out:
        plan = plan_for(out, arguments.size_px, arguments.mpp)
        source = SlideSource("slide", "patient", "", str(arguments.slide.resolve()), None)
        found = inspect(source, plan)
        num_tiles = found.record.num_tiles
        timed("inspect", lambda: inspect(source, plan_for(f"{out}/again", arguments.size_px, arguments.mpp)), num_tiles)
        timed("read", lambda: read(arguments.slide, plan, found), num_tiles)
        rng, bank = np.random.default_rng(1), random_bank(arguments.keys, arguments.genes)
        config = resolve(RetrievalConfig(), len(bank))
        queries = rng.normal(size=(PART_TILES, WIDTH)).astype(np.float32)
        timed("retrieve", lambda: retrieve(queries, bank, config), PART_TILES)
        panel = GenePanel.from_names([f"GENE{gene}" for gene in range(arguments.genes)])
        info = OutputInfo(panel, "random", "none", arguments.size_px, arguments.mpp, None)
        lengths = [min(PART_TILES, num_tiles - part * PART_TILES) for part in range(num_parts(num_tiles))]
        answers = [random_answer(rng, length, arguments.genes) for length in lengths]

        def write_parts() -> None:
            for part, answer in enumerate(answers):
                write_part(found.staging, part, encode_part(answer, np.ones(len(answer.values), bool)))

        timed("write", write_parts, num_tiles)
        timed("publish", lambda: publish_slide(found.staging, f"{out}/published", info), num_tiles)


if __name__ == "__main__":
    main()
