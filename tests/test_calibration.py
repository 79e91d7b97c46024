"""Intervals, their scale and the flag to abstain: right values, coverage of patients never seen, saving."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr
from simulated_sections import NUM_GENES, TARGET, answer, cohort, fit, simulated_section

from mclstexp.data.genes import GenePanel
from mclstexp.errors import ModelError
from mclstexp.model.blend import spread, with_squares
from mclstexp.model.calibration import Calibration
from mclstexp.model.fit_calibration import fit_calibration, fit_scale, groups, half_widths
from mclstexp.model.left_out import LeftOut
from mclstexp.model.left_out_retrieval import left_out_retrieval
from mclstexp.settings import RetrievalConfig

NAMES = tuple(f"G{index}" for index in range(NUM_GENES))
PANEL = GenePanel(NAMES, NAMES, ("",) * NUM_GENES)


def _errors(num_groups: int, num_spots: int, num_genes: int, between: float, seed: int) -> tuple[np.ndarray, ...]:
    """Absolute normal errors of genes with deviations of their own, and of groups that differ by a factor."""
    rng = np.random.default_rng(seed)
    group = np.repeat([f"g{index:02d}" for index in range(num_groups)], num_spots).astype(object)
    of_group = np.repeat(np.exp(between * rng.normal(size=num_groups)), num_spots)
    of_gene = np.exp(rng.normal(size=num_genes))
    return np.abs(rng.normal(size=(len(group), num_genes))) * of_group[:, None] * of_gene, group, of_gene


def test_widths_are_the_quantile_of_known_errors() -> None:
    errors, group, of_gene = _errors(12, 2000, 5, 0.0, 0)
    widths, coverage = half_widths(errors, group)
    np.testing.assert_allclose(widths, 1.645 * of_gene, rtol=0.02)  # 90 % of a normal distribution
    assert len(coverage) == 12
    np.testing.assert_allclose(list(coverage.values()), 0.9, atol=0.02)


def test_the_factor_covers_left_out_groups_by_hand() -> None:
    """Own quantiles are 10 and 20. With a factor of 1.6, a is all within 1.6 * 20 and b 8 of 10 within 1.6 * 10."""
    small, large = np.arange(1.0, 11), 2 * np.arange(1.0, 11)
    widths, coverage = half_widths(np.concatenate([small, large])[:, None], np.repeat(["a", "b"], 10).astype(object))
    np.testing.assert_allclose(widths, 1.6 * (10 + 20) / 2, rtol=1e-6)
    assert coverage == {"a": 1.0, "b": 0.8}


def test_a_group_never_seen_is_covered_although_groups_differ() -> None:
    shares = []
    for seed in range(40):
        errors, group, _ = _errors(13, 60, 8, 0.3, seed)
        new = group == "g12"
        widths, _ = half_widths(errors[~new], group[~new])
        shares.append((errors[new] <= widths).mean())
    assert 0.88 < np.mean(shares) < 0.92


def test_a_gene_that_a_group_does_not_measure_is_left_out() -> None:
    errors, group, of_gene = _errors(6, 500, 4, 0.0, 1)
    errors[group == "g00", 2] = np.nan
    errors[group == "g01", :2] = np.nan
    widths, coverage = half_widths(errors, group)
    np.testing.assert_allclose(widths, 1.645 * of_gene, rtol=0.06)
    np.testing.assert_allclose(list(coverage.values()), 0.9, atol=0.04)


def test_the_scale_follows_what_ranks_errors_and_ignores_what_does_not() -> None:
    rng = np.random.default_rng(2)
    errors, group, _ = _errors(5, 300, 20, 0.0, 2)
    donors, similarity = np.exp(0.5 * rng.normal(size=len(errors))), rng.uniform(0.2, 0.9, len(errors))
    told = fit_scale(errors * donors[:, None], donors, similarity, group)
    assert told.strength == 1.0
    np.testing.assert_allclose(told.slopes, [1, 0], atol=0.08)
    limits = np.percentile(donors, [1, 99])
    expected = np.clip(donors, *limits) / np.median(donors)
    np.testing.assert_allclose(told.of(donors, similarity), expected, rtol=0.12)
    far = fit_scale(errors * (1 - similarity[:, None]), donors, similarity, group)
    np.testing.assert_allclose(far.slopes, [0, 1], atol=0.08)


def test_a_scale_that_ranks_errors_the_wrong_way_round_is_a_constant() -> None:
    rng = np.random.default_rng(3)
    errors, group, _ = _errors(5, 300, 20, 0.0, 3)
    donors = np.exp(0.5 * rng.normal(size=len(errors)))
    same = np.full(len(errors), 0.5)
    scale = fit_scale(errors / donors[:, None], donors, same, group)
    np.testing.assert_allclose(scale.of(donors, same), 1, rtol=0.03)


def test_the_strength_is_0_where_left_out_groups_contradict() -> None:
    rng = np.random.default_rng(4)
    errors, group, _ = _errors(4, 300, 20, 0.0, 4)
    donors = np.exp(0.5 * rng.normal(size=len(errors)))
    power = np.where(group == "g00", 2.0, -0.3)  # steep in one group, falling in three
    scale = fit_scale(errors * donors[:, None] ** power[:, None], donors, np.full(len(errors), 0.5), group)
    assert scale.strength == 0
    assert np.all(scale.of(donors, np.full(len(errors), 0.5)) == 1)


def test_spread_is_the_weighted_deviation_of_donors() -> None:
    rng = np.random.default_rng(5)
    scores, weight = rng.normal(size=(40, 3)) + 2, rng.dirichlet(np.ones(40), size=6)
    expected = [np.sqrt(np.cov(scores.T, aweights=row, ddof=0).trace()) for row in weight]
    np.testing.assert_allclose(spread(weight @ with_squares(scores)), expected, rtol=1e-4)
    alone = spread(with_squares(scores))  # one donor each
    np.testing.assert_allclose(alone, 0, atol=5e-3)


def test_left_out_donors_are_of_other_folds() -> None:
    rng = np.random.default_rng(6)
    keys, scores = rng.normal(size=(30, 4)).astype(np.float32), rng.normal(size=(30, 2))
    folds = LeftOut("patients", np.repeat([0, 1, 2], 10))
    found = left_out_retrieval(lambda fold: (keys, keys), scores, folds, RetrievalConfig(weighting="mean"))
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    for spot in range(30):
        others = np.flatnonzero(folds.fold != folds.fold[spot])
        np.testing.assert_allclose(found.scores[spot], scores[others].mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(found.spread[spot], np.sqrt(scores[others].var(axis=0).sum()), rtol=1e-4)
        np.testing.assert_allclose(found.similarity[spot], (unit[others] @ unit[spot]).max(), atol=1e-5)


def test_left_out_spots_retrieve_by_the_weights_that_answer_slides() -> None:
    rng = np.random.default_rng(7)
    keys, scores = rng.normal(size=(30, 4)).astype(np.float32), rng.normal(size=(30, 2))
    folds = LeftOut("patients", np.repeat([0, 1, 2], 10))
    found = left_out_retrieval(
        lambda fold: (keys, keys), scores, folds, RetrievalConfig(weighting="inverse_square", k=5)
    )
    for spot in range(30):
        others = np.flatnonzero(folds.fold != folds.fold[spot])
        cosine = keys[others] @ keys[spot] / np.linalg.norm(keys[others], axis=1)
        near = others[np.argsort(-cosine)[:5]]
        weight = 1 / ((keys[near] - keys[spot]) ** 2).sum(axis=1)
        np.testing.assert_allclose(found.scores[spot], weight @ scores[near] / weight.sum(), atol=1e-5)


def test_coverage_of_12_patients_left_out_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    sections = cohort(12)
    shares, ranks, gains = [], [], []
    for out in range(12):
        spots, fitted = fit(sections[:out] + sections[out + 1 :])
        calibration = fit_calibration(spots, fitted)
        assert calibration.calibrated_on == "patients"
        assert len(calibration.left_out_coverage) == 11
        found = answer(spots, fitted, sections[out])
        errors = np.abs(sections[out][0].expression(TARGET) - found.prediction)
        width = calibration.half_widths(found.spread, found.similarity)
        constant, _ = half_widths(np.abs(spots.expression - fitted.left_out), groups(spots))
        shares.append((errors <= width).mean())
        ranks.append(spearmanr(calibration.scale.of(found.spread, found.similarity), errors.mean(axis=1))[0])
        gains.append(1 - _interval_score(errors, width) / _interval_score(errors, constant))
    with capsys.disabled():
        for what, values in (("coverage", shares), ("rank correlation", ranks), ("gain over constant width", gains)):
            print(f"\n{what} of each patient:", *(f"{value:.3f}" for value in values))
    assert 0.87 < np.mean(shares) < 0.95
    assert np.min(ranks) > 0.1
    assert np.mean(gains) > 0


def _interval_score(errors: np.ndarray, width: np.ndarray) -> float:
    """The mean interval score of Gneiting and Raftery (2007), for symmetric intervals of 90 %."""
    return float((2 * width + 20 * (errors - width).clip(0)).mean())


def test_intervals_for_any_depth_are_wider_where_counts_are_many() -> None:
    """Deep sections predict a shallow one: only the intervals of thinned sections contain nine values in ten."""
    deep = [simulated_section(f"D{index}", f"P{index}", index, depth=20_000) for index in range(4)]
    shallow = simulated_section("N", "Q", 9, depth=400)
    spots, fitted = fit(deep)
    calibration = fit_calibration(spots, fitted)
    found = answer(spots, fitted, shallow)
    errors = np.abs(shallow[0].expression(TARGET) - found.prediction)
    plain, wide = (
        (errors <= replace(calibration, half_width=width).half_widths(found.spread, found.similarity)).mean()
        for width in (calibration.half_width, calibration.half_width_any_depth)
    )
    assert plain < 0.75
    assert 0.85 < wide < 0.97


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return fit_calibration(*fit(cohort(3)))


def test_saved_and_loaded_it_is_the_same(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path, PANEL)
    loaded = Calibration.load(tmp_path, PANEL)
    assert (loaded.scale, loaded.max_spread, loaded.calibrated_on) == (
        calibration.scale,
        calibration.max_spread,
        calibration.calibrated_on,
    )
    assert loaded.left_out_coverage == calibration.left_out_coverage
    for name in ("half_width", "half_width_any_depth"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(calibration, name))
    for name, values in vars(calibration.trust).items():
        np.testing.assert_array_equal(getattr(loaded.trust, name), values)
    table = pq.read_table(tmp_path / "trust.parquet")
    assert table.column_names[:7] == ["gene_id", "symbol", "correlation", "low", "high", "q_value", "trusted"]


def test_of_other_genes_or_damaged_it_is_refused(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path, PANEL)
    with pytest.raises(ModelError, match="other genes"):
        Calibration.load(tmp_path, GenePanel(NAMES[::-1], NAMES[::-1], PANEL.ensembl_id))
    facts = json.loads((tmp_path / "calibration.json").read_text())
    del facts["max_spread"]
    (tmp_path / "calibration.json").write_text(json.dumps(facts))
    with pytest.raises(ModelError, match=r"calibration\.json.*max_spread.*fetch the model version again"):
        Calibration.load(tmp_path, PANEL)


def test_what_is_not_finite_is_named(calibration: Calibration) -> None:
    assert calibration.not_finite() is None
    assert replace(calibration, max_spread=np.inf).not_finite() == "max_spread of the calibration"
    broken = replace(calibration, half_width=np.full(NUM_GENES, np.nan))
    assert broken.not_finite() == "half_width of the calibration"


def test_abstains_from_tiles_unlike_training_and_from_donors_far_apart(calibration: Calibration) -> None:
    donors = calibration.max_spread * np.array([0.5, 1.5, 0.5, 1.0])
    unlike = np.array([False, False, True, False])
    np.testing.assert_array_equal(calibration.abstain(donors, unlike), [False, True, True, False])
