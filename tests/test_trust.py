"""Trust of genes: correlations, their intervals, and a false discovery rate that autocorrelation does not fool."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from scipy.ndimage import gaussian_filter
from simulated_sections import NUM_GENES, TARGET, Simulated, cohort, fit

from mclstexp.data.measured import MeasuredSection
from mclstexp.model.programs import Programs
from mclstexp.model.training_spots import TrainingSpots
from mclstexp.model.trust import gene_trust, moved_sources, q_values

SIDE, GENES, PROGRAMS = 12, 60, 8


def _smooth(rng: np.random.Generator, count: int) -> np.ndarray:
    """Smooth random maps, float64 (SIDE^2, count)."""
    fields = [gaussian_filter(rng.normal(size=(SIDE, SIDE)), 1.5, mode="wrap").ravel() for _ in range(count)]
    return np.stack(fields, axis=1) / np.std(fields)


def _smooth_section(name: str, patient: str, rng: np.random.Generator) -> Simulated:
    xy = np.stack(np.meshgrid(*[np.arange(SIDE) * 100.0] * 2), axis=-1).reshape(-1, 2)
    counts = rng.poisson(50 * np.exp(0.5 * _smooth(rng, GENES))).astype(np.float32)
    spots = np.array([f"{name}-{index}" for index in range(len(xy))], object)
    totals = np.full(len(xy), 1e4)
    section = MeasuredSection(name, patient, spots, xy, xy, np.full(len(xy), None, object), counts, totals)
    return section, rng.normal(size=(len(xy), 24)).astype(np.float32)


def _by_chance(num_sections: int, seed: int) -> tuple[TrainingSpots, np.ndarray, Programs]:
    """Smooth expression, and scores of programs as smooth that have nothing to do with it."""
    rng = np.random.default_rng(seed)
    training = [_smooth_section(f"S{index}", f"P{index}", rng) for index in range(num_sections)]
    spots = TrainingSpots([section for section, _ in training], lambda name: training[0][1], None, TARGET)  # type: ignore[arg-type]
    scores = np.concatenate([_smooth(rng, PROGRAMS) for _ in training])
    starts = np.arange(num_sections) * SIDE**2
    scores -= np.repeat(np.add.reduceat(scores, starts) / SIDE**2, SIDE**2, axis=0)
    loadings = np.linalg.qr(rng.normal(size=(GENES, PROGRAMS)))[0]
    return spots, scores, Programs(loadings, loadings.T.copy())


@pytest.mark.parametrize("num_sections", [1, 4])
def test_smooth_maps_that_agree_by_chance_are_not_trusted(num_sections: int) -> None:
    trusted, naive = [], []
    for seed in range(8):
        spots, scores, programs = _by_chance(num_sections, seed)
        trust = gene_trust(spots, scores, programs)
        trusted.append(trust.trusted.mean())
        predicted = programs.expression(scores)
        p_value = [
            scipy.stats.pearsonr(spots.expression[:, gene], predicted[:, gene], alternative="greater").pvalue
            for gene in range(GENES)
        ]
        naive.append((scipy.stats.false_discovery_control(p_value) <= 0.05).mean())
    assert np.mean(trusted) <= 0.05
    assert np.mean(naive) > 0.1  # what a test that takes spots for independent would trust


def test_correlations_are_means_over_patients_and_predicted_genes_are_trusted() -> None:
    spots, fitted = fit(cohort(4, per_patient=2))
    trust = gene_trust(spots, fitted.left_out_scores, fitted.model.programs)
    predicted = fitted.model.programs.expression(fitted.left_out_scores)
    of_patients = []
    for patient in np.unique(spots.patient_id):
        sections = np.unique(spots.section_id[spots.patient_id == patient])
        of_sections = [
            [np.corrcoef(spots.expression[rows, gene], predicted[rows, gene])[0, 1] for gene in range(NUM_GENES)]
            for rows in (spots.section_id == name for name in sections)
        ]
        of_patients.append(np.mean(of_sections, axis=0))
    expected = np.mean(of_patients, axis=0)
    np.testing.assert_allclose(trust.correlation, expected, atol=1e-5)
    student = scipy.stats.t.interval(0.95, 3, expected, scipy.stats.sem(of_patients))
    np.testing.assert_allclose(trust.low, np.maximum(student[0], -1), atol=1e-4)
    np.testing.assert_allclose(trust.high, np.minimum(student[1], 1), atol=1e-4)
    assert trust.trusted[trust.correlation > 0.4].all()
    assert trust.trusted.mean() > 0.8


def test_with_one_patient_the_interval_is_as_wide_as_chance_scatters() -> None:
    spots, fitted = fit([(replace(section, patient_id="P"), values) for section, values in cohort(2)])
    trust = gene_trust(spots, fitted.left_out_scores, fitted.model.programs)
    assert (trust.low < trust.correlation).all()
    assert (trust.correlation < trust.high).all()
    reach = np.arctanh(trust.high) - np.arctanh(trust.correlation)
    np.testing.assert_allclose(reach, np.arctanh(trust.correlation) - np.arctanh(trust.low), rtol=1e-4)
    assert (reach > 1.96 / np.sqrt(128 - 3)).mean() > 0.8  # neighbours are alike: fewer than 128 independent spots


def test_a_constant_gene_and_one_that_is_not_measured_have_no_trust() -> None:
    spots, fitted = fit(cohort(3))
    expression = spots.expression
    expression[:, 0] = 1.0
    expression[:, 1] = np.nan
    expression[spots.section_id == "S00", 2] = np.nan
    trust = gene_trust(spots, fitted.left_out_scores, fitted.model.programs)
    assert np.isnan(trust.correlation[:2]).all()
    assert np.isnan(trust.q_value[:2]).all()
    assert not trust.trusted[:2].any()
    assert np.isfinite(trust.correlation[2:]).all()


def test_q_values_are_those_of_benjamini_and_hochberg() -> None:
    rng = np.random.default_rng(0)
    by_chance, observed = rng.normal(size=(50, 40)), rng.normal(size=40) + 1.5
    p_value = np.array([(1 + (by_chance >= value).sum()) / (1 + by_chance.size) for value in observed])
    order = np.argsort(p_value)
    stepped = p_value[order] * 40 / np.arange(1, 41)
    expected = np.empty(40)
    expected[order] = np.minimum.accumulate(stepped[::-1])[::-1].clip(max=1)
    np.testing.assert_allclose(q_values(observed, by_chance), expected)
    np.testing.assert_allclose(q_values(observed, by_chance), scipy.stats.false_discovery_control(p_value))


def test_a_section_moves_on_a_torus_and_far() -> None:
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(8), indexing="ij"), axis=-1).reshape(-1, 2)
    sources = moved_sources(grid * 100.0, 100, np.random.default_rng(0))
    assert sources.shape == (100, 64)
    steps = (grid[sources] - grid[None]) % 8
    for step in steps:
        moved, count = np.unique(step, axis=0, return_counts=True)
        assert count.max() > 40  # nearly all spots take the same step; rounding at the seam may add one
        assert np.minimum(moved[count.argmax()], 8 - moved[count.argmax()]).max() >= 2
