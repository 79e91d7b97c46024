"""What sections state before they are cut: how genes are named, which genes the table gets, and the report."""

import csv
import gzip
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from section_reading import named_gene

from ingest.header import Header, gene_rows, merged_genes, naming_system, read_header, report
from ingest.plan import Plan, make_plan
from ingest.readers.features import named_features
from ingest.readers.spots import Gene, Preview
from ingest.section import cut_section
from mclstexp.config import Config, override
from mclstexp.data.schema import SectionEntry
from mclstexp.data.table import read_columns, read_counts

BOTH, ENSEMBL, SYMBOLS = [
    [named_gene("GNAS", "ENSG00000087460.24"), named_gene("FASN", "ENSG00000169710.9")],
    [named_gene("ENSG00000087460.1"), named_gene("ENSG00000141736")],
    [named_gene("GNAS"), named_gene("FASN"), named_gene("ERBB2")],
]


def headers(**genes):
    return {name: Header(0.5, "sheet", Preview(tuple(named))) for name, named in genes.items()}


def reported(present=(), **genes):
    found = headers(**genes)
    return report(found, merged_genes(present, [header.preview.genes for header in found.values()]), len(present))


@pytest.mark.parametrize(
    ("genes", "system"),
    [
        (BOTH, "Ensembl ids (ENSG) and symbols"),
        (ENSEMBL, "Ensembl ids (ENSG)"),
        (SYMBOLS, "symbols"),
        ([named_gene("ENSMUSG00000027523"), named_gene("ENSG00000087460")], "Ensembl ids (ENSG, ENSMUSG)"),
        ([*SYMBOLS, *ENSEMBL], "symbols, some by Ensembl ids (ENSG)"),
        ([*(named_gene(f"GENE{i}") for i in range(20)), *ENSEMBL[:1]], "symbols"),
        ([named_gene("FBgn0000001"), named_gene("WBGene00000001")], "ids (FBgn, WBGene)"),
        (named_features(["X", "X"], ["2778", "2194"]).genes, "ids of the source and symbols"),
        (named_features(["X", "X"], ["AGAP004677", "AGAP000001"]).genes, "ids (AGAP) and symbols"),
    ],
)
def test_naming_systems(genes, system):
    assert naming_system(genes) == system


def test_genes_in_common():
    lines = reported(A=SYMBOLS, B=SYMBOLS[:2]).splitlines()
    assert lines == [
        "resolution 0.5 um/px by the sheet: 2 section(s) (A, B)",
        "genes by   symbols: 2 in common of 2 to 3 in each of 2 section(s) (A, B)",
    ]


def test_new_sections_are_compared_with_the_table():
    present = [named_gene(name) for name in ("FASN", "ERBB2", "MUC1", "GNAT1")]
    text = reported(present, A=SYMBOLS)
    assert "genes      2 of those in common are among the 4 of the table so far" in text


def test_ways_of_naming_meet_in_the_gene_that_a_source_names_both_ways():
    text = reported(A=SYMBOLS, B=BOTH, C=ENSEMBL)
    assert "genes by   symbols: 3 in common of 3 in each of 1 section(s) (A)" in text
    assert "genes by   Ensembl ids (ENSG) and symbols: 2 in common of 2 in each of 1 section(s) (B)" in text
    assert (
        "genes      1 in common of 2 to 3 in each of 3 section(s) (A, B, C); names are not looked up elsewhere" in text
    )
    assert "genes      2 symbols without Ensembl id are the Ensembl gene with that symbol: FASN, GNAS" in text
    assert "stay separate" not in text
    assert "genes      0 in common of 2 to 3 in each of 2 section(s) (A, C)" in reported(A=SYMBOLS, C=ENSEMBL)
    assert "genes      1 in common of 2 in each of 2 section(s)" in reported(B=BOTH, C=ENSEMBL), (
        "Ensembl ids meet without versions"
    )


def test_symbols_that_cannot_be_joined_are_named():
    text = reported(A=SYMBOLS, B=[*BOTH, named_gene("GNAS", "ENSG00000000001")])
    assert "genes      1 symbols without Ensembl id are the Ensembl gene with that symbol: FASN" in text
    assert "genes      1 symbols without Ensembl id stay separate from Ensembl genes with that symbol, because" in text
    assert text.endswith("lists both: GNAS")


def test_species_that_differ_in_case_are_pointed_out():
    text = reported(human=SYMBOLS, mouse=[named_gene("Gnas"), named_gene("Fasn")])
    assert "genes by   symbols: 0 in common" in text
    assert "2 symbols differ only in case, such as FASN, Fasn: they stay separate" in text


def test_nothing_to_report_of_nothing():
    assert reported() == ""
    assert reported(slide=[]) == "resolution 0.5 um/px by the sheet: 1 section(s) (slide)"


GNAS, FASN = named_gene("GNAS", "ENSG00000087460"), named_gene("FASN", "ENSG00000169710")
TABLE, ALONE = [GNAS, FASN], [named_gene("FASN"), named_gene("GNAS"), named_gene("ERBB2")]
OTHER_GNAS = named_gene("GNAS", "ENSG00000000001")


@pytest.mark.parametrize("present", ["nothing", "symbols", "both"])
def test_a_symbol_alone_is_the_one_ensembl_gene_of_that_symbol(present: str) -> None:
    tables = {"nothing": (), "symbols": tuple(ALONE), "both": tuple(TABLE)}
    table = merged_genes(tables[present], [ALONE, TABLE])
    assert sorted(table) == sorted([GNAS, FASN, named_gene("ERBB2")])
    rows = gene_rows(table)
    assert rows["GNAS"] == rows["ENSG00000087460"]
    assert rows["FASN"] == rows["ENSG00000169710"]
    for row, gene in enumerate(tables[present]):
        assert rows[gene.gene_id] == row, "stored gene indices stay valid"


@pytest.mark.parametrize(
    ("present", "sources"),
    [
        ((), [ALONE, TABLE, [OTHER_GNAS]]),
        ((), [ALONE, [*TABLE, OTHER_GNAS]]),
        ((), [ALONE, [*TABLE, named_gene("GNAS")]]),
        ((named_gene("GNAS"), GNAS), [ALONE, TABLE]),
    ],
    ids=["two sources", "one source", "one names both", "the table holds both"],
)
def test_ambiguous_symbols_stay_separate(present: tuple[Gene, ...], sources: list[list[Gene]]) -> None:
    table = merged_genes(present, sources)
    assert table[: len(present)] == present
    assert {named_gene("GNAS"), GNAS} <= set(table)
    rows = gene_rows(table)
    assert table[rows["GNAS"]] == named_gene("GNAS")
    assert table[rows["FASN"]] == FASN, "the others are joined"


def test_a_symbol_that_only_a_later_source_knows_joins_too() -> None:
    table = merged_genes([named_gene("ENSG00000087460"), named_gene("GNAT1")], [TABLE, ALONE])
    assert table == (GNAS, named_gene("GNAT1"), FASN, named_gene("ERBB2"))


def _mixed(folder: Path, cohort: str) -> tuple[str, pd.DataFrame]:
    """Writes the sheet of a section named by symbols and the same one named by both; returns it and the counts."""
    with open(cohort, newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["section_id"] == "P1S1")
    source = Path(cohort).parent
    legacy = 1 + pd.read_csv(source / row["expression"], sep="\t", index_col=0).iloc[:, :2]
    legacy.columns = ["FASN", "GNAS"]
    selection = pd.read_csv(source / row["positions"], sep="\t").set_index(["x", "y"])
    grid_xy = [tuple(round(float(part)) for part in spot.split("x")) for spot in legacy.index]
    (folder / "symbols.tsv.gz").write_bytes(gzip.compress(legacy.to_csv(sep="\t").encode()))
    var = pd.DataFrame({"gene_ids": [GNAS.ensembl_id, FASN.ensembl_id]}, index=["GNAS", "FASN"])
    data = anndata.AnnData(legacy[["GNAS", "FASN"]].to_numpy(np.float32), pd.DataFrame(index=legacy.index), var)
    data.obsm["spatial"] = selection.loc[grid_xy, ["pixel_x", "pixel_y"]].to_numpy()
    data.write_h5ad(folder / "both.h5ad")
    common = {"image": str(source / row["image"]), "mpp": row["mpp"], "pitch_um": row["pitch_um"]}
    rows = [
        {"section_id": "V1", "patient_id": "V", "format": "h5ad", "expression": "both.h5ad"},
        {"section_id": "A1", "patient_id": "V", "format": "legacy_st", "expression": "symbols.tsv.gz"}
        | {"positions": str(source / row["positions"])},
    ]
    pd.DataFrame([common | each for each in rows]).to_csv(folder / "samples.csv", index=False)
    return str(folder / "samples.csv"), legacy


def _cut(plan: Plan, section_id: str) -> SectionEntry:
    digest, row = next((name, row) for name, row in plan.todo.items() if row.section_id == section_id)
    return cut_section(row, plan.recipe, gene_rows(plan.genes), plan.root, digest)


def test_sections_of_both_ways_of_naming_share_their_genes(cohort: str, tmp_path: Path) -> None:
    sheet, counts = _mixed(tmp_path, cohort)
    settings = {"tiles.size_px": 16, "tiles.min_tissue": 0.0}
    plan = make_plan(sheet, str(tmp_path / "out"), override(Config(), settings), lambda rows: map(read_header, rows))
    assert plan.genes == (GNAS, FASN)
    assert "2 symbols without Ensembl id are the Ensembl gene with that symbol: FASN, GNAS" in plan.sources
    found = {}
    for section_id in ("V1", "A1"):
        entry = _cut(plan, section_id)
        spots = read_columns(plan.root, entry, ["spot_id"])["spot_id"].to_pylist()
        found[section_id] = read_counts(plan.root, entry, len(plan.genes)).toarray()
        names = [spot.split("x") for spot in counts.index]
        expected = counts.set_axis([f"{round(float(x))}x{round(float(y))}" for x, y in names])
        if section_id == "V1":
            expected = counts
        np.testing.assert_array_equal(found[section_id], expected.loc[spots, ["GNAS", "FASN"]].to_numpy())
    assert (found["A1"].sum(axis=0) > 0).all()
    np.testing.assert_array_equal(found["A1"].sum(axis=0), found["V1"].sum(axis=0))


def test_the_report_states_how_spots_were_read():
    preview = Preview(tuple(BOTH), remarks=("3 of the file's 9 spots name no section and are in none",))
    headers = {"S1": Header(0.5, "sheet", preview), "S2": Header(0.5, "sheet", Preview(tuple(BOTH)))}
    lines = report(headers, merged_genes([], [BOTH])).splitlines()
    assert [line for line in lines if line.startswith("spots")] == [f"spots      S1: {preview.remarks[0]}"]
