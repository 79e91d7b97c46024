"""Cross-validation: every fold holds out what it says, is run once, and fails alone."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import ray
import torch
from random_card import levels_card
from small_table import make_table, random_counts, section_entry

from mclstexp import tracking
from mclstexp.config import Config, override
from mclstexp.data.schema import Manifest, load_manifest
from mclstexp.data.spots import decode_tiles
from mclstexp.data.table import read_sentence
from mclstexp.errors import ConfigError, RunError, SplitError
from mclstexp.evaluation.floors import floor_encoders
from mclstexp.evaluation.save import save_card
from mclstexp.model.extract import features, wanted
from mclstexp.model.towers import ImageTower
from mclstexp.model.version import ModelVersion
from mclstexp.training.run import RECORD as RUN_RECORD
from mclstexp.training.run import former_digest
from tuning import cross_validation
from tuning.cross_validation import (
    LEAK,
    Study,
    collect,
    default_name,
    is_scored,
    make_folds,
    open_study,
    run_folds,
    scored_folds,
)
from tuning.study import open_record

SETTINGS = {
    "genes.num_genes": 20,
    "model.image_encoder": "small_cnn",
    "model.spot_width": 16,
    "model.spot_layers": 1,
    "train.epochs": 1,
    "train.batch_sentences": 2,
    "train.precision": "fp32",
    "retrieval.k": 5,
}


def _config(folder: Path, **changes: object) -> Config:
    return override(Config(), SETTINGS | {"tracking.uri": f"sqlite:///{folder}/mlflow.db"} | changes)


@pytest.mark.ray
def test_each_protocol_holds_out_each_section_or_patient_once(tiles: str, tmp_path: Path) -> None:
    manifest, config = load_manifest(tiles), _config(tmp_path)
    measured = [entry.section_id for entry in manifest.sections if entry.measured]
    folds = make_folds(manifest, config, "reference")
    assert [fold.config.split.test_sections for fold in folds] == [(name,) for name in measured]
    folds = make_folds(manifest, config, "patient")
    assert [fold.config.split.test_patients for fold in folds] == [("P1",), ("P2",), ("P3",)]
    assert {fold.config.split.protocol for fold in folds} == {"patient"}
    assert [fold.name for fold in make_folds(manifest, config, "patient", ["P3", "P2", "P3"])] == ["P3", "P2"]


@pytest.mark.ray
def test_what_cannot_be_folded_is_refused(tiles: str, tmp_path: Path) -> None:
    manifest = load_manifest(tiles)
    with pytest.raises(SplitError, match="no measured patient P9; there are P1, P2, P3"):
        make_folds(manifest, _config(tmp_path), "patient", ["P9"])
    with pytest.raises(SplitError, match=r"leave split\.test_\* empty"):
        make_folds(manifest, _config(tmp_path, **{"split.test_patients": ["P1"]}), "patient")


def _study(tiles: str, folder: Path, config: Config, protocol: str = "patient") -> Study:
    return open_study(
        tiles, f"{folder}/study", protocol, config, lambda recorded: tracking.start_run(config, "study", {}, recorded)
    )


@pytest.mark.ray
def test_a_study_of_another_kind_is_refused(tiles: str, tmp_path: Path, mlflow_template: Path) -> None:
    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    config = _config(tmp_path)
    assert _study(tiles, tmp_path, config) == _study(tiles, tmp_path, config)
    with pytest.raises(RunError, match="another protocol"):
        _study(tiles, tmp_path, config, "reference")
    with pytest.raises(RunError, match="another identity"):
        _study(tiles, tmp_path, _config(tmp_path, **{"train.epochs": 2}))


def _cohort(*patients: str) -> Manifest:
    """A manifest of one measured section per patient, with nothing in it."""
    tiles = {"tile_size_px": 8, "mpp": 1.0, "encoding": "jpeg", "jpeg_quality": 85, "sentence_length": 2}
    genes = {"genes_file": "", "genes_sha256": "", "num_genes": 1}
    return Manifest(**tiles, **genes, sections=tuple(section_entry(f"{name}1", name) for name in patients))


FREE: dict[str, object] = {
    "cluster.wait_s": 60.0,
    "tracking.uri": "http://mlflow:5000",
    "train.num_workers": 2,
    "train.max_failures": 0,
}


def _name(folder: Path, protocol: str = "patient", floor_weights: str | None = None, **changed: object) -> str:
    return default_name(str(folder), _cohort("A", "B"), protocol, _config(folder, **changed), floor_weights)


@pytest.mark.parametrize("setting", [*FREE, "all"])
def test_a_study_without_a_name_goes_on_under_settings_that_its_results_do_not_depend_on(
    tmp_path: Path, setting: str
) -> None:
    assert _name(tmp_path, **(FREE if setting == "all" else {setting: FREE[setting]})) == _name(tmp_path)


def test_a_study_without_a_name_is_another_one_with_another_recipe_protocol_or_floor(tmp_path: Path) -> None:
    others = [_name(tmp_path, "reference"), _name(tmp_path, floor_weights="imagenet")]
    others += [_name(tmp_path, **{"train.seed": 1})]
    assert len({_name(tmp_path), *others}) == 1 + len(others)


def test_a_study_goes_on_under_the_default_name_of_earlier_versions(tmp_path: Path) -> None:
    config, manifest = _config(tmp_path), _cohort("A", "B")
    former = f"patient-{former_digest(config)}-{manifest.digest()[:6]}"
    assert _name(tmp_path) != former
    record = {**cross_validation._request(manifest, "patient", config, None, None), "mlflow_run_id": "run"}
    fields = {"identity", "manifest_digest", "protocol", "probe_weights", "markers", "mlflow_run_id"}
    assert record.keys() == fields, "the names in the record of earlier versions"
    (tmp_path / former).mkdir()
    (tmp_path / former / cross_validation.RECORD).write_text(json.dumps(record))
    assert _name(tmp_path) == former
    assert _name(tmp_path, floor_weights="imagenet") != former, "it was made with another floor"


def test_a_study_gets_another_mlflow_run_where_the_tracking_store_has_changed(tmp_path: Path) -> None:
    def track(recorded: str | None) -> str:
        return "first" if recorded is None else "second"

    request = cross_validation._request(_cohort("A"), "patient", _config(tmp_path), None, None)
    kind, file = cross_validation._Record, cross_validation.RECORD
    assert open_record(kind, str(tmp_path), file, request, track).mlflow_run_id == "first"
    assert open_record(kind, str(tmp_path), file, request, track).mlflow_run_id == "second"
    assert open_record(kind, str(tmp_path), file, request, lambda recorded: str(recorded)).mlflow_run_id == "second"


def test_a_fold_that_is_named_twice_is_made_once(tmp_path: Path) -> None:
    folds = make_folds(_cohort("A", "B", "C"), _config(tmp_path), "patient", ["C", "A", "C"])
    assert [fold.name for fold in folds] == ["C", "A"]


def test_a_card_joins_all_scored_folds_whichever_were_asked_for_last(
    tmp_path: Path, make_result: Callable[..., Path]
) -> None:
    study, manifest = Study("", str(tmp_path), "patient", "", None, {}), _cohort("A", "B", "C")
    for name in ("C", "A", "other"):
        folder = Path(tmp_path, name, "scores")
        folder.mkdir(parents=True)
        make_result(folder, "patient", {name: f"run of {name}"})
    assert scored_folds(manifest, study) == ["A", "C"]
    card = collect(scored_folds(manifest, study), study)
    assert card.training_runs == {"A": "run of A", "C": "run of C"}
    one = pd.read_csv(tmp_path / "A" / "scores" / "score_card.csv")
    assert len(card.rows) == 2 * len(one)
    assert card.model_digest.endswith("(2 folds)")


def test_folds_are_compared_with_each_other_by_their_levels(tmp_path: Path) -> None:
    whole = levels_card("patient")
    for fold in "ABCD":
        rows, genes = (table[table["patient_id"] == fold] for table in (whole.rows, whole.per_gene))
        Path(tmp_path, fold, "scores").mkdir(parents=True)
        save_card(replace(whole, rows=rows, per_gene=genes), tmp_path / fold / "scores")
    card = collect(list("ABCD"), Study("", str(tmp_path), "patient", "", None, {}))
    found, expected = (each.means().set_index(["method", "gene_set"]) for each in (card, whole))
    for name in ("level_mse", "level_pcc"):
        pd.testing.assert_series_equal(found[name], expected[name])
    assert np.isfinite(found.loc[("model", "all"), "level_pcc"])


def test_a_leak_of_all_folds_is_noted_once(tmp_path: Path, make_result: Callable[..., Path]) -> None:
    for name in ("A", "B"):
        folder = Path(tmp_path, name, "scores")
        folder.mkdir(parents=True)
        make_result(folder, "reference")
    card = collect(["A", "B"], Study("", str(tmp_path), "reference", "", None, {}))
    assert [note for note in card.notes if "LEAK" in note] == [LEAK]
    assert card.notes.count("a note & more") == 1


def _assert_stored_features_are_the_encoders(study: Study, tiles: str) -> None:
    """Encodes each section once more, in this process."""
    model, manifest = ModelVersion.load(f"{study.uri}/P3/model"), load_manifest(tiles)
    encoder = floor_encoders(model.config.model, manifest.tile_size_px, None)["random"]
    tower = ImageTower(model.config.model, manifest.tile_size_px).eval()
    tower.encoder.load_state_dict(encoder.state())
    measured = [entry.section_id for entry in manifest.sections if entry.measured]
    stored = features(tiles, manifest, measured, encoder, wanted(model.config), make=False)
    for name in measured:
        entry = manifest.section(name)
        images = [read_sentence(tiles, entry, group)["image"] for group in range(len(entry.row_groups))]
        pixels = np.concatenate([decode_tiles(image.to_pylist(), manifest.tile_size_px) for image in images])
        with torch.inference_mode():
            found = tower(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).numpy()
        assert stored.read_section(name) == pytest.approx(found, rel=1e-4, abs=1e-5)


@pytest.mark.ray
def test_the_board_of_a_fold_is_on_the_requested_node(ray_session: None) -> None:
    here = ray.get_runtime_context().get_node_id()
    board = cross_validation._make_board({"ray.io/node-id": here})
    assert ray.get(board.take.remote(), timeout=60) == []
    elsewhere = cross_validation._make_board({"ray.io/node-id": "f" * len(here)})  # no such node: it never starts
    with pytest.raises(ray.exceptions.RayError):
        ray.get(elsewhere.take.remote(), timeout=2)
    ray.kill(elsewhere)


def test_folds_of_different_assays_are_refused_before_any_begins(tmp_path: Path) -> None:
    counts = {name: random_counts(9, seed) + 1 for seed, name in enumerate(("A1", "B1", "C1"))}
    (tmp_path / "table").mkdir()
    manifest = make_table(
        tmp_path / "table", counts, measures={name: np.arange(8) != 2 * (name == "C1") for name in counts}
    )
    study, config = Study(f"{tmp_path}/table", f"{tmp_path}/study", "patient", "", None, {}), _config(tmp_path)
    folds = make_folds(manifest, config, "patient")
    with pytest.raises(ConfigError, match="are in genes that C1 does not measure"):
        cross_validation._require_totals(folds, study)
    cross_validation._require_totals(folds[2:], study)  # which trains on A1 and B1
    for fold in folds[:2]:  # as an earlier version left them
        Path(study.uri, fold.name).mkdir(parents=True)
        Path(study.uri, fold.name, RUN_RECORD).write_text("{}")
    cross_validation._require_totals(folds, study)


@pytest.mark.ray
@pytest.mark.slow
def test_folds_run_once_and_one_that_fails_stops_no_other(tiles: str, tmp_path: Path, mlflow_template: Path) -> None:
    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    tiles = shutil.copytree(tiles, tmp_path / "tiles", ignore=shutil.ignore_patterns("features")).as_posix()
    config = _config(tmp_path)
    manifest = load_manifest(tiles)
    study, folds = _study(tiles, tmp_path, config), make_folds(manifest, config, "patient", ["P3", "P2"])
    broken = cross_validation.Fold("broken", override(folds[0].config, {"genes.panel": "none.txt"}))
    shown: list[tuple[str, int, int]] = []
    failed = run_folds([*folds, broken], study, lambda what, done, total, note="": shown.append((what, done, total)))
    assert list(failed) == ["broken"], failed
    assert f"genes.panel={Path.cwd()}/none.txt" in failed["broken"]
    first_fold = shown.index(("folds", 0, 3))
    assert {what for what, _, _ in shown[:first_fold]} == {"encoding: spots"}, "floors' features come first, once"
    assert shown[-1] == ("folds", 3, 3)
    assert {("fold P2", 1, 1), ("fold P3", 1, 1)} <= set(shown)
    assert [is_scored(study, fold.name) for fold in (*folds, broken)] == [True, True, False]
    for fold in folds:
        record = json.loads(Path(study.uri, fold.name, "model", "model.json").read_text())["training"]
        assert fold.name not in record["patients"]
        assert all(name.startswith(fold.name) for name in record["test_sections"])
    _assert_stored_features_are_the_encoders(study, tiles)
    card = collect(scored_folds(manifest, study), study)
    tested = ("P2S1", "P2S2", "P3S1", "P3S2")
    assert card.predictions == {name: f"{name[:2]}/scores/sections/{name}.h5ad" for name in tested}
    assert all(Path(study.uri, path).is_file() for path in card.predictions.values())
    assert list(card.training_runs) == ["P2", "P3"]
    assert set(card.rows["section_id"]) == set(tested)
    assert not any(note.startswith("LEAK") for note in card.notes)
    own = card.rows.query("target == @card.target and method == 'model' and gene_set == 'all'")
    assert card.scores()[card.target]["model"]["mse"] == pytest.approx(own["mse"].mean())
    save_card(card, tmp_path)
    means = pd.read_csv(tmp_path / "gene_means.csv").query("target == @card.target and method == 'model'")
    first = card.per_gene.query("target == @card.target and method == 'model' and gene == @means['gene'].iloc[0]")
    assert means["mean"].iloc[0] == pytest.approx(first.groupby("patient_id")["pcc"].mean().mean(), nan_ok=True)
    shown.clear()
    assert run_folds(folds, study, lambda what, done, total, note="": shown.append((what, done, total))) == {}
    assert shown == [("folds", 2, 2)], "scored folds ran again"
    with pytest.raises(RunError, match=r"1 of 3 fold\(s\) failed"):
        cross_validation.require_all(failed, [*folds, broken], study)
