"""The gene table of sources that name genes in different ways, and sections that are cut over it."""

import csv
import gzip
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from ingest.header import gene_rows, merged_genes, read_header
from ingest.plan import Plan, make_plan
from ingest.readers.spots import Gene, named_gene
from ingest.section import cut_section
from mclstexp.config import Config, override
from mclstexp.data.schema import SectionEntry
from mclstexp.data.table import read_columns, read_counts

GNAS, FASN = named_gene("GNAS", "ENSG00000087460"), named_gene("FASN", "ENSG00000169710")
BOTH, SYMBOLS = [GNAS, FASN], [named_gene("FASN"), named_gene("GNAS"), named_gene("ERBB2")]
OTHER_GNAS = named_gene("GNAS", "ENSG00000000001")


@pytest.mark.parametrize("present", ["nothing", "symbols", "both"])
def test_a_symbol_alone_is_the_one_ensembl_gene_of_that_symbol(present: str) -> None:
    tables = {"nothing": (), "symbols": tuple(SYMBOLS), "both": tuple(BOTH)}
    table = merged_genes(tables[present], [SYMBOLS, BOTH])
    assert sorted(table) == sorted([GNAS, FASN, named_gene("ERBB2")])
    rows = gene_rows(table)
    assert rows["GNAS"] == rows["ENSG00000087460"]
    assert rows["FASN"] == rows["ENSG00000169710"]
    for row, gene in enumerate(tables[present]):
        assert rows[gene.gene_id] == row, "stored gene indices stay valid"


@pytest.mark.parametrize(
    ("present", "sources"),
    [
        ((), [SYMBOLS, BOTH, [OTHER_GNAS]]),
        ((), [SYMBOLS, [*BOTH, OTHER_GNAS]]),
        ((), [SYMBOLS, [*BOTH, named_gene("GNAS")]]),
        ((named_gene("GNAS"), GNAS), [SYMBOLS, BOTH]),
    ],
    ids=["two sources", "one source", "one names both", "the table holds both"],
)
def test_where_it_is_not_clear_genes_stay_apart(present: tuple[Gene, ...], sources: list[list[Gene]]) -> None:
    table = merged_genes(present, sources)
    assert table[: len(present)] == present
    assert {named_gene("GNAS"), GNAS} <= set(table)
    rows = gene_rows(table)
    assert table[rows["GNAS"]] == named_gene("GNAS")
    assert table[rows["FASN"]] == FASN, "the others are joined"


def test_a_symbol_that_only_a_later_source_knows_joins_too() -> None:
    table = merged_genes([named_gene("ENSG00000087460"), named_gene("GNAT1")], [BOTH, SYMBOLS])
    assert table == (GNAS, named_gene("GNAT1"), FASN, named_gene("ERBB2"))


# ---------------------------------------------------------------- cut over it


def _mixed(folder: Path, cohort: str) -> tuple[str, pd.DataFrame]:
    """Writes the sheet of a section named by symbols and the same one named by both; returns it and the counts."""
    with open(cohort, newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["section_id"] == "P1S1")
    source = Path(cohort).parent
    legacy = 1 + pd.read_csv(source / row["expression"], sep="\t", index_col=0).iloc[:, :2]
    legacy.columns = ["FASN", "GNAS"]
    places = pd.read_csv(source / row["positions"], sep="\t").set_index(["x", "y"])
    place = [tuple(round(float(part)) for part in spot.split("x")) for spot in legacy.index]
    (folder / "symbols.tsv.gz").write_bytes(gzip.compress(legacy.to_csv(sep="\t").encode()))
    var = pd.DataFrame({"gene_ids": [GNAS.ensembl_id, FASN.ensembl_id]}, index=["GNAS", "FASN"])
    data = anndata.AnnData(legacy[["GNAS", "FASN"]].to_numpy(np.float32), pd.DataFrame(index=legacy.index), var)
    data.obsm["spatial"] = places.loc[place, ["pixel_x", "pixel_y"]].to_numpy()
    data.write_h5ad(folder / "both.h5ad")
    common = {"image": str(source / row["image"]), "mpp": row["mpp"]}
    rows = [
        {"section_id": "V1", "patient_id": "V", "format": "h5ad", "expression": "both.h5ad"},
        {"section_id": "A1", "patient_id": "A", "format": "legacy_st", "expression": "symbols.tsv.gz"}
        | {"positions": str(source / row["positions"])},
    ]
    pd.DataFrame([common | each for each in rows]).to_csv(folder / "samples.csv", index=False)
    return str(folder / "samples.csv"), legacy


def _cut(plan: Plan, section_id: str) -> SectionEntry:
    fingerprint, row = next((name, row) for name, row in plan.todo.items() if row.section_id == section_id)
    return cut_section(row, plan.recipe, gene_rows(plan.genes), plan.root, fingerprint)


def test_sections_of_both_ways_of_naming_share_their_genes(cohort: str, tmp_path: Path) -> None:
    sheet, counts = _mixed(tmp_path, cohort)
    settings = {"tiles.size_px": 16, "tiles.min_tissue": 0.0}
    plan = make_plan(sheet, str(tmp_path / "out"), override(Config(), settings), lambda rows: map(read_header, rows))
    assert plan.genes == (GNAS, FASN)
    assert "2 symbols alone are taken for the Ensembl gene of that symbol: FASN, GNAS" in plan.sources
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
