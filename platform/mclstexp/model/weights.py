"""Weights of image encoders: ImageNet's, or files; read without executing pickled code, and never loaded in part."""

import hashlib
import http.client
import pickle
import tempfile
import urllib.error
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from mclstexp import storage
from mclstexp.errors import ConfigError, ModelError
from mclstexp.messages import some_of
from mclstexp.model import hub
from mclstexp.model.encoders import PooledEncoder, build_encoder, chosen_layers, preset_of
from mclstexp.model.presets import PRESETS
from mclstexp.settings import ModelConfig

HUB = "hub"
"""`model.image_weights` that means the encoder's repository on the Hugging Face hub."""
DOWNLOAD_TIMEOUT_S = 20
_NO_FILE = "model.image_weights={}: no such file; give a file, hub, imagenet or random"
_ANY_SIZE_PX = 224
_MAX_NAMED = 3
_SAVE = "save the network's state dict alone, with safetensors or torch.save"
_NETWORK = "network."
_SHAPE = "of another shape"
_POSITIONS = ("pos_embed", "encoder.pos_embedding")
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

    Args:
        name: as `model.image_encoder`.
        weights: `imagenet`, `hub` or a file.

    Raises:
        ConfigError, ModelError: as `load_weights`.
    """
    if weights == HUB:
        return _read_state(hub_weights(name)[0])
    return _imagenet_state(name) if weights == "imagenet" else _read_state(weights)


def hub_weights(name: str, commit: str | None = None) -> tuple[str, str]:
    """Returns the local file of an encoder's weights on the hub, and the commit that it is of.

    Raises:
        ConfigError: the encoder is not on the hub.
        ModelError: the file cannot be had.
    """
    preset = preset_of(name)
    if preset.hub is None:
        raise ConfigError(f"model.image_weights=hub: {name} is not on the hub; use random or a file")
    return hub.download(preset.hub, commit or preset.commit)


def load_state(encoder: PooledEncoder, state: Mapping[str, torch.Tensor], origin: str) -> None:
    """Loads a state dict strictly; tensors of a classifier are ignored.

    Raises:
        ModelError: as `fitting_state`.
    """
    encoder.load_state_dict(fitting_state(encoder, state, origin))


def fitting_state(encoder: PooledEncoder, state: Mapping[str, torch.Tensor], origin: str) -> dict[str, torch.Tensor]:
    """Returns a state dict by an encoder's own names and in its types, without tensors of a classifier.

    Args:
        encoder: may be on the meta device: of its tensors only shapes and types count.
        state: as a file has it.
        origin: the file's name.

    Raises:
        ModelError: tensors are missing, left over or of another shape or kind (names the first of each), or have a
            number that is not finite.
    """
    given = _given(encoder, state)
    wrong = _misfits(encoder, given)
    if wrong:
        problems = "; ".join(f"{len(names)} {what}: {some_of(names, _MAX_NAMED)}" for what, names in wrong.items())
        raise ModelError(f"the weights {origin} do not fit the encoder: tensors are {problems}{_hint(wrong, state)}")
    for key, value in given.items():
        if not torch.isfinite(value).all():
            raise ModelError(f"the weights {origin} are damaged: {_plain(key)} is not finite; fetch the file again")
    return {key: given[key].to(own.dtype) for key, own in encoder.state_dict().items()}


def _given(encoder: PooledEncoder, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file under an encoder's names, without those of a classifier."""
    own = encoder.state_dict()

    def name(key: str) -> str:
        names = [_NETWORK + key, encoder.own_name(key), encoder.own_name(_modern(key))]
        return next((each for each in names if each in own), names[1])

    given = {name(key): value for key, value in state.items()}
    unused = tuple(encoder.own_name(prefix) for prefix in _CLASSIFIERS)
    given = {key: value for key, value in given.items() if key in own or not key.startswith(unused)}
    counters = {key: torch.zeros_like(own[key], device="cpu") for key in own if key.endswith(".num_batches_tracked")}
    return counters | given  # older published files have no such counters; nothing here reads them


def _misfits(encoder: PooledEncoder, given: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Returns the tensors that do not fit, in words, by what is wrong with them."""
    own = encoder.state_dict()
    both = {_plain(key): (given[key], own[key]) for key in own if key in given}
    wrong = {
        "missing": [_plain(key) for key in own if key not in given],
        "left over": [_plain(key) for key in given if key not in own],
        _SHAPE: [
            f"{key} {tuple(found.shape)} instead of {tuple(wanted.shape)}"
            for key, (found, wanted) in both.items()
            if found.shape != wanted.shape
        ],
        "of another kind": [
            f"{key} {found.dtype} instead of {wanted.dtype}"
            for key, (found, wanted) in both.items()
            if found.is_floating_point() != wanted.is_floating_point()
        ],
    }
    return {what: names for what, names in wrong.items() if names}


def _hint(wrong: Mapping[str, Sequence[str]], state: Mapping[str, torch.Tensor]) -> str:
    """Returns what to do about weights that do not fit, if that can be told."""
    if wrong.keys() == {_SHAPE} and all(name.startswith(_POSITIONS) for name in wrong[_SHAPE]):
        return "; the network is built for the tiles' size: tiles.size_px must be that of the weights' training"
    fitting = [name for name in PRESETS if _fits(name, state)]
    return f"; they fit model.image_encoder={' or '.join(fitting)}" if fitting else ""


def _plain(key: str) -> str:
    """Returns the name that timm or torchvision gives a tensor."""
    return key.removeprefix(_NETWORK)


def _fits(name: str, state: Mapping[str, torch.Tensor]) -> bool:
    encoder = _empty_encoder(name)
    return not _misfits(encoder, _given(encoder, state))


@cache
def _empty_encoder(name: str) -> PooledEncoder:
    with torch.device("meta"):
        return build_encoder(name, _ANY_SIZE_PX)


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Returns the SHA-256, 64 hex digits, of an encoder's tensors by its own names, whatever file they came in."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{_plain(name)} {value.dtype} {tuple(value.shape)}\n".encode())
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
    elif weights == HUB:
        hub_weights(name)
    elif weights != "random" and not storage.exists(weights):
        raise ModelError(_NO_FILE.format(weights))


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
    except FileNotFoundError:
        raise ModelError(_NO_FILE.format(uri)) from None
    except pickle.UnpicklingError as error:
        raise ModelError(f"model.image_weights={uri} is damaged or holds more than tensors; {_SAVE}") from error
    except Exception as error:  # torch and safetensors raise their own types, none of them public
        raise ModelError(f"model.image_weights={uri} cannot be read as weights: {error!r}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        parts = f" but {some_of([str(key) for key in state])}" if isinstance(state, dict) else ""
        raise ModelError(f"model.image_weights={uri} contains no state dict of tensors{parts}; {_SAVE}")
    return state


def _modern(key: str) -> str:
    """Returns the key of torchvision's modules (`norm1`) for that of its published DenseNet files (`norm.1`)."""
    for layer in ("norm", "relu", "conv"):
        for number in ("1", "2"):
            key = key.replace(f".{layer}.{number}.", f".{layer}{number}.")
    return key
