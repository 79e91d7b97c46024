"""The probe written out in NumPy: singular vectors, and each spot left out by the diagonal of the hat matrix."""

from collections.abc import Sequence

import numpy as np

PENALTIES = [10 ** (1 + step / 3) for step in range(16)]


def plain_probe(
    features: np.ndarray, target: np.ndarray, asked: np.ndarray, widths: Sequence[int] = ()
) -> tuple[float, np.ndarray]:
    """Returns the chosen penalty and the predictions, float64 (M, G), for other features (M, F)."""
    scores, to_scores = components(features, widths)
    penalty = min(PENALTIES, key=lambda each: leave_one_out(scores, target, each))
    weights = _weights(scores, target, penalty)
    return penalty, to_scores(asked) @ weights + target.mean(0, dtype=np.float64)


def components(features: np.ndarray, widths: Sequence[int] = ()):
    """Returns the spots' principal components, (N, at most 256), and the function to those of other features."""
    mean, deviation = features.mean(0, dtype=np.float64), features.astype(np.float64).std(0)
    blocks = np.split(np.arange(features.shape[1]), np.cumsum(widths)[:-1]) if widths else [slice(None)]

    def standardised(values: np.ndarray) -> np.ndarray:
        z = np.clip((values.astype(np.float64) - mean) / (deviation + 1e-6), -8, 8)
        parts = [z[:, block] / np.sqrt(z[:, block].shape[1]) for block in blocks]
        return np.concatenate(parts, axis=1)

    seen = standardised(features)
    centre, root = seen.mean(0), np.sqrt(features.shape[1])
    _, _, axes = np.linalg.svd(seen - centre, full_matrices=False)
    axes = axes[: min(256, len(features) - 1)].T
    return (seen - centre) @ axes * root, lambda values: (standardised(values) - centre) @ axes * root


def leave_one_out(scores: np.ndarray, target: np.ndarray, penalty: float) -> float:
    """Returns the mean squared error over all genes, each spot predicted from all others."""
    n = len(scores)
    hat = scores @ np.linalg.solve(scores.T @ scores + penalty * np.eye(scores.shape[1]), scores.T) + 1 / n
    residuals = target - hat @ target.astype(np.float64)
    return float(((residuals / (1 - np.diag(hat))[:, None]) ** 2).mean())


def _weights(scores: np.ndarray, target: np.ndarray, penalty: float) -> np.ndarray:
    centred = target - target.mean(0, dtype=np.float64)
    return np.linalg.solve(scores.T @ scores + penalty * np.eye(scores.shape[1]), scores.T @ centred)
