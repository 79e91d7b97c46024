"""The level of a slide: the mean expression that a model expects over all its tiles, gene by gene.

Programs answer within a slide. Its level is what a probe predicts for the mean of its tiles, shrunk to the training
mean by how well the probe told left-out patients apart: a share of 0 is the training mean. A probe is linear, so that a
slide needs only the mean of its tiles' components.

Shapes: N training spots, F features, C components, G genes.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mclstexp.model.left_out import LeftOut

NUM_COMPONENTS = 256
ALPHAS = np.logspace(1, 6, 16)


@dataclass(frozen=True)
class Level:
    """A fitted level."""

    components: np.ndarray
    """Turns a tile's standardised features into components, float64 (F, C)."""
    coefficients: np.ndarray
    """Turns the mean of a slide's components into expression, float64 (C, G)."""
    intercept: np.ndarray
    """Expression at components of 0, float64 (G,)."""
    mean: np.ndarray
    """Mean over the training spots, float64 (G,)."""
    share: float
    """Of the probe's difference from the mean, 0 to 1."""

    def of(self, mean_components: np.ndarray) -> np.ndarray:
        """Returns a slide's mean expression, float64 (G,), from the mean of its tiles' components, (C,)."""
        return self.mean + self.share * (mean_components @ self.coefficients + self.intercept - self.mean)


def fit_level(
    features: np.ndarray, expression: np.ndarray, section_id: np.ndarray, folds: "LeftOut"
) -> tuple[Level, np.ndarray]:
    """Returns the level, and that of each spot's section as predicted without the spot's fold, float64 (N, G).

    Where whole patients are left out, the level's share is the least squares slope of measured on predicted differences
    from the training mean, over all genes and left-out sections, limited to 0 and 1. Sections of one patient do not say
    how patients differ: with fewer patients the share is 1, and only the probe's own penalty shrinks the level.

    Args:
        features: standardised, (N, F).
        expression: (N, G).
        section_id: strings, (N,).
        folds: the spots that are left out together.
    """
    products = squares = 0.0
    means, differences = np.empty(expression.shape), np.empty(expression.shape)
    for index in range(folds.num_folds):
        outside, inside = folds.sides(index)
        probe = _probe(features[outside], expression[outside])
        for name in np.unique(section_id[inside]):
            rows = inside & (section_id == name)
            predicted = probe.of(features[rows].mean(axis=0) @ probe.components) - probe.mean
            products += predicted @ (expression[rows].mean(axis=0) - probe.mean)
            squares += predicted @ predicted
            means[rows], differences[rows] = probe.mean, predicted
    share = 1.0
    if folds.kind == "patients":
        share = float(np.clip(products / squares, 0, 1)) if squares else 0.0
    return replace(_probe(features, expression), share=share), means + share * differences


def _probe(features: np.ndarray, expression: np.ndarray) -> Level:
    from sklearn.decomposition import PCA  # here, because tasks that finish slides read levels and need none of it
    from sklearn.linear_model import RidgeCV

    num_components = min(NUM_COMPONENTS, len(features) - 1, features.shape[1])
    pca = PCA(num_components, svd_solver="full").fit(features)
    size = np.sqrt(features.shape[1])
    ridge = RidgeCV(alphas=ALPHAS).fit(pca.transform(features) * size, expression)
    coefficients = ridge.coef_.T * size
    intercept = ridge.intercept_ - (pca.mean_ @ pca.components_.T) @ coefficients
    return Level(pca.components_.T, coefficients, intercept, expression.mean(axis=0), 1.0)
