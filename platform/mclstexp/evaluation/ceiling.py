"""How high a correlation with noisy counts can be: the split-half noise ceiling.

Counting noise is the only noise that one measurement of a section shows: what spills between spots or differs between
sections is not in it, so that a real model stays below. Where it errs it is too high: a negative estimate counts as
zero, and the logarithm makes halves of few counts more alike than they should be. In simulated sections it lies within
.02 of the best possible prediction from ten counts a spot and gene on, and up to .09 above it at one to three.
"""

import numpy as np
import pandas as pd

from mclstexp.data.genes import Normaliser
from mclstexp.evaluation.density import density_free_pearson
from mclstexp.evaluation.metrics import pearson_per_gene
from mclstexp.evaluation.targets import normalise_section

NUM_SPLITS = 10
"""Random halvings over which a gene's correlation is averaged: the result hangs less on the seed."""
Half = tuple[np.ndarray, np.ndarray]
"""Panel counts (N, G) and totals over all genes (N,), int64."""


def noise_ceiling(counts: np.ndarray, totals: np.ndarray, target: Normaliser, seed: int) -> pd.DataFrame:
    """Returns each gene's reliability and the correlation that no prediction exceeds but by chance, G rows.

    Counts are halved at random (`halve`), each half is normalised on its own, and r is the correlation of the halves
    over spots. Spearman and Brown's formula (1910, https://doi.org/10.1111/j.2044-8295.1910.tb00206.x) makes it the
    reliability of all counts, rho = 2r / (1 + |r|): how two measurements of the same section would correlate. The
    noise-free truth correlates with one measurement by sqrt(rho) (attenuation, Spearman 1904,
    https://doi.org/10.2307/1412159), so that this, not rho, is the ceiling of a correlation: the library-size oracle
    does exceed rho. Both formulas hold for additive noise, which counting noise under a logarithm is nearly.

    Args:
        counts: raw counts of the panel's genes in all spots of one section, whole numbers (N, G).
        totals: each spot's count over all genes, whole numbers (N,).
        target: the unit that is scored.
        seed: of the halvings.

    Returns:
        Columns `pcc` and `pcc_density_free`, the ceilings of the two correlations in `tables.gene_table`, and
        `reliability` and `reliability_density_free`, which may be negative; float64, NaN where a half is constant in
        any halving.
    """
    rng = np.random.default_rng(seed)
    plain, density_free = np.zeros((2, NUM_SPLITS, counts.shape[1]))
    for split in range(NUM_SPLITS):
        first, second = (normalise_section(target, *half) for half in halve(counts, totals, rng))
        plain[split] = pearson_per_gene(first, second)
        density_free[split] = density_free_pearson(first, second, totals)
    reliability, reliability_free = (_spearman_brown(halves.mean(axis=0)) for halves in (plain, density_free))
    return pd.DataFrame(
        {
            "pcc": np.sqrt(reliability.clip(0)),
            "pcc_density_free": np.sqrt(reliability_free.clip(0)),
            "reliability": reliability,
            "reliability_density_free": reliability_free,
        }
    )


def halve(counts: np.ndarray, totals: np.ndarray, rng: np.random.Generator) -> tuple[Half, Half]:
    """Returns two halves of a section's counts: each molecule goes to one of them by the toss of a coin.

    Binomial thinning: halves of Poisson counts are independent Poisson counts of half the rate (Neufeld et al. 2022,
    https://doi.org/10.1093/biostatistics/kxac047). Genes outside the panel are halved in sum.

    Args:
        counts: raw counts of the panel's genes, whole numbers (N, G).
        totals: each spot's count over all genes, whole numbers (N,).
        rng: the source of chance.
    """
    counts, totals = counts.astype(np.int64), totals.astype(np.int64)
    first = rng.binomial(counts, 0.5)
    first_totals = first.sum(axis=1) + rng.binomial(totals - counts.sum(axis=1), 0.5)
    return (first, first_totals), (counts - first, totals - first_totals)


def _spearman_brown(halves: np.ndarray) -> np.ndarray:
    """Returns the reliability of twice the length, in [-1, 1].

    The modulus changes nothing where halves agree, and keeps chance's negative correlations as large as its positive
    ones: without it two or three spots give minus infinity.
    """
    return 2 * halves / (1 + np.abs(halves))
