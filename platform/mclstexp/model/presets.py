"""Image encoders as data: architecture, input, pooling, layers on offer, licence and where the weights come from.

A new encoder is a line in `PRESETS`; nothing else in the project knows its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Transform:
    """What happens to a tile in [0, 1] before the encoder sees it, in this order: resize, centre crop, normalise."""

    resize_px: int | None = None
    """Edge that tiles of another size are resized to (bicubic, antialiased, on the device); None: tiles as they are."""
    crop_px: int | None = None
    """Edge of the central part that is kept after resizing; None: all of it."""
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD


@dataclass(frozen=True)
class Preset:
    """One encoder."""

    build: str
    """How the network is made: a key of `encoders.BUILDERS`, `torchvision/NAME` or `timm/NAME`."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments beyond the defaults; layers of timm are named by strings and resolved when the network is built."""
    transform: Transform = Transform()
    layers: tuple[str, ...] = ("pooled",)
    """Pooled layers on offer. The first one is the preset's own pooled feature."""
    mpp: tuple[float, float] | None = None
    """Smallest and largest micrometres per pixel that it was trained at; None: natural images, any."""
    licence: str = ""
    stores_weights: bool = True
    """Whether the licence lets a model version contain the weights."""
    imagenet: str | None = None
    """torchvision's name of its ImageNet weights; None if there are none."""
    hub: str | None = None
    """Repository on the Hugging Face hub; None: it is not there."""
    commit: str | None = None
    """Commit of that repository whose weights are meant; None: the newest, which the version then records."""
    trident: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names under which TRIDENT stores features of this encoder, by layer."""


PRESETS: dict[str, Preset] = {}
"""The encoders by name, as `model.image_encoder` gives it. timm/NAME is every timm model beside them."""
