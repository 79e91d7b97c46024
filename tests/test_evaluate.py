"""Evaluation of an untrained model version on a real tile table: what is scored, and every row against plain NumPy."""

import contextlib
import io
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import evaluate as job
import numpy as np
import pandas as pd
import pytest
import torch
from plain_probe import plain_probe
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, mean_squared_error
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from untrained import untrained_version

from mclstexp.data.genes import GenePanel
from mclstexp.data.schema import MANIFEST, Manifest, encode_rows, load_genes, load_manifest
from mclstexp.data.table import read_columns, read_counts
from mclstexp.errors import ConfigError, ModelError, SplitError, TableError, UserError
from mclstexp.evaluation.evaluate import evaluate, held_out
from mclstexp.evaluation.metrics import pearson_per_gene
from mclstexp.evaluation.save import save_card
from mclstexp.model import extract
from mclstexp.model.embed import head_of, network_of
from mclstexp.model.towers import build_network
from mclstexp.model.version import ModelVersion
from mclstexp.report.result import model_rows, open_result
from mclstexp.slides.codec import decode_tile

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")]  # MLflow
TEST = "P3S1"
SETTINGS = {
    "genes.num_genes": 12,
    "model.image_encoder": "small_cnn",
    "model.spot_layers": 1,
    "model.spot_width": 16,
    "model.spot_heads": 2,
    "model.spot_head_dim": 8,
    "model.embedding_dim": 8,
    "retrieval.k": 5,
    "retrieval.temperature": 0.1,
    "train.precision": "fp32",
}


@pytest.fixture(scope="module")
def manifest(tiles: str) -> Manifest:
    return load_manifest(tiles)


@pytest.fixture(scope="module")
def version(tiles: str) -> ModelVersion:
    """Held out P3S1, trained on all others: a sibling of the tested patient among them."""
    return untrained_version(tiles, SETTINGS | {"split.protocol": "reference", "split.test_sections": ["P3S1"]})


@dataclass(frozen=True)
class Scored:
    """What the job left behind."""

    folder: Path
    record: dict[str, Any]
    rows: pd.DataFrame
    printed: str


@pytest.fixture(scope="module")
def scored(tiles: str, version: ModelVersion, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """The job's own main on a model folder, in this session's Ray, with a floor on given weights."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "model").mkdir()
    version.save(folder / "model")
    known, unknown = version.panel.names()[3], "ABSENT1"
    (folder / "markers.yaml").write_text(f"tiny: {{two: ['{known}', '{unknown}']}}")
    torch.save(version.towers().image_tower.encoder.state_dict(), folder / "encoder.pth")
    arguments = {
        "--model": folder / "model",
        "--data": tiles,
        "--out": folder / "scores",
        "--floor-weights": folder / "encoder.pth",
        "--markers": folder / "markers.yaml",
        "--cohort": "tiny",
        "--tracking.uri": f"sqlite:///{folder}/mlflow.db",
    }
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["evaluate.py", *(str(text) for pair in arguments.items() for text in pair)])
        patch.setattr(job._launch, "connect", lambda config: None)
        job.main()
    record = json.loads((folder / "scores" / "score_card.json").read_text())
    return Scored(folder, record, pd.read_csv(folder / "scores" / "score_card.csv"), printed.getvalue())


def _expression(tiles: str, version: ModelVersion, name: str, target: str = "per_spot") -> tuple[np.ndarray, ...]:
    """Panel expression from the stored counts, ln(1 + 1e4 count / spot total) or per gene in log10; and the totals."""
    manifest = load_manifest(tiles)
    counts = read_counts(tiles, manifest.section(name)).toarray().astype(float)
    order = load_genes(tiles, manifest)["gene_id"].to_pylist()
    own = counts[:, [order.index(gene) for gene in version.panel.gene_id]]
    totals = counts.sum(axis=1)
    if target == "per_gene":
        return np.log10(1 + 1e4 * own / own.sum(axis=0)), totals
    return np.log(1 + 1e4 * own / totals[:, None]), totals


def _tiles_of(tiles: str, name: str) -> np.ndarray:
    stored = read_columns(tiles, load_manifest(tiles).section(name), ["image"])["image"].to_pylist()
    return np.stack([decode_tile(data) for data in stored])


def _rgb(images: np.ndarray) -> np.ndarray:
    pixels = images.reshape(len(images), -1, 3) / 255
    return np.concatenate([pixels.mean(axis=1), pixels.std(axis=1)], axis=1)


def _trained_features(version: ModelVersion, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return version.towers().image_tower(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).numpy()


def _assert_scores(row: pd.Series, truth: np.ndarray, prediction: np.ndarray) -> None:
    pcc = [np.corrcoef(a, b)[0, 1] for a, b in zip(truth.T, prediction.T, strict=True) if a.std() and b.std()]
    assert row["pcc"] == pytest.approx(np.mean(pcc), abs=1e-3)
    assert row["mse"] == pytest.approx(mean_squared_error(truth, prediction), rel=1e-3)
    assert row["rmse"] == pytest.approx(np.sqrt(row["mse"]))
    assert row["mae"] == pytest.approx(mean_absolute_error(truth, prediction), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["per_spot", "per_gene"])
def test_every_row_equals_plain_numpy(tiles: str, version: ModelVersion, scored: Scored, target: str) -> None:
    names = version.training.sections
    training = np.concatenate([_expression(tiles, version, name, target)[0] for name in names])
    images = np.concatenate([_tiles_of(tiles, name) for name in names])
    truth, totals = _expression(tiles, version, TEST, target)
    rows = scored.rows[scored.rows["target"] == target].set_index(["method", "gene_set"])
    mean = np.tile(training.mean(0), (len(truth), 1))
    assert rows.loc[("train mean", "all"), "mse"] == pytest.approx(mean_squared_error(truth, mean), rel=1e-4)
    assert rows.loc[("train mean", "all"), "undefined"] == len(version.panel)
    assert rows.loc[("zeros", "all"), "mse"] == pytest.approx((truth**2).mean(), rel=1e-4)
    (alphas,) = (
        note for note in scored.record["notes"] if note.startswith(f"alpha of the ridges in {target}, by leave")
    )
    features = {"RGB": _rgb, "trained small_cnn": lambda tiles: _trained_features(version, tiles)}
    for name, features_of in features.items():
        alpha, expected = plain_probe(features_of(images), training, features_of(_tiles_of(tiles, TEST)))
        assert f"ridge on {name} {alpha:.0f}" in alphas
        _assert_scores(rows.loc[(f"ridge on {name}", "all")], truth, expected)
    predicted = _plain_prediction(tiles, version, TEST, training)
    _assert_scores(rows.loc[("model", "all")], truth, predicted)
    _assert_scores(rows.loc[("model", "two")], truth[:, [3]], predicted[:, [3]])
    expected = [np.corrcoef(gene, np.log(1 + totals))[0, 1] for gene in truth.T if gene.std()]
    assert rows.loc[("library-size oracle", "all"), "pcc"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert rows.loc[["library-size oracle", "noise ceiling"], ["mse", "rmse", "mae"]].isna().all(axis=None)
    assert np.mean(expected) < rows.loc[("noise ceiling", "all"), "pcc"] <= 1
    assert list(rows.index.unique("method")) == [
        *("model", "train mean", "zeros", "ridge on RGB", "ridge on random small_cnn"),
        *("ridge on pretrained small_cnn", "ridge on trained small_cnn", "library-size oracle", "noise ceiling"),
    ]


def _plain_prediction(tiles: str, version: ModelVersion, name: str, payload: np.ndarray) -> np.ndarray:
    images = torch.from_numpy(_tiles_of(tiles, name)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        queries = version.towers().embed_images(images).numpy()
    predictions = []
    for query in queries:
        cosine = version.bank.keys @ query / np.linalg.norm(version.bank.keys, axis=1) / np.linalg.norm(query)
        best = np.argsort(-cosine)[:5]
        weights = np.exp(cosine[best] / 0.1)
        predictions.append(weights @ payload[best] / weights.sum())
    return np.stack(predictions)


@pytest.mark.slow
def test_the_job_reports_what_it_scored_and_where_it_wrote(version: ModelVersion, scored: Scored) -> None:
    assert scored.record["model_digest"] == ModelVersion.load(scored.folder / "model").digest
    assert scored.record["protocol"] == "reference"
    assert scored.record["targets"] == {
        "per_spot": "ln(1 + 10000 * count / spot total over all genes)",
        "per_gene": "log10(1 + 10000 * count / gene total over the section)",
    }
    assert list(scored.rows) == [
        *("protocol", "section_id", "patient_id", "num_spots", "target", "method", "kind"),
        *("gene_set", "num_genes", "not_measured", "pcc"),
        *("undefined", "pcc_density_free", "undefined_density_free", "mse", "rmse", "mae", "level_mse"),
    ]
    assert list(pd.read_csv(scored.folder / "scores" / "per_gene.csv")) == [
        *("protocol", "section_id", "patient_id", "target", "method", "gene", "truth_mean", "truth_variance"),
        *("predicted_mean", "pcc", "pcc_density_free", "mse", "mae", "level_mse"),
    ]
    assert list(scored.rows["gene_set"].unique()) == ["all", "heg50", "hvg50", "two"]
    assert "genes of two that are not in the panel: ABSENT1" in scored.record["notes"]
    assert scored.record["notes"][0] == "LEAK that this protocol allows: other sections of patients P3 trained"
    assert set(scored.rows["section_id"]) == {TEST}
    for expected in ("protocol reference", "ridge on RGB", *scored.record["verdicts"]):
        assert " ".join(expected.split()) in " ".join(scored.printed.replace("│", " ").split())
    assert scored.printed.splitlines()[-1] == f"score card {scored.folder}/scores/score_card.json"
    scores = scored.folder / "scores"
    written = {str(path.relative_to(scores)) for path in scores.rglob("*") if path.is_file()}
    tables = {"score_card.json", "score_card.csv", "per_gene.csv", "gene_means.csv", "score_card.png"}
    assert written == tables | {f"sections/{TEST}.h5ad"}
    logged = {path.name for path in (scored.folder / "mlartifacts").rglob("*") if path.is_file()}
    assert {Path(name).name for name in written} <= logged


@pytest.mark.slow
def test_the_report_reads_what_the_job_wrote(version: ModelVersion, scored: Scored, tmp_path: Path) -> None:
    result = open_result(str(scored.folder / "scores"), tmp_path)
    assert list(result.files) == [TEST]
    section = result.section(TEST)
    assert section.panel == result.panel == version.panel
    pcc = model_rows(result.per_gene).set_index("gene")["pcc"]
    own = pearson_per_gene(section.measured, section.predicted)
    np.testing.assert_allclose(own, pcc[version.panel.names()], atol=1e-4)
    assert result.heading(section).endswith("LEAK that this protocol allows: other sections of patients P3 trained")


def test_a_direct_regression_has_errors_only_in_its_own_unit(tiles: str) -> None:
    version = untrained_version(tiles, SETTINGS | {"model.predictor": "regression", "split.test_patients": ["P3"]})
    card = evaluate(version, tiles, lambda *_: None, ["P3S1"])
    rows = card.rows[(card.rows["method"] == "model") & (card.rows["gene_set"] == "all")].set_index("target")
    predicted = _regression(version, _tiles_of(tiles, "P3S1"))
    _assert_scores(rows.loc["per_spot"], _expression(tiles, version, "P3S1")[0], predicted)
    other = _expression(tiles, version, "P3S1", "per_gene")[0]
    pcc = [np.corrcoef(a, b)[0, 1] for a, b in zip(other.T, predicted.T, strict=True) if a.std()]
    assert rows.loc["per_gene", "pcc"] == pytest.approx(np.mean(pcc), abs=1e-3)
    assert rows.loc["per_gene", ["mse", "rmse", "mae"]].isna().all()
    assert any("direct regression" in note for note in card.notes)


def test_a_frozen_model_and_its_floors_read_features_that_are_made_once(
    tiles: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second evaluation encodes nothing; weights that are the model's own add no second floor."""
    settings = SETTINGS | {"model.freeze_encoder": True, "split.protocol": "reference", "split.test_sections": [TEST]}
    version = untrained_version(tiles, settings | {"train.seed": 7})
    torch.save(version.encoder.state(), tmp_path / "own.pth")
    first = evaluate(version, tiles, floor_weights=str(tmp_path / "own.pth"))
    with monkeypatch.context() as patch:
        patch.setattr(extract, "make_features", lambda *_: pytest.fail("features were made again"))
        again = evaluate(version, tiles, floor_weights=str(tmp_path / "own.pth"))
    pd.testing.assert_frame_equal(first.rows, again.rows)
    rows = first.rows[first.rows["target"] == "per_spot"].set_index(["method", "gene_set"])
    assert list(rows.index.unique("method")) == [
        *("model", "train mean", "zeros", "ridge on RGB", "ridge on random small_cnn"),
        *("ridge on frozen small_cnn", "HEST-bench probe", "library-size oracle", "noise ceiling"),
    ]

    names = version.training.sections
    training = np.concatenate([_expression(tiles, version, name)[0] for name in names])
    truth, _ = _expression(tiles, version, TEST)
    embed = replace(network_of(version), head=None).build(torch.device("cpu"))
    seen, asked = embed(np.concatenate([_tiles_of(tiles, name) for name in names])), embed(_tiles_of(tiles, TEST))
    steps = make_pipeline(StandardScaler(), PCA(svd_solver="full"), Ridge(100 / (seen.shape[1] * training.shape[1])))
    probed = steps.fit(seen.astype(float), training).predict(asked.astype(float))
    _assert_scores(rows.loc[("HEST-bench probe", "all")], truth, probed)
    queries = head_of(version).build(torch.device("cpu"))(asked)
    _assert_scores(rows.loc[("model", "all")], truth, version.predict(queries, np.zeros((len(queries), 2))).prediction)


def _regression(version: ModelVersion, images: np.ndarray) -> np.ndarray:
    network = build_network(version.config.model, len(version.panel), 0, version.tile_size_px).eval()
    network.load_state_dict(version.weights)
    with torch.no_grad():
        return network(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).numpy()


def test_held_out_sections_are_scored_by_default(tiles: str, manifest: Manifest) -> None:
    version = untrained_version(tiles, SETTINGS | {"split.test_patients": ["P3"]})
    assert held_out(version, manifest) == ["P3S1", "P3S2"]
    assert held_out(version, manifest, ["P3S2"]) == ["P3S2"]


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (["P1S1"], SplitError, "was fitted on P1S1"),
        (["P4S1"], SplitError, "P4S1 have no measured expression"),
        (["P9S1"], TableError, "no section P9S1"),
    ],
)
def test_sections_that_cannot_be_scored_are_refused(
    version: ModelVersion, manifest: Manifest, asked: list[str], error: type[UserError], message: str
) -> None:
    with pytest.raises(error, match=message):
        held_out(version, manifest, asked)


def test_siblings_of_training_patients_are_refused_under_patient(version: ModelVersion, manifest: Manifest) -> None:
    with pytest.raises(SplitError, match="patients of P3S1"):
        held_out(_with(version, protocol="patient"), manifest)


def test_a_model_that_held_nothing_out_needs_sections(version: ModelVersion, manifest: Manifest) -> None:
    with pytest.raises(SplitError, match="--sections"):
        held_out(_with(version, test_sections=()), manifest)


def test_a_table_that_does_not_fit_the_model_is_refused(tiles: str, version: ModelVersion, manifest: Manifest) -> None:
    with pytest.raises(ModelError, match="has no P7S1"):
        held_out(_with(version, sections=("P1S1", "P7S1")), manifest)
    with pytest.raises(ModelError, match="64 px"):
        held_out(version, manifest.model_copy(update={"tile_size_px": 64}))
    other = _with(version)
    other.panel = GenePanel(("NOPE",), ("NOPE",), ("",))
    with pytest.raises(ModelError, match="0 of the panel's 1 genes; missing: NOPE"):
        evaluate(other, tiles, lambda *_: None)


def test_a_bank_of_other_spots_is_refused(tiles: str, version: ModelVersion) -> None:
    other = _with(version)
    other.bank = replace(version.bank, spot_id=version.bank.spot_id[::-1])
    with pytest.raises(ModelError, match="not the same in the same order"):
        evaluate(other, tiles, lambda *_: None)


def test_markers_need_a_cohort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", "m", "--data", "d", "--markers", "mine.yaml"])
    with pytest.raises(ConfigError, match=r"--markers mine\.yaml needs --cohort"):
        job.main()


def _with(version: ModelVersion, **changes: object) -> ModelVersion:
    record = version.training.model_copy(update=changes)
    geometry = (version.tile_size_px, version.mpp)
    return ModelVersion(version.config, version.panel, geometry, 0, record, version.weights, version.bank)


def _without(tiles: str, root: Path, lacks: dict[str, list[int]]) -> str:
    """A copy of the tile table in which some sections measured some genes (rows of the gene table) not at all."""
    shutil.copytree(tiles, root)
    manifest = load_manifest(str(root))
    rows = np.arange(manifest.num_genes)
    entries = [
        entry.model_copy(update={"genes": encode_rows(~np.isin(rows, lacks.get(entry.section_id, [])))})
        for entry in manifest.sections
    ]
    (root / MANIFEST).write_bytes(manifest.model_copy(update={"sections": tuple(entries)}).encode())
    return str(root)


@pytest.mark.odd
@pytest.mark.slow
def test_genes_that_sections_do_not_measure_are_left_out_of_scores_floors_and_bank(tiles: str, tmp_path: Path) -> None:
    """P3S1 lacks four of the twelve panel genes; of the training sections P1S1 lacks two others."""
    split = {"split.protocol": "reference", "split.test_sections": ["P3S1"], "genes.min_sections": 0.5}
    panel = untrained_version(tiles, SETTINGS | split).panel
    ids = load_genes(tiles, load_manifest(tiles))["gene_id"].to_pylist()
    lacks = {"P3S1": list(panel.gene_id[:4]), "P1S1": list(panel.gene_id[5:7])}
    root = _without(
        tiles, tmp_path / "table", {name: [ids.index(gene) for gene in genes] for name, genes in lacks.items()}
    )
    (tmp_path / "panel.txt").write_text("\n".join(panel.gene_id))
    version = untrained_version(root, SETTINGS | split | {"genes.panel": str(tmp_path / "panel.txt")})
    (tmp_path / "model").mkdir()
    version.save(tmp_path / "model")
    version = ModelVersion.load(tmp_path / "model")
    card = evaluate(version, root)

    measures = {name: [gene for gene in range(12) if panel.gene_id[gene] not in genes] for name, genes in lacks.items()}
    names = version.training.sections
    for target in ("per_spot", "per_gene"):
        truth, _ = _expression(root, version, TEST, target)
        training = {name: _expression(root, version, name, target)[0] for name in names}
        predicted = {"zeros": np.zeros(12), "train mean": np.empty(12)}
        for gene in range(12):
            own = [training[name][:, gene] for name in names if gene in measures.get(name, range(12))]
            predicted["train mean"][gene] = np.concatenate(own).mean()
        known = np.concatenate(
            [np.tile(np.isin(range(12), measures.get(name, range(12))), (len(training[name]), 1)) for name in names]
        )
        predicted["model"] = _prediction_of_measuring_donors(root, version, np.concatenate([*training.values()]), known)
        rows = card.rows[(card.rows["target"] == target) & (card.rows["gene_set"] == "all")].set_index("method")
        assert (rows["num_genes"] == 8).all()
        assert (rows["not_measured"] == 4).all()
        for method, values in predicted.items():
            error = ((truth - values)[:, measures[TEST]] ** 2).mean()
            assert rows.loc[method, "mse"] == pytest.approx(error, rel=1e-4), (target, method)
        genes = card.per_gene.query("target == @target and method != 'noise ceiling'")  # of counts, which stayed
        unknown = genes[genes["gene"].isin(panel.take(range(4)).names())]
        assert unknown[["truth_mean", "pcc", "mse", "mae"]].isna().all(axis=None)
        assert rows.loc["model", "undefined"] == 0
    assert any(note.startswith("section P3S1 does not measure 4 of the 12 genes, so they") for note in card.notes)
    assert any(note.startswith("training sections that do not measure all 12 genes: P1S1 (2);") for note in card.notes)
    save_card(card, tmp_path)
    section = open_result(str(tmp_path), tmp_path).section(TEST)
    assert np.flatnonzero(np.isnan(section.measured).all(axis=0)).tolist() == [0, 1, 2, 3]
    assert np.isfinite(section.predicted).all()


@pytest.mark.odd
@pytest.mark.slow
def test_shared_totals_make_one_unit_of_two_assays(tiles: str, version: ModelVersion, tmp_path: Path) -> None:
    """P1S1 lacks two panel genes and ten others; P2S1 lacks one more in the newer table that is scored."""
    settings = SETTINGS | {"split.protocol": "reference", "split.test_sections": [TEST]}
    ids = load_genes(tiles, load_manifest(tiles))["gene_id"].to_pylist()
    panel = version.panel
    others = [row for row, gene in enumerate(ids) if gene not in panel.gene_id]
    lacks = [*(ids.index(gene) for gene in panel.gene_id[5:7]), *others[:10]]
    (tmp_path / "panel.txt").write_text("\n".join(panel.gene_id))
    shared = settings | {"genes.panel": str(tmp_path / "panel.txt"), "genes.total": "shared"}
    root = _without(tiles, tmp_path / "table", {"P1S1": lacks})
    (tmp_path / "model").mkdir()
    untrained_version(root, shared).save(tmp_path / "model")
    version = ModelVersion.load(tmp_path / "model")

    def expression(name: str) -> np.ndarray:
        counts = read_counts(root, load_manifest(root).section(name)).toarray().astype(float)
        totals = np.delete(counts, lacks, axis=1).sum(axis=1)
        return np.log(1 + 1e4 * counts[:, [ids.index(gene) for gene in panel.gene_id]] / totals[:, None])

    truth, names = expression(TEST), version.training.sections
    training = {name: expression(name) for name in names}
    known = {name: np.isin(range(12), [5, 6], invert=name == "P1S1") | (name != "P1S1") for name in names}
    mean = [
        np.concatenate([training[name][:, gene] for name in names if known[name][gene]]).mean() for gene in range(12)
    ]
    spots = np.concatenate([np.tile(known[name], (len(training[name]), 1)) for name in names])
    predicted = _prediction_of_measuring_donors(root, version, np.concatenate([*training.values()]), spots)
    newer = _without(root, tmp_path / "newer", {"P1S1": lacks, "P2S1": [others[10]]})
    card = evaluate(version, newer)
    assert card.targets["per_spot"].endswith("spot total over the genes that all training sections measure)")
    assert f"spot totals are over the {len(ids) - 12} genes that all training sections measure" in card.notes
    rows = card.rows.query("target == 'per_spot' and gene_set == 'all'").set_index("method")
    for method, values in {"zeros": np.zeros(12), "train mean": np.array(mean), "model": predicted}.items():
        assert rows.loc[method, "mse"] == pytest.approx(((truth - values) ** 2).mean(), rel=1e-4), method
    lists_few = _without(root, tmp_path / "few", {"P1S1": lacks, TEST: others[10:25]})
    with pytest.raises(ConfigError, match=f"genes.total=shared: spot totals of section {TEST} are over other genes"):
        evaluate(version, lists_few)


def _prediction_of_measuring_donors(
    tiles: str, version: ModelVersion, payload: np.ndarray, known: np.ndarray
) -> np.ndarray:
    """The plain prediction of P3S1, with each gene's weights over those of the five neighbours that measure it."""
    images = torch.from_numpy(_tiles_of(tiles, TEST)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        queries = version.towers().embed_images(images).numpy()
    assert version.bank is not None
    predictions = []
    for query in queries:
        cosine = version.bank.keys @ query / np.linalg.norm(version.bank.keys, axis=1) / np.linalg.norm(query)
        best = np.argsort(-cosine)[:5]
        weight = np.exp(cosine[best] / 0.1)[:, None] * known[best]
        mean = np.where(known, payload, 0).sum(axis=0) / known.sum(axis=0)
        votes = weight.sum(axis=0)
        shared = np.divide((weight * payload[best]).sum(axis=0), votes, out=mean.copy(), where=votes > 0)
        predictions.append(shared)
    return np.stack(predictions)
