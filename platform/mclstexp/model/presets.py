"""Image encoders as data: architecture, input, pooling, layers on offer, licence and where the weights come from.

A new encoder is a line in `PRESETS`; nothing else in the project knows its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PERMISSIVE = ("apache-2.0", "mit", "bsd-3-clause")
"""Licences, in lower case, that let a model version contain the weights."""
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
    built_for_tiles: bool = False
    """Whether the network is built for the size of the tiles; those of another view are then resized to it."""
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
    """Names under which TRIDENT stores features of this encoder, by layer; widths tell layers of one name apart."""


_INIT = {"init_values": 1e-5}
_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU", **_INIT}
_AT_224 = Transform(resize_px=224)
_GIGAPATH = Transform(resize_px=256, crop_px=224)
_OPTIMUS = Transform(224, None, (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
_LUNIT = Transform(224, None, (0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))
_TOKEN, _TOKEN_MEAN = ("class", "class_mean"), ("class_mean", "class")
_AT_20X = (0.5, 0.5)
_CC = "CC-BY-NC-ND-4.0"
_APACHE = "Apache-2.0"
_BSD = "BSD-3-Clause (torchvision)"
_UNI2 = {
    "img_size": 224,
    "depth": 24,
    "num_heads": 24,
    "embed_dim": 1536,
    "mlp_ratio": 2.66667 * 2,
    "no_embed_class": True,
    "reg_tokens": 8,
    "dynamic_img_size": True,
    **_SWIGLU,
}
_VIRCHOW = {"mlp_ratio": 5.3375, "global_pool": "", "dynamic_img_size": True, **_SWIGLU}
_OPTIMUS_NETWORK = {"img_size": 224, "dynamic_img_size": False, **_INIT}
_H0_MINI = {"img_size": 224, "reg_tokens": 4, "mlp_ratio": 5.33334, "no_embed_class": True, **_SWIGLU}

PRESETS: dict[str, Preset] = {
    "densenet121": Preset(
        "densenet121",
        layers=("norm", "transition3", "transition2"),
        licence=_BSD,
        imagenet="DenseNet121_Weights.IMAGENET1K_V1",
    ),
    "resnet18": Preset("torchvision/resnet18", licence=_BSD, imagenet="ResNet18_Weights.IMAGENET1K_V1"),
    "resnet50": Preset("torchvision/resnet50", licence=_BSD, imagenet="ResNet50_Weights.IMAGENET1K_V2"),
    "vit_b_16": Preset(
        "torchvision/vit_b_16", built_for_tiles=True, licence=_BSD, imagenet="ViT_B_16_Weights.IMAGENET1K_V1"
    ),
    "small_cnn": Preset("small_cnn", layers=("pooled", "third"), licence="MIT"),
    "uni": Preset(
        "timm/vit_large_patch16_224",
        {"img_size": 224, "dynamic_img_size": True, **_INIT},
        _AT_224,
        layers=_TOKEN,
        mpp=_AT_20X,
        licence=_CC,
        stores_weights=False,
        hub="MahmoodLab/UNI",
        trident={"class": ("uni_v1",)},
    ),
    "uni2-h": Preset(
        "timm/vit_giant_patch14_224",
        _UNI2,
        _AT_224,
        layers=_TOKEN,
        mpp=_AT_20X,
        licence=_CC,
        stores_weights=False,
        hub="MahmoodLab/UNI2-h",
        trident={"class": ("uni_v2",)},
    ),
    "virchow": Preset(
        "timm/vit_huge_patch14_224",
        _VIRCHOW,
        _AT_224,
        layers=_TOKEN_MEAN,
        mpp=_AT_20X,
        licence=_APACHE,
        hub="paige-ai/Virchow",
        trident={"class_mean": ("virchow",), "class": ("virchow",)},
    ),
    "virchow2": Preset(
        "timm/vit_huge_patch14_224",
        {"reg_tokens": 4, **_VIRCHOW},
        _AT_224,
        layers=_TOKEN_MEAN,
        mpp=(0.5, 2.0),
        licence=_CC,
        stores_weights=False,
        hub="paige-ai/Virchow2",
        trident={"class_mean": ("virchow2",), "class": ("virchow2-cls", "virchow2")},
    ),
    "gigapath": Preset(
        "timm/vit_giant_patch14_dinov2",
        {"patch_size": 16, "img_size": 224, **_INIT},
        _GIGAPATH,
        layers=_TOKEN,
        mpp=_AT_20X,
        licence=f"{_APACHE} with conditions",
        stores_weights=False,
        hub="prov-gigapath/prov-gigapath",
        trident={"class": ("gigapath",)},
    ),
    "gigapath-flash": Preset(
        "timm/vit_small_patch16_224",
        {"mlp_ratio": 2048 / 384, **_SWIGLU},
        _GIGAPATH,
        layers=_TOKEN,
        mpp=_AT_20X,
        licence=_APACHE,
        trident={"class": ("gigapath-flash",)},
    ),
    "h-optimus-0": Preset(
        "timm/vit_giant_patch14_reg4_dinov2",
        _OPTIMUS_NETWORK,
        _OPTIMUS,
        layers=_TOKEN,
        mpp=_AT_20X,
        licence=_APACHE,
        hub="bioptimus/H-optimus-0",
        trident={"class": ("hoptimus0",)},
    ),
    "h-optimus-1": Preset(
        "timm/vit_giant_patch14_reg4_dinov2",
        _OPTIMUS_NETWORK,
        _OPTIMUS,
        layers=_TOKEN,
        mpp=_AT_20X,
        licence=_CC,
        stores_weights=False,
        hub="bioptimus/H-optimus-1",
        trident={"class": ("hoptimus1",)},
    ),
    "h0-mini": Preset(
        "timm/vit_base_patch14_reg4_dinov2",
        _H0_MINI,
        _OPTIMUS,
        layers=_TOKEN_MEAN,
        mpp=_AT_20X,
        licence=_CC,
        stores_weights=False,
        hub="bioptimus/H0-mini",
        trident={"class_mean": ("h0-mini",), "class": ("h0-mini",)},
    ),
    "gpfm": Preset(
        "timm/vit_large_patch14_dinov2",
        {"img_size": 224, **_INIT},
        _AT_224,
        layers=_TOKEN,
        licence=_CC,
        stores_weights=False,
        hub="majiabo/GPFM",
        trident={"class": ("gpfm",)},
    ),
    "lunit-s16": Preset(
        "timm/vit_small_patch16_224",
        transform=_LUNIT,
        layers=_TOKEN,
        mpp=_AT_20X,
        licence="non-commercial",
        stores_weights=False,
        hub="1aurent/vit_small_patch16_224.lunit_dino",
    ),
    "lunit-s8": Preset(
        "timm/vit_small_patch8_224",
        transform=_LUNIT,
        layers=_TOKEN,
        mpp=_AT_20X,
        licence="non-commercial",
        stores_weights=False,
        hub="1aurent/vit_small_patch8_224.lunit_dino",
        trident={"class": ("lunit-vits8",)},
    ),
}
"""The encoders by name, as `model.image_encoder` gives it. timm/NAME is every timm model beside them."""
