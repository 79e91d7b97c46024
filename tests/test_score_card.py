"""The score card: means, words for who wins, and files that say the same."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from mclstexp.evaluation.metrics import Scores, pearson_per_gene, score
from mclstexp.evaluation.score_card import FLOOR, LINE, MODEL, ScoreCard, SectionResult, score_row

GENES = [f"G{index}" for index in range(8)]
SECTIONS = {"B1": "B", "B2": "B", "C1": "C"}


def _card(model_noise: float, ridge_noise: float, protocol: str = "patient") -> ScoreCard:
    rng = np.random.default_rng(0)
    rows, genes = [], []
    for name, patient in SECTIONS.items():
        truth = rng.normal(5, 1, (30, len(GENES)))
        noise = rng.normal(size=truth.shape)
        said = {
            (MODEL, MODEL): truth + model_noise * noise,
            ("train mean", FLOOR): np.full_like(truth, 5),
            ("ridge on RGB", FLOOR): truth + ridge_noise * noise,
            ("library-size oracle", LINE): np.tile(truth[:, :1], len(GENES)),
        }
        for (method, kind), prediction in said.items():
            rows.append(score_row(name, patient, len(truth), method, kind, score(truth, prediction)))
            pcc = {"gene": GENES, "truth_mean": truth.mean(0), "pcc": pearson_per_gene(truth, prediction)}
            genes.append(pd.DataFrame({"section_id": name, "method": method} | pcc))
    example = SectionResult("C1", rng.uniform(size=(30, 2)), truth, said[MODEL, MODEL])
    return ScoreCard(
        protocol, "ln(1 + x)", "abc", ("trained on A1",), GENES, pd.DataFrame(rows), pd.concat(genes), example
    )


def _row(frame: pd.DataFrame, **where: str) -> pd.Series:
    for column, value in where.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    return frame.iloc[0]


def test_means_are_over_sections_and_undefined_is_summed() -> None:
    card = _card(1.0, 2.0)
    own = card.rows[card.rows["method"] == MODEL]
    mean = _row(card.means(), method=MODEL)
    assert mean["pcc_all"] == pytest.approx(own["pcc_all"].mean())
    assert mean["num_spots"] == 90
    assert _row(card.means(), method="train mean")["undefined"] == 3 * len(GENES)
    of_b = _row(card.patients(), method=MODEL, patient_id="B")
    assert of_b["mse"] == pytest.approx(own[own["patient_id"] == "B"]["mse"].mean())
    assert list(card.means()["method"]) == [MODEL, "train mean", "ridge on RGB", "library-size oracle"]


def test_a_reference_line_has_correlations_only() -> None:
    line = _row(_card(1.0, 2.0).means(), method="library-size oracle")
    assert np.isnan(line["mse"])
    assert np.isfinite(line["pcc_all"])


def test_verdicts_name_the_winner() -> None:
    mean, ridge = _card(0.1, 2.0).verdicts()
    assert mean.startswith("the model beats the train mean: MSE -")
    assert "PCC" not in mean
    assert ridge.startswith("the model beats the ridge on RGB: PCC all +")
    mean, ridge = _card(2.0, 0.1).verdicts()
    assert mean.startswith("the train mean WINS; the model stands at MSE +")
    assert ridge.startswith("the ridge on RGB WINS; the model stands at PCC all -")


def test_a_mixed_verdict_names_both_sides() -> None:
    scores = {MODEL: Scores(0.5, 0.2, 1.0, 2.0, 0), "ridge on RGB": Scores(0.4, 0.3, 2.0, 1.0, 0)}
    card = _card(1.0, 1.0)
    rows = pd.DataFrame(
        [score_row("B1", "B", 9, name, MODEL if name == MODEL else FLOOR, own) for name, own in scores.items()]
    )
    (verdict,) = ScoreCard(**(card.__dict__ | {"rows": rows})).verdicts()
    assert verdict == (
        "the model beats the ridge on RGB on PCC all +0.100, MSE -50.0%; the ridge on RGB WINS on the rest, the "
        "model stands at PCC HEG50 -0.100, MAE +100.0%"
    )


def test_a_model_without_correlations_loses_them() -> None:
    nan = float("nan")
    rows = [
        score_row("B1", "B", 9, MODEL, MODEL, Scores(nan, nan, 1.0, 1.0, 8)),
        score_row("B1", "B", 9, "ridge on RGB", FLOOR, Scores(0.1, 0.1, 2.0, 2.0, 0)),
    ]
    (verdict,) = ScoreCard(**(_card(1.0, 1.0).__dict__ | {"rows": pd.DataFrame(rows)})).verdicts()
    assert "the ridge on RGB WINS on the rest, the model stands at PCC all undefined" in verdict


def test_the_table_names_protocol_unit_patients_and_verdicts() -> None:
    card = _card(0.1, 2.0, protocol="reference")
    console = Console(width=160, file=io.StringIO())
    console.print(card.table())
    text = console.file.getvalue()
    for expected in ("protocol reference", "may have", "ln(1 + x)", "patient B, 60 spots", "section C1, 30 spots"):
        assert expected in text
    assert "trained on A1" in text
    assert "the model beats the ridge on RGB" in text


def test_the_files_hold_the_same_numbers(tmp_path: Path) -> None:
    card = _card(0.5, 2.0)
    card.save(tmp_path)
    record = json.loads((tmp_path / "score_card.json").read_text())
    assert record["protocol"] == "patient"
    assert record["means"][0]["pcc_all"] == pytest.approx(card.means()["pcc_all"][0])
    assert record["means"][1]["pcc_all"] is None
    assert record["verdicts"] == card.verdicts()
    rows = pd.read_csv(tmp_path / "score_card.csv")
    pd.testing.assert_frame_equal(rows, card.rows.reset_index(drop=True))
    assert len(pd.read_csv(tmp_path / "per_gene.csv")) == len(SECTIONS) * 4 * len(GENES)
    assert (tmp_path / "score_card.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_and_tags_for_the_registry() -> None:
    card = _card(0.5, 2.0)
    metrics = card.metrics()
    assert metrics["test/model/mse"] == pytest.approx(card.means()["mse"][0])
    assert "test/train_mean/pcc_all" not in metrics
    assert all(np.isfinite(value) for value in metrics.values())
    assert card.tags()["score.protocol"] == "patient"
