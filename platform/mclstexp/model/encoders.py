"""Image encoders by name: each maps float images (N, 3, size, size) to pooled features (N, F).

A new encoder is a line in `ENCODERS`. Weights are random, torchvision's for ImageNet, or a file, so nothing needs a
download to run; files are read without executing pickled code. torchvision and timm are imported only where they are
used, because either adds two seconds or more to the start of a process.
"""

import http.client
import tempfile
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from mclstexp import storage
from mclstexp.errors import ConfigError, ModelError
from mclstexp.messages import did_you_mean, some_of

DOWNLOAD_TIMEOUT_S = 20
_MAX_NAMED = 3


class DenseNet121(nn.Module):
    """DenseNet-121 up to its last batch norm, without the final ReLU, globally average-pooled: F = 1024.

    Huang et al. 2017 (https://arxiv.org/abs/1608.06993); leaving out the ReLU is mclSTExp's change.
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


@dataclass(frozen=True)
class Encoder:
    """How an encoder is built, and which ImageNet weights it has."""

    build: Callable[[int], nn.Module]
    """Tile size in pixels to a module that ends in pooled features (N, F) and has F as `num_features`."""
    imagenet: str | None = None
    """torchvision's name of its ImageNet weights; None if there are none."""


def _resnet(name: str, tile_size_px: int) -> nn.Module:
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


ENCODERS = {
    "densenet121": Encoder(lambda tile_size_px: DenseNet121(), "DenseNet121_Weights.IMAGENET1K_V1"),
    "resnet18": Encoder(partial(_resnet, "resnet18"), "ResNet18_Weights.IMAGENET1K_V1"),
    "resnet50": Encoder(partial(_resnet, "resnet50"), "ResNet50_Weights.IMAGENET1K_V2"),
    "vit_b_16": Encoder(_vit, "ViT_B_16_Weights.IMAGENET1K_V1"),
    "small_cnn": Encoder(lambda tile_size_px: SmallCNN()),
}
"""The encoders by name, as `model.image_encoder` gives it. timm/NAME is every timm model beside them."""
TIMM = "timm/"


def build_image_encoder(name: str, weights: str, tile_size_px: int) -> tuple[nn.Module, int]:
    """Returns an encoder and its number of features F.

    Args:
        name: as `model.image_encoder`.
        weights: `random` (the caller seeds torch), `imagenet`, or a .pth or .safetensors file (local or s3://)
            with the state dict of torchvision's model, of its `features`, or of this module.
        tile_size_px: edge of the tiles, for encoders that are built for one size.

    Raises:
        ConfigError: the encoder is unknown, has no ImageNet weights, or cannot take tiles of this size.
        ModelError: the weights cannot be read, or belong to another architecture.
    """
    encoder = _encoder(name).build(tile_size_px)
    if weights == "imagenet":
        _load(encoder, _imagenet_state(name), "imagenet")
    elif weights != "random":
        _load(encoder, _read_state(weights), weights)
    width = getattr(encoder, "head_hidden_size", encoder.num_features)  # of timm: the input of its classifier
    return encoder, cast(int, width)


def require_encoder(name: str, weights: str = "random") -> None:
    """Checks on the driver, before workers start, that there is such an encoder and that its weights are available.

    Raises:
        ConfigError, ModelError: as `build_image_encoder`.
    """
    _encoder(name)
    if weights == "imagenet":
        _imagenet_state(name)
    elif weights != "random" and not storage.exists(weights):
        raise ModelError(f"model.image_weights={weights}: no such file; give a file, imagenet or random")


def _encoder(name: str) -> Encoder:
    if name.startswith(TIMM):
        return _timm_encoder(name)
    if name not in ENCODERS:
        raise ConfigError(
            f"model.image_encoder={name} is neither a known encoder nor {TIMM}NAME of timm; "
            f"{did_you_mean(name, ENCODERS)}"
        )
    return ENCODERS[name]


def _timm_encoder(name: str) -> Encoder:
    """Returns the timm model of this name, ending in its pooled features."""
    import timm

    known = name.removeprefix(TIMM)
    if not timm.is_model(known):
        near = did_you_mean(known, timm.list_models(), num_nearest=3)
        raise ConfigError(f"model.image_encoder={name}: timm has no such model; {near}")
    built_for = timm.get_pretrained_cfg(known)

    def build(tile_size_px: int) -> nn.Module:
        sized: dict[str, Any] = {"img_size": tile_size_px} if built_for and built_for.fixed_input_size else {}
        return timm.create_model(known, pretrained=False, num_classes=0, **sized)

    return Encoder(build)


def _imagenet_state(name: str) -> dict[str, torch.Tensor]:
    known_as = _encoder(name).imagenet
    if known_as is None:
        raise ConfigError(f"there are no ImageNet weights for {name}; use model.image_weights=random or a file")
    import torchvision

    url = torchvision.models.get_weight(known_as).url
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
            f"model.image_weights=imagenet: the weights are not in {target}, and the network does not give them "
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
        raise ModelError(f"model.image_weights={uri} does not contain a state dict of tensors")
    return state


def _load(encoder: nn.Module, state: dict[str, torch.Tensor], origin: str) -> None:
    """Loads a state dict; its keys may omit the prefix `features.`, and its classifier is ignored."""
    own = encoder.state_dict()
    state = {_modern(key): value for key, value in state.items()}
    if not own.keys() & state.keys():
        state = {f"features.{key}": value for key, value in state.items()}
    classifier = ("classifier.", "fc.", "head.", "heads.")
    state = {key: value for key, value in state.items() if key in own or not key.startswith(classifier)}
    counters = {key: value for key, value in own.items() if key.endswith(".num_batches_tracked")}
    state = counters | state  # older published files have no such counters; nothing here reads them
    wrong = sorted(own.keys() ^ state.keys())
    wrong += [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if wrong:
        raise ModelError(
            f"the weights {origin} do not fit {type(encoder).__name__}: {len(wrong)} tensors are missing, extra or of "
            f"another shape: {some_of(wrong, _MAX_NAMED)}"
        )
    encoder.load_state_dict(state)


def _modern(key: str) -> str:
    """Returns the key of torchvision's modules (`norm1`) for that of its published DenseNet files (`norm.1`)."""
    for layer in ("norm", "relu", "conv"):
        for number in ("1", "2"):
            key = key.replace(f".{layer}.{number}.", f".{layer}{number}.")
    return key
