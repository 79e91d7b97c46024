"""Presets: the layouts that pathology encoders are published in, timm's own forward, and their page in the docs."""

from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from torch import nn

from mclstexp.model.encoders import build_encoder, layer_widths, preset_of, resolution_warning, transform_of
from mclstexp.model.presets import IMAGENET_MEAN, IMAGENET_STD, PRESETS
from mclstexp.model.towers import ImageTower
from mclstexp.model.weights import load_weights
from mclstexp.settings import ModelConfig

IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
LUNIT = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))
SWIGLU: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "init_values": 1e-5}
UNI2: dict[str, Any] = {
    "img_size": 224,
    "depth": 24,
    "num_heads": 24,
    "embed_dim": 1536,
    "mlp_ratio": 2 * 2.66667,
    "no_embed_class": True,
    "reg_tokens": 8,
    **SWIGLU,
}
PUBLISHED: dict[str, tuple[str, dict[str, Any], str, int, tuple[Any, Any], float]] = {
    "uni": ("vit_large_patch16_224", {"init_values": 1e-5}, "class", 1024, IMAGENET, 303.35),
    "uni2-h": ("vit_giant_patch14_224", UNI2, "class", 1536, IMAGENET, 681.39),
    "virchow": ("vit_huge_patch14_224", {"mlp_ratio": 5.3375, **SWIGLU}, "mean", 2560, IMAGENET, 631.23),
    "virchow2": (
        "vit_huge_patch14_224",
        {"mlp_ratio": 5.3375, "reg_tokens": 4, **SWIGLU},
        "mean",
        2560,
        IMAGENET,
        631.24,
    ),
    "gigapath": (
        "vit_giant_patch14_dinov2",
        {"patch_size": 16, "img_size": 224, "init_values": 1e-5},
        "class",
        1536,
        IMAGENET,
        1134.95,
    ),
    "gigapath-flash": ("vit_small_patch16_224", {"mlp_ratio": 2048 / 384, **SWIGLU}, "class", 384, IMAGENET, 0),
    "h-optimus-0": (
        "vit_giant_patch14_reg4_dinov2",
        {"img_size": 224, "init_values": 1e-5},
        "class",
        1536,
        OPTIMUS,
        1134.77,
    ),
    "h-optimus-1": (
        "vit_giant_patch14_reg4_dinov2",
        {"img_size": 224, "init_values": 1e-5},
        "class",
        1536,
        OPTIMUS,
        1134.77,
    ),
    "h0-mini": (
        "vit_base_patch14_reg4_dinov2",
        {"img_size": 224, "mlp_ratio": 5.33334, **SWIGLU},
        "mean",
        1536,
        OPTIMUS,
        85.74,
    ),
    "gpfm": ("vit_large_patch14_dinov2", {"img_size": 224, "init_values": 1e-5}, "class", 1024, IMAGENET, 303.23),
    "lunit-s16": ("vit_small_patch16_224", {}, "class", 384, LUNIT, 21.67),
    "lunit-s8": ("vit_small_patch8_224", {}, "class", 384, LUNIT, 21.67),
}
"""Of each model card: timm name, arguments, pooled feature, its width, mean and deviation, millions of parameters."""
REGISTERS = {"uni2-h": 8, "virchow2": 4, "h-optimus-0": 4, "h-optimus-1": 4, "h0-mini": 4}


def _published(name: str, **changes: Any) -> Any:
    network, arguments, *_ = PUBLISHED[name]
    return timm.create_model(network, num_classes=0, **arguments | changes).eval()


def _reference(name: str, network: Any, images: torch.Tensor) -> torch.Tensor:
    """The feature as the model card computes it from timm's forward, of tiles in [0, 1]."""
    pooling, (mean, std) = PUBLISHED[name][2], PUBLISHED[name][4]
    crop = name.startswith("gigapath")
    edge = 256 if crop else 224
    if images.shape[-1] != edge:
        images = F.interpolate(images, (edge, edge), mode="bicubic", antialias=True).clamp(0, 1)
    images = images[..., 16:240, 16:240] if crop else images
    images = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    if pooling == "class":
        return network(images)  # timm's own pooling of the class token
    tokens = network.forward_features(images)
    return torch.cat([tokens[:, 0], tokens[:, 1 + REGISTERS.get(name, 0) :].mean(1)], dim=1)


def test_every_published_encoder_of_timm_is_a_preset() -> None:
    assert {name for name, preset in PRESETS.items() if preset.build.startswith("timm/")} == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_that_are_published(name: str) -> None:
    with torch.device("meta"):
        published, encoder = _published(name).state_dict(), build_encoder(name, 224)
    own = encoder.network.state_dict()
    assert {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in published.items()}
    assert encoder.widths == (PUBLISHED[name][3],) == layer_widths(name, 96)[1]
    millions = sum(value.numel() for value in encoder.parameters()) / 1e6
    assert PUBLISHED[name][5] in (0, pytest.approx(millions, abs=0.05))


@pytest.mark.parametrize(("name", "suffix"), [*zip(PUBLISHED, cycle((".safetensors", ".bin")), strict=False)])
def test_a_published_file_loads_strictly_and_gives_the_card_s_feature(
    name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller: dict[str, Any] = {"depth": 2, "embed_dim": 96, "num_heads": 4}
    preset = PRESETS[name]
    monkeypatch.setitem(PRESETS, f"small-{name}", replace(preset, arguments={**preset.arguments, **smaller}))
    torch.manual_seed(1)
    published, path = _published(name, **smaller), tmp_path / f"weights{suffix}"
    for value in published.parameters():
        nn.init.normal_(value, std=0.1)  # layer scales of 1e-5 would hide a wrong block
    if suffix == ".bin":
        torch.save(published.state_dict(), path)
    else:
        save_file(published.state_dict(), path)

    config = ModelConfig(image_encoder=f"small-{name}", image_weights=str(path))
    tower = ImageTower(config, 112).eval()
    load_weights(tower.encoder, config)
    images = torch.rand(2, 3, 112, 112)
    with torch.no_grad():
        torch.testing.assert_close(tower(images), _reference(name, published, images), rtol=1e-4, atol=1e-5)


def test_both_poolings_of_a_transformer_are_on_offer() -> None:
    assert layer_widths("h0-mini", 224, ("class", "class_mean")) == (("class", "class_mean"), (768, 1536))
    assert layer_widths("densenet121", 224, ("transition2", "norm"))[1] == (256, 1024)


def test_a_network_for_one_size_has_other_tiles_resized_to_it() -> None:
    assert transform_of("vit_b_16", 64).resize_px == transform_of("timm/vit_tiny_patch16_224", 64).resize_px == 64
    assert transform_of("densenet121", 64).resize_px is None
    assert transform_of("uni", 64).resize_px == 224
    tower = ImageTower(ModelConfig(image_encoder="vit_b_16"), 32)
    assert tower(torch.rand(1, 3, 48, 48)).shape == (1, 768)


def test_a_timm_model_has_its_own_scaling_and_licence() -> None:
    masked = preset_of("timm/vit_base_patch16_224.mae")
    assert (masked.licence, masked.stores_weights) == ("cc-by-nc-4.0", False)
    plain = preset_of("timm/vit_tiny_patch16_224")
    assert (plain.transform.mean, plain.stores_weights, plain.licence) == ((0.5, 0.5, 0.5), True, "apache-2.0")


@pytest.mark.parametrize(("tile_size_px", "mpp"), [(224, 0.5), (224, 0.34), (224, 0.74), (112, 1.0)])
def test_a_resolution_near_the_training_s_is_no_warning(tile_size_px: int, mpp: float) -> None:
    assert resolution_warning("uni", tile_size_px, mpp) is None


def test_a_resolution_far_from_the_training_s_names_the_setting() -> None:
    assert resolution_warning("densenet121", 224, 9.0) is None
    assert resolution_warning("virchow2", 224, 2.9) is None
    warning = resolution_warning("uni", 112, 0.5) or ""
    assert "as 0.25 um per pixel, and was trained at 0.5" in warning
    assert warning.endswith("tiles.mpp=1")
    assert (resolution_warning("virchow2", 224, 3.1) or "").endswith("tiles.mpp=2")


def _row(name: str) -> str:
    """The row of a preset in docs/encoders.md."""
    preset = PRESETS[name]
    layers, widths = layer_widths(name, 224, preset.layers)
    transform = preset.transform
    crop = f", centre {transform.crop_px}" if transform.crop_px else ""
    own_size = "built for their size" if preset.built_for_tiles else "as they are"
    tiles = f"{transform.resize_px} px{crop}" if transform.resize_px else own_size
    mpp = "any" if preset.mpp is None else " to ".join(f"{value:g}" for value in sorted(set(preset.mpp)))
    return " | ".join(
        (
            f"| `{name}`",
            ", ".join(f"`{layer}` {width:,}" for layer, width in zip(layers, widths, strict=True)),
            tiles,
            mpp,
            preset.licence,
            "yes" if preset.stores_weights else "no",
            f"{preset.hub or '-'} |",
        )
    )


def test_the_page_of_encoders_lists_every_preset_as_it_is() -> None:
    page = (Path(__file__).parents[1] / "docs" / "encoders.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows == [_row(name) for name in PRESETS]
