"""Panels: the genes that a table or a file gives, and sections that name those genes in another way."""

import logging
import re
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from random_version import random_version
from small_table import NAMES, make_table, random_counts

from mclstexp import storage
from mclstexp.config import Config, override
from mclstexp.data.panel import fit_panel
from mclstexp.data.schema import GENE_SCHEMA, MANIFEST, Manifest, encode_rows
from mclstexp.errors import ConfigError
from mclstexp.evaluation.evaluate import evaluate
from mclstexp.settings import GenesConfig
from mclstexp.training.run import open_run

SYMBOLS = [("GNAS", "GNAS", ""), ("FASN", "FASN", "")]
ENSEMBL = [("ENSG00000087460", "GNAS", "ENSG00000087460"), ("ENSG00000169710", "FASN", "ENSG00000169710")]
NAMELESS = [(gene_id, "", ensembl_id) for gene_id, _, ensembl_id in ENSEMBL]
OF_A = np.array([[3, 1, 0, 0], [0, 2, 0, 0], [5, 0, 0, 0]], np.int32)
OF_V = OF_A[:, [2, 3, 0, 1]]


def test_the_panel_is_the_most_variable_genes_of_the_training_sections(tmp_path: Path) -> None:
    sections = {"A1": random_counts(20, 0), "A2": random_counts(15, 1), "B1": random_counts(10, 2) * 50}
    sections["A2"][:, 3] = 0  # a gene without counts in one training section
    sections["A1"][4] = 0  # a spot without counts
    manifest = make_table(tmp_path, sections)
    panel = fit_panel(str(tmp_path), manifest, ["A1", "A2"], GenesConfig(num_genes=5))
    counts = np.concatenate([sections["A1"], sections["A2"]]).astype(float)
    totals = counts.sum(axis=1, keepdims=True)
    logs = np.log(1 + 1e4 * np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0))
    ranked = [gene for gene in np.argsort(-logs.var(axis=0)) if gene != 3]
    assert list(panel.gene_id) == [NAMES[gene] for gene in ranked[:5]]
    assert fit_panel(str(tmp_path), manifest, ["A2", "A1"], GenesConfig(num_genes=5)) == panel
    assert len(fit_panel(str(tmp_path), manifest, ["A1", "A2"], GenesConfig(num_genes=99))) == len(NAMES) - 1


def test_held_out_sections_do_not_touch_the_panel(tmp_path: Path) -> None:
    panels = []
    for index, held_out in enumerate(
        (random_counts(10, 2), np.zeros((10, len(NAMES)), np.int32), random_counts(10, 3) * 100)
    ):
        root = tmp_path / str(index)
        root.mkdir()
        manifest = make_table(root, {"A1": random_counts(20, 0), "B1": held_out})
        panels.append(fit_panel(str(root), manifest, ["A1"], GenesConfig(num_genes=4)))
    assert panels[0] == panels[1] == panels[2]


def test_equal_variances_are_ranked_by_gene_id(tmp_path: Path) -> None:
    counts = np.repeat(np.array([[1], [2], [5]], np.int32), len(NAMES), axis=1)
    manifest = make_table(tmp_path, {"A1": counts})
    panel = fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(num_genes=len(NAMES)))
    assert list(panel.gene_id) == sorted(NAMES)


@pytest.mark.parametrize("panel", ["hvg", "hvg_union"])
def test_genes_in_few_spots_leave_the_panel(tmp_path: Path, panel: str) -> None:
    counts = random_counts(20, 0)
    counts[:, 5] = 0
    counts[:3, 5] = 40  # the most variable by far
    manifest = make_table(tmp_path, {"A1": counts[:11], "A2": np.roll(counts, 10, axis=0)[:11]})
    few = [
        fit_panel(str(tmp_path), manifest, ["A1", "A2"], GenesConfig(panel=panel, min_spots=spots)).gene_id
        for spots in (0, 4, 5)
    ]
    in_spots = (counts[:11, 5] > 0).sum() + (np.roll(counts, 10, axis=0)[:11, 5] > 0).sum()
    assert in_spots == 4
    assert ["FASN" in panel for panel in few] == [True, True, False]
    with pytest.raises(ConfigError, match=r"genes\.min_spots=99"):
        fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(panel=panel, min_spots=99))


def test_a_panel_file_keeps_its_order_and_takes_symbols_and_ensembl_ids(tmp_path: Path) -> None:
    manifest = make_table(tmp_path, {"A1": random_counts(9, 0)})
    file = tmp_path / "panel.txt"
    file.write_text("MUC1\n\nENSG00000141510.17\nTP53\nMUC1\n")
    panel = fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(panel=str(file)))
    assert panel.gene_id == ("MUC1", "ENSG00000141510", "TP53")
    assert panel.names() == ["MUC1", "ENSG00000141510", "TP53"]


def test_unknown_genes_of_a_panel_file_are_named_or_dropped(tmp_path: Path) -> None:
    manifest = make_table(tmp_path, {"A1": random_counts(9, 0)})
    file = tmp_path / "panel.txt"
    file.write_text("MUC1\nNOPE1\nNOPE2\n")
    with pytest.raises(
        ConfigError, match=r"has 1 of the panel's 3 genes; missing: NOPE1, NOPE2; set genes\.missing=drop"
    ):
        fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(panel=str(file)))
    dropped = fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(panel=str(file), missing="drop"))
    assert dropped.gene_id == ("MUC1",)
    with pytest.raises(ConfigError, match="give a file, hvg or hvg_union"):
        fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(panel=str(tmp_path / "none.txt")))
    file.write_text("\n")
    with pytest.raises(ConfigError, match="no gene is left"):
        fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(panel=str(file)))


def test_a_panel_file_may_be_in_object_storage(tmp_path: Path, s3: str) -> None:
    manifest = make_table(tmp_path, {"A1": random_counts(9, 0)})
    storage.write(f"{s3}/panel.txt", b"MUC1\r\nTP53\r\n")
    panel = fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(panel=f"{s3}/panel.txt"))
    assert panel.gene_id == ("MUC1", "TP53")
    with pytest.raises(ConfigError, match=rf"genes\.panel={s3}/none\.txt: there is no such file; give a file, hvg or"):
        fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(panel=f"{s3}/none.txt"))


def test_a_panel_that_is_not_a_text_file_is_refused(tmp_path: Path) -> None:
    manifest = make_table(tmp_path, {"A1": random_counts(9, 0)})
    (tmp_path / "panel.xlsx").write_bytes(b"PK\xff\xfe")
    for path in (tmp_path, tmp_path / "panel.xlsx"):
        with pytest.raises(ConfigError, match=rf"genes\.panel={path}: .*; give a text file, hvg or hvg_union"):
            fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(panel=str(path)))


def _table(root: Path, genes: list[tuple[str, str, str]], sections: dict[str, np.ndarray]) -> Manifest:
    """A tile table over the given genes, as it could be published before symbols were joined."""
    manifest = make_table(root, sections, [gene[0] for gene in genes])
    columns = [list(column) for column in zip(*genes, strict=True)]
    file = root / "genes.parquet"
    pq.write_table(pa.table(columns, schema=GENE_SCHEMA), file)
    return manifest.model_copy(update={"genes_sha256": sha256(file.read_bytes()).hexdigest()})


def _panel_file(root: Path, *names: str) -> GenesConfig:
    (root / "panel.txt").write_text("\n".join(names))
    return GenesConfig(panel=str(root / "panel.txt"))


@pytest.mark.parametrize("names", [("ENSG00000087460", "ENSG00000169710"), ("GNAS", "ENSG00000169710")])
def test_a_table_that_holds_a_gene_under_two_names_is_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    manifest = _table(tmp_path, SYMBOLS + ENSEMBL, {"A1": OF_A, "V1": OF_V})
    with pytest.raises(ConfigError, match=r"genes\.panel=.*: section (A1|V1) counts [12] of its 2 genes under another"):
        fit_panel(str(tmp_path), manifest, ["A1", "V1"], _panel_file(tmp_path, *names))


def test_the_message_says_which_section_and_name(tmp_path: Path) -> None:
    manifest = _table(tmp_path, SYMBOLS + ENSEMBL, {"A1": OF_A, "V1": OF_V})
    config = _panel_file(tmp_path, "GNAS", "FASN")
    text = r"section V1 counts 2 of its 2 genes .*GNAS as ENSG00000087460, FASN as ENSG00000169710.*prepare into a new"
    with pytest.raises(ConfigError, match=text):
        fit_panel(str(tmp_path), manifest, ["A1", "V1"], config)
    assert fit_panel(str(tmp_path), manifest, ["A1"], config).gene_id == ("GNAS", "FASN"), "held-out ones do not matter"


def test_ensembl_genes_that_share_a_symbol_are_two_genes(tmp_path: Path) -> None:
    genes = [ENSEMBL[0], ("ENSG00000000001", "GNAS", "ENSG00000000001")]
    manifest = _table(tmp_path, genes, {"V1": OF_A[:, :2], "V2": OF_A[:, [2, 0]]})
    panel = fit_panel(str(tmp_path), manifest, ["V1"], _panel_file(tmp_path, "ENSG00000087460"))
    assert panel.gene_id == ("ENSG00000087460",)
    panel = fit_panel(str(tmp_path), manifest, ["V1"], _panel_file(tmp_path, "ENSG00000000001"))
    assert panel.symbol == ("GNAS",)


@pytest.mark.odd
def test_a_symbol_of_several_genes_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    genes = [ENSEMBL[0], ("ENSG00000000001", "GNAS", "ENSG00000000001"), ENSEMBL[1], ("ENSG00000000002", "", "")]
    manifest = _table(tmp_path, genes, {"V1": OF_A + 1})
    with caplog.at_level(logging.WARNING):
        panel = fit_panel(str(tmp_path), manifest, ["V1"], _panel_file(tmp_path, "FASN", "GNAS", "ENSG00000000001.7"))
    assert panel.gene_id == (ENSEMBL[1][0], ENSEMBL[0][0], "ENSG00000000001")
    assert "GNAS are the symbols of several genes, and the panel takes the first of each; give ids" in caplog.text
    assert "FASN" not in caplog.text


@pytest.mark.odd
def test_a_symbol_that_keeps_its_genome_is_found_as_it_is(tmp_path: Path) -> None:
    genes = [("mm10_H19", "mm10_H19", ""), ("GRCh38_H19", "GRCh38_H19", ""), SYMBOLS[0], SYMBOLS[1]]
    manifest = _table(tmp_path, genes, {"A1": OF_A + 1})
    panel = fit_panel(str(tmp_path), manifest, ["A1"], _panel_file(tmp_path, "GRCh38_H19", "GRCh38_FASN"))
    assert panel.gene_id == ("GRCh38_H19", "FASN")


def test_a_section_without_any_panel_gene_is_refused(tmp_path: Path) -> None:
    manifest = _table(tmp_path, SYMBOLS + NAMELESS, {"A1": OF_A, "V1": OF_V})
    with pytest.raises(ConfigError, match="section V1 has no count of any of its 2 genes") as caught:
        fit_panel(str(tmp_path), manifest, ["A1", "V1"], _panel_file(tmp_path, "GNAS", "FASN"))
    assert "(GNAS, FASN); the section names its genes ENSG00000087460, ENSG00000169710." in str(caught.value)


def test_single_genes_without_counts_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    silent = OF_A * [1, 0, 1, 1]
    manifest = _table(tmp_path, SYMBOLS + NAMELESS, {"A1": OF_A, "A2": silent.astype(np.int32)})
    with caplog.at_level(logging.WARNING):
        panel = fit_panel(str(tmp_path), manifest, ["A1", "A2"], _panel_file(tmp_path, "GNAS", "FASN"))
    assert panel.gene_id == ("GNAS", "FASN")
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "section A2 has no count of 1 of 2 genes"
    ]


@pytest.mark.parametrize("panel", ["hvg", "hvg_union"])
def test_where_no_gene_is_shared_the_names_are_shown_instead_of_a_setting(tmp_path: Path, panel: str) -> None:
    manifest = _table(tmp_path, SYMBOLS + NAMELESS, {"A1": OF_A, "V1": OF_V})
    with pytest.raises(ConfigError) as caught:
        fit_panel(str(tmp_path), manifest, ["A1", "V1"], GenesConfig(panel=panel))
    text = str(caught.value)
    assert "the training sections share no gene: A1 has GNAS, FASN; V1 has ENSG00000087460, ENSG00000169710." in text
    assert "min_spots" not in text


@pytest.mark.parametrize("side", ["validation", "test"])
@pytest.mark.parametrize(
    ("genes", "refusal"),
    [
        (SYMBOLS + NAMELESS, "the panel: section V1 has no count of any of its 2 genes"),
        (SYMBOLS + ENSEMBL, "the panel: section V1 counts 2 of its 2 genes under another name"),
    ],
)
def test_a_held_out_section_of_other_names_is_refused_before_training(
    tmp_path: Path, side: str, genes: list[tuple[str, str, str]], refusal: str
) -> None:
    manifest = _table(tmp_path, genes, {"A1": OF_A, "V1": OF_V}).model_copy(update={"tile_size_px": 16})
    (tmp_path / MANIFEST).write_bytes(manifest.encode())
    config = override(Config(), {"genes.num_genes": 2, f"split.{side}_patients": ["V"]})
    begun: list[str] = []

    def start(full: Config, name: str) -> str:
        begun.append(name)
        return name

    with pytest.raises(ConfigError, match=refusal):
        open_run(str(tmp_path), str(tmp_path / "runs"), None, config, start)
    assert begun == []


def test_a_section_of_other_names_is_not_scored_as_zeros(tmp_path: Path) -> None:
    cut = {"tile_size_px": 32, "mpp": 0.5}
    manifest = _table(tmp_path, SYMBOLS + NAMELESS, {"A1": OF_A, "V1": OF_V}).model_copy(update=cut)
    (tmp_path / MANIFEST).write_bytes(manifest.encode())
    panel = fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(num_genes=2))
    model = random_version()  # which says that A1 trained
    model.panel = panel
    with pytest.raises(ConfigError, match="the model's panel: section V1 has no count of any of its 2 genes"):
        evaluate(model, str(tmp_path), lambda *_: None, sections=["V1"])


def _partly_measured(root: Path, lacks: dict[str, list[int]]) -> tuple[Manifest, dict[str, np.ndarray]]:
    """Five training sections, of which some do not measure some genes; and their counts."""
    counts = {f"{letter}1": random_counts(12 + seed, seed) + 1 for seed, letter in enumerate("ABCDE")}
    measures = {name: ~np.isin(np.arange(len(NAMES)), lacks.get(name, [])) for name in counts}
    counts = {name: (values * measures[name]).astype(np.int32) for name, values in counts.items()}
    return make_table(root, counts, measures=measures), counts


@pytest.mark.odd
@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (1.0, {0, 3, 4, 5, 6, 7}),
        (0.8, {0, 1, 3, 4, 5, 6, 7}),
        (0.61, {0, 1, 3, 4, 5, 6, 7}),
        (0.6, set(range(8))),
        (0, set(range(8))),
    ],
)
def test_enough_training_sections_must_measure_a_gene(tmp_path: Path, share: float, expected: set[int]) -> None:
    manifest, _ = _partly_measured(tmp_path, {"A1": [1, 2], "B1": [2]})
    panel = fit_panel(str(tmp_path), manifest, ["A1", "B1", "C1", "D1", "E1"], GenesConfig(min_sections=share))
    assert set(panel.gene_id) == {NAMES[gene] for gene in expected}


@pytest.mark.odd
def test_a_gene_is_ranked_by_the_spots_that_measure_it(tmp_path: Path) -> None:
    manifest, counts = _partly_measured(tmp_path, {"B1": [1], "C1": [4], "D1": [4]})
    panel = fit_panel(str(tmp_path), manifest, list(counts), GenesConfig(min_sections=0.6))
    variance = []
    for gene in range(len(NAMES)):
        lacking = {1: ["B1"], 4: ["C1", "D1"]}.get(gene, [])
        logs = [
            np.log(1 + 1e4 * values[:, gene] / values.sum(axis=1))
            for name, values in counts.items()
            if name not in lacking
        ]
        variance.append(np.concatenate(logs).var())
    assert list(panel.gene_id) == [NAMES[gene] for gene in np.argsort(-np.array(variance))]


@pytest.mark.odd
@pytest.mark.parametrize("gene", [1, 2])
def test_a_measured_gene_without_counts_in_a_section_leaves_the_panel(tmp_path: Path, gene: int) -> None:
    counts = {name: random_counts(12, seed) + 1 for seed, name in enumerate(("A1", "B1", "C1"))}
    for name in ("A1", "B1"):
        counts[name][:, gene] = 0
    measures = {"A1": np.arange(len(NAMES)) != 1, "B1": np.arange(len(NAMES)) != 1}
    manifest = make_table(tmp_path, counts, measures=measures)
    panel = fit_panel(str(tmp_path), manifest, list(counts), GenesConfig(min_sections=0.3))
    assert (NAMES[gene] in panel.gene_id) == (gene == 1)
    published = fit_panel(str(tmp_path), manifest, list(counts), GenesConfig(panel="hvg_union", min_sections=0))
    assert NAMES[gene] not in published.gene_id, "which needs counts in all sections"


@pytest.mark.odd
@pytest.mark.parametrize("missing", ["error", "drop"])
def test_a_panel_files_gene_that_no_section_measures_is_named(
    tmp_path: Path, missing: str, caplog: pytest.LogCaptureFixture
) -> None:
    manifest, counts = _partly_measured(tmp_path, {name: [1] for name in ("A1", "B1")} | {"C1": [1, 2]})
    config = _panel_file(tmp_path, *NAMES[:4]).model_copy(update={"missing": missing})
    text = f"genes.panel={tmp_path}/panel.txt: no training section measures 1 of its 4 genes: {NAMES[1]}; "
    some = ["A1", "B1", "C1"]
    if missing == "error":
        with pytest.raises(ConfigError, match=re.escape(text + "set genes.missing=drop to drop them")):
            fit_panel(str(tmp_path), manifest, some, config)
        assert len(fit_panel(str(tmp_path), manifest, list(counts), config)) == 4, "D1 measures it"
        return
    assert fit_panel(str(tmp_path), manifest, some, config).gene_id == (NAMES[0], *NAMES[2:4])
    said = [record.getMessage() for record in caplog.records]
    assert text + "dropped" in said
    assert f"genes.panel={tmp_path}/panel.txt: section C1 does not measure 2 of 4 genes" in said


@pytest.mark.odd
def test_unknown_genes_are_dropped_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = make_table(tmp_path, {"A1": random_counts(9, 0)})
    config = _panel_file(tmp_path, "MUC1", "NOPE1").model_copy(update={"missing": "drop"})
    assert fit_panel(str(tmp_path), manifest, ["A1"], config).gene_id == ("MUC1",)
    assert "has 1 of the panel's 2 genes; missing: NOPE1; dropped" in caplog.text


@pytest.mark.odd
def test_a_held_out_section_that_measures_no_panel_gene_is_refused(tmp_path: Path) -> None:
    manifest, _ = _partly_measured(tmp_path, {"E1": [0, 1, 2, 3]})
    manifest = manifest.model_copy(update={"tile_size_px": 16})
    (tmp_path / MANIFEST).write_bytes(manifest.encode())
    panel = _panel_file(tmp_path, *NAMES[:4]).panel
    config = override(Config(), {"genes.panel": panel, "split.test_sections": ["E1"]})
    with pytest.raises(ConfigError, match="section E1 has no count of any of its 4 genes"):
        open_run(str(tmp_path), str(tmp_path / "runs"), None, config, lambda *_: "id")


@pytest.mark.odd
def test_a_gene_under_another_name_is_no_missing_assay(tmp_path: Path) -> None:
    genes = SYMBOLS + ENSEMBL
    manifest = _table(tmp_path, genes, {"A1": OF_A, "V1": OF_V})
    listed = {"A1": [True, True, False, False], "V1": [False, False, True, True]}
    entries = [
        entry.model_copy(update={"genes": encode_rows(np.array(listed[entry.section_id]))})
        for entry in manifest.sections
    ]
    manifest = manifest.model_copy(update={"sections": tuple(entries)})
    with pytest.raises(ConfigError, match="section V1 counts 2 of its 2 genes under another name"):
        fit_panel(str(tmp_path), manifest, ["A1", "V1"], _panel_file(tmp_path, "GNAS", "FASN"))
