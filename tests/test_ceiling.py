"""The noise ceiling against simulated sections whose noise-free expression is known."""

import numpy as np
import pytest
import scipy.stats

from mclstexp.evaluation.floors import halve, noise_ceiling
from mclstexp.evaluation.metrics import density_free_pearson
from mclstexp.evaluation.sections import TARGETS, normalise_section

NUM_SPOTS, NUM_GENES = 600, 30


def _rates(depth: float) -> tuple[np.ndarray, np.ndarray]:
    """Expected counts of the panel, (N, G), and of all other genes, (N,); density and each gene's own pattern vary."""
    rng = np.random.default_rng(0)
    density = rng.lognormal(0, 0.5, (NUM_SPOTS, 1))
    own = rng.lognormal(0, 0.6, (NUM_SPOTS, NUM_GENES))
    return depth * density * own, 100 * depth * density[:, 0]


def _measure(rates: tuple[np.ndarray, np.ndarray], seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rates[0])
    return counts.astype(np.float32), counts.sum(axis=1) + rng.poisson(rates[1]).astype(np.float64)


def _correlations(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    pairs = zip(one.T.astype(float), other.T.astype(float), strict=True)
    return np.array([scipy.stats.pearsonr(*pair).statistic for pair in pairs])


@pytest.mark.parametrize("name", TARGETS)
def test_reliability_is_what_two_measurements_of_a_section_share(name: str) -> None:
    rates, target = _rates(30), TARGETS[name]
    first, second = _measure(rates, 1), _measure(rates, 2)
    found = noise_ceiling(*first, target, seed=0)
    one, other = normalise_section(target, *first), normalise_section(target, *second)
    assert found["reliability"].mean() == pytest.approx(_correlations(one, other).mean(), abs=0.05)
    expected = rates[1] + rates[0].sum(axis=1)
    without_density = density_free_pearson(one, other, expected).mean()
    assert found["reliability_density_free"].mean() == pytest.approx(without_density, abs=0.05)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("depth", "too_high"), [(1.0, 0.1), (3.0, 0.1), (30.0, 0.02)])
def test_the_best_possible_prediction_stands_at_the_ceiling(name: str, depth: float, too_high: float) -> None:
    """The best prediction is what a spot's measurements are on average; shallow counts make the ceiling too high."""
    rates, target = _rates(depth), TARGETS[name]
    counts, totals = _measure(rates, 0)
    perfect = np.mean([normalise_section(target, *_measure(rates, seed)) for seed in range(1, 60)], axis=0)
    reached = _correlations(normalise_section(target, counts, totals), perfect).mean()
    found = noise_ceiling(counts, totals, target, seed=0)
    assert -0.02 < found["pcc"].mean() - reached < too_high
    if depth == 30:
        assert reached > found["reliability"].mean() + 0.03, "reliability itself is no ceiling"


def test_the_ceiling_is_high_for_deep_and_low_for_unstructured_counts() -> None:
    deep = noise_ceiling(*_measure(_rates(1e5), 1), TARGETS["per_gene"], seed=0)
    assert (deep[["pcc", "pcc_density_free"]] > 0.99).all(axis=None)
    flat = np.full((NUM_SPOTS, NUM_GENES), 5.0), np.full(NUM_SPOTS, 1000.0)
    noise = noise_ceiling(*_measure(flat, 1), TARGETS["per_spot"], seed=0)
    assert noise[["reliability", "reliability_density_free"]].mean().abs().max() < 0.04
    assert noise["reliability"].min() < 0
    assert noise["pcc"].min() == 0


def test_a_gene_that_a_half_lacks_is_undefined() -> None:
    counts, totals = _measure(_rates(3), 1)
    counts[:, 0], counts[:, 1] = 0, 0
    counts[7, 1] = 1
    found = noise_ceiling(counts, totals + 1, TARGETS["per_spot"], seed=0)
    assert found.iloc[:2].isna().all(axis=None)
    assert found.iloc[2:].notna().all(axis=None)


def test_two_spots_say_nothing_but_do_no_harm() -> None:
    found = noise_ceiling(np.ones((2, 20_000)), np.array([20_010.0, 20_100.0]), TARGETS["per_spot"], seed=0)
    assert found["reliability"].min() == pytest.approx(-1)  # in all halvings the one molecule apart from the other
    assert found["pcc_density_free"].isna().all()


def test_the_seed_decides() -> None:
    section = _measure(_rates(3), 1)
    first, again, other = (noise_ceiling(*section, TARGETS["per_spot"], seed)["pcc"] for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()
    assert first.mean() == pytest.approx(other.mean(), abs=0.01)


def test_halves_add_up_and_are_independent() -> None:
    rates = np.full((20_000, 2), 4.0), np.full(20_000, 50.0)
    counts, totals = _measure(rates, 1)
    (first, first_totals), (second, second_totals) = halve(counts, totals, np.random.default_rng(0))
    np.testing.assert_array_equal(first + second, counts)
    np.testing.assert_array_equal(first_totals + second_totals, totals)
    assert (first >= 0).all()
    assert (first_totals >= first.sum(axis=1)).all()
    for half, mean in ((first[:, 0], 2), (second[:, 1], 2), (first_totals, 29), (second_totals, 29)):
        assert half.mean() == pytest.approx(mean, rel=0.02)
        assert half.var() == pytest.approx(mean, rel=0.05)  # Poisson
    assert abs(scipy.stats.pearsonr(first[:, 0], second[:, 0]).statistic) < 0.03
    assert abs(scipy.stats.pearsonr(first_totals, second_totals).statistic) < 0.03
