"""The network: image tower, spot tower and heads, joined to two towers or to a direct regression.

Every part follows `ModelConfig` alone, so that a model version rebuilds its network from its settings and a state dict.

Shapes: N images, F features of the image encoder, S sentences, L spots of a sentence, G genes, W width of the spot
tower, H heads of C channels, D embedding.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from mclstexp.model.encoders import build_encoder, layer_widths, preset_of, transform_of
from mclstexp.model.presets import IMAGENET_MEAN, IMAGENET_STD, Transform, Triple
from mclstexp.model.standardise import CLIP
from mclstexp.settings import ModelConfig

_ZERO, _ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
_SCALINGS: dict[str, tuple[Triple, Triple]] = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "unit": (_ZERO, _ONE),
    "bgr255": (_ZERO, (1 / 255, 1 / 255, 1 / 255)),
}
"""Mean and deviation that pixels in [0, 1] are normalised by, for each `model.input_scaling`."""
_FIRST_DECAYS = (-1.0, 2.0)
"""Of the first and the last head, before softplus: attention that reaches about two pitches, and less than one."""
SHORTEST_UM, LONGEST_UM = 200.0, 20_000.0
"""Wavelengths of the sinusoidal position: twice Visium's pitch (shorter ones alias) and the size of a section."""


class ImageTower(nn.Module):
    """An image encoder behind the transform that it expects; applies `batch_norm`. Its weights are random at first."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: ModelConfig, tile_size_px: int) -> None:
        super().__init__()
        self.config, self.transform = config, transform_of(config.image_encoder, tile_size_px)
        self.encoder = build_encoder(config.image_encoder, tile_size_px, config.image_layers)
        self.num_features = self.encoder.num_features
        if config.batch_norm == "sync" and not config.freeze_encoder:
            self.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(self.encoder)
        mean, std = input_scaling(config)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features (N, F) of RGB images in [0, 1], float (N, 3, size, size)."""
        images = _sized(images, self.transform)
        if self.config.input_scaling == "bgr255":
            images = images.flip(1)
        return self.encoder((images - self.mean) / self.std)

    def train(self, mode: bool = True) -> "ImageTower":
        """Sets training mode, except that frozen batch norms stay in evaluation mode."""
        super().train(mode)
        if self.config.batch_norm == "frozen":
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def input_scaling(config: ModelConfig) -> tuple[Triple, Triple]:
    """Returns the mean and deviation that pixels in [0, 1] are normalised by."""
    if config.input_scaling is not None:
        return _SCALINGS[config.input_scaling]
    transform = preset_of(config.image_encoder).transform
    return transform.mean, transform.std


def _sized(images: torch.Tensor, transform: Transform) -> torch.Tensor:
    """Returns images of the edge that an encoder takes: resized with antialiasing, then cut to their centre."""
    edge = transform.resize_px
    if edge is not None and images.shape[-1] != edge:
        images = F.interpolate(images, (edge, edge), mode="bicubic", antialias=True).clamp(0, 1)
    if transform.crop_px is not None:
        margin = (images.shape[-1] - transform.crop_px) // 2
        images = images[..., margin : margin + transform.crop_px, margin : margin + transform.crop_px]
    return images


class FeatureTower(nn.Module):
    """Stands for a frozen encoder, whose features are computed once and stored: passes them on."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns the features (N, F)."""
        return features

    def compile(self, *_: object, **__: object) -> None:
        """Does nothing: there is nothing to compile."""


def feature_width(config: ModelConfig, tile_size_px: int) -> int:
    """Returns the number of features F of a spot: of all views and layers that the settings join.

    Raises:
        ConfigError: the encoder or a layer is unknown.
    """
    _, widths = layer_widths(config.image_encoder, tile_size_px, config.image_layers)
    return len(config.image_views) * sum(widths)


def _image_tower(config: ModelConfig, tile_size_px: int) -> ImageTower | FeatureTower:
    if config.freeze_encoder:
        return FeatureTower(feature_width(config, tile_size_px))
    return ImageTower(config, tile_size_px)


class LeadingDirections(nn.Module):
    """Frozen features as their leading directions: standardised as for programs, and of mean variance 1.

    What it does is fitted to the training sections before the first step, and not learnt.
    """

    mean: torch.Tensor
    factor: torch.Tensor
    directions: torch.Tensor

    def __init__(self, num_features: int, num_directions: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("factor", torch.ones(num_features))
        self.register_buffer("directions", torch.zeros(num_features, num_directions))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns (n, K), float32 also under bf16 autocast, of features (n, F)."""
        with torch.autocast(features.device.type, enabled=False):
            scores = ((features.float() - self.mean) * self.factor).clamp(-CLIP, CLIP)
            return scores @ self.directions


class SpotTower(nn.Module):
    """A transformer over the spots of a sentence: expression and position to features.

    With `spot_width` empty it is the published tower (u = e + X[x] + Y[y], width G, no input map); otherwise
    expression is first mapped to `spot_width`. Pre-norm blocks, no final norm (Vaswani et al. 2017,
    https://arxiv.org/abs/1706.03762; mclSTExp 2024, https://arxiv.org/abs/2407.08216). With `model.position=distance`
    spots have no position of their own; attention falls with their distance.
    """

    pitch_um: torch.Tensor

    def __init__(self, config: ModelConfig, num_genes: int, num_positions: int) -> None:
        super().__init__()
        self.width = config.spot_width or num_genes
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.sees_distance = config.position == "distance"
        if self.sees_distance:
            self.register_buffer("pitch_um", torch.ones(()))
        self.embed = nn.Linear(num_genes, self.width) if config.spot_width else nn.Identity()
        self.position = _position(config.position, self.width, num_positions)
        self.blocks = nn.ModuleList(Block(config, self.width) for _ in range(config.spot_layers))

    def forward(self, expression_SLG: torch.Tensor, position_SL2: torch.Tensor, mask_SL: torch.Tensor) -> torch.Tensor:
        """Returns features (S, L, W); a masked slot influences no other slot."""
        features = self.embed(self.input_dropout(expression_SLG))
        if self.position is not None:
            features = features + self.position(position_SL2)
        distance_SLL = _distances(position_SL2, self.pitch_um) if self.sees_distance else None
        for block in self.blocks:
            features = block(features, mask_SL, distance_SLL)
        return features


def _distances(position_SL2: torch.Tensor, pitch_um: torch.Tensor) -> torch.Tensor:
    """Returns the distances between a sentence's spots in pitches of the training spots, float32 (S, L, L)."""
    difference = position_SL2[:, :, None].float() - position_SL2[:, None].float()
    return difference.norm(dim=-1) / pitch_um


class Block(nn.Module):
    """z <- z + Attention(LN(z)); z <- z + FFN(LN(z))."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        hidden = max(1, round(width * config.spot_ffn_ratio))
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, config.spot_heads, config.spot_head_dim, config.position == "distance")
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(config.spot_dropout)

    def forward(
        self, features_SLW: torch.Tensor, mask_SL: torch.Tensor, distance_SLL: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns features (S, L, W)."""
        attended = self.attention(self.attention_norm(features_SLW), mask_SL, distance_SLL)
        features = features_SLW + self.dropout(attended)
        return features + self.dropout(self.ffn(self.ffn_norm(features)))


class Attention(nn.Module):
    """Multi-head attention within a sentence: bias-free map to 3HC, scores over sqrt(C), output map with bias.

    With `by_distance` each head subtracts its own learnt factor times the squared distance from its scores.
    """

    def __init__(self, width: int, num_heads: int, head_dim: int, by_distance: bool = False) -> None:
        super().__init__()
        if by_distance:
            self.decay = nn.Parameter(torch.linspace(*_FIRST_DECAYS, num_heads))
        self.num_heads, self.head_dim = num_heads, head_dim
        self.qkv = nn.Linear(width, 3 * num_heads * head_dim, bias=False)
        self.out = nn.Linear(num_heads * head_dim, width)

    def forward(
        self, features_SLW: torch.Tensor, mask_SL: torch.Tensor, distance_SLL: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns features (S, L, W); an empty sentence attends to all its slots, which avoids NaN."""
        sentences, length, _ = features_SLW.shape
        qkv = self.qkv(features_SLW).view(sentences, length, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        allowed = mask_SL | ~mask_SL.any(dim=1, keepdim=True)
        mask = allowed[:, None, None, :]
        if distance_SLL is not None:
            penalty = F.softplus(self.decay)[:, None, None] * distance_SLL[:, None] ** 2
            mask = (-penalty).masked_fill(~mask, -torch.inf).to(query.dtype)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(attended.transpose(1, 2).flatten(2))


def _position(kind: str, width: int, num_positions: int) -> nn.Module | None:
    if kind in ("table", "pixel_table"):
        return PositionTables(width, num_positions)
    return Sinusoid(width) if kind == "sinusoidal" else None


class PositionTables(nn.Module):
    """Learnt vectors for array column and row (in pixels for published Visium), X[x] + Y[y], from a unit normal.

    Sized to the data's largest coordinate + 1, not to the published 65,536: a row that is never read has no effect.
    """

    def __init__(self, width: int, num_positions: int) -> None:
        super().__init__()
        self.x = nn.Embedding(num_positions, width)
        self.y = nn.Embedding(num_positions, width)

    def forward(self, position_SL2: torch.Tensor) -> torch.Tensor:
        """Returns (S, L, W) for whole (column, row)."""
        column_row = position_SL2.long()
        return self.x(column_row[..., 0]) + self.y(column_row[..., 1])


class Sinusoid(nn.Module):
    """Sines and cosines of the distance from the sentence's centre (um) at geometric wavelengths, then a linear map.

    Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762) in two dimensions. Wavelengths run from `SHORTEST_UM` to
    `LONGEST_UM`, so that neighbours differ and positions within a neighbourhood are unambiguous.
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


class ProjectionHead(nn.Module):
    """Maps a tower's features (..., in_features) to the common space (..., embedding_dim).

    p = W1 h + b1; v = LayerNorm(p + W2 GELU(p) + b2), as in mclSTExp (2024, https://arxiv.org/abs/2407.08216).
    With `l2_normalise`, v has unit length.
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


def image_projection(config: ModelConfig, num_features: int) -> nn.Module:
    """Returns the map from an image's features (N, num_features) to the common space, in training mode."""
    if config.image_directions is None:
        return ProjectionHead(num_features, config.embedding_dim, config.l2_normalise)
    return nn.Sequential(
        LeadingDirections(num_features, config.image_directions),
        nn.Dropout(config.input_dropout),
        ProjectionHead(config.image_directions, config.embedding_dim, config.l2_normalise),
    )


class TwoTowers(nn.Module):
    """Embeds images and spots into one space of `embedding_dim` channels."""

    def __init__(self, config: ModelConfig, num_genes: int, num_positions: int, tile_size_px: int) -> None:
        super().__init__()
        self.config = config
        self.image_tower = _image_tower(config, tile_size_px)
        self.spot_tower = SpotTower(config, num_genes, num_positions)
        self.image_head = image_projection(config, self.image_tower.num_features)
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
        """Caps a learnt scale at `max_logit_scale`; call after each step (CLIP 2021, https://arxiv.org/abs/2103.00020)."""
        if self.config.learn_temperature:
            self.log_scale.clamp_(max=math.log(self.config.max_logit_scale))

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Returns embeddings (N, D) of images in [0, 1], float (N, 3, size, size), or of stored features (N, F)."""
        return self.image_head(self.image_tower(images))

    def embed_spots(
        self, expression_SLG: torch.Tensor, position_SL2: torch.Tensor, mask_SL: torch.Tensor
    ) -> torch.Tensor:
        """Returns embeddings (S, L, D) of normalised expression at positions (um, or column and row of the tables)."""
        return self.spot_head(self.spot_tower(expression_SLG, position_SL2, mask_SL))


class DirectRegression(nn.Module):
    """An image tower and one linear map to all genes: ST-Net (He et al. 2020, https://doi.org/10.1038/s41551-020-0578-x).

    It has the scale of the two towers in name only: direct regression compares no similarities.
    """

    def __init__(self, config: ModelConfig, num_genes: int, tile_size_px: int) -> None:
        super().__init__()
        self.image_tower = _image_tower(config, tile_size_px)
        self.image_head = nn.Linear(self.image_tower.num_features, num_genes)
        self.train()

    @property
    def logit_scale(self) -> torch.Tensor:
        """1, scalar."""
        return self.image_head.bias.new_ones(())

    def bound_logit_scale(self) -> None:
        """Does nothing: this scale is not learnt."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns predicted expression (N, G) of images in [0, 1], float (N, 3, size, size), or of features (N, F)."""
        return self.image_head(self.image_tower(images))


Network = TwoTowers | DirectRegression


def build_network(config: ModelConfig, num_genes: int, num_positions: int, tile_size_px: int) -> Network:
    """Returns the two towers, or with `model.predictor=regression` the direct regression, in training mode.

    All weights are random. With `model.freeze_encoder` the network takes stored features instead of images.

    Raises:
        ConfigError: the image encoder or a layer is unknown.
    """
    if config.predictor == "regression":
        return DirectRegression(config, num_genes, tile_size_px)
    return TwoTowers(config, num_genes, num_positions, tile_size_px)


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Returns whether `train.precision` means bf16 on this device."""
    return precision == "bf16" or (precision == "auto" and native_bf16(device))


def native_bf16(device: torch.device) -> bool:
    """Returns whether the device computes bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def plain_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns copies that safetensors can store: on the CPU, contiguous, sharing no memory."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
