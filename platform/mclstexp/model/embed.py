"""Tiles to embeddings: the image side of a model, and its run over a tile table.

Sections are yielded one after the other in the given order, so that a caller can write one while the next is computed,
and memory does not grow with the cohort.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import ray
import torch

from mclstexp.data.schema import Manifest
from mclstexp.data.spots import Batch, pad
from mclstexp.errors import ModelError
from mclstexp.model.device import sent
from mclstexp.model.extract import features, wanted
from mclstexp.model.extractor import colours
from mclstexp.model.tile_stream import TILES_AT_ONCE, stream_sentences
from mclstexp.model.towers import ImageTower, feature_width, image_projection, uses_bf16
from mclstexp.model.version import ModelVersion
from mclstexp.progress import Show, hidden
from mclstexp.settings import ModelConfig


@dataclass(frozen=True)
class ImageNetwork:
    """An image encoder with its head as data: it is built where it is used."""

    config: dict[str, object]
    """ModelConfig as a plain dict."""
    tile_size_px: int
    tower: dict[str, torch.Tensor]
    """State dict of ImageTower: workers need no file of weights."""
    head: dict[str, torch.Tensor] | None
    """State dict of the head: the projection or, in direct regression, the map to genes. None: encoder features."""
    precision: str = "auto"
    """As `train.precision`."""

    def build(self, device: torch.device, batch: int | None = None) -> Callable[..., np.ndarray]:
        """Returns the map from tiles to embeddings or features, float32 (n, D).

        It takes one array per view, in the order of `model.image_views`: uint8 (n, size, size, 3), n > 0.

        Args:
            device: the device that computes.
            batch: tiles that go through the network at once (another size may round differently); None: the device's
                default.
        """
        config = ModelConfig.model_validate(self.config)
        tower = ImageTower(config, self.tile_size_px)
        tower.load_state_dict(self.tower)
        num_features = tower.num_features * len(config.image_views)
        head = torch.nn.Identity() if self.head is None else _head(config, num_features, self.head)
        tower = tower.eval().to(device).to(memory_format=torch.channels_last)
        head = head.eval().to(device)
        bf16 = uses_bf16(self.precision, device)
        size = batch or TILES_AT_ONCE[device.type]

        def forward(views: list[np.ndarray]) -> torch.Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
                features = torch.cat([tower(_images(tiles, device)) for tiles in views], dim=1)
                return head(features).float()

        @torch.inference_mode()
        def embed(*views: np.ndarray) -> np.ndarray:
            turned = [fixed_turns(tiles) if config.test_turns else tiles for tiles in views]
            starts = range(0, len(turned[0]), size)
            found = [forward([tiles[start : start + size] for tiles in turned]) for start in starts]
            return torch.cat(found).cpu().numpy()  # a GPU is waited for once

        return embed


@dataclass(frozen=True)
class ImageHead:
    """What a model learnt on top of a frozen encoder, as data: maps stored features to embeddings or predictions."""

    config: dict[str, object]
    """ModelConfig as a plain dict."""
    num_features: int
    """Width F of the features that it takes."""
    head: dict[str, torch.Tensor] | None
    """State dict of the projection or, in direct regression, of the map to genes. None: the features themselves."""
    precision: str
    """As `train.precision`."""

    def build(self, device: torch.device) -> Callable[[np.ndarray], np.ndarray]:
        """Returns the map from features, float32 (n, F), to embeddings or predictions, float32 (n, D)."""
        if self.head is None:
            return lambda features: features
        config = ModelConfig.model_validate(self.config)
        head = _head(config, self.num_features, self.head).eval().to(device)
        bf16 = uses_bf16(self.precision, device)

        @torch.inference_mode()
        def embed(features: np.ndarray) -> np.ndarray:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
                return head(sent(features, device)).float().cpu().numpy()

        return embed


def network_of(model: ModelVersion) -> ImageNetwork:
    """Returns the image side of a model version: its trained encoder, or its frozen one, and its head.

    Raises:
        ModelError: the weights of its frozen encoder cannot be found.
    """
    network = image_network(model.config.model, model.tile_size_px, _head_weights(model), model.config.train.precision)
    if model.encoder is None:
        return network
    return replace(network, tower={f"encoder.{name}": value for name, value in model.encoder.state().items()})


def image_network(
    config: ModelConfig, tile_size_px: int, weights: Mapping[str, torch.Tensor], precision: str
) -> ImageNetwork:
    """Returns the image side of a network from its state dict."""
    tower, head = (_part(weights, prefix) for prefix in ("image_tower.", "image_head."))
    return ImageNetwork(config.model_dump(mode="json"), tile_size_px, tower, head or None, precision)


def head_of(model: ModelVersion) -> ImageHead:
    """Returns what a model version learnt on top of its frozen encoder.

    Raises:
        ModelError: its encoder was trained, so that it belongs to no stored features.
    """
    if model.encoder is None:
        raise ModelError("the model trained its image encoder, so it takes images, not features of a frozen encoder")
    return image_head(model.config.model, model.tile_size_px, _head_weights(model), model.config.train.precision)


def image_head(
    config: ModelConfig, tile_size_px: int, weights: Mapping[str, torch.Tensor], precision: str
) -> ImageHead:
    """Returns what a network learnt on top of a frozen encoder, from its state dict."""
    width = feature_width(config, tile_size_px)
    return ImageHead(config.model_dump(mode="json"), width, _part(weights, "image_head.") or None, precision)


def _head_weights(model: ModelVersion) -> dict[str, torch.Tensor]:
    """Returns the weights on top of an encoder. A program model reads features; its towers are a part of its keys."""
    return {} if model.programs else model.weights


def _part(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _images(tiles: np.ndarray, device: torch.device) -> torch.Tensor:
    """Returns tiles, uint8 (n, size, size, 3), as float (n, 3, size, size) in [0, 1]."""
    images = sent(tiles, device).permute(0, 3, 1, 2).float() / 255
    return images.contiguous(memory_format=torch.channels_last)


def embed_model(
    root: str,
    manifest: Manifest,
    section_ids: Sequence[str],
    model: ModelVersion,
    show: Show = hidden,
    what: str = "embedding: tiles",
) -> Iterator[tuple[str, Batch]]:
    """Yields what `embed_sections` does for a model version, but encodes no tile whose features are stored.

    A frozen encoder's features are read, or made where they are missing.

    Raises:
        ConfigError, ModelError: as `extract.features`.
        ResourceError: as `embed_sections`.
    """
    if model.encoder is None:
        yield from embed_sections(root, manifest, section_ids, network_of(model), show, what)
        return
    asked = replace(wanted(model.config), num_draws=0)
    reader = features(root, manifest, section_ids, model.encoder, asked, show)
    embed = head_of(model).build(torch.device("cpu"))
    for name in section_ids:
        yield name, {"embedding": embed(reader.read_section(name)), "rgb": reader.read_colours(name)}


def embed_sections(
    root: str,
    manifest: Manifest,
    section_ids: Sequence[str],
    network: ImageNetwork,
    show: Show = hidden,
    what: str = "embedding: tiles",
) -> Iterator[tuple[str, Batch]]:
    """Yields (section id, arrays) in the given order; arrays by spot in stored order.

    `embedding`: float32 (N, D). `rgb`: each tile's mean and standard deviation of red, green and blue in [0, 1],
    float32 (N, 6).

    Args:
        root: of the tile table.
        manifest: of the tile table.
        section_ids: the sections to embed.
        network: the network that embeds.
        show: takes progress by spot.
        what: the work's name in the progress.

    Raises:
        ResourceError: the cluster has no CPU left to decode tiles beside the one that embeds.
    """
    total, done = manifest.num_spots(section_ids), 0
    parts: list[Batch] = []
    for name, group, batch in stream_sentences(root, manifest, section_ids, ("image",), _Embed, network):
        parts.append(batch)
        done += len(batch["rgb"])
        show(what, done, total)
        if group + 1 == len(manifest.section(name).row_groups):
            yield name, {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            parts = []


def fixed_turns(tiles: np.ndarray) -> np.ndarray:
    """Returns tiles, uint8 (n, size, size, 3), each in one of eight orientations, chosen by a checksum of its bytes.

    The published code draws an orientation each time it embeds a Visium tile, so its results cannot be repeated. Here
    the choice depends on the tile alone, not on order or batch.
    """
    turned = np.empty_like(tiles)
    for index, tile in enumerate(tiles):
        draw = zlib.crc32(tile.tobytes())
        tile = tile[:, ::-1] if draw & 1 else tile
        tile = tile[::-1] if draw & 2 else tile
        turned[index] = tile.swapaxes(0, 1) if draw & 4 else tile
    return turned


def _head(config: ModelConfig, num_features: int, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    head = image_projection(config, num_features)
    if config.predictor == "regression":
        head = torch.nn.Linear(num_features, len(state["bias"]))
    head.load_state_dict(state)
    return head


class _Embed:
    """Actor: embeds the tiles of one sentence, and takes the mean and deviation of their colours."""

    def __init__(self, network: ray.ObjectRef) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._embed = ray.get(network).build(device)

    def __call__(self, batch: Batch) -> Batch:
        mask = batch["mask"][0]
        tiles = batch["image"][0][mask]
        return pad({"embedding": self._embed(tiles), "rgb": colours(tiles)}, len(mask))
