"""Forecast of what predicting a cohort will take, before anything is spent: slides inspected, a few tiles timed.

Tissue tiles are counted as a run would count them; of a large cohort some slides, spread evenly, represent the others.
Reading and embedding are timed on a few tiles, on this machine or, if a cluster has GPUs, on one of those; all other
machines are assumed to be equal.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch

from mclstexp.cluster import guarded
from mclstexp.errors import SourceError, UserError
from mclstexp.messages import duration
from mclstexp.model.version import ModelVersion
from mclstexp.prediction.cohort import Cohort
from mclstexp.prediction.inspect import inspect
from mclstexp.prediction.parts import PART_TILES, Inspection, num_parts, read_grid
from mclstexp.prediction.pipeline import WorkerCounts, answerer_for, embedding_device, reader_of, stretch_parts
from mclstexp.prediction.plan import CohortPlan, SlideSource
from mclstexp.prediction.slide_cache import clear
from mclstexp.prediction.writers.slide import OutputInfo
from mclstexp.slides.plain import PLAIN_BYTES_PER_PX

MAX_INSPECTED = 24
"""Slides that are opened."""
_MAX_GPU_WAIT_S = 120.0
_TIMED_TILES = 32
_BYTES_PER_VALUE = 8  # float32 in Parquet and in .h5ad, before compression
_STAGED_BYTES_PER_VALUE = 4
_PARTS_IN_FLIGHT = 4  # for each reader: Ray stops one that is two ahead, others are on their way
_ANSWERS_IN_FLIGHT = 2  # for each embedder: one is written while the next is made


@dataclass(frozen=True)
class _Rates:
    """Seconds per tile for one process, and whether it had a GPU."""

    read_s: float
    embed_s: float
    on_gpu: bool


def forecast(cohort: Cohort, model: ModelVersion, workers: WorkerCounts) -> str:
    """Returns the plan in words: slides, tiles, time, memory, disk, size of the output.

    Raises:
        UserError: none of the slides that were inspected can be predicted; gives the first reason.
    """
    picked = [cohort.sources[index] for index in _spread(len(cohort.sources), MAX_INSPECTED)]
    with tempfile.TemporaryDirectory() as scratch:
        plan = replace(cohort.plan, out=scratch)
        found, faults = _inspected(picked, plan)
        if not found:
            raise UserError(f"none of the {len(picked)} slides that were inspected can be predicted: {faults[0]}")
        rates = _timed(plan, found, model, workers.uses_gpu)
    return _in_words(cohort, model, workers, found, faults, rates)


def forecast_on_a_gpu(cohort: Cohort, model: ModelVersion, workers: WorkerCounts) -> str:
    """Returns the same as `forecast`, timed on one of the cluster's GPUs if it has any. Ray must be connected.

    Raises:
        UserError: as `forecast`.
    """
    if not (workers.uses_gpu and ray.cluster_resources().get("GPU")):
        return forecast(cohort, model, workers)
    actor: Any = ray.remote(num_cpus=0, num_gpus=1)(_OnGpu).remote()
    if not ray.wait([actor.is_up.remote()], timeout=_MAX_GPU_WAIT_S)[0]:  # others may use all of them
        ray.kill(actor)
        return forecast(cohort, model, workers)
    plan = ray.get(actor.forecast.remote(cohort, model, workers))
    if isinstance(plan, UserError):
        raise plan
    return str(plan)


class _OnGpu:
    """The actor that makes the forecast on a node with a GPU."""

    def is_up(self) -> bool:
        return True

    def forecast(self, cohort: Cohort, model: ModelVersion, workers: WorkerCounts) -> str | UserError:
        try:
            return guarded(forecast, cohort, model, workers)
        finally:
            clear(cohort.plan.scratch)


def _spread(number: int, most: int) -> list[int]:
    """Returns at most `most` of the first `number` integers, evenly spread."""
    return sorted(set(np.linspace(0, number - 1, min(number, most)).astype(int).tolist()))


def _inspected(
    sources: Sequence[SlideSource], plan: CohortPlan
) -> tuple[list[tuple[SlideSource, Inspection]], list[str]]:
    """Returns the slides that can be predicted, and a line for each other one."""
    found, faults = [], []
    for source in sources:
        inspection = guarded(inspect, source, plan)
        if isinstance(inspection, UserError):
            faults.append(f"{source.slide_id}: {inspection}")
        else:
            found.append((source, inspection))
    return found, faults


def _timed(
    plan: CohortPlan, found: Sequence[tuple[SlideSource, Inspection]], model: ModelVersion, uses_gpu: bool
) -> _Rates:
    """Reads some tiles of the slide that has most, and predicts them."""
    source, inspection = max(found, key=lambda slide: slide[1].record.num_tiles)
    if not inspection.record.num_tiles:
        raise SourceError(f"none of the {len(found)} slides inspected shows tissue; lower predict.min_tissue")
    timed = read_grid(inspection.staging, inspection.record.num_tiles).slice(0, _TIMED_TILES)
    with reader_of(plan) as reader:
        reader.open(source.image)
        started = time.perf_counter()
        try:
            columns = reader.read_part(source.image, timed, inspection.record)
        except SourceError as error:
            raise SourceError(f"slide {source.slide_id} cannot be timed: {error}") from error
        read_s = time.perf_counter() - started
    complete = np.flatnonzero(columns.pop("complete"))
    if not len(complete):
        raise SourceError(f"slide {source.slide_id} has no pixels at its tissue")
    torch.set_num_threads(1)  # as each actor has one CPU
    device = embedding_device(uses_gpu)
    answer = answerer_for(model, plan).build(device)
    batch = tuple(values[np.resize(complete, _TIMED_TILES)] for values in columns.values())
    answer(tuple(values[:1] for values in batch), np.ones(1, bool))
    started = time.perf_counter()
    answer(batch, np.ones(_TIMED_TILES, bool))
    return _Rates(read_s / len(timed), (time.perf_counter() - started) / _TIMED_TILES, device.type == "cuda")


def _in_words(
    cohort: Cohort,
    model: ModelVersion,
    workers: WorkerCounts,
    found: Sequence[tuple[SlideSource, Inspection]],
    faults: Sequence[str],
    rates: _Rates,
) -> str:
    tiles = [inspection.record.num_tiles for _, inspection in found]
    share = len(found) / (len(found) + len(faults))
    total = round(float(np.mean(tiles)) * len(cohort.sources) * share)
    stretches = [-(-num_parts(i.record.num_tiles) // stretch_parts(i.record)) for _, i in found]
    num_reading = min(workers.num_readers, max(1, round(float(np.mean(stretches)) * len(cohort.sources) * share)))
    seconds = total * max(rates.read_s / num_reading, rates.embed_s / workers.num_embedders)
    timed = ", timed on a CPU because there is no GPU" if workers.uses_gpu and not rates.on_gpu else ""
    plain = [i.record.width_px * i.record.height_px for _, i in found if not i.record.reads_regions]
    plain_bytes = PLAIN_BYTES_PER_PX * max(plain, default=0) * num_reading
    features = cohort.plan.features
    part_bytes = PART_TILES * (
        model.tile_size_px**2 * 3 if features is None else features.width * _STAGED_BYTES_PER_VALUE
    )
    bank = model.searched_bank
    bank_bytes = 0 if bank is None else bank.keys.nbytes * 2 + bank.payload.nbytes
    tile_bytes = OutputInfo.of_model(model).num_values * _STAGED_BYTES_PER_VALUE
    staged_bytes = max(tiles) * tile_bytes * workers.num_readers
    in_flight = part_bytes * (_PARTS_IN_FLIGHT * workers.num_readers + 2 * workers.num_embedders)
    in_flight += PART_TILES * tile_bytes * _ANSWERS_IN_FLIGHT * workers.num_embedders
    value_bytes = _BYTES_PER_VALUE * (2 if cohort.plan.intervals else 1)  # with two more layers
    inspected = f"{len(found) + len(faults)} of them inspected"
    lines = [
        f"slides     {len(cohort.sources)} slides, {inspected}: {len(faults)} cannot be predicted",
        *(f"  {fault}" for fault in faults),
        f"tiles      {total:,} ({min(tiles):,} to {max(tiles):,} per slide) of {model.tile_size_px} px at "
        f"{model.mpp:.4g} um/px, {sum(i.record.tile_area_mm2 for _, i in found):.4g} mm2 in the slides inspected",
        f"workers    {workers.num_readers} read ({1 / rates.read_s:.3g} tiles/s each), {workers.num_embedders} embed "
        f"and retrieve on {'GPUs' if workers.uses_gpu else 'CPUs'} ({1 / rates.embed_s:.3g} tiles/s each{timed})",
        f"time       about {duration(seconds)}; for 1,000 such slides {duration(seconds / len(cohort.sources) * 1000)}",
        f"memory     about {(in_flight + bank_bytes) / 2**30:.2g} GiB of object store, whatever the slides' sizes, and "
        f"{plain_bytes / 2**30:.2g} GiB for plain images, which are decoded whole",
        f"scratch    at most {cohort.plan.scratch_budget_bytes / 1e9:.3g} GB on each node, for remote slides",
        f"output     at most {total * len(model.panel) * value_bytes / 1e9:.3g} GB before compression "
        f"({len(model.panel)} genes), and meanwhile {staged_bytes / 1e9:.3g} GB in its staging folder",
    ]
    return "\n".join(lines)
