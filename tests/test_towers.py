"""The towers against NumPy references written from the method's description; padding and empty sentences."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torchvision.transforms.v2 import InterpolationMode

from mclstexp.model.presets import PRESETS, Transform
from mclstexp.model.towers import ImageTower, SpotTower, TwoTowers, feature_width
from mclstexp.settings import ModelConfig

GENES, POSITIONS = 12, 9
VIEWS = ("image", "image_wide")
REFERENCE = ModelConfig(
    image_encoder="small_cnn",
    input_scaling="unit",
    spot_layers=2,
    spot_width=None,
    spot_heads=8,
    spot_head_dim=64,
    spot_ffn_ratio=1.0,
    spot_dropout=0.0,
    position="table",
    embedding_dim=16,
    l2_normalise=False,
    temperature=1.0,
    learn_temperature=False,
)
Weights = dict[str, np.ndarray]


def _weights(module: torch.nn.Module) -> Weights:
    return {name: value.detach().double().numpy() for name, value in module.state_dict().items()}


def _layer_norm(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _softmax(x: np.ndarray) -> np.ndarray:
    power = np.exp(x - x.max(-1, keepdims=True))
    return power / power.sum(-1, keepdims=True)


def _attention(z: np.ndarray, w: Weights, name: str) -> np.ndarray:
    """One bias-free map G -> 3 * 512, eight heads of 64, scores over 8, an output map with bias."""
    query, key, value = np.split(z @ w[f"{name}.qkv.weight"].T, 3, axis=1)
    heads = []
    for head in range(8):
        part = slice(64 * head, 64 * (head + 1))
        heads.append(_softmax(query[:, part] @ key[:, part].T / 8) @ value[:, part])
    return np.concatenate(heads, axis=1) @ w[f"{name}.out.weight"].T + w[f"{name}.out.bias"]


def _head(h: np.ndarray, w: Weights, name: str) -> np.ndarray:
    p = h @ w[f"{name}.project.weight"].T + w[f"{name}.project.bias"]
    return _layer_norm(p + _gelu(p) @ w[f"{name}.refine.weight"].T + w[f"{name}.refine.bias"], w, f"{name}.norm")


def _published_spot_side(expression: np.ndarray, position: np.ndarray, w: Weights) -> np.ndarray:
    z = (
        expression
        + w["spot_tower.position.x.weight"][position[:, 0]]
        + w["spot_tower.position.y.weight"][position[:, 1]]
    )
    for block in ("spot_tower.blocks.0", "spot_tower.blocks.1"):
        z = z + _attention(_layer_norm(z, w, f"{block}.attention_norm"), w, f"{block}.attention")
        inner = _layer_norm(z, w, f"{block}.ffn_norm") @ w[f"{block}.ffn.0.weight"].T + w[f"{block}.ffn.0.bias"]
        z = z + _gelu(inner) @ w[f"{block}.ffn.2.weight"].T + w[f"{block}.ffn.2.bias"]
    return _head(z, w, "spot_head")


def test_the_published_spot_side_equals_its_description() -> None:
    torch.manual_seed(0)
    towers = TwoTowers(REFERENCE, GENES, POSITIONS, 32).eval()
    expression, position = torch.rand(1, 7, GENES), torch.randint(0, POSITIONS, (1, 7, 2))
    found = towers.embed_spots(expression, position.float(), torch.ones(1, 7, dtype=torch.bool))[0]
    expected = _published_spot_side(expression[0].double().numpy(), position[0].numpy(), _weights(towers))
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert towers.logit_scale.item() == pytest.approx(1.0)
    assert not towers.log_scale.requires_grad


def test_the_image_head_equals_its_description() -> None:
    towers = TwoTowers(REFERENCE, GENES, POSITIONS, 32).eval()
    images = torch.rand(3, 3, 32, 32)
    features = towers.image_tower(images).detach().double().numpy()
    expected = _head(features, _weights(towers), "image_head")
    np.testing.assert_allclose(towers.embed_images(images).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_published_visium_input_is_blue_first_from_0_to_255() -> None:
    torch.manual_seed(0)
    tower = ImageTower(ModelConfig(image_encoder="small_cnn", input_scaling="bgr255"), 32).eval()
    tiles = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    seen = []
    tower.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numpy()))
    with torch.no_grad():
        tower(torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255)
    red, green, blue = (tiles[..., channel].astype(float) for channel in range(3))
    np.testing.assert_allclose(seen[0], np.stack([blue, green, red], axis=1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("position", ["sinusoidal", "table", "pixel_table", "none"])
def test_padding_influences_nothing(position: str) -> None:
    config = ModelConfig(image_encoder="small_cnn", spot_width=16, spot_layers=2, position=position)
    towers = TwoTowers(config, GENES, POSITIONS, 32).eval()
    expression, position = torch.rand(2, 6, GENES), torch.randint(0, POSITIONS, (2, 6, 2)).float()
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    before = towers.embed_spots(expression, position, mask)
    other = expression.clone()
    other[0, 4:] = 100.0
    after = towers.embed_spots(other, position, mask)
    assert torch.equal(before[mask], after[mask])
    alone = towers.embed_spots(expression[:1, :4], position[:1, :4], mask[:1, :4])
    torch.testing.assert_close(alone[0], before[0, :4], rtol=1e-4, atol=1e-5)


def test_an_empty_sentence_gives_no_nan() -> None:
    config = ModelConfig(image_encoder="small_cnn", spot_width=16)
    tower = SpotTower(config, GENES, 0)
    features = tower(torch.rand(1, 5, GENES), torch.zeros(1, 5, 2), torch.zeros(1, 5, dtype=torch.bool))
    features.sum().backward()
    assert torch.isfinite(features).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in tower.parameters() if parameter.grad is not None)


def test_position_and_neighbours_change_an_embedding() -> None:
    towers = TwoTowers(ModelConfig(image_encoder="small_cnn", spot_width=16), GENES, 0, 32).eval()
    expression, position, mask = torch.rand(1, 5, GENES), 300 * torch.randn(1, 5, 2), torch.ones(1, 5, dtype=torch.bool)
    base = towers.embed_spots(expression, position, mask)
    assert not torch.allclose(base, towers.embed_spots(expression, position.flip(1), mask))
    changed = expression.clone()
    changed[0, 0] += 1
    assert not torch.allclose(base[0, 1:], towers.embed_spots(changed, position, mask)[0, 1:])


def test_a_learnt_scale_is_capped_and_still_learns() -> None:
    towers = TwoTowers(ModelConfig(image_encoder="small_cnn", spot_width=16), GENES, 0, 32)
    assert towers.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-4)
    with torch.no_grad():
        towers.log_scale.fill_(9.0)
    towers.bound_logit_scale()
    assert towers.logit_scale.item() == pytest.approx(100, rel=1e-4)
    towers.logit_scale.backward()
    assert towers.log_scale.grad.item() > 0


def test_a_frozen_encoder_is_no_part_of_the_network() -> None:
    config = ModelConfig(image_encoder="small_cnn", spot_width=16, freeze_encoder=True, image_views=VIEWS)
    towers = TwoTowers(config, GENES, 0, 32).train()
    assert not [name for name in towers.state_dict() if name.startswith("image_tower.")]
    features = torch.rand(4, feature_width(config, 32))
    assert features.shape[1] == 2 * 128
    embedded = towers.embed_images(features)
    torch.testing.assert_close(embedded, towers.image_head(features))
    embedded.sum().backward()
    assert towers.image_head.project.weight.grad is not None


def test_stored_features_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda call, **_: compiled.append(call.__self__) or call)
    trained, frozen = (ModelConfig(image_encoder="small_cnn", freeze_encoder=freeze) for freeze in (False, True))
    towers = [TwoTowers(config, GENES, 0, 32).image_tower for config in (trained, frozen)]
    for tower in towers:
        tower.compile()
    assert compiled == towers[:1]


def test_tiles_are_resized_cropped_and_normalised_as_the_preset_says(monkeypatch) -> None:
    transform = Transform(resize_px=40, crop_px=32, mean=(0.7, 0.6, 0.5), std=(0.2, 0.3, 0.4))
    preset = replace(PRESETS["small_cnn"], transform=transform)
    monkeypatch.setitem(PRESETS, "small_cnn", preset)
    tower = ImageTower(ModelConfig(image_encoder="small_cnn"), 56).eval()
    picture = (np.random.default_rng(0).random((56, 56, 3)) * 255).astype(np.uint8)
    image = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    resized = tv.resize(image, [40, 40], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    expected = tv.normalize(tv.center_crop(resized, [32, 32]), transform.mean, transform.std)
    with torch.no_grad():
        torch.testing.assert_close(tower(image), tower.encoder(expected))


def test_a_stated_scaling_replaces_the_encoders_own(monkeypatch) -> None:
    preset = replace(PRESETS["small_cnn"], transform=Transform(mean=(0.7, 0.6, 0.5), std=(0.2, 0.3, 0.4)))
    monkeypatch.setitem(PRESETS, "small_cnn", preset)
    images = torch.rand(2, 3, 32, 32)
    tower = ImageTower(ModelConfig(image_encoder="small_cnn", input_scaling="unit"), 32).eval()
    with torch.no_grad():
        torch.testing.assert_close(tower(images), tower.encoder(images))


def test_without_blocks_a_spot_is_embedded_from_its_own_expression() -> None:
    config = ModelConfig(image_encoder="small_cnn", spot_width=None, spot_layers=0, position="none")
    towers = TwoTowers(config, GENES, 0, 32).eval()
    expression = torch.rand(1, 5, GENES)
    mask = torch.ones(1, 5, dtype=torch.bool)
    together = towers.embed_spots(expression, torch.zeros(1, 5, 2), mask)
    alone = towers.embed_spots(expression[:, 2:3], torch.zeros(1, 1, 2), mask[:, :1])
    torch.testing.assert_close(together[:, 2:3], alone)


def test_frozen_batch_norm_keeps_its_statistics_in_training() -> None:
    config = ModelConfig(image_encoder="small_cnn", spot_width=16, batch_norm="frozen")
    towers = TwoTowers(config, GENES, 0, 32).train()
    before = {name: value.clone() for name, value in towers.state_dict().items() if "running" in name}
    towers.embed_images(torch.rand(4, 3, 32, 32))
    assert before
    assert all(torch.equal(value, towers.state_dict()[name]) for name, value in before.items())
    assert towers.training
