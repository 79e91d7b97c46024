"""Panels, alignment and normalisation, against NumPy and against each other."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse
from small_table import NAMES, make_sentence, make_table

from mclstexp import storage
from mclstexp.data import genes
from mclstexp.data.genes import AFTER_NAME, GenePanel, Normaliser, unique_labels
from mclstexp.data.panel import fit_panel
from mclstexp.data.schema import GENE_SCHEMA, gene_names
from mclstexp.data.variability import normalised_dispersion
from mclstexp.errors import ConfigError, ModelError
from mclstexp.settings import GenesConfig


def _counts(num_spots: int, seed: int, num_genes: int = len(NAMES)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(1.0, 2.0, (num_spots, num_genes))).astype(np.int32)


def _ids(names: list[str]) -> pa.Table:
    return pa.table([list(c) for c in zip(*(gene_names(n) for n in names), strict=True)], schema=GENE_SCHEMA)


def test_the_panel_is_the_most_variable_genes_of_the_training_sections(tmp_path: Path) -> None:
    sections = {"A1": _counts(20, 0), "A2": _counts(15, 1), "B1": _counts(10, 2) * 50}
    sections["A2"][:, 3] = 0  # a gene that one training section lacks
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
    for place, held_out in enumerate((_counts(10, 2), np.zeros((10, len(NAMES)), np.int32), _counts(10, 3) * 100)):
        root = tmp_path / str(place)
        root.mkdir()
        manifest = make_table(root, {"A1": _counts(20, 0), "B1": held_out})
        panels.append(fit_panel(str(root), manifest, ["A1"], GenesConfig(num_genes=4)))
    assert panels[0] == panels[1] == panels[2]


def test_equal_variances_are_ranked_by_gene_id(tmp_path: Path) -> None:
    counts = np.repeat(np.array([[1], [2], [5]], np.int32), len(NAMES), axis=1)
    manifest = make_table(tmp_path, {"A1": counts})
    panel = fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(num_genes=len(NAMES)))
    assert list(panel.gene_id) == sorted(NAMES)


@pytest.mark.parametrize("panel", ["hvg", "hvg_union"])
def test_genes_in_few_spots_leave_the_panel(tmp_path: Path, panel: str) -> None:
    counts = _counts(20, 0)
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


def _levelled_counts(num_spots: int, seed: int, num_genes: int) -> np.ndarray:
    """Counts of genes of very unlike levels, so that some bins of the level hold many genes and some a single one."""
    rng = np.random.default_rng(seed)
    level, spread = rng.lognormal(0, 1.5, num_genes), rng.uniform(0.2, 3, num_genes)
    depth = rng.uniform(0.5, 2, (num_spots, 1))
    return rng.poisson(depth * level * rng.gamma(1 / spread, spread, (num_spots, num_genes))).astype(np.int32)


def _dispersion_by_hand(counts: np.ndarray) -> pd.DataFrame:
    """scanpy's default measure, gene by gene: level, dispersion, bin and the dispersion within the bin."""
    depth = counts.sum(axis=1)
    median = np.median([total for total in depth if total > 0])
    logs = np.log1p([spot * median / total if total else spot for spot, total in zip(counts, depth, strict=True)])
    found = []
    for gene in logs.T:
        values = pd.Series(np.expm1(gene))
        variance = values.var(ddof=1)
        found.append((np.log1p(values.mean()), np.log(variance / values.mean()) if variance > 1e-9 else np.nan))
    frame = pd.DataFrame(found, columns=["level", "dispersion"])
    frame["bin"] = pd.cut(frame["level"], bins=20)
    for _, members in frame.groupby("bin", observed=True):
        among = members["dispersion"]
        alone = among.notna().sum() == 1
        frame.loc[members.index, "normalised"] = among / among if alone else (among - among.mean()) / among.std()
    return frame


@pytest.mark.parametrize("seed", range(4))
def test_dispersion_is_relative_to_genes_of_the_same_level(seed: int) -> None:
    counts = _levelled_counts(50, seed, 120)
    counts[:, counts.sum(axis=0) == 0] = 1
    counts[7] = 0  # a spot without counts
    by_hand = _dispersion_by_hand(counts)
    sizes = by_hand["bin"].value_counts()
    assert sizes.max() > 5
    assert 1 in sizes.to_numpy()
    found = normalised_dispersion(scipy.sparse.csr_array(counts))
    np.testing.assert_allclose(found, by_hand["normalised"], rtol=1e-9, atol=1e-9)


def test_a_constant_gene_is_not_variable_and_takes_no_place(tmp_path: Path) -> None:
    much, little = np.array([1, 9, 5, 5]), np.array([4, 6, 5, 5])
    varying = [much, 10 - much, little, 10 - little]  # of one level, so that `little` is below the mean of its bin
    counts = np.stack(varying + [np.full(4, 3)] * 4, axis=1).astype(np.int32)  # all spots have the same total
    by_hand = _dispersion_by_hand(counts)["normalised"]
    assert np.sign(by_hand[:4]).tolist() == [1, 1, -1, -1]
    assert by_hand[4:].isna().all()
    np.testing.assert_allclose(normalised_dispersion(scipy.sparse.csr_array(counts)), by_hand, rtol=1e-9)
    manifest = make_table(tmp_path, {"A1": counts})
    for number, expected in ((1, 2), (2, 2), (4, 4), (8, 4)):  # the first two are equal
        config = GenesConfig(panel="hvg_union", num_genes=number)
        assert fit_panel(str(tmp_path), manifest, ["A1"], config).gene_id == NAMES[:expected]


def test_the_union_is_of_each_sections_most_variable_genes(tmp_path: Path) -> None:
    num_genes, each, min_spots = 120, 25, 30
    names = [f"G{place:03d}" for place in range(num_genes)]
    sections = {name: _levelled_counts(40, seed, num_genes) for seed, name in enumerate(("A1", "A2", "B1"))}
    sections["A2"][:, 3] = 0
    manifest = make_table(tmp_path, sections, names)
    config = GenesConfig(panel="hvg_union", num_genes=each, min_spots=min_spots)

    training = [sections["A1"], sections["A2"]]
    common = [gene for gene in range(num_genes) if all(counts[:, gene].any() for counts in training)]
    union: set[int] = set()
    for counts in training:
        measure = _dispersion_by_hand(counts[:, common])["normalised"].sort_values(ascending=False)
        assert measure.iloc[each - 1] > measure.iloc[each], "no tie to hide behind"
        union |= {common[place] for place in measure.index[:each]}
    often = [gene for gene in union if sum((counts[:, gene] > 0).sum() for counts in training) >= min_spots]
    assert each < len(often) < len(union) < 2 * each
    expected = tuple(names[gene] for gene in sorted(often))
    assert fit_panel(str(tmp_path), manifest, ["A1", "A2"], config).gene_id == expected
    assert fit_panel(str(tmp_path), manifest, ["A2", "A1"], config).gene_id == expected


def test_a_panel_file_keeps_its_order_and_takes_symbols_and_ensembl_ids(tmp_path: Path) -> None:
    manifest = make_table(tmp_path, {"A1": _counts(9, 0)})
    file = tmp_path / "panel.txt"
    file.write_text("MUC1\n\nENSG00000141510.17\nTP53\nMUC1\n")
    panel = fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(panel=str(file)))
    assert panel.gene_id == ("MUC1", "ENSG00000141510", "TP53")
    assert panel.names() == ["MUC1", "ENSG00000141510", "TP53"]


def test_unknown_genes_of_a_panel_file_are_named_or_dropped(tmp_path: Path) -> None:
    manifest = make_table(tmp_path, {"A1": _counts(9, 0)})
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


def test_a_panel_file_may_lie_in_object_storage(tmp_path: Path, s3: str) -> None:
    manifest = make_table(tmp_path, {"A1": _counts(9, 0)})
    storage.write(f"{s3}/panel.txt", b"MUC1\r\nTP53\r\n")
    panel = fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(panel=f"{s3}/panel.txt"))
    assert panel.gene_id == ("MUC1", "TP53")
    with pytest.raises(ConfigError, match=rf"genes\.panel={s3}/none\.txt: there is no such file; give a file, hvg or"):
        fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(panel=f"{s3}/none.txt"))


def test_a_panel_that_is_no_text_file_is_refused(tmp_path: Path) -> None:
    manifest = make_table(tmp_path, {"A1": _counts(9, 0)})
    (tmp_path / "panel.xlsx").write_bytes(b"PK\xff\xfe")
    for path in (tmp_path, tmp_path / "panel.xlsx"):
        with pytest.raises(ConfigError, match=rf"genes\.panel={path}: .*; give a text file, hvg or hvg_union"):
            fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(panel=str(path)))


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
    counts = _counts(11, 5)
    table = pa.concat_tables([make_sentence("A1", counts[:4]), make_sentence("A1", counts[4:])])
    columns = np.array([6, -1, 0, 3], np.int32)
    for part, expected in ((table, counts), (table.slice(3, 5), counts[3:8]), (table.slice(0, 0), counts[:0])):
        dense, totals = genes.panel_counts(part["gene_index"], part["count"], columns)
        wanted = expected[:, columns]
        wanted[:, 1] = 0
        np.testing.assert_array_equal(dense, wanted)
        np.testing.assert_array_equal(totals, expected.sum(axis=1))


def test_gene_totals_are_over_the_section(tmp_path: Path) -> None:
    counts = _counts(11, 5)
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
