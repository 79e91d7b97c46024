"""Tiles to embeddings: the image side of a model, and its run over a tile table.

CPU tasks decode, a pool of actors embeds. Sections are yielded one after the other in the given order, so that a
caller can write one while the next is computed, and memory does not grow with the cohort. Ray Data does not see other
work on the cluster and starts all actors of a pool at once, so runs that embed side by side each need a share of the
cluster (`cluster.share_of_run`).
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import ray
import safetensors.torch
import torch
from ray.data import ActorPoolStrategy, DataContext

from mclstexp.cluster import MAX_RETRIES, ordered
from mclstexp.data.schema import Manifest
from mclstexp.data.spots import Batch, TileLoader, pad
from mclstexp.errors import ResourceError
from mclstexp.model.towers import ImageTower, ProjectionHead, plain_tensors, uses_bf16
from mclstexp.model.version import ModelVersion
from mclstexp.progress import Show, hidden
from mclstexp.settings import ModelConfig

_IMAGE_SETTINGS = ("image_encoder", "input_scaling", "test_turns", "predictor", "embedding_dim", "l2_normalise")
_TILES_AT_ONCE = {"cpu": 16, "cuda": 64}  # larger batches are slower on a CPU (docs/scaling.md)
_MIN_TILES_PER_ACTOR = 256  # below this, starting another actor (importing torch) costs more than it saves


@dataclass(frozen=True)
class ImageNetwork:
    """An image tower, with or without its head, as data: it is built where it is used."""

    config: dict[str, object]
    """ModelConfig as a plain dict."""
    tile_size_px: int
    tower: dict[str, torch.Tensor]
    """State dict of ImageTower: workers need no file of weights."""
    head: dict[str, torch.Tensor] | None
    """State dict of the head: the projection or, in direct regression, the map to genes. None: encoder features."""
    precision: str = "auto"
    """As `train.precision`."""

    def digest(self) -> str:
        """Returns 16 hex digits that name everything the answers depend on."""
        settings = [self.config[name] for name in _IMAGE_SETTINGS]
        digest = hashlib.sha256(json.dumps([settings, self.tile_size_px, self.precision]).encode())
        for part in (self.tower, self.head or {}):
            digest.update(safetensors.torch.save({name: value.contiguous() for name, value in part.items()}))
        return digest.hexdigest()[:16]

    def build(self, device: torch.device, batch: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
        """Returns the map from tiles, uint8 (n, size, size, 3), n > 0, to embeddings or features, float32 (n, D).

        Args:
            device: the device that computes.
            batch: tiles that go through the network at once (another size may round differently); None: the device's
                default.
        """
        config = ModelConfig.model_validate(self.config | {"image_weights": "random"})
        tower = ImageTower(config, self.tile_size_px)
        tower.load_state_dict(self.tower)
        network = torch.nn.Sequential(tower)
        if self.head is not None:
            network.append(_head(config, tower.num_features, self.head))
        network = network.eval().to(device).to(memory_format=torch.channels_last)
        bf16 = uses_bf16(self.precision, device)
        size = batch or _TILES_AT_ONCE[device.type]

        def forward(tiles: np.ndarray) -> np.ndarray:
            images = torch.from_numpy(tiles).to(device).permute(0, 3, 1, 2).float() / 255
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                return network(images.contiguous(memory_format=torch.channels_last)).float().cpu().numpy()

        @torch.inference_mode()
        def embed(tiles: np.ndarray) -> np.ndarray:
            tiles = fixed_turns(tiles) if config.test_turns else tiles
            return np.concatenate([forward(tiles[start : start + size]) for start in range(0, len(tiles), size)])

        return embed


def network_of(model: ModelVersion) -> ImageNetwork:
    """Returns the image side of a model version."""
    return image_network(model.config.model, model.tile_size_px, model.weights, model.config.train.precision)


def image_network(
    config: ModelConfig, tile_size_px: int, weights: Mapping[str, torch.Tensor], precision: str
) -> ImageNetwork:
    """Returns the image side of a network from its state dict."""
    tower, head = (
        {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        for prefix in ("image_tower.", "image_head.")
    )
    return ImageNetwork(config.model_dump(mode="json"), tile_size_px, tower, head, precision)


def encoder_network(model: ModelVersion, image_weights: str, seed: int) -> ImageNetwork:
    """Returns a model version's image encoder with other weights (as `model.image_weights`) and no head.

    Raises:
        ConfigError, ModelError: the weights cannot be loaded here, on the driver, or do not fit.
    """
    torch.manual_seed(seed)
    config = model.config.model.model_copy(update={"image_weights": image_weights})
    tower = plain_tensors(ImageTower(config, model.tile_size_px).state_dict())
    return ImageNetwork(config.model_dump(mode="json"), model.tile_size_px, tower, None, model.config.train.precision)


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
    sentences, total, done = manifest.sentences(section_ids), manifest.num_spots(section_ids), 0
    parts: list[Batch] = []
    for (name, group), batch in zip(sentences, _pipeline(root, manifest, sentences, network), strict=True):
        mask = batch.pop("mask")[0]
        parts.append({key: values[0][mask] for key, values in batch.items()})
        done += int(mask.sum())
        show(what, done, total)
        if group + 1 == len(manifest.section(name).row_groups):
            yield name, {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            parts = []


def num_embedders(num_cpus: int, num_gpus: int) -> int:
    """Number of actors that embed on so many CPUs and GPUs: one per GPU or, without GPUs, one per two CPUs.

    Raises:
        ResourceError: no CPU is left for reading; tasks that read would wait forever while actors occupy every CPU.
    """
    needed = 1 if num_gpus else 2
    if num_cpus < needed:
        raise ResourceError(
            f"embedding needs {needed} CPU(s), the cluster has {num_cpus}; raise cluster.local_cpus on one machine, or "
            "add a node"
        )
    return num_gpus or num_cpus // 2


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
    head: torch.nn.Module = ProjectionHead(num_features, config.embedding_dim, config.l2_normalise)
    if config.predictor == "regression":
        head = torch.nn.Linear(num_features, len(state["bias"]))
    head.load_state_dict(state)
    return head


def _allowed() -> tuple[int, int]:
    """Returns the CPUs and GPUs that datasets made here may use: the cluster's, within the limits of `ordered`."""
    cluster, limits = ray.cluster_resources(), DataContext.get_current().execution_options.resource_limits
    return int(min(cluster.get("CPU", 0), limits.cpu)), int(min(cluster.get("GPU", 0), limits.gpu))


def _pipeline(
    root: str, manifest: Manifest, sentences: list[tuple[str, int]], network: ImageNetwork
) -> Iterator[Batch]:
    """Yields one padded batch (embedding, rgb, mask) per sentence, in order."""
    num_cpus, num_gpus = _allowed()
    num_tiles = sum(manifest.section(name).row_groups[group].num_rows for name, group in sentences)
    actors = min(num_embedders(num_cpus, num_gpus), 1 + num_tiles // _MIN_TILES_PER_ACTOR)
    rows = [{"section_id": name, "group": group} for name, group in sentences]
    with ordered():
        dataset = (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .map_batches(
                cast(Any, TileLoader(root, manifest, ("image",))), batch_size=1, num_cpus=1, max_retries=MAX_RETRIES
            )
            .map_batches(
                _Embed,
                fn_constructor_args=(ray.put(network),),
                batch_size=1,
                compute=ActorPoolStrategy(size=min(actors, len(rows))),
                num_gpus=1 if num_gpus else None,
                num_cpus=None if num_gpus else 1,
                max_restarts=MAX_RETRIES,
                max_task_retries=MAX_RETRIES,
            )
        )
    yield from cast(Iterable[Batch], dataset.iter_batches(batch_size=1, batch_format="numpy"))


class _Embed:
    """Actor: embeds the tiles of one sentence, and takes the mean and deviation of their colours."""

    def __init__(self, network: ray.ObjectRef) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._embed = ray.get(network).build(device)

    def __call__(self, batch: Batch) -> Batch:
        mask = batch["mask"][0]
        tiles = batch["image"][0][mask]
        pixels = tiles.reshape(len(tiles), -1, 3) / np.float32(255)
        rgb = np.concatenate([pixels.mean(axis=1), pixels.std(axis=1)], axis=1)
        return pad({"embedding": self._embed(tiles), "rgb": rgb.astype(np.float32)}, len(mask))
