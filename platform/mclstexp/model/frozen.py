"""A frozen image encoder: a record that names it, and tensors that are found when a tile has to be encoded.

Heads are trained on stored features, so that most work needs the record alone. The tensors are checked against the
digest in the record wherever they come from: features of one encoder never meet a head of another.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import PurePosixPath

import torch

from mclstexp import storage
from mclstexp.data.features import EncoderRecord
from mclstexp.errors import ModelError
from mclstexp.model.encoders import PooledEncoder, build_encoder, layer_widths, preset_of, transform_of
from mclstexp.model.towers import input_scaling, plain_tensors
from mclstexp.model.weights import HUB, fitting_state, hub_weights, read_weights, weights_digest
from mclstexp.settings import ModelConfig

ENCODERS_VARIABLE = "MCLSTEXP_ENCODERS"
"""Environment variable: a folder or s3:// prefix of weights files named by their digest."""
_ENDINGS = (".safetensors", ".bin", ".pth")
_NAMED_WEIGHTS = ("random", "imagenet", HUB)
_digests: dict[tuple[object, ...], str] = {}
"""Of the files that this process has read; tensors are not kept, for they may be gigabytes."""


class FrozenEncoder:
    """A frozen encoder with, or without, its tensors at hand."""

    def __init__(self, record: EncoderRecord, state: dict[str, torch.Tensor] | None = None) -> None:
        self.record, self._state = record, state

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the state dict of its `PooledEncoder`, which is looked for if it is not at hand.

        Raises:
            ModelError: it is not found, or another file is in its place (names where it was looked for); or this code
                would give it other images than its features were computed from.
        """
        self._require_transform()
        if self._state is None:
            self._state = self._found()
        return self._state

    def without_tensors(self) -> "FrozenEncoder":
        """Returns the encoder without its tensors, which may be gigabytes, if they can be found again."""
        return FrozenEncoder(self.record) if self.record.uri else self

    def not_finite(self) -> str | None:
        """Returns the name of the first tensor at hand with a number that is not finite; None if there is none."""
        for name, value in (self._state or {}).items():
            if not torch.isfinite(value).all():
                return name
        return None

    def with_weights(self, weights: str) -> "FrozenEncoder":
        """Returns the encoder with the tensors of a file.

        Raises:
            ModelError: they are another encoder's; gives both digests.
        """
        return FrozenEncoder(self.record, self._read(weights))

    def _require_transform(self) -> None:
        """Checks that tiles reach the encoder as they did: presets and timm's own facts change between versions."""
        record = self.record
        transform = transform_of(record.name, record.tile_size_px)
        scaling = None if record.scaling == "encoder" else record.scaling
        own = input_scaling(ModelConfig.model_validate({"image_encoder": record.name, "input_scaling": scaling}))
        now, then = (
            f"resized to {resize} px, cut to {crop} px, less {mean} over {std}"
            for resize, crop, (mean, std) in (
                (transform.resize_px, transform.crop_px, own),
                (record.resize_px, record.crop_px, (record.mean, record.std)),
            )
        )
        if now != then:
            raise ModelError(
                f"{record.name} saw tiles {then} (None: as they are), this code and timm would give it tiles {now}: "
                "use the code and timm of that time, or make features and model again"
            )

    def with_own_layer(self) -> "FrozenEncoder":
        """Returns the encoder with the preset's own pooled feature, whichever layers it had."""
        layers, widths = layer_widths(self.record.name, self.record.tile_size_px)
        record = self.record.model_copy(update={"layers": layers, "widths": widths})
        return FrozenEncoder(record, self._state)

    def _found(self) -> dict[str, torch.Tensor]:
        weights = next(self._places(), None)
        if weights is not None:
            return self._read(weights)
        record, folder = self.record, os.environ.get(ENCODERS_VARIABLE)
        looked = [f"{ENCODERS_VARIABLE} ({folder or 'not set'})", f"the recorded place ({record.uri or 'none'})"]
        raise ModelError(
            f"the weights of the frozen encoder {record.name} with digest {record.digest[:12]}... are not at hand: "
            f"looked in {' and '.join(looked)}; give --model.image_weights FILE, or put the file into the folder that "
            f"{ENCODERS_VARIABLE} names, as {record.digest} with its own ending ({', '.join(_ENDINGS)})"
        )

    def _places(self) -> Iterator[str]:
        """Yields where the weights are, the folder of the environment first."""
        folder = os.environ.get(ENCODERS_VARIABLE)
        if folder:
            names = {self.record.digest + ending for ending in _ENDINGS}
            yield from (uri for uri in storage.list_files(folder) if PurePosixPath(uri).name in names)
        if self.record.uri and (self.record.uri in _NAMED_WEIGHTS or storage.exists(self.record.uri)):
            yield self.record.uri

    def _read(self, weights: str) -> dict[str, torch.Tensor]:
        record = self.record
        state = _tensors(record.name, record.tile_size_px, _file(record.name, weights, record.commit)[0])
        found = weights_digest(state)
        if found != record.digest:
            raise ModelError(
                f"{weights} is not the encoder that the features and the model belong to: its digest is "
                f"{found[:12]}..., the recorded one {record.digest[:12]}...; give the file of {record.name} "
                "that they were made with"
            )
        return state


def frozen_encoder(config: ModelConfig, tile_size_px: int, seed: int) -> FrozenEncoder:
    """Returns the frozen encoder of some settings; reads its weights, once as long as a process finds the same file.

    Args:
        config: `image_encoder`, `image_weights`, `image_layers` and `input_scaling` count.
        tile_size_px: edge of the tiles, for networks that are built for one size.
        seed: of random weights.

    Raises:
        ConfigError, ModelError: there is no such encoder, or its weights cannot be read or do not fit.
    """
    weights = config.image_weights
    if weights == "random":
        torch.manual_seed(seed)
        random = plain_tensors(build_encoder(config.image_encoder, tile_size_px).state_dict())
        return FrozenEncoder(_record(config, tile_size_px, weights_digest(random), None), random)
    file, commit = _file(config.image_encoder, weights)
    seen = (config.image_encoder, tile_size_px, file, *_stamp(file))
    state = None
    if seen not in _digests:
        state = _tensors(config.image_encoder, tile_size_px, file)
        _digests[seen] = weights_digest(state)
    uri = weights if weights in _NAMED_WEIGHTS else file
    return FrozenEncoder(_record(config, tile_size_px, _digests[seen], uri, commit), state)


def encoder_from_state(config: ModelConfig, tile_size_px: int, state: Mapping[str, torch.Tensor]) -> FrozenEncoder:
    """Returns the frozen encoder of a model version that stored its tensors among the learnt ones (schema 1 to 4).

    Raises:
        ModelError: the tensors do not fit.
    """
    own = fitting_state(_empty(config.image_encoder, tile_size_px), state, "of the model version")
    return FrozenEncoder(_record(config, tile_size_px, weights_digest(own), None), own)


def _file(name: str, weights: str, commit: str | None = None) -> tuple[str, str | None]:
    """Returns the file that `model.image_weights` names (`imagenet` stays) and the commit of one from the hub."""
    if weights == HUB:
        return hub_weights(name, commit)
    return (weights if weights in _NAMED_WEIGHTS else storage.absolute(weights)), None


def _tensors(name: str, tile_size_px: int, file: str) -> dict[str, torch.Tensor]:
    """Returns a file's tensors as the encoder has them."""
    return plain_tensors(fitting_state(_empty(name, tile_size_px), read_weights(name, file), file))


def _stamp(file: str) -> tuple[object, ...]:
    """Returns what tells a file from another of its name; nothing if there is no file."""
    if storage.is_s3(file):
        return (storage.version(file),)
    with suppress(OSError):
        found = os.stat(file)
        return found.st_ino, found.st_size, found.st_mtime_ns
    return ()


def _empty(name: str, tile_size_px: int) -> PooledEncoder:
    """Returns an encoder without memory: random numbers for a billion weights take seconds."""
    with torch.device("meta"):
        return build_encoder(name, tile_size_px)


def _record(
    config: ModelConfig, tile_size_px: int, digest: str, uri: str | None, commit: str | None = None
) -> EncoderRecord:
    preset, transform = preset_of(config.image_encoder), transform_of(config.image_encoder, tile_size_px)
    is_random = config.image_weights == "random"
    layers, widths = layer_widths(config.image_encoder, tile_size_px, config.image_layers)
    mean, std = input_scaling(config)
    return EncoderRecord(
        name=config.image_encoder,
        digest=digest,
        tile_size_px=tile_size_px,
        layers=layers,
        widths=widths,
        resize_px=transform.resize_px,
        crop_px=transform.crop_px,
        scaling=config.input_scaling or "encoder",
        mean=mean,
        std=std,
        licence="" if is_random else preset.licence,
        stores_weights=is_random or preset.stores_weights,
        hub=None if is_random else preset.hub,
        commit=None if is_random else commit or preset.commit,
        uri=uri,
    )
