"""What is reported of sections before they are cut, and the resolution that an array of spots gives."""

import numpy as np
import pytest

from ingest.header import Header, merged_genes, naming_system, report
from ingest.readers.spots import Preview, array_mpp, named_gene

BOTH, ENSEMBL, SYMBOLS = [
    [named_gene("GNAS", "ENSG00000087460.24"), named_gene("FASN", "ENSG00000169710.9")],
    [named_gene("ENSG00000087460.1"), named_gene("ENSG00000141736")],
    [named_gene("GNAS"), named_gene("FASN"), named_gene("ERBB2")],
]


def headers(**genes):
    return {name: Header(0.5, "the sheet", Preview(tuple(named))) for name, named in genes.items()}


def reported(present=(), **genes):
    found = headers(**genes)
    return report(found, merged_genes(present, [header.preview.genes for header in found.values()]), len(present))


def test_the_stated_mapping_of_names():
    assert named_gene("ENSG00000087460.24") == ("ENSG00000087460", "", "ENSG00000087460")
    assert named_gene("GNAS", ensembl="ENSG00000087460.24") == ("ENSG00000087460", "GNAS", "ENSG00000087460")
    assert named_gene("ENSMUSG00000027523", symbol="Gnas") == ("ENSMUSG00000027523", "Gnas", "ENSMUSG00000027523")
    assert named_gene("Gnas") == ("Gnas", "Gnas", "")
    assert named_gene("GNAS", ensembl="2778") == ("GNAS", "GNAS", "")


@pytest.mark.parametrize(
    ("genes", "system"),
    [
        (BOTH, "Ensembl ids (ENSG) and symbols"),
        (ENSEMBL, "Ensembl ids (ENSG)"),
        (SYMBOLS, "symbols"),
        ([named_gene("ENSMUSG00000027523"), named_gene("ENSG00000087460")], "Ensembl ids (ENSG, ENSMUSG)"),
        ([*SYMBOLS, *ENSEMBL], "symbols, some by Ensembl ids (ENSG)"),
        ([*(named_gene(f"GENE{i}") for i in range(20)), *ENSEMBL[:1]], "symbols"),
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
    assert "genes      1 in common of 2 to 3 in each of 3 section(s) (A, B, C); nothing is looked up elsewhere" in text
    assert "genes      2 symbols alone are taken for the Ensembl gene of that symbol: FASN, GNAS" in text
    assert "stay apart" not in text
    assert "genes      0 in common of 2 to 3 in each of 2 section(s) (A, C)" in reported(A=SYMBOLS, C=ENSEMBL)
    assert "genes      1 in common of 2 in each of 2 section(s)" in reported(B=BOTH, C=ENSEMBL), (
        "Ensembl ids meet without versions"
    )


def test_symbols_that_cannot_be_joined_are_named():
    text = reported(A=SYMBOLS, B=[*BOTH, named_gene("GNAS", "ENSG00000000001")])
    assert "genes      1 symbols alone are taken for the Ensembl gene of that symbol: FASN" in text
    assert "genes      1 symbols alone stay apart from Ensembl genes of that symbol: several have it, or" in text
    assert text.endswith("names both: GNAS")


def test_species_that_differ_in_case_are_pointed_out():
    text = reported(human=SYMBOLS, mouse=[named_gene("Gnas"), named_gene("Fasn")])
    assert "genes by   symbols: 0 in common" in text
    assert "2 symbols differ in case alone, as FASN, Fasn: they stay apart" in text


def test_nothing_to_report_of_nothing():
    assert reported() == ""
    assert reported(slide=[]) == "resolution 0.5 um/px by the sheet: 1 section(s) (slide)"


def grid():
    return np.array([(x, y) for x in range(6) for y in range(5)], float)


@pytest.mark.parametrize("mirrored", [1, -1])
@pytest.mark.parametrize("degrees", [0, 2, 90, 211])
def test_resolution_of_an_array_however_it_lies(degrees, mirrored):
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    pixel = (grid() * [mirrored, 1]) @ turn * 290 + [5000, 700]
    assert array_mpp(grid(), pixel, 200.0) == pytest.approx(200 / 290)


def test_resolution_of_every_second_place():
    """Arrays of 2,000 spots fill a chequerboard: neighbours are a diagonal apart."""
    place = grid()[grid().sum(axis=1) % 2 == 0]
    place = np.concatenate([place, place + np.array([6, 0])])
    assert array_mpp(place, place * 176.9, 150.0) == pytest.approx(150 / (176.9 * np.sqrt(2)))


def test_arrays_that_cannot_tell():
    line = np.array([(x, 0) for x in range(30)], float)
    assert array_mpp(line, line * 290, 200.0) is None
    assert array_mpp(grid()[:15], grid()[:15] * 290, 200.0) is None
    assert array_mpp(grid(), np.ones((30, 2)), 200.0) is None
