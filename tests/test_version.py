"""A model version is complete or refused, loading it runs no code, and earlier versions load."""

import hashlib
import json
import pickle
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from random_version import GENES, random_version
from safetensors import safe_open
from safetensors.numpy import save_file
from small_table import empty_manifest

from mclstexp.config import override
from mclstexp.data.genes import GenePanel
from mclstexp.errors import ConfigError, ModelError, RunError
from mclstexp.model.embed import network_of
from mclstexp.model.towers import build_network
from mclstexp.model.version import MODEL_SCHEMA, ModelVersion


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "version"
    path.mkdir()
    random_version().save(path)
    return path


def test_a_direct_regression_has_no_bank_and_predicts_its_linear_map(tmp_path: Path) -> None:
    source = random_version()
    config = override(source.config, {"model.predictor": "regression"})
    network = build_network(config.model, 3, 0, 32).eval()
    weights = network.state_dict()
    saved = ModelVersion(config, source.panel, (32, 0.5), 0, source.training, weights, None)
    saved.save(tmp_path)
    loaded = ModelVersion.load(tmp_path)
    tiles = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    found = loaded.predict(network_of(loaded).build(torch.device("cpu"))(tiles), np.zeros((len(tiles), 2)))
    with torch.inference_mode():
        expected = network(torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255).numpy()
    assert found.prediction == pytest.approx(expected, rel=1e-2, abs=1e-2)  # bf16 where it is native
    assert np.isnan(found.similarity).all()


def test_a_direct_regression_with_a_bank_is_refused(tmp_path: Path) -> None:
    source = random_version()
    source.config = override(source.config, {"model.predictor": "regression"})
    source.save(tmp_path)
    with pytest.raises(ModelError, match=r"has a bank, and model\.predictor=regression"):
        ModelVersion.load(tmp_path)


def test_a_loaded_version_equals_the_saved_one(folder: Path) -> None:
    saved, loaded = random_version(), ModelVersion.load(folder)
    assert (loaded.config, loaded.panel, loaded.training) == (saved.config, saved.panel, saved.training)
    assert (loaded.tile_size_px, loaded.mpp, loaded.ood_similarity) == (32, 0.5, 0.25)
    assert (loaded.bank.keys == saved.bank.keys).all()
    assert list(loaded.bank.spot_id) == list(saved.bank.spot_id)
    assert all(torch.equal(saved.weights[name], value) for name, value in loaded.towers().state_dict().items())


def _spoilt(array: str) -> ModelVersion:
    version = random_version()
    assert version.bank is not None
    if array == "weights":
        version.weights["image_head.norm.bias"][3] = float("inf")
    elif array == "threshold":
        version.ood_similarity = float("nan")
    else:
        getattr(version.bank, array)[-1, -1] = np.nan
    return version


@pytest.mark.parametrize("array", ["weights", "keys", "payload", "directions", "threshold"])
def test_numbers_that_are_not_finite_are_neither_saved_nor_loaded(
    array: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = _spoilt(array)
    with pytest.raises(RunError, match="is not finite: training has diverged, and no model version was written"):
        version.save(tmp_path)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as earlier:  # which checked nothing
        earlier.setattr(ModelVersion, "_not_finite", lambda self: None)
        version.save(tmp_path)
    if array == "threshold":  # JSON has no such number: null means that there is none
        return
    with pytest.raises(ModelError, match="is not finite, so no answer would be"):
        ModelVersion.load(tmp_path)


def test_the_same_version_has_the_same_bytes_and_name(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    random_version().save(again)
    assert all((again / path.name).read_bytes() == path.read_bytes() for path in folder.iterdir())
    assert ModelVersion.load(again).digest == ModelVersion.load(folder).digest


@pytest.mark.parametrize("name", ["weights.safetensors", "model.json", "bank.safetensors", "bank_donors.parquet"])
def test_a_missing_or_edited_file_is_named(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data + b" ")
    with pytest.raises(ModelError, match=f"{name} of the model version .* was changed"):
        ModelVersion.load(folder)
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing"):
        ModelVersion.load(folder)


class _Canary:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self._path,)


def test_pickled_weights_are_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    (folder / "weights.safetensors").write_bytes(pickle.dumps(_Canary(canary)))
    files = json.loads((folder / "files.json").read_text())
    files["weights.safetensors"] = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    (folder / "files.json").write_text(json.dumps(files))
    with pytest.raises(ModelError):
        ModelVersion.load(folder)
    assert not canary.exists()


def test_a_list_of_files_that_leaves_one_out_is_refused(folder: Path) -> None:
    files = json.loads((folder / "files.json").read_text())
    del files["weights.safetensors"]
    (folder / "files.json").write_text(json.dumps(files))
    with pytest.raises(ModelError, match=r"does not list weights\.safetensors"):
        ModelVersion.load(folder)


def test_a_table_with_other_tiles_is_refused_with_both_values(folder: Path) -> None:
    model = ModelVersion.load(folder)
    manifest = empty_manifest(mpp=0.509)
    model.require_table(manifest)
    with pytest.raises(ModelError, match=r"takes tiles of 0\.5 um/px, the table has 0\.511"):
        model.require_table(manifest.model_copy(update={"mpp": 0.511}))
    with pytest.raises(ModelError, match="takes tiles of 32 px, the table has 64 px"):
        model.require_table(manifest.model_copy(update={"tile_size_px": 64}))
    with pytest.raises(ModelError, match=r"tiles are jpeg of quality 85, the table's png, .*--tiles.encoding jpeg"):
        model.require_table(manifest.model_copy(update={"encoding": "png"}))
    with pytest.raises(ModelError, match="the table's jpeg of quality 95"):
        model.require_table(manifest.model_copy(update={"jpeg_quality": 95}))


def _rewrite_record(folder: Path, record: dict[str, object]) -> None:
    (folder / "model.json").write_text(json.dumps(record))
    _update_checksums(folder)


def _update_checksums(folder: Path) -> None:
    """Writes the checksums of the files as they are now."""
    names = json.loads((folder / "files.json").read_text())
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "files.json").write_text(json.dumps(files))


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (
            ["bank.safetensors", "bank_donors.parquet"],
            "for weights with SHA-256 {other}.*has weights with SHA-256 {own}",
        ),
        (["weights.safetensors"], "for weights with SHA-256 {own}.*has weights with SHA-256 {other}"),
    ],
)
def test_a_bank_or_weights_of_another_version_are_refused_with_both_values(
    folder: Path, tmp_path: Path, names: list[str], fault: str
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    random_version(1).save(other)
    digests = {
        name: hashlib.sha256((of / "weights.safetensors").read_bytes()).hexdigest()[:12]
        for name, of in (("own", folder), ("other", other))
    }
    for name in names:
        (folder / name).write_bytes((other / name).read_bytes())
    with pytest.raises(ModelError, match=r"was changed after it was saved: it has SHA-256 \w+\.\.\., files\.json says"):
        ModelVersion.load(folder)
    _update_checksums(folder)
    with pytest.raises(ModelError, match=fault.format(**digests)):
        ModelVersion.load(folder)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            {"tile_size_px": 64},
            r"made for tiles of 32 px at 0\.5 um/px, the model version has tiles of 64 px at 0\.5 um/px",
        ),
        ({"mpp": 0.25}, r"tiles of 32 px at 0\.5 um/px, .* tiles of 32 px at 0\.25 um/px"),
        ({"panel": 0}, r"made for a panel of 3 genes with SHA-256 \w+\.\.\., .* has a panel of 3 genes with SHA-256"),
        ({"config": "target"}, r"made for a target in .*, the model version has a target in "),
        ({"config": "input"}, r"made for spots in .*, the model version has spots in "),
    ],
)
def test_a_bank_made_for_other_genes_tiles_or_normalisers_is_refused(
    folder: Path, change: dict[str, object], fault: str
) -> None:
    record = json.loads((folder / "model.json").read_text())
    if "panel" in change:
        change = {"panel": GenePanel(GENES[::-1], ("", "ERBB2", "GATA3"), (GENES[2], "", "")).to_json()}
    if "config" in change:
        genes = record["config"]["genes"] | {change["config"]: "per_gene"}
        change = {"config": record["config"] | {"genes": genes}}
    _rewrite_record(folder, record | change)
    with pytest.raises(ModelError, match=fault):
        ModelVersion.load(folder)


def test_a_bank_that_is_not_listed_is_refused(folder: Path) -> None:
    files = json.loads((folder / "files.json").read_text())
    del files["bank.safetensors"]
    (folder / "files.json").write_text(json.dumps(files))
    with pytest.raises(ModelError, match=r"does not list bank\.safetensors"):
        ModelVersion.load(folder)


def test_another_schema_is_refused(folder: Path) -> None:
    record = json.loads((folder / "model.json").read_text())
    _rewrite_record(folder, record | {"schema_version": 99, "new_field": 1})
    with pytest.raises(ModelError, match=r"model schema 99, this code reads 1, 2, 3, 4, 5, 6; .*jobs/train\.py"):
        ModelVersion.load(folder)


def _write_as_schema(schema: int, folder: Path) -> None:
    """Rewrites a version as the code of an earlier schema did."""
    with safe_open(folder / "bank.safetensors", "numpy") as file:
        notes, arrays = file.metadata(), {name: file.get_tensor(name) for name in ("keys", "payload")}
    save_file(arrays, folder / "bank.safetensors", notes if schema == 3 else None)
    record = json.loads((folder / "model.json").read_text())
    assert (record.pop("schema_version"), record["ood_similarity"]) == (MODEL_SCHEMA, 0.25)
    record["config"]["predict"]["bank_shards"] = 2
    del record["training"]["validation_patients"]
    if schema == 1:
        del record["ood_similarity"], record["config"]["predict"]
    _rewrite_record(folder, record | {"schema_version": schema})


@pytest.mark.parametrize("schema", [1, 2, 3])
def test_a_version_of_an_earlier_schema_loads_and_answers_equally(folder: Path, schema: int) -> None:
    queries = np.random.default_rng(1).normal(size=(40, 256)).astype(np.float32)
    expected = ModelVersion.load(folder).predict(queries, np.zeros((len(queries), 2)))
    _write_as_schema(schema, folder)
    loaded = ModelVersion.load(folder)
    assert loaded.config == random_version().config
    assert loaded.ood_similarity == (None if schema == 1 else 0.25)
    for name, values in vars(loaded.predict(queries, np.zeros((len(queries), 2)))).items():
        assert np.array_equal(values, getattr(expected, name), equal_nan=name == "spread"), name


@pytest.mark.parametrize("schema", [1, 2, 3])
def test_a_bank_says_what_it_was_made_for_from_schema_3_on(folder: Path, schema: int) -> None:
    _write_as_schema(schema, folder)
    record = json.loads((folder / "model.json").read_text())
    _rewrite_record(folder, record | {"mpp": 0.25})
    with pytest.raises(ModelError, match="made for tiles") if schema == 3 else nullcontext():
        ModelVersion.load(folder)


def test_a_recorded_setting_that_never_was_is_refused(folder: Path) -> None:
    record = json.loads((folder / "model.json").read_text())
    record["config"]["predict"]["bank_shard"] = 2
    _rewrite_record(folder, record)
    with pytest.raises(ConfigError, match=r"unknown setting predict\.bank_shard in .*version"):
        ModelVersion.load(folder)
