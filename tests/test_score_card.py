"""The score card: means over patients and sections, and the registry's metrics and tags."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from random_card import GENES, levels_card, random_card, row_of
from rich.console import Console

from mclstexp.evaluation.save import save_card
from mclstexp.evaluation.score_card import MODEL, ORACLE
from mclstexp.evaluation.scores import read_table
from mclstexp.evaluation.show import card_tables, draw


def test_means_are_over_patients_and_counts_are_summed() -> None:
    card = random_card(1.0, 2.0)
    own = card.rows[(card.rows["method"] == MODEL) & (card.rows["target"] == "per_gene")]
    for gene_set, score in (("all", "pcc"), ("immune", "pcc"), ("all", "pcc_density_free"), ("heg50", "rmse")):
        by_section = own[own["gene_set"] == gene_set].set_index("section_id")[score]
        units = [(by_section["B1"] + by_section["B2"]) / 2, by_section["C1"]]
        interval = scipy.stats.ttest_1samp(units, 0).confidence_interval(0.95)
        mean = row_of(card.means(), method=MODEL, target="per_gene", gene_set=gene_set)
        assert mean[score] == pytest.approx(np.mean(units))
        assert (mean[f"{score}_low"], mean[f"{score}_high"]) == pytest.approx((interval.low, interval.high))
        assert mean[f"{score}_units"] == 2
    assert mean["num_spots"] == 90
    constant = row_of(card.means(), method="train mean", target="per_spot", gene_set="all")
    assert constant["undefined"] == constant["undefined_density_free"] == 3 * len(GENES)
    assert list(card.means()["method"].unique()) == [MODEL, "train mean", "ridge on RGB", ORACLE]


def test_as_published_means_are_over_sections() -> None:
    card = random_card(1.0, 2.0, protocol="reference")
    own = card.rows[(card.rows["method"] == MODEL) & (card.rows["target"] == "per_spot")]
    mean = row_of(card.means(), method=MODEL, target="per_spot", gene_set="all")
    assert mean["pcc"] == pytest.approx(own[own["gene_set"] == "all"]["pcc"].mean())
    assert mean["pcc_units"] == 3


def test_each_patient_has_the_mean_of_its_sections() -> None:
    card = random_card(1.0, 2.0)
    of_b = row_of(card.patients(), method=MODEL, patient_id="B", target="per_spot", gene_set="all")
    own = card.rows[(card.rows["method"] == MODEL) & (card.rows["target"] == "per_spot")]
    expected = own[(own["patient_id"] == "B") & (own["gene_set"] == "all")]["mse"]
    assert (of_b["mse"], of_b["mse_units"]) == (pytest.approx(expected.mean()), 2)
    of_c = row_of(card.patients(), method=MODEL, patient_id="C", target="per_spot", gene_set="all")
    assert np.isnan(of_c["mse_low"])


def test_a_reference_line_has_correlations_only() -> None:
    line = row_of(random_card(1.0, 2.0).means(), method=ORACLE, target="per_spot", gene_set="all")
    assert np.isnan([line["mse"], line["rmse"], line["mae"]]).all()
    assert np.isfinite(line["pcc"])


def test_metrics_and_tags_for_the_registry() -> None:
    card = random_card(0.5, 2.0)
    metrics = card.metrics()
    own, other = (
        row_of(card.means(), method=MODEL, target=target, gene_set="all") for target in ("per_spot", "per_gene")
    )
    assert metrics["test/model/mse"] == pytest.approx(own["mse"])
    assert metrics["test/model/pcc_density_free"] == pytest.approx(own["pcc_density_free"])
    assert metrics["test/per_gene/model/pcc_all"] == pytest.approx(other["pcc"])
    assert {"test/ridge_on_RGB/pcc_heg50", "test/model/pcc_most_significant__all_", "test/model/rmse"} < metrics.keys()
    assert "test/train_mean/pcc_all" not in metrics
    assert all(np.isfinite(value) for value in metrics.values())
    tags = card.tags()
    assert tags["score.protocol"] == "patient"
    assert tags["score.pcc_all"] == f"{own['pcc']:.4f}"


@pytest.mark.odd
def test_unmeasured_genes_are_counted_apart_from_undefined_ones() -> None:
    card = random_card(0.5, 2.0, lacking={"B2": [0, 3]})
    means = row_of(card.means(), method=MODEL, target="per_spot", gene_set="all")
    assert (means["not_measured"], means["undefined"]) == (2, 0)
    genes = card.gene_means().query("method == 'model' and target == 'per_spot'").set_index("gene")
    assert genes["not_measured"].to_dict() == {gene: int(gene in ("G0", "G3")) for gene in card.genes}
    assert not genes["undefined"].any()
    pcc = card.per_gene.query("method == 'model' and target == 'per_spot' and gene == 'G0'").set_index("section_id")[
        "pcc"
    ]
    assert np.isnan(pcc["B2"])
    assert genes.loc["G0", "mean"] == pytest.approx((pcc["B1"] + pcc["C1"]) / 2)
    whole = random_card(0.5, 2.0)
    assert card.scores()["per_spot"][MODEL]["pcc_all"] != whole.scores()["per_spot"][MODEL]["pcc_all"]
    constant = row_of(card.means(), method="train mean", target="per_spot", gene_set="all")
    assert (constant["undefined"], constant["not_measured"]) == (3 * 8 - 2, 2)
    assert len(card.verdicts()) == 2


@pytest.mark.odd
def test_the_terminal_and_the_picture_cope_with_unmeasured_genes(tmp_path: Path) -> None:
    printed = {}
    for name, lacking in (("whole", {}), ("partial", {"B2": [0, 3], "C1": [5]})):
        card = random_card(0.5, 2.0, lacking=lacking)
        console = Console(width=120, file=io.StringIO())
        console.print(card_tables(card))
        printed[name] = console.file.getvalue()
        draw(card, tmp_path / f"{name}.png")
    heads = {name: [line for line in text.splitlines() if "undefined ┃" in line] for name, text in printed.items()}
    assert "measured ┃" not in heads["whole"][0]
    assert heads["partial"][0].rstrip().endswith("measured ┃")
    assert max(len(line) for line in printed["partial"].splitlines()) <= 120


@pytest.mark.parametrize(("protocol", "unit"), [("patient", "patient_id"), ("reference", "section_id")])
def test_levels_are_correlated_over_units(protocol: str, unit: str) -> None:
    card = levels_card(protocol)
    own = card.per_gene[card.per_gene["method"] == MODEL]
    correlations, errors = [], []
    for gene in "wxyz":
        of_gene = own[own["gene"] == gene].dropna()
        means = of_gene.groupby(unit)[["truth_mean", "predicted_mean"]].mean()
        if len(means) >= 3:
            correlations.append(scipy.stats.pearsonr(means["truth_mean"], means["predicted_mean"]).statistic)
    for _, of_section in own.groupby("section_id"):
        gap = (of_section["truth_mean"] - of_section["predicted_mean"]).dropna()
        errors.append((of_section["patient_id"].iloc[0], np.mean(gap**2)))
    errors_of = pd.DataFrame(errors, columns=["patient_id", "error"])
    expected = (
        errors_of.groupby("patient_id")["error"].mean().mean() if protocol == "patient" else errors_of["error"].mean()
    )
    mean = row_of(card.means(), method=MODEL, gene_set="all")
    assert len(correlations) == (3 if protocol == "patient" else 4)
    assert mean["level_pcc"] == pytest.approx(np.mean(correlations))
    assert mean["level_mse"] == pytest.approx(expected)
    assert (mean["undefined_level"], mean["level_pcc_units"]) == (4 - len(correlations), 4 + (protocol != "patient"))
    constant = row_of(card.means(), method="train mean", gene_set="all")  # its mean over spots is rounded differently
    assert np.isnan(constant["level_pcc"])
    assert constant["undefined_level"] == 4
    assert card.metrics()["test/model/level_pcc"] == pytest.approx(mean["level_pcc"])
    assert np.isnan(row_of(card.means(), method=MODEL, gene_set="heg50")["level_pcc"])


def test_two_patients_say_nothing_of_how_patients_differ() -> None:
    card = random_card(0.5, 2.0)
    mean = row_of(card.means(), method=MODEL, target="per_spot", gene_set="all")
    assert np.isnan(mean["level_pcc"])
    assert mean["undefined_level"] == len(GENES)
    assert np.isfinite(mean["level_mse"])
    assert "score.level_pcc" not in card.tags()
    assert "test/model/level_pcc" not in card.metrics()


def test_tables_from_before_levels_are_scored_without_them(tmp_path: Path) -> None:
    card = random_card(0.5, 2.0, protocol="reference")
    save_card(card, tmp_path)
    newer = ["level_mse", "predicted_mean"]
    read = {}
    for name in ("score_card.csv", "per_gene.csv"):
        path = tmp_path / name
        pd.read_csv(path).drop(columns=newer, errors="ignore").to_csv(path, index=False)
        read[name] = read_table(path.read_bytes())
    old = replace(card, rows=read["score_card.csv"], per_gene=read["per_gene.csv"])
    found, expected = (row_of(each.means(), method=MODEL, target="per_spot", gene_set="all") for each in (old, card))
    assert found["pcc"] == pytest.approx(expected["pcc"])
    assert np.isnan([found["level_mse"], found["level_pcc"]]).all()
    assert not any("between sections" in verdict for verdict in old.verdicts())
    assert all("MSE between sections" in verdict for verdict in card.verdicts())
