"""Spellings of genes' names, and the names of features that are no genes."""

import gzip
import os
from pathlib import Path

import pytest

from mclstexp.data.gene_names import excel_names, gene_names, is_kind_of_gene, made_unique, other_kind, stable_id
from mclstexp.data.genes import GenePanel, align, find_genes

real_data = pytest.mark.skipif("MCLSTEXP_DATA" not in os.environ, reason="MCLSTEXP_DATA names no folder of real data")

SPELLINGS = [
    ("ENSG00000087460.24", "ENSG00000087460"),
    ("GRCh38_ENSG00000087460", "ENSG00000087460"),
    ("GRCh38_ENSG00000087460.24", "ENSG00000087460"),
    ("GRCh38-2020-A_ENSG00000087460", "ENSG00000087460"),
    ("GRCh38-ENSG00000087460", "ENSG00000087460"),
    ("hg19_ENSG00000087460", "ENSG00000087460"),
    ("our_own_build_ENSG00000087460", "ENSG00000087460"),
    ("mm10___ENSMUSG00000027523", "ENSMUSG00000027523"),
    ("mm10---ENSMUSG00000027523.14", "ENSMUSG00000027523"),
    ("GRCm39_ENSMUSG00000027523", "ENSMUSG00000027523"),
    ("ENSG00000182378.15_PAR_Y", "ENSG00000182378"),
    ("ENSG00000182378_PAR_Y", "ENSG00000182378"),
    ("ENSG00000182378.15-PAR-Y", "ENSG00000182378"),
    ("ENSGR0000182378.10", "ENSG00000182378"),
    ("ENSG00000223972.5_2", "ENSG00000223972"),
    ("ENSG00000087460_GNAS", "ENSG00000087460"),
    ("GNAS|ENSG00000087460", "ENSG00000087460"),
    ("FBgn0031081", "FBgn0031081"),
    ("BDGP6_FBgn0031081", "FBgn0031081"),
    ("WBGene00000001", "WBGene00000001"),
    ("WBcel235_WBGene00000001", "WBGene00000001"),
    ("AT1G01010", "AT1G01010"),
    ("YAL001C", "YAL001C"),
]


@pytest.mark.odd
@pytest.mark.parametrize(("name", "gene_id"), SPELLINGS)
def test_every_spelling_of_a_stable_id_is_that_id(name: str, gene_id: str) -> None:
    assert gene_names(name) == (gene_id, "", gene_id)
    panel = GenePanel.from_names([name])
    table = GenePanel(("OTHER", gene_id), ("OTHER", "Symbol"), ("", gene_id)).to_table()
    assert align(panel, table).tolist() == [1]
    assert find_genes(GenePanel.from_table(table), [name]) == [1]


@pytest.mark.odd
@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("GRCh38_GNAS", "GNAS"),
        ("GRCh38-GNAS", "GNAS"),
        ("hg19_HLA-A", "HLA-A"),
        ("GRCh38-2020-A_GNAS", "GNAS"),
        ("mm10___Gnas", "Gnas"),
        ("mm10---Nkx2-1", "Nkx2-1"),
        ("GRCm39_0610007P14Rik", "0610007P14Rik"),
        ("Rnor_6.0_Gnas", "Gnas"),
    ],
)
def test_a_known_genome_is_taken_off_a_symbol(name: str, symbol: str) -> None:
    assert gene_names(name) == (symbol, symbol, "")
    table = GenePanel(("OTHER", symbol), ("OTHER", symbol), ("", "")).to_table()
    assert align(GenePanel.from_names([name]), table).tolist() == [1]
    assert find_genes(GenePanel.from_table(table), [name]) == [1]


def test_the_symbol_or_genome_beside_an_id_and_the_copy_on_y_are_told() -> None:
    assert stable_id("GRCh38_ENSG00000182378.15_PAR_Y") == ("ENSG00000182378", "GRCh38", "", True)
    assert stable_id("ENSGR0000182378") == ("ENSG00000182378", "", "", True)
    assert stable_id("ENSG00000087460.2_GNAS") == ("ENSG00000087460", "", "GNAS", False)
    assert stable_id("GNAS") is None


def test_a_panel_finds_a_gene_by_the_own_id_of_a_source() -> None:
    table = GenePanel(("AGAP004677", "AGAP000001"), ("X", "X"), ("AGAP004677", "AGAP000001")).to_table()
    assert align(GenePanel.from_names(["AGAP000001", "AGAP004677"]), table).tolist() == [1, 0]


OTHERS = {
    "Negative Control Probe": [
        *("NegControlProbe_00042", "NegControlProbe-00042", "NegPrb1", "Negative01", "NegativeControl_0001"),
        *("NegProbe-WTX", "antisense_PROKR2", "antisense-PROKR2", "GRCh38_NegControlProbe_00042"),
    ],
    "Negative Control Codeword": ["NegControlCodeword_0500", "FalseCode12", "Falsecode1"],
    "System Control": ["SystemControl1"],
    "Genomic Control": ["Intergenic_Region_0012", "GenomicControl_00001"],
    "Unassigned Codeword": ["BLANK_0006", "blank_0007", "Blank-1", "UnassignedCodeword_0003"],
    "Deprecated Codeword": ["DeprecatedCodeword_0160"],
    "Deprecated Probe": ["DEPRECATED_ENSG00000170345", "DEPRECATED-ENSG00000170345"],
    "ERCC spike-in": ["ERCC-00002", "ERCC_00002", "ERCC.00171", "gSpikein_ERCC-00002"],
    "Antibody Capture": ["CD3_TotalSeqB", "CD3.TotalSeqC", "IgG1_control_TotalSeqA", "ADT_CD4"],
    "Multiplexing Capture": ["Hashtag1", "Hashtag_2_TotalSeqB", "HTO_A", "CMO301"],
    "CRISPR Guide Capture": ["sgRNA_TP53_1"],
    "reads without a gene": ["__no_feature", "__ambiguous[ENSG1+ENSG2]", "__ambiguous.Acsl3.Utp14b", "N_multimapping"],
}


@pytest.mark.odd
@pytest.mark.parametrize("name", [name for names in OTHERS.values() for name in names])
def test_features_that_are_no_genes_are_known_by_name(name: str) -> None:
    kind = other_kind(name)
    assert kind is not None
    assert name in OTHERS[kind] or (name == "Hashtag_2_TotalSeqB" and kind == "Antibody Capture")


TRICKY = """
NEGR1 Negr1 NELFA ASIC1 ERCC1 ERCC6L2 Ercc8 ercc-1 BLNK blanks BLANK H2AX ANTXR1 HTO1 HTR1A CMOS CMC1 CMTM1 SYS1
FAS-AS1 TSIX PROKR2 DEPDC1 DEPP1 HASPIN SGRNA ADTRP adt-1 neg-1 CD3E CD3E-1 CD8A TOTAL1 N4BP1 GENE1 NTC MT-CO1
mt-Nd1 H2-K1 HLA-DRB1 AC002429.5 RP11-34P13.7 0610007P14Rik LOC101056159 Hbb-b1 7SK 5S_rRNA Y_RNA U6 lnc-NEG-1
"""


@pytest.mark.parametrize("name", TRICKY.split())
def test_genes_with_such_names_are_genes(name: str) -> None:
    assert other_kind(name) is None
    assert gene_names(name) == (name, name, "")
    assert excel_names([name]) == []


@real_data
def test_all_symbols_of_real_sections_are_genes() -> None:
    root = Path(os.environ["MCLSTEXP_DATA"])
    symbols: set[str] = set()
    for pattern in ("her2st/counts/*", "mob/*[0-9].tsv.gz", "spinal_cord/*[0-9].tsv.gz"):
        for path in root.glob(pattern):
            with gzip.open(path, "rt") as file:
                symbols |= set(file.readline().strip("\n").split("\t")) - {""}
    assert len(symbols) > 30_000
    others = {name for name in symbols if other_kind(name)}
    assert others == {name for name in symbols if name.startswith("__ambiguous")}
    assert {name for name in symbols if stable_id(name)} == {name for name in symbols if name.startswith("ENSMUSG")}
    assert all(gene_names(name)[1] == name for name in symbols if not stable_id(name))
    assert excel_names(symbols) == []


@pytest.mark.odd
@pytest.mark.parametrize("kind", ["Gene Expression", "gene expression", "GENE_EXPRESSION", "Gene", "rna", "nan", ""])
def test_kinds_that_are_genes(kind: str) -> None:
    assert is_kind_of_gene(kind)


@pytest.mark.parametrize("kind", ["protein_coding", "lncRNA", "processed_pseudogene", "IG_C_gene", "TEC", "Mt_tRNA"])
def test_biotypes_are_genes(kind: str) -> None:
    assert is_kind_of_gene(kind)


@pytest.mark.odd
@pytest.mark.parametrize(
    "kind",
    [
        *("Antibody Capture", "CRISPR Guide Capture", "Multiplexing Capture", "Antigen Capture", "Custom", "Peaks"),
        *("Negative Control Probe", "negative_control_codeword", "Genomic Control", "Unassigned Codeword"),
        *("Blank Codeword", "Deprecated Codeword", "Protein Expression", "Negative control gene", "synthetic"),
    ],
)
def test_kinds_that_are_not_genes(kind: str) -> None:
    assert not is_kind_of_gene(kind)


@pytest.mark.odd
@pytest.mark.parametrize(
    "name",
    [
        *("1-Mar", "01-Mar", "2-Sep", "Mar-01", "Sep-02", "1-Dec", "11-Oct", "1. Mrz", "X1.Mar", "1-Mar-20"),
        *("2020-03-01", "2020-03-01 00:00:00", "3/1/2020", "43891", "X43891", "2.31E+13", "2.31e+13", "X2.31E.13"),
    ],
)
def test_names_that_excel_made(name: str) -> None:
    assert excel_names(["GNAS", name, *(f"GENE{i}" for i in range(20))]) == [name]


def test_numbers_are_no_days_where_genes_have_numbers() -> None:
    assert excel_names(["43891", "2778", "2194", "7157"]) == []


def test_names_made_unique_have_the_plain_name_beside_them() -> None:
    assert made_unique(["TBCE", "TBCE-1", "NKX2-1", "HLA-A", "MATR3.1", "MATR3", "AC002429.5"]) == ["TBCE-1", "MATR3.1"]
