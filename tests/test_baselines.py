"""Floors against independent solutions: closed-form ridge, hand-made cross-validation, plain means."""

import numpy as np
import pytest

from mclstexp.errors import UserError
from mclstexp.evaluation import floors
from mclstexp.evaluation.metrics import pearson_per_gene


def _problem(num_spots: int, num_features: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    features = rng.normal(3, [1, *[10] * (num_features - 1)], (num_spots, num_features))
    target = features @ rng.normal(size=(num_features, 5)) / 10 + 2 + noise * rng.normal(size=(num_spots, 5))
    return features.astype(np.float32), target.astype(np.float32)


def _closed_form(features: np.ndarray, target: np.ndarray, alpha: float, asked: np.ndarray) -> np.ndarray:
    mean, std = features.mean(0), features.std(0)
    x, y = (features - mean) / std, target - target.mean(0)
    weights = np.linalg.solve(x.T @ x + alpha * np.eye(x.shape[1]), x.T @ y)
    return (asked - mean) / std @ weights + target.mean(0)


@pytest.mark.parametrize(("num_features", "noise"), [(6, 0.1), (6, 30.0), (90, 3.0)])
def test_ridge_takes_the_alpha_of_smallest_error_on_groups_left_out(num_features: int, noise: float) -> None:
    features, target = (values.astype(np.float64) for values in _problem(80, num_features, noise))
    groups = np.repeat(["a", "b", "c"], [30, 30, 20])
    errors = []
    for alpha in floors.ALPHAS:
        folds = [(groups != left_out, groups == left_out) for left_out in "abc"]
        gaps = [_closed_form(features[i], target[i], alpha, features[o]) - target[o] for i, o in folds]
        errors.append(np.mean([(gap**2).mean() for gap in gaps]))
    best = floors.ALPHAS[int(np.argmin(errors))]
    floor = floors.RidgeFloor(features, target, groups)
    asked = _problem(40, num_features, 0, seed=1)[0]
    assert floor.alpha == best
    np.testing.assert_allclose(floor.predict(asked), _closed_form(features, target, best, asked), rtol=1e-4, atol=1e-4)


def test_ridge_samples_the_training_spots_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "MAX_RIDGE_SPOTS", 60)
    features, target = _problem(200, 6, 0.1)
    groups = np.arange(200) % 2
    first, again = (floors.RidgeFloor(features, target, groups) for _ in range(2))
    np.testing.assert_array_equal(first.predict(features), again.predict(features))
    assert (pearson_per_gene(target, first.predict(features)) > 0.9).all()


def test_ridge_bears_features_that_never_vary() -> None:
    features, target = _problem(60, 6, 0.1)
    features[:, 3] = 7
    prediction = floors.RidgeFloor(features, target, np.arange(60) % 3).predict(features)
    assert np.isfinite(prediction).all()


def test_constants_and_library_size_are_the_same_for_all_spots_and_for_all_genes() -> None:
    np.testing.assert_array_equal(floors.constant(np.array([2.0, 4.0]), 3), np.tile([2, 4], (3, 1)))
    oracle = floors.library_size(np.array([0.0, np.e - 1]), 4)
    np.testing.assert_allclose(oracle, [[0] * 4, [1] * 4], rtol=1e-6)


def test_groups_are_patients_then_sections_then_stretches() -> None:
    patients, sections = np.array(["A", "A", "B"], object), np.array(["A1", "A2", "B1"], object)
    assert list(floors.training_groups(patients, sections)) == ["A", "A", "B"]
    assert list(floors.training_groups(patients[:2], sections[:2])) == ["A1", "A2"]
    one = np.array(["A1"] * 10, object)
    assert list(floors.training_groups(one, one)) == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    with pytest.raises(UserError, match="at least 2 training spots"):
        floors.training_groups(one[:1], one[:1])
