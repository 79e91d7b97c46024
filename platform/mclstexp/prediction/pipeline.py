"""From slides to written parts: one Ray Data chain, inspect -> read -> answer -> write.

A stretch is what one task reads: long enough to pay for opening a slide, short enough that several readers share a
large one; a plain image, which each of them would decode whole, is a single stretch. Every row is a block of its own,
and Ray stops a reader that is two blocks ahead, so that memory depends on the number of readers and not on the size of
a slide. Images go no further than the step that answers; behind it a row carries the answer as bytes, so that embedders
do not wait for the store. Answering and writing are actors of several threads, so that the device embeds one part while
others are unpacked, weighed and written.

Rows come in any order and state where they belong; a fault of a slide is a row too. A process that dies is started
again a few times; then its parts stay missing, and the caller sees it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from mclstexp import storage
from mclstexp.cluster import KEEPING_MEMORY, MAX_RETRIES, ordered
from mclstexp.data.spots import Batch
from mclstexp.errors import ResourceError, SourceError, UserError
from mclstexp.prediction.feature_slides import FeatureReader
from mclstexp.prediction.inspect import inspect
from mclstexp.prediction.parts import (
    PART_TILES,
    SlideRecord,
    encode_part,
    num_parts,
    parts_done,
    read_grid,
    read_record,
    write_part,
)
from mclstexp.prediction.plan import CohortPlan, SlideSource
from mclstexp.prediction.tile_reader import TileReader
from mclstexp.settings import PredictConfig

if TYPE_CHECKING:  # the steps before the answer start without torch
    import torch

    from mclstexp.model.answer import Answerer
    from mclstexp.model.version import ModelVersion

TILES, NOTHING_LEFT, QUARANTINED, FAILED = "tiles", "nothing_left", "quarantined", "failed"
"""States of a row: tiles of a part; all parts are written; the slide's own fault; a fault that may pass."""
CPUS_PER_INSPECTION = 8
"""CPUs that read or inspect, for each one that inspects."""
STRETCH_PARTS = 16
"""Most parts of a pyramid that one task reads: 4,096 tiles."""
PARTS_ON_GPU, PARTS_ON_CPU = 4, 2
"""Parts that an embedder has under way at once; as many more wait for it."""
WRITES_AT_ONCE = 16
"""Parts that one process writes at once: it waits for the store."""
NO_PROGRESS_S = 6 * 3600.0
"""Without a row for so long, the run ends with an error."""
_NO_PART = -1
_TASK: dict[str, Any] = {"batch_size": 1, "max_retries": MAX_RETRIES}
_ACTOR: dict[str, Any] = {"batch_size": 1, "max_restarts": -1, "max_task_retries": MAX_RETRIES}
"""No other actor replaces a dead one, so it restarts without limit; the retries of its tasks are bounded."""


@dataclass(frozen=True)
class Row:
    """A row of the chain: a stretch behind `Inspect`, a part behind `Read`. None: not a column of that step's rows."""

    slide_id: str
    image_uri: str
    staging: str = ""
    """URI of the slide's staging folder; empty if there is none."""
    state: str = TILES
    reason: str = ""
    """Of a fault."""
    num_parts: int = 0
    """Parts of the slide."""
    num_left: int = 0
    """Of them, those that were missing when the slide was inspected."""
    parts: str | None = None
    """inspect -> read: numbers of the stretch's parts, with spaces."""
    part: int | None = None
    """From read on: the part's number; -1 in rows of another state than `tiles`."""
    num_tiles: int | None = None
    """From read on: tiles of the part."""
    pixels: np.ndarray | None = None
    """read -> answer: uint8 (256, size, size, 3), zero behind the last tile and where the slide has no pixels."""
    second_pixels: np.ndarray | None = None
    """read -> answer: the same of the model's second view, where it has one; `pixels` are of the first."""
    features: np.ndarray | None = None
    """read -> answer, in the place of pixels: float32 (256, F), zero behind the last tile."""
    complete: np.ndarray | None = None
    """read -> answer: bool (256,), False for the same tiles."""
    answer: bytes | None = None
    """answer -> write: the part's file; empty in rows of another state than `tiles`."""

    @property
    def inputs(self) -> tuple[np.ndarray, ...]:
        """What the model embeds: the part's tiles, or their features."""
        return tuple(
            values[: self.num_tiles]
            for values in (self.pixels, self.second_pixels, self.features)
            if values is not None
        )

    @classmethod
    def of(cls, batch: Batch) -> "Row":
        """Returns the single row of a batch."""
        values = {name: column[0] for name, column in batch.items()}
        return cls(**{name: v.item() if isinstance(v, np.generic) else v for name, v in values.items()})

    def batch(self) -> Batch:
        """Returns the row as a batch."""
        columns = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                kind = object if isinstance(value, str | bytes) else None
                columns[field.name] = np.array([value], kind)
        return columns


@dataclass(frozen=True)
class WorkerCounts:
    """Actors of each step that the cluster has room for."""

    num_readers: int
    num_embedders: int
    uses_gpu: bool


def cluster_size(config: PredictConfig) -> tuple[int, int]:
    """Returns the CPUs and GPUs that prediction uses: those of the settings, else all that the cluster has."""
    resources = ray.cluster_resources()
    num_gpus = config.num_gpus if config.num_gpus is not None else int(resources.get("GPU", 0))
    return config.num_cpus or int(resources.get("CPU", 0)), num_gpus


def worker_counts(num_cpus: int, num_gpus: int) -> WorkerCounts:
    """Returns how many actors share a cluster: without GPUs half of the CPUs embed; of the others most read.

    They leave one CPU in `CPUS_PER_INSPECTION` to inspect slides, which takes half a CPU-second and several requests.

    Raises:
        ResourceError: there are too few CPUs for one of each, so that the run would wait for ever.
    """
    needed = 2 if num_gpus else 3
    if num_cpus < needed:
        raise ResourceError(
            f"prediction needs {needed} CPU(s) ({'' if num_gpus else 'one to embed tiles, '}one to read them, one to "
            f"inspect slides), it has {num_cpus}; raise predict.num_cpus, or cluster.local_cpus on one machine, or "
            "add a node"
        )
    embedders = num_gpus or max(1, (num_cpus - 1) // 2)
    others = num_cpus - (0 if num_gpus else embedders)
    return WorkerCounts(others - max(1, others // CPUS_PER_INSPECTION), embedders, bool(num_gpus))


def pipeline(sources: Sequence[SlideSource], plan: CohortPlan, model: "ModelVersion", workers: WorkerCounts) -> Dataset:
    """Returns a lazy stream with one `Row` per part missing in the slides' staging folders, after the part is written.

    Rows of another state than `tiles` report a slide. Ray must be connected.

    Args:
        sources: the slides.
        plan: how they become tiles.
        model: the version that answers.
        workers: actors of each step.
    """
    rows = [asdict(source) | {"mpp": np.nan if source.mpp is None else source.mpp} for source in sources]
    read_plan = replace(plan, positions={})  # only inspection needs all slides' positions
    with _one_row_per_block():
        return (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            # Ray would fuse inspecting and reading into one task, were it not for their different retries.
            .map_batches(Inspect(plan), num_cpus=1, **_TASK)  # type: ignore[arg-type]
            .map_batches(
                Read,
                fn_constructor_args=(read_plan,),
                compute=ActorPoolStrategy(
                    min_size=1,
                    max_size=workers.num_readers,
                    initial_size=min(workers.num_readers, len(rows)),
                    max_tasks_in_flight_per_actor=1,  # a slide that kills its reader takes no waiting one with it
                ),
                num_cpus=1,
                **_ACTOR,
            )
            .map_batches(
                Answer,
                fn_constructor_args=(ray.put(answerer_for(model, plan)), workers.uses_gpu),  # once for all actors
                compute=_threads(PARTS_ON_GPU if workers.uses_gpu else PARTS_ON_CPU, workers.num_embedders),
                num_gpus=1 if workers.uses_gpu else None,
                num_cpus=0 if workers.uses_gpu else 1,
                runtime_env=KEEPING_MEMORY,
                **_ACTOR,
            )
            .map_batches(
                Write,
                compute=_threads(WRITES_AT_ONCE, workers.num_embedders),
                num_cpus=0,  # it waits for the store
                **_ACTOR,
            )
        )


def stretch_parts(record: SlideRecord) -> int:
    """Returns the most parts of a slide that one task reads."""
    return STRETCH_PARTS if record.reads_regions else max(1, num_parts(record.num_tiles))


def embedding_device(uses_gpu: bool) -> "torch.device":
    """Returns the device that embeds; a process that reserved no GPU may still see one."""
    import torch

    return torch.device("cuda" if uses_gpu and torch.cuda.is_available() else "cpu")


def reader_of(plan: CohortPlan) -> TileReader | FeatureReader:
    """Returns what reads the parts of a plan's slides."""
    return TileReader(plan) if plan.features is None else FeatureReader(plan)


def answerer_for(model: "ModelVersion", plan: CohortPlan) -> "Answerer":
    """Returns what answers the parts of a plan's slides.

    Raises:
        ModelError: the weights of its frozen encoder cannot be found.
    """
    from mclstexp.model.answer import answerer_of

    return answerer_of(model, of_features=plan.features is not None)


@dataclass(frozen=True)
class Inspect:
    """The task that inspects one slide: yields its stretches, or one row that states why there is none."""

    plan: CohortPlan

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """Takes a `SlideSource`, yields stretches."""
        columns = {name: values.tolist()[0] for name, values in batch.items()}
        source = SlideSource(**columns | {"mpp": None if np.isnan(columns["mpp"]) else columns["mpp"]})
        row = Row(source.slide_id, source.image, parts="")
        try:
            inspection = inspect(source, self.plan)
            done = parts_done(inspection.staging)
        except Exception as error:  # no fault of a slide stops another one
            yield _faulty(row, error).batch()
            return
        record = inspection.record
        parts = range(num_parts(record.num_tiles))
        missing = [part for part in parts if part not in done]
        row = replace(row, staging=inspection.staging, num_parts=len(parts), num_left=len(missing))
        if not missing:
            yield replace(row, state=NOTHING_LEFT).batch()
        step = stretch_parts(record)
        for start in range(0, len(missing), step):
            yield replace(row, parts=" ".join(map(str, missing[start : start + step]))).batch()


class Read:
    """The actor that reads stretches: yields one row per part.

    It keeps the last local pyramid or feature file open. It releases remote slides after each stretch, because a node's
    scratch folder waits for whoever holds one, and plain images, because they fill memory.
    """

    def __init__(self, plan: CohortPlan) -> None:
        self._reader = reader_of(plan)

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """Takes a stretch, yields its parts with their pixels or features."""
        stretch = Row.of(batch)
        row = replace(stretch, parts=None)
        if stretch.state != TILES:
            yield self._without_tiles(row).batch()
            return
        try:
            record = read_record(stretch.staging)
            table = read_grid(stretch.staging, record.num_tiles)
            for part in map(int, str(stretch.parts).split()):
                tiles = table.slice(part * PART_TILES, PART_TILES)
                columns: dict[str, Any] = self._reader.read_part(stretch.image_uri, tiles, record)
                yield replace(row, part=part, num_tiles=len(tiles), **columns).batch()
            if not record.reads_regions:
                self._reader.release()
        except Exception as error:  # no fault of a slide stops another one
            self._reader.release()
            yield self._without_tiles(_faulty(row, error)).batch()
        finally:
            if storage.is_s3(stretch.image_uri):
                self._reader.release()

    def _without_tiles(self, row: Row) -> Row:
        columns: dict[str, Any] = self._reader.empty_part()
        return replace(row, part=_NO_PART, num_tiles=0, **columns)


class Answer:
    """The actor that answers parts, each in a thread."""

    def __init__(self, answerer: ray.ObjectRef, uses_gpu: bool) -> None:
        self._answer = ray.get(answerer).build(embedding_device(uses_gpu))

    def __call__(self, batch: Batch) -> Batch:
        """Takes a part with its pixels, returns it with its answer."""
        row = Row.of(batch)
        answered = replace(row, pixels=None, second_pixels=None, features=None, complete=None, answer=b"")
        if row.state != TILES:
            return answered.batch()
        assert row.complete is not None
        try:
            complete = row.complete[: row.num_tiles]
            return replace(answered, answer=encode_part(self._answer(row.inputs, complete), complete)).batch()
        except Exception as error:  # a full GPU, perhaps: it may be free when the slide is tried again
            return _failed(answered, error).batch()


class Write:
    """The actor that writes parts into their slides' staging folders, each in a thread."""

    def __call__(self, batch: Batch) -> Batch:
        """Takes a part with its answer, returns it without."""
        row = Row.of(batch)
        written = replace(row, answer=None)
        if row.state != TILES:
            return written.batch()
        assert row.part is not None
        assert row.answer is not None
        try:
            write_part(row.staging, row.part, row.answer)
            return written.batch()
        except Exception as error:  # a full store, perhaps
            return _failed(written, error).batch()


def _threads(number: int, num_actors: int) -> ActorPoolStrategy:
    """Returns a pool of actors that work in threads. Twice as many parts in flight keep them busy, and let it grow.

    The price: if an actor dies, all of these are tried again.
    """
    return ActorPoolStrategy(
        min_size=1,
        max_size=num_actors,
        max_concurrent_calls_per_actor=number,
        max_tasks_in_flight_per_actor=2 * number,
        enable_true_multi_threading=True,  # else Ray calls a class in one thread
    )


@contextmanager
def _one_row_per_block() -> Iterator[None]:
    """Datasets made inside stream rows one by one in any order, and survive the loss of blocks."""
    with ordered():
        context = DataContext.get_current()
        context.execution_options.preserve_order = False
        context.target_max_block_size = 1  # byte: a block is closed after each row
        context.max_errored_blocks = -1  # the caller sees which parts are missing
        context.execution_no_progress_timeout_s = NO_PROGRESS_S
        yield


def _faulty(row: Row, error: Exception) -> Row:
    """Returns the row of a fault: the slide's own, or one that may pass, such as a missing file."""
    if isinstance(error, SourceError):
        return replace(row, state=QUARANTINED, reason=str(error))
    if isinstance(error, FileNotFoundError):
        return replace(row, state=FAILED, reason=f"there is no file {error}")
    return _failed(row, error)


def _failed(row: Row, error: Exception) -> Row:
    """Returns the row of a fault that may pass."""
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return replace(row, state=FAILED, reason=reason)
