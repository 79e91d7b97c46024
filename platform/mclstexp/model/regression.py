"""Direct regression from tiles to expression: the baseline without retrieval.

Shapes: N images, G genes.
"""

import torch
from torch import nn

from mclstexp.model.towers import ImageTower
from mclstexp.settings import ModelConfig


class DirectRegression(nn.Module):
    """An image tower and one linear map to all genes, as ST-Net (He et al. 2020, doi 10.1038/s41551-020-0578-x)."""

    def __init__(self, config: ModelConfig, num_genes: int, tile_size_px: int) -> None:
        super().__init__()
        self.image_tower = ImageTower(config, tile_size_px)
        self.image_head = nn.Linear(self.image_tower.num_features, num_genes)
        self.train()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns predicted expression (N, G) of images in [0, 1], float (N, 3, size, size)."""
        return self.image_head(self.image_tower(images))
