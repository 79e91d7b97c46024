"""A bank in shards: runs of whole key blocks that answer for their own keys, so that no process need hold all.

A bank that is held whole is one shard and takes the same way, so that both give the same bits. Sums over neighbours
are kept by key block and added in the order of blocks: the price is one row of sums a key block and query in memory.

Shapes: Q queries, N keys of a shard, D embedding, G genes, k neighbours, B key blocks of a shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mclstexp.inference.bank import Bank
from mclstexp.inference.cosine import KEY_BLOCK, best_columns, nearest


@dataclass(frozen=True)
class Neighbours:
    """Each query's best keys, best first; equal cosines by the lower key."""

    ids: np.ndarray
    """Rows of the whole bank, int64 (Q, k)."""
    similarity: np.ndarray
    """Cosines, float32 (Q, k)."""
    patient: np.ndarray
    """Donors as codes over the whole bank, int32 (Q, k)."""
    distance: np.ndarray | None
    """Between un-normalised vectors, float64 (Q, k); None where the weighting does not ask for it."""

    def first(self, k: int) -> "Neighbours":
        """Returns the k best."""
        distance = None if self.distance is None else self.distance[:, :k]
        return Neighbours(self.ids[:, :k], self.similarity[:, :k], self.patient[:, :k], distance)


@dataclass(frozen=True)
class BankShard:
    """A run of a bank's keys with all that is needed to answer for them."""

    keys: np.ndarray
    """float32 (N, D)."""
    directions: np.ndarray
    """Of the keys, as `cosine.directions` returns them, float32 (N, D)."""
    payload: np.ndarray
    """float32 (N, G)."""
    patient: np.ndarray
    """Donors as codes over the whole bank, int32 (N,)."""
    start: int
    """The first key's row in the whole bank, a multiple of `key_block`."""
    key_block: int

    def nearest(self, queries: np.ndarray, k: int, order: int | None) -> Neighbours:
        """Returns the shard's own best keys, k or all that it has, of queries, float32 (Q, D).

        With them go distances in the norm of this order (1 or 2), or none.
        """
        rows, similarity = nearest(queries, self.directions, k, self.key_block)
        distance = None if order is None else _distances(queries, self.keys, rows, order)
        return Neighbours(rows + self.start, similarity, self.patient[rows], distance)

    def sums(self, ids: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Returns each key block's part of the neighbours' weighted payloads, float64 (B, Q, G).

        `ids` and `weight`, (Q, k), are of the whole bank; other shards' keys are left out.
        """
        num_blocks = -(-len(self.keys) // self.key_block)
        parts = np.zeros((num_blocks, len(ids), self.payload.shape[1]))
        block = (ids - self.start) // self.key_block
        for query, of in enumerate(block):
            for part in np.unique(of[(of >= 0) & (of < num_blocks)]):
                mine = of == part
                rows = self.payload[ids[query, mine] - self.start]
                np.einsum("k,kg->g", weight[query, mine], rows, out=parts[part, query])  # unlike @, in a fixed order
        return parts


class Shards(Protocol):
    """A bank's shards in the order of their keys, wherever they are."""

    def nearest(self, queries: np.ndarray, k: int, order: int | None) -> list[Neighbours]:
        """Returns what `BankShard.nearest` does, a shard each."""

    def sums(self, ids: np.ndarray, weight: np.ndarray) -> list[np.ndarray]:
        """Returns what `BankShard.sums` does, a shard each."""


@dataclass(frozen=True)
class LocalShards:
    """Shards in this process."""

    shards: Sequence[BankShard]

    def nearest(self, queries: np.ndarray, k: int, order: int | None) -> list[Neighbours]:
        """Asks one shard after the other."""
        return [shard.nearest(queries, k, order) for shard in self.shards]

    def sums(self, ids: np.ndarray, weight: np.ndarray) -> list[np.ndarray]:
        """Asks one shard after the other."""
        return [shard.sums(ids, weight) for shard in self.shards]


def split_bank(bank: Bank, num_shards: int, key_block: int = KEY_BLOCK) -> list[BankShard]:
    """Returns the bank in that many runs of whole key blocks, or a shard a block where it has fewer blocks.

    Shards are views of the bank. Answers depend on `key_block` in their last bit and not on the number of shards.
    """
    starts = range(0, len(bank), key_block)
    runs = np.array_split(np.array(starts), min(num_shards, len(starts)))
    return [_shard(bank, int(run[0]), int(run[-1]) + key_block, key_block) for run in runs]


def merged(found: Sequence[Neighbours], k: int) -> Neighbours:
    """Returns the k best of what shards found, given in the order of their keys."""
    order = best_columns(np.concatenate([part.similarity for part in found], axis=1), k)

    def best(columns: Sequence[np.ndarray]) -> np.ndarray:
        return np.take_along_axis(np.concatenate(columns, axis=1), order, axis=1)

    distances = [part.distance for part in found if part.distance is not None]
    return Neighbours(
        ids=best([part.ids for part in found]),
        similarity=best([part.similarity for part in found]),
        patient=best([part.patient for part in found]),
        distance=best(distances) if distances else None,
    )


def _shard(bank: Bank, start: int, stop: int, key_block: int) -> BankShard:
    run = slice(start, stop)
    return BankShard(bank.keys[run], bank.directions[run], bank.payload[run], bank.patient_code[run], start, key_block)


def _distances(queries: np.ndarray, keys: np.ndarray, rows: np.ndarray, order: int) -> np.ndarray:
    """Returns each query's distance to its own keys, float64 (Q, k)."""
    distances = np.empty(rows.shape)
    for query, of, found in zip(queries, rows, distances, strict=True):
        found[:] = np.linalg.norm(keys[of].astype(np.float64) - query, order, axis=1)
    return distances
