"""Scores of real sections, read from their files, against figures that other code computed from the public counts."""

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from ingest.readers import READERS
from ingest.readers.legacy_st import read_legacy_st
from mclstexp.data.sheet import read_sheet
from mclstexp.evaluation import floors
from mclstexp.evaluation.floors import halve, noise_ceiling
from mclstexp.evaluation.metrics import pearson_per_gene
from mclstexp.evaluation.scores import gene_scores, gene_sets, set_table
from mclstexp.evaluation.sections import TARGETS, normalise_section

pytestmark = pytest.mark.skipif("MCLSTEXP_DATA" not in os.environ, reason="MCLSTEXP_DATA names no folder of real data")

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


@cache
def _section(name: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns counts of the panel's genes (N, 785), totals over all genes (N,) and the number of genes in the file."""
    root = Path(os.environ["MCLSTEXP_DATA"])
    sheets = [read_sheet(str(root / sheet), READERS) for sheet in ("samples.csv", "samples_lowres.csv")]
    (row,) = (row for rows in sheets for row in rows if row.section_id == name)
    assert row.expression is not None
    assert row.positions is not None
    expression = read_legacy_st(row.expression, row.positions)
    symbols = [gene.symbol for gene in expression.genes]
    columns = [symbols.index(symbol) for symbol in (root / "her2st" / "panel_785.txt").read_text().split()]
    counts = expression.spots.counts
    assert counts is not None
    return counts[:, columns].toarray(), counts.sum(axis=1).astype(np.float64), len(symbols)


@pytest.mark.parametrize(("name", "target"), list(PUBLISHED))
def test_real_sections_give_the_published_floors(name: str, target: str) -> None:
    counts, totals, num_genes = _section(name)
    truth = normalise_section(TARGETS[target], counts, totals)
    sets = gene_sets(truth, {})
    said = {
        "oracle": floors.library_size(totals, truth.shape[1]),
        "zeros": np.zeros_like(truth),
        "own mean": floors.constant(truth.mean(axis=0, dtype=np.float64), len(truth)),
    }
    rows = {
        word: set_table(gene_scores(truth, values, totals), sets).set_index("gene_set") for word, values in said.items()
    }
    oracle, zeros = rows["oracle"], rows["zeros"].loc["all"]
    assert (len(counts), num_genes, oracle.loc["all", "undefined"]) == PUBLISHED[name, target][:3]
    found = (oracle.loc["all", "pcc"], oracle.loc["heg50", "pcc"], zeros["mse"], zeros["mae"])
    assert (*found, rows["own mean"].loc["all", "mse"]) == pytest.approx(PUBLISHED[name, target][3:], abs=6e-5)
    assert oracle.loc["all", "undefined_density_free"] == zeros["undefined"] == 785


@pytest.mark.parametrize("target", ["per_gene", "per_spot_panel"])
def test_the_oracle_stays_below_the_ceiling_but_not_below_reliability(target: str) -> None:
    counts, totals, _ = _section("B4")
    truth = normalise_section(TARGETS[target], counts, totals)
    oracle = gene_scores(truth, floors.library_size(totals, truth.shape[1]), totals)["pcc"].mean()
    ceiling = noise_ceiling(counts, totals, TARGETS[target], seed=0)
    assert ceiling["reliability"].mean() < oracle < ceiling["pcc"].mean()


@pytest.mark.parametrize(("name", "least", "most"), [("A1", 0.95, 1.15), ("C2", 0.95, 1.15), ("B4", 1.15, 1.5)])
def test_reliability_predicted_from_fewer_counts_errs_upwards(name: str, least: float, most: float) -> None:
    """Halves of a section are two measurements at half depth; quarters say what their correlation should be."""
    counts, totals, _ = _section(name)
    first, second = halve(counts, totals, np.random.default_rng(0))
    predicted = noise_ceiling(*first, TARGETS["per_spot"], seed=0)["reliability"].to_numpy()
    measured = pearson_per_gene(*(normalise_section(TARGETS["per_spot"], *half) for half in (first, second)))
    both = ~np.isnan(predicted + measured)
    assert least < predicted[both].mean() / measured[both].mean() < most
