"""Columns of var and kinds that look like something else, genomes of several parts, Excel's names abroad."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from feature_lists import HUMAN, Listed, counts_by_gene, h5ad_by_id, left_out, write_h5ad
from section_reading import refused

from ingest.readers.features import named_features
from ingest.readers.spots import Gene
from mclstexp.data.gene_names import excel_names, gene_names, is_kind_of_gene, other_kind

GENES = [Gene(HUMAN[0], "GNAS", HUMAN[0]), Gene(HUMAN[1], "FASN", HUMAN[1]), Gene(HUMAN[2], "ERBB2", HUMAN[2])]


@pytest.mark.odd
@pytest.mark.parametrize(
    ("column", "cells"),
    [
        ("gene", [True, True, False]),
        ("features", [0, 3, 6]),
        ("genes", [0.5, np.nan, 2.0]),
        ("symbol", ["na", "na", "na"]),
        ("gene_name", ["chr1", "chr1", "chr1"]),
    ],
)
def test_a_column_that_holds_no_symbols_is_not_taken_for_them(tmp_path: Path, column: str, cells: list) -> None:
    listed = Listed(HUMAN[:3], ["GNAS", "FASN", "ERBB2"])
    row = write_h5ad(tmp_path, listed, pd.DataFrame({"gene_ids": listed.ids, column: cells}, index=listed.names))
    assert counts_by_gene(row, tmp_path) == {gene: listed.totals(i) for i, gene in enumerate(GENES)}


@pytest.mark.odd
@pytest.mark.parametrize(
    "kind", ["antisense", "sense_intronic", "processed_transcript", "Endogenous", "Housekeeping", "lincRNA", "TEC"]
)
def test_biotypes_of_old_annotations_are_genes(tmp_path: Path, kind: str) -> None:
    assert is_kind_of_gene(kind)
    listed = Listed(HUMAN[:3], ["GNAS", "FASN", "ERBB2"], ["protein_coding", kind, "Negative Control Probe"])
    row = h5ad_by_id(tmp_path, listed)
    assert counts_by_gene(row, tmp_path) == {gene: listed.totals(i) for i, gene in enumerate(GENES[:2])}
    assert left_out(row, tmp_path) == {"Negative Control Probe": 1}


@pytest.mark.odd
def test_symbols_before_ids_are_no_genome_even_if_some_repeat() -> None:
    found = named_features([f"TBCE_{HUMAN[0]}", f"TBCE_{HUMAN[1]}", f"GNAS_{HUMAN[2]}", "TBCE-AS1"])
    assert found.genes == (
        (HUMAN[0], "TBCE", HUMAN[0]),
        (HUMAN[1], "TBCE", HUMAN[1]),
        (HUMAN[2], "GNAS", HUMAN[2]),
        ("TBCE-AS1", "TBCE-AS1", ""),
    )


@pytest.mark.odd
@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("mm10_premrna___Xkr4", "Xkr4"),
        ("GRCh38-3.0.0_GNAS", "GNAS"),
        ("GRCh38-1.2.0_premrna_HLA-A", "HLA-A"),
        ("hg19-3.0.0_TP53", "TP53"),
    ],
)
def test_genomes_of_several_parts_are_taken_off(name: str, symbol: str) -> None:
    assert gene_names(name) == (symbol, symbol, "")


@pytest.mark.odd
@pytest.mark.parametrize("name", ["no_feature", "alignment_not_unique", "too_low_aQual", "not_aligned"])
def test_sums_of_htseq_are_no_genes(name: str) -> None:
    assert other_kind(name) == "reads without a gene"


@pytest.mark.odd
@pytest.mark.parametrize("name", ["2-mars", "1-sept.", "01-sept", "1-déc.", "01-dic", "1-set", "1. März", "5-ago"])
def test_excels_names_in_other_languages(name: str) -> None:
    assert excel_names([name]) == [name]


@pytest.mark.odd
def test_a_gene_that_a_joined_file_has_no_values_of_is_named(tmp_path: Path) -> None:
    listed = Listed(HUMAN[:3], ["GNAS", "FASN", "ERBB2"])
    row = h5ad_by_id(tmp_path, listed)
    data = anndata.read_h5ad(row.expression)
    data.X = np.where([False, True, False], np.nan, listed.counts)
    data.write_h5ad(row.expression)
    message = f"gene {HUMAN[1]} of spot a has the value nan, which is not a raw count; leave out genes that were not"
    assert message in refused(row, tmp_path)
