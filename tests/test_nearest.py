"""The best cosines: equal to integer arithmetic, and the same in any batch, block and number of threads."""

import numpy as np
import pytest
import torch

from mclstexp.model.nearest import directions, nearest


def _vectors(count: int, seed: int, width: int = 70) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def _reference(queries: np.ndarray, keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and cosines from 64-bit integer sums, sorted by (cosine, lower key)."""
    exact = directions(queries).astype(np.int64) @ directions(keys).astype(np.int64).T
    cosine = (exact / 2.0**48).astype(np.float32)
    ids = np.stack([np.lexsort((np.arange(len(keys)), -row))[:k] for row in cosine])
    return ids, np.take_along_axis(cosine, ids, axis=1)


def test_directions_are_the_vectors_at_length_one() -> None:
    vectors = _vectors(20, 0) * 37
    units = directions(vectors) / 2.0**24
    assert directions(vectors).dtype == np.float32
    expected = vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    assert np.abs(units - expected).max() <= 2.0**-25
    assert (directions(np.zeros((2, 5), np.float32)) == 0).all()


@pytest.mark.parametrize("key_block", [7, 100, 65_536])
@pytest.mark.parametrize("k", [1, 9, 300])
def test_cosines_are_exact_and_ties_go_to_the_lower_key(key_block: int, k: int) -> None:
    keys = _vectors(300, 1)
    keys[150:] = keys[np.random.default_rng(2).integers(0, 20, 150)]  # many ties, across blocks too
    queries = np.concatenate([_vectors(5, 3), keys[:5]])
    ids, cosines = nearest(queries, directions(keys), k, key_block)
    expected_ids, expected = _reference(queries, keys, k)
    assert np.array_equal(ids, expected_ids)
    assert np.array_equal(cosines, expected)
    assert (ids.dtype, cosines.dtype) == (np.int64, np.float32)


def test_ties_for_the_last_neighbour_go_to_the_lower_key() -> None:
    keys = np.tile(np.eye(4, dtype=np.float32), (5, 1))
    ids, cosines = nearest(np.eye(4, dtype=np.float32)[:1], directions(keys), 3)
    assert ids.tolist() == [[0, 4, 8]]
    assert cosines.tolist() == [[1, 1, 1]]


def test_threads_and_other_queries_change_no_bit() -> None:
    keys, queries = directions(_vectors(500, 4)), _vectors(300, 5)
    ids, cosines = nearest(queries, keys, 20)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for rows in (slice(0, 1), slice(255, 258), slice(299, 300)):
            alone = nearest(queries[rows], keys, 20)
            assert np.array_equal(alone[0], ids[rows])
            assert np.array_equal(alone[1], cosines[rows])
    finally:
        torch.set_num_threads(threads)
