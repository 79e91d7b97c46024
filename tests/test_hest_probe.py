"""The HEST-bench probe against scikit-learn's own steps as published, and against a closed form in NumPy."""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from mclstexp.evaluation.hest_probe import HestProbe
from mclstexp.model import probe


def _problem(num_spots: int, num_features: int = 400, num_genes: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns features (N, F) and expression (N, G) of training spots, and features of 50 others."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(num_features, num_features)) * np.geomspace(3, 0.1, num_features)
    every = (rng.normal(size=(num_spots + 50, num_features)) @ mixing.T + 4).astype(np.float32)
    features, asked = every[:num_spots], every[num_spots:]
    weights = rng.normal(size=(num_features, num_genes)) / num_features
    target = features @ weights + rng.normal(size=(num_spots, num_genes)) + 2
    return features, target.astype(np.float32), asked


def _closed_form(features: np.ndarray, target: np.ndarray, asked: np.ndarray, components: int) -> np.ndarray:
    features, target, asked = (values.astype(np.float64) for values in (features, target, asked))
    mean, std = features.mean(0), features.std(0)
    x = (features - mean) / np.where(std > 0, std, 1)
    _, axes = np.linalg.eigh(x.T @ x)
    axes = axes[:, ::-1][:, :components]
    scores, alpha = x @ axes, 100 / (components * target.shape[1])
    weights = np.linalg.solve(scores.T @ scores + alpha * np.eye(components), scores.T @ (target - target.mean(0)))
    return (asked - mean) / np.where(std > 0, std, 1) @ axes @ weights + target.mean(0)


@pytest.mark.parametrize(("num_spots", "num_features"), [(700, 400), (300, 400), (400, 700)])
def test_the_probe_is_scikit_learns(num_spots: int, num_features: int) -> None:
    """As published there is no intercept; features are centred, so that it is each gene's mean."""
    features, target, asked = _problem(num_spots, num_features)
    scaler, pca = StandardScaler(), PCA(256, svd_solver="full")
    reduced = pca.fit_transform(scaler.fit_transform(features.astype(np.float64)))
    published = Ridge(alpha=100 / (256 * 12), fit_intercept=False).fit(reduced, target.astype(np.float64))
    expected = published.predict(pca.transform(scaler.transform(asked.astype(np.float64))))
    found = HestProbe(features, target).predict(asked)
    np.testing.assert_allclose(found - target.mean(0, dtype=np.float64), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found, _closed_form(features, target, asked, 256), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("num_spots", "num_features", "components"), [(40, 400, 39), (700, 30, 30), (2, 5, 1)])
def test_few_spots_or_features_have_as_many_components_as_they_span(
    num_spots: int, num_features: int, components: int
) -> None:
    features, target, asked = _problem(num_spots, num_features)
    expected = _closed_form(features, target, asked, components)
    np.testing.assert_allclose(HestProbe(features, target).predict(asked), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_spots", [1, 300])
def test_features_that_say_nothing_give_the_mean(num_spots: int) -> None:
    features, target, asked = _problem(num_spots, 5)
    features = np.full_like(features, 7)
    np.testing.assert_allclose(
        HestProbe(features, target).predict(asked), np.tile(target.mean(0), (50, 1)), rtol=1e-6, atol=1e-6
    )


def test_constant_features_change_nothing() -> None:
    features, target, asked = _problem(60, 20)
    expected = _closed_form(features, target, asked, 20)
    with_constant = [np.concatenate([values, np.full((len(values), 3), 0.3)], axis=1) for values in (features, asked)]
    np.testing.assert_allclose(
        HestProbe(with_constant[0], target).predict(with_constant[1]), expected, rtol=1e-5, atol=1e-5
    )


def test_a_gene_is_fitted_where_it_is_measured() -> None:
    features, target, asked = _problem(300, 20)
    target[:200, 3] = np.nan
    target[:, 5] = np.nan
    found = HestProbe(features, target).predict(asked)
    assert not found[:, 5].any()
    own = HestProbe(features[200:], np.repeat(target[200:, 3:4], 12, axis=1)).predict(asked)
    np.testing.assert_allclose(found[:, 3], own[:, 0], rtol=1e-5, atol=1e-6)


def test_the_probe_samples_the_training_spots_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    features, target, asked = _problem(300, 20)
    whole = HestProbe(features, target).predict(asked)
    monkeypatch.setattr(probe, "MAX_SPOTS", 100)
    first, again = (HestProbe(features, target).predict(asked) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - whole).max() > 1e-3
