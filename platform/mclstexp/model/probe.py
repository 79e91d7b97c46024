"""The linear probe by which encoders are usually judged: from any features of a tile to all genes.

Features are z-scored by the training spots' mean and deviation (plus 1e-6) and clipped to 8 deviations; their first
256 principal components go into a ridge regression with intercept, whose penalty has the smallest squared error over
all genes when each training spot is left out in turn. Leaving out whole patients would be fairer, but with two of them
the penalty is chosen for half the data and may come out too large; such a floor is weak, and a weak floor flatters.

Where features are blocks (layers, views), each is divided by the root of its width, so that blocks weigh the same, and
all are multiplied by the root of their joint width, which puts penalties on the scale of z-scores; of one block the two
cancel. The usual code searches wide features' components at random (scikit-learn's `auto`). Here they are exact, so
that a probe gives the same figures twice: mean scores differ from the usual ones in the fourth digit.

Shapes: N training spots, M other spots, G genes, F features, C components.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV

MAX_SPOTS = 20_000
"""Spots that a regression is fitted on, drawn at random: more cost memory and gain nothing, because it has at most
`NUM_COMPONENTS` weights per gene."""
NUM_COMPONENTS = 256
"""Principal components that a regression sees, where spots and features are enough."""
ALPHAS = np.logspace(1, 6, 16)
"""Penalties to choose from."""
MAX_DEVIATIONS = 8.0
"""Z-scores are clipped to this."""


class Regression(Protocol):
    """A fitted regression from features to some genes."""

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Returns predictions, (M, G), or (M,) of one gene, for features, float64 (M, F)."""


AnyRegression = TypeVar("AnyRegression", bound=Regression)


class GeneRegression(Generic[AnyRegression]):
    """Regressions from features to all genes: one for each set of genes that are measured by the same spots.

    Each gene is so fitted on the spots whose section measures it, and a panel that few sections measure in full costs a
    regression for each of its `measured_parts`, not the gene.
    """

    def __init__(
        self,
        features: np.ndarray,
        target: np.ndarray,
        fit: Callable[[np.ndarray, np.ndarray], AnyRegression],
        seed: int = 0,
    ) -> None:
        """Fits on features (N, F) and target (N, G).

        `target` is NaN where a spot's section does not measure a gene; a gene that no spot measures is predicted as 0.

        Args:
            features: of the training spots.
            target: their expression.
            fit: returns the regression from some spots' features to some genes, float64 each.
            seed: of the draw where there are more than `MAX_SPOTS` spots.
        """
        self._num_genes = target.shape[1]
        self.parts: list[tuple[np.ndarray, AnyRegression]] = []
        """Genes, indices int64, and the regression to them; the part with the most values first."""
        for genes, measured in measured_parts(target):
            spots = _drawn(measured, seed)
            fitted = fit(features[spots].astype(np.float64), target[np.ix_(spots, genes)].astype(np.float64))
            self.parts.append((genes, fitted))

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Returns predictions, float32 (M, G), for features (M, F)."""
        predicted = np.zeros((len(features), self._num_genes), np.float32)
        for genes, regression in self.parts:
            values = regression.predict(features.astype(np.float64))
            predicted[:, genes] = values.reshape(len(features), -1)
        return predicted


@dataclass(frozen=True)
class LinearMap:
    """A probe as a map from features to the G genes of one part; linear but for the clipping."""

    mean: np.ndarray
    """Of each feature in the training spots, float64 (F,)."""
    deviation: np.ndarray
    """The same, plus 1e-6."""
    components: np.ndarray
    """From standardised features to scores, float64 (F, C); C is 0 where features say nothing."""
    coefficients: np.ndarray
    """From scores to genes, float64 (C, G)."""
    intercept: np.ndarray
    """Of each gene, float64 (G,)."""
    alpha: float
    """The chosen penalty; infinite where features say nothing, so that the mean is predicted."""

    def standardised(self, features: np.ndarray) -> np.ndarray:
        """Returns clipped z-scores, float64 (M, F)."""
        scores = features - self.mean
        scores /= self.deviation
        return scores.clip(-MAX_DEVIATIONS, MAX_DEVIATIONS, out=scores)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Returns predictions, float64 (M, G), for features (M, F)."""
        return self.standardised(features) @ self.components @ self.coefficients + self.intercept


class Probe(GeneRegression[LinearMap]):
    """The probe, fitted; each part has components and a penalty of its own."""

    def __init__(
        self,
        features: np.ndarray,
        target: np.ndarray,
        widths: Sequence[int] | None = None,
        seed: int = 0,
        alphas: Sequence[float] = tuple(ALPHAS),
    ) -> None:
        """Fits as `GeneRegression`.

        Args:
            features: of the training spots, (N, F).
            target: their expression, (N, G).
            widths: of the blocks that the features consist of; none: they are one block.
            seed: as `GeneRegression`.
            alphas: penalties to choose from.
        """
        super().__init__(features, target, partial(_fit, widths or [features.shape[1]], alphas), seed)

    @property
    def alphas(self) -> list[float]:
        """The chosen penalty of each part."""
        return [fitted.alpha for _, fitted in self.parts]


def measured_parts(expression: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns sets of genes that are measured by the same spots, as indices of genes and of these spots, int64 each.

    The set with the most values comes first; genes that no spot measures are in none.

    Args:
        expression: (N, G); NaN where a spot's section does not measure a gene.
    """
    measured = ~np.isnan(expression)
    _, first, part = np.unique(np.packbits(measured, axis=0), axis=1, return_index=True, return_inverse=True)
    parts = [
        (np.flatnonzero(part.ravel() == index), np.flatnonzero(measured[:, gene])) for index, gene in enumerate(first)
    ]
    return sorted((each for each in parts if len(each[1])), key=lambda each: -len(each[0]) * len(each[1]))


def principal_components(features: np.ndarray) -> PCA | None:
    """Returns the principal components to fit to features (N, F); None where they span none.

    N spots span at most N - 1, and a constant feature adds none. The solver is exact, by whichever matrix is smaller.
    """
    num_spots, num_features = features.shape
    varying = int((np.ptp(features, axis=0) > 0).sum())
    components = min(NUM_COMPONENTS, num_spots - 1, varying)
    return PCA(components, svd_solver="covariance_eigh" if num_spots > num_features else "full") if components else None


def _fit(widths: Sequence[int], alphas: Sequence[float], features: np.ndarray, target: np.ndarray) -> LinearMap:
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-6
    nothing = np.zeros((features.shape[1], 0)), np.zeros((0, target.shape[1]))
    constant = LinearMap(mean, deviation, *nothing, target.mean(axis=0), np.inf)
    pca = principal_components(features)
    if pca is None:
        return constant
    weight = np.sqrt(sum(widths) / np.repeat(widths, widths))
    scores = pca.fit_transform(constant.standardised(features) * weight)
    ridge = RidgeCV(alphas).fit(scores, target)
    coefficients = ridge.coef_.reshape(target.shape[1], -1).T
    intercept = ridge.intercept_ - pca.mean_ @ pca.components_.T @ coefficients
    components = weight[:, None] * pca.components_.T
    return LinearMap(mean, deviation, components, coefficients, intercept, float(ridge.alpha_))


def _drawn(spots: np.ndarray, seed: int) -> np.ndarray:
    """Returns all of these spots, or `MAX_SPOTS` of them, drawn at random, in their order."""
    if len(spots) <= MAX_SPOTS:
        return spots
    return np.sort(np.random.default_rng(seed).choice(spots, MAX_SPOTS, replace=False))
