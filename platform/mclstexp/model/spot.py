"""The spot tower: a Transformer over the spots of a sentence.

Shapes: S sentences, L spots of a sentence, G genes, W tower width, H heads, C channels of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from mclstexp.settings import ModelConfig

SHORTEST_UM, LONGEST_UM = 200.0, 20_000.0


class SpotTower(nn.Module):
    """Embeds each spot of a sentence in the light of the others.

    With `spot_width` empty it is the published tower (u = e + X[x] + Y[y], width G, no input map); else
    expression is first mapped to `spot_width`. Pre-norm blocks, no final norm (Vaswani et al. 2017,
    https://arxiv.org/abs/1706.03762; mclSTExp 2024, https://arxiv.org/abs/2407.08216).
    """

    def __init__(self, config: ModelConfig, num_genes: int, num_positions: int) -> None:
        super().__init__()
        self.width = config.spot_width or num_genes
        self.embed = nn.Linear(num_genes, self.width) if config.spot_width else nn.Identity()
        self.position = _position(config.position, self.width, num_positions)
        self.blocks = nn.ModuleList(Block(config, self.width) for _ in range(config.spot_layers))

    def forward(self, expression_SLG: torch.Tensor, position_SL2: torch.Tensor, mask_SL: torch.Tensor) -> torch.Tensor:
        """Returns features (S, L, W); what stands in masked slots influences no other slot."""
        features = self.embed(expression_SLG)
        if self.position is not None:
            features = features + self.position(position_SL2)
        for block in self.blocks:
            features = block(features, mask_SL)
        return features


class Block(nn.Module):
    """z <- z + Attention(LN(z)); z <- z + FFN(LN(z))."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        hidden = max(1, round(width * config.spot_ffn_ratio))
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, config.spot_heads, config.spot_head_dim)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(config.spot_dropout)

    def forward(self, features_SLW: torch.Tensor, mask_SL: torch.Tensor) -> torch.Tensor:
        """Returns features (S, L, W)."""
        features = features_SLW + self.dropout(self.attention(self.attention_norm(features_SLW), mask_SL))
        return features + self.dropout(self.ffn(self.ffn_norm(features)))


class Attention(nn.Module):
    """Multi-head attention within a sentence: bias-free map to 3HC, scores over sqrt(C), output map with bias."""

    def __init__(self, width: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.qkv = nn.Linear(width, 3 * num_heads * head_dim, bias=False)
        self.out = nn.Linear(num_heads * head_dim, width)

    def forward(self, features_SLW: torch.Tensor, mask_SL: torch.Tensor) -> torch.Tensor:
        """Returns features (S, L, W); an empty sentence attends to itself, so that nothing becomes NaN."""
        sentences, length, _ = features_SLW.shape
        qkv = self.qkv(features_SLW).view(sentences, length, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        allowed = mask_SL | ~mask_SL.any(dim=1, keepdim=True)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed[:, None, None, :])
        return self.out(attended.transpose(1, 2).flatten(2))


class PositionTables(nn.Module):
    """Learnt rows for array (Visium, as published: pixel) column and row, X[x] + Y[y], unit-normal at the start.

    Sized to the data's largest coordinate + 1 instead of the published 65,536: an unread row changes nothing.
    """

    def __init__(self, width: int, num_positions: int) -> None:
        super().__init__()
        self.x = nn.Embedding(num_positions, width)
        self.y = nn.Embedding(num_positions, width)

    def forward(self, position_SL2: torch.Tensor) -> torch.Tensor:
        """Returns (S, L, W) for whole (column, row)."""
        place = position_SL2.long()
        return self.x(place[..., 0]) + self.y(place[..., 1])


class Sinusoid(nn.Module):
    """Sines and cosines of micrometres from the sentence's centre at geometric wavelengths, then a linear map.

    Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762) in two dimensions; wavelengths run from twice Visium's
    pitch of 100 um (shorter ones alias) to a section's size (20 mm), so that neighbours differ and a whole
    neighbourhood is unambiguous.
    """

    frequencies: torch.Tensor

    def __init__(self, width: int, num_wavelengths: int = 16) -> None:
        super().__init__()
        wavelengths = torch.logspace(math.log10(SHORTEST_UM), math.log10(LONGEST_UM), num_wavelengths)
        self.register_buffer("frequencies", 2 * math.pi / wavelengths, persistent=False)
        self.project = nn.Linear(4 * num_wavelengths, width)

    def forward(self, position_SL2: torch.Tensor) -> torch.Tensor:
        """Returns (S, L, W) for micrometres (x, y)."""
        phase = (position_SL2[..., None] * self.frequencies).flatten(2)
        return self.project(torch.cat([phase.sin(), phase.cos()], dim=-1))


def _position(kind: str, width: int, num_positions: int) -> nn.Module | None:
    if kind in ("table", "pixel_table"):
        return PositionTables(width, num_positions)
    return Sinusoid(width) if kind == "sinusoidal" else None
