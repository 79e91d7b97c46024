"""The projection head that ends each tower."""

import torch
import torch.nn.functional as F
from torch import nn


class ProjectionHead(nn.Module):
    """Maps a tower's features (..., in_features) to the common space (..., embedding_dim).

    p = W1 h + b1; v = LayerNorm(p + W2 GELU(p) + b2), as in mclSTExp (2024, https://arxiv.org/abs/2407.08216);
    with `l2_normalise` v has unit length.
    """

    def __init__(self, in_features: int, embedding_dim: int, l2_normalise: bool) -> None:
        super().__init__()
        self.project = nn.Linear(in_features, embedding_dim)
        self.refine = nn.Linear(embedding_dim, embedding_dim)
        self.norm = nn.LayerNorm(embedding_dim)
        self.l2_normalise = l2_normalise

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns embeddings, float32 (..., embedding_dim), also under bf16 autocast."""
        projected = self.project(features)
        embedding = self.norm((projected + self.refine(F.gelu(projected))).float()).float()
        return F.normalize(embedding, dim=-1) if self.l2_normalise else embedding
