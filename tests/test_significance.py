"""Significance against SciPy where a float64 holds it, and against exact decimals where it does not."""

from decimal import Decimal, localcontext

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from scipy.ndimage import gaussian_filter

from mclstexp.evaluation.metrics import pearson_per_gene
from mclstexp.evaluation.significance import benjamini_hochberg, neg_log10_p, rank_genes, section_significance


def _exact(pcc: float, num_spots: int) -> float:
    """The closed form for an even number of degrees of freedom (Abramowitz and Stegun 26.7.4), in 1,000 digits."""
    with localcontext() as context:
        context.prec = 1000
        size = abs(Decimal(pcc))
        rest, term, total = 1 - size**2, Decimal(1), Decimal(0)
        for index in range((num_spots - 2) // 2):
            total += term
            term *= rest * (2 * index + 1) / (2 * index + 2)
        return float(-(1 - size * total).log10())


@pytest.mark.parametrize("num_spots", [3, 4, 17, 350, 4000])
def test_p_values_equal_scipy(num_spots: int) -> None:
    rng = np.random.default_rng(num_spots)
    truth = rng.normal(size=(num_spots, 30))
    prediction = np.linspace(-0.4, 0.4, 30) * truth + rng.normal(size=(num_spots, 30))
    expected = [scipy.stats.pearsonr(a, b).pvalue for a, b in zip(truth.T, prediction.T, strict=True)]
    found = neg_log10_p(pearson_per_gene(truth, prediction), num_spots)
    np.testing.assert_allclose(found, -np.log10(expected), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("pcc", "num_spots"),
    [
        (0.01, 4),
        (-0.5, 350),
        (0.9, 350),
        (0.98, 350),
        (0.99, 350),
        (-0.99999, 350),
        (0.46, 5002),
        (0.49, 5002),
        (0.6, 5002),
    ],
)
def test_p_values_below_the_smallest_float_keep_their_logarithm(pcc: float, num_spots: int) -> None:
    assert neg_log10_p(np.array([pcc]), num_spots)[0] == pytest.approx(_exact(pcc, num_spots), abs=1e-3)


def test_more_correlation_is_more_evidence_without_a_step_up_to_a_perfect_one() -> None:
    pcc = np.append(np.linspace(0.0, 0.9999, 20001), 1.0)
    evidence = neg_log10_p(pcc, 800)
    assert np.isfinite(evidence).all()
    assert (np.diff(evidence) > 0).all()
    assert evidence[0] == 0
    assert 280 < evidence[-2] < evidence[-1]


def test_undefined_correlations_and_two_spots_are_no_evidence() -> None:
    assert neg_log10_p(np.array([np.nan, 0.0]), 100).tolist() == [0, 0]
    assert neg_log10_p(np.array([1.0, np.nan]), 2).tolist() == [0, 0]


def test_correction_equals_scipy() -> None:
    p = np.random.default_rng(0).random(500) ** 4
    p[:20] = p[20]
    expected = scipy.stats.false_discovery_control(p, method="bh")
    np.testing.assert_allclose(10 ** -benjamini_hochberg(-np.log10(p)), expected, rtol=1e-9)


def test_correction_goes_on_below_the_smallest_float() -> None:
    evidence = np.array([10.0, 5000.0, 0.0, 4000.0])
    expected = [10 - np.log10(4 / 3), 5000 - np.log10(4), 0.0, 4000 - np.log10(2)]
    np.testing.assert_allclose(benjamini_hochberg(evidence), expected)


def test_genes_are_ranked_over_sections() -> None:
    genes = ["GNAS", "FASN", "KRT8", "CD74"]
    one = section_significance("A1", genes, np.array([0.6, -0.3, np.nan, 0.01]), 300)
    two = section_significance("B1", genes[:3], np.array([0.5, 0.3, np.nan]), 200)
    ranked = rank_genes(pd.concat([one, two]))
    assert ranked["rank"].tolist() == [1, 2, 3, 4]
    assert ranked["gene"].tolist() == ["GNAS", "FASN", "CD74", "KRT8"]
    table = ranked.set_index("gene")
    assert table["sections"].to_dict() == {"GNAS": 2, "FASN": 2, "CD74": 1, "KRT8": 2}
    assert table["undefined"].to_dict() == {"GNAS": 0, "FASN": 0, "CD74": 0, "KRT8": 2}
    assert table["significant"].to_dict() == {"GNAS": 2, "FASN": 2, "CD74": 0, "KRT8": 0}
    assert table.loc["FASN", "pcc"] == pytest.approx(0.0)
    assert np.isnan(table.loc["KRT8", "pcc"])
    mean = (one["neg_log10_q"][0] + two["neg_log10_q"][0]) / 2
    assert table.loc["GNAS", "neg_log10_q"] == pytest.approx(mean)
    assert table.loc["GNAS", "neg_log10_p"] > mean


def test_undefined_genes_count_among_the_tests() -> None:
    alone = section_significance("A1", ["GNAS"], np.array([0.3]), 100)
    among = section_significance("A1", list("abcd"), np.array([0.3, np.nan, np.nan, np.nan]), 100)
    assert among["neg_log10_q"][0] == pytest.approx(alone["neg_log10_q"][0] - np.log10(4))


def test_unrelated_smooth_maps_are_called_significant_far_too_often() -> None:
    """What the module warns of: 5 % would be right, and is what independent spots give."""
    rng = np.random.default_rng(0)
    rough = rng.normal(size=(2, 400, 20, 20))
    smooth = gaussian_filter(rough, (0, 0, 2, 2))
    false = {}
    for name, maps in {"rough": rough, "smooth": smooth}.items():
        truth, prediction = maps.reshape(2, 400, 400).transpose(0, 2, 1)
        false[name] = (neg_log10_p(pearson_per_gene(truth, prediction), 400) > -np.log10(0.05)).mean()
    assert false["rough"] == pytest.approx(0.05, abs=0.03)
    assert false["smooth"] > 0.4
