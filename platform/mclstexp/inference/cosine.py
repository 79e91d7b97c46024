"""The keys of highest cosine, to the same bit on any machine, in any batch and in any shard.

Directions are rounded to multiples of 2^-24, so that a cosine is a sum of integers that double precision holds without
rounding: no order of summation, number of threads or other query can change it. The price is arithmetic in double
precision, and up to 3e-8 of a component in rounding, which is what single precision leaves too.

Shapes: Q queries, N keys, D embedding, k neighbours.
"""

import numpy as np
import torch

QUERY_BLOCK, KEY_BLOCK = 256, 65_536
"""Queries and keys that are scored at a time; it bounds memory and changes no score."""
_STEPS = 2**24
_ROWS = 2048  # what a processor's cache holds in double precision, with a query block's scores
_SMALLEST_NORM = 1e-12


def directions(vectors: np.ndarray) -> np.ndarray:
    """Returns vectors (N, D) at length 1 in units of 2^-24: whole numbers, float32 (N, D); zeros stay zeros."""
    whole = np.empty(vectors.shape, np.float32)
    for start in range(0, len(vectors), _ROWS):
        block = vectors[start : start + _ROWS].astype(np.float64)
        norm = np.linalg.norm(block, axis=1, keepdims=True)
        whole[start : start + _ROWS] = np.rint(block / np.maximum(norm, _SMALLEST_NORM) * _STEPS)
    return whole


def nearest(
    queries: np.ndarray, key_directions: np.ndarray, k: int, key_block: int = KEY_BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the keys of highest cosine, int64 (Q, k), and their cosines, float32 (Q, k); best first.

    Equal cosines go to the lower key. Where there are fewer than k keys, all of them are returned.

    Args:
        queries: vectors of any length, (Q, D).
        key_directions: as `directions` returns them, (N, D), at least one.
        k: neighbours.
        key_block: keys that are scored at a time.
    """
    asked = torch.from_numpy(directions(queries).astype(np.float64) / _STEPS**2)
    found = []
    for start in range(0, len(key_directions), key_block):
        keys = key_directions[start : start + key_block]
        parts = [_top(_cosines(part, keys), min(k, len(keys))) for part in asked.split(QUERY_BLOCK)]
        ids, scores = (torch.cat(one).numpy() for one in zip(*parts, strict=True))
        found.append((ids + start, scores))
    ids, scores = (np.concatenate(one, axis=1) for one in zip(*found, strict=True))
    order = best_columns(scores, k)
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)


def _cosines(asked: torch.Tensor, keys: np.ndarray) -> torch.Tensor:
    """Returns cosines, float32 (Q, N), of queries in float64; doubles of a few keys at a time stay in the cache."""
    cosines = torch.empty(len(asked), len(keys))
    for start in range(0, len(keys), _ROWS):
        rows = slice(start, start + _ROWS)
        cosines[:, rows] = asked @ torch.from_numpy(keys[rows].astype(np.float64)).T
    return cosines


def best_columns(scores: np.ndarray, k: int) -> np.ndarray:
    """Returns the columns of each row's k highest scores, best first and ties by the lower column, int64 (Q, k).

    Where candidates from runs of keys stand side by side in the order of runs, each run best first, the lower column
    is the lower key.
    """
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def _top(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (ids, scores) of the k highest of each row, best first and ties by the lower id."""
    values, ids = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    ids = ids[:, :k]
    ambiguous = (values[:, k:] == values[:, k - 1 : k]).any(dim=1)  # the best that is left out equals the last taken
    if ambiguous.any():
        ids[ambiguous] = scores[ambiguous].argsort(dim=1, descending=True, stable=True)[:, :k]
    ids = ids.sort(dim=1).values
    order = scores.gather(1, ids).argsort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)
    return ids, scores.gather(1, ids)
