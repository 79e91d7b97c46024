"""Genes: names, alignment to a table, and normalisation, against NumPy and against each other."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from small_table import make_sentence, make_table, random_counts

from mclstexp.data import genes
from mclstexp.data.genes import AFTER_NAME, GenePanel, Normaliser, unique_labels
from mclstexp.data.schema import GENE_SCHEMA
from mclstexp.errors import ConfigError, ModelError, TableError


def test_genes_are_aligned_by_ensembl_id_and_else_by_symbol() -> None:
    panel = GenePanel(
        ("ENSG1", "ENSG2", "CD74", "ENSG4"), ("TP53", "VIM", "CD74", "X"), ("ENSG1", "ENSG2", "", "ENSG4")
    )
    table = pa.table(
        [["ENSG9", "VIM", "ENSG3", "ENSG1"], ["TP53", "VIM", "CD74", "OLD"], ["ENSG9", "", "ENSG3", "ENSG1"]],
        schema=GENE_SCHEMA,
    )
    columns = genes.align(panel, table)
    assert list(columns) == [3, 1, 2, -1]
    assert genes.coverage(panel, columns) == "the data has 3 of the panel's 4 genes; missing: X"


def test_a_symbol_of_another_ensembl_id_is_another_gene() -> None:
    panel = GenePanel(("ENSG1", "ENSG2"), ("X", "X"), ("ENSG1", "ENSG2"))
    table = pa.table([["ENSG1"], ["X"], ["ENSG1"]], schema=GENE_SCHEMA)
    assert list(genes.align(panel, table)) == [0, -1]


def test_genes_are_found_by_any_of_their_names() -> None:
    panel = GenePanel(
        ("ENSG01", "FASN", "ENSG03", "ENSG04"), ("GNAS", "FASN", "DUP", "DUP"), ("ENSG01", "", "ENSG03", "ENSG04")
    )
    assert genes.find_genes(panel, ["FASN", "ENSG01", "GNAS", "DUP"]) == [1, 0, 2, 3]
    assert genes.find_genes(panel, ["ENSG03.12"]) == [2]
    with pytest.raises(ConfigError) as caught:
        genes.find_genes(panel, ["gnas", "FASN", "XQ"])
    nearest = "gnas (did you mean GNAS?); XQ (known: GNAS, ENSG01, FASN, DUP, ENSG03 and 1 more)"
    assert str(caught.value) == f"the panel of 4 genes does not have {nearest}"


def test_labels_have_the_id_where_a_name_is_shared() -> None:
    names, ids = ["GNAS", "DUP", "DUP", "x"], ["ENSG1", "ENSG5", "ENSG6", "x"]
    assert unique_labels(names, ids) == ["GNAS", "DUP (ENSG5)", "DUP (ENSG6)", "x"]
    assert unique_labels(names, ids, form=AFTER_NAME) == ["GNAS", "DUP ENSG5", "DUP ENSG6", "x"]
    assert unique_labels(names[:2], ids[:2]) == ["GNAS", "DUP"], "the other one is not chosen"
    assert unique_labels(names[:2], ids[:2], ["GNAS", "DUP", "DUP"], ["x"]) == ["GNAS", "DUP (ENSG5)"]


def test_a_panel_is_a_gene_table_and_back() -> None:
    panel = GenePanel(("ENSG1", "VIM"), ("TP53", "VIM"), ("ENSG1", ""))
    assert GenePanel.from_table(panel.to_table()) == panel
    assert panel.to_table().schema == GENE_SCHEMA
    assert panel.take(np.array([1])) == GenePanel(("VIM",), ("VIM",), ("",))


def test_panel_counts_are_the_dense_columns(tmp_path: Path) -> None:
    counts = random_counts(11, 5)
    table = pa.concat_tables([make_sentence("A1", counts[:4]), make_sentence("A1", counts[4:])])
    columns = np.array([6, -1, 0, 3], np.int32)
    for part, expected in ((table, counts), (table.slice(3, 5), counts[3:8]), (table.slice(0, 0), counts[:0])):
        dense, totals = genes.panel_counts(part["gene_index"], part["count"], columns)
        wanted = expected[:, columns]
        wanted[:, 1] = 0
        np.testing.assert_array_equal(dense, wanted)
        np.testing.assert_array_equal(totals, expected.sum(axis=1))


def test_a_spot_with_other_numbers_of_genes_and_counts_is_refused() -> None:
    gene_index, count = (pa.chunked_array([pa.array(rows)]) for rows in ([[0, 1], [2]], [[5], [6, 7]]))
    with pytest.raises(TableError, match="more gene indices than counts"):
        genes.panel_counts(gene_index, count, np.arange(3))


def test_gene_totals_are_over_the_section(tmp_path: Path) -> None:
    counts = random_counts(11, 5)
    manifest = make_table(tmp_path, {"A1": counts})
    totals = genes.gene_totals(str(tmp_path), manifest, manifest.section("A1"), np.array([6, -1, 0], np.int32))
    np.testing.assert_array_equal(totals, [counts[:, 6].sum(), 0, counts[:, 0].sum()])


@pytest.mark.parametrize(("base", "divisor"), [("e", 1.0), ("10", np.log(10))])
def test_normalisation_by_hand(base: str, divisor: float) -> None:
    counts, totals = np.array([[1, 3], [0, 0]], np.float32), np.array([8.0, 0.0])
    schemes = {"per_spot_all": [1 / 8, 3 / 8], "per_spot_panel": [1 / 4, 3 / 4], "per_gene": [1 / 2, 0]}
    for scheme, shares in schemes.items():
        normaliser = Normaliser(scheme, 100.0, base)  # type: ignore[arg-type]
        expression = normaliser.apply(counts, totals, np.array([2.0, 0.0]))
        assert expression.dtype == np.float32
        np.testing.assert_allclose(expression, [np.log1p(100 * np.array(shares)) / divisor, [0, 0]], rtol=1e-6)


def test_per_gene_needs_the_sections_totals() -> None:
    with pytest.raises(ModelError, match="gene totals"):
        Normaliser("per_gene", 1e4, "10").apply(np.ones((2, 2)), np.ones(2), None)


def test_a_panel_survives_json() -> None:
    panel = GenePanel(("a", "ENSG1"), ("a", ""), ("", "ENSG1"))
    assert GenePanel.from_json(panel.to_json()) == panel
    assert panel.names() == ["a", "ENSG1"]
