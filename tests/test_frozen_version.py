"""A version of a frozen encoder: learnt tensors in one file, the encoder's apart or nowhere; earlier schemas load."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from random_version import frozen_version, random_version
from safetensors.torch import load_file, save_file
from small_table import empty_manifest

from mclstexp.config import override
from mclstexp.errors import ModelError, RunError
from mclstexp.evaluation.evaluate import _notes
from mclstexp.model.embed import fixed_turns, head_of, network_of
from mclstexp.model.frozen import ENCODERS_VARIABLE, FrozenEncoder, frozen_encoder
from mclstexp.model.presets import PRESETS
from mclstexp.model.towers import ImageTower, TwoTowers
from mclstexp.model.version import ModelVersion

CPU = torch.device("cpu")
TILES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)


def _gated(version: ModelVersion) -> ModelVersion:
    """Returns the version as if its encoder's licence allowed no copy."""
    assert version.encoder is not None
    record = version.encoder.record.model_copy(update={"stores_weights": False, "licence": "CC-BY-NC-ND-4.0"})
    version.encoder = FrozenEncoder(record, version.encoder.state())
    return version


def _saved(version: ModelVersion, folder: Path) -> Path:
    folder.mkdir()
    version.save(folder)
    return folder


def _embedded(version: ModelVersion) -> np.ndarray:
    return network_of(version).build(CPU)(TILES)


def _update_checksums(folder: Path, names: list[str]) -> None:
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "files.json").write_text(json.dumps(files))


def test_a_version_says_which_blocks_of_features_it_needs() -> None:
    version = frozen_version()
    assert version.needed_blocks() == {"image/pooled": 128}
    model = version.config.model.model_copy(
        update={"image_views": ("image_wide", "image"), "image_layers": ("third", "pooled")}
    )
    version.config, version.encoder = version.config.model_copy(update={"model": model}), frozen_encoder(model, 32, 2)
    wide, plain = ({f"{view}/third": 96, f"{view}/pooled": 128} for view in ("image_wide", "image"))
    assert list(version.needed_blocks().items()) == list((wide | plain).items())
    assert random_version().needed_blocks() == {}


def test_a_version_holds_what_was_learnt_and_its_encoder_apart(tmp_path: Path) -> None:
    version = frozen_version()
    folder = _saved(version, tmp_path / "version")
    assert not any(name.startswith("image_tower.") for name in load_file(folder / "weights.safetensors"))
    loaded = ModelVersion.load(folder)
    assert loaded.encoder is not None
    assert version.encoder is not None
    assert loaded.encoder.record == version.encoder.record
    assert set(load_file(folder / "encoder.safetensors")) == set(version.encoder.state())
    assert np.array_equal(_embedded(loaded), _embedded(version))


def test_the_head_on_features_answers_as_the_whole_network_does(tmp_path: Path) -> None:
    version = ModelVersion.load(_saved(frozen_version(), tmp_path / "version"))
    assert version.encoder is not None
    tower = ImageTower(version.config.model, 32).eval()
    tower.encoder.load_state_dict(version.encoder.state())
    with torch.inference_mode():
        features = tower(torch.from_numpy(TILES).permute(0, 3, 1, 2) / 255).numpy()
    assert head_of(version).build(CPU)(features) == pytest.approx(_embedded(version), abs=1e-5)


def test_an_encoder_whose_licence_allows_no_copy_is_found_by_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = _gated(frozen_version())
    folder = _saved(version, tmp_path / "version")
    assert not (folder / "encoder.safetensors").exists()
    loaded = ModelVersion.load(folder)
    assert head_of(loaded).num_features == 128  # needs no encoder
    monkeypatch.delenv(ENCODERS_VARIABLE, raising=False)
    with pytest.raises(ModelError, match=r"small_cnn with digest \w+\.\.\. are not at hand"):
        network_of(loaded)
    assert version.encoder is not None
    save_file(version.encoder.state(), tmp_path / f"{version.encoder.record.digest}.safetensors")
    monkeypatch.setenv(ENCODERS_VARIABLE, str(tmp_path))
    assert np.array_equal(_embedded(loaded), _embedded(version))


def test_stored_tensors_of_another_encoder_are_refused_though_the_checksums_fit(tmp_path: Path) -> None:
    version = frozen_version()
    folder = _saved(version, tmp_path / "version")
    other = frozen_encoder(version.config.model, 32, 3)
    save_file(other.state(), folder / "encoder.safetensors")
    _update_checksums(folder, [path.name for path in folder.iterdir() if path.name != "files.json"])
    assert version.encoder is not None
    digests = rf"{other.record.digest[:12]}\.\.\., the recorded one {version.encoder.record.digest[:12]}"
    with pytest.raises(ModelError, match=digests):
        ModelVersion.load(folder)


def test_tiles_that_would_reach_the_encoder_in_another_way_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = ModelVersion.load(_saved(frozen_version(), tmp_path / "version"))
    preset = PRESETS["small_cnn"]
    changed = replace(preset, transform=replace(preset.transform, mean=(0.5, 0.5, 0.5)))
    monkeypatch.setitem(PRESETS, "small_cnn", changed)
    assert head_of(loaded).num_features == 128  # stored features are as they were
    with pytest.raises(ModelError, match=r"small_cnn saw tiles .* less \(0\.485, .* give it tiles .* less \(0\.5, "):
        network_of(loaded)


def test_weights_that_a_job_is_given_are_taken_or_refused(tmp_path: Path) -> None:
    version, trained = _gated(frozen_version()), random_version()
    loaded = ModelVersion.load(_saved(version, tmp_path / "version"))
    assert version.encoder is not None
    save_file(version.encoder.state(), tmp_path / "own.safetensors")
    save_file(frozen_encoder(version.config.model, 32, 3).state(), tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"other\.safetensors is not the encoder that the features and the model"):
        loaded.use_weights(str(tmp_path / "other.safetensors"))
    loaded.use_weights(str(tmp_path / "own.safetensors"))
    assert np.array_equal(_embedded(loaded), _embedded(version))
    trained.use_weights("random")
    with pytest.raises(ModelError, match="the model trained its image encoder and contains it"):
        trained.use_weights("other.safetensors")


def test_version_and_card_bear_the_licence_of_the_pretrained_weights(tmp_path: Path) -> None:
    manifest, version = empty_manifest(), random_version()
    assert (version.licence, [note for note in _notes(version, manifest, (), {}) if "licence" in note]) == ("", [])
    settings = {"model.image_encoder": "uni2-h", "model.image_weights": "uni2-h.bin"}
    version.config = override(version.config, settings)
    assert version.licence == "CC-BY-NC-ND-4.0"
    expected = "the image encoder, uni2-h, began with weights under this licence: CC-BY-NC-ND-4.0"
    assert expected in _notes(version, manifest, (), {})


@pytest.mark.parametrize("stored", [True, False])
def test_a_trained_encoder_is_always_among_the_weights(
    tmp_path: Path, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = random_version()
    if not stored:  # a licence that allows no copy of the pretrained weights
        preset = PRESETS["lunit-s16"]
        shallow = replace(preset, arguments={**preset.arguments, "depth": 1})
        monkeypatch.setitem(PRESETS, "lunit-s16", shallow)
        version.config = override(version.config, {"model.image_encoder": "lunit-s16"})
        version.weights = TwoTowers(version.config.model, 3, 0, 32).state_dict()
    folder = _saved(version, tmp_path / "version")
    assert ModelVersion.load(folder).encoder is None
    assert any(name.startswith("image_tower.") for name in load_file(folder / "weights.safetensors"))


def test_an_encoder_with_a_number_that_is_not_finite_is_neither_saved_nor_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = frozen_version()
    assert version.encoder is not None
    name = next(iter(version.encoder.state()))
    version.encoder.state()[name].view(-1)[0] = float("nan")
    with pytest.raises(RunError, match=f"the weight {name} of the frozen encoder is not finite"):
        version.save(tmp_path)
    with monkeypatch.context() as unchecked:
        unchecked.setattr(ModelVersion, "_not_finite", lambda self: None)
        folder = _saved(version, tmp_path / "version")
    with pytest.raises(ModelError, match=r"is not the version's frozen encoder"):
        ModelVersion.load(folder)


def test_a_bank_of_another_frozen_encoder_is_refused_with_both_digests(tmp_path: Path) -> None:
    version = frozen_version()
    folder = _saved(version, tmp_path / "version")
    assert version.encoder is not None
    other = frozen_encoder(version.config.model, 32, 3)
    record = json.loads((folder / "model.json").read_text())
    record["encoder"] = json.loads(other.record.model_dump_json())
    (folder / "model.json").write_text(json.dumps(record))
    save_file(other.state(), folder / "encoder.safetensors")
    _update_checksums(folder, list(json.loads((folder / "files.json").read_text())))
    digests = (each.record.digest[:12] for each in (version.encoder, other))
    with pytest.raises(ModelError, match="made for a frozen encoder with digest {}.* with digest {}".format(*digests)):
        ModelVersion.load(folder)


@pytest.mark.parametrize("turns", [False, True])
def test_a_frozen_version_of_schema_4_loads_and_answers_equally(tmp_path: Path, turns: bool) -> None:
    """It mixed the frozen encoder, under its former names, with what was learnt; some turned tiles before."""
    version = frozen_version()
    assert version.encoder is not None
    folder = _saved(version, tmp_path / "version")
    former = {
        f"image_tower.encoder.features.{name.removeprefix('network.')}": value
        for name, value in version.encoder.state().items()
    }
    save_file({**version.weights, **former}, folder / "weights.safetensors")
    (folder / "encoder.safetensors").unlink()
    record = json.loads((folder / "model.json").read_text())
    for setting in ("image_layers", "image_views", "feature_dtype"):
        del record["config"]["model"][setting]
    record["config"]["model"] |= {"input_scaling": "imagenet", "test_turns": turns}
    del record["encoder"], record["wide"]
    (folder / "model.json").write_text(json.dumps(record | {"schema_version": 4}))
    assert version.bank is not None
    names = ["model.json", "weights.safetensors", "bank.safetensors", "bank_donors.parquet"]
    sha = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    made_for = version._identity(folder) | {"weights": f"with SHA-256 {sha[:12]}..."}
    del made_for["a frozen encoder"]
    version.bank.save(folder, made_for)
    _update_checksums(folder, names)
    loaded = ModelVersion.load(folder)
    if turns:
        assert loaded.encoder is None
        assert loaded.towers().config.test_turns
        assert np.array_equal(_embedded(loaded), network_of(version).build(CPU)(fixed_turns(TILES)))
        return
    assert loaded.encoder is not None
    assert loaded.encoder.record.digest == version.encoder.record.digest
    assert loaded.weights.keys() == version.weights.keys()
    assert np.array_equal(_embedded(loaded), _embedded(version))
