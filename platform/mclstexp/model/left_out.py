"""Folds of training spots that are left out together when a penalty or a share is chosen out of fold.

What is chosen must hold for a patient never seen, so that whole patients are left out where there are enough of them.
With two, a fold would train on one patient to predict the other and over-penalise; then sections are left out, and of a
lone section four blocks of tissue, so that neighbours mostly stay together.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from sklearn.cluster import KMeans

from mclstexp.errors import UserError

MIN_PATIENTS, MIN_SECTIONS, NUM_BLOCKS, MAX_FOLDS = 3, 2, 4, 5
_SEED = 0


@dataclass(frozen=True)
class LeftOut:
    """Which fold each training spot is left out with."""

    kind: Literal["patients", "sections", "blocks"]
    """What a fold consists of."""
    fold: np.ndarray
    """Index of each spot's fold, int64 (N,)."""

    @property
    def num_folds(self) -> int:
        """Number of folds, 2 to 5."""
        return int(self.fold.max()) + 1

    def of(self, spots: np.ndarray) -> "LeftOut":
        """Returns the folds of some spots, by their indices."""
        return LeftOut(self.kind, self.fold[spots])

    def sides(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the spots outside and inside a fold, bool (N,) each."""
        return self.fold != index, self.fold == index


def leave_out(patient_id: np.ndarray, section_id: np.ndarray, xy_um: np.ndarray, max_folds: int = MAX_FOLDS) -> LeftOut:
    """Returns the folds of N training spots.

    Args:
        patient_id, section_id: strings, (N,).
        xy_um: micrometres, (N, 2).
        max_folds: folds at most.

    Raises:
        UserError: there are fewer than two spots.
    """
    if len(np.unique(patient_id)) >= MIN_PATIENTS:
        return LeftOut("patients", _dealt(patient_id, max_folds))
    if len(np.unique(section_id)) >= MIN_SECTIONS:
        return LeftOut("sections", _dealt(section_id, max_folds))
    if len(section_id) < 2:
        raise UserError(f"what is fitted out of fold needs at least 2 training spots, there are {len(section_id)}")
    blocks = KMeans(min(NUM_BLOCKS, len(section_id)), n_init=4, random_state=_SEED).fit_predict(xy_um)
    return LeftOut("blocks", _dealt(blocks, max_folds))


def planned_folds(num_patients: int, num_sections: int, max_folds: int = MAX_FOLDS) -> tuple[str, int]:
    """Returns what the folds of `leave_out` consist of, and their number, before spots are read."""
    for kind, count, fewest in (("patients", num_patients, MIN_PATIENTS), ("sections", num_sections, MIN_SECTIONS)):
        if count >= fewest:
            return kind, min(count, max_folds)
    return "blocks", min(NUM_BLOCKS, max_folds)


def _dealt(names: np.ndarray, max_folds: int) -> np.ndarray:
    """Returns a fold for each spot, int64 (N,): the sorted names in turn."""
    codes = np.unique(names, return_inverse=True)[1]
    return codes % min(max_folds, codes.max() + 1)
