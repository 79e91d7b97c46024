"""Tables: every column against SciPy or NumPy by hand, and intervals against SciPy's."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from mclstexp.evaluation.scores import gene_scores, gene_sets, mean_intervals, read_table, set_table
from mclstexp.evaluation.sections import TARGETS, normalise_section


def _section(num_spots: int = 40, num_genes: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = rng.gamma(0.5, size=(num_spots, num_genes)).astype(np.float32)
    prediction = (truth + rng.normal(size=truth.shape)).astype(np.float32)
    return truth, prediction, rng.lognormal(7, 1, num_spots)


def test_the_gene_table_by_hand() -> None:
    truth, prediction, totals = _section()
    prediction[:, 4] = 2.5
    table = gene_scores(truth, prediction, totals)
    assert list(table) == ["truth_mean", "truth_variance", "pcc", "pcc_density_free", "mse", "mae"]
    assert len(table) == 60
    assert table["pcc"].isna().tolist() == table["pcc_density_free"].isna().tolist() == [g == 4 for g in range(60)]
    for gene in (0, 59):
        t, p, size = truth[:, gene].astype(float), prediction[:, gene].astype(float), np.log(totals + 1)
        left = [values - np.polyval(np.polyfit(size, values, 1), size) for values in (t, p)]
        expected = {
            "truth_mean": np.mean(t),
            "truth_variance": np.mean((t - np.mean(t)) ** 2),
            "pcc": scipy.stats.pearsonr(t, p).statistic,
            "pcc_density_free": scipy.stats.pearsonr(*left).statistic,
            "mse": np.mean((t - p) ** 2),
            "mae": np.mean(np.abs(t - p)),
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


def test_targets_by_hand() -> None:
    counts, totals = np.array([[1, 3], [4, 0]], np.float32), np.array([10.0, 8.0])
    expected = {
        "per_spot": np.log(1 + 1e4 * np.array([[1 / 10, 3 / 10], [4 / 8, 0]])),
        "per_spot_panel": np.log10(1 + 1e4 * np.array([[1 / 4, 3 / 4], [1, 0]])),
        "per_gene": np.log10(1 + 1e4 * np.array([[1 / 5, 1], [4 / 5, 0]])),
    }
    assert list(TARGETS) == list(expected)
    for name, target in TARGETS.items():
        np.testing.assert_allclose(normalise_section(target, counts, totals), expected[name], rtol=1e-6)


def test_names_that_look_like_numbers_or_gaps_stay_names_when_read_again() -> None:
    rows = [
        ("reference", "007", "NA", "per_spot", "nan", 0.5, 3),
        ("reference", "151507", "01", "1e3", "MARCH1", np.nan, 0),
    ]
    table = pd.DataFrame(rows, columns=["protocol", "section_id", "patient_id", "target", "gene", "pcc", "undefined"])
    pd.testing.assert_frame_equal(read_table(table.to_csv(index=False).encode()), table)
