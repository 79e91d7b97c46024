"""The probe against scikit-learn's own steps, a closed form in NumPy, and spots that are really left out."""

import numpy as np
import pytest
from plain_probe import PENALTIES, components, leave_one_out, plain_probe
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge, RidgeCV

from mclstexp.evaluation.metrics import pearson_per_gene
from mclstexp.model import probe
from mclstexp.model.probe import Probe

Problem = tuple[np.ndarray, np.ndarray, np.ndarray]


def _problem(num_spots: int, num_features: int, noise: float = 1.0, num_genes: int = 5) -> Problem:
    """Returns features (N, F) and expression (N, G) of training spots, and features of 40 others, some far away."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(num_features, num_features)) * np.geomspace(3, 0.1, num_features)
    every = rng.normal(size=(num_spots + 40, num_features)) @ mixing.T * np.geomspace(1e-3, 10, num_features) + 4
    features, asked = every[:num_spots], every[num_spots:]
    weights = rng.normal(size=(num_features, num_genes)) / every.std(0)[:, None] / np.sqrt(num_features)
    target = (features - 4) @ weights + noise * rng.normal(size=(num_spots, num_genes)) + 2
    asked[0] += 30 * features.std(0)
    features[0] -= 20 * features.std(0)  # an outlier, which is clipped
    return tuple(values.astype(np.float32) for values in (features, target, asked))


@pytest.mark.parametrize(
    ("num_spots", "num_features", "noise"),
    [(80, 6, 0.1), (80, 6, 30.0), (300, 90, 1.0), (270, 300, 1.0), (300, 270, 1.0)],
)
def test_the_probe_is_scikit_learns_and_the_closed_form(num_spots: int, num_features: int, noise: float) -> None:
    features, target, asked = _problem(num_spots, num_features, noise)
    mean, deviation = features.mean(0, dtype=float), features.astype(float).std(0) + 1e-6
    seen, new = (((each - mean) / deviation).clip(-8, 8) / np.sqrt(num_features) for each in (features, asked))
    pca = PCA(min(256, num_spots - 1, num_features), svd_solver="full").fit(seen)
    scores, new_scores = (pca.transform(each) * np.sqrt(num_features) for each in (seen, new))
    expected = RidgeCV(alphas=np.logspace(1, 6, 16)).fit(scores, target.astype(float))
    fitted = Probe(features, target)
    np.testing.assert_allclose(fitted.predict(asked), expected.predict(new_scores), rtol=1e-6, atol=1e-6)
    penalty, closed_form = plain_probe(features, target, asked)
    assert fitted.alphas == [expected.alpha_] == pytest.approx([penalty])
    np.testing.assert_allclose(fitted.predict(asked), closed_form, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(fitted.predict(asked), Probe(features, target).predict(asked))
    ((genes, linear),) = fitted.parts
    assert genes.tolist() == list(range(5))
    turn = np.sign((linear.components * pca.components_.T).sum(axis=0))  # a component may point either way
    centred = new @ pca.components_.T - pca.mean_ @ pca.components_.T
    found = linear.standardised(asked) @ linear.components - linear.standardised(features).mean(0) @ linear.components
    np.testing.assert_allclose(found * turn, centred * np.sqrt(num_features), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(linear.coefficients.T * turn, expected.coef_, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("noise", [0.03, 1.0, 30.0])
def test_the_penalty_is_the_best_when_each_spot_is_left_out(noise: float) -> None:
    features, target, _ = _problem(40, 8, noise)
    scores, _ = components(features)
    errors = []
    for penalty in PENALTIES:
        gaps = [
            Ridge(penalty).fit(np.delete(scores, i, 0), np.delete(target, i, 0)).predict(scores[[i]]) - target[i]
            for i in range(40)
        ]
        errors.append(np.mean(np.square(gaps)))
        assert leave_one_out(scores, target, penalty) == pytest.approx(errors[-1], rel=1e-5)
    assert Probe(features, target).alphas == pytest.approx([PENALTIES[int(np.argmin(errors))]])


def test_blocks_weigh_the_same_whatever_their_width() -> None:
    features, target, asked = _problem(100, 60)
    found = Probe(features, target, (50, 6, 4))
    penalty, expected = plain_probe(features, target, asked, (50, 6, 4))
    np.testing.assert_allclose(found.predict(asked), expected, rtol=1e-6, atol=1e-6)
    assert found.alphas == pytest.approx([penalty])
    assert np.abs(found.predict(asked) - Probe(features, target).predict(asked)).max() > 1e-2


def test_constant_features_change_nothing() -> None:
    """They may have another value elsewhere, and more spots than varying features, or fewer, may see them."""
    for num_spots in (60, 15):
        features, target, asked = _problem(num_spots, 20)
        plain = Probe(features, target).predict(asked)
        wide = [np.insert(each, [5, 20], value, axis=1) for each, value in ((features, 0.3), (asked, 0.7))]
        np.testing.assert_allclose(Probe(wide[0], target).predict(wide[1]), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_spots", "constant"), [(1, False), (60, True)])
def test_features_that_say_nothing_give_the_mean(num_spots: int, constant: bool) -> None:
    features, target, asked = _problem(num_spots, 6)
    fitted = Probe(np.full_like(features, 7) if constant else features, target)
    np.testing.assert_allclose(fitted.predict(asked), np.tile(target.mean(0), (40, 1)), rtol=1e-6)
    assert fitted.alphas == [np.inf]


@pytest.mark.parametrize("num_spots", [2, 3, 10])
def test_few_spots_have_as_many_components_as_they_span(num_spots: int) -> None:
    features, target, asked = _problem(num_spots, 30)
    fitted = Probe(features, target)
    scores, to_scores = components(features)
    ridge = Ridge(*fitted.alphas).fit(scores, target.astype(float))
    np.testing.assert_allclose(fitted.predict(asked), ridge.predict(to_scores(asked)), rtol=1e-5, atol=1e-5)


def test_genes_that_other_spots_measure_have_a_penalty_of_their_own() -> None:
    features, target, asked = _problem(200, 20)
    target[:170, 3] = np.nan
    target[:, 4] = np.nan
    fitted = Probe(features, target)
    found = fitted.predict(asked)
    most, few = plain_probe(features, target[:, :3], asked), plain_probe(features[170:], target[170:, [3]], asked)
    assert fitted.alphas == pytest.approx([most[0], few[0]])
    np.testing.assert_allclose(found[:, :4], np.concatenate([most[1], few[1]], axis=1), rtol=1e-6, atol=1e-6)
    assert not found[:, 4].any()


def test_where_all_is_measured_the_fit_is_one() -> None:
    _, target, _ = _problem(90, 6)
    ((genes, spots),) = probe.measured_parts(target)
    assert (genes.tolist(), spots.tolist()) == (list(range(5)), list(range(90)))


def test_the_probe_samples_the_training_spots_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    features, target, asked = _problem(200, 6, noise=0.1)
    whole = Probe(features, target).predict(asked)
    monkeypatch.setattr(probe, "MAX_SPOTS", 60)
    first, again = (Probe(features, target) for _ in range(2))
    np.testing.assert_array_equal(first.predict(asked), again.predict(asked))
    assert np.abs(first.predict(asked) - whole).max() > 1e-3
    assert (pearson_per_gene(target, first.predict(features)) > 0.8).all()
