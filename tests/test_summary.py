"""The result of a cross-validation, against pandas by hand."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from rich.console import Console

from mclstexp.evaluation.summary import SCORES, Summary, summarise

PATIENT = {"A1": "A", "A2": "A", "B1": "B", "C1": "C"}


def _rows() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    keys = [
        (section, target, method, kind, genes)
        for section in PATIENT
        for target in ("per_spot", "per_gene")
        for method, kind in (("model", "model"), ("train mean", "floor"))
        for genes in ("all", "heg50", "hvg50")
    ]
    rows = pd.DataFrame(keys, columns=["section_id", "target", "method", "kind", "gene_set"])
    rows["patient_id"] = rows["section_id"].map(PATIENT)
    for score in SCORES:
        rows[score] = rng.random(len(rows))
    rows.loc[rows["method"] == "train mean", ["pcc", "pcc_density_free"]] = np.nan
    return rows


def _genes() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    keys = [(s, t, "model", g) for s in PATIENT for t in ("per_spot", "per_gene") for g in ("ERBB2", "FN1")]
    genes = pd.DataFrame(keys, columns=["section_id", "target", "method", "gene"])
    return genes.assign(patient_id=genes["section_id"].map(PATIENT), pcc=rng.random(len(genes)))


@pytest.fixture
def summary() -> Summary:
    return summarise(_rows(), _genes(), "patient", "patient_id")


def test_means_are_over_patients_with_students_interval(summary: Summary) -> None:
    rows = _rows().query("target == 'per_spot' and method == 'model' and gene_set == 'heg50'")
    patients = [rows[rows["patient_id"] == name]["mse"].mean() for name in "ABC"]
    reach = scipy.stats.t.ppf(0.975, 2) * np.std(patients, ddof=1) / np.sqrt(3)
    found = summary.methods.query(
        "target == 'per_spot' and method == 'model' and gene_set == 'heg50' and score == 'mse'"
    )
    assert found[["mean", "low", "high", "num_units"]].to_numpy().ravel() == pytest.approx(
        [np.mean(patients), np.mean(patients) - reach, np.mean(patients) + reach, 3]
    )


def test_undefined_scores_are_counted(summary: Summary) -> None:
    mean = summary.methods.query("method == 'train mean' and score == 'pcc'")
    assert mean["mean"].isna().all()
    assert set(mean["undefined"]) == {len(PATIENT)}


def test_sections_are_the_unit_where_published_so() -> None:
    summary = summarise(_rows(), _genes(), "reference", "section_id")
    assert set(summary.methods.query("method == 'model'")["num_units"]) == {4}
    assert "other sections of the tested patients trained" in summary.note()


def test_genes_and_patients_have_means_of_their_own(summary: Summary) -> None:
    genes = _genes().query("target == 'per_gene' and gene == 'FN1'").groupby("patient_id")["pcc"].mean()
    found = summary.genes.query("target == 'per_gene' and gene == 'FN1'")
    assert found["mean"].item() == pytest.approx(genes.mean())
    rows = _rows().query("patient_id == 'A' and target == 'per_spot' and method == 'model' and gene_set == 'all'")
    found = summary.patients.query(
        "patient_id == 'A' and target == 'per_spot' and method == 'model' and gene_set == 'all' and score == 'pcc'"
    )
    assert found["mean"].item() == pytest.approx(rows["pcc"].mean())


def test_files_and_the_table_say_the_protocol(summary: Summary, tmp_path: Path) -> None:
    summary.save(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["protocol"] == "patient"
    for name in ("methods", "patients", "genes", "sections"):
        assert set(pd.read_csv(tmp_path / f"{name}.csv")["protocol"]) == {"patient"}
    console = Console(width=160, file=io.StringIO())
    console.print(summary.table())
    text = console.file.getvalue()
    assert "no patient of a fold's training data is tested" in text
    assert "4 sections, 3 units; target per_spot" in text
    assert all(np.isfinite(value) for value in summary.metrics().values())
    assert "cv/per_spot/model/all/pcc" in summary.metrics()
