"""Scores of predicted against measured expression.

Shapes: N spots, G genes. A correlation that is not defined (a constant gene) stays NaN and is counted, never
dropped unseen.
"""

from dataclasses import dataclass

import numpy as np

NUM_HIGHEST = 50


@dataclass(frozen=True)
class Scores:
    """One prediction's scores on one set of spots."""

    pcc_all: float
    """Mean Pearson correlation over the genes where it is defined."""
    pcc_heg50: float
    """The same over the 50 genes of largest mean in the truth."""
    mse: float
    mae: float
    undefined: int
    """Genes whose correlation is not defined."""


def score(truth: np.ndarray, prediction: np.ndarray) -> Scores:
    """Returns the scores of a prediction, both (N, G) in the same unit."""
    pcc = pearson_per_gene(truth, prediction)
    gap = prediction.astype(np.float64) - truth
    return Scores(
        pcc_all=_defined_mean(pcc),
        pcc_heg50=_defined_mean(pcc[highest_genes(truth)]),
        mse=float((gap**2).mean()),
        mae=float(np.abs(gap).mean()),
        undefined=int(np.isnan(pcc).sum()),
    )


def pearson_per_gene(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Returns each gene's Pearson correlation over spots, float64 (G,); NaN where one side is constant."""
    truth, prediction = (_centred(values) for values in (truth, prediction))
    norms = np.sqrt((truth**2).sum(axis=0) * (prediction**2).sum(axis=0))
    products = (truth * prediction).sum(axis=0)
    return np.divide(products, norms, out=np.full(norms.shape, np.nan), where=norms > 0)


def highest_genes(truth: np.ndarray, count: int = NUM_HIGHEST) -> np.ndarray:
    """Returns the columns of the genes of largest mean in the truth, largest first; ties by column."""
    return np.argsort(-truth.mean(axis=0, dtype=np.float64), kind="stable")[:count]


def _centred(values: np.ndarray) -> np.ndarray:
    """Returns columns less their mean; a column of one value becomes exactly zero."""
    values = values.astype(np.float64)
    centred = values - values.mean(axis=0)
    centred[:, (values == values[:1]).all(axis=0)] = 0.0
    return centred


def _defined_mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")
