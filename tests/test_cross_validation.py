"""Cross-validation: every fold holds out what it says, is run once, and fails alone."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import ray
from small_table import section_entry

from mclstexp import tracking
from mclstexp.config import Config, override
from mclstexp.data.schema import Manifest, load_manifest
from mclstexp.errors import RunError, SplitError
from mclstexp.evaluation.evaluate import evaluate
from mclstexp.evaluation.save import save_card
from mclstexp.model.version import ModelVersion
from tuning import cross_validation
from tuning.cross_validation import LEAK, Study, collect, is_scored, make_folds, open_study, run_folds, scored_folds

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
    start = partial(tracking.start_run, config, "study", {})
    return open_study(tiles, f"{folder}/study", protocol, config, start)


@pytest.mark.ray
def test_a_study_of_another_kind_is_refused(tiles: str, tmp_path: Path) -> None:
    config = _config(tmp_path)
    assert _study(tiles, tmp_path, config) == _study(tiles, tmp_path, config)
    with pytest.raises(RunError, match="another protocol"):
        _study(tiles, tmp_path, config, "reference")
    with pytest.raises(RunError, match="another identity"):
        _study(tiles, tmp_path, _config(tmp_path, **{"train.epochs": 2}))


def _cohort(*patients: str) -> Manifest:
    """A manifest of one measured section a patient, with nothing in it."""
    tiles = {"tile_size_px": 8, "mpp": 1.0, "encoding": "jpeg", "jpeg_quality": 90, "sentence_length": 2}
    genes = {"genes_file": "", "genes_sha256": "", "num_genes": 1}
    return Manifest(**tiles, **genes, sections=tuple(section_entry(f"{name}1", name) for name in patients))


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


def test_a_leak_of_all_folds_stands_once(tmp_path: Path, make_result: Callable[..., Path]) -> None:
    for name in ("A", "B"):
        folder = Path(tmp_path, name, "scores")
        folder.mkdir(parents=True)
        make_result(folder, "reference")
    card = collect(["A", "B"], Study("", str(tmp_path), "reference", "", None, {}))
    assert [note for note in card.notes if "LEAK" in note] == [LEAK]
    assert card.notes.count("a note & more") == 1


def _assert_same_floors_without_the_cache(study: Study, tiles: str) -> None:
    assert len(list(Path(study.uri, "features", "random").glob("*/*.npz"))) == 6
    fresh = evaluate(ModelVersion.load(f"{study.uri}/P3/model"), tiles, lambda *_: None)
    cached = pd.read_csv(f"{study.uri}/P3/scores/score_card.csv").drop(columns="protocol")
    pd.testing.assert_frame_equal(cached, fresh.rows)


@pytest.mark.ray
def test_a_folds_board_lives_on_the_node_that_it_is_asked_for(ray_session: None) -> None:
    here = ray.get_runtime_context().get_node_id()
    board = cross_validation._make_board({"ray.io/node-id": here})
    assert ray.get(board.take.remote(), timeout=60) == []
    elsewhere = cross_validation._make_board({"ray.io/node-id": "f" * len(here)})  # no such node: it never starts
    with pytest.raises(ray.exceptions.RayError):
        ray.get(elsewhere.take.remote(), timeout=2)
    ray.kill(elsewhere)


@pytest.mark.ray
@pytest.mark.slow
def test_folds_run_once_and_one_that_fails_stops_no_other(tiles: str, tmp_path: Path) -> None:
    config = _config(tmp_path)
    manifest = load_manifest(tiles)
    study, folds = _study(tiles, tmp_path, config), make_folds(manifest, config, "patient", ["P3", "P2"])
    broken = cross_validation.Fold("broken", override(folds[0].config, {"genes.panel": "none.txt"}))
    ended: list[str] = []
    failed = run_folds([*folds, broken], study, lambda fold, share: None, lambda: ended.append("one"))
    assert list(failed) == ["broken"], failed
    assert f"genes.panel={Path.cwd()}/none.txt" in failed["broken"]
    assert len(ended) == 3
    assert [is_scored(study, fold.name) for fold in (*folds, broken)] == [True, True, False]
    for fold in folds:
        record = json.loads(Path(study.uri, fold.name, "model", "model.json").read_text())["training"]
        assert fold.name not in record["patients"]
        assert all(name.startswith(fold.name) for name in record["test_sections"])
    _assert_same_floors_without_the_cache(study, tiles)
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
    assert run_folds(folds, study, lambda fold, share: None, lambda: ended.append("again")) == {}
    assert "again" not in ended
    with pytest.raises(RunError, match=r"1 of 3 fold\(s\) failed"):
        cross_validation.require_all(failed, [*folds, broken], study)
