"""Metrics against SciPy and scikit-learn, undefined correlations, and the density-free view.

The density-free correlation is compared with SciPy's least squares and the formula of partial correlation.
"""

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import mean_absolute_error, mean_squared_error

from mclstexp.evaluation import floors, metrics
from mclstexp.evaluation.metrics import density_free_pearson, density_residuals


@pytest.mark.parametrize("shape", [(2, 3), (17, 60), (300, 120)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_correlations_equal_scipy(shape: tuple[int, int], offset: float) -> None:
    rng = np.random.default_rng(0)
    truth = (rng.gamma(0.5, size=shape) + offset).astype(np.float32)
    prediction = (truth + rng.normal(size=shape)).astype(np.float32)
    expected = [
        scipy.stats.pearsonr(a.astype(np.float64), b.astype(np.float64)).statistic
        for a, b in zip(truth.T, prediction.T, strict=True)
    ]
    np.testing.assert_allclose(metrics.pearson_per_gene(truth, prediction), expected, rtol=1e-9, atol=1e-9)


def test_a_constant_side_has_no_correlation() -> None:
    truth = np.array([[0, 1, 5], [0, 2, 4], [0, 3, 9]], np.float32)
    prediction = np.array([[1, 1, 0.1], [2, 2, 0.1], [3, 3, 0.1]], np.float32)
    pcc = metrics.pearson_per_gene(truth, prediction)
    assert np.isnan(pcc[[0, 2]]).all()
    assert pcc[1] == pytest.approx(1.0)


def test_highest_genes_come_from_the_truth_and_ties_go_by_column() -> None:
    truth = np.array([[1, 5, 5, 2], [1, 5, 5, 3]], np.float32)
    assert list(metrics.highest_genes(truth, 3)) == [1, 2, 3]
    assert len(metrics.highest_genes(truth)) == 4


def test_variable_genes_come_from_the_truths_own_variance() -> None:
    truth = np.array([[100, 0, 1, 3], [100, 4, 0, 3], [101, 2, 8, 3]], np.float32)
    assert list(metrics.variable_genes(truth, 2)) == [2, 1]
    wide = np.random.default_rng(0).gamma(0.5, size=(40, 120)).astype(np.float32)
    variance = [np.var([float(value) for value in column]) for column in wide.T]
    assert list(metrics.variable_genes(wide)) == sorted(range(120), key=lambda gene: -variance[gene])[:50]


def test_errors_are_kept_by_gene() -> None:
    rng = np.random.default_rng(0)
    truth, prediction = (rng.gamma(0.5, size=(17, 6)).astype(np.float32) for _ in range(2))
    squared = metrics.squared_error_per_gene(truth, prediction)
    absolute = metrics.absolute_error_per_gene(truth, prediction)
    pair = truth.astype(float), prediction.astype(float)
    np.testing.assert_allclose(squared, mean_squared_error(*pair, multioutput="raw_values"))
    np.testing.assert_allclose(absolute, mean_absolute_error(*pair, multioutput="raw_values"))


def _section(num_spots: int, num_genes: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth and prediction that share density and something else, and the totals."""
    rng = np.random.default_rng(num_spots)
    totals = np.rint(rng.lognormal(7, 1, num_spots))
    shared, density = rng.normal(size=(num_spots, num_genes)), np.log(totals)[:, None]
    sides = (5 + shared + density + 0.3 * rng.normal(size=shared.shape) for _ in range(2))
    truth, prediction = (side.astype(np.float32) for side in sides)
    return truth, prediction, totals


@pytest.mark.parametrize("num_spots", [4, 30, 300])
def test_equals_the_partial_correlation(num_spots: int) -> None:
    truth, prediction, totals = _section(num_spots)
    found = density_free_pearson(truth, prediction, totals)
    for gene in range(truth.shape[1]):
        t, p, size = truth[:, gene].astype(float), prediction[:, gene].astype(float), np.log(totals + 1)
        tp, ts, ps = (scipy.stats.pearsonr(*pair).statistic for pair in ((t, p), (t, size), (p, size)))
        assert found[gene] == pytest.approx((tp - ts * ps) / np.sqrt((1 - ts**2) * (1 - ps**2)), abs=1e-9)


def test_residuals_are_those_of_a_line() -> None:
    truth, _, totals = _section(50)
    size = np.log(totals + 1)
    for values, found in zip(truth.T.astype(float), density_residuals(truth, totals).T, strict=True):
        line = scipy.stats.linregress(size, values)
        np.testing.assert_allclose(found, values - line.intercept - line.slope * size, atol=1e-10)


def test_the_oracle_and_constants_have_no_density_free_correlation() -> None:
    truth, _, totals = _section(200)
    oracle = floors.library_size(totals, truth.shape[1])
    for nothing in (oracle, -3 * oracle + 0.1, floors.constant(truth.mean(axis=0), 200), np.zeros_like(truth)):
        assert (density_residuals(nothing, totals) == 0).all()
        assert np.isnan(density_free_pearson(truth, nothing, totals)).all()
        assert np.isnan(density_free_pearson(nothing, truth, totals)).all()


def test_small_differences_above_rounding_are_kept() -> None:
    truth, _, totals = _section(200)
    faint = (5 + 1e-4 * truth).astype(np.float32)
    assert (density_free_pearson(truth, faint, totals) > 0.99).all()


def test_density_alone_loses_its_correlation_and_the_rest_keeps_it() -> None:
    rng = np.random.default_rng(0)
    totals = rng.lognormal(7, 1, 2000)
    own = rng.normal(size=(2000, 1))
    truth = np.log(totals)[:, None] + own
    noisy_density = np.log(totals)[:, None] + 0.5 * rng.normal(size=own.shape)
    assert scipy.stats.pearsonr(truth[:, 0], noisy_density[:, 0]).statistic > 0.5
    assert abs(density_free_pearson(truth, noisy_density, totals)[0]) < 0.06
    assert density_free_pearson(truth, own, totals)[0] > 0.99


def test_equal_totals_leave_the_plain_correlation() -> None:
    truth, prediction, _ = _section(30)
    expected = [scipy.stats.pearsonr(*pair).statistic for pair in zip(truth.T, prediction.T, strict=True)]
    np.testing.assert_allclose(density_free_pearson(truth, prediction, np.full(30, 9.0)), expected, rtol=1e-6)


def test_two_spots_leave_nothing() -> None:
    truth, prediction, totals = _section(2)
    assert np.isnan(density_free_pearson(truth, prediction, totals)).all()


def test_levels_are_correlated_over_those_who_measure_the_gene() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(5, 1, (6, 5))
    prediction = truth + rng.normal(size=truth.shape)
    lacking = np.zeros(truth.shape, bool)
    lacking[[0, 4], 1], lacking[:4, 2], lacking[:, 3] = True, True, True  # 4, 2 and no measured ones
    prediction[:, 4] = 0.1 * (1 + 1e-9 * rng.normal(size=6))  # constant but for rounding
    truth[lacking] = prediction[lacking] = np.nan
    found = metrics.pearson_between(truth, prediction)
    for gene in (0, 1):
        rows = ~lacking[:, gene]
        expected = scipy.stats.pearsonr(truth[rows, gene], prediction[rows, gene]).statistic
        assert found[gene] == pytest.approx(expected, abs=1e-12)
    assert np.isnan(found[2:]).all()


def test_the_error_of_a_level_is_that_of_the_mean_over_spots() -> None:
    truth, prediction = np.array([[1.0, 0], [3, 4]], np.float32), np.array([[2.0, 9], [4, 1]], np.float32)
    assert metrics.squared_level_error(truth, prediction).tolist() == [1.0, 9.0]
