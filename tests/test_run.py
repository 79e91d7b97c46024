"""A run's name and record: which settings make another run, and which runs of earlier versions go on."""

import json
import sys
from pathlib import Path

import cross_validate
import numpy as np
import pytest
import torch
from _encoder import warn_of_encoder
from small_table import make_table

from mclstexp import storage
from mclstexp.config import Config, override
from mclstexp.data.schema import MANIFEST, WIDE_SCHEMA_VERSION, load_manifest
from mclstexp.errors import ConfigError, RunError
from mclstexp.model.frozen import frozen_encoder
from mclstexp.settings import ModelConfig
from mclstexp.training.run import RECORD, Run, former_digest, identity, name_of, open_run, recorded_tiles

SETTINGS: dict[str, object] = {"genes.num_genes": 4, "train.batch_sentences": 2, "split.test_patients": ["C"]}
FREE: dict[str, object] = {
    "cluster.wait_s": 60.0,
    "cluster.local_cpus": 8,
    "tracking.uri": "http://mlflow:5000",
    "train.num_workers": 2,
    "train.max_failures": 0,
    "train.checkpoint_every": 7,
    "storage.endpoint_url": "http://minio:9000",
    "tune.seed": 3,
}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A tile table of three patients."""
    counts = np.random.default_rng(0).integers(1, 9, (4, 8)).astype(np.int32)
    (tmp_path / "table").mkdir()
    manifest = make_table(tmp_path / "table", dict.fromkeys(("A1", "B1", "C1"), counts))
    (tmp_path / "table" / MANIFEST).write_bytes(manifest.model_copy(update={"tile_size_px": 16}).encode())
    return tmp_path / "table"


def _open(table: Path, name: str | None = None, **changed: object) -> Run:
    config = override(Config(), SETTINGS | changed)
    return open_run(str(table), str(table.parent / "runs"), name, config, lambda *_: "untracked")


@pytest.mark.parametrize("setting", [*FREE, "all"])
def test_a_run_without_a_name_goes_on_under_settings_that_its_result_does_not_depend_on(
    table: Path, setting: str
) -> None:
    changed = FREE if setting == "all" else {setting: FREE[setting]}
    assert _open(table, **changed).name == _open(table).name


@pytest.mark.parametrize(
    "changed", [{"train.seed": 1}, {"model.temperature": 0.2}, {"retrieval.k": 3}, {"split.test_patients": ["B"]}]
)
def test_a_run_without_a_name_is_another_one_under_settings_that_its_result_depends_on(
    table: Path, changed: dict[str, object]
) -> None:
    assert _open(table, **changed).name != _open(table).name


def test_former_names_are_those_of_earlier_versions() -> None:
    as_then = override(Config(), {"tiles.jpeg_quality": 90})
    assert former_digest(as_then) == "f4089b4ff354"
    assert former_digest(override(as_then, SETTINGS)) == "ae31a08a9ff3"


def test_a_run_goes_on_under_the_default_name_of_earlier_versions(table: Path) -> None:
    run = _open(table)
    former = f"run-{former_digest(run.config)}-{run.manifest.digest()[:6]}"
    assert former != run.name
    Path(run.uri).rename(table.parent / "runs" / former)
    assert _open(table).name == former
    assert _open(table, **{"train.seed": 1}).name != former
    assert _open(table).name == former, "another run may not hide it"


def test_a_run_from_before_a_setting_goes_on_under_its_default_and_is_refused_under_another(table: Path) -> None:
    run = _open(table)
    assert "min_sections" not in json.loads(Path(run.uri, RECORD).read_text())["identity"]["genes"], "as before it"
    assert _open(table, **{"genes.min_sections": 0.8}).name == run.name
    assert _open(table, **{"genes.min_sections": 0.5}).name != run.name
    with pytest.raises(RunError, match=r"genes\.min_sections: 0\.8 -> 0\.5"):
        _open(table, run.name, **{"genes.min_sections": 0.5})


def test_the_default_name_of_earlier_versions_is_not_taken_from_a_run_of_other_settings(table: Path) -> None:
    run = _open(table)
    former = f"run-{former_digest(run.config)}-{run.manifest.digest()[:6]}"
    Path(run.uri).rename(table.parent / "runs" / former)
    record = table.parent / "runs" / former / RECORD
    tree = json.loads(record.read_text())
    tree["identity"]["train"]["seed"] = 9
    record.write_text(json.dumps(tree))
    assert _open(table).name == run.name


def test_a_run_name_with_other_settings_is_refused(table: Path) -> None:
    _open(table, "first")
    with pytest.raises(RunError, match=r"train\.tower_lr: 0\.0001 -> 0\.5"):
        _open(table, "first", **{"train.tower_lr": 0.5})


def test_a_run_gets_another_mlflow_run_where_the_tracking_store_has_changed(table: Path) -> None:
    config, folder = override(Config(), SETTINGS), str(table.parent / "runs")
    recorded_ids: list[str | None] = []

    def track(config: Config, name: str, recorded: str | None) -> str:
        recorded_ids.append(recorded)
        return "first" if recorded is None else "second"

    assert open_run(str(table), folder, "run", config, track).mlflow_run_id == "first"
    assert open_run(str(table), folder, "run", config, track).mlflow_run_id == "second"
    record = json.loads(storage.read(f"{folder}/run/{RECORD}"))
    assert (record["mlflow_run_id"], recorded_ids) == ("second", [None, "first"])


def test_a_name_depends_on_every_part_of_the_request(table: Path) -> None:
    run = _open(table)
    request = {"identity": identity(run.config), "manifest_digest": run.manifest.digest()}
    assert name_of("run", request) == run.name
    others = [{"manifest_digest": "a" * 12}, {"manifest_digest": "b" * 12}, {"identity": {"train": {"seed": 1}}}]
    assert len({name_of("run", request | other) for other in ({}, *others)}) == 4


def test_a_version_knows_how_the_tables_tiles_were_cut(table: Path) -> None:
    run = _open(table, **{"tiles.size_px": 64})
    tiles = run.config.tiles.model_dump()
    assert {f"tiles.{name}": tiles[name] for name in tiles if f"tiles.{name}" in recorded_tiles(run.manifest)} == (
        recorded_tiles(run.manifest)
    )


FROZEN: dict[str, object] = {"model.image_encoder": "small_cnn", "model.freeze_encoder": True}


def _with_wide_view(table: Path) -> None:
    manifest = load_manifest(str(table))
    wide = {"schema_version": WIDE_SCHEMA_VERSION, "wide_px": 112, "wide_mpp": 618 / 112}
    (table / MANIFEST).write_bytes(manifest.model_copy(update=wide).encode())


def test_all_views_are_those_that_the_table_has(table: Path) -> None:
    run = _open(table, **FROZEN, **{"model.image_views": ["all"]})
    assert run.config.model.image_views == ("image",)
    assert run.name == _open(table, **FROZEN).name, "one run, whichever way it was asked for"
    assert run.config.tiles.wide_um is None, "as the table was cut, not as tables are by default"
    with pytest.raises(ConfigError, match=r"needs the view image_wide, the tile table has image; .*tiles\.wide_um 618"):
        _open(table, **FROZEN, **{"model.image_views": ["image", "image_wide"]})

    _with_wide_view(table)
    run = _open(table, **FROZEN, **{"model.image_views": ["all"], "tiles.wide_um": None, "tiles.wide_px": 64})
    assert run.config.model.image_views == ("image", "image_wide")
    assert (run.config.tiles.wide_um, run.config.tiles.wide_px) == (618.0, 112)
    record = json.loads(Path(run.uri, RECORD).read_text())
    assert record["identity"]["model"]["image_views"] == ["image", "image_wide"]


def test_a_cross_validation_plans_with_the_views_that_the_table_has(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["cross_validate.py", "--data", str(table), "--protocol", "patient", "--dry-run"]
    monkeypatch.setattr(sys, "argv", command)
    cross_validate.main()
    assert "\n  image_views:\n  - image\n  feature_dtype" in capsys.readouterr().out
    _with_wide_view(table)
    cross_validate.main()
    assert "\n  image_views:\n  - image\n  - image_wide\n  feature_dtype" in capsys.readouterr().out


def test_all_views_are_asked_for_alone_and_of_a_frozen_encoder() -> None:
    with pytest.raises(ConfigError, match="all,image names views beside `all`"):
        override(Config(), FROZEN | {"model.image_views": ["all", "image"]})
    with pytest.raises(ConfigError, match=r"model\.image_views=all needs model\.freeze_encoder=true"):
        override(Config(), {"model.image_views": ["all"]})


@pytest.mark.parametrize("wide", [False, True])
def test_a_table_without_a_wide_view_is_a_warning_with_its_cost(
    table: Path, wide: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if wide:
        _with_wide_view(table)
    manifest = load_manifest(str(table))
    model = ModelConfig(image_encoder="small_cnn", image_views=("all",))
    warn_of_encoder(model, manifest)
    warning = "the tile table has no wide view, and the model does without: in our four tests that changed PCC all by "
    shown = capsys.readouterr().err
    assert (warning in shown) == (not wide)
    assert ("jobs/prepare.py --tiles.wide_um 618" in shown) == (not wide)
    warn_of_encoder(model.model_copy(update={"image_views": ("image",)}), manifest)
    assert warning not in capsys.readouterr().err, "asked for"


def test_the_scaling_of_the_first_encoders_goes_under_the_name_that_it_had() -> None:
    named = override(Config(), {"model.input_scaling": "imagenet"})
    assert identity(Config()) == identity(named)
    assert former_digest(Config()) == former_digest(named)
    timm = {"model.image_encoder": "timm/vit_tiny_patch16_224"}  # its own scaling is another one
    assert identity(override(Config(), timm)) != identity(override(named, timm))


def test_the_former_name_of_a_run_with_open_cores_is_that_of_one_core() -> None:
    one, two = (override(Config(), {"train.cpus_per_worker": number}) for number in (1, 2))
    assert former_digest(Config()) == former_digest(one) != former_digest(two)


def test_a_run_goes_on_with_the_encoder_that_it_began_with_alone(table: Path, tmp_path: Path) -> None:
    """Wherever its weights are: the file at a place may change."""
    first, other = (frozen_encoder(ModelConfig(image_encoder="small_cnn"), 16, seed) for seed in (1, 2))
    path = tmp_path / "weights.pth"
    settings = {"model.image_encoder": "small_cnn", "model.freeze_encoder": True, "model.image_weights": str(path)}
    torch.save(first.state(), path)
    run = _open(table, "mine", **settings)
    torch.save(other.state(), path)
    with pytest.raises(RunError, match=rf"image encoder: {first.record.digest} -> {other.record.digest}\); give an"):
        _open(table, "mine", **settings)
    record = Path(run.uri, RECORD)
    tree = json.loads(record.read_text())
    assert tree.pop("encoder_digest") == first.record.digest
    record.write_text(json.dumps(tree))  # as earlier versions wrote it
    assert _open(table, "mine", **settings).encoder.record.digest == other.record.digest
