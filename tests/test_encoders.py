"""Image encoders: the right features, weights from files, and refusals that name the setting."""

import importlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file

from mclstexp.errors import ConfigError, ModelError
from mclstexp.model.encoders import PooledEncoder, build_encoder
from mclstexp.model.presets import PRESETS
from mclstexp.model.weights import load_weights, require_encoder
from mclstexp.settings import ModelConfig


def _loaded(name: str, weights: str, tile_size_px: int) -> PooledEncoder:
    encoder = build_encoder(name, tile_size_px)
    load_weights(encoder, ModelConfig(image_encoder=name, image_weights=weights))
    return encoder


@pytest.mark.parametrize(
    ("name", "features"),
    [("densenet121", 1024), ("resnet18", 512), ("resnet50", 2048), ("vit_b_16", 768), ("small_cnn", 128)],
)
def test_every_encoder_maps_images_to_its_features(name: str, features: int) -> None:
    encoder = build_encoder(name, 32)
    with torch.no_grad():
        found = encoder.eval()(torch.rand(2, 3, 32, 32))
    assert (encoder.num_features, tuple(found.shape)) == (features, (2, features))


@pytest.mark.parametrize(
    ("name", "features"),
    [("timm/resnet10t", 512), ("timm/vit_tiny_patch16_224", 192), ("timm/mobilenetv3_small_050", 1024)],
)
def test_any_timm_model_is_an_encoder_with_random_weights_or_a_file(name: str, features: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = build_encoder(name, 32)
    torch.save(source.state_dict() | {"head.bias": torch.zeros(7)}, tmp_path / "timm.pth")  # a classifier is dropped
    encoder = _loaded(name, str(tmp_path / "timm.pth"), 32)
    with torch.no_grad():
        found, expected = (network.eval()(torch.ones(2, 3, 32, 32)) for network in (encoder, source))
    assert (encoder.num_features, tuple(found.shape)) == (features, (2, features))
    assert torch.equal(found, expected)


def test_densenet_ends_at_its_last_norm_without_relu() -> None:
    encoder = build_encoder("densenet121", 64)
    whole = torchvision.models.densenet121()
    whole.features.load_state_dict(encoder.network.state_dict())
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        found, maps = encoder.eval()(images), whole.eval().features(images)
    torch.testing.assert_close(found, maps.mean(dim=(2, 3)))
    assert (found < F.relu(maps).mean(dim=(2, 3)) - 1e-6).any()


@pytest.mark.parametrize("layout", ["whole", "features", "own"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_load_from_files_of_each_layout(layout: str, suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    whole = torchvision.models.densenet121()
    state = {
        "whole": whole.state_dict(),
        "features": whole.features.state_dict(),
        "own": {f"features.{name}": value for name, value in whole.features.state_dict().items()},
    }[layout]
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    encoder = _loaded("densenet121", str(path), 64)
    assert all(torch.equal(value, whole.features.state_dict()[k]) for k, value in encoder.network.state_dict().items())


def test_files_older_than_batch_counters_load(tmp_path: Path) -> None:
    state = torchvision.models.densenet121().state_dict()
    torch.save({name: value for name, value in state.items() if "num_batches" not in name}, tmp_path / "old.pth")
    encoder = _loaded("densenet121", str(tmp_path / "old.pth"), 64)
    assert torch.equal(encoder.network.conv0.weight, state["features.conv0.weight"])
    torch.save({name: value for name, value in state.items() if "norm1.weight" not in name}, tmp_path / "cut.pth")
    with pytest.raises(ModelError, match=r"norm1\.weight"):
        _loaded("densenet121", str(tmp_path / "cut.pth"), 64)


def test_weights_of_another_architecture_are_named(tmp_path: Path) -> None:
    path = tmp_path / "resnet.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    with pytest.raises(
        ModelError, match=r"do not fit the encoder: tensors are \d+ missing: .* and \d+ more; \d+ left over: .*"
    ):
        _loaded("densenet121", str(path), 64)


class _Canary:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self._path,)


def test_a_weights_file_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(_Canary(tmp_path / "ran")))
    with pytest.raises(ModelError, match="cannot be read as weights"):
        _loaded("small_cnn", str(path), 32)
    assert not (tmp_path / "ran").exists()


def test_imagenet_without_cache_or_network_names_the_file_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    unreachable = type("Weights", (), {"url": "http://127.0.0.1:9/densenet121-a639ec97.pth"})
    monkeypatch.setattr(torchvision.models, "get_weight", lambda name: unreachable)
    with pytest.raises(ModelError, match=r"--model\.image_weights FILE"):
        require_encoder("densenet121", "imagenet")


@pytest.mark.parametrize("check", [require_encoder, lambda name: build_encoder(name, 32)])
def test_an_unknown_encoder_is_refused_with_the_nearest_or_all(check: Callable[[str], object]) -> None:
    with pytest.raises(ConfigError, match=r"image_encoder=densenet is neither .* timm; did you mean densenet121\?"):
        check("densenet")
    with pytest.raises(ConfigError, match=r"known: densenet121, resnet18, resnet50, vit_b_16, small_cnn and \d+ more"):
        check("x")
    with pytest.raises(ConfigError, match=r"timm/resnet10x: timm has no such model; did you mean .*resnet10"):
        check("timm/resnet10x")
    with pytest.raises(ConfigError, match=r"timm/resnet50.supcon: timm has no such tag; known: resnet50\.\w+, "):
        check("timm/resnet50.supcon")


@pytest.mark.parametrize("name", ["timm/inception_v3", "timm/crossvit_9_240"])
def test_tiles_that_a_network_cannot_take_are_refused_by_their_size(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"image_encoder={name} cannot take tiles of 32 px .*use another tiles.size"):
        build_encoder(name, 32)


def test_an_encoder_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "mine", PRESETS["small_cnn"])
    require_encoder("mine")
    assert build_encoder("mine", 32).num_features == 128
    with pytest.raises(ConfigError, match="no ImageNet weights for mine"):
        require_encoder("mine", "imagenet")


@pytest.mark.parametrize("job", ["train", "cross_validate", "tune"])
@pytest.mark.parametrize("name", ["model.image_encoder", "train.positives"])
def test_a_dry_run_refuses_an_unknown_encoder_or_loss_before_it_reads_data(
    job: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"train": [], "cross_validate": ["--protocol", "patient"], "tune": ["--space", "none.yaml"]}[job]
    command = [f"{job}.py", "--data", "nowhere", "--dry-run", f"--{name}", "densenet", *more]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(ConfigError, match=rf"^{name}=densenet is "):
        importlib.import_module(job).main()


def test_sizes_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use 48"):
        build_encoder("vit_b_16", 50)
    with pytest.raises(ModelError, match="no such file"):
        require_encoder("small_cnn", str(tmp_path / "missing.pth"))


def test_published_imagenet_weights_load() -> None:
    data = os.environ.get("MCLSTEXP_DATA")
    path = Path(data or ".").parent / "weights" / "densenet121_imagenet.pth"
    if not data or not path.is_file():
        pytest.skip("MCLSTEXP_DATA names no folder with ImageNet weights beside it")
    encoder = _loaded("densenet121", str(path), 224)
    assert encoder.network.norm5.running_var.std() > 0
