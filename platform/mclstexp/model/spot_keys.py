"""What training spots are found by: the leading directions of their features, and what trained towers make of them.

Shapes: N training spots, F features, D width of feature keys, E width of the towers' space.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn

from mclstexp.model.tower_keys import join_keys
from mclstexp.model.training_spots import KEY_WIDTH, TrainingSpots


@dataclass(frozen=True)
class TowerEmbeddings:
    """What towers make of the training spots."""

    images: np.ndarray
    """Of their tiles, unit length, float32 (N, E)."""
    spots: np.ndarray
    """Of their expression, unit length, float32 (N, E)."""


@dataclass(frozen=True)
class TrainedTowers:
    """Trained towers, and those that were trained without each fold of the training spots."""

    head: nn.Module
    """The image side, as in `TowerKeys`."""
    whole: TowerEmbeddings
    """By the towers of all training spots."""
    without: tuple[TowerEmbeddings, ...]
    """By towers that did not see a fold, fold by fold."""


@dataclass(frozen=True)
class SpotKeys:
    """What spots are found by: their features, and what towers make of them."""

    spots: TrainingSpots
    towers: TrainedTowers | None

    @cached_property
    def directions(self) -> np.ndarray:
        """The directions of features that are part of keys, float32 (F, D)."""
        num_towers = self.towers.whole.spots.shape[1] if self.towers else 0
        return self.spots.directions[:, : KEY_WIDTH - num_towers]

    @cached_property
    def of_features(self) -> np.ndarray:
        """Float32 (N, D)."""
        return np.concatenate([each.astype(np.float32) @ self.directions for each in self.spots.standard()])

    def whole(self, tower_share: float) -> np.ndarray:
        """Returns the keys of the bank."""
        if not tower_share:
            return self.of_features
        assert self.towers is not None, "only trained towers have a share"
        return join_keys(self.of_features, self.towers.whole.spots, tower_share)

    def without(self, fold: int, tower_share: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns queries and keys of all spots, as they are without a fold."""
        if not tower_share:
            return self.of_features, self.of_features
        assert self.towers is not None, "only trained towers have a share"
        towers = self.towers.without[fold]
        queries, keys = (join_keys(self.of_features, part, tower_share) for part in (towers.images, towers.spots))
        return queries, keys
