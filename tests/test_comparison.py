"""The paired comparison of two models: against scipy on rows that are really repeated, and with known answers."""

import numpy as np
import pytest
from scipy.stats import pearsonr

from mclstexp.errors import ConfigError
from tuning import promotion
from tuning.promotion import Pair, compare


def _grid(side: int, pitch_um: float = 200.0) -> np.ndarray:
    return np.indices((side, side)).reshape(2, -1).T * pitch_um


def _pair(rng: np.random.Generator, champion_noise: float, challenger_noise: float, replicates: int = 3) -> Pair:
    truth = rng.gamma(2.0, size=(400, 60))
    said = [
        truth + noise * rng.normal(size=truth.shape) for noise in (champion_noise, *[challenger_noise] * replicates)
    ]
    return Pair("P1", _grid(20), truth, said[0], np.stack(said[1:]))


def test_weights_are_repeated_rows() -> None:
    rng = np.random.default_rng(0)
    truth, said = rng.gamma(2.0, size=(30, 5)), rng.gamma(2.0, size=(30, 5))
    weights = rng.integers(0, 4, size=(3, 30))
    found = promotion._weighted_pcc(truth, said, weights.astype(float))
    for row, value in zip(weights, found, strict=True):
        repeated = np.repeat(np.arange(30), row)
        expected = [pearsonr(truth[repeated, gene], said[repeated, gene]).statistic for gene in range(5)]
        assert value == pytest.approx(np.mean(expected))


def test_a_constant_gene_counts_as_zero() -> None:
    truth = np.random.default_rng(0).gamma(2.0, size=(30, 2))
    said = truth.copy()
    said[:, 1] = 3.0
    assert promotion._weighted_pcc(truth, said, np.ones((1, 30))) == pytest.approx(0.5)


def test_all_spots_of_a_block_are_drawn_alike() -> None:
    place = _grid(20)
    weights = promotion._block_weights(place, 1000.0, np.random.default_rng(0))
    block = (place // 1000).astype(int) @ [4, 1]
    assert len(set(block)) == 16
    for one in range(16):
        assert (weights[:, block == one] == weights[:, block == one][:, :1]).all()
    assert weights.sum(axis=1).mean() == pytest.approx(400, rel=0.01)


def test_a_better_model_is_better_and_an_equal_one_is_not() -> None:
    rng = np.random.default_rng(1)
    better = compare([_pair(rng, 3.0, 1.0)], 1000.0, seed=0)
    assert better.is_better
    assert better.low < better.mean < better.high
    alike = [compare([_pair(rng, 2.0, 2.0)], 1000.0, seed=seed).is_better for seed in range(10)]
    assert sum(alike) <= 2
    pair = _pair(rng, 2.0, 2.0)
    same = compare([Pair("P1", pair.place_um, pair.truth, pair.champion, pair.champion[None])], 1000.0, seed=0)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    assert not same.is_better


def test_one_lucky_training_of_three_is_not_enough() -> None:
    rng = np.random.default_rng(2)
    pair, lucky = _pair(rng, 2.0, 2.6), _pair(rng, 2.0, 0.5)
    trainings = np.stack([pair.truth + (lucky.challengers[0] - lucky.truth), *pair.challengers[1:]])
    mixed = compare([Pair("P1", pair.place_um, pair.truth, pair.champion, trainings)], 1000.0, seed=0)
    assert mixed.mean > 0
    assert not mixed.is_better


def test_seeds_that_differ_more_than_tissue_promote_no_equal_model_too_often() -> None:
    rng = np.random.default_rng(4)
    promoted = 0
    for _ in range(60):
        luck = rng.normal(scale=0.4, size=3)
        truth = rng.gamma(2.0, size=(100, 60))
        said = [truth + (2.0 + shift) * rng.normal(size=truth.shape) for shift in (0.0, *luck)]
        pair = Pair("P1", _grid(10), truth, said[0], np.stack(said[1:]))
        promoted += compare([pair], 400.0, seed=0).is_better
    assert promoted <= 5  # of 60, where 1 in 40 is meant


def test_too_few_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tune\.block_um=4000 cuts a section into 1 blocks"):
        compare([_pair(np.random.default_rng(0), 2.0, 2.0)], 4000.0, seed=0)


def test_patients_count_alike_however_many_sections_they_have() -> None:
    rng = np.random.default_rng(3)
    good, bad = _pair(rng, 3.0, 1.0), _pair(rng, 1.0, 3.0)
    other = Pair("P2", *list(vars(bad).values())[1:])
    one, three = compare([good, other], 1000.0, seed=0), compare([good, good, good, other], 1000.0, seed=0)
    assert one.mean == pytest.approx(three.mean)
