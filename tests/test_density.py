"""The density-free view: against SciPy's least squares, the formula of partial correlation, and what must vanish."""

import numpy as np
import pytest
import scipy.stats

from mclstexp.evaluation import floors
from mclstexp.evaluation.metrics import density_free_pearson, density_residuals


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


def test_small_differences_that_are_no_rounding_are_kept() -> None:
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
