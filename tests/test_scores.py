"""Tables of scores: every column against SciPy or NumPy by hand, intervals against SciPy's, and a new score."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from random_card import random_card
from rich.console import Console

from mclstexp.evaluation import scores
from mclstexp.evaluation.save import save_card
from mclstexp.evaluation.scores import gene_scores, gene_sets, mean_intervals, read_table, set_table
from mclstexp.evaluation.show import card_tables
from mclstexp.report.result import read_record
from mclstexp.report.tables import target_tables


def _section(num_spots: int = 40, num_genes: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = rng.gamma(0.5, size=(num_spots, num_genes)).astype(np.float32)
    prediction = (truth + rng.normal(size=truth.shape)).astype(np.float32)
    return truth, prediction, rng.lognormal(7, 1, num_spots)


def test_the_gene_table_by_hand() -> None:
    truth, prediction, totals = _section()
    prediction[:, 4] = 2.5
    table = gene_scores(truth, prediction, totals)
    scored = ["pcc", "pcc_density_free", "mse", "mae", "level_mse"]
    assert list(table) == ["truth_mean", "truth_variance", "predicted_mean", *scored]
    assert len(table) == 60
    assert table["pcc"].isna().tolist() == table["pcc_density_free"].isna().tolist() == [g == 4 for g in range(60)]
    for gene in (0, 59):
        t, p, size = truth[:, gene].astype(float), prediction[:, gene].astype(float), np.log(totals + 1)
        left = [values - np.polyval(np.polyfit(size, values, 1), size) for values in (t, p)]
        expected = {
            "truth_mean": np.mean(t),
            "truth_variance": np.mean((t - np.mean(t)) ** 2),
            "predicted_mean": np.mean(p),
            "pcc": scipy.stats.pearsonr(t, p).statistic,
            "pcc_density_free": scipy.stats.pearsonr(*left).statistic,
            "mse": np.mean((t - p) ** 2),
            "mae": np.mean(np.abs(t - p)),
            "level_mse": (np.mean(t) - np.mean(p)) ** 2,
        }
        assert table.loc[gene].to_dict() == pytest.approx(expected, abs=1e-9)


def test_sets_of_genes_and_their_means() -> None:
    truth, prediction, totals = _section()
    highest = int(np.argmax(truth.astype(float).mean(axis=0)))
    prediction[:, highest] = 0.1
    genes = gene_scores(truth, prediction, totals)
    sets = gene_sets(truth, {"immune": np.array([highest, 5, 9]), "absent": np.array([], np.int32)})
    assert {name: len(columns) for name, columns in sets.items()} == {
        "all": 60,
        "heg50": 50,
        "hvg50": 50,
        "immune": 3,
        "absent": 0,
    }
    rows = set_table(genes, sets).set_index("gene_set")
    assert list(rows.index) == list(sets)
    pcc = {g: scipy.stats.pearsonr(truth[:, g], prediction[:, g]).statistic for g in range(60) if g != highest}
    by_mean, by_variance = (sorted(range(60), key=lambda g: -key[g])[:50] for key in (truth.mean(0), truth.var(0)))
    for name, members in {"all": range(60), "heg50": by_mean, "hvg50": by_variance, "immune": [highest, 5, 9]}.items():
        defined = [pcc[g] for g in members if g != highest]
        assert rows.loc[name, "pcc"] == pytest.approx(np.mean(defined), rel=1e-5)
        assert rows.loc[name, "undefined"] == len(members) - len(defined)
        gap = (prediction - truth)[:, list(members)].astype(float)
        found = rows.loc[name, ["num_genes", "mse", "rmse", "mae"]].to_dict()
        assert found == pytest.approx(
            {
                "num_genes": len(members),
                "mse": np.mean(gap**2),
                "rmse": np.sqrt(np.mean(gap**2)),
                "mae": np.mean(np.abs(gap)),
            },
            rel=1e-5,
        )
    assert rows.loc["immune", "undefined_density_free"] == 1
    assert rows.loc["absent", ["num_genes", "undefined"]].tolist() == [0, 0]
    assert rows.loc["absent", ["pcc", "pcc_density_free", "mse", "rmse", "mae"]].isna().all()


def test_a_table_without_errors_has_none() -> None:
    genes = pd.DataFrame({"pcc": [0.5, np.nan], "pcc_density_free": [0.1, 0.3]})
    (row,) = set_table(genes, {"all": np.arange(2)}).to_dict("records")
    assert (row["pcc"], row["undefined"], row["pcc_density_free"]) == (0.5, 1, pytest.approx(0.2))
    assert np.isnan([row["mse"], row["rmse"], row["mae"]]).all()
    (row,) = set_table(genes[["pcc"]], {"all": np.arange(2)}).to_dict("records")
    assert np.isnan(row["pcc_density_free"])
    assert (row["undefined"], row["undefined_density_free"]) == (1, 2)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({}, "give by_gene, from_others or between"),
        ({"by_gene": len, "from_others": len}, "give by_gene, from_others or between"),
        ({"from_others": len, "between": len}, "give by_gene, from_others or between"),
        ({"between": len}, "compared must be empty"),
        ({"by_gene": len, "of_sets": True, "compared": ("immune",)}, r"compared has \['immune'\], allowed: all, heg50"),
        ({"by_gene": len, "compared": ("hvg50",)}, "set of_sets=True"),
        ({"by_gene": len, "printed": ("all", "heg50")}, "set of_sets=True"),
    ],
)
def test_a_score_that_contradicts_itself_is_refused(fields: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=f"score mine: .*{fault}"):
        scores.Score("mine", "Mine", **fields)


def _rows(values: dict[str, float]) -> pd.DataFrame:
    return pd.DataFrame(
        {"patient_id": [name[0] for name in values], "section_id": list(values), "pcc": list(values.values())}
    )


def test_intervals_are_students_over_patients() -> None:
    rows = _rows({"A1": 0.1, "A2": 0.5, "B1": 0.2, "C1": 0.7, "C2": 0.8})
    both = pd.concat([rows.assign(method="model"), rows.assign(method="zeros", pcc=rows["pcc"] - 1)])
    found = mean_intervals(both, "pcc", ["method"], "patient_id")
    assert found["method"].tolist() == ["model", "zeros"]
    for (_, row), units in zip(found.iterrows(), ([0.3, 0.2, 0.75], [-0.7, -0.8, -0.25]), strict=True):
        expected = scipy.stats.ttest_1samp(units, 0).confidence_interval(0.95)
        assert (row["mean"], row["low"], row["high"]) == pytest.approx((np.mean(units), expected.low, expected.high))
        assert (row["num_units"], row["undefined"]) == (3, 0)
    of_sections = mean_intervals(rows.assign(method="model"), "pcc", ["method"], "section_id").iloc[0]
    expected = scipy.stats.ttest_1samp(rows["pcc"], 0).confidence_interval(0.95)
    assert (of_sections["low"], of_sections["high"]) == pytest.approx((expected.low, expected.high))
    assert of_sections["num_units"] == 5


def test_intervals_by_several_columns_keep_their_order() -> None:
    rows = pd.concat([_rows({"A1": 1.0, "B1": 2.0}).assign(method=m, gene=g) for m in ("x", "a") for g in ("G2", "G1")])
    found = mean_intervals(rows, "pcc", ["method", "gene"], "patient_id")
    pairs = found[["method", "gene"]].to_numpy().tolist()
    assert pairs == [["x", "G2"], ["x", "G1"], ["a", "G2"], ["a", "G1"]]
    assert found["mean"].tolist() == [1.5] * 4


def test_undefined_rows_are_counted_and_one_unit_has_no_interval() -> None:
    rows = _rows({"A1": 0.4, "A2": np.nan, "B1": np.nan}).assign(method="model")
    (row,) = mean_intervals(rows, "pcc", ["method"], "patient_id").to_dict("records")
    assert (row["mean"], row["num_units"], row["undefined"]) == (pytest.approx(0.4), 1, 2)
    assert np.isnan([row["low"], row["high"]]).all()
    (row,) = mean_intervals(rows.iloc[2:], "pcc", ["method"], "patient_id").to_dict("records")
    assert np.isnan(row["mean"])
    assert (row["num_units"], row["undefined"]) == (0, 1)


def test_names_that_look_like_numbers_or_gaps_stay_names_when_read_again() -> None:
    rows = [
        ("reference", "007", "NA", "per_spot", "nan", 0.5, 3),
        ("reference", "151507", "01", "1e3", "MARCH1", np.nan, 0),
    ]
    table = pd.DataFrame(rows, columns=["protocol", "section_id", "patient_id", "target", "gene", "pcc", "undefined"])
    pd.testing.assert_frame_equal(read_table(table.to_csv(index=False).encode()), table)


def test_a_score_in_the_list_is_in_every_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def bias_per_gene(truth: np.ndarray, prediction: np.ndarray, totals: np.ndarray) -> np.ndarray:
        return np.abs((prediction - truth).mean(axis=0))

    bias = scores.Score("bias", "Bias", by_gene=bias_per_gene, is_error=True, needs_unit=True)
    monkeypatch.setattr(scores, "SCORES", (*scores.SCORES, bias))
    card = random_card(0.5, 2.0)
    assert list(card.per_gene)[3:9] == ["pcc", "pcc_density_free", "mse", "mae", "level_mse", "bias"]
    of_model = card.rows.query("target == 'per_spot' and method == 'model' and gene_set == 'all'")
    by_gene = card.per_gene.query("target == 'per_spot' and method == 'model'")
    for row in of_model.to_dict("records"):
        assert row["bias"] == pytest.approx(by_gene.query("section_id == @row['section_id']")["bias"].mean())
    assert card.rows.query("kind == 'reference line'")["bias"].isna().all()
    mean = of_model.groupby("patient_id")["bias"].mean().mean()
    assert card.metrics()["test/model/bias"] == pytest.approx(mean)
    assert card.tags()["score.bias"] == f"{mean:.4f}"
    assert all("Bias" in verdict for verdict in card.verdicts())
    printed = Console(width=120, file=io.StringIO())
    printed.print(card_tables(card))
    assert f"{mean:.4f}" in printed.file.getvalue()
    save_card(card, tmp_path)
    table = target_tables(read_record(str(tmp_path)))[0]
    assert table.columns[-3:] == ["PCC between sections", "Bias", "undefined"]
    cells = {line.method: line.cells[-2] for line in table.overall.lines}
    assert cells["model"].text == f"{mean:.3f}"
    assert [method for method, cell in cells.items() if cell.is_best] == [
        min(("model", "train mean", "ridge on RGB"), key=lambda method: card.scores()["per_spot"][method]["bias"])
    ]


def test_a_result_from_before_a_score_is_shown_without_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_card(random_card(0.5, 2.0), tmp_path)
    before = target_tables(read_record(str(tmp_path)))
    newer = scores.Score("newer", "Newer", by_gene=lambda truth, prediction, totals: truth.mean(axis=0))
    monkeypatch.setattr(scores, "SCORES", (newer, *scores.SCORES))
    assert target_tables(read_record(str(tmp_path))) == before


@pytest.mark.odd
@pytest.mark.parametrize("lacking", [[0], [3, 17, 58], list(range(5, 60))])
def test_genes_that_are_not_measured_have_no_score_and_are_counted(lacking: list[int]) -> None:
    truth, prediction, totals = _section()
    prediction[:, 4] = 2.5
    measured = [gene for gene in range(60) if gene not in lacking]
    whole = gene_scores(truth[:, measured], prediction[:, measured], totals)
    unknown = truth.copy()
    unknown[:, lacking] = np.nan
    table = gene_scores(unknown, prediction, totals)
    assert table.iloc[lacking].isna().all(axis=None)
    pd.testing.assert_frame_equal(table.iloc[measured].reset_index(drop=True), whole)
    sets = gene_sets(unknown, {"two": np.array([lacking[0], 4])})
    assert not set(sets["heg50"]) & set(lacking)
    assert not set(sets["hvg50"]) & set(lacking)
    rows = set_table(table, sets).set_index("gene_set")
    expected = set_table(whole, gene_sets(truth[:, measured], {})).set_index("gene_set")
    columns = expected.columns.drop("not_measured")
    pd.testing.assert_frame_equal(rows.loc[expected.index, columns], expected[columns])
    assert rows["not_measured"].to_dict() == {"all": len(lacking), "heg50": 0, "hvg50": 0, "two": 1}
    assert rows.loc["two", ["num_genes", "undefined"]].tolist() == [1, 1]


@pytest.mark.odd
def test_tables_of_before_counted_no_unmeasured_genes() -> None:
    rows = set_table(gene_scores(*_section()), {"all": np.arange(60)})
    before = rows.drop(columns="not_measured")
    assert read_table(before.to_csv(index=False).encode())["not_measured"].tolist() == [0]
    assert "not_measured" not in read_table(b"gene,pcc\nGNAS,0.5\n")
