"""The keys of highest cosine: the same bits on any machine and device, in any batch and for any block of keys.

Directions are rounded to multiples of 2^-24, so that a cosine is a sum of integers that double precision represents
exactly: the order of summation, the number of threads and other queries cannot change it. All keys are scored in single
precision, whose error has a proven bound, and only those that may be among the nearest in double precision. Where the
bound cannot tell them from the rest (many keys almost alike), the query is searched in double precision throughout. The
price is that rounding of up to 3e-8 in a component, as in single precision, and the second look at k keys.

Shapes: Q queries, N keys, D embedding, k neighbours.
"""

from collections.abc import Callable

import numpy as np
import torch

from mclstexp.model.device import full_precision, sent, turn

QUERY_BLOCK = 256
"""Queries searched at a time: it limits memory and changes no result."""
_KEY_BLOCK = {"cpu": 2**16, "cuda": 2**18}  # keys searched at a time, likewise
_KEYS_SCORED = {"cpu": 2048, "cuda": 2**16}  # at once: on a CPU they stay in its cache
_QUERIES_RESCORED = {"cpu": 4, "cuda": QUERY_BLOCK}  # likewise
_ROWS = 2048  # vectors made directions at a time
_STEPS = 2**24
_MIN_NORM = 1e-12
_MAX_FREE_SHARE = 0.5  # of a device's free memory, for keys
_ROUNDING = 2.0**-24  # largest relative error of an operation in single precision
_SPARE = (32, 1024)  # keys looked at twice beyond the k nearest: first, and where these do not suffice
_WORTHWHILE = 32  # with fewer keys for each that is looked at twice, double precision throughout is quicker
_GROUP = 16  # keys of which a first pass sees only the highest score
_Choice = Callable[[torch.Tensor, int], torch.Tensor]


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

    def __init__(
        self, key_directions: np.ndarray, device: torch.device | None = None, key_block: int | None = None
    ) -> None:
        """Takes keys.

        Args:
            key_directions: as `directions` returns them, float32 (N, D), N > 0.
            device: that searches (default: the CPU).
            key_block: keys searched at a time (default: the device's); it changes no result.
        """
        self._device = device or torch.device("cpu")
        self._key_block = key_block or _KEY_BLOCK[self._device.type]
        self._directions: np.ndarray | torch.Tensor = key_directions
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            if key_directions.nbytes <= _MAX_FREE_SHARE * free:
                self._directions = torch.tensor(key_directions, device=self._device)

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the keys of highest cosine, int64 (Q, k), and their cosines, float32 (Q, k); best first.

        Among equal cosines the lower key comes first. If there are fewer than k keys, all of them are returned.

        Args:
            queries: vectors of any length, (Q, D).
            k: neighbours.
        """
        k = min(k, len(self._directions))
        ids = np.empty((len(queries), k), np.int64)
        cosines = np.empty((len(queries), k), np.float32)
        for start in range(0, len(queries), QUERY_BLOCK):
            rows = slice(start, start + QUERY_BLOCK)
            scaled = directions(queries[rows]).astype(np.float64) / _STEPS**2
            with turn(self._device):
                self._search(sent(scaled, self._device), ids[rows], cosines[rows])
        return ids, cosines

    def _search(self, scaled: torch.Tensor, ids: np.ndarray, cosines: np.ndarray) -> None:
        """Writes the ids and cosines (q, k) of the nearest keys of some queries, float64 (q, D)."""
        k, left = ids.shape[1], np.arange(len(ids))
        for spare in _SPARE:
            if len(left) and len(self._directions) >= _WORTHWHILE * (k + spare):
                *found, is_certain = (values.cpu().numpy() for values in self._twice(scaled[left], k, k + spare))
                ids[left], cosines[left] = found
                left = left[~is_certain]
        if len(left):
            found_cosines, found_ids = self._highest(scaled[left], k, _first_columns)
            ids[left], cosines[left] = found_ids.cpu().numpy(), found_cosines.cpu().numpy()

    def _twice(self, scaled: torch.Tensor, k: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns (ids, cosines) of the nearest keys, both (q, k), and which queries they are certain for, bool (q,).

        They are the nearest of `width` < N keys, those that score highest in single precision. No other key scores
        higher than the lowest of these, so none has a cosine above that score plus the bound.
        """
        with full_precision(self._device):
            scores, ids = self._highest(scaled.float(), width, _any_columns)
        exact, bound = self._rescored(scaled, ids), _bound(scaled.shape[1])
        rest = (scores.amin(dim=1).double() + bound).float()
        is_bounded = ((scores - exact).abs() <= bound).all(dim=1)  # else the device did not compute in float32
        ids, order = ids.sort(dim=1)
        cosines = exact.float().gather(1, order)
        order = cosines.argsort(dim=1, descending=True, stable=True)[:, :k]
        ids, cosines = ids.gather(1, order), cosines.gather(1, order)
        return ids, cosines, is_bounded & (cosines[:, -1] > rest)

    def _highest(self, scaled: torch.Tensor, width: int, choose: _Choice) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the highest scores, computed as precisely as queries are given, float32 (q, width), and their ids."""
        best = (
            torch.empty(len(scaled), 0, device=self._device),
            torch.empty(len(scaled), 0, dtype=torch.int64, device=self._device),
        )
        for start in range(0, len(self._directions), self._key_block):
            scores = self._scores(scaled, start)
            columns = choose(scores, width)
            scores = torch.cat([best[0], scores.gather(1, columns)], dim=1)
            ids = torch.cat([best[1], columns + start], dim=1)
            columns = choose(scores, width)
            best = (scores.gather(1, columns), ids.gather(1, columns))
        return best

    def _scores(self, scaled: torch.Tensor, first: int) -> torch.Tensor:
        """Returns the scores of a block of keys, float32 (q, n)."""
        last = min(first + self._key_block, len(self._directions))
        scores = torch.empty(len(scaled), last - first, device=self._device)
        step = _KEYS_SCORED[self._device.type]
        for start in range(first, last, step):
            stop = min(start + step, last)
            scores[:, start - first : stop - first] = scaled @ self._keys(slice(start, stop)).to(scaled.dtype).T
        return scores

    def _rescored(self, scaled: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Returns the exact cosines of some keys of each query, float64 (q, m)."""
        exact = torch.empty(ids.shape, dtype=torch.float64, device=self._device)
        step = _QUERIES_RESCORED[self._device.type]
        for start in range(0, len(ids), step):
            rows = slice(start, start + step)
            exact[rows] = torch.einsum("qd,qmd->qm", scaled[rows], self._keys(ids[rows]).double())
        return exact

    def _keys(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Returns some directions on the device, float32 (..., D)."""
        if isinstance(self._directions, torch.Tensor):
            return self._directions[rows]
        return sent(self._directions[rows if isinstance(rows, slice) else rows.cpu().numpy()], self._device)


def nearest(queries: np.ndarray, key_directions: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the result of `Keys.nearest` on the CPU."""
    return Keys(key_directions).nearest(queries, k)


def _bound(width: int) -> float:
    """Returns how far a cosine computed in single precision is from the exact one, at most.

    A sum of D products in any order, with fused operations or without, errs by at most D u / (1 - D u) times the sum of
    their absolute values (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1), which is at most
    the product of the two lengths. A direction's length differs from 1 by its rounding, at most sqrt(D) u / 2. No value
    is too small to be represented: all are multiples of 2^-48.
    """
    error = width * _ROUNDING
    return error / (1 - error) * (1 + width**0.5 * _ROUNDING) ** 2


def _any_columns(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Returns the columns of each row's k highest scores, int64 (Q, k), in any order and any of equal ones.

    Scores are grouped first: k groups with the highest maxima hold k of the highest scores.
    """
    num_groups = scores.shape[1] // _GROUP
    if num_groups <= k:
        return scores.topk(min(k, scores.shape[1]), dim=1, sorted=False).indices
    grouped = scores[:, : num_groups * _GROUP].unflatten(1, (_GROUP, num_groups))
    groups = grouped.amax(dim=1).topk(k, dim=1, sorted=False).indices
    members = groups[:, None] + num_groups * torch.arange(_GROUP, device=scores.device)[:, None]
    rest = torch.arange(num_groups * _GROUP, scores.shape[1], device=scores.device).expand(len(scores), -1)
    columns = torch.cat([members.flatten(1), rest], dim=1)
    return columns.gather(1, scores.gather(1, columns).topk(k, dim=1, sorted=False).indices)


def _first_columns(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Returns the columns of each row's k highest scores, best first, ties by the lower column, int64 (Q, k).

    For the candidates of consecutive key blocks in a row, each block best first, the lower column is the lower key.
    """
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    columns = columns[:, :k]
    is_tied = (values[:, k:] == values[:, k - 1 : k]).any(dim=1)  # the best one left out equals the last one taken
    if is_tied.any():
        columns[is_tied] = scores[is_tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    columns = columns.sort(dim=1).values
    return columns.gather(1, scores.gather(1, columns).argsort(dim=1, descending=True, stable=True))
