"""Genes and other features of a section in all formats: every count is under its gene, nothing else is a gene."""

from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from feature_lists import (
    ALL,
    EXPRESSION,
    HUMAN,
    MOUSE,
    WITH_BOTH,
    Listed,
    counts_by_gene,
    h5ad_by_id,
    h5ad_by_symbol,
    ignore_repeated_names,
    left_out,
    legacy_by_id,
    legacy_by_symbol,
    visium_mtx,
    write_h5ad,
)
from section_reading import read, refused

from ingest.header import Header, merged_genes, report
from ingest.readers.features import named_features
from ingest.readers.spots import Gene, Preview
from mclstexp.errors import SourceError

# ---------------------------------------------------------------- what is no gene

OTHERS = {
    "CD3E-1": "Antibody Capture",
    "sg_TP53": "CRISPR Guide Capture",
    "CMO301": "Multiplexing Capture",
    "NegControlProbe_00042": "Negative Control Probe",
    "NegControlCodeword_0500": "Negative Control Codeword",
    "BLANK_0006": "Unassigned Codeword",
    "Intergenic_Region_1": "Genomic Control",
    "DeprecatedCodeword_0160": "Deprecated Codeword",
}


def with_other(name: str, kind: str | None) -> Listed:
    kinds = None if kind is None else [EXPRESSION, kind, EXPRESSION]
    return Listed([HUMAN[0], name, HUMAN[1]], ["GNAS", name, "FASN"], kinds)


@pytest.mark.odd
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("write", WITH_BOTH)
def test_features_of_another_kind_are_left_out_and_counted(tmp_path: Path, write: Callable, name: str) -> None:
    listed = with_other(name, OTHERS[name])
    row = write(tmp_path, listed)
    genes = {Gene(HUMAN[0], "GNAS", HUMAN[0]): listed.totals(0), Gene(HUMAN[1], "FASN", HUMAN[1]): listed.totals(2)}
    assert counts_by_gene(row, tmp_path) == genes
    assert left_out(row, tmp_path) == {OTHERS[name]: 1}


@pytest.mark.odd
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NegControlProbe_00042", "Negative Control Probe"),
        ("antisense_PROKR2", "Negative Control Probe"),
        ("BLANK_0006", "Unassigned Codeword"),
        ("DEPRECATED_ENSG00000170345", "Deprecated Probe"),
        ("ERCC-00002", "ERCC spike-in"),
        ("CD3_TotalSeqB", "Antibody Capture"),
        ("Hashtag1", "Multiplexing Capture"),
        ("__ambiguous[A+B]", "reads without a gene"),
    ],
)
@pytest.mark.parametrize("write", ALL)
def test_features_without_kinds_are_known_by_name(tmp_path: Path, write: Callable, name: str, kind: str) -> None:
    listed = with_other(name, None)
    row = write(tmp_path, listed)
    found = counts_by_gene(row, tmp_path)
    assert [*found.values()] == [listed.totals(0), listed.totals(2)]
    assert left_out(row, tmp_path) == {kind: 1}


@pytest.mark.odd
@pytest.mark.parametrize("write", [h5ad_by_id, visium_mtx])
def test_a_control_among_gene_expression_is_left_out(tmp_path: Path, write: Callable) -> None:
    row = write(tmp_path, with_other("NegControlProbe_00042", EXPRESSION))
    assert len(counts_by_gene(row, tmp_path)) == 2


@pytest.mark.odd
@pytest.mark.parametrize("column", ["feature_types", "feature_type", "Feature_Types"])
def test_columns_of_kinds(tmp_path: Path, column: str) -> None:
    listed = Listed(HUMAN[:3], ["GNAS", "CD3E-1", "FASN"])
    var = pd.DataFrame({"gene_ids": listed.ids, column: ["gene_expression", "antibody_capture", np.nan]}, listed.names)
    row = write_h5ad(tmp_path, listed, var)
    assert [gene.symbol for gene in counts_by_gene(row, tmp_path)] == ["GNAS", "FASN"]
    assert left_out(row, tmp_path) == {"antibody_capture": 1}


@pytest.mark.odd
def test_kinds_that_only_var_states_hold_for_raw(tmp_path: Path) -> None:
    listed = Listed(
        ["GNAS", "CD3E-1", "FASN"], ["GNAS", "CD3E-1", "FASN"], [EXPRESSION, "Antibody Capture", EXPRESSION]
    )
    row = h5ad_by_symbol(tmp_path, listed)
    data = anndata.read_h5ad(row.expression)
    data.raw = anndata.AnnData(data.X[:, ::-1], data.obs, pd.DataFrame(index=listed.names[::-1]))
    data.X = np.log1p(data.X.toarray())
    data.write_h5ad(row.expression)
    assert {gene.symbol: counts for gene, counts in counts_by_gene(row, tmp_path).items()} == {
        "FASN": listed.totals(2),
        "GNAS": listed.totals(0),
    }
    assert left_out(row, tmp_path) == {"Antibody Capture": 1}


@pytest.mark.odd
def test_columns_of_joined_files_are_read_together(tmp_path: Path) -> None:
    listed = Listed(HUMAN[:3], ["GNAS", "FASN", "CD3E-1"])
    columns = {
        "gene_ids-0": [HUMAN[0], np.nan, np.nan],
        "feature_types-0": [EXPRESSION, np.nan, np.nan],
        "gene_ids-1": [np.nan, HUMAN[1], "CD3E.1"],
        "feature_types-1": [np.nan, EXPRESSION, "Antibody Capture"],
    }
    found = counts_by_gene(write_h5ad(tmp_path, listed, pd.DataFrame(columns, index=listed.names)), tmp_path)
    assert [*found] == [(HUMAN[0], "GNAS", HUMAN[0]), (HUMAN[1], "FASN", HUMAN[1])]


@pytest.mark.odd
@pytest.mark.parametrize("write", WITH_BOTH)
def test_a_section_without_genes_is_refused(tmp_path: Path, write: Callable) -> None:
    row = write(tmp_path, Listed(["CD3", "CD4"], ["CD3", "CD4"], ["Antibody Capture"] * 2))
    assert "no feature of the kind 'Gene Expression'; it has {'Antibody Capture': 2}" in refused(row, tmp_path)


@pytest.mark.odd
def test_a_spot_of_antibodies_alone_has_no_counts(tmp_path: Path) -> None:
    listed = with_other("CD3E-1", "Antibody Capture")
    row = h5ad_by_id(tmp_path, listed)
    with h5py.File(row.expression, "r+") as file:
        file["X/data"][[0, 2]] = 0
    assert [(reject.spot_id, reject.reason) for reject in read(row, tmp_path).rejected] == [("a", "no_counts")]


@pytest.mark.odd
def test_a_value_of_a_feature_that_is_left_out_need_not_be_a_count(tmp_path: Path) -> None:
    row = h5ad_by_id(tmp_path, with_other("CD3E-1", "Antibody Capture"))
    with h5py.File(row.expression, "r+") as file:
        file["X/data"][1] = 0.5
    assert len(counts_by_gene(row, tmp_path)) == 2
    with h5py.File(row.expression, "r+") as file:
        file["X/data"][2] = 0.5
    assert f"gene {HUMAN[1]} of spot a has the value 0.5" in refused(row, tmp_path)


# ---------------------------------------------------------------- ids

TWO_GENOMES = Listed(
    [*(f"GRCh38_{name}" for name in HUMAN[:3]), *(f"mm10___{name}" for name in MOUSE)],
    ["GRCh38_GNAS", "GRCh38_TBCE", "GRCh38_TBCE", "mm10___Gnas", "mm10___Fasn", f"mm10___{MOUSE[2]}"],
)


@pytest.mark.odd
@ignore_repeated_names
@pytest.mark.parametrize("write", WITH_BOTH)
def test_two_genomes_stay_apart_without_their_prefix(tmp_path: Path, write: Callable) -> None:
    symbols = ["GNAS", "TBCE", "TBCE", "Gnas", "Fasn", ""]
    ids = [*HUMAN[:3], *MOUSE]
    expected = {
        Gene(name, symbol, name): TWO_GENOMES.totals(i)
        for i, (name, symbol) in enumerate(zip(ids, symbols, strict=True))
    }
    assert counts_by_gene(write(tmp_path, TWO_GENOMES), tmp_path) == expected


@pytest.mark.odd
@pytest.mark.parametrize("prefix", ["GRCh38_", "GRCh38-", "hg19_", "GRCh38-2020-A_", "mm10___", "GRCm39_"])
@pytest.mark.parametrize("write", ALL)
def test_sections_with_a_genome_before_names_have_the_genes_of_those_without(
    tmp_path: Path, write: Callable, prefix: str
) -> None:
    plain = Listed(HUMAN[:3], ["GNAS", "FASN", "HLA-A"])
    spelled = Listed([f"{prefix}{name}.7" for name in plain.ids], [f"{prefix}{name}" for name in plain.names])
    (tmp_path / "plain").mkdir()
    expected = counts_by_gene(write(tmp_path / "plain", plain), tmp_path)
    assert counts_by_gene(write(tmp_path, spelled), tmp_path) == expected


@pytest.mark.odd
def test_a_genome_of_ones_own_is_known_by_the_ids_that_have_it(tmp_path: Path) -> None:
    features = named_features(["own_GNAS", "own_GFP", "own_FASN"], [f"own_{HUMAN[0]}", "own_GFP", f"own_{HUMAN[1]}"])
    assert features.genes == ((HUMAN[0], "GNAS", HUMAN[0]), ("GFP", "GFP", ""), (HUMAN[1], "FASN", HUMAN[1]))


@pytest.mark.odd
def test_a_symbol_of_two_genomes_keeps_them(tmp_path: Path) -> None:
    listed = Listed([], ["GRCh38_H19", "mm10_H19", "GRCh38_GNAS"])
    found = counts_by_gene(legacy_by_symbol(tmp_path, listed), tmp_path)
    assert [gene.gene_id for gene in found] == ["GRCh38_H19", "mm10_H19", "GNAS"]
    assert [*found.values()] == [listed.totals(i) for i in range(3)]


@pytest.mark.odd
@pytest.mark.parametrize(
    "ids",
    [
        [f"{HUMAN[0]}.5", f"{HUMAN[1]}.5", f"{HUMAN[1]}.5_PAR_Y", f"{HUMAN[2]}.5"],
        [HUMAN[0], HUMAN[1], f"{HUMAN[1]}_PAR_Y", HUMAN[2]],
        [HUMAN[0], HUMAN[1], f"ENSGR{HUMAN[1][5:]}", HUMAN[2]],
        [f"GRCh38_{HUMAN[0]}", f"GRCh38_{HUMAN[1]}", f"GRCh38_{HUMAN[1]}_PAR_Y", f"GRCh38_{HUMAN[2]}"],
    ],
    ids=["version", "plain", "before GENCODE 25", "genome"],
)
@ignore_repeated_names
@pytest.mark.parametrize("write", [*WITH_BOTH, legacy_by_id])
def test_the_copy_of_a_gene_on_y_is_added_to_it(tmp_path: Path, write: Callable, ids: list[str]) -> None:
    listed = Listed(ids, ["GNAS", "CRLF2", "CRLF2", "FASN"])
    found = counts_by_gene(write(tmp_path, listed), tmp_path)
    assert [gene.gene_id for gene in found] == HUMAN[:3]
    assert [*found.values()] == [listed.totals(0), listed.totals(1, 2), listed.totals(3)]


@pytest.mark.odd
def test_a_sum_above_the_largest_count_is_refused() -> None:
    features = named_features([HUMAN[0], f"{HUMAN[0]}_PAR_Y"])
    large = 2**31 - 1
    assert features.counts(sp.csr_array([[large, 0]]), ["a"]).toarray().tolist() == [[large]]
    with pytest.raises(SourceError, match=f"gene {HUMAN[0]} of spot b has the value 2147483648"):
        features.counts(sp.csr_array(np.array([[1, 1], [large, 1]], np.int32)), ["a", "b"])


@pytest.mark.odd
@ignore_repeated_names
@pytest.mark.parametrize("write", WITH_BOTH)
@pytest.mark.parametrize(
    "ids",
    [
        ["FBgn0000001", "FBgn0000002", "FBgn0000003"],
        ["WBGene00000001", "WBGene00000002", "WBGene00000003"],
        ["AT1G01010", "AT1G01020", "ATMG00010"],
        ["YAL001C", "YBR121C-A", "YPL222W"],
        HUMAN[:3],
        ["AGAP004677", "AGAP000001", "AGAP000002"],
        ["2778", "2194", "7157"],
        ["gene-1", "gene-2", "gene-3"],
    ],
    ids=lambda ids: ids[0],
)
def test_symbols_may_repeat_under_unique_ids(tmp_path: Path, write: Callable, ids: list[str]) -> None:
    listed = Listed(ids, ["Gnas", "Sirup", "Sirup"])
    row = write(tmp_path, listed)
    expected = {
        Gene(name, symbol, name): listed.totals(i)
        for i, (name, symbol) in enumerate(zip(ids, listed.names, strict=True))
    }
    assert counts_by_gene(row, tmp_path) == expected


@pytest.mark.odd
@pytest.mark.parametrize("write", WITH_BOTH[:2])
def test_unknown_ids_do_not_replace_unique_symbols(tmp_path: Path, write: Callable) -> None:
    found = counts_by_gene(write(tmp_path, Listed(["2778", "2194"], ["GNAS", "FASN"])), tmp_path)
    assert [*found] == [("GNAS", "GNAS", ""), ("FASN", "FASN", "")]


@pytest.mark.odd
@pytest.mark.parametrize("write", [visium_mtx, h5ad_by_symbol, legacy_by_id])
@pytest.mark.parametrize(
    "ids", [[HUMAN[0]] * 2, [f"{HUMAN[0]}.1", f"{HUMAN[0]}.2"], [f"GRCh38_{HUMAN[0]}", HUMAN[0]], ["X", "X"]], ids=str
)
def test_a_real_duplicate_is_refused_by_name(tmp_path: Path, write: Callable, ids: list[str]) -> None:
    listed = Listed(ids, ["GNAS", "FASN"] if ids[0] != "X" else ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        row = write(tmp_path, listed)
    named = "X" if ids[0] == "X" else HUMAN[0]
    assert f"gene appears more than once: {named}" in refused(row, tmp_path)


@pytest.mark.odd
def test_excels_names_that_met_are_explained() -> None:
    with pytest.raises(SourceError, match="more than once: 1-Mar; Excel makes such names of different symbols"):
        named_features(["1-Mar", "GNAS", "1-Mar"])


# ---------------------------------------------------------------- columns and tables


@pytest.mark.odd
@pytest.mark.parametrize(
    "column", ["gene_ids", "gene_id", "GeneID", "ensembl_id", "ENSEMBL", "ensembl_gene_id", "feature_id", "ID"]
)
def test_columns_of_ids(tmp_path: Path, column: str) -> None:
    listed = Listed([f"{name}.3" for name in HUMAN[:3]], ["GNAS", "FASN", "ERBB2"])
    expected = {Gene(HUMAN[i], listed.names[i], HUMAN[i]): listed.totals(i) for i in range(3)}
    assert counts_by_gene(h5ad_by_symbol(tmp_path, listed, column), tmp_path) == expected


@pytest.mark.odd
@pytest.mark.parametrize(
    "column",
    [
        *("gene_symbols", "gene_symbol", "symbol", "SYMBOL", "Symbol", "gene_name", "GeneName", "feature_name"),
        *("gene_short_name", "hgnc_symbol", "gene", "features"),
    ],
)
def test_columns_of_symbols(tmp_path: Path, column: str) -> None:
    listed = Listed([f"{name}.3" for name in HUMAN[:3]], ["GNAS", "FASN", "ERBB2"])
    expected = {Gene(HUMAN[i], listed.names[i], HUMAN[i]): listed.totals(i) for i in range(3)}
    assert counts_by_gene(h5ad_by_id(tmp_path, listed, column), tmp_path) == expected


@pytest.mark.odd
@ignore_repeated_names
@pytest.mark.parametrize("column", ["gene_symbols", "gene_name"])
def test_names_made_unique_beside_symbols_stay_symbols(tmp_path: Path, column: str) -> None:
    listed = Listed(["GNAS", "TBCE", "TBCE-1"], ["GNAS", "TBCE", "TBCE"])
    found = counts_by_gene(h5ad_by_id(tmp_path, listed, column), tmp_path)
    assert [*found] == [(name, name, "") for name in listed.ids], "so that they meet other sections' symbols"


@pytest.mark.odd
def test_ids_in_the_index_fill_a_column_of_ids_with_gaps(tmp_path: Path) -> None:
    listed = Listed(HUMAN[:3], ["GNAS", "FASN", "ERBB2"])
    var = pd.DataFrame({"gene_ids": [HUMAN[0], np.nan, ""], "gene_name": ["GNAS", "FASN", np.nan]}, index=listed.ids)
    found = counts_by_gene(write_h5ad(tmp_path, listed, var), tmp_path)
    assert [*found] == [(HUMAN[0], "GNAS", HUMAN[0]), (HUMAN[1], "FASN", HUMAN[1]), (HUMAN[2], "", HUMAN[2])]


@pytest.mark.odd
@pytest.mark.parametrize("ids", [["2778", "2194", "7157"], ["AGAP01", "AGAP02", "AGAP03"]], ids=lambda ids: ids[0])
def test_a_section_named_by_its_own_ids_meets_others_by_symbols_that_are_unique(ids: list[str]) -> None:
    by_id, by_symbol = named_features(["GNAS", "Y", "Y"], ids).genes, named_features(["GNAS", "FASN"]).genes
    table = merged_genes([], [by_symbol, by_id])
    assert table[0] == (ids[0], "GNAS", ids[0])
    assert [gene.gene_id for gene in table] == [ids[0], "FASN", *ids[1:]]


@pytest.mark.odd
@pytest.mark.parametrize("names", [["0", "1", "2"], ["1", "2", "3"], ["V1", "V2", "V3"]], ids=str)
def test_numbers_of_columns_are_no_names(tmp_path: Path, names: list[str]) -> None:
    listed = Listed(names, ["GNAS", "FASN", "ERBB2"])
    assert [gene.gene_id for gene in counts_by_gene(h5ad_by_id(tmp_path, listed), tmp_path)] == listed.names
    message = "3 of its genes have neither a name nor an id, or only a number"
    assert message in refused(write_h5ad(tmp_path, listed, pd.DataFrame(index=names)), tmp_path)


@pytest.mark.odd
@pytest.mark.parametrize("write", WITH_BOTH[:2])
def test_ids_and_names_may_be_exchanged(tmp_path: Path, write: Callable) -> None:
    found = counts_by_gene(write(tmp_path, Listed(["GNAS", "FASN"], [f"{HUMAN[0]}.4", HUMAN[1]])), tmp_path)
    assert [*found] == [(HUMAN[0], "GNAS", HUMAN[0]), (HUMAN[1], "FASN", HUMAN[1])]


@pytest.mark.odd
@pytest.mark.parametrize("form", ["{id}_{symbol}", "{symbol}_{id}", "{id}|{symbol}", "{symbol}|{id}.3"])
def test_id_and_symbol_in_one_name(tmp_path: Path, form: str) -> None:
    symbols = ["GNAS", "NKX2-1", "HLA-A"]
    listed = Listed([form.format(id=HUMAN[i], symbol=symbol) for i, symbol in enumerate(symbols)], symbols)
    expected = {Gene(HUMAN[i], symbol, HUMAN[i]): listed.totals(i) for i, symbol in enumerate(symbols)}
    assert counts_by_gene(legacy_by_id(tmp_path, listed), tmp_path) == expected


@pytest.mark.odd
@pytest.mark.parametrize("form", ['"{}"', " {}", "{} ", "\ufeff{}", '\ufeff"{}"'])
def test_what_surrounds_a_name_is_no_part_of_it(tmp_path: Path, form: str) -> None:
    listed = Listed([form.format(name) for name in HUMAN[:2]], [form.format(name) for name in ("GNAS", "FASN")])
    found = counts_by_gene(visium_mtx(tmp_path, listed), tmp_path)
    assert [*found] == [(HUMAN[0], "GNAS", HUMAN[0]), (HUMAN[1], "FASN", HUMAN[1])]


@pytest.mark.odd
@pytest.mark.parametrize("write", WITH_BOTH)
@ignore_repeated_names
def test_an_antibody_with_a_genes_name_is_no_duplicate(tmp_path: Path, write: Callable) -> None:
    listed = Listed(
        [HUMAN[0], "CD3E", HUMAN[1]], ["CD3E", "CD3E", "FASN"], [EXPRESSION, "Antibody Capture", EXPRESSION]
    )
    found = counts_by_gene(write(tmp_path, listed), tmp_path)
    assert found[Gene(HUMAN[0], "CD3E", HUMAN[0])] == listed.totals(0)
    assert len(found) == 2


@pytest.mark.odd
@ignore_repeated_names
def test_sections_of_all_spellings_share_their_genes(tmp_path: Path) -> None:
    symbols = ["GNAS", "CRLF2", "CRLF2", "FASN"]
    plain = named_features([HUMAN[0], HUMAN[1], HUMAN[2]]).genes
    spelled = named_features(symbols, [HUMAN[0], f"{HUMAN[1]}.5", f"{HUMAN[1]}.5_PAR_Y", f"GRCh38_{HUMAN[2]}"]).genes
    alone = named_features(["GRCh38_GNAS", "CRLF2", "FASN"]).genes
    table = merged_genes([], [plain, spelled, alone])
    assert table == tuple(Gene(HUMAN[i], symbol, HUMAN[i]) for i, symbol in enumerate(("GNAS", "CRLF2", "FASN")))


def _reported(**names: list[str]) -> str:
    previews = {name: named_features(listed) for name, listed in names.items()}
    headers = {name: Header(0.5, "sheet", Preview(found.genes, found.left_out)) for name, found in previews.items()}
    return report(headers, merged_genes([], [found.genes for found in previews.values()]))


@pytest.mark.odd
def test_the_report_names_excels_and_made_unique_names() -> None:
    plain = [f"GENE{i}" for i in range(10)]
    text = _reported(A=[*plain, "1-Mar", "43891", "TBCE", "TBCE-1"], B=[*plain, "2-Sep", "1-Mar"], C=plain)
    assert "genes      3 names look as Excel changes symbols" in text
    assert ": 1-Mar, 43891, 2-Sep, in 2 section(s) (A, B)" in text
    assert "genes      1 names have a number to make them unique" in text
    assert ": TBCE-1, in 1 section(s) (A)" in text
    assert "Excel" not in _reported(C=plain)
    assert "unique" not in _reported(C=plain)


@pytest.mark.odd
def test_the_report_counts_what_is_left_out_and_names_the_ids() -> None:
    text = _reported(A=["FBgn0000001", "FBgn0000002", "ERCC-00002", "ERCC-00003"], B=["FBgn0000001", "ERCC-00002"])
    assert "genes by   ids (FBgn): 1 in common of 1 to 2 in each of 2 section(s) (A, B)" in text
    assert "left out   1 to 2 features of ERCC spike-in in 2 section(s) (A, B)" in text
