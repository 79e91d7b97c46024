"""From slides to a Ray Dataset of tile batches: inspect, cut into stretches, read; one row a part, as it comes.

A stretch is what one task reads: long enough to pay for opening a slide, short enough that several readers share a
large one; a plain image, which each of them would decode whole, is a single stretch. Every row is a block of its own,
and Ray stops a reader that is two blocks ahead, so that memory is bounded by the number of readers and not by a
slide's size. Rows come in any order and say where they belong; what a slide does wrong is a row too. A process that
dies is started again a few times; then its parts stay missing, for the caller to see.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext, Dataset

from mclstexp import storage
from mclstexp.cluster import MAX_RETRIES, ordered
from mclstexp.data.genes import normalisers
from mclstexp.data.spots import Batch
from mclstexp.errors import ResourceError, SourceError, UserError
from mclstexp.model.bank import Bank
from mclstexp.model.embed import ImageNetwork, network_of
from mclstexp.model.nearest import Keys
from mclstexp.model.retrieval import Retrieved, regressed, resolve, retrieve
from mclstexp.model.version import ModelVersion
from mclstexp.prediction.inspect import corners, inspect
from mclstexp.prediction.parts import (
    FAILED,
    NOTHING_LEFT,
    PART_TILES,
    QUARANTINED,
    TILES,
    SlideRecord,
    num_parts,
    parts_done,
    write_part,
)
from mclstexp.prediction.plan import CohortPlan, SlideSource
from mclstexp.prediction.slide_cache import staged
from mclstexp.prediction.writers.table import OutputInfo, read_grid, read_record
from mclstexp.settings import PredictConfig, RetrievalConfig, TilesConfig
from mclstexp.slides.codec import decode_tile, encode_tile
from mclstexp.slides.slide import Slide, open_slide

STRETCH_PARTS = 16
"""Most parts of a pyramid that one task reads: 4,096 tiles."""
_NO_PART = -1
NO_PROGRESS_S = 6 * 3600.0
"""Without a row for so long, the run ends with an error."""


def tile_batches(sources: Sequence[SlideSource], plan: CohortPlan) -> ray.data.Dataset:
    """Returns the tiles of all parts that the slides' staging folders lack, one row a part, in any order.

    Columns: slide_id; staging (URI of the folder, empty where there is none yet); part, and num_left, the parts that
    its slide lacks; image uint8 (256, size, size, 3), zero where there is no tile; complete bool (256,), False where
    the slide has no pixels or the part is over; num_tiles, the tiles of the part; state; reason. Tiles went through
    the encoding of the model's own. Rows of a state other than `tiles` have part -1 and no tile.
    """
    rows = [asdict(source) | {"mpp": np.nan if source.mpp is None else source.mpp} for source in sources]
    with _row_a_block():
        return (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            # Ray would join inspection and reading into one task, were it not for their different retries.
            .map_batches(cast(Any, _Inspect(plan)), batch_size=1, num_cpus=1, max_retries=MAX_RETRIES)
            .map_batches(
                _Read,
                fn_constructor_args=(replace(plan, positions={}),),  # only inspection needs all slides' positions
                batch_size=1,
                compute=ActorPoolStrategy(
                    min_size=1,
                    max_size=plan.num_readers,
                    initial_size=min(plan.num_readers, len(rows)),
                    max_tasks_in_flight_per_actor=1,  # a slide that kills its reader takes no waiting one with it
                ),
                num_cpus=1,
                max_restarts=-1,  # a dead actor is not replaced by another; its tasks' retries are what is bounded
                max_task_retries=MAX_RETRIES,
            )
        )


def stretch_parts(record: SlideRecord) -> int:
    """Returns the most parts of a slide that one task reads."""
    return STRETCH_PARTS if record.reads_regions else max(1, num_parts(record.num_tiles))


def as_stored(tile: np.ndarray, tiles: TilesConfig) -> np.ndarray:
    """Returns a tile, uint8 (size, size, 3), with the pixels that it would have in a tile table."""
    if tiles.encoding == "png":  # exact
        return tile
    return decode_tile(encode_tile(tile, tiles.encoding, tiles.jpeg_quality))


@contextmanager
def _row_a_block() -> Iterator[None]:
    """Datasets made inside stream rows one by one in any order, and bear the loss of blocks."""
    with ordered():
        context = DataContext.get_current()
        context.execution_options.preserve_order = False
        context.target_max_block_size = 1  # byte: a block is closed after each row
        context.max_errored_blocks = -1  # the caller sees which parts are missing
        context.execution_no_progress_timeout_s = NO_PROGRESS_S
        yield


@dataclass(frozen=True)
class _Inspect:
    """The task over one slide: yields its stretches, or one row that says why there is none."""

    plan: CohortPlan

    def __call__(self, rows: Batch) -> Iterator[Batch]:
        fields = {name: values.tolist()[0] for name, values in rows.items()}
        source = SlideSource(**fields | {"mpp": None if np.isnan(fields["mpp"]) else fields["mpp"]})
        try:
            inspection = inspect(source, self.plan)
            total = num_parts(inspection.record.num_tiles)
            there = parts_done(inspection.staging)
        except Exception as error:  # whatever is wrong with a slide stops no other
            yield _stretch(source, "", [], 0, *_verdict(error))
            return
        missing = [part for part in range(total) if part not in there]
        if not missing:
            yield _stretch(source, inspection.staging, [], 0, NOTHING_LEFT, "")
        step = stretch_parts(inspection.record)
        for start in range(0, len(missing), step):
            yield _stretch(source, inspection.staging, missing[start : start + step], len(missing), TILES, "")


class _Read:
    """The actor that reads stretches; it keeps the last local pyramid open. Remote slides it lets go after each
    stretch, since a node's scratch folder waits for its holders, and plain images, which fill memory.
    """

    def __init__(self, plan: CohortPlan) -> None:
        self._plan = plan
        self._held = ExitStack()
        self._image: str | None = None
        self._slide: Slide | None = None

    def __call__(self, rows: Batch) -> Iterator[Batch]:
        stretch = {name: values.tolist()[0] for name, values in rows.items()}
        if stretch["state"] != TILES:
            yield self._row(stretch, _NO_PART, [], stretch["state"], stretch["reason"])
            return
        try:
            record = read_record(stretch["staging"])
            table = read_grid(stretch["staging"], record.num_tiles)
            left, top = corners(table, self._plan.tiles.size_px, record.scale)
            for part in map(int, stretch["parts"].split()):
                rows_of = slice(part * PART_TILES, (part + 1) * PART_TILES)
                tiles = self._tiles(stretch["image"], left[rows_of], top[rows_of], record.scale)
                yield self._row(stretch, part, tiles, TILES, "")
            if not record.reads_regions:
                self._release()
        except Exception as error:  # whatever is wrong with a slide stops no other
            self._release()
            yield self._row(stretch, _NO_PART, [], *_verdict(error))
        finally:
            if storage.is_s3(stretch["image"]):
                self._release()

    def _tiles(self, image: str, left: np.ndarray, top: np.ndarray, scale: float) -> list[np.ndarray | None]:
        return [self._tile(image, x, y, scale) for x, y in zip(left.tolist(), top.tolist(), strict=True)]

    def _tile(self, image: str, left: float, top: float, scale: float) -> np.ndarray | None:
        size_px = self._plan.tiles.size_px
        try:
            tile = self._open(image).read_tile(left, top, size_px, scale)
        except SourceError:  # OpenSlide repeats its first error for ever: only a new handle tells whether it passed
            self._release()
            tile = self._open(image).read_tile(left, top, size_px, scale)
        return None if tile is None else as_stored(tile, self._plan.tiles)

    def _open(self, image: str) -> Slide:
        if self._slide is None or self._image != image:
            self._release()
            path = self._held.enter_context(staged(image, self._plan.scratch, self._plan.scratch_budget_bytes))
            self._slide, self._image = self._held.enter_context(open_slide(path)), image
        return self._slide

    def _release(self) -> None:
        self._slide = None
        self._held.close()

    def _row(
        self, stretch: dict[str, Any], part: int, tiles: list[np.ndarray | None], state: str, reason: str
    ) -> Batch:
        size_px = self._plan.tiles.size_px
        image, complete = np.zeros((1, PART_TILES, size_px, size_px, 3), np.uint8), np.zeros((1, PART_TILES), bool)
        for place, tile in enumerate(tiles):
            if tile is not None:
                image[0, place], complete[0, place] = tile, True
        return {
            **{name: np.array([stretch[name]], object) for name in ("slide_id", "staging")},
            "part": np.array([part]),
            "num_left": np.array([stretch["num_left"]]),
            "image": image,
            "complete": complete,
            "num_tiles": np.array([len(tiles)]),
            "state": np.array([state], object),
            "reason": np.array([reason], object),
        }


def _verdict(error: Exception) -> tuple[str, str]:
    """Returns the state and reason of a fault: the slide's own, or one that may pass, such as a file that is away."""
    if isinstance(error, SourceError):
        return QUARANTINED, str(error)
    if isinstance(error, FileNotFoundError):
        return FAILED, f"there is no file {error}"
    return FAILED, str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _stretch(source: SlideSource, staging: str, parts: list[int], num_left: int, state: str, reason: str) -> Batch:
    texts = {"slide_id": source.slide_id, "image": source.image, "staging": staging, "state": state, "reason": reason}
    texts |= {"parts": " ".join(map(str, parts))}
    return {name: np.array([text], object) for name, text in texts.items()} | {"num_left": np.array([num_left])}


@dataclass(frozen=True)
class WorkerCounts:
    """Actors of each stage that the cluster has room for."""

    num_readers: int
    num_embedders: int
    uses_gpu: bool


def cluster_size(config: PredictConfig) -> tuple[int, int]:
    """Returns the CPUs and GPUs that prediction uses: those that it was told to, else all that the cluster has."""
    there = ray.cluster_resources()
    num_gpus = config.num_gpus if config.num_gpus is not None else int(there.get("GPU", 0))
    return config.num_cpus or int(there.get("CPU", 0)), num_gpus


def stages(num_cpus: int, num_gpus: int) -> WorkerCounts:
    """Returns how a cluster is dealt out: a CPU to look at slides, the rest to reading and, without GPUs, embedding.

    Raises:
        ResourceError: there are too few CPUs for one of each, where the run would wait for ever.
    """
    needed = 2 if num_gpus else 3
    if num_cpus < needed:
        raise ResourceError(
            f"prediction needs {needed} CPU(s) ({'' if num_gpus else 'one to embed tiles, '}one to read them, one to "
            f"look at slides), it has {num_cpus}; raise predict.num_cpus, or cluster.local_cpus on one machine, or "
            "add a node"
        )
    embedders = num_gpus or max(1, (num_cpus - 1) // 2)
    return WorkerCounts(num_cpus - 1 - (0 if num_gpus else embedders), embedders, bool(num_gpus))


def predicted_parts(tiles: Dataset, model: ModelVersion, dealt: WorkerCounts) -> Dataset:
    """Returns what became of each part: the rows of `tiles` without their images, after each part was written.

    Args:
        tiles: one row a part, as `ingest.cohort.tile_batches` makes them; rows of another state than `tiles` pass.
        model: the version to predict with.
        dealt: as `stages` returns it.
    """
    bank = model.bank
    config = model.config.retrieval if bank is None else resolve(model.config.retrieval, len(bank))
    with ordered():  # for its warnings alone: a Dataset keeps the context that it was made in
        return tiles.map_batches(
            _Predict,
            fn_constructor_args=(ray.put(network_of(model)), ray.put(bank), config, dealt.uses_gpu),
            batch_size=1,
            compute=ActorPoolStrategy(min_size=1, max_size=dealt.num_embedders),
            num_gpus=1 if dealt.uses_gpu else None,
            num_cpus=0 if dealt.uses_gpu else 1,
            max_restarts=-1,  # as of readers: a dead actor is not replaced by another
            max_task_retries=MAX_RETRIES,
        )


def embedding_device(uses_gpu: bool) -> torch.device:
    """Returns what tiles are embedded on; a process that reserved no GPU may see one all the same."""
    return torch.device("cuda" if uses_gpu and torch.cuda.is_available() else "cpu")


def facts_of(model: ModelVersion) -> OutputInfo:
    """Returns what the files of a prediction say of its model."""
    unit = normalisers(model.config.genes)[1].unit()
    return OutputInfo(model.panel, unit, model.digest, model.tile_size_px, model.mpp, model.ood_similarity)


class _Predict:
    """Embeds a part's tiles, asks the bank and writes the part."""

    def __init__(
        self,
        network: ray.ObjectRef,
        bank: ray.ObjectRef,
        config: RetrievalConfig,
        uses_gpu: bool,
    ) -> None:
        built: ImageNetwork = ray.get(network)
        self._bank: Bank | None = ray.get(bank)
        device = embedding_device(uses_gpu)
        self._embed = built.build(device)
        self._keys = None if self._bank is None else Keys(self._bank.directions, device)
        self._config = config

    def __call__(self, batch: Batch) -> Batch:
        row = {name: values[0] for name, values in batch.items()}
        image, complete = row.pop("image"), row.pop("complete")
        if row["state"] == TILES:
            num_tiles = int(row["num_tiles"])
            try:
                found = self.answer(image[:num_tiles])
                write_part(str(row["staging"]), int(row["part"]), found, complete[:num_tiles])
            except Exception as error:  # of a full GPU or store; it may be gone when the slide is tried again
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                row |= {"state": FAILED, "reason": reason}
        return {name: np.array([value]) for name, value in row.items()}

    def answer(self, tiles: np.ndarray) -> Retrieved:
        """Returns what the model says of tiles, uint8 (n, size, size, 3)."""
        queries = self._embed(tiles)
        return regressed(queries) if self._bank is None else retrieve(queries, self._bank, self._config, self._keys)
