"""The order of the training stream: every sentence once per epoch, whatever the world size or the restart."""

import itertools

import numpy as np
import pytest
from small_table import manifest_of

from mclstexp.data import spots, stream

SENTENCES = stream.sentence_index(manifest_of({"A1": 5, "A2": 5, "B1": 5, "C1": 8}), ["A1", "A2", "B1", "C1"])


def _ids(rows: list[dict[str, object]]) -> list[object]:
    return [row["sentence_id"] for row in rows if row["sentence_id"]]


def test_an_epoch_is_a_permutation_fixed_by_seed_and_epoch() -> None:
    first, again = (stream.epoch_order(SENTENCES, seed=1, epoch=0) for _ in range(2))
    assert first == again
    assert sorted(first, key=repr) == sorted(SENTENCES, key=repr)
    orders = [
        tuple(s.sentence_id for s in stream.epoch_order(SENTENCES, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4


def test_a_batch_holds_sentences_of_different_sections() -> None:
    even = [sentence for sentence in SENTENCES if sentence.section_id != "C1"]
    order = stream.epoch_order(even, seed=3, epoch=5)
    for start in range(0, len(order), 3):
        assert len({sentence.section_id for sentence in order[start : start + 3]}) == 3


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_each_global_step_whatever_the_world_size(world_size: int) -> None:
    order = stream.epoch_order(SENTENCES, seed=0, epoch=0)
    ranks = [stream.rank_slice(order, 4, rank, world_size, epoch=0) for rank in range(world_size)]
    assert len({len(rows) for rows in ranks}) == 1
    share = 4 // world_size
    steps = len(ranks[0]) // share
    by_step = [
        _ids([row for rows in ranks for row in rows[step * share : (step + 1) * share]]) for step in range(steps)
    ]
    assert list(itertools.chain(*by_step)) == [sentence.sentence_id for sentence in order]
    assert [len(ids) for ids in by_step] == [4, 4, 4, 4, 4, 3]


def test_shuffled_pairs_are_others_expression_and_new_each_epoch() -> None:
    orders = [stream.epoch_order(SENTENCES, seed=0, epoch=epoch) for epoch in (0, 1)]
    shuffled = [stream.mispaired(order) for order in orders]
    for order, pairs in zip(orders, shuffled, strict=True):
        assert [pair.sentence_id for pair in pairs] == [sentence.sentence_id for sentence in order]
        assert all(pair.expression_of != (pair.section_id, pair.group) for pair in pairs)
        assert len({pair.expression_of for pair in pairs}) == len(order)
    partners = [{pair.sentence_id: pair.expression_of for pair in pairs} for pairs in shuffled]
    assert sum(partners[0][name] == partners[1][name] for name in partners[0]) < len(SENTENCES) / 4


def test_kept_spots_are_ordered_within_bounds_and_new_each_epoch() -> None:
    kept = [spots.kept_spots(100, 0.3, seed=0, epoch=epoch, sentence_id="A1/0") for epoch in range(20)]
    assert all(70 <= len(rows) <= 100 and (np.diff(rows) > 0).all() for rows in kept)
    assert len({tuple(rows) for rows in kept}) > 10
    assert list(spots.kept_spots(1, 0.9, 0, 0, "x")) == [0]
    assert list(spots.kept_spots(7, 0.0, 0, 0, "x")) == list(range(7))


def test_padding_is_masked_zeros() -> None:
    padded = spots.pad({"a": np.ones((2, 3)), "b": np.arange(2)}, 4)
    assert padded["a"].shape == (1, 4, 3)
    assert padded["mask"].tolist() == [[True, True, False, False]]
    assert padded["a"][0, 2:].sum() == 0
