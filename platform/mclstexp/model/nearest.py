"""The keys of highest cosine: the same bits on any machine and device, in any batch and for any block of keys.

Directions are rounded to multiples of 2^-24, so that a cosine is a sum of integers that double precision represents
exactly: the order of summation, the number of threads and other queries cannot change it. The price is arithmetic in
double precision, and a rounding of up to 3e-8 in a component, as in single precision.

Shapes: Q queries, N keys, D embedding, k neighbours.
"""

import numpy as np
import torch

QUERY_BLOCK, KEY_BLOCK = 256, 65_536
"""Queries and keys scored at a time: they limit memory and change no score."""
_STEPS = 2**24
_ROWS = 2048  # keys whose doubles fit a processor's cache together with the scores of a query block
_MIN_NORM = 1e-12
_MAX_FREE_SHARE = 0.5  # of a device's free memory, for keys


def directions(vectors: np.ndarray) -> np.ndarray:
    """Returns vectors (N, D) at length 1 in units of 2^-24: whole numbers, float32 (N, D); zeros stay zeros."""
    whole = np.empty(vectors.shape, np.float32)
    for start in range(0, len(vectors), _ROWS):
        block = vectors[start : start + _ROWS].astype(np.float64)
        norm = np.linalg.norm(block, axis=1, keepdims=True)
        whole[start : start + _ROWS] = np.rint(block / np.maximum(norm, _MIN_NORM) * _STEPS)
    return whole


class Keys:
    """The directions of N keys, to be searched on one device.

    A GPU keeps them if they take at most half of its free memory; otherwise each search sends them block by block. On
    the CPU they are read in place, which may be a memory map.
    """

    def __init__(self, key_directions: np.ndarray, device: torch.device | None = None) -> None:
        """Takes directions as `directions` returns them, float32 (N, D), N > 0, and the device (default: the CPU)."""
        self._device = device or torch.device("cpu")
        self._directions: np.ndarray | torch.Tensor = key_directions
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            if key_directions.nbytes <= _MAX_FREE_SHARE * free:
                self._directions = torch.tensor(key_directions, device=self._device)

    def nearest(self, queries: np.ndarray, k: int, key_block: int = KEY_BLOCK) -> tuple[np.ndarray, np.ndarray]:
        """Returns the keys of highest cosine, int64 (Q, k), and their cosines, float32 (Q, k); best first.

        Among equal cosines the lower key comes first. If there are fewer than k keys, all of them are returned.

        Args:
            queries: vectors of any length, (Q, D).
            k: neighbours.
            key_block: keys scored at a time.
        """
        scaled = torch.from_numpy(directions(queries).astype(np.float64) / _STEPS**2).to(self._device)
        found = []
        for start in range(0, len(self._directions), key_block):
            keys = self._directions[start : start + key_block]
            parts = [_top(self._cosines(part, keys), min(k, len(keys))) for part in scaled.split(QUERY_BLOCK)]
            ids, scores = (torch.cat(one).cpu().numpy() for one in zip(*parts, strict=True))
            found.append((ids + start, scores))
        ids, scores = (np.concatenate(one, axis=1) for one in zip(*found, strict=True))
        order = best_columns(scores, k)
        return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)

    def _cosines(self, scaled: torch.Tensor, keys: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Returns cosines, float32 (Q, N), of scaled float64 queries; keys are converted to float64 a few at a time."""
        cosines = torch.empty(len(scaled), len(keys), device=self._device)
        for start in range(0, len(keys), _ROWS):
            rows = slice(start, start + _ROWS)
            doubles = keys[rows].double() if isinstance(keys, torch.Tensor) else self._sent(keys[rows])
            cosines[:, rows] = scaled @ doubles.T
        return cosines

    def _sent(self, keys: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(keys.astype(np.float64)).to(self._device)


def nearest(
    queries: np.ndarray, key_directions: np.ndarray, k: int, key_block: int = KEY_BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the result of `Keys.nearest` on the CPU."""
    return Keys(key_directions).nearest(queries, k, key_block)


def best_columns(scores: np.ndarray, k: int) -> np.ndarray:
    """Returns the columns of each row's k highest scores, best first, ties by the lower column, int64 (Q, k).

    For the candidates of consecutive key blocks in a row, each block best first, the lower column is the lower key.
    """
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def _top(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (ids, scores) of the k highest of each row, best first, ties by the lower id."""
    values, ids = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    ids = ids[:, :k]
    ambiguous = (values[:, k:] == values[:, k - 1 : k]).any(dim=1)  # the best key left out equals the last key taken
    if ambiguous.any():
        ids[ambiguous] = scores[ambiguous].argsort(dim=1, descending=True, stable=True)[:, :k]
    ids = ids.sort(dim=1).values
    order = scores.gather(1, ids).argsort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)
    return ids, scores.gather(1, ids)
