"""Image encoders by name: each maps transformed images (N, 3, size, size) to pooled features (N, F).

Encoders are data (`presets.PRESETS`); here they become networks, with random weights (`weights.py` reads others).
torchvision and timm are imported only where they are used, because either adds two seconds or more to the start of a
process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from mclstexp.errors import ConfigError
from mclstexp.messages import did_you_mean, some_of
from mclstexp.model.presets import PERMISSIVE, PRESETS, Preset, Transform, Triple

TIMM = "timm/"
POOLED, CLASS, CLASS_MEAN = "pooled", "class", "class_mean"
"""Layers: the network's own pooled output; of transformers the class token, alone or with the mean of patch tokens."""
MAX_RESOLUTION_RATIO = 1.5
"""Tiles may be this much finer or coarser than those of an encoder's training without a warning."""
_PREFIX = "network."
Pool = Callable[[nn.Module, torch.Tensor], dict[str, torch.Tensor]]
"""Maps a network and its input to all layers on offer, (N, width) each."""


class PooledEncoder(nn.Module):
    """A network whose chosen pooled layers are joined to features (N, F)."""

    def __init__(self, network: nn.Module, pool: Pool, layers: tuple[str, ...], former_prefix: str = "") -> None:
        super().__init__()
        self.network, self.layers = network, layers
        self._pool, self._former_prefix = pool, former_prefix
        self.widths: tuple[int, ...] = ()
        """Features of each layer."""
        self._register_load_state_dict_pre_hook(self._rename)

    @property
    def num_features(self) -> int:
        """F."""
        return sum(self.widths)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features (N, F) of images that were transformed as the preset says."""
        pooled = self._pool(self.network, images)
        return torch.cat([pooled[layer] for layer in self.layers], dim=1)

    def own_name(self, name: str) -> str:
        """Returns the name in this module's state dict of a tensor that a file, or an earlier version, calls `name`."""
        return name if name.startswith(_PREFIX) else _PREFIX + name.removeprefix(self._former_prefix)

    def _rename(self, state: dict[str, Any], prefix: str, *_: object) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            state[prefix + self.own_name(key.removeprefix(prefix))] = state.pop(key)


def build_encoder(name: str, tile_size_px: int, layers: Sequence[str] = ()) -> PooledEncoder:
    """Returns an encoder with random weights; the caller seeds torch.

    Args:
        name: as `model.image_encoder`.
        tile_size_px: edge of the tiles, for networks that are built for one size.
        layers: pooled layers to join, in this order; none: the preset's own pooled feature.

    Raises:
        ConfigError: the encoder or a layer is unknown, or it cannot take tiles of this size.
    """
    chosen, widths = layer_widths(name, tile_size_px, layers)
    encoder = _unsized(name, preset_of(name), tile_size_px, chosen)
    encoder.widths = widths
    return encoder


@cache
def _widths(name: str, tile_size_px: int) -> dict[str, int]:
    """Returns the number of features of every layer on offer, from a pass of a network without memory."""
    preset, transform = preset_of(name), transform_of(name, tile_size_px)
    edge = transform.crop_px or transform.resize_px or tile_size_px
    try:
        with torch.device("meta"), torch.no_grad():
            encoder = _unsized(name, preset, tile_size_px, preset.layers).eval()
            pooled = encoder._pool(encoder.network, torch.zeros(1, 3, edge, edge))
    except (RuntimeError, AssertionError, ValueError) as error:  # of whichever layer the size does not suit
        raise ConfigError(
            f"model.image_encoder={name} cannot take tiles of {tile_size_px} px ({error}); use another tiles.size_px"
        ) from error
    return {layer: pooled[layer].shape[1] for layer in preset.layers}


def layer_widths(name: str, tile_size_px: int, layers: Sequence[str] = ()) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Returns the chosen layers of an encoder and the number of features of each, without its weights' memory.

    Raises:
        ConfigError: as `build_encoder`.
    """
    chosen, widths = chosen_layers(name, layers), _widths(name, tile_size_px)
    return chosen, tuple(widths[layer] for layer in chosen)


def preset_of(name: str) -> Preset:
    """Returns the preset of `model.image_encoder`; of timm/NAME one made from timm's own facts.

    Raises:
        ConfigError: there is none; gives the nearest.
    """
    if name.startswith(TIMM):
        return _timm_preset(name.removeprefix(TIMM))
    if name not in PRESETS:
        raise ConfigError(
            f"model.image_encoder={name} is neither a known encoder nor {TIMM}NAME of timm; "
            f"{did_you_mean(name, PRESETS)}"
        )
    return PRESETS[name]


def transform_of(name: str, tile_size_px: int) -> Transform:
    """Returns what happens to tiles before an encoder sees them, where most have this edge.

    Raises:
        ConfigError: as `preset_of`.
    """
    preset = preset_of(name)
    return replace(preset.transform, resize_px=tile_size_px) if preset.built_for_tiles else preset.transform


def resolution_warning(name: str, tile_size_px: int, mpp: float) -> str | None:
    """Returns a warning if an encoder would see tiles at a resolution far from those that it was trained at.

    Args:
        name: as `model.image_encoder`.
        tile_size_px: edge of the tiles, before the encoder's own resizing.
        mpp: micrometres per pixel of the tiles.

    Raises:
        ConfigError: as `preset_of`.
    """
    trained_at = preset_of(name).mpp
    if trained_at is None:
        return None
    seen = mpp * tile_size_px / (transform_of(name, tile_size_px).resize_px or tile_size_px)
    finest, coarsest = trained_at
    if finest / MAX_RESOLUTION_RATIO <= seen <= coarsest * MAX_RESOLUTION_RATIO:
        return None
    fitting = (finest if seen < finest else coarsest) * mpp / seen
    return (
        f"{name} sees these tiles ({tile_size_px} px at {mpp:.3g} um per pixel) as {seen:.3g} um per pixel, and was "
        f"trained at {finest:g}{'' if finest == coarsest else f' to {coarsest:g}'}: its features may be weak; prepare "
        f"tiles with tiles.mpp={fitting:.2g}"
    )


def chosen_layers(name: str, layers: Sequence[str]) -> tuple[str, ...]:
    """Returns the pooled layers that `model.image_layers` asks of an encoder; of none, the preset's own.

    Raises:
        ConfigError: the encoder or a layer is unknown, or a layer is named twice.
    """
    preset = preset_of(name)
    for layer in layers:
        if layer not in preset.layers:
            raise ConfigError(
                f"model.image_layers={layer} is no layer of {name}; set model.image_layers to some of "
                f"{', '.join(preset.layers)}"
            )
    if len(set(layers)) < len(layers):
        raise ConfigError(f"model.image_layers={','.join(layers)} names a layer twice")
    return tuple(layers) or preset.layers[:1]


def _unsized(name: str, preset: Preset, tile_size_px: int, layers: tuple[str, ...]) -> PooledEncoder:
    family, _, network = preset.build.partition("/")
    if family == "timm":
        return _timm(network, preset, tile_size_px, layers)
    if preset.build in BUILDERS:
        return BUILDERS[preset.build](layers)
    return _torchvision(name, network, preset, tile_size_px, layers)


def _densenet121(layers: tuple[str, ...]) -> PooledEncoder:
    from torchvision.models import densenet121

    return PooledEncoder(densenet121().features, _pool_densenet, layers, "features.")


def _pool_densenet(network: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pools transitions 2 and 3, and the last batch norm without the final ReLU.

    Huang et al. 2017 (https://arxiv.org/abs/1608.06993); leaving out the ReLU is mclSTExp's change.
    """
    pooled, values = {}, images
    for name, layer in network.named_children():
        values = layer(values)
        if name in ("transition2", "transition3", "norm5"):
            pooled["norm" if name == "norm5" else name] = values.mean(dim=(2, 3))
    return pooled


def _small_cnn(layers: tuple[str, ...]) -> PooledEncoder:
    """Returns four strided convolutions, for tests and smoke runs: 128 features, or 96 of the third."""
    parts: list[nn.Module] = []
    for before, after in pairwise((3, 32, 64, 96, 128)):
        parts += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return PooledEncoder(nn.Sequential(*parts), _pool_small_cnn, layers, "features.")


def _pool_small_cnn(network: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = list(network.children())
    third = nn.Sequential(*parts[:-3])(images)
    return {POOLED: nn.Sequential(*parts[-3:])(third).mean(dim=(2, 3)), "third": third.mean(dim=(2, 3))}


BUILDERS: Mapping[str, Callable[[tuple[str, ...]], PooledEncoder]] = {
    "densenet121": _densenet121,
    "small_cnn": _small_cnn,
}
"""Networks of neither timm nor torchvision's plain output, by what a preset's `build` calls them."""


def _torchvision(name: str, network: str, preset: Preset, tile_size_px: int, layers: tuple[str, ...]) -> PooledEncoder:
    import torchvision

    if preset.built_for_tiles:
        if tile_size_px % 16:
            nearest = max(16, 16 * round(tile_size_px / 16))
            raise ConfigError(f"model.image_encoder={name} needs tiles.size_px in steps of 16; use {nearest}")
        module = getattr(torchvision.models, network)(image_size=tile_size_px)
        module.heads = nn.Identity()
    else:
        module = getattr(torchvision.models, network)()
        module.fc = nn.Identity()
    return PooledEncoder(module, _pool_output, layers)


def _timm(network: str, preset: Preset, tile_size_px: int, layers: tuple[str, ...]) -> PooledEncoder:
    import timm

    arguments: dict[str, Any] = {name: _resolved(value) for name, value in preset.arguments.items()}
    if preset.built_for_tiles:
        arguments["img_size"] = tile_size_px
    module = timm.create_model(network, pretrained=False, num_classes=0, **arguments)
    return PooledEncoder(module, _pool_output if preset.layers == (POOLED,) else _pool_tokens, layers)


def _resolved(value: object) -> object:
    """Returns an argument of timm; layers are named, because presets import neither torch nor timm."""
    if not isinstance(value, str):
        return value
    import timm.layers

    return getattr(timm.layers, value, None) or getattr(nn, value, None) or value


def _pool_output(network: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    return {POOLED: network(images)}


def _pool_tokens(network: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pools the tokens of a transformer of timm; class and register tokens are not in the mean."""
    tokens = network.forward_features(images)  # type: ignore[operator]  # of every transformer of timm
    patches = tokens[:, network.num_prefix_tokens :]
    return {CLASS: tokens[:, 0], CLASS_MEAN: torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=1)}


@cache
def _timm_preset(network: str) -> Preset:
    import timm

    if not timm.is_model(network):
        near = did_you_mean(network, timm.list_models(), num_nearest=3)
        raise ConfigError(f"model.image_encoder={TIMM}{network}: timm has no such model; {near}")
    build = f"{TIMM}{network}"
    try:
        known = timm.get_pretrained_cfg(network)
    except RuntimeError:
        tags = timm.list_models(f"{network.partition('.')[0]}.*", pretrained=True)
        raise ConfigError(
            f"model.image_encoder={TIMM}{network}: timm has no such tag; known: {some_of(tags)}"
        ) from None
    if known is None:
        return Preset(build, licence="not stated", stores_weights=False)
    return Preset(
        build,
        transform=Transform(mean=_triple(known.mean), std=_triple(known.std)),
        built_for_tiles=bool(known.fixed_input_size),
        licence=known.license or "not stated",
        stores_weights=(known.license or "").lower() in PERMISSIVE,
        hub=known.hf_hub_id,
    )


def _triple(values: Sequence[float]) -> Triple:
    red, green, blue = values
    return red, green, blue
