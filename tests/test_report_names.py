"""A report of sections whose names look like numbers, as sample sheets often have them."""

import numpy as np
import pandas as pd
import pytest

from mclstexp.data.genes import GenePanel
from mclstexp.evaluation.measured import MeasuredSection
from mclstexp.evaluation.score_card import MODEL, ScoreCard
from mclstexp.evaluation.section_file import SectionResult
from mclstexp.evaluation.tables import gene_sets, gene_table, set_table
from mclstexp.report.biology import significant_genes
from mclstexp.report.results import Result, open_result

PATIENTS = {"01": "007", "02": "1e3"}
PANEL = GenePanel(("ENSG1", "ENSG5", "ENSG6"), ("GNAS", "TWICE", "TWICE"), ("ENSG1", "ENSG5", "ENSG6"))


def _section(name: str) -> SectionResult:
    rng = np.random.default_rng(int(name))
    place = np.indices((5, 6)).reshape(2, -1).T * 100.0
    truth = rng.gamma(2.0, size=(len(place), len(PANEL)))
    said = truth + np.array([0.1, 1.0, 20.0]) * rng.normal(size=truth.shape)
    spots, labels = np.arange(len(place)).astype(str).astype(object), np.full(len(place), None)
    section = MeasuredSection(name, PATIENTS[name], spots, place, place, labels, truth, truth.sum(axis=1))
    return SectionResult(section, PANEL, truth, said, np.full((50, 60, 3), 200, np.uint8), thumbnail_scale=10.0)


def _card() -> ScoreCard:
    rows, per_gene, results = [], [], [_section(name) for name in PATIENTS]
    for result in results:
        name, table = result.section.section_id, gene_table(result.truth, result.prediction, result.section.totals)
        of = {"section_id": name, "patient_id": PATIENTS[name], "target": "per_spot", "method": MODEL}
        rows.append(set_table(table, gene_sets(result.truth, {})).assign(**of, num_spots=30, kind=MODEL))
        per_gene.append(table.assign(**of, gene=PANEL.names()))
    tables = pd.concat(rows, ignore_index=True), pd.concat(per_gene, ignore_index=True)
    return ScoreCard("patient", {"per_spot": "ln(1 + x)"}, "abc", (), PANEL.names(), *tables, tuple(results))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("result")
    _card().save(folder)
    return open_result(str(folder), folder)


def test_names_that_look_like_numbers_stay_names(result: Result) -> None:
    own = result.per_gene[["section_id", "patient_id"]].drop_duplicates().to_numpy().tolist()
    assert own == [list(pair) for pair in PATIENTS.items()]
    assert significant_genes(result).loc[0, "sections"] == 2
