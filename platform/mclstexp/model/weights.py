"""Weights of image encoders: ImageNet's, or files; read without executing pickled code, and never loaded in part."""

import hashlib
import http.client
import tempfile
import urllib.error
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from mclstexp import storage
from mclstexp.errors import ConfigError, ModelError
from mclstexp.messages import some_of
from mclstexp.model.encoders import PooledEncoder, chosen_layers, preset_of
from mclstexp.settings import ModelConfig

DOWNLOAD_TIMEOUT_S = 20
_MAX_NAMED = 3
_CLASSIFIERS = ("classifier.", "fc.", "head.", "heads.")


def load_weights(encoder: PooledEncoder, config: ModelConfig) -> None:
    """Loads `model.image_weights` into an encoder; `random` leaves it as it is.

    Raises:
        ConfigError: the encoder has no ImageNet weights.
        ModelError: the weights cannot be read, or belong to another architecture.
    """
    if config.image_weights != "random":
        load_state(encoder, read_weights(config.image_encoder, config.image_weights), config.image_weights)


def read_weights(name: str, weights: str) -> dict[str, torch.Tensor]:
    """Returns the state dict that `model.image_weights` names for an encoder.

    Raises:
        ConfigError, ModelError: as `load_weights`.
    """
    return _imagenet_state(name) if weights == "imagenet" else _read_state(weights)


def load_state(encoder: PooledEncoder, state: Mapping[str, torch.Tensor], origin: str) -> None:
    """Loads a state dict strictly; tensors of a classifier are ignored.

    Raises:
        ModelError: tensors are missing, left over or of another shape; names the first of each.
    """
    own = encoder.state_dict()
    given = {encoder.own_name(_modern(key)): value for key, value in state.items()}
    unused = tuple(encoder.own_name(prefix) for prefix in _CLASSIFIERS)
    given = {key: value for key, value in given.items() if key in own or not key.startswith(unused)}
    counters = {key: value for key, value in own.items() if key.endswith(".num_batches_tracked")}
    given = counters | given  # older published files have no such counters; nothing here reads them
    shaped = own.keys() & given.keys()
    wrong = {
        "missing": sorted(own.keys() - given.keys()),
        "left over": sorted(given.keys() - own.keys()),
        "of another shape": sorted(key for key in shaped if own[key].shape != given[key].shape),
    }
    if any(wrong.values()):
        listed = "; ".join(
            f"{len(names)} {what}: {some_of(names, _MAX_NAMED)}" for what, names in wrong.items() if names
        )
        raise ModelError(f"the weights {origin} do not fit the encoder: tensors are {listed}")
    encoder.load_state_dict(given)


def weights_digest(encoder: nn.Module) -> str:
    """Returns the SHA-256, 64 hex digits, of an encoder's tensors by name, whatever file they came in."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"{name.removeprefix('network.')} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_encoder(name: str, weights: str = "random", layers: Sequence[str] = ()) -> None:
    """Checks on the driver, before workers start, that there is such an encoder and that its weights are available.

    Raises:
        ConfigError: the encoder or a layer is unknown, or there are no ImageNet weights.
        ModelError: the weights cannot be had.
    """
    chosen_layers(name, layers)
    if weights == "imagenet":
        _imagenet_state(name)
    elif weights != "random" and not storage.exists(weights):
        raise ModelError(f"model.image_weights={weights}: no such file; give a file, imagenet or random")


def _imagenet_state(name: str) -> dict[str, torch.Tensor]:
    known_as = preset_of(name).imagenet
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


def _modern(key: str) -> str:
    """Returns the key of torchvision's modules (`norm1`) for that of its published DenseNet files (`norm.1`)."""
    for layer in ("norm", "relu", "conv"):
        for number in ("1", "2"):
            key = key.replace(f".{layer}.{number}.", f".{layer}{number}.")
    return key
