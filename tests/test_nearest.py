"""The best cosines: equal to integer arithmetic whatever the keys are, the same in any batch, block and precision."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mclstexp.model import nearest as module
from mclstexp.model.nearest import Keys, directions, nearest

K, SPARE = 9, module._SPARE[0]
NUM_KEYS = module._WORTHWHILE * (K + SPARE)
"""As many as are scored in single precision first."""


def _vectors(count: int, seed: int, width: int = 70) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def _reference(queries: np.ndarray, key_directions: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and cosines from 64-bit integer sums, sorted by (cosine, lower key)."""
    exact = directions(queries).astype(np.int64) @ key_directions.astype(np.int64).T
    cosine = (exact / 2.0**48).astype(np.float32)
    ids = np.stack([np.lexsort((np.arange(len(key_directions)), -row))[:k] for row in cosine])
    return ids, np.take_along_axis(cosine, ids, axis=1)


def _require_exact(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert [each.dtype for each in found] == [np.int64, np.float32]


@pytest.fixture
def uncertain(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many queries each pass in single precision could not answer."""
    numbers: list[int] = []
    original = Keys._twice

    def counted(self: Keys, *arguments: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = original(self, *arguments)  # type: ignore[arg-type]
        numbers.append(int((~found[2]).sum()))
        return found

    monkeypatch.setattr(Keys, "_twice", counted)
    return numbers  # type: ignore[return-value]


def test_directions_are_the_vectors_at_length_one() -> None:
    vectors = _vectors(20, 0) * 37
    units = directions(vectors) / 2.0**24
    assert directions(vectors).dtype == np.float32
    expected = vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    assert np.abs(units - expected).max() <= 2.0**-25
    assert (directions(np.zeros((2, 5), np.float32)) == 0).all()


@pytest.mark.parametrize("key_block", [7, 100, None])
@pytest.mark.parametrize("k", [1, 9, 300])
def test_cosines_are_exact_and_ties_go_to_the_lower_key(
    key_block: int | None, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = _vectors(300, 1)
    keys[150:] = keys[np.random.default_rng(2).integers(0, 20, 150)]  # many ties, across blocks too
    queries, whole = np.concatenate([_vectors(5, 3), keys[:5]]), directions(keys)
    expected = _reference(queries, whole, k)
    _require_exact(Keys(whole, key_block=key_block).nearest(queries, k), expected)
    monkeypatch.setattr(module, "_WORTHWHILE", 0)  # the other way of searching so few
    _require_exact(Keys(whole, key_block=key_block).nearest(queries, k), expected)


@pytest.mark.parametrize("key_block", [500, None])
@pytest.mark.parametrize("on_device", [False, True])
def test_most_queries_need_no_search_in_double_precision(
    key_block: int | None, on_device: bool, uncertain: list[int]
) -> None:
    whole, queries = directions(_vectors(NUM_KEYS, 1)), _vectors(300, 2)
    keys = Keys(whole, key_block=key_block)
    if on_device:
        keys._directions = torch.from_numpy(whole)  # as a GPU keeps them
    whole.flags.writeable = False  # as a memory map
    _require_exact(keys.nearest(queries, K), _reference(queries, whole, K))
    assert uncertain == [0, 0]


def _copies(keys: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Twenty different keys in all."""
    return keys[np.arange(len(keys)) % 20]


def _differ_in_the_last_bit(keys: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All are the first key but for a unit in one component."""
    near = np.repeat(keys[:1], len(keys), axis=0)
    near[np.arange(len(keys)), rng.integers(0, keys.shape[1], len(keys))] += rng.choice([-1, 1], len(keys))
    return near


def _some_are_zero(keys: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return keys * (rng.random((len(keys), 1)) < 0.01)


def _equal_but_for_the_bound(keys: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A hundred keys, whose cosines with the first lie closer together than the bound; the others are far away."""
    near = keys.copy()
    near[:100] = near[0] + np.rint(rng.normal(size=(100, keys.shape[1])) * 8)
    return near


@pytest.mark.parametrize("change", [_copies, _differ_in_the_last_bit, _some_are_zero, _equal_but_for_the_bound])
@pytest.mark.parametrize("key_block", [500, None])
def test_keys_almost_alike_are_told_apart(change, key_block: int | None, uncertain: list[int]) -> None:
    whole = change(directions(_vectors(NUM_KEYS, 1)), np.random.default_rng(3)).astype(np.float32)
    queries = np.concatenate([whole[:3] / 2**24, _vectors(3, 2), np.zeros((1, 70), np.float32)])
    _require_exact(Keys(whole, key_block=key_block).nearest(queries, K), _reference(queries, whole, K))
    assert uncertain[0] > 0, "these are the hard cases"


def test_a_wider_second_look_is_enough_for_a_hundred_near_keys(
    uncertain: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WORTHWHILE", 0)
    whole = _equal_but_for_the_bound(directions(_vectors(NUM_KEYS, 1)), np.random.default_rng(3)).astype(np.float32)
    Keys(whole).nearest(whole[:1], K)
    assert uncertain == [1, 0]


@given(st.data())
def test_any_keys_and_queries(data: st.DataObject) -> None:
    """Small whole numbers have many equal directions and cosines."""
    width, num_keys, k = (data.draw(st.integers(*limits)) for limits in ((1, 4), (1, 60), (1, 70)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    keys, queries = (rng.integers(-2, 3, (count, width)).astype(np.float32) for count in (num_keys, 5))
    whole, block = directions(keys), data.draw(st.integers(1, 70))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_WORTHWHILE", 0)
        patch.setattr(module, "_SPARE", (2, 8))
        patch.setattr(module, "_GROUP", 3)
        _require_exact(Keys(whole, key_block=block).nearest(queries, k), _reference(queries, whole, k))


def test_scores_wrong_by_nearly_the_bound_change_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, queries = directions(_vectors(NUM_KEYS, 1)), _vectors(200, 2)
    monkeypatch.setattr(module, "_bound", lambda width: 0.01)
    original, rng = Keys._scores, torch.Generator().manual_seed(0)

    def noisy(self: Keys, scaled: torch.Tensor, first: int) -> torch.Tensor:
        scores = original(self, scaled, first)
        is_exact = scaled.dtype == torch.float64
        return scores if is_exact else scores + 0.0199 * (torch.rand(scores.shape, generator=rng) - 0.5)

    monkeypatch.setattr(Keys, "_scores", noisy)
    expected = _reference(queries, whole, K)
    _require_exact(Keys(whole).nearest(queries, K), expected)
    scaled = torch.from_numpy(directions(queries).astype(np.float64) / 2.0**48)
    ids, _, is_certain = (values.numpy() for values in Keys(whole)._twice(scaled, K, K + 3))
    is_right = (ids == expected[0]).all(axis=1)
    assert is_right[is_certain].all()
    assert 0 < is_certain.sum() < len(queries)
    assert not is_right.all(), "without the bound some answers would be wrong"


def test_scores_of_a_device_that_rounds_to_bfloat16_are_not_trusted(
    monkeypatch: pytest.MonkeyPatch, uncertain: list[int]
) -> None:
    whole, queries = directions(_vectors(NUM_KEYS, 1)), _vectors(20, 2)
    original = Keys._scores

    def rounded(self: Keys, scaled: torch.Tensor, first: int) -> torch.Tensor:
        scores = original(self, scaled, first)
        return scores if scaled.dtype == torch.float64 else scores.bfloat16().float()

    monkeypatch.setattr(Keys, "_scores", rounded)
    _require_exact(Keys(whole).nearest(queries, K), _reference(queries, whole, K))
    assert uncertain == [20]


def test_settings_of_lower_precision_do_not_reach_the_scores(uncertain: list[int]) -> None:
    whole, queries = directions(_vectors(NUM_KEYS, 1)), _vectors(20, 2)
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            found = nearest(queries, whole, K)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    _require_exact(found, _reference(queries, whole, K))
    assert uncertain == [0]


@pytest.mark.parametrize("width", [1, 70, 2000])
def test_single_precision_stays_within_the_bound(width: int) -> None:
    queries, keys = directions(_vectors(50, 1, width)), directions(_vectors(50, 2, width))
    keys[:25] = queries[:25]  # no cancellation
    exact = queries.astype(np.int64) @ keys.astype(np.int64).T / 2.0**48
    scores = torch.from_numpy(queries / np.float32(2.0**48)) @ torch.from_numpy(keys).T
    one_by_one = np.zeros((50, 50), np.float32)
    for column in range(width):
        one_by_one += queries[:, None, column] / np.float32(2.0**48) * keys[None, :, column]
    for computed in (scores.numpy(), one_by_one):
        assert np.abs(computed - exact).max() <= module._bound(width)
    assert module._bound(width) < 1.01 * width * 2.0**-24


def test_ties_for_the_last_neighbour_go_to_the_lower_key() -> None:
    keys = np.tile(np.eye(4, dtype=np.float32), (5, 1))
    ids, cosines = nearest(np.eye(4, dtype=np.float32)[:1], directions(keys), 3)
    assert ids.tolist() == [[0, 4, 8]]
    assert cosines.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("num_keys", [500, NUM_KEYS])
def test_threads_and_other_queries_change_no_bit(num_keys: int) -> None:
    keys, queries = directions(_vectors(num_keys, 4)), _vectors(300, 5)
    ids, cosines = nearest(queries, keys, K)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for rows in (slice(0, 1), slice(255, 258), slice(299, 300)):
            alone = nearest(queries[rows], keys, K)
            assert np.array_equal(alone[0], ids[rows])
            assert np.array_equal(alone[1], cosines[rows])
    finally:
        torch.set_num_threads(threads)
