"""Verdicts: who wins on which score, with the interval of the difference."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from random_card import GENES, random_card, row_of

from mclstexp.evaluation import scores, verdicts
from mclstexp.evaluation.score_card import FLOOR, MODEL, ScoreCard
from mclstexp.evaluation.scores import gene_scores, gene_sets, set_table

NAN = float("nan")


def _with_scores(scores: dict[str, tuple[float, ...]]) -> ScoreCard:
    """A card of one section whose methods have the given PCC all, PCC HEG50, density-free PCC, MSE and MAE."""
    rows, genes = [], []
    for method, (every, highest, density_free, mse, mae) in scores.items():
        of = {"section_id": "B1", "patient_id": "B", "target": "per_spot", "method": method}
        own = {"kind": MODEL if method == MODEL else FLOOR, "gene_set": "all", "num_spots": 9, "num_genes": 100}
        values = {
            "pcc": every,
            "pcc_density_free": density_free,
            "mse": mse,
            "rmse": mse**0.5,
            "mae": mae,
            "level_mse": NAN,
        }
        rows.append(of | own | values | {"undefined": 0, "undefined_density_free": 0})
        low, high = (
            {"pcc": pcc, "pcc_density_free": density_free, "truth_mean": mean, "truth_variance": 1.0}
            for pcc, mean in ((2 * every - highest, 1.0), (highest, 2.0))
        )
        genes += [of | part | {"gene": f"G{index}"} for index, part in enumerate([low] * 50 + [high] * 50)]
    return ScoreCard(**(random_card(1.0, 1.0).__dict__ | {"rows": pd.DataFrame(rows), "per_gene": pd.DataFrame(genes)}))


def _half_silent() -> ScoreCard:
    """A card whose model says nothing of three of seven genes and is good on the others; an eighth gene is constant."""
    rng = np.random.default_rng(1)
    truth, totals = rng.normal(5, 1, (30, 8)), rng.lognormal(7, 1, 30)
    truth[:, 7] = 0.1
    silent = truth + 0.7 * rng.normal(size=truth.shape)
    silent[:, 4:] = 5.0
    rows, genes = [], []
    for method, kind, predicted in (
        (MODEL, MODEL, silent),
        ("ridge on RGB", FLOOR, truth + rng.normal(size=truth.shape)),
    ):
        table = gene_scores(truth, predicted, totals)
        of = {"section_id": "B1", "patient_id": "B", "target": "per_spot", "method": method}
        rows.append(set_table(table, gene_sets(truth, {})).assign(**of, num_spots=30, kind=kind))
        genes.append(table.assign(**of, gene=GENES))
    return ScoreCard(**(random_card(1.0, 1.0).__dict__ | {"rows": pd.concat(rows), "per_gene": pd.concat(genes)}))


def test_verdicts_name_the_winner() -> None:
    mean, ridge = random_card(0.1, 2.0).verdicts()
    assert mean.startswith("the model beats the train mean: MSE -")
    assert "PCC" not in mean
    assert ridge.startswith("the model beats the ridge on RGB: PCC all +")
    mean, ridge = random_card(2.0, 0.1).verdicts()
    assert mean.startswith("the train mean WINS; the model stands at MSE +")
    assert ridge.startswith("the ridge on RGB WINS; the model stands at PCC all -")


def test_a_mixed_verdict_names_both_sides() -> None:
    (verdict,) = _with_scores({MODEL: (0.5, 0.2, 0.3, 1.0, 2.0), "ridge on RGB": (0.4, 0.3, 0.1, 2.0, 1.0)}).verdicts()
    assert verdict == (
        "the model beats the ridge on RGB on PCC all +0.100, PCC density-free +0.200, MSE -50.0%; the ridge on RGB "
        "WINS on the rest, the model stands at PCC HEG50 -0.100, MAE +100.0%"
    )


def test_a_verdict_has_the_interval_of_the_paired_difference() -> None:
    card = random_card(0.5, 2.0)
    own = card.rows.query("target == 'per_spot' and gene_set == 'all'")
    both = own.pivot(index=["section_id", "patient_id"], columns="method", values="pcc")
    of_patients = (both["model"] - both["ridge on RGB"]).groupby("patient_id").mean()
    reach = scipy.stats.t.ppf(0.975, 1) * of_patients.std() / np.sqrt(2)
    assert f"ridge on RGB: PCC all {of_patients.mean():+.3f} ±{reach:.3f}, " in card.verdicts()[1]
    errors = own.pivot(index=["section_id", "patient_id"], columns="method", values="mse").groupby("patient_id").mean()
    floor, gap = errors["train mean"].mean(), errors["model"] - errors["train mean"]
    reach = 100 / floor * scipy.stats.t.ppf(0.975, 1) * gap.std() / np.sqrt(2)
    assert f"train mean: MSE {100 * gap.mean() / floor:+.1f}% ±{reach:.1f}%" in card.verdicts()[0]


def test_a_level_that_is_the_train_mean_but_for_rounding_neither_wins_nor_loses() -> None:
    card = _with_scores({MODEL: (0.5, 0.2, 0.3, 1.0, 2.0), "train mean": (NAN, NAN, NAN, 2.0, 1.0)})

    def verdict(model: float, floor: float) -> str:
        is_model = card.rows["method"] == MODEL
        rows = card.rows.assign(level_mse=np.where(is_model, model, floor))
        (words,) = replace(card, rows=rows).verdicts()
        return words

    both = (
        "the model beats the train mean on MSE -50.0%; the train mean WINS on the rest, the model stands at MAE +100.0%"
    )
    assert verdict(0.2 + 1e-7, 0.2) == f"{both}; it equals the train mean in MSE between sections"
    assert verdict(0.2, 0.4).startswith("the model beats the train mean on MSE -50.0%, MSE between sections -50.0%; ")
    assert verdict(0.3, 0.2).endswith("the model stands at MAE +100.0%, MSE between sections +50.0%")


def test_a_model_without_correlations_loses_them() -> None:
    (verdict,) = _with_scores({MODEL: (NAN, NAN, NAN, 1.0, 1.0), "ridge on RGB": (0.1, 0.1, 0.1, 2.0, 2.0)}).verdicts()
    assert "the ridge on RGB WINS on the rest, the model stands at PCC all undefined" in verdict


@pytest.mark.parametrize(("gene_set", "column"), [("heg50", "truth_mean"), ("hvg50", "truth_variance")])
def test_a_set_of_genes_is_compared_over_its_own_genes(
    monkeypatch: pytest.MonkeyPatch, gene_set: str, column: str
) -> None:
    monkeypatch.setattr(verdicts, "NUM_HIGHEST", 3)
    monkeypatch.setattr(scores, "SCORES", (replace(scores.SCORES[0], compared=(gene_set,)),))
    genes = (card := _half_silent()).per_gene
    expected = {
        method: np.nan_to_num(rows.nlargest(3, column)["pcc"]).mean() for method, rows in genes.groupby("method")
    }
    words = f"PCC {gene_set.upper()} {expected[MODEL] - expected['ridge on RGB']:+.3f}"
    (verdict,) = card.verdicts()
    assert verdict.endswith(words), (verdict, words)


def test_an_undefined_correlation_counts_as_zero_in_verdicts() -> None:
    card = _half_silent()
    stated = {method: row_of(card.means(), method=method, gene_set="all") for method in (MODEL, "ridge on RGB")}
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
