"""The stage of bulk prediction that knows the model: tiles in, written parts out.

A batch is one part of one slide, whatever else is under way, so that its answer depends on nothing but the slide and
the model. The part is written here, where it was made: only a few numbers travel on to the driver.
"""

from dataclasses import dataclass

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy, Dataset

from mclstexp.data.genes import normalisers
from mclstexp.data.stream import MAX_RETRIES, Batch, ordered
from mclstexp.errors import ResourceError, UserError
from mclstexp.inference.bank import Bank
from mclstexp.inference.embed import ImageNetwork, network_of
from mclstexp.inference.model_facts import ModelFacts
from mclstexp.inference.model_version import ModelVersion
from mclstexp.inference.parts import write_part
from mclstexp.inference.retrieval import Retrieved, held, regressed, resolve, retrieve
from mclstexp.inference.shard_actors import ShardActors, start_shards
from mclstexp.inference.shards import Shards, split_bank
from mclstexp.inference.slide_record import FAILED, TILES
from mclstexp.settings import PredictConfig, RetrievalConfig


@dataclass(frozen=True)
class Stages:
    """Actors of each stage that the cluster has room for."""

    num_readers: int
    num_embedders: int
    uses_gpu: bool


def cluster_size(config: PredictConfig) -> tuple[int, int]:
    """Returns the CPUs and GPUs that prediction uses: those that it was told to, else all that the cluster has."""
    there = ray.cluster_resources()
    num_gpus = config.num_gpus if config.num_gpus is not None else int(there.get("GPU", 0))
    return config.num_cpus or int(there.get("CPU", 0)), num_gpus


def stages(num_cpus: int, num_gpus: int) -> Stages:
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
    return Stages(num_cpus - 1 - (0 if num_gpus else embedders), embedders, bool(num_gpus))


def predicted_parts(tiles: Dataset, model: ModelVersion, dealt: Stages, bank_shards: int) -> Dataset:
    """Returns what became of each part: the rows of `tiles` without their images, after each part was written.

    Args:
        tiles: one row a part, as `ingest.cohort.tile_batches` makes them; rows of another state than `tiles` pass.
        model: the version to predict with.
        dealt: as `stages` returns it.
        bank_shards: actors that hold the bank's keys between them; 1: every node holds all of it once.
    """
    bank = model.bank
    config = model.config.retrieval if bank is None else resolve(model.config.retrieval, len(bank))
    shards = None
    if bank is not None and bank_shards > 1:
        shards = start_shards(split_bank(bank, bank_shards), cpus_per_shard=0)  # they work while embedders wait
    elif bank is not None:
        bank.directions  # noqa: B018  # made here, they are held once on each node
    with ordered():  # for its warnings alone: a Dataset keeps the context that it was made in
        return tiles.map_batches(
            _Predict,
            fn_constructor_args=(
                *(ray.put(network_of(model)), ray.put(None if shards else bank), shards, config, dealt.uses_gpu),
            ),
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


def facts_of(model: ModelVersion) -> ModelFacts:
    """Returns what the files of a prediction say of its model."""
    unit = normalisers(model.config.genes)[1].unit()
    return ModelFacts(model.panel, unit, model.digest, model.tile_size_px, model.mpp, model.ood_similarity)


class _Predict:
    """Embeds a part's tiles, asks the bank and writes the part."""

    def __init__(
        self,
        network: ray.ObjectRef,
        bank: ray.ObjectRef,
        shards: ShardActors | None,
        config: RetrievalConfig,
        uses_gpu: bool,
    ) -> None:
        built: ImageNetwork = ray.get(network)
        whole: Bank | None = ray.get(bank)
        self._embed = built.build(embedding_device(uses_gpu))
        self._shards: Shards | None = shards if whole is None else held(whole)
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
        return regressed(queries) if self._shards is None else retrieve(queries, self._shards, self._config)
