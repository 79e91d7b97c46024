"""The two towers of mclSTExp together: image patches and spots in one space.

Shapes: N images, S sentences, L spots of a sentence, G genes, D embedding.
"""

import math

import torch
from torch import nn

from mclstexp.model.encoders import build_image_encoder
from mclstexp.model.heads import ProjectionHead
from mclstexp.model.spot import SpotTower
from mclstexp.settings import ModelConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NOTHING = (0.0,) * 3
_SCALINGS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "unit": (_NOTHING, (1.0,) * 3),
    "bgr255": (_NOTHING, (1 / 255,) * 3),
}


class ImageTower(nn.Module):
    """Image encoder with the input scaling that it expects; `freeze_encoder` and `batch_norm` are kept here."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: ModelConfig, tile_size_px: int) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.num_features = build_image_encoder(config.image_encoder, config.image_weights, tile_size_px)
        self.encoder.requires_grad_(not config.freeze_encoder)
        if config.batch_norm == "sync" and not config.freeze_encoder:
            self.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(self.encoder)
        mean, std = _SCALINGS[config.input_scaling]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features (N, F) of RGB images in [0, 1], float (N, 3, size, size)."""
        if self.config.input_scaling == "bgr255":
            images = images.flip(1)
        return self.encoder((images - self.mean) / self.std)

    def train(self, mode: bool = True) -> "ImageTower":
        """Sets training mode; a frozen encoder stays in evaluation, frozen batch-norm keeps its running statistics."""
        super().train(mode)
        if self.config.freeze_encoder:
            self.encoder.eval()
        elif self.config.batch_norm == "frozen":
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


class TwoTowers(nn.Module):
    """Embeds images and spots into one space of `embedding_dim` channels."""

    def __init__(self, config: ModelConfig, num_genes: int, num_positions: int, tile_size_px: int) -> None:
        super().__init__()
        self.config = config
        self.image_tower = ImageTower(config, tile_size_px)
        self.spot_tower = SpotTower(config, num_genes, num_positions)
        self.image_head = ProjectionHead(self.image_tower.num_features, config.embedding_dim, config.l2_normalise)
        self.spot_head = ProjectionHead(self.spot_tower.width, config.embedding_dim, config.l2_normalise)
        start = torch.tensor(math.log(1 / config.temperature))
        self.log_scale = nn.Parameter(start, requires_grad=config.learn_temperature)
        self.train()

    @property
    def logit_scale(self) -> torch.Tensor:
        """1 / temperature, scalar."""
        return self.log_scale.exp()

    @torch.no_grad()
    def bound_logit_scale(self) -> None:
        """Brings a learnt scale back to `max_logit_scale`; call after each step (CLIP, 2021, arXiv 2103.00020)."""
        if self.config.learn_temperature:
            self.log_scale.clamp_(max=math.log(self.config.max_logit_scale))

    def forward(
        self, images: torch.Tensor, expression_SLG: torch.Tensor, position_SL2: torch.Tensor, mask_SL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns image embeddings (N, D) and spot embeddings (S, L, D)."""
        return self.embed_images(images), self.embed_spots(expression_SLG, position_SL2, mask_SL)

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Returns embeddings (N, D) of images in [0, 1], float (N, 3, size, size)."""
        return self.image_head(self.image_tower(images))

    def embed_spots(
        self, expression_SLG: torch.Tensor, position_SL2: torch.Tensor, mask_SL: torch.Tensor
    ) -> torch.Tensor:
        """Returns embeddings (S, L, D) of normalised expression at positions (um, or column and row of the tables)."""
        return self.spot_head(self.spot_tower(expression_SLG, position_SL2, mask_SL))
