"""Image encoders by name: each maps float images (N, 3, size, size) to pooled features (N, F).

Weights are random, ImageNet's from torchvision, or a local file, so that nothing needs a download to run. Files
are read without executing pickled code. torchvision and timm are imported where they are used: each takes every process
two seconds or more.
"""

import difflib
import http.client
import tempfile
import urllib.error
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from mclstexp import storage
from mclstexp.errors import ConfigError, ModelError
from mclstexp.settings import TIMM

DOWNLOAD_TIMEOUT_S = 20
_NAMED_IN_ERROR = 3


class DenseNet121(nn.Module):
    """DenseNet-121 up to its last batch-norm, without the final ReLU, globally average-pooled: F = 1024.

    Huang et al. 2017 (https://arxiv.org/abs/1608.06993); the missing ReLU is mclSTExp's.
    """

    num_features = 1024

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import densenet121

        self.features = densenet121().features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features (N, 1024)."""
        return F.adaptive_avg_pool2d(self.features(images), 1).flatten(1)


class SmallCNN(nn.Module):
    """Four strided convolutions, for tests and smoke runs: F = 128."""

    num_features = 128

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, self.num_features)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features (N, 128)."""
        return F.adaptive_avg_pool2d(self.features(images), 1).flatten(1)


def _resnet(name: str) -> nn.Module:
    import torchvision

    network = getattr(torchvision.models, name)()
    network.num_features = network.fc.in_features
    network.fc = nn.Identity()
    return network


def _vit(tile_size_px: int) -> nn.Module:
    if tile_size_px % 16:
        nearest = max(16, 16 * round(tile_size_px / 16))
        raise ConfigError(f"model.image_encoder=vit_b_16 needs tiles.size_px in steps of 16; use {nearest}")
    import torchvision

    network = torchvision.models.vit_b_16(image_size=tile_size_px)
    network.num_features = network.hidden_dim
    network.heads = nn.Identity()
    return network


_BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    "densenet121": lambda size: DenseNet121(),
    "resnet18": lambda size: _resnet("resnet18"),
    "resnet50": lambda size: _resnet("resnet50"),
    "vit_b_16": _vit,
    "small_cnn": lambda size: SmallCNN(),
}
_IMAGENET = {
    "densenet121": "DenseNet121_Weights.IMAGENET1K_V1",
    "resnet18": "ResNet18_Weights.IMAGENET1K_V1",
    "resnet50": "ResNet50_Weights.IMAGENET1K_V2",
    "vit_b_16": "ViT_B_16_Weights.IMAGENET1K_V1",
}
"""torchvision's name of each encoder's weights."""


def build_image_encoder(name: str, weights: str, tile_size_px: int) -> tuple[nn.Module, int]:
    """Returns an encoder and its number of features F.

    Args:
        name: as `model.image_encoder`.
        weights: `random` (the caller seeds torch), `imagenet`, or a .pth or .safetensors file (local or s3://)
            with the state dict of torchvision's model, of its `features`, or of this module.
        tile_size_px: edge of the tiles; matters to vit_b_16 only.

    Raises:
        ConfigError: timm has no such model, there are no such weights, or tiles have a size that it cannot take.
        ModelError: the weights cannot be had, or belong to another architecture.
    """
    encoder = _timm(name, tile_size_px) if name.startswith(TIMM) else _BUILDERS[name](tile_size_px)
    if weights == "imagenet":
        _load(encoder, _imagenet_state(name), "imagenet")
    elif weights != "random":
        _load(encoder, _read_state(weights), weights)
    width = getattr(encoder, "head_hidden_size", encoder.num_features)  # timm: of what a classifier would see
    return encoder, cast(int, width)


def _timm(name: str, tile_size_px: int) -> nn.Module:
    """Returns a timm model that ends in its pooled features, for tiles of the given edge."""
    import timm

    known = name.removeprefix(TIMM)
    if not timm.is_model(known):
        near = difflib.get_close_matches(known, timm.list_models(), n=3)
        raise ConfigError(f"model.image_encoder={name}: timm has no such model; did you mean {' or '.join(near)}?")
    built_for = timm.get_pretrained_cfg(known)
    sized: dict[str, Any] = {"img_size": tile_size_px} if built_for and built_for.fixed_input_size else {}
    return timm.create_model(known, pretrained=False, num_classes=0, **sized)


def require_weights(name: str, weights: str) -> None:
    """Checks on the driver that the weights can be had.

    Raises:
        ConfigError, ModelError: as `build_image_encoder`.
    """
    if weights == "imagenet":
        _imagenet_state(name)
    elif weights != "random" and not storage.exists(weights):
        raise ModelError(f"model.image_weights={weights}: there is no such file; give a file, imagenet or random")


def _imagenet_state(name: str) -> dict[str, torch.Tensor]:
    if name not in _IMAGENET:
        raise ConfigError(f"there are no ImageNet weights for {name}; use model.image_weights=random or a file")
    import torchvision

    url = torchvision.models.get_weight(_IMAGENET[name]).url
    cached = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if not cached.is_file():
        _download(url, cached)
    return _read_state(str(cached))


def _download(url: str, target: Path) -> None:
    import socket

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), hash_prefix=target.stem.rsplit("-", 1)[1])
    except (urllib.error.URLError, http.client.HTTPException, OSError, RuntimeError) as error:
        raise ModelError(
            f"model.image_weights=imagenet: the weights are neither in {target} nor to be had from the network "
            f"({error}); give a file with --model.image_weights FILE, or use random"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _read_state(uri: str) -> dict[str, torch.Tensor]:
    try:
        with tempfile.TemporaryDirectory() as scratch, storage.local_copy(uri, scratch) as path:
            if path.endswith(".safetensors"):
                return load_file(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise their own types, none of them public
        raise ModelError(f"model.image_weights={uri} cannot be read as weights: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"model.image_weights={uri} holds no state dict of tensors")
    return state


def _load(encoder: nn.Module, state: dict[str, torch.Tensor], origin: str) -> None:
    """Loads a state dict, tolerant of a missing `features.` prefix and of a classifier that is not used."""
    own = encoder.state_dict()
    state = {_modern(key): value for key, value in state.items()}
    if not own.keys() & state.keys():
        state = {f"features.{key}": value for key, value in state.items()}
    classifier = ("classifier.", "fc.", "head.", "heads.")
    state = {key: value for key, value in state.items() if key in own or not key.startswith(classifier)}
    counters = {key: value for key, value in own.items() if key.endswith(".num_batches_tracked")}
    state = counters | state  # published files are older than these counters, which nothing here reads
    wrong = sorted(own.keys() ^ state.keys())
    wrong += [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if wrong:
        raise ModelError(
            f"the weights {origin} do not fit {type(encoder).__name__}: {len(wrong)} tensors are missing, left over or "
            f"of another shape, such as {', '.join(wrong[:_NAMED_IN_ERROR])}"
        )
    encoder.load_state_dict(state)


def _modern(key: str) -> str:
    """torchvision's published DenseNet files write `norm.1` where its modules say `norm1`."""
    for layer in ("norm", "relu", "conv"):
        for number in ("1", "2"):
            key = key.replace(f".{layer}.{number}.", f".{layer}{number}.")
    return key
