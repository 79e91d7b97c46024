"""A bank in shards answers as the bank held whole does, to the bit."""

import os
import pickle

import numpy as np
import pytest
import ray

from mclstexp.inference.bank import Bank
from mclstexp.inference.retrieval import held, neighbours, retrieve
from mclstexp.inference.shards import LocalShards, Shards, split_bank
from mclstexp.settings import RetrievalConfig

KEY_BLOCK = 16
CONFIGS = [
    RetrievalConfig(k=9, temperature=0.1),
    RetrievalConfig(k=60, temperature=0.02),  # more than any of several shards holds
    RetrievalConfig(k=9, weighting="mean"),
    RetrievalConfig(k=9, weighting="inverse_square", distance="l1"),
    RetrievalConfig(k=60, weighting="inverse_square", distance="l2"),
]


def _bank(num_keys: int = 150, seed: int = 0) -> Bank:
    """Random spots, a third of them twins of others elsewhere: cosines tie, payloads do not."""
    rng = np.random.default_rng(seed)
    keys, payload = (rng.normal(size=(num_keys, width)).astype(np.float32) for width in (12, 7))
    twins = rng.permutation(num_keys)[: num_keys // 3]
    keys[twins] = keys[rng.integers(0, num_keys, len(twins))]
    patients = np.array([f"P{code}" for code in rng.integers(0, 4, num_keys)], object)
    return Bank(keys, payload, patients, patients, np.array([str(spot) for spot in range(num_keys)], object))


def _queries(bank: Bank, seed: int = 1) -> np.ndarray:
    """More than a block of queries, some of them on keys."""
    random = np.random.default_rng(seed).normal(size=(260, bank.keys.shape[1])).astype(np.float32)
    return np.concatenate([random, bank.keys[::7]])


def _same(queries: np.ndarray, shards: Shards, whole: Shards, config: RetrievalConfig) -> None:
    found, expected = (retrieve(queries, held, config) for held in (shards, whole))
    for name, values in vars(expected).items():
        assert np.array_equal(getattr(found, name), values), name
        assert getattr(found, name).dtype == np.float32, name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.weighting}-{config.k}-{config.distance}")
@pytest.mark.parametrize("num_shards", [2, 3, 10])
def test_shards_answer_as_the_whole_bank(num_shards: int, config: RetrievalConfig) -> None:
    bank = _bank()
    whole, shards = (LocalShards(split_bank(bank, count, KEY_BLOCK)) for count in (1, num_shards))
    assert len(shards.shards) == num_shards
    _same(_queries(bank), shards, whole, config)
    ids = [neighbours(_queries(bank), held, config).ids for held in (shards, whole)]
    assert np.array_equal(*ids)


def test_banks_of_many_shapes_answer_alike_in_shards() -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        bank = _bank(int(rng.integers(20, 90)), seed)
        config = CONFIGS[seed % len(CONFIGS)].model_copy(update={"k": int(rng.integers(1, len(bank) + 1))})
        block = int(rng.integers(1, 12))
        whole, shards = (LocalShards(split_bank(bank, count, block)) for count in (1, int(rng.integers(2, 9))))
        _same(_queries(bank)[:5], shards, whole, config)


def test_a_bank_held_whole_is_one_shard_with_blocks_of_the_usual_size() -> None:
    bank = _bank()
    whole = held(bank)
    _same(_queries(bank), bank, whole, CONFIGS[0])
    assert [shard.key_block for shard in whole.shards] == [65_536]
    assert np.shares_memory(whole.shards[0].payload, bank.payload)


def test_a_bank_of_several_usual_blocks_answers_alike_in_shards() -> None:
    bank = _bank(2 * 65_536 + 999)
    shards = LocalShards(split_bank(bank, 3))
    assert [len(shard.keys) for shard in shards.shards] == [65_536, 65_536, 999]
    queries = _queries(bank)[:20]
    for config in (CONFIGS[1], CONFIGS[4]):
        _same(queries, shards, held(bank), config)
        ids = neighbours(queries, shards, config).ids
        assert {0, 1} <= set((ids // 65_536).ravel().tolist()), "the best must lie in several shards"


@pytest.mark.parametrize(("num_shards", "sizes"), [(1, [150]), (3, [64, 48, 38]), (10, [16] * 9 + [6])])
def test_a_shard_is_a_run_of_whole_key_blocks(num_shards: int, sizes: list[int]) -> None:
    bank = _bank()
    shards = split_bank(bank, num_shards, KEY_BLOCK)
    assert [len(shard.keys) for shard in shards] == sizes
    assert all(shard.start % KEY_BLOCK == 0 for shard in shards)
    for name in ("keys", "directions", "payload"):
        assert np.array_equal(np.concatenate([getattr(shard, name) for shard in shards]), getattr(bank, name)), name
    assert len(split_bank(bank, 99, KEY_BLOCK)) == 10, "a shard has at least one block"


def test_a_shard_travels_with_its_own_rows_alone() -> None:
    bank = _bank(1600)
    whole, part = (len(pickle.dumps(split_bank(bank, count, KEY_BLOCK)[0], protocol=5)) for count in (1, 10))
    assert part < whole / 8


@pytest.mark.ray
@pytest.mark.slow
def test_actors_answer_as_the_whole_bank_even_after_one_died(ray_session: None) -> None:
    from mclstexp.inference.shard_actors import start_shards

    bank = _bank()
    queries = _queries(bank)
    actors = start_shards(split_bank(bank, 2, KEY_BLOCK))
    whole = LocalShards(split_bank(bank, 1, KEY_BLOCK))
    for config in CONFIGS:
        _same(queries, actors, whole, config)
    victim = actors.actors[1]
    process = ray.get(victim.__ray_call__.remote(lambda self: os.getpid()))
    ray.kill(victim, no_restart=False)
    _same(queries, actors, whole, CONFIGS[-1])
    assert ray.get(victim.__ray_call__.remote(lambda self: os.getpid())) != process, "it must have died"
