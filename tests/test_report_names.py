"""Names in a report: sections whose names look like numbers, and genes that share a symbol."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mclstexp.data.genes import GenePanel, unique_labels
from mclstexp.data.measured import MeasuredSection
from mclstexp.evaluation.save import save_card
from mclstexp.evaluation.score_card import MODEL, ScoreCard
from mclstexp.evaluation.scores import gene_scores, gene_sets, set_table
from mclstexp.evaluation.sections import SectionResult
from mclstexp.report.biology import order_genes, section_names, significant_genes, unique_names
from mclstexp.report.page_data import gene_data
from mclstexp.report.result import Result, open_result
from mclstexp.report.tables import gene_lines

PATIENTS = {"01": "007", "02": "1e3"}
PANEL = GenePanel(("ENSG1", "ENSG5", "ENSG6"), ("GNAS", "TWICE", "TWICE"), ("ENSG1", "ENSG5", "ENSG6"))
GENES = pa.table({"gene_id": PANEL.gene_id, "symbol": PANEL.symbol, "ensembl_id": PANEL.ensembl_id})
LABELS = unique_labels(PANEL.names(), PANEL.gene_id, GenePanel.from_table(GENES).names())


def _section(name: str) -> SectionResult:
    rng = np.random.default_rng(int(name))
    xy = np.indices((5, 6)).reshape(2, -1).T * 100.0
    truth = rng.gamma(2.0, size=(len(xy), len(PANEL)))
    predicted = truth + np.array([0.1, 1.0, 20.0]) * rng.normal(size=truth.shape)
    spots, labels = np.arange(len(xy)).astype(str).astype(object), np.full(len(xy), None)
    section = MeasuredSection(name, PATIENTS[name], spots, xy, xy, labels, truth, truth.sum(axis=1))
    return SectionResult(section, PANEL, truth, predicted, np.full((50, 60, 3), 200, np.uint8), thumbnail_scale=10.0)


def _card() -> ScoreCard:
    rows, per_gene, results = [], [], [_section(name) for name in PATIENTS]
    for result in results:
        name, table = result.section.section_id, gene_scores(result.truth, result.prediction, result.section.totals)
        of = {"section_id": name, "patient_id": PATIENTS[name], "target": "per_spot", "method": MODEL}
        rows.append(set_table(table, gene_sets(result.truth, {})).assign(**of, num_spots=30, kind=MODEL))
        per_gene.append(table.assign(**of, gene=LABELS))
    tables = pd.concat(rows, ignore_index=True), pd.concat(per_gene, ignore_index=True)
    return ScoreCard("patient", {"per_spot": "ln(1 + x)"}, "abc", (), LABELS, *tables, tuple(results))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("result")
    save_card(_card(), folder)
    return open_result(str(folder), folder)


def test_names_that_look_like_numbers_stay_names(result: Result) -> None:
    own = result.per_gene[["section_id", "patient_id"]].drop_duplicates().to_numpy().tolist()
    assert own == [list(pair) for pair in PATIENTS.items()]
    assert significant_genes(result).loc[0, "sections"] == 2


def test_a_symbol_of_several_genes_has_their_id_behind_it() -> None:
    assert LABELS == ["GNAS", "TWICE (ENSG5)", "TWICE (ENSG6)"]
    alone = GenePanel(("ENSG5", "x"), ("TWICE", ""), ("ENSG5", ""))  # a panel without the other one
    assert unique_labels(alone.names(), alone.gene_id, ["GNAS", "TWICE", "TWICE"]) == ["TWICE (ENSG5)", "x"]


def test_genes_that_share_a_symbol_have_means_of_their_own(result: Result) -> None:
    means, rows = (table.set_index("gene") for table in (result.gene_means, result.per_gene))
    assert sorted(means.index) == sorted(LABELS)
    for label in LABELS:
        assert means.loc[label, "mean"] == pytest.approx(rows.loc[label, "pcc"].mean())
    ranked = significant_genes(result).set_index("gene")
    assert ranked["sections"].to_dict() == dict.fromkeys(LABELS, 2)
    assert ranked.loc["TWICE (ENSG5)", "pcc"] > ranked.loc["TWICE (ENSG6)", "pcc"]


def test_the_gene_table_the_chooser_and_the_maps_use_the_same_names(result: Result) -> None:
    in_table = {line.gene for line in gene_lines(result)}
    ordered = order_genes(result, significant_genes(result), {}, ["TWICE"])
    assert in_table == set(LABELS) == set(ordered.names)
    assert ordered.sets == {"chosen": ["TWICE (ENSG5)", "TWICE (ENSG6)"]}
    section = result.section("01")
    assert set(gene_data(section, section_names(result, section), in_table)) == in_table


def test_genes_of_an_older_result_are_told_apart_on_the_page(result: Result) -> None:
    older = replace(result, per_gene=result.per_gene.assign(gene=result.per_gene["gene"].str.partition(" ")[0]))
    assert set(older.per_gene["gene"]) == {"GNAS", "TWICE"}
    assert unique_names(older) == LABELS
    assert set(order_genes(older, significant_genes(older), {}, []).names) == set(LABELS)
