"""The embeddings of trained towers as part of what is searched for, and of what is searched.

A tile finds spots by the features of its own image and by the towers' space at once: its query, and the keys of the
bank, are both parts at unit length, weighted so that their cosine is

    (1 - share) cosine of features + share cosine of towers

One search answers for both. The bank's towers part is the spot tower's embedding, a tile's is the image tower's.

Shapes: n tiles, N spots, F features, D width of feature keys, E width of the towers' space.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

_EPSILON = 1e-12


@dataclass(frozen=True)
class TowerKeys:
    """The image side of trained towers, and its weight."""

    share: float
    """Of the towers in the similarity, above 0, at most 1."""
    head: nn.Module
    """Maps features (n, F) to unit embeddings (n, E); on the CPU, in evaluation mode."""

    def queries(self, features: np.ndarray, feature_keys: np.ndarray) -> np.ndarray:
        """Returns what tiles are searched by, float32 (n, D + E)."""
        return join_keys(feature_keys, image_embeddings(self.head, features), self.share)


@torch.inference_mode()
def image_embeddings(head: nn.Module, features: np.ndarray) -> np.ndarray:
    """Returns the embeddings of features (n, F), float32 (n, E)."""
    return head(torch.from_numpy(np.ascontiguousarray(features, np.float32))).float().numpy()


def join_keys(feature_keys: np.ndarray, embeddings: np.ndarray, share: float) -> np.ndarray:
    """Returns feature keys (n, D) and embeddings (n, E) as one, with the towers' share, float32 (n, D + E)."""
    parts = ((1 - share, feature_keys), (share, embeddings))
    return np.concatenate([np.sqrt(weight) * _unit(values) for weight, values in parts], axis=1, dtype=np.float32)


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), _EPSILON)
