"""The program model as a whole, against the formulas written out on dense matrices."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import brentq
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge, RidgeCV

from mclstexp.data.genes import Normaliser
from mclstexp.data.measured import MeasuredSection
from mclstexp.errors import ModelError
from mclstexp.model.bank import Bank
from mclstexp.model.blend import ProgramModel
from mclstexp.model.choose_blend import SHARE, SHARES
from mclstexp.model.fit_blend import FittedPrograms, fit_program_model
from mclstexp.model.program_ridge import ALPHAS
from mclstexp.model.retrieval import resolve, retrieve
from mclstexp.model.training_spots import FeatureBlocks, TrainingSpots
from mclstexp.settings import RetrievalConfig

TARGET = Normaliser("per_spot_all", 1e4, "e")
BLOCKS = FeatureBlocks((6, 10, 8), near=(2, 0), level=2)
NEAR = [*range(16, 24), *range(6)]
RETRIEVAL = RetrievalConfig(weighting="fixed_number", effective_donors=12)
WIDTH_UM = 75.0


def _section(name: str, patient: str, seed: int) -> tuple[MeasuredSection, np.ndarray]:
    """A section of 6 x 5 spots, 100 um apart, whose 20 genes follow three patterns, and features that show these."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(6) * 100.0, np.arange(5) * 100.0), axis=-1).reshape(-1, 2)
    patterns = np.stack([np.sin(grid[:, 0] / 150 + seed), np.cos(grid[:, 1] / 120), grid[:, 0] / 500], axis=1)
    loadings = np.random.default_rng(99).normal(size=(3, 20))
    counts = rng.poisson(60 * np.exp(0.5 * patterns @ loadings)).astype(np.float32)
    features = patterns @ np.random.default_rng(98).normal(size=(3, 24)) + 0.5 * rng.normal(size=(30, 24))
    spots = np.array([f"{name}-{index}" for index in range(30)], object)
    totals = counts.sum(axis=1) + 400.0
    section = MeasuredSection(name, patient, spots, grid, grid, np.full(30, None, object), counts, totals)
    return section, features.astype(np.float32)


TRAIN = [_section("a", "P", 1), _section("b", "P", 2), _section("c", "Q", 3)]
TEST = _section("d", "R", 4)


STAIN = np.random.default_rng(97).normal(size=24).astype(np.float32)
"""How features move with a stain."""


def _draw(seed: int) -> list[np.ndarray]:
    """Features of the training tiles, each stained by another amount."""
    rng = np.random.default_rng(seed)
    return [values + rng.normal(size=(len(values), 1)).astype(np.float32) * STAIN for _, values in TRAIN]


def _fit(draws: Sequence[list[np.ndarray]]) -> FittedPrograms:
    sections = [section for section, _ in TRAIN]
    of = [
        dict(zip([section.section_id for section in sections], each, strict=True)).__getitem__
        for each in ([values for _, values in TRAIN], *draws)
    ]
    return fit_program_model(TrainingSpots(sections, of[0], BLOCKS, TARGET, of[1:]), RETRIEVAL)


@pytest.fixture(scope="module")
def fitted() -> FittedPrograms:
    return _fit([])


def _bank(fitted: FittedPrograms) -> Bank:
    names = [
        np.concatenate([np.full(len(s), getattr(s, n), object) for s, _ in TRAIN]) for n in ("section_id", "patient_id")
    ]
    expression = np.concatenate([section.expression(TARGET) for section, _ in TRAIN])
    return Bank.of(fitted.keys, expression, *names, np.concatenate([section.spot_id for section, _ in TRAIN]))


def _predicted(fitted: FittedPrograms, section: MeasuredSection, features: np.ndarray) -> np.ndarray:
    model, bank = fitted.model, fitted.model.bank(_bank(fitted))
    found = retrieve(model.queries(features), bank, resolve(RETRIEVAL, len(bank)))
    tiles = model.tile_scores(features, found.prediction, np.ones(len(features), bool))
    return model.decoder().predict(tiles, section.xy_um)


def _within(values: np.ndarray, lengths: list[int]) -> np.ndarray:
    return np.concatenate([part - part.mean(axis=0) for part in np.split(values, np.cumsum(lengths)[:-1])])


def _means_around(values: np.ndarray, xy: np.ndarray) -> np.ndarray:
    squared = ((xy[:, None] - xy[None]) ** 2).sum(axis=2)
    weight = np.exp(-0.5 * squared / WIDTH_UM**2) * (squared > 1) * (squared <= (4 * WIDTH_UM) ** 2)
    return weight @ values / weight.sum(axis=1, keepdims=True)


def _softmax_of_12(cosines: np.ndarray) -> np.ndarray:
    """Weights of one query with an effective number of 12, by root finding."""

    def weight(log_temperature: float) -> np.ndarray:
        raw = np.exp((cosines - cosines.max()) / np.exp(log_temperature))
        return raw / raw.sum()

    return weight(brentq(lambda t: 1 / (weight(t) ** 2).sum() - 12, -8, 4))


def _by_the_formulas(draws: Sequence[list[np.ndarray]], lacking: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
    """The prediction of TEST and that of the training spots out of fold, on dense matrices.

    The second training section does not measure the genes `lacking`.
    """
    lengths = [len(section) for section, _ in TRAIN]
    expression = np.concatenate([section.expression(TARGET) for section, _ in TRAIN]).astype(np.float64)
    expression[np.ix_(np.repeat([False, True, False], lengths), lacking)] = np.nan
    truth, known = _within(expression, lengths), ~np.isnan(expression)
    shared = np.setdiff1d(np.arange(20), lacking)
    loadings = np.zeros((20, 16))
    loadings[shared] = np.linalg.svd(truth[:, shared], full_matrices=False)[2][:16].T  # too shallow to be thinned
    scores = truth[:, shared] @ loadings[shared]
    decoder = loadings.T.copy()
    for gene in lacking:
        of_gene = scores[known[:, gene]]
        decoder[:, gene] = (
            Ridge(0.01 * (of_gene**2).sum() / 16, fit_intercept=False).fit(of_gene, truth[known[:, gene], gene]).coef_
        )

    def standard(own: list[np.ndarray], widths: list[int], of: np.ndarray, clip: float) -> np.ndarray:
        joined = np.concatenate(own)
        z = (of - joined.mean(axis=0)) / (joined.std(axis=0) + 1e-6)
        return z.clip(-clip, clip) / np.sqrt(np.repeat(widths, widths))

    own = [values.astype(np.float64) for _, values in TRAIN]
    around = lambda of: [  # noqa: E731
        _means_around(values[:, NEAR].astype(np.float64), section.xy_um)
        for (section, _), values in zip(TRAIN, of, strict=True)
    ]
    near = around(own)
    key = standard(own, [6, 10, 8], np.concatenate(own), 8)
    query = standard(own, [6, 10, 8], TEST[1].astype(np.float64), 8)
    test_near = _means_around(TEST[1][:, NEAR].astype(np.float64), TEST[0].xy_um)
    seen = np.hstack([key, standard(near, [8, 6], np.concatenate(near), np.inf)])
    asked = np.hstack([query, standard(near, [8, 6], test_near, np.inf)])
    keys = [key, *(standard(own, [6, 10, 8], np.concatenate(draw), 8) for draw in draws)]
    fitted_to = [seen]
    for draw, of_draw in zip(draws, keys[1:], strict=True):
        fitted_to.append(np.hstack([of_draw, standard(near, [8, 6], np.concatenate(around(draw)), np.inf)]))
    fold = np.repeat([0, 1, 2], lengths)

    def kernel_ridge(rows: np.ndarray, of: np.ndarray, alpha: float) -> np.ndarray:
        stacked = np.concatenate([each[rows] for each in fitted_to])
        kernel = stacked @ stacked.T
        offset = scores[rows].mean(axis=0)
        wanted = np.tile(scores[rows] - offset, (len(fitted_to), 1))
        solved = np.linalg.solve(kernel + alpha * np.trace(kernel) / 100 * np.eye(len(kernel)), wanted)
        return of @ stacked.T @ solved + offset

    everywhere = np.ones(len(fold), bool)
    paths, ridge = np.empty((len(ALPHAS), *scores.shape)), np.empty((len(ALPHAS), len(asked), 16))
    for index, alpha in enumerate(ALPHAS):
        ridge[index] = kernel_ridge(everywhere, asked, alpha)
        for out in range(3):
            paths[index, fold == out] = kernel_ridge(fold != out, seen[fold == out], alpha)
    errors = np.stack([((_within(path, lengths) - scores) ** 2).mean(axis=0) for path in paths])
    best = errors.argmin(axis=0)
    pick = range(16)
    ridge_oof, ridge = paths[best, :, pick].T, ridge[best, :, pick].T

    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731
    cosines = unit(query) @ unit(key).T
    retrieved = np.stack([_softmax_of_12(row) @ scores for row in cosines])
    among = unit(key) @ unit(key).T
    oof = np.stack([_softmax_of_12(among[i, fold != fold[i]]) @ scores[fold != fold[i]] for i in range(len(key))])
    ridge_oof, oof = _within(ridge_oof, lengths), _within(oof, lengths)
    scale = np.sqrt((ridge_oof**2).mean() / (oof**2).mean())
    blended = ((1 - SHARE) * ridge_oof + SHARE * scale * oof) @ decoder
    slope = (blended * truth)[known].sum() / (blended[known] ** 2).sum()

    def probe(rows: np.ndarray, of: np.ndarray) -> np.ndarray:
        """The mean prediction; of a gene that some of the rows lack, the mean of the others."""
        level, genes, model = np.nanmean(expression[rows], axis=0), known[rows].all(axis=0), None
        for copies in (keys[:1], keys):  # the penalty is chosen on plain tiles alone
            seen = np.concatenate([each[rows, 16:] for each in copies])
            scale = lambda v, seen=seen: (v - seen.mean(axis=0)) / (seen.std(axis=0) + 1e-6)  # noqa: E731
            pca = PCA(svd_solver="full").fit(scale(seen))
            new = Ridge(model.alpha_ * len(copies)) if model else RidgeCV(alphas=np.logspace(1, 6, 16))
            fitted = new.fit(pca.transform(scale(seen)), np.tile(expression[rows][:, genes], (len(copies), 1)))
            model = model or fitted
        level[genes] = fitted.predict(pca.transform(scale(of))).mean(axis=0)
        return level

    told, means = [], []
    for out in range(3):
        means.append(np.nanmean(expression[fold != out], axis=0))
        told.append(probe(fold != out, key[fold == out, 16:]) - means[-1])
    level = probe(everywhere, query[:, 16:])  # two patients say nothing of how far a level can be trusted
    q = (1 - SHARE) * ridge + SHARE * scale * retrieved
    whole = level + slope * (q - q.mean(axis=0)) @ decoder
    left_out = np.repeat(np.array(means) + np.array(told), lengths, axis=0) + slope * blended
    return whole, left_out


@pytest.mark.parametrize("num_draws", [0, 2])
def test_a_slide_is_answered_as_the_formulas_say(num_draws: int) -> None:
    draws = [_draw(seed) for seed in range(num_draws)]
    fitted = _fit(draws)
    whole, left_out = _by_the_formulas(draws)
    np.testing.assert_allclose(_predicted(fitted, *TEST), whole, atol=2e-4)
    np.testing.assert_allclose(fitted.left_out, left_out, atol=2e-4)


def test_a_model_of_stained_draws_depends_less_on_a_stain(fitted: FittedPrograms) -> None:
    section, features = TEST

    def change(model: FittedPrograms) -> float:
        plain, stained = (_predicted(model, section, values) for values in (features, features + 0.5 * STAIN))
        return float(np.sqrt(((stained - plain) ** 2).mean()))

    assert change(_fit([_draw(seed) for seed in range(4)])) < 0.6 * change(fitted)


def test_it_shows_the_patterns_of_a_section_never_seen(fitted: FittedPrograms) -> None:
    section, features = TEST
    predicted, truth = _predicted(fitted, section, features), section.expression(TARGET)
    correlations = [np.corrcoef(predicted[:, gene], truth[:, gene])[0, 1] for gene in range(20)]
    assert np.mean(correlations) > 0.5


def test_the_order_of_tiles_does_not_matter(fitted: FittedPrograms) -> None:
    section, features = TEST
    order = np.random.default_rng(0).permutation(len(section))
    moved = _predicted(fitted, replace(section, xy_um=section.xy_um[order]), features[order])
    np.testing.assert_allclose(moved, _predicted(fitted, section, features)[order], atol=1e-5)


def test_a_shift_of_the_stain_moves_the_level_and_not_the_pattern(fitted: FittedPrograms) -> None:
    section, features = TEST
    plain, shifted = (_predicted(fitted, section, values) for values in (features, features + 0.2))
    pattern = [values - values.mean(axis=0) for values in (plain, shifted)]
    assert np.abs(pattern[0] - pattern[1]).max() < 0.25 * np.abs(pattern[0]).max()


def test_saved_and_loaded_it_is_the_same(fitted: FittedPrograms, tmp_path: Path) -> None:
    fitted.model.save(tmp_path)
    loaded = ProgramModel.load(tmp_path)
    again = _predicted(replace(fitted, model=loaded), *TEST)
    np.testing.assert_array_equal(again, _predicted(fitted, *TEST))


def test_a_file_without_an_array_is_refused(fitted: FittedPrograms, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    fitted.model.save(tmp_path)
    path = tmp_path / "programs.safetensors"
    arrays = load_file(path)
    del arrays["own_weights"]
    save_file(arrays, path, {"numbers": "{}"})
    with pytest.raises(ModelError, match="has no"):
        ProgramModel.load(tmp_path)


def test_what_is_not_finite_is_named(fitted: FittedPrograms) -> None:
    assert fitted.model.not_finite() is None
    broken = replace(fitted.model, own_weights=fitted.model.own_weights * np.nan)
    assert broken.not_finite() == "own_weights of the programs"


def test_left_out_patients_choose_the_share_of_retrieval() -> None:
    sections = [_section(name, name, seed) for seed, name in enumerate("PQRS", start=1)]
    features = {section.section_id: values for section, values in sections}
    spots = TrainingSpots([section for section, _ in sections], features.__getitem__, BLOCKS, TARGET)
    found = fit_program_model(spots, RETRIEVAL)
    truth = np.split(spots.expression, 4)
    chosen = np.mean([_correlation(p, t) for p, t in zip(np.split(found.left_out, 4), truth, strict=True)])
    for share in SHARES:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("mclstexp.model.choose_blend.SHARES", (share,))
            other = np.split(fit_program_model(spots, RETRIEVAL).left_out, 4)
        assert np.mean([_correlation(p, t) for p, t in zip(other, truth, strict=True)]) <= chosen + 1e-6
    assert found.model.share in SHARES


def test_genes_that_a_section_lacks_are_predicted_too() -> None:
    lacking = replace(TRAIN[1][0], unmeasured=np.array([7]))
    sections = [TRAIN[0], (lacking, TRAIN[1][1]), TRAIN[2]]
    features = {section.section_id: values for section, values in sections}
    spots = TrainingSpots([section for section, _ in sections], features.__getitem__, BLOCKS, TARGET)
    found = fit_program_model(spots, RETRIEVAL)
    assert found.model.not_finite() is None
    whole, left_out = _by_the_formulas([], lacking=[7])
    np.testing.assert_allclose(_predicted(found, *TEST), whole, atol=2e-4)
    np.testing.assert_allclose(found.left_out, left_out, atol=2e-4)
    predicted, truth = _predicted(found, *TEST)[:, 7], TEST[0].expression(TARGET)[:, 7]
    assert np.corrcoef(predicted, truth)[0, 1] > 0.3
    measured = np.concatenate([TRAIN[0][0].expression(TARGET)[:, 7], TRAIN[2][0].expression(TARGET)[:, 7]])
    assert found.model.level.mean[7] == pytest.approx(measured.mean(), abs=1e-6)


@pytest.mark.parametrize("max_drawn", [45, 7])
def test_directions_and_level_are_fitted_to_some_spots_of_many(
    fitted: FittedPrograms, max_drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mclstexp.model.training_spots.MAX_DRAWN", max_drawn)
    features = {section.section_id: values for section, values in TRAIN}
    spots = TrainingSpots([section for section, _ in TRAIN], features.__getitem__, BLOCKS, TARGET)
    drawn, standard = spots.drawn()
    assert len(drawn) == len(standard) <= max_drawn
    np.testing.assert_allclose(standard, np.concatenate(list(spots.standard()))[drawn])
    with_draws, _ = replace(spots, augmented=[features.__getitem__] * 2).drawn()
    assert 3 * len(with_draws) <= max_drawn
    found = fit_program_model(spots, RETRIEVAL)
    assert _correlation(_predicted(found, *TEST), _predicted(fitted, *TEST)) > 0.9


def _correlation(predicted: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([np.corrcoef(predicted[:, gene], truth[:, gene])[0, 1] for gene in range(truth.shape[1])]))
