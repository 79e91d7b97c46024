"""The probe by which HEST-bench ranks pathology encoders (Jaume et al. 2024, https://arxiv.org/abs/2406.16192).

Standardised features, their first 256 principal components, and a ridge with the fixed penalty 100 / (components x
genes). It chooses nothing by cross-validation, so a figure here compares with the published ones; the price is a
penalty that is far too small for few spots, where the ridge floor is the harder one to beat. The published code fits no
intercept and searches the components at random. Here the intercept is fitted, which moves no correlation and lets the
errors mean something, and the components are exact, so that a probe gives the same figures twice.

Shapes: N training spots, M spots of a scored section, G genes, F features.
"""

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from mclstexp.evaluation.ridge import drawn, measured_parts, predict_parts

NUM_COMPONENTS = 256
"""Principal components that the ridge sees, where spots and features are enough."""


class HestProbe:
    """The probe, fitted; genes that are not measured by the same spots have a regression for each `measured_parts`."""

    def __init__(self, features: np.ndarray, target: np.ndarray, seed: int = 0) -> None:
        """Fits on features (N, F) and target (N, G).

        `target` is NaN where a spot's section does not measure a gene; a gene that no spot measures is predicted as 0.
        """
        self._num_genes = target.shape[1]
        self._fitted: list[tuple[np.ndarray, Pipeline]] = []
        for genes, measured in measured_parts(target):
            spots = drawn(measured, seed)
            seen = features[spots].astype(np.float64)
            self._fitted.append((genes, self._pipeline(seen).fit(seen, target[np.ix_(spots, genes)])))

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Returns predictions, float32 (M, G), for features (M, F)."""
        return predict_parts(self._fitted, features, self._num_genes)

    def _pipeline(self, features: np.ndarray) -> Pipeline:
        """Returns the regression to fit; N spots span at most N - 1 components, and constant features none."""
        varying = int((np.ptp(features, axis=0) > 0).sum())
        components = min(NUM_COMPONENTS, len(features) - 1, varying)
        alpha = 100 / (max(components, 1) * self._num_genes)
        if not components:
            return make_pipeline(StandardScaler(), Ridge(alpha))
        return make_pipeline(StandardScaler(), PCA(components, svd_solver="full"), Ridge(alpha))
