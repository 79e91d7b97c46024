"""The probe by which HEST-bench ranks pathology encoders (Jaume et al. 2024, https://arxiv.org/abs/2406.16192).

Standardised features, their first 256 principal components, and a ridge with the fixed penalty 100 / (components x
genes). It chooses nothing from the data, so a figure here compares with the published ones; the price is a penalty that
is far too small for few spots, where `model.probe` is the harder one to beat. The published code fits no intercept
and searches the components at random. Here the intercept is fitted, which moves no correlation and lets the errors mean
something, and the components are exact, so that a probe gives the same figures twice.

Shapes: N training spots, G genes, F features.
"""

from functools import partial

import numpy as np
from sklearn.dummy import DummyRegressor
from sklearn.linear_model import Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from mclstexp.model.probe import GeneRegression, principal_components


class HestProbe(GeneRegression[Pipeline]):
    """The probe, fitted; genes that are not measured by the same spots have a regression of their own."""

    def __init__(self, features: np.ndarray, target: np.ndarray, seed: int = 0) -> None:
        """Fits on features (N, F) and target (N, G) as `GeneRegression`."""
        super().__init__(features, target, partial(_fit, target.shape[1]), seed)


def _fit(num_genes: int, features: np.ndarray, target: np.ndarray) -> Pipeline:
    """Returns the fitted regression; the penalty counts all genes of the panel."""
    pca = principal_components(features)
    ridge = DummyRegressor() if pca is None else Ridge(100 / (pca.n_components * num_genes))
    return make_pipeline(StandardScaler(), *([] if pca is None else [pca]), ridge).fit(features, target)
