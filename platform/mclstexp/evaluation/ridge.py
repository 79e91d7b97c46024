"""The ridge floor: a regression from any features of a tile to all genes, its penalty chosen over training groups.

A gene is fitted on the spots whose section measures it, so that a panel that few sections measure in full costs a
regression per set of genes (`measured_parts`), not the gene.

Shapes: N training spots, M spots of a scored section, G genes, F features.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from mclstexp.errors import UserError

MAX_RIDGE_SPOTS = 20_000
"""Spots that a ridge is fitted on, drawn at random: more cost memory and gain nothing, because it has at most some
thousand weights per gene."""
ALPHAS = tuple(10.0**power for power in range(-1, 7))
Fitted = Sequence[tuple[np.ndarray, Pipeline]]
"""Genes, indices (g,), and the regression to them."""
_MAX_FOLDS = 5
_NUM_BLOCKS = 4  # folds of a lone section: stretches of its stored order, so that neighbours mostly stay together


class RidgeFloor:
    """Ridge regression from standardised features to all genes at once (Hoerl and Kennard 1970).

    The penalty is the one of smallest squared error in cross-validation over the training groups. Genes that are not
    measured by the same spots have a regression for each of their `measured_parts`, with the penalty of the first.
    """

    def __init__(self, features: np.ndarray, target: np.ndarray, groups: np.ndarray, seed: int = 0) -> None:
        """Fits on features (N, F) and target (N, G) of spots in `groups` (N,), see `training_groups`.

        `target` is NaN where a spot's section does not measure a gene; a gene that no spot measures is predicted as 0.
        """
        self.alpha = 0.0
        """The chosen penalty."""
        self._num_genes = target.shape[1]
        self._fitted: list[tuple[np.ndarray, Pipeline]] = []
        for genes, spots in measured_parts(target):
            spots = drawn(spots, seed)
            seen, learnt = features[spots].astype(np.float64), target[np.ix_(spots, genes)]
            if not self._fitted:
                self.alpha = _best_alpha(seen, learnt, training_groups(groups[spots], groups[spots]))
            self._fitted.append((genes, _pipeline(self.alpha).fit(seen, learnt)))

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Returns predictions, float32 (M, G), for features (M, F)."""
        return predict_parts(self._fitted, features, self._num_genes)


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


def drawn(spots: np.ndarray, seed: int) -> np.ndarray:
    """Returns all of these spots, or `MAX_RIDGE_SPOTS` of them, drawn at random, in their order."""
    if len(spots) <= MAX_RIDGE_SPOTS:
        return spots
    return np.sort(np.random.default_rng(seed).choice(spots, MAX_RIDGE_SPOTS, replace=False))


def predict_parts(fitted: Fitted, features: np.ndarray, num_genes: int) -> np.ndarray:
    """Returns the predictions of regressions to different genes, float32 (M, G), for features (M, F); 0 without one."""
    predicted = np.zeros((len(features), num_genes), np.float32)
    for genes, regression in fitted:
        values = regression.predict(features.astype(np.float64))
        predicted[:, genes] = values.reshape(len(features), -1)  # of one gene, sklearn returns a vector
    return predicted


def _pipeline(alpha: float) -> Pipeline:
    return make_pipeline(StandardScaler(), Ridge(alpha))


def _best_alpha(features: np.ndarray, target: np.ndarray, groups: np.ndarray) -> float:
    folds = GroupKFold(min(_MAX_FOLDS, len(np.unique(groups))))
    search = GridSearchCV(
        _pipeline(1.0), {"ridge__alpha": ALPHAS}, scoring="neg_mean_squared_error", cv=folds, refit=False
    )
    return float(search.fit(features, target, groups=groups).best_params_["ridge__alpha"])


def training_groups(patient_id: np.ndarray, section_id: np.ndarray) -> np.ndarray:
    """Returns the group of each training spot, (N,); cross-validation keeps a group together.

    Groups are patients if there are at least two, else sections, else stretches of the one section in stored order.

    Raises:
        UserError: there are fewer than two training spots.
    """
    for groups in (patient_id, section_id):
        if len(np.unique(groups)) > 1:
            return groups
    if len(section_id) < 2:
        raise UserError(f"floors need at least 2 training spots, the training sections have {len(section_id)}")
    return np.arange(len(section_id)) * min(_NUM_BLOCKS, len(section_id)) // len(section_id)
