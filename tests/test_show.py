"""The score card on the terminal: what its tables say, and that they fit."""

import io

import numpy as np
from random_card import MARKERS, random_card, row_of
from rich.console import Console

from mclstexp.evaluation.score_card import MODEL, ScoreCard
from mclstexp.evaluation.show import card_tables


def _printed(card: ScoreCard) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(card_tables(card))
    return console.file.getvalue()


def test_the_tables_name_protocol_units_patients_and_verdicts() -> None:
    card = random_card(0.1, 2.0, protocol="reference")
    card.rows.loc[(card.rows["section_id"] == "B1") & card.rows["gene_set"].isin(MARKERS), "num_genes"] = 1
    heading, own, levels, others, markers = _printed(card).split("\n\nprotocol reference; ")
    assert "may have trained" in " ".join(heading.split())
    assert own.startswith("target per_spot, ln(1 + x)")
    assert "patient B, 60 spots" in own
    assert "section B1" not in own
    assert levels.startswith("target per_spot, ln(1 + x)")
    assert "PCC between sections" in levels
    assert "patient" not in levels
    assert others.startswith("target per_gene, log10(1 + y)")
    assert "patient" not in others
    assert "1 to 2 gene(s)" in markers
    for expected in ("trained on A1", "interval over sections", "the model beats the ridge on RGB"):
        assert expected in markers


def test_the_sections_of_a_single_patient_are_shown() -> None:
    card = random_card(0.1, 2.0)
    own = {name: table[table["patient_id"] == "B"] for name, table in (("rows", card.rows), ("genes", card.per_gene))}
    text = _printed(ScoreCard(**(card.__dict__ | {"rows": own["rows"], "per_gene": own["genes"]})))
    assert "section B1, 30 spots" in text
    assert "patient B" not in text
    assert "±0" not in text


def test_the_terminal_shows_means_with_half_of_their_interval() -> None:
    card = random_card(0.5, 2.0)
    text = _printed(card)
    assert max(len(line) for line in text.splitlines()) <= 120
    lines = text.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("│   model"))
    mean = row_of(card.means(), method=MODEL, target="per_spot", gene_set="all")
    cells = [[cell.strip() for cell in line.split("│")[2:-1]] for line in lines[first : first + 2]]
    assert cells[0][0] == f"{mean['pcc']:.4f}"
    assert cells[1][0] == f"±{(mean['pcc_high'] - mean['pcc']):.4f}"
    assert cells[0][3] == f"{mean['pcc_density_free']:.4f}"
    assert cells[0][4] == f"{mean['mse']:.4f}"
    assert [cells[0][6], cells[1][6]] == ["0", ""]


def test_the_terminal_shows_the_levels_of_sections() -> None:
    card = random_card(0.5, 2.0, protocol="reference")
    table = _printed(card).split("\n\nprotocol reference; ")[2]
    found = {}
    for line in table.splitlines():
        if line.startswith("│   ") and line[4] != " ":
            method, *cells = (cell.strip() for cell in line.split("│")[1:-1])
            found[method] = cells
    for method, cells in found.items():
        mean = row_of(card.means(), method=method, target="per_spot", gene_set="all")
        values = [mean[name] for name in ("level_mse", "level_pcc")]
        expected = ["-" if np.isnan(value) else f"{value:.4f}" for value in values]
        assert cells == [*expected, f"{mean['undefined_level']:.0f}"]
    assert found["model"][2] == "0"
    assert found["train mean"][1:] == ["-", "8"]
    assert found["library-size oracle"][0] == "-"
