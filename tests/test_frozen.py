"""Frozen encoders: found by their digest wherever they are, never mixed up with another file."""

import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from feature_tables import plain_table
from safetensors.torch import save_file

from mclstexp import storage
from mclstexp.errors import ModelError
from mclstexp.model import frozen
from mclstexp.model.extractor import Extractor
from mclstexp.model.frozen import ENCODERS_VARIABLE, FrozenEncoder, frozen_encoder
from mclstexp.model.weights import read_weights
from mclstexp.settings import ModelConfig

CONFIG = ModelConfig(image_encoder="small_cnn", freeze_encoder=True)


def _saved(folder: Path, seed: int, suffix: str = ".safetensors") -> tuple[FrozenEncoder, Path]:
    """Returns a frozen encoder read from a file, and the file."""
    state, path = frozen_encoder(CONFIG, 32, seed).state(), folder / f"weights-{seed}{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return frozen_encoder(CONFIG.model_copy(update={"image_weights": str(path)}), 32, 9), path


def test_random_weights_depend_on_the_seed_only() -> None:
    first, again, other = (frozen_encoder(CONFIG, 32, seed) for seed in (0, 0, 1))
    assert first.record == again.record
    assert first.record.digest != other.record.digest
    assert all(torch.equal(value, again.state()[name]) for name, value in first.state().items())


@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_the_digest_is_of_the_tensors_and_not_of_the_file(tmp_path: Path, suffix: str) -> None:
    one, _ = _saved(tmp_path, 0)
    other, path = _saved(tmp_path, 0, suffix)
    assert one.record.digest == other.record.digest == frozen_encoder(CONFIG, 32, 0).record.digest
    assert other.record.uri == str(path)
    assert (one.record.layers, one.record.widths) == (("pooled",), (128,))


def test_a_file_is_read_once_as_long_as_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    monkeypatch.setattr(frozen, "read_weights", lambda *which: reads.append(which[1]) or read_weights(*which))
    (encoder, path), random_state = _saved(tmp_path, 0), torch.get_rng_state()
    config = CONFIG.model_copy(update={"image_weights": str(path), "image_layers": ("third",), "spot_layers": 7})
    again = frozen_encoder(config, 32, 1)
    assert (again.record.digest, again.record.layers) == (encoder.record.digest, ("third",))
    assert reads == [str(path)]
    assert torch.equal(torch.get_rng_state(), random_state), "no network is filled with random numbers"
    save_file(frozen_encoder(CONFIG, 32, 1).state(), path)
    assert frozen_encoder(config, 32, 1).record.digest == frozen_encoder(CONFIG, 32, 1).record.digest
    assert reads == [str(path)] * 2


def test_a_file_gives_the_features_of_the_network_that_it_was_saved_from(tmp_path: Path) -> None:
    """A transformer with buffers that are in no state dict: its rotations by position."""
    torch.manual_seed(0)
    network = timm.create_model("eva02_tiny_patch14_224", num_classes=0, img_size=28).eval()
    assert {name for name, _ in network.named_buffers()} - network.state_dict().keys()
    torch.save({name: value.half() for name, value in network.state_dict().items()}, tmp_path / "half.pth")
    network.load_state_dict({name: value.half() for name, value in network.state_dict().items()})
    config = CONFIG.model_copy(
        update={"image_encoder": "timm/eva02_tiny_patch14_224", "image_weights": str(tmp_path / "half.pth")}
    )
    encoder, tiles = (
        frozen_encoder(config, 28, 1),
        np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8),
    )
    assert {value.dtype for value in encoder.state().values()} == {torch.float32}
    plain = plain_table(encoder=encoder.record, views=("image",), num_draws=0, augmentation="none")
    found = Extractor(encoder.state(), plain, torch.device("cpu"))({"image": tiles}, "S1/0")["image/pooled"]
    mean, std = (torch.tensor(values) for values in (encoder.record.mean, encoder.record.std))
    images = ((torch.from_numpy(tiles) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        assert found == pytest.approx(network(images).numpy(), abs=1e-5)


@pytest.mark.parametrize("where", ["recorded", "environment", "given"])
def test_the_weights_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    encoder, path = _saved(tmp_path, 0)
    expected, lost = encoder.state(), FrozenEncoder(encoder.record)
    if where == "environment":
        (tmp_path / "encoders").mkdir()
        os.rename(path, tmp_path / "encoders" / f"{encoder.record.digest}.safetensors")
        (tmp_path / "encoders" / f"{encoder.record.digest}.json").touch()
        monkeypatch.setenv(ENCODERS_VARIABLE, str(tmp_path / "encoders"))
    if where == "given":
        lost = lost.with_weights(os.rename(path, tmp_path / "x.safetensors") or str(tmp_path / "x.safetensors"))
    assert all(np.array_equal(value, expected[name]) for name, value in lost.state().items())


def test_the_weights_are_found_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    encoder, path = _saved(tmp_path, 0, ".bin")
    storage.write(f"{s3}/encoders/{encoder.record.digest}.bin", path.read_bytes())
    path.unlink()
    monkeypatch.setenv(ENCODERS_VARIABLE, f"{s3}/encoders")
    found = FrozenEncoder(encoder.record).state()
    assert all(torch.equal(value, found[name]) for name, value in encoder.state().items())


def test_a_place_relative_to_this_folder_is_recorded_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = _saved(tmp_path, 0)
    monkeypatch.chdir(tmp_path)
    config = CONFIG.model_copy(update={"image_weights": path.name})
    assert frozen_encoder(config, 32, 0).record.uri == str(path)


def test_random_weights_have_no_licence_and_pretrained_ones_the_preset_s(tmp_path: Path) -> None:
    """lunit-s16, the smallest preset whose licence allows no copy."""
    config = CONFIG.model_copy(update={"image_encoder": "lunit-s16"})
    encoder = frozen_encoder(config, 32, 0)
    assert (encoder.record.licence, encoder.record.stores_weights, encoder.record.hub) == ("", True, None)
    save_file(encoder.state(), tmp_path / "lunit.safetensors")
    config = config.model_copy(update={"image_weights": str(tmp_path / "lunit.safetensors")})
    record = frozen_encoder(config, 32, 0).record
    assert (record.licence, record.stores_weights) == ("non-commercial", False)
    assert record.digest == encoder.record.digest


def test_lost_weights_are_refused_with_where_they_were_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENCODERS_VARIABLE, raising=False)
    encoder, path = _saved(tmp_path, 0)
    path.unlink()
    with pytest.raises(ModelError, match=rf"{ENCODERS_VARIABLE} \(not set\) and the recorded place \({path}\)"):
        FrozenEncoder(encoder.record).state()


@pytest.mark.parametrize("where", ["recorded", "environment", "given"])
def test_another_file_is_refused_with_both_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    encoder, path = _saved(tmp_path, 0)
    other, wrong = _saved(tmp_path, 1)
    lost = FrozenEncoder(encoder.record)
    digests = rf"{other.record.digest[:12]}.*{encoder.record.digest[:12]}"
    if where == "recorded":
        os.replace(wrong, path)
    if where == "environment":
        os.rename(wrong, tmp_path / f"{encoder.record.digest}.safetensors")
        monkeypatch.setenv(ENCODERS_VARIABLE, str(tmp_path))
    with pytest.raises(ModelError, match=digests):
        lost.with_weights(str(wrong)) if where == "given" else lost.state()
