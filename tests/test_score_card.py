"""The score card: means, words for who wins, and files that say the same."""

import io
import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from rich.console import Console

from mclstexp.data.genes import GenePanel
from mclstexp.evaluation.save import save_card
from mclstexp.evaluation.score_card import FLOOR, LINE, MODEL, ORACLE, ScoreCard
from mclstexp.evaluation.scores import gene_scores, gene_sets, set_table
from mclstexp.evaluation.sections import MeasuredSection, SectionResult
from mclstexp.evaluation.show import card_tables

GENES = [f"G{index}" for index in range(8)]
SECTIONS = {"B1": "B", "B2": "B", "C1": "C"}
TARGETS = {"per_spot": "ln(1 + x)", "per_gene": "log10(1 + y)"}
MARKERS = {"immune": np.array([2, 5]), "most significant (all)": np.array([1])}
NAN = float("nan")


def _card(model_noise: float, ridge_noise: float, protocol: str = "patient") -> ScoreCard:
    rng = np.random.default_rng(0)
    rows, genes = [], []
    for target in TARGETS:
        for name, patient in SECTIONS.items():
            truth = rng.normal(5, 1, (30, len(GENES)))
            noise, totals = rng.normal(size=truth.shape), rng.lognormal(7, 1, 30)
            said = {
                (MODEL, MODEL): truth + model_noise * noise,
                ("train mean", FLOOR): np.full_like(truth, 5),
                ("ridge on RGB", FLOOR): truth + ridge_noise * noise,
                (ORACLE, LINE): np.tile(truth[:, :1], len(GENES)),
            }
            for (method, kind), prediction in said.items():
                table = gene_scores(truth, prediction, totals)
                if kind == LINE:
                    table = table.assign(mse=NAN, mae=NAN)
                of = {"section_id": name, "patient_id": patient}
                own = of | {"num_spots": 30, "target": target, "method": method, "kind": kind}
                rows.append(set_table(table, gene_sets(truth, MARKERS)).assign(**own))
                genes.append(table.assign(**of, target=target, method=method, gene=GENES))
    example = _result(truth, said[MODEL, MODEL])
    tables = pd.concat(rows, ignore_index=True), pd.concat(genes, ignore_index=True)
    return ScoreCard(protocol, TARGETS, "abc", ("trained on A1",), GENES, *tables, (example,))


def _result(truth: np.ndarray, prediction: np.ndarray) -> SectionResult:
    place = np.stack(np.meshgrid(np.arange(6.0), np.arange(5.0)), axis=-1).reshape(-1, 2)
    spots = np.array([f"spot{index}" for index in range(30)], object)
    label = np.array(["tumour"] * 20 + [None] * 10, object)
    section = MeasuredSection("C1", "C", spots, 200 * place, 290 * place, label, truth, truth.sum(axis=1))
    picture = np.full((20, 24, 3), 200, np.uint8)
    return SectionResult(section, GenePanel.from_names(GENES), truth, prediction, picture, 80.0)


def _with_scores(scores: dict[str, tuple[float, ...]]) -> ScoreCard:
    """A card of one section whose methods have the given PCC all, PCC HEG50, density-free PCC, MSE and MAE."""
    rows, genes = [], []
    for method, (every, highest, density_free, mse, mae) in scores.items():
        of = {"section_id": "B1", "patient_id": "B", "target": "per_spot", "method": method}
        own = {"kind": MODEL if method == MODEL else FLOOR, "gene_set": "all", "num_spots": 9, "num_genes": 100}
        values = {"pcc": every, "pcc_density_free": density_free, "mse": mse, "rmse": mse**0.5, "mae": mae}
        rows.append(of | own | values | {"undefined": 0, "undefined_density_free": 0})
        low, high = (
            {"pcc": pcc, "pcc_density_free": density_free, "truth_mean": mean, "truth_variance": 1.0}
            for pcc, mean in ((2 * every - highest, 1.0), (highest, 2.0))
        )
        genes += [of | part | {"gene": f"G{place}"} for place, part in enumerate([low] * 50 + [high] * 50)]
    return ScoreCard(**(_card(1.0, 1.0).__dict__ | {"rows": pd.DataFrame(rows), "per_gene": pd.DataFrame(genes)}))


def _row(frame: pd.DataFrame, **where: str) -> pd.Series:
    for column, value in where.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    return frame.iloc[0]


def test_means_are_over_patients_and_counts_are_summed() -> None:
    card = _card(1.0, 2.0)
    own = card.rows[(card.rows["method"] == MODEL) & (card.rows["target"] == "per_gene")]
    for gene_set, score in (("all", "pcc"), ("immune", "pcc"), ("all", "pcc_density_free"), ("heg50", "rmse")):
        by_section = own[own["gene_set"] == gene_set].set_index("section_id")[score]
        units = [(by_section["B1"] + by_section["B2"]) / 2, by_section["C1"]]
        interval = scipy.stats.ttest_1samp(units, 0).confidence_interval(0.95)
        mean = _row(card.means(), method=MODEL, target="per_gene", gene_set=gene_set)
        assert mean[score] == pytest.approx(np.mean(units))
        assert (mean[f"{score}_low"], mean[f"{score}_high"]) == pytest.approx((interval.low, interval.high))
        assert mean[f"{score}_units"] == 2
    assert mean["num_spots"] == 90
    constant = _row(card.means(), method="train mean", target="per_spot", gene_set="all")
    assert constant["undefined"] == constant["undefined_density_free"] == 3 * len(GENES)
    assert list(card.means()["method"].unique()) == [MODEL, "train mean", "ridge on RGB", ORACLE]


def test_as_published_means_are_over_sections() -> None:
    card = _card(1.0, 2.0, protocol="reference")
    own = card.rows[(card.rows["method"] == MODEL) & (card.rows["target"] == "per_spot")]
    mean = _row(card.means(), method=MODEL, target="per_spot", gene_set="all")
    assert mean["pcc"] == pytest.approx(own[own["gene_set"] == "all"]["pcc"].mean())
    assert mean["pcc_units"] == 3


def test_each_patient_has_the_mean_of_its_sections() -> None:
    card = _card(1.0, 2.0)
    of_b = _row(card.patients(), method=MODEL, patient_id="B", target="per_spot", gene_set="all")
    own = card.rows[(card.rows["method"] == MODEL) & (card.rows["target"] == "per_spot")]
    expected = own[(own["patient_id"] == "B") & (own["gene_set"] == "all")]["mse"]
    assert (of_b["mse"], of_b["mse_units"]) == (pytest.approx(expected.mean()), 2)
    of_c = _row(card.patients(), method=MODEL, patient_id="C", target="per_spot", gene_set="all")
    assert np.isnan(of_c["mse_low"])


def test_a_reference_line_has_correlations_only() -> None:
    line = _row(_card(1.0, 2.0).means(), method=ORACLE, target="per_spot", gene_set="all")
    assert np.isnan([line["mse"], line["rmse"], line["mae"]]).all()
    assert np.isfinite(line["pcc"])


def test_verdicts_name_the_winner() -> None:
    mean, ridge = _card(0.1, 2.0).verdicts()
    assert mean.startswith("the model beats the train mean: MSE -")
    assert "PCC" not in mean
    assert ridge.startswith("the model beats the ridge on RGB: PCC all +")
    mean, ridge = _card(2.0, 0.1).verdicts()
    assert mean.startswith("the train mean WINS; the model stands at MSE +")
    assert ridge.startswith("the ridge on RGB WINS; the model stands at PCC all -")


def test_a_mixed_verdict_names_both_sides() -> None:
    (verdict,) = _with_scores({MODEL: (0.5, 0.2, 0.3, 1.0, 2.0), "ridge on RGB": (0.4, 0.3, 0.1, 2.0, 1.0)}).verdicts()
    assert verdict == (
        "the model beats the ridge on RGB on PCC all +0.100, PCC density-free +0.200, MSE -50.0%; the ridge on RGB "
        "WINS on the rest, the model stands at PCC HEG50 -0.100, MAE +100.0%"
    )


def test_a_verdict_has_the_interval_of_the_paired_difference() -> None:
    card = _card(0.5, 2.0)
    own = card.rows.query("target == 'per_spot' and gene_set == 'all'")
    both = own.pivot(index=["section_id", "patient_id"], columns="method", values="pcc")
    of_patients = (both["model"] - both["ridge on RGB"]).groupby("patient_id").mean()
    reach = scipy.stats.t.ppf(0.975, 1) * of_patients.std() / np.sqrt(2)
    assert f"ridge on RGB: PCC all {of_patients.mean():+.3f} ±{reach:.3f}, " in card.verdicts()[1]
    errors = own.pivot(index=["section_id", "patient_id"], columns="method", values="mse").groupby("patient_id").mean()
    floor, gap = errors["train mean"].mean(), errors["model"] - errors["train mean"]
    reach = 100 / floor * scipy.stats.t.ppf(0.975, 1) * gap.std() / np.sqrt(2)
    assert f"train mean: MSE {100 * gap.mean() / floor:+.1f}% ±{reach:.1f}%" in card.verdicts()[0]


def test_a_model_without_correlations_loses_them() -> None:
    (verdict,) = _with_scores({MODEL: (NAN, NAN, NAN, 1.0, 1.0), "ridge on RGB": (0.1, 0.1, 0.1, 2.0, 2.0)}).verdicts()
    assert "the ridge on RGB WINS on the rest, the model stands at PCC all undefined" in verdict


def _half_silent() -> ScoreCard:
    """A card whose model says nothing of three of seven genes and is good on the others; an eighth gene is constant."""
    rng = np.random.default_rng(1)
    truth, totals = rng.normal(5, 1, (30, 8)), rng.lognormal(7, 1, 30)
    truth[:, 7] = 0.1
    silent = truth + 0.7 * rng.normal(size=truth.shape)
    silent[:, 4:] = 5.0
    rows, genes = [], []
    for method, kind, said in (
        (MODEL, MODEL, silent),
        ("ridge on RGB", FLOOR, truth + rng.normal(size=truth.shape)),
    ):
        table = gene_scores(truth, said, totals)
        of = {"section_id": "B1", "patient_id": "B", "target": "per_spot", "method": method}
        rows.append(set_table(table, gene_sets(truth, {})).assign(**of, num_spots=30, kind=kind))
        genes.append(table.assign(**of, gene=GENES))
    return ScoreCard(**(_card(1.0, 1.0).__dict__ | {"rows": pd.concat(rows), "per_gene": pd.concat(genes)}))


def test_a_gene_that_a_method_says_nothing_of_counts_as_no_correlation_in_verdicts() -> None:
    card = _half_silent()
    stated = {method: _row(card.means(), method=method, gene_set="all") for method in (MODEL, "ridge on RGB")}
    assert stated[MODEL]["pcc"] > stated["ridge on RGB"]["pcc"]  # over the genes that each has
    assert (stated[MODEL]["undefined"], stated["ridge on RGB"]["undefined"]) == (4, 1)
    model, ridge = (card.per_gene.query("method == @name")["pcc"].to_numpy() for name in stated)
    for score in ("PCC all", "PCC HEG50"):  # seven genes vary, and all of them are among the highest
        expected = model[:4].sum() / 7 - ridge[:7].sum() / 7
        assert expected < 0
        assert f"{score} {expected:+.3f}" in card.verdicts()[0].partition("the ridge on RGB WINS")[2]
    free = {name: card.per_gene.query("method == @name")["pcc_density_free"].to_numpy()[:7] for name in stated}
    expected = np.nan_to_num(free[MODEL]).sum() / 7 - free["ridge on RGB"].sum() / 7
    assert f"PCC density-free {expected:+.3f}" in card.verdicts()[0]


def _printed(card: ScoreCard) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(card_tables(card))
    return console.file.getvalue()


def test_the_tables_name_protocol_units_patients_and_verdicts() -> None:
    card = _card(0.1, 2.0, protocol="reference")
    card.rows.loc[(card.rows["section_id"] == "B1") & card.rows["gene_set"].isin(MARKERS), "num_genes"] = 1
    heading, own, others, markers = _printed(card).split("\n\nprotocol reference; ")
    assert "may have trained" in " ".join(heading.split())
    assert own.startswith("target per_spot, ln(1 + x)")
    assert "patient B, 60 spots" in own
    assert "section B1" not in own
    assert others.startswith("target per_gene, log10(1 + y)")
    assert "patient" not in others
    assert "1 to 2 gene(s)" in markers
    for expected in ("trained on A1", "interval over sections", "the model beats the ridge on RGB"):
        assert expected in markers


def test_a_lone_patients_sections_are_shown() -> None:
    card = _card(0.1, 2.0)
    own = {name: table[table["patient_id"] == "B"] for name, table in (("rows", card.rows), ("genes", card.per_gene))}
    text = _printed(ScoreCard(**(card.__dict__ | {"rows": own["rows"], "per_gene": own["genes"]})))
    assert "section B1, 30 spots" in text
    assert "patient B" not in text
    assert "±0" not in text


def test_the_terminal_shows_means_with_half_of_their_interval() -> None:
    card = _card(0.5, 2.0)
    text = _printed(card)
    assert max(len(line) for line in text.splitlines()) <= 120
    lines = text.splitlines()
    place = next(index for index, line in enumerate(lines) if line.startswith("│   model"))
    mean = _row(card.means(), method=MODEL, target="per_spot", gene_set="all")
    cells = [[cell.strip() for cell in line.split("│")[2:-1]] for line in lines[place : place + 2]]
    assert cells[0][0] == f"{mean['pcc']:.4f}"
    assert cells[1][0] == f"±{(mean['pcc_high'] - mean['pcc']):.4f}"
    assert cells[0][3] == f"{mean['pcc_density_free']:.4f}"
    assert cells[0][4] == f"{mean['mse']:.4f}"
    assert [cells[0][6], cells[1][6]] == ["0", ""]


def test_the_files_hold_the_same_numbers(tmp_path: Path) -> None:
    card = _card(0.5, 2.0, protocol="reference")
    save_card(card, tmp_path)
    record = json.loads((tmp_path / "score_card.json").read_text())
    assert record["protocol"] == "reference"
    assert "may have trained" in record["heading"]
    assert record["targets"] == TARGETS
    assert record["means"][0]["pcc"] == pytest.approx(card.means()["pcc"][0])
    (constant,) = (
        row
        for row in record["means"]
        if (row["method"], row["target"], row["gene_set"]) == ("train mean", "per_spot", "all")
    )
    assert constant["pcc"] is None
    assert record["verdicts"] == card.verdicts()
    rows = pd.read_csv(tmp_path / "score_card.csv")
    pd.testing.assert_frame_equal(rows.drop(columns="protocol"), card.rows)
    for name in ("score_card", "per_gene", "gene_means"):
        assert set(pd.read_csv(tmp_path / f"{name}.csv")["protocol"]) == {"reference"}
    assert len(pd.read_csv(tmp_path / "per_gene.csv")) == len(TARGETS) * len(SECTIONS) * 4 * len(GENES)
    assert (tmp_path / "score_card.png").read_bytes().startswith(b"\x89PNG")


def test_a_sections_file_opens_in_scanpys_layout(tmp_path: Path) -> None:
    card = _card(0.5, 2.0, protocol="reference")
    save_card(card, tmp_path)
    (result,) = card.sections
    assert json.loads((tmp_path / "score_card.json").read_text())["predictions"] == {"C1": "sections/C1.h5ad"}
    data = anndata.read_h5ad(tmp_path / "sections" / "C1.h5ad")
    np.testing.assert_array_equal(data.X, result.prediction.astype(np.float32))
    np.testing.assert_array_equal(data.layers["measured"], result.truth.astype(np.float32))
    np.testing.assert_array_equal(data.obsm["spatial"], result.section.xy_px)
    assert data.obs["label"].isna().tolist() == [False] * 20 + [True] * 10
    assert list(data.var["symbol"]) == GENES
    assert data.uns["result"]["protocol"] == "reference"
    assert "may have trained" in data.uns["result"]["heading"]
    slide = data.uns["spatial"]["C1"]
    assert slide["images"]["hires"].shape == (20, 24, 3)
    # a spot's place on the picture: level-0 pixels times the factor
    assert data.obsm["spatial"][:, 0].max() * slide["scalefactors"]["tissue_hires_scalef"] == pytest.approx(1450 / 80)


def test_metrics_and_tags_for_the_registry() -> None:
    card = _card(0.5, 2.0)
    metrics = card.metrics()
    own, other = (
        _row(card.means(), method=MODEL, target=target, gene_set="all") for target in ("per_spot", "per_gene")
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
