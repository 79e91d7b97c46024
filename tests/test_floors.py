"""Floors where sections lack genes; reference lines: the noise ceiling against simulated sections whose noise-free
expression is known, and real sections against published figures.
"""

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from plain_probe import plain_probe

from ingest.readers import READERS, legacy_st
from mclstexp.data.measured import MeasuredSection, normalise_section
from mclstexp.data.sheet import read_sheet
from mclstexp.evaluation import floors
from mclstexp.evaluation.floors import halve, noise_ceiling
from mclstexp.evaluation.metrics import density_free_pearson, pearson_per_gene
from mclstexp.evaluation.scores import gene_scores, gene_sets, set_table
from mclstexp.evaluation.sections import TARGETS

needs_data = pytest.mark.skipif("MCLSTEXP_DATA" not in os.environ, reason="MCLSTEXP_DATA names no folder of real data")
NUM_SPOTS, NUM_GENES = 600, 30

# Spots, genes in the file, undefined, PCC of the library-size oracle (all, HEG50), MSE and MAE of zeros, MSE of the
# section's own mean; over the published panel of 785 genes.
PUBLISHED = {
    ("A1", "per_gene"): (346, 15045, 0, 0.1513, 0.3723, 0.9112, 0.4645, 0.6025),
    ("A1", "per_spot_panel"): (346, 15045, 0, 0.0991, 0.2359, 0.6316, 0.3880, 0.3364),
    ("B4", "per_gene"): (283, 15289, 0, 0.5038, 0.7123, 0.8215, 0.3762, 0.6434),
    ("B4", "per_spot_panel"): (283, 15289, 0, 0.3407, 0.3923, 0.4576, 0.2710, 0.3082),
    ("C2", "per_gene"): (187, 15706, 0, 0.3708, 0.6795, 1.7069, 0.8453, 0.8629),
    ("C2", "per_spot_panel"): (187, 15706, 0, 0.2605, 0.3701, 0.6414, 0.4961, 0.2153),
    ("C3", "per_gene"): (180, 15821, 0, 0.3646, 0.6414, 1.8028, 0.8945, 0.8783),
    ("C3", "per_spot_panel"): (180, 15821, 0, 0.2472, 0.3178, 0.6697, 0.5213, 0.2199),
    ("C4", "per_gene"): (184, 15842, 0, 0.3935, 0.6578, 1.8310, 0.9209, 0.8492),
    ("C4", "per_spot_panel"): (184, 15842, 0, 0.2462, 0.1522, 0.6673, 0.5302, 0.1987),
    ("C5", "per_gene"): (181, 15721, 0, 0.3298, 0.7089, 1.8153, 0.9036, 0.8609),
    ("C5", "per_spot_panel"): (181, 15721, 0, 0.2407, 0.4732, 0.6467, 0.5129, 0.1972),
}


def test_constants_and_library_size_are_the_same_for_all_spots_and_for_all_genes() -> None:
    np.testing.assert_array_equal(floors.constant(np.array([2.0, 4.0]), 3), np.tile([2, 4], (3, 1)))
    oracle = floors.library_size(np.array([0.0, np.e - 1]), 4)
    np.testing.assert_allclose(oracle, [[0] * 4, [1] * 4], rtol=1e-6)


def _rates(depth: float) -> tuple[np.ndarray, np.ndarray]:
    """Expected counts of the panel, (N, G), and of all other genes, (N,); density and each gene's own pattern vary."""
    rng = np.random.default_rng(0)
    density = rng.lognormal(0, 0.5, (NUM_SPOTS, 1))
    own = rng.lognormal(0, 0.6, (NUM_SPOTS, NUM_GENES))
    return depth * density * own, 100 * depth * density[:, 0]


def _measure(rates: tuple[np.ndarray, np.ndarray], seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rates[0])
    return counts.astype(np.float32), counts.sum(axis=1) + rng.poisson(rates[1]).astype(np.float64)


def _correlations(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    pairs = zip(one.T.astype(float), other.T.astype(float), strict=True)
    return np.array([scipy.stats.pearsonr(*pair).statistic for pair in pairs])


@pytest.mark.parametrize("name", TARGETS)
def test_reliability_is_what_two_measurements_of_a_section_share(name: str) -> None:
    rates, target = _rates(30), TARGETS[name]
    first, second = _measure(rates, 1), _measure(rates, 2)
    found = noise_ceiling(*first, target, seed=0)
    one, other = normalise_section(target, *first), normalise_section(target, *second)
    assert found["reliability"].mean() == pytest.approx(_correlations(one, other).mean(), abs=0.05)
    expected = rates[1] + rates[0].sum(axis=1)
    without_density = density_free_pearson(one, other, expected).mean()
    assert found["reliability_density_free"].mean() == pytest.approx(without_density, abs=0.05)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("depth", "too_high"), [(1.0, 0.1), (3.0, 0.1), (30.0, 0.02)])
def test_the_best_possible_prediction_reaches_the_ceiling(name: str, depth: float, too_high: float) -> None:
    """The best prediction is what a spot's measurements are on average; shallow counts make the ceiling too high."""
    rates, target = _rates(depth), TARGETS[name]
    counts, totals = _measure(rates, 0)
    perfect = np.mean([normalise_section(target, *_measure(rates, seed)) for seed in range(1, 60)], axis=0)
    reached = _correlations(normalise_section(target, counts, totals), perfect).mean()
    found = noise_ceiling(counts, totals, target, seed=0)
    assert -0.02 < found["pcc"].mean() - reached < too_high
    if depth == 30:
        assert reached > found["reliability"].mean() + 0.03, "reliability itself is no ceiling"


def test_the_ceiling_is_high_for_deep_and_low_for_unstructured_counts() -> None:
    deep = noise_ceiling(*_measure(_rates(1e5), 1), TARGETS["per_gene"], seed=0)
    assert (deep[["pcc", "pcc_density_free"]] > 0.99).all(axis=None)
    flat = np.full((NUM_SPOTS, NUM_GENES), 5.0), np.full(NUM_SPOTS, 1000.0)
    noise = noise_ceiling(*_measure(flat, 1), TARGETS["per_spot"], seed=0)
    assert noise[["reliability", "reliability_density_free"]].mean().abs().max() < 0.04
    assert noise["reliability"].min() < 0
    assert noise["pcc"].min() == 0


def test_a_gene_that_is_missing_from_a_half_is_undefined() -> None:
    counts, totals = _measure(_rates(3), 1)
    counts[:, 0], counts[:, 1] = 0, 0
    counts[7, 1] = 1
    found = noise_ceiling(counts, totals + 1, TARGETS["per_spot"], seed=0)
    assert found.iloc[:2].isna().all(axis=None)
    assert found.iloc[2:].notna().all(axis=None)


def test_two_spots_give_no_infinity() -> None:
    found = noise_ceiling(np.ones((2, 20_000)), np.array([20_010.0, 20_100.0]), TARGETS["per_spot"], seed=0)
    assert found["reliability"].min() == pytest.approx(-1)  # in all halvings the one molecule apart from the other
    assert found["pcc_density_free"].isna().all()


def test_the_seed_decides() -> None:
    section = _measure(_rates(3), 1)
    first, again, other = (noise_ceiling(*section, TARGETS["per_spot"], seed)["pcc"] for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()
    assert first.mean() == pytest.approx(other.mean(), abs=0.01)


def test_halves_add_up_and_are_independent() -> None:
    rates = np.full((20_000, 2), 4.0), np.full(20_000, 50.0)
    counts, totals = _measure(rates, 1)
    (first, first_totals), (second, second_totals) = halve(counts, totals, np.random.default_rng(0))
    np.testing.assert_array_equal(first + second, counts)
    np.testing.assert_array_equal(first_totals + second_totals, totals)
    assert (first >= 0).all()
    assert (first_totals >= first.sum(axis=1)).all()
    for half, mean in ((first[:, 0], 2), (second[:, 1], 2), (first_totals, 29), (second_totals, 29)):
        assert half.mean() == pytest.approx(mean, rel=0.02)
        assert half.var() == pytest.approx(mean, rel=0.05)  # Poisson
    assert abs(scipy.stats.pearsonr(first[:, 0], second[:, 0]).statistic) < 0.03
    assert abs(scipy.stats.pearsonr(first_totals, second_totals).statistic) < 0.03


@cache
def _real_section(name: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns counts of the panel's genes (N, 785), totals over all genes (N,) and the number of genes in the file."""
    root = Path(os.environ["MCLSTEXP_DATA"])
    sheets = [read_sheet(str(root / sheet), READERS) for sheet in ("samples.csv", "samples_lowres.csv")]
    (row,) = (row for rows in sheets for row in rows if row.section_id == name)
    assert row.expression is not None
    assert row.positions is not None
    expression = legacy_st.read(row.files, row)
    symbols = [gene.symbol for gene in expression.genes]
    columns = [symbols.index(symbol) for symbol in (root / "her2st" / "panel_785.txt").read_text().split()]
    counts = expression.spots.counts
    assert counts is not None
    return counts[:, columns].toarray(), counts.sum(axis=1).astype(np.float64), len(symbols)


@needs_data
@pytest.mark.parametrize(("name", "target"), list(PUBLISHED))
def test_real_sections_give_the_published_floors(name: str, target: str) -> None:
    counts, totals, num_genes = _real_section(name)
    truth = normalise_section(TARGETS[target], counts, totals)
    sets = gene_sets(truth, {})
    predicted = {
        "oracle": floors.library_size(totals, truth.shape[1]),
        "zeros": np.zeros_like(truth),
        "own mean": floors.constant(truth.mean(axis=0, dtype=np.float64), len(truth)),
    }
    rows = {
        word: set_table(gene_scores(truth, values, totals), sets).set_index("gene_set")
        for word, values in predicted.items()
    }
    oracle, zeros = rows["oracle"], rows["zeros"].loc["all"]
    assert (len(counts), num_genes, oracle.loc["all", "undefined"]) == PUBLISHED[name, target][:3]
    found = (oracle.loc["all", "pcc"], oracle.loc["heg50", "pcc"], zeros["mse"], zeros["mae"])
    assert (*found, rows["own mean"].loc["all", "mse"]) == pytest.approx(PUBLISHED[name, target][3:], abs=6e-5)
    assert oracle.loc["all", "undefined_density_free"] == zeros["undefined"] == 785


@needs_data
@pytest.mark.parametrize("target", ["per_gene", "per_spot_panel"])
def test_the_oracle_stays_below_the_ceiling_but_not_below_reliability(target: str) -> None:
    counts, totals, _ = _real_section("B4")
    truth = normalise_section(TARGETS[target], counts, totals)
    oracle = gene_scores(truth, floors.library_size(totals, truth.shape[1]), totals)["pcc"].mean()
    ceiling = noise_ceiling(counts, totals, TARGETS[target], seed=0)
    assert ceiling["reliability"].mean() < oracle < ceiling["pcc"].mean()


@needs_data
@pytest.mark.parametrize(("name", "least", "most"), [("A1", 0.95, 1.15), ("C2", 0.95, 1.15), ("B4", 1.15, 1.5)])
def test_reliability_predicted_from_fewer_counts_errs_upwards(name: str, least: float, most: float) -> None:
    """Halves of a section are two measurements at half depth; quarters predict their correlation."""
    counts, totals, _ = _real_section(name)
    first, second = halve(counts, totals, np.random.default_rng(0))
    predicted = noise_ceiling(*first, TARGETS["per_spot"], seed=0)["reliability"].to_numpy()
    measured = pearson_per_gene(*(normalise_section(TARGETS["per_spot"], *half) for half in (first, second)))
    both = ~np.isnan(predicted + measured)
    assert least < predicted[both].mean() / measured[both].mean() < most


def _partly_measured() -> tuple[list[MeasuredSection], dict[str, floors.Seen]]:
    """Three training sections of two patients, of which two lack some of five genes, and their features."""
    rng = np.random.default_rng(0)
    lacks = {"A1": [], "A2": [1, 4], "B1": [4]}
    sections, features = [], {}
    for name, genes in lacks.items():
        num = 20 + 5 * len(sections)
        counts, spots = rng.poisson(5, (num, 5)).astype(np.float32), np.arange(num).astype(str).astype(object)
        counts[:, genes] = 0
        xy, totals = rng.normal(size=(num, 2)), counts.sum(axis=1, dtype=np.float64) + rng.poisson(20, num)
        sections.append(MeasuredSection(name, name[0], spots, xy, xy, spots, counts, totals, np.array(genes, int)))
        features[name] = rng.normal(size=(num, 3))
    return sections, {"ridge on RGB": floors.Seen(features, (3,))}


@pytest.mark.odd
@pytest.mark.parametrize("target", TARGETS)
def test_floors_of_a_gene_are_fitted_where_it_is_measured(target: str) -> None:
    sections, features = _partly_measured()
    fitted = floors.Floors(sections, features, TARGETS[target])
    predicted = fitted.predict(sections[0])
    of, penalties = features["ridge on RGB"].sections, []
    for genes, names in {(0, 2, 3): ["A1", "A2", "B1"], (1,): ["A1", "B1"], (4,): ["A1"]}.items():
        own = [section for section in sections if section.section_id in names]
        truth = np.concatenate([section.expression(TARGETS[target])[:, genes] for section in own]).astype(np.float64)
        assert np.isfinite(truth).all()
        np.testing.assert_allclose(predicted["train mean"][:, genes], np.tile(truth.mean(0), (20, 1)), rtol=1e-5)
        penalty, expected = plain_probe(np.concatenate([of[name] for name in names]), truth, of["A1"])
        penalties.append(penalty)
        np.testing.assert_allclose(predicted["ridge on RGB"][:, genes], expected, rtol=1e-5, atol=1e-6)
    low, high = (f"{limit(penalties):.0f}" for limit in (min, max))
    assert fitted.alphas() == f"ridge on RGB {low}" + (f" to {high}" if low != high else "")


@pytest.mark.odd
def test_a_gene_that_no_training_section_measures_has_floors_of_zero() -> None:
    sections, features = _partly_measured()
    fitted = floors.Floors(sections[1:], features, TARGETS["per_spot"])
    for values in fitted.predict(sections[0]).values():
        assert np.isfinite(values).all()
        assert not values[:, 4].any()


@pytest.mark.odd
def test_a_gene_that_is_not_measured_has_no_ceiling() -> None:
    (_, section, _), _ = _partly_measured()
    ceiling = noise_ceiling(section.counts, section.totals, TARGETS["per_spot"], 0)
    assert ceiling["pcc"].isna().tolist() == [gene in (1, 4) for gene in range(5)]
