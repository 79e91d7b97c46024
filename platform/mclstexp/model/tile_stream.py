"""The tiles of a table through a pool of actors: CPU tasks decode, actors compute, results come in stored order.

Ray Data does not see other work on the cluster and starts all actors of a pool at once, so runs that compute side by
side each need a share of the cluster (`cluster.share_of_run`).
"""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import ray
from ray.data import ActorPoolStrategy, DataContext

from mclstexp.cluster import KEEPING_MEMORY, MAX_RETRIES, ordered
from mclstexp.data.schema import Manifest
from mclstexp.data.spots import Batch, TileLoader
from mclstexp.errors import ResourceError

TILES_AT_ONCE = {"cpu": 16, "cuda": 64}
"""Tiles that go through a network at once on a device; another size may round differently."""
_MIN_TILES_PER_ACTOR = 256  # below this, starting another actor (importing torch) costs more than it saves


def stream_sentences(
    root: str,
    manifest: Manifest,
    section_ids: Iterable[str],
    views: tuple[str, ...],
    actor: type,
    network: object,
) -> Iterator[tuple[str, int, Batch]]:
    """Yields (section id, sentence, arrays of its spots) in stored order.

    Args:
        root: of the tile table.
        manifest: of the tile table.
        section_ids: sections to read, in the order in which they are yielded.
        views: views to decode.
        actor: class of the actors that compute; called with what `TileLoader` returns, it returns padded arrays and
            `mask` (`spots.pad`).
        network: what they compute with; the constructor gets a Ray reference to it.

    Raises:
        ResourceError: the cluster has no CPU left to decode tiles beside the one that computes.
    """
    sentences, (num_cpus, num_gpus) = manifest.sentences(section_ids), allowed_resources()
    embedders = num_embedders(num_cpus, num_gpus)
    if not sentences:
        return
    num_tiles = sum(manifest.section(name).row_groups[group].num_rows for name, group in sentences)
    actors = min(embedders, 1 + num_tiles // _MIN_TILES_PER_ACTOR)
    rows = [{"section_id": name, "group": group} for name, group in sentences]
    loader = TileLoader(root, manifest, views)
    with ordered():
        dataset = (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .map_batches(cast(Any, loader), batch_size=1, num_cpus=1, max_retries=MAX_RETRIES)
            .map_batches(
                actor,
                fn_constructor_args=(ray.put(network),),
                batch_size=1,
                compute=ActorPoolStrategy(size=min(actors, len(rows))),
                num_gpus=1 if num_gpus else None,
                num_cpus=None if num_gpus else 1,
                runtime_env=KEEPING_MEMORY,
                max_restarts=MAX_RETRIES,
                max_task_retries=MAX_RETRIES,
            )
        )
    batches = cast(Iterable[Batch], dataset.iter_batches(batch_size=1, batch_format="numpy"))
    for (name, group), batch in zip(sentences, batches, strict=True):
        mask = batch.pop("mask")[0]
        yield name, group, {key: values[0][mask] for key, values in batch.items()}


def num_embedders(num_cpus: int, num_gpus: int) -> int:
    """Number of actors that embed on so many CPUs and GPUs: one per GPU or, without GPUs, one per two CPUs.

    Raises:
        ResourceError: no CPU is left for reading; tasks that read would wait forever while actors occupy every CPU.
    """
    needed = 1 if num_gpus else 2
    if num_cpus < needed:
        raise ResourceError(
            f"embedding needs {needed} CPU(s), the cluster has {num_cpus}; raise cluster.local_cpus on one machine, or "
            "add a node"
        )
    return num_gpus or num_cpus // 2


def allowed_resources() -> tuple[int, int]:
    """Returns the CPUs and GPUs that datasets made here may use: the cluster's, within the limits of `ordered`."""
    cluster, limits = ray.cluster_resources(), DataContext.get_current().execution_options.resource_limits
    return int(min(cluster.get("CPU", 0), limits.cpu)), int(min(cluster.get("GPU", 0), limits.gpu))
