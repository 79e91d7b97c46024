"""Feature blocks on one scale: z-scores by training statistics, each block divided by the root of its width.

A block is one pooled layer of one view. Blocks then weigh the same in a kernel or a cosine, however wide they are.

Shapes: N spots, F features of all blocks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

CLIP = 8.0
"""Largest absolute z-score: a tile unlike all training tiles must not carry an answer away."""
_EPSILON = 1e-6


@dataclass(frozen=True)
class Standardiser:
    """Mean and deviation of features over the training spots."""

    mean: np.ndarray
    """float64 (F,)."""
    deviation: np.ndarray
    """float64 (F,), positive."""
    weight: np.ndarray
    """1 / root of the width of each feature's block, float64 (F,)."""

    def apply(self, features: np.ndarray, clip: bool = True) -> np.ndarray:
        """Returns standardised features, float64 (N, F), of features (N, F).

        Without `clip` it is a linear function of the features.
        """
        scores = (features - self.mean) / self.deviation
        return (scores.clip(-CLIP, CLIP) if clip else scores) * self.weight


def fit_standardiser(sections: Iterable[np.ndarray], widths: Sequence[int]) -> Standardiser:
    """Returns the standardiser of features, fitted section by section.

    Args:
        sections: features of each training section, (n, F).
        widths: number of features in each block; they sum to F.
    """
    num_spots, total, squares = 0, np.zeros(sum(widths)), np.zeros(sum(widths))
    for features in sections:
        values = features.astype(np.float64)
        num_spots += len(values)
        total += values.sum(axis=0)
        squares += (values**2).sum(axis=0)
    mean = total / num_spots
    deviation = np.sqrt(np.maximum(squares / num_spots - mean**2, 0)) + _EPSILON
    return Standardiser(mean, deviation, np.repeat(1 / np.sqrt(widths), widths))
