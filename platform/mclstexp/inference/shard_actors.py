"""Shards of a bank in actors, each with its own shard in memory and nothing else of the bank.

A shard travels once, when its actor starts. An actor that dies is started again and asked again, which answers alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import ray

from mclstexp.data.stream import MAX_RETRIES
from mclstexp.inference.shards import BankShard, Neighbours


@dataclass(frozen=True)
class ShardActors:
    """Shards held by actors; it may be handed to other tasks and actors. The actors end with the last copy of it."""

    actors: tuple[Any, ...]

    def nearest(self, queries: np.ndarray, k: int, order: int | None) -> list[Neighbours]:
        """Asks all actors at once."""
        asked = ray.put(queries)
        return cast(list[Neighbours], ray.get([actor.nearest.remote(asked, k, order) for actor in self.actors]))

    def sums(self, ids: np.ndarray, weight: np.ndarray) -> list[np.ndarray]:
        """Asks all actors at once."""
        voters, votes = ray.put(ids), ray.put(weight)
        return cast(list[np.ndarray], ray.get([actor.sums.remote(voters, votes) for actor in self.actors]))


def start_shards(shards: Sequence[BankShard], cpus_per_shard: float = 1) -> ShardActors:
    """Returns an actor for each shard of a bank, in the order of their keys."""
    held = ray.remote(_ShardActor).options(num_cpus=cpus_per_shard, max_restarts=-1, max_task_retries=MAX_RETRIES)
    return ShardActors(tuple(held.remote(shard) for shard in shards))


class _ShardActor:
    def __init__(self, shard: BankShard) -> None:
        self._shard = shard

    def nearest(self, queries: np.ndarray, k: int, order: int | None) -> Neighbours:
        return self._shard.nearest(queries, k, order)

    def sums(self, ids: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return self._shard.sums(ids, weight)
