"""Correlations that tissue density cannot win: what is left of expression once library size is taken out.

A spot's library size follows its tissue density, which any image encoder sees, random weights too, and most genes
follow library size: features of an untrained encoder then beat trained ones on the mean correlation over all genes.
The price of the view: biology that goes along with density is taken out as well (Bhuva et al. 2024,
https://doi.org/10.1186/s13059-024-03241-7, show that there is some), so it stands beside the plain one, never alone.
"""

import numpy as np

from mclstexp.evaluation.metrics import centred, pearson_per_gene

_ROUNDING = 1e-6
"""Least root mean square of residuals over the gene's largest value: less is single precision's rounding (2^-24)."""


def density_free_pearson(truth: np.ndarray, prediction: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Returns each gene's correlation given the spots' library size, float64 (G,): Pearson's partial correlation.

    It is the correlation over spots of the residuals of truth and of prediction (Yule 1907,
    https://doi.org/10.1098/rspa.1907.0028), see `density_residuals`. NaN where nothing is left of one side: a constant
    prediction, one that is linear in the log total (the library-size oracle), or fewer than three spots.

    Args:
        truth: measured expression of one section, (N, G).
        prediction: the same as predicted, (N, G).
        totals: each spot's measured count over all genes, (N,).
    """
    return pearson_per_gene(density_residuals(truth, totals), density_residuals(prediction, totals))


def density_residuals(values: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Returns what least squares on the log library size leaves of each gene in one section, float64 (N, G).

    With l_s = ln(1 + total_s): r_sg = (y_sg - mean_s y_sg) - b_g (l_s - mean_s l_s), and
    b_g = sum_s (l_s - mean l) y_sg / sum_s (l_s - mean l)^2; b_g = 0 where all totals are equal. A gene of which only
    rounding is left becomes exactly zero.

    Args:
        values: expression in any unit, (N, G).
        totals: each spot's measured count over all genes, (N,).
    """
    log_total, about_mean = centred(np.log1p(totals)[:, None]), centred(values)
    spread = (log_total**2).sum()
    slope = (log_total * about_mean).sum(axis=0) / spread if spread > 0 else np.zeros(values.shape[1])
    residuals = about_mean - log_total * slope
    left = np.sqrt((residuals**2).mean(axis=0)) > _ROUNDING * np.abs(values).max(axis=0)
    return np.where(left, residuals, 0.0)
