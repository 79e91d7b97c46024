"""The program ridge against scikit-learn's kernel ridge, with folds by hand."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from mclstexp.model.left_out import LeftOut, leave_out
from mclstexp.model.program_ridge import ALPHAS, fit_program_ridge
from mclstexp.model.programs import centred_within


def _spots(num_spots: int, num_features: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, LeftOut]:
    """Features of four sections, scores of three programs (the last one is noise), sections and folds."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(num_spots, num_features))
    scores = features @ rng.normal(size=(num_features, 3)) + rng.normal(size=(num_spots, 3))
    scores[:, 2] = rng.normal(size=num_spots)
    section = np.repeat(np.array(list("abcd"), object), num_spots // 4)
    folds = leave_out(section, section, rng.normal(size=(num_spots, 2)))
    return np.split(features, 4), centred_within(scores, section), section, folds


@pytest.mark.parametrize("num_draws", [0, 2])
@pytest.mark.parametrize(("num_spots", "num_features"), [(40, 180), (80, 12)], ids=["dual", "primal"])
def test_it_is_a_ridge_with_a_penalty_for_each_program(num_spots: int, num_features: int, num_draws: int) -> None:
    sections, scores, section, folds = _spots(num_spots, num_features)
    noise = np.random.default_rng(1).normal(size=(num_draws, *np.concatenate(sections).shape))
    draws = [[each + part for each, part in zip(sections, np.split(of_draw, 4), strict=True)] for of_draw in noise]
    found = fit_program_ridge(lambda: sections, scores, section, folds, [lambda each=each: each for each in draws])
    features = np.concatenate(sections)

    def ridge(rows: np.ndarray, program: int, alpha: float) -> Ridge:
        seen = np.concatenate([features[rows], *(np.concatenate(draw)[rows] for draw in draws)])
        penalty = alpha * (seen**2).sum() / 100
        offset = scores[rows].mean(axis=0)
        centred = np.tile((scores[rows] - offset)[:, program], 1 + num_draws)
        model = Ridge(penalty, fit_intercept=False).fit(seen, centred)
        model.offset = offset[program]
        return model

    for program in range(3):
        errors = []
        left_out = np.empty((len(ALPHAS), num_spots))
        for index, alpha in enumerate(ALPHAS):
            for name in "abcd":
                inside = section == name
                model = ridge(~inside, program, alpha)
                left_out[index, inside] = model.predict(features[inside]) + model.offset
            errors.append(
                ((centred_within(left_out[index], section) - centred_within(scores[:, program], section)) ** 2).mean()
            )
        best = int(np.argmin(errors))
        assert found.alphas[program] == ALPHAS[best]
        np.testing.assert_allclose(found.left_out[:, program], left_out[best], atol=1e-8)
        whole = ridge(np.ones(num_spots, bool), program, ALPHAS[best])
        np.testing.assert_allclose(found.weights[:, program], whole.coef_, atol=1e-8)
    assert found.alphas[2] > found.alphas[0], "noise is shrunk by its own penalty"


@pytest.mark.parametrize(("num_spots", "num_features"), [(40, 180), (40, 60), (80, 12)])
def test_draws_like_the_plain_tiles_change_nothing(num_spots: int, num_features: int) -> None:
    sections, scores, section, folds = _spots(num_spots, num_features)
    plain = fit_program_ridge(lambda: sections, scores, section, folds)
    found = fit_program_ridge(lambda: sections, scores, section, folds, [lambda: sections] * 2)
    np.testing.assert_array_equal(found.alphas, plain.alphas)
    np.testing.assert_allclose(found.weights, plain.weights, atol=1e-8)
    np.testing.assert_allclose(found.left_out, plain.left_out, atol=1e-8)


def test_constant_features_predict_nothing() -> None:
    _, scores, section, folds = _spots(40, 5)
    found = fit_program_ridge(lambda: [np.zeros((10, 5))] * 4, scores, section, folds)
    assert not found.weights.any()


def test_patients_are_left_out_where_there_are_three() -> None:
    patient = np.array(list("AABBCC"), object)
    section = np.array(list("abcdef"), object)
    xy = np.zeros((6, 2))
    assert leave_out(patient, section, xy).kind == "patients"
    assert leave_out(np.array(list("AABBBB"), object), section, xy).kind == "sections"
    corners = np.repeat([[0.0, 0.0], [0.0, 900.0], [900.0, 0.0], [900.0, 900.0]], 2, axis=0) + np.arange(16).reshape(
        8, 2
    )
    blocks = leave_out(patient[:1].repeat(8), section[:1].repeat(8), corners)
    assert blocks.kind == "blocks"
    np.testing.assert_array_equal(blocks.fold[::2], blocks.fold[1::2], "spots of a corner stay together")
    assert blocks.num_folds == 4
    found = leave_out(patient, section, xy)
    for index in range(found.num_folds):
        outside, inside = found.sides(index)
        assert set(patient[outside]).isdisjoint(patient[inside])


def test_at_most_five_folds_hold_whole_groups() -> None:
    patient = np.array([f"P{index:02d}" for index in range(12) for _ in range(3)], object)
    found = leave_out(patient, patient, np.zeros((36, 2)))
    assert found.num_folds == 5
    assert all(len(set(found.fold[patient == name])) == 1 for name in set(patient))
