"""Floors that a model must beat, and the library-size oracle as a reference line.

All are fitted on training spots only. The ridges see at most `MAX_RIDGE_SPOTS` spots, drawn at random: beyond that
they cost memory and gain nothing, as they have at most some thousand weights a gene.

Shapes: N training spots, M test spots, F features, G genes.
"""

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mclstexp.errors import UserError

MAX_RIDGE_SPOTS = 20_000
ALPHAS = tuple(10.0**power for power in range(-1, 7))
_MAX_FOLDS = 5
_NUM_BLOCKS = 4  # folds of a lone section: stretches of its curve, so that neighbours mostly stay together


def constant(values: np.ndarray, num_spots: int) -> np.ndarray:
    """Returns the same expression (G,), such as the training spots' mean, for every test spot, float32 (M, G)."""
    return np.tile(values.astype(np.float32), (num_spots, 1))


def library_size(totals: np.ndarray, num_genes: int) -> np.ndarray:
    """Returns ln(1 + total) of each test spot, the same for all genes, float32 (M, G).

    An oracle that reads the test section's own totals over all genes, float (M,): it shows how much of a correlation
    is density. It has no unit of expression, so that only correlations of it mean something.
    """
    return np.tile(np.log1p(totals).astype(np.float32)[:, None], (1, num_genes))


class RidgeFloor:
    """Ridge regression from standardised features to all genes at once (Hoerl and Kennard 1970).

    The penalty is the one of smallest squared error in cross-validation over the training groups.
    """

    def __init__(self, features: np.ndarray, target: np.ndarray, groups: np.ndarray, seed: int = 0) -> None:
        """Fits on features (N, F) and target (N, G) of spots in `groups` (N,), see `training_groups`."""
        if len(features) > MAX_RIDGE_SPOTS:
            kept = np.sort(np.random.default_rng(seed).choice(len(features), MAX_RIDGE_SPOTS, replace=False))
            features, target, groups = features[kept], target[kept], groups[kept]
        search = GridSearchCV(
            make_pipeline(StandardScaler(), Ridge()),
            {"ridge__alpha": ALPHAS},
            scoring="neg_mean_squared_error",
            cv=GroupKFold(min(_MAX_FOLDS, len(np.unique(groups)))),
        )
        self._fitted = search.fit(features.astype(np.float64), target, groups=groups)

    @property
    def alpha(self) -> float:
        """The penalty that was chosen."""
        return float(self._fitted.best_params_["ridge__alpha"])

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Returns predictions, float32 (M, G), for features (M, F)."""
        return np.asarray(self._fitted.predict(features.astype(np.float64)), np.float32)


def training_groups(patient_id: np.ndarray, section_id: np.ndarray) -> np.ndarray:
    """Returns the group of each training spot that cross-validation keeps together, (N,).

    Patients where there are at least two, else sections, else stretches of the one section in stored order.

    Raises:
        UserError: there are fewer than two training spots.
    """
    for groups in (patient_id, section_id):
        if len(np.unique(groups)) > 1:
            return groups
    if len(section_id) < 2:
        raise UserError(f"floors need at least 2 training spots, the training sections have {len(section_id)}")
    return np.arange(len(section_id)) * min(_NUM_BLOCKS, len(section_id)) // len(section_id)
