"""Memory of the driver and rate of settling over many slides: sleeping stages; real driver, ledger, parts and store.

    python benchmarks/many_slides.py --slides 2000 --delay-ms 30

Inspecting, reading and answering sleep, then stage real slides of one part; the cohort, Ray Data's stream, the writing
of parts, finishing and the ledger are the engine's own. Most CPUs inspect, more than prediction would take, so that
settling is the limit. The store is an S3 server on this machine behind a proxy that
keeps each answer back for `--delay-ms`. Flat: the driver's memory in the last block is at most 1.2 times that of the
first, its rate at least 0.8 times. The first block begins when its first slide is settled.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform"), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = f"{ROOT / 'platform'}:{ROOT}"  # of Ray's workers
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import pyarrow as pa  # noqa: E402
import ray  # noqa: E402
from chaos_store import on_s3  # noqa: E402
from slow_server import slow_server  # noqa: E402
from untrained_model import save_untrained  # noqa: E402

from mclstexp import object_store, storage  # noqa: E402
from mclstexp.config import Config, override  # noqa: E402
from mclstexp.data.spots import Batch  # noqa: E402
from mclstexp.model.version import ModelVersion  # noqa: E402
from mclstexp.prediction import pipeline, run  # noqa: E402
from mclstexp.prediction.cohort import Cohort, plan_of  # noqa: E402
from mclstexp.prediction.parts import (  # noqa: E402
    GRID_SCHEMA,
    PART_TILES,
    Inspection,
    SlideRecord,
    encode_part,
    staging_folder,
    write_inspection,
)
from mclstexp.prediction.plan import CohortPlan, SlideSource, fingerprint, key  # noqa: E402
from mclstexp.prediction.writers.slide import OutputInfo  # noqa: E402

TILE_PX, MPP, SIDE = 32, 0.5, 8
NUM_TILES = SIDE * SIDE
SETTINGS = {"tiles.size_px": TILE_PX, "tiles.mpp": MPP, "model.image_encoder": "small_cnn"}
PICTURE = np.full((SIDE * TILE_PX, SIDE * TILE_PX, 3), (230, 200, 220), np.uint8)
MIB = 2**20


@dataclass(frozen=True)
class SleepingInspect:
    """`pipeline.Inspect` of slides whose findings are known; its own class in each process of Ray."""

    plan: CohortPlan
    sleep_s: float

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """Takes a `SlideSource`, yields its stretch."""
        pipeline.inspect = self._inspect
        yield from pipeline.Inspect(self.plan)(batch)

    def _inspect(self, source: SlideSource, plan: CohortPlan) -> Inspection:
        found = fingerprint(source.image)
        time.sleep(self.sleep_s)
        inspection = Inspection(
            _record(source, found), staging_folder(plan.out, source.slide_id, key(source, found, plan))
        )
        write_inspection(inspection, _grid(), PICTURE, PICTURE)
        return inspection


class SleepingRead:
    """`pipeline.Read` with pixels that nobody looks at."""

    def __init__(self, plan: CohortPlan, sleep_s: float) -> None:
        pipeline.reader_of = lambda plan: _reader(sleep_s)  # type: ignore[assignment,return-value]
        self._read = pipeline.Read(plan)

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """Takes a stretch, yields its parts."""
        yield from self._read(batch)


class SleepingAnswer:
    """`pipeline.Answer` with a random answer."""

    def __init__(self, info: OutputInfo, sleep_s: float) -> None:
        rng, self._sleep_s = np.random.default_rng(0), sleep_s
        values = rng.random((NUM_TILES, info.num_values), np.float32)
        known = {name: rng.random(NUM_TILES, np.float32) for name in info.confidence}
        answer = SimpleNamespace(values=values, sums=rng.random(info.num_sums), confidence=known)
        self._part = encode_part(answer, np.ones(NUM_TILES, bool))

    def __call__(self, batch: Batch) -> Batch:
        """Takes a part with its pixels, returns it with its answer."""
        row = pipeline.Row.of(batch)
        time.sleep(self._sleep_s)
        answer = self._part if row.state == pipeline.TILES else b""
        return replace(row, pixels=None, complete=None, answer=answer).batch()


def _reader(sleep_s: float) -> SimpleNamespace:
    empty = {"pixels": np.zeros((PART_TILES, 4, 4, 3), np.uint8), "complete": np.arange(PART_TILES) < NUM_TILES}

    def read_part(*arguments: object) -> dict[str, np.ndarray]:
        time.sleep(sleep_s)
        return empty

    return SimpleNamespace(read_part=read_part, empty_part=lambda: empty, release=lambda: None)


def _record(source: SlideSource, found: str) -> SlideRecord:
    edge = SIDE * TILE_PX
    return SlideRecord(
        slide_id=source.slide_id,
        patient_id=source.patient_id,
        site="",
        image=source.image,
        fingerprint=found,
        width_px=edge,
        height_px=edge,
        mpp=MPP,
        mpp_source="image",
        scale=1.0,
        scanned_from_px=(0.0, 0.0),
        num_tiles=NUM_TILES,
        tile_area_mm2=1.0,
        tissue_area_mm2=1.0,
        missing_tiles=0,
        left_out_positions=0,
        thumbnail_scale=1.0,
        not_h_and_e="",
    )


def _grid() -> pa.Table:
    row, column = np.divmod(np.arange(NUM_TILES), SIDE)
    x_px, y_px = (index * TILE_PX + TILE_PX / 2 for index in (column, row))
    names = [f"{across}x{down}" for across, down in zip(column, row, strict=True)]
    share = np.ones(NUM_TILES, np.float32)
    columns = [names, row.astype(np.int32), column.astype(np.int32), x_px, y_px, x_px * MPP, y_px * MPP, share]
    return pa.table(columns, schema=GRID_SCHEMA)


@dataclass
class Blocks:
    """A `Show` that notes time, memory and CPU time of this process after each block of slides."""

    size: int
    points: list[tuple[int, float, float, float]] = field(default_factory=list)
    """Slides settled, seconds, MiB, CPU-seconds."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """Takes the number of slides settled."""
        last = self.points[-1][0] if self.points else 0
        if done and (not self.points or done // self.size > last // self.size):
            memory = psutil.Process().memory_full_info().uss / MIB
            self.points.append((done, time.monotonic(), memory, time.process_time()))
            if len(self.points) > 1:
                num, seconds, _, cpu_s = np.subtract(self.points[-1], self.points[-2])
                each = f"driver {memory:6.0f} MiB, {cpu_s / num * 1000:5.1f} CPU-ms each"
                print(f"{done:6} slides: {num / seconds:6.1f}/s, {each}", flush=True)

    def summary(self) -> str:
        """Returns the last block over the first."""
        steps = np.diff(np.array(self.points), axis=0)
        rates, memories = steps[:, 0] / steps[:, 1], [memory for _, _, memory, _ in self.points[1:]]
        return f"last over first: rate {rates[-1] / rates[0]:.2f}, memory {memories[-1] / memories[0]:.2f}"


def cohort_of(root: str, num_slides: int, model: ModelVersion, config: Config) -> Cohort:
    """Returns a cohort of small objects that nobody opens, after writing them."""
    uris = [storage.join(root, "slides", f"S{number:05d}.svs") for number in range(num_slides)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda uri: storage.write(uri, uri.encode()), uris))
    sources = [SlideSource(Path(uri).stem, "P", "", uri, None) for uri in uris]
    return Cohort(sources, plan_of(model, storage.join(root, "out"), config.predict, None))


def predict(model: ModelVersion, cohort: Cohort, config: Config, sleeps_s: list[float], blocks: Blocks) -> run.Report:
    """Predicts the cohort by stages that sleep."""
    info = OutputInfo.of_model(model)
    stages = {
        "Inspect": lambda plan: SleepingInspect(plan, sleeps_s[0]),
        "Read": _with(SleepingRead, sleeps_s[1]),
        "Answer": _with(SleepingAnswer, sleeps_s[2], info),
        "answerer_for": lambda model, plan: None,
    }
    for name, stage in stages.items():
        setattr(pipeline, name, stage)
    run.worker_counts = lambda *_: pipeline.WorkerCounts(4, 2, False)  # leaves the other CPUs to inspect slides
    return run.predict_cohort(model, cohort, cohort.plan.out, blocks, config.predict)


def _with(stage: type, sleep_s: float, first: object = None) -> type:
    """Returns the class of a stage that sleeps so long, and ignores what the engine gives its own beyond the plan."""

    class Sleeping(stage):
        def __init__(self, given: object, *others: object) -> None:
            super().__init__(first or given, sleep_s)

    return Sleeping


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=2000)
    parser.add_argument("--block", type=int, default=200, help="slides of a line that is printed")
    parser.add_argument("--delay-ms", type=float, default=30.0, help="of each request to the store")
    parser.add_argument("--genes", type=int, default=100)
    parser.add_argument("--cpus", type=int, default=14, help="logical CPUs of Ray, all but 6 inspect slides")
    parser.add_argument("--sleep-ms", default="100,100,50", help="of inspecting, reading and answering a slide")
    arguments = parser.parse_args()
    sleeps_s = [float(sleep) / 1000 for sleep in arguments.sleep_ms.split(",")]
    config, blocks = Config(), Blocks(arguments.block)
    with tempfile.TemporaryDirectory(prefix="many-") as scratch, on_s3(Path(scratch)) as store:
        save_untrained(Path(scratch, "model"), SETTINGS, arguments.genes, 500)
        model = ModelVersion.load(Path(scratch, "model"))
        cohort = cohort_of(store.root, arguments.slides, model, override(config, {"predict.num_gpus": 0}))
        with slow_server(os.environ["AWS_ENDPOINT_URL"], arguments.delay_ms / 1000) as endpoint:
            os.environ["AWS_ENDPOINT_URL"] = endpoint
            object_store._client_of.cache_clear()
            ray.init("local", num_cpus=arguments.cpus, object_store_memory=400 * MIB, log_to_driver=False)
            started = time.monotonic()
            num_reached = len(cohort.fingerprints)
            print(f"{num_reached / (time.monotonic() - started):.0f} fingerprints/s", flush=True)
            started = time.monotonic()
            report = predict(model, cohort, override(config, {"predict.num_gpus": 0}), sleeps_s, blocks)
            seconds = time.monotonic() - started
            print(f"{dict(report.counts())} in {seconds:.0f} s", flush=True)
            print(blocks.summary())
            ray.shutdown()


if __name__ == "__main__":
    main()
