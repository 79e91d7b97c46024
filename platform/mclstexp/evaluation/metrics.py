"""Metrics of predicted against measured expression: plain functions on arrays, listed as scores in `scores.py`.

Shapes: N spots, G genes. An undefined correlation (a constant gene) stays NaN and is counted, never dropped silently. A
gene that the section does not measure is NaN in the truth, and then in every score.
"""

from collections.abc import Sequence

import numpy as np

NUM_HIGHEST = 50
MIN_BETWEEN = 3
"""Fewest patients (or sections) over which means are correlated."""
_ROUNDING = 1e-6
"""Smallest root mean square of residuals, relative to the gene's largest value; less is single precision's rounding
(2^-24)."""


def pearson_per_gene(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Returns each gene's Pearson correlation over spots, float64 (G,); NaN if one side is constant."""
    truth, prediction = (centred(values) for values in (truth, prediction))
    norms = np.sqrt((truth**2).sum(axis=0) * (prediction**2).sum(axis=0))
    products = (truth * prediction).sum(axis=0)
    return np.divide(products, norms, out=np.full(norms.shape, np.nan), where=norms > 0)


def density_free_pearson(truth: np.ndarray, prediction: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Returns each gene's correlation given the spots' library size, float64 (G,): Pearson's partial correlation.

    Library size follows tissue density, which any image encoder sees, also an untrained one, and most genes follow
    library size. The price: biology that goes along with density is removed too (Bhuva et al. 2024,
    https://doi.org/10.1186/s13059-024-03241-7), so state this score beside the plain one, never alone.

    It is the correlation over spots of the residuals of truth and of prediction (Yule 1907,
    https://doi.org/10.1098/rspa.1907.0028), see `density_residuals`. NaN if nothing is left of one side: a constant
    prediction, one that is linear in the log total (the library-size oracle), or fewer than three spots.

    Args:
        truth: measured expression of one section, (N, G).
        prediction: predicted expression, (N, G).
        totals: each spot's measured count over all genes, (N,).
    """
    return pearson_per_gene(density_residuals(truth, totals), density_residuals(prediction, totals))


def density_residuals(values: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Returns each gene's residuals of least squares on the log library size in one section, float64 (N, G).

    With l_s = ln(1 + total_s): r_sg = (y_sg - mean_s y_sg) - b_g (l_s - mean_s l_s), and
    b_g = sum_s (l_s - mean l) y_sg / sum_s (l_s - mean l)^2; b_g = 0 if all totals are equal. Residuals that are only
    rounding become exactly zero.

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


def squared_error_per_gene(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Returns each gene's mean squared error over spots, float64 (G,)."""
    return ((prediction.astype(np.float64) - truth) ** 2).mean(axis=0)


def absolute_error_per_gene(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Returns each gene's mean absolute error over spots, float64 (G,)."""
    return np.abs(prediction.astype(np.float64) - truth).mean(axis=0)


def squared_level_error(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Returns the squared difference of each gene's predicted and measured mean over spots, float64 (G,)."""
    return (prediction.mean(axis=0, dtype=np.float64) - truth.mean(axis=0, dtype=np.float64)) ** 2


def pearson_between(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Returns each gene's correlation of its means over U patients (or sections), float64 (G,).

    NaN if fewer than three measure the gene, or one side varies by no more than rounding.

    Args:
        truth: mean measured expression, float64 (U, G); NaN where a gene is not measured.
        prediction: mean predicted expression, float64 (U, G); NaN in the same places.
    """
    measured = ~np.isnan(truth)
    found = pearson_per_gene(_whole(truth, measured), _whole(prediction, measured))
    return np.where(measured.sum(axis=0) >= MIN_BETWEEN, found, np.nan)


def highest_genes(truth: np.ndarray, count: int = NUM_HIGHEST) -> np.ndarray:
    """Returns the columns of the measured genes with the largest mean in the truth, largest first; ties by column.

    With the test section's truth these are mclSTExp's highly expressed genes (HEG; 2024,
    https://arxiv.org/abs/2407.08216): another set in each section.
    """
    return _largest(truth.mean(axis=0, dtype=np.float64), count)


def variable_genes(truth: np.ndarray, count: int = NUM_HIGHEST) -> np.ndarray:
    """Returns the columns of the measured genes with the largest variance in the truth, largest first; ties by column.

    The variance is that of the normalised truth in its own unit, without correction for the mean, as in the choice of
    a panel. This is not what mclSTExp's code calls HVG, which is the mean over all genes of its panel.
    """
    return _largest(truth.var(axis=0, dtype=np.float64), count)


def heg_pcc(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Returns the mean correlation over a section's own `highest_genes`; an undefined one counts as 0."""
    genes = highest_genes(truth)
    return float(np.nan_to_num(pearson_per_gene(truth[:, genes], prediction[:, genes])).mean())


def mean_by_patient(patients: Sequence[str], values: np.ndarray) -> np.ndarray:
    """Returns the mean over patients of each patient's mean over sections.

    Args:
        patients: the patient of each section.
        values: one row per section.
    """
    of = np.array(patients, object)
    return np.mean([values[of == patient].mean(axis=0) for patient in sorted(set(patients))], axis=0)


def centred(values: np.ndarray) -> np.ndarray:
    """Returns columns (N, G) minus their mean, float64; a constant column becomes exactly zero."""
    values = values.astype(np.float64)
    about_mean = values - values.mean(axis=0)
    about_mean[:, (values == values[:1]).all(axis=0)] = 0.0
    return about_mean


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the largest values, largest first; NaN is not among them."""
    return np.argsort(-values, kind="stable")[: min(count, np.count_nonzero(~np.isnan(values)))]


def _whole(values: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Returns values (U, G) less the mean of the measured ones, 0 for the others, and for a gene that is constant."""
    mean = np.where(measured, values, 0).sum(axis=0) / np.maximum(1, measured.sum(axis=0))
    about_mean = np.where(measured, values - mean, 0)
    varies = np.abs(about_mean).max(axis=0) > _ROUNDING * np.abs(mean)
    return np.where(varies, about_mean, 0.0)
