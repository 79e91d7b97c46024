"""Score cards of random predictions, whose better method is known."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from mclstexp.data.genes import GenePanel
from mclstexp.data.measured import MeasuredSection
from mclstexp.evaluation.score_card import FLOOR, LINE, MODEL, ORACLE, ScoreCard
from mclstexp.evaluation.scores import gene_scores, gene_sets, set_table, without_unit
from mclstexp.evaluation.sections import SectionResult

GENES = [f"G{index}" for index in range(8)]
SECTIONS = {"B1": "B", "B2": "B", "C1": "C"}
TARGETS = {"per_spot": "ln(1 + x)", "per_gene": "log10(1 + y)"}
MARKERS = {"immune": np.array([2, 5]), "most significant (all)": np.array([1])}


def random_card(
    model_noise: float, ridge_noise: float, protocol: str = "patient", lacking: Mapping[str, list[int]] | None = None
) -> ScoreCard:
    """A card of three sections of two patients; more noise is a worse method.

    `lacking` has the genes that a section does not measure, for some sections.
    """
    rng = np.random.default_rng(0)
    rows, genes = [], []
    for target in TARGETS:
        for name, patient in SECTIONS.items():
            truth = rng.normal(5, 1, (30, len(GENES)))
            noise, totals = rng.normal(size=truth.shape), rng.lognormal(7, 1, 30)
            measured = truth.copy()
            measured[:, (lacking or {}).get(name, [])] = np.nan
            predicted = {
                (MODEL, MODEL): truth + model_noise * noise,
                ("train mean", FLOOR): np.full_like(truth, 5),
                ("ridge on RGB", FLOOR): truth + ridge_noise * noise,
                (ORACLE, LINE): np.tile(truth[:, :1], len(GENES)),
            }
            for (method, kind), prediction in predicted.items():
                table = gene_scores(measured, prediction, totals)
                if kind == LINE:
                    table = without_unit(table)
                of = {"section_id": name, "patient_id": patient}
                own = of | {"num_spots": 30, "target": target, "method": method, "kind": kind}
                rows.append(set_table(table, gene_sets(measured, MARKERS)).assign(**own))
                genes.append(table.assign(**of, target=target, method=method, gene=GENES))
    example = _result(measured, predicted[MODEL, MODEL])
    tables = pd.concat(rows, ignore_index=True), pd.concat(genes, ignore_index=True)
    return ScoreCard(protocol, TARGETS, "abc", ("trained on A1",), GENES, *tables, (example,))


def levels_card(protocol: str) -> ScoreCard:
    """A card of five sections of four patients with known levels; one section does not measure a gene."""
    rng = np.random.default_rng(3)
    base, tables, genes = random_card(1.0, 1.0, protocol), [], []
    for section in ("A1", "A2", "B1", "C1", "D1"):
        truth = rng.normal(rng.normal(3, 1, 4), 0.5, (int(rng.integers(9, 40)), 4)).astype(np.float32)
        truth[:, [3] if section in ("B1", "C1") else []] = np.nan
        model = np.nan_to_num(truth) + rng.normal(0, 0.5, 4) + rng.normal(size=truth.shape)
        train_mean = np.full(truth.shape, 0.1, np.float32)
        of = {"section_id": section, "patient_id": section[0], "target": "per_spot"}
        for method, prediction in ((MODEL, model.astype(np.float32)), ("train mean", train_mean)):
            own = of | {"method": method, "kind": MODEL if method == MODEL else FLOOR, "num_spots": len(truth)}
            table = gene_scores(truth, prediction, np.ones(len(truth)))
            tables.append(set_table(table, gene_sets(truth, {})).assign(**own))
            genes.append(table.assign(**of, method=method, gene=list("wxyz")))
    rows, per_gene = (pd.concat(parts, ignore_index=True) for parts in (tables, genes))
    return replace(base, targets={"per_spot": "ln(1 + x)"}, rows=rows, per_gene=per_gene)


def row_of(frame: pd.DataFrame, **where: str) -> pd.Series:
    """The only row with these values."""
    for column, value in where.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    return frame.iloc[0]


def _result(truth: np.ndarray, prediction: np.ndarray) -> SectionResult:
    array_xy = np.stack(np.meshgrid(np.arange(6.0), np.arange(5.0)), axis=-1).reshape(-1, 2)
    spots = np.array([f"spot{index}" for index in range(30)], object)
    label = np.array(["tumour"] * 20 + [None] * 10, object)
    section = MeasuredSection("C1", "C", spots, 200 * array_xy, 290 * array_xy, label, truth, truth.sum(axis=1))
    picture = np.full((20, 24, 3), 200, np.uint8)
    return SectionResult(section, GenePanel.from_names(GENES), truth, prediction, picture, 80.0)
