"""What predicting a cohort will take, before anything is spent: slides looked at, a few tiles timed.

Tissue tiles are counted as a run would count them; of a large cohort some slides, spread evenly, stand for the others.
Reading and embedding are timed by a few tiles on this machine or, where a cluster has GPUs, on one of those; all other
machines are taken to be alike.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch

from mclstexp.errors import SourceError, UserError
from mclstexp.model.embed import network_of
from mclstexp.model.version import ModelVersion
from mclstexp.prediction.cohort import SlideCohort
from mclstexp.prediction.inspect import Inspection, corners, inspect
from mclstexp.prediction.parts import PART_TILES, num_parts
from mclstexp.prediction.pipeline import WorkerCounts, as_stored, embedding_device, stretch_parts
from mclstexp.prediction.plan import SlideSource
from mclstexp.prediction.slide_cache import clear, staged
from mclstexp.prediction.writers.table import read_grid
from mclstexp.slides.slide import PLAIN_BYTES_PER_PX, open_slide

MAX_LOOKED = 24
"""Slides that are opened."""
_GPU_PATIENCE_S = 120.0
_TIMED_TILES = 32
_BYTES_A_VALUE = 8  # float32 in Parquet and in .h5ad, before compression
_STAGED_BYTES_A_VALUE = 4
_PARTS_IN_FLIGHT = 4  # for each reader: Ray stops one that is two ahead, others are on their way


@dataclass(frozen=True)
class _Rates:
    """Seconds that a tile takes a process, and whether it had a GPU."""

    read_s: float
    embed_s: float
    on_gpu: bool


def forecast(cohort: SlideCohort, model: ModelVersion, dealt: WorkerCounts) -> str:
    """Returns the plan in words: slides, tiles, time, memory, disk, size of the output.

    Raises:
        UserError: none of the slides that were looked at can be predicted; gives the first reason.
    """
    picked = [cohort.sources[place] for place in _spread(len(cohort.sources), MAX_LOOKED)]
    with tempfile.TemporaryDirectory() as scratch:
        local = SlideCohort(picked, replace(cohort.plan, out=scratch))
        found, faults = _looked(local)
        if not found:
            raise UserError(f"none of the {len(picked)} slides that were looked at can be predicted: {faults[0]}")
        rates = _timed(local, found, model, dealt.uses_gpu)
    return _words(cohort, model, dealt, found, faults, rates)


def forecast_on_a_gpu(cohort: SlideCohort, model: ModelVersion, dealt: WorkerCounts) -> str:
    """Returns what `forecast` does, made on one of the cluster's GPUs where it has any. Ray must be connected.

    Raises:
        UserError: as `forecast`.
    """
    if not (dealt.uses_gpu and ray.cluster_resources().get("GPU")):
        return forecast(cohort, model, dealt)
    somewhere: Any = ray.remote(num_cpus=0, num_gpus=1)(_OnGpu).remote()
    if not ray.wait([somewhere.is_there.remote()], timeout=_GPU_PATIENCE_S)[0]:  # others may hold all of them
        ray.kill(somewhere)
        return forecast(cohort, model, dealt)
    plan = ray.get(somewhere.forecast.remote(cohort, model, dealt))
    if isinstance(plan, UserError):
        raise plan
    return str(plan)


class _OnGpu:
    """The actor that forecasts where a GPU is."""

    def is_there(self) -> bool:
        return True

    def forecast(self, cohort: SlideCohort, model: ModelVersion, dealt: WorkerCounts) -> str | UserError:
        """Returns a user's error too, for raised it would be wrapped into a traceback."""
        try:
            return forecast(cohort, model, dealt)
        except UserError as error:
            return error
        finally:
            clear(cohort.plan.scratch)


def _spread(number: int, most: int) -> list[int]:
    return sorted(set(np.linspace(0, number - 1, min(number, most)).astype(int).tolist()))


def _looked(cohort: SlideCohort) -> tuple[list[tuple[SlideSource, Inspection]], list[str]]:
    found, faults = [], []
    for source in cohort.sources:
        try:
            found.append((source, inspect(source, cohort.plan)))
        except (UserError, FileNotFoundError) as error:
            faults.append(f"{source.slide_id}: {error}")
    return found, faults


def _timed(
    cohort: SlideCohort, found: Sequence[tuple[SlideSource, Inspection]], model: ModelVersion, uses_gpu: bool
) -> _Rates:
    """Reads some tiles of the slide that has most, and predicts them."""
    plan = cohort.plan
    source, inspection = max(found, key=lambda one: one[1].record.num_tiles)
    if not inspection.record.num_tiles:
        raise SourceError(f"none of the {len(found)} slides looked at shows tissue; lower predict.min_tissue")
    scale, grid = inspection.record.scale, read_grid(inspection.staging, inspection.record.num_tiles)
    left, top = corners(grid.slice(0, _TIMED_TILES), plan.tiles.size_px, scale)
    with staged(source.image, plan.scratch, plan.scratch_budget_bytes) as path, open_slide(path) as slide:
        started = time.perf_counter()
        read = [slide.read_tile(x, y, plan.tiles.size_px, scale) for x, y in zip(left, top, strict=True)]
        tiles = [as_stored(tile, plan.tiles) for tile in read if tile is not None]
        read_s = time.perf_counter() - started
    if not tiles:
        raise SourceError(f"slide {source.slide_id} has no pixels where its tissue is")
    torch.set_num_threads(1)  # as each actor has one CPU
    device = embedding_device(uses_gpu)
    embed = network_of(model).build(device)
    batch = np.stack((tiles * _TIMED_TILES)[:_TIMED_TILES])
    model.predict(embed(batch[:1]))
    started = time.perf_counter()
    model.predict(embed(batch))
    return _Rates(read_s / len(left), (time.perf_counter() - started) / len(batch), device.type == "cuda")


def _words(
    cohort: SlideCohort,
    model: ModelVersion,
    dealt: WorkerCounts,
    found: Sequence[tuple[SlideSource, Inspection]],
    faults: Sequence[str],
    rates: _Rates,
) -> str:
    tiles = [inspection.record.num_tiles for _, inspection in found]
    share = len(found) / (len(found) + len(faults))
    total = round(float(np.mean(tiles)) * len(cohort.sources) * share)
    stretches = [-(-num_parts(i.record.num_tiles) // stretch_parts(i.record)) for _, i in found]
    num_reading = min(dealt.num_readers, max(1, round(float(np.mean(stretches)) * len(cohort.sources) * share)))
    seconds = total * max(rates.read_s / num_reading, rates.embed_s / dealt.num_embedders)
    timed = ", timed on a CPU for want of a GPU" if dealt.uses_gpu and not rates.on_gpu else ""
    plain = [i.record.width_px * i.record.height_px for _, i in found if not i.record.reads_regions]
    plain_bytes = PLAIN_BYTES_PER_PX * max(plain, default=0) * num_reading
    part_bytes = PART_TILES * model.tile_size_px**2 * 3
    bank_bytes = 0 if model.bank is None else model.bank.keys.nbytes * 2 + model.bank.payload.nbytes
    staged_bytes = max(tiles) * len(model.panel) * _STAGED_BYTES_A_VALUE * dealt.num_readers
    in_flight = part_bytes * (_PARTS_IN_FLIGHT * dealt.num_readers + 2 * dealt.num_embedders)
    looked = f"{len(found) + len(faults)} of them looked at"
    lines = [
        f"slides     {len(cohort.sources)} slides, {looked}: {len(faults)} cannot be predicted",
        *(f"  {fault}" for fault in faults),
        f"tiles      {total:,} ({min(tiles):,} to {max(tiles):,} a slide) of {model.tile_size_px} px at "
        f"{model.mpp:.4g} um/px, {sum(i.record.tile_area_mm2 for _, i in found):.4g} mm2 in the slides looked at",
        f"workers    {dealt.num_readers} read ({1 / rates.read_s:.3g} tiles/s each), {dealt.num_embedders} embed and "
        f"retrieve on {'GPUs' if dealt.uses_gpu else 'CPUs'} ({1 / rates.embed_s:.3g} tiles/s each{timed})",
        f"time       about {_duration(seconds)}; for 1,000 such slides "
        f"{_duration(seconds / len(cohort.sources) * 1000)}",
        f"memory     about {(in_flight + bank_bytes) / 2**30:.2g} GiB of object store, whatever the slides' sizes, and "
        f"{plain_bytes / 2**30:.2g} GiB for plain images, which are decoded whole",
        f"scratch    at most {cohort.plan.scratch_budget_bytes / 1e9:.3g} GB on each node, for remote slides",
        f"output     at most {total * len(model.panel) * _BYTES_A_VALUE / 1e9:.3g} GB before compression "
        f"({len(model.panel)} genes), and meanwhile {staged_bytes / 1e9:.3g} GB in its staging folder",
    ]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
