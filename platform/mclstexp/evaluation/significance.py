"""The most significant genes over sections, as mclSTExp ranks them (2024, https://arxiv.org/abs/2407.08216).

**These p-values are too small.** The test of a correlation assumes independent spots; neighbouring spots are not, in
measured or predicted expression, so a section has far fewer independent spots than it counts. Take the ranking as a
description of which genes are predicted best over sections, not as evidence at the stated level. The test has two
sides, so a gene predicted the wrong way round is significant too: read it with its mean correlation.

Everything is kept as -log10, because p-values of a section with some hundred spots are too small for a float64. An
undefined correlation (a constant gene) is no evidence: p = 1, and it is counted.

Shapes: G genes of one section.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import betaln

LEVEL = 0.05
"""Share of false discoveries up to which a gene counts as significant in a section."""
_SMALLEST_P = 1e-280  # below, the survival function loses digits and then vanishes


def section_significance(section_id: str, genes: Sequence[str], pcc: np.ndarray, num_spots: int) -> pd.DataFrame:
    """Returns one section's significance, one row per gene.

    Args:
        section_id: the section's name.
        genes: names of the G genes.
        pcc: (G,), Pearson correlation of predicted and measured expression over the spots; NaN if undefined.
        num_spots: spots of the section.

    Returns:
        Columns section_id, gene, pcc, neg_log10_p, neg_log10_q (corrected over the section's genes, with the
        undefined ones).
    """
    evidence = neg_log10_p(pcc, num_spots)
    return pd.DataFrame(
        {
            "section_id": section_id,
            "gene": list(genes),
            "pcc": pcc,
            "neg_log10_p": evidence,
            "neg_log10_q": benjamini_hochberg(evidence),
        }
    )


def rank_genes(sections: pd.DataFrame) -> pd.DataFrame:
    """Returns genes by their mean -log10 q over sections, highest first; ties by mean -log10 p, then by name.

    Args:
        sections: rows of `section_significance` of any number of sections. A gene that is missing from a section (it is
            not in that fold's panel) is averaged over the others; column `sections` counts them.

    Returns:
        Columns rank (from 1), gene, neg_log10_q, neg_log10_p, pcc (means; pcc over the sections that have one),
        sections, significant (sections with q <= 0.05), undefined (sections without a correlation).
    """
    marked = sections.assign(significant=sections["neg_log10_q"] >= -np.log10(LEVEL), undefined=sections["pcc"].isna())
    genes = marked.groupby("gene", as_index=False).agg(
        neg_log10_q=("neg_log10_q", "mean"),
        neg_log10_p=("neg_log10_p", "mean"),
        pcc=("pcc", "mean"),
        sections=("section_id", "size"),
        significant=("significant", "sum"),
        undefined=("undefined", "sum"),
    )
    ranked = genes.sort_values(
        ["neg_log10_q", "neg_log10_p", "gene"], ascending=[False, False, True], ignore_index=True
    )
    ranked.insert(0, "rank", np.arange(1, len(ranked) + 1))
    return ranked


def neg_log10_p(pcc: np.ndarray, num_spots: int) -> np.ndarray:
    """Returns -log10 of the two-sided p-value of each Pearson correlation, float64 (G,); 0 if undefined.

    As `scipy.stats.pearsonr`: r·sqrt(ν / (1 - r²)) is Student's t with ν = spots - 2. Equally p = I_x(ν/2, 1/2) with
    x = 1 - r² (DLMF 8.17, https://dlmf.nist.gov/8.17.E8); where p is below 1e-280 the leading term of that,
    x^a / (a·|r|·B(a, 1/2)) with a = ν/2, is computed in logarithms, correct to 0.001. A perfect correlation is treated
    as one that differs from 1 by the last digit of a float64. With fewer than three spots p = 1.
    """
    freedom = num_spots - 2
    defined = ~np.isnan(pcc)
    result = np.zeros(len(pcc))
    if freedom < 1:
        return result
    size = np.minimum(np.abs(pcc[defined].astype(np.float64)), 1 - np.finfo(np.float64).eps)
    rest = (1 - size) * (1 + size)
    p = 2 * stats.t.sf(size * np.sqrt(freedom / rest), freedom)
    tiny = p < _SMALLEST_P
    log_p = np.log(np.where(tiny, 1.0, p))
    log_p[tiny] = _log_leading_term(size[tiny], rest[tiny], freedom / 2)
    result[defined] = np.abs(log_p) / np.log(10)
    return result


def benjamini_hochberg(evidence: np.ndarray) -> np.ndarray:
    """Returns -log10 of p-values corrected for the false discovery rate, float64 (G,), from -log10 p.

    Benjamini and Hochberg 1995, https://doi.org/10.1111/j.2517-6161.1995.tb02031.x: with p ranked upwards,
    q_i = min over j >= i of p_j·G / j, at most 1. It holds for independent and for positively dependent genes.
    """
    order = np.argsort(-evidence, kind="stable")
    ranks = np.arange(1, len(evidence) + 1)
    scaled = evidence[order] - np.log10(len(evidence) / ranks)
    corrected = np.maximum.accumulate(scaled[::-1])[::-1]
    result = np.empty(len(evidence))
    result[order] = np.maximum(corrected, 0.0)
    return result


def _log_leading_term(size: np.ndarray, rest: np.ndarray, half_freedom: float) -> np.ndarray:
    return half_freedom * np.log(rest) - np.log(half_freedom * size) - betaln(half_freedom, 0.5)
