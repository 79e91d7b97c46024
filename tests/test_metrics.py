"""Scores against SciPy and scikit-learn, and what happens where a correlation is not defined."""

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import mean_absolute_error, mean_squared_error

from mclstexp.evaluation import metrics


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
    squared, absolute = metrics.errors_per_gene(truth, prediction)
    pair = truth.astype(float), prediction.astype(float)
    np.testing.assert_allclose(squared, mean_squared_error(*pair, multioutput="raw_values"))
    np.testing.assert_allclose(absolute, mean_absolute_error(*pair, multioutput="raw_values"))
