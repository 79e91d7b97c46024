"""Panels, alignment and normalisation, against NumPy and against each other."""

from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mclstexp import storage
from mclstexp.data import genes
from mclstexp.data.genes import GenePanel, Normaliser
from mclstexp.data.schema import GENE_SCHEMA, MANIFEST, TILE_SCHEMA, Manifest, SectionEntry, gene_names, load_manifest
from mclstexp.data.table import tile_crc, write_section
from mclstexp.errors import ConfigError, ModelError
from mclstexp.settings import GenesConfig

NAMES = ["TP53", "ENSG00000141510", "ACTB", "CD74", "GNAS", "FASN", "VIM", "MUC1"]


def _sentence(section_id: str, counts: np.ndarray) -> pa.Table:
    rows = range(len(counts))
    columns = {
        "section_id": [section_id] * len(counts),
        "patient_id": [section_id[0]] * len(counts),
        "spot_id": [str(row) for row in rows],
        **{name: [0] * len(counts) for name in ("array_row", "array_col", "x_px", "y_px", "x_um", "y_um")},
        "image": [b"tile"] * len(counts),
        "tissue_fraction": [1.0] * len(counts),
        "label": pa.nulls(len(counts), pa.string()),
        "crc": [tile_crc(b"tile")] * len(counts),
        "gene_index": [np.flatnonzero(row) for row in counts],
        "count": [row[row > 0] for row in counts],
    }
    return pa.table(columns, schema=TILE_SCHEMA)


def _table(root: Path, sections: dict[str, np.ndarray], names: list[str] = NAMES) -> Manifest:
    """Writes a tile table of two sentences a section and returns its manifest."""
    entries = []
    for section_id, counts in sections.items():
        halves = np.array_split(counts, 2)
        written = write_section(root / f"{section_id}.parquet", [_sentence(section_id, half) for half in halves])
        entry = SectionEntry(
            section_id=section_id,
            patient_id=section_id[0],
            site="",
            file=f"{section_id}.parquet",
            **written.__dict__,
            num_spots=len(counts),
            measured=True,
            max_array=0,
            source_mpp=1.0,
            width_px=1,
            height_px=1,
            fingerprint="",
            rejects_file="",
            rejected={},
            num_labelled=0,
            thumbnail_file="",
            thumbnail_scale=1.0,
        )
        entries.append(entry)
    columns = list(zip(*(gene_names(name) for name in names), strict=True))
    pq.write_table(pa.table([list(column) for column in columns], schema=GENE_SCHEMA), root / "genes.parquet")
    manifest = Manifest(
        tile_size_px=8,
        mpp=1.0,
        encoding="jpeg",
        jpeg_quality=90,
        sentence_length=64,
        genes_file="genes.parquet",
        genes_sha256=sha256((root / "genes.parquet").read_bytes()).hexdigest(),
        num_genes=len(names),
        sections=tuple(entries),
    )
    storage.publish(str(root / MANIFEST), manifest.encode(), None)
    return load_manifest(str(root))


def _counts(num_spots: int, seed: int, num_genes: int = len(NAMES)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(1.0, 2.0, (num_spots, num_genes))).astype(np.int32)


def _ids(names: list[str]) -> pa.Table:
    return pa.table([list(c) for c in zip(*(gene_names(n) for n in names), strict=True)], schema=GENE_SCHEMA)


def test_the_panel_is_the_most_variable_genes_of_the_training_sections(tmp_path: Path) -> None:
    sections = {"A1": _counts(20, 0), "A2": _counts(15, 1), "B1": _counts(10, 2) * 50}
    sections["A2"][:, 3] = 0  # a gene that one training section lacks
    sections["A1"][4] = 0  # a spot without counts
    manifest = _table(tmp_path, sections)
    panel = genes.fit_panel(str(tmp_path), manifest, ["A1", "A2"], GenesConfig(num_genes=5))
    counts = np.concatenate([sections["A1"], sections["A2"]]).astype(float)
    totals = counts.sum(axis=1, keepdims=True)
    logs = np.log(1 + 1e4 * np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0))
    ranked = [gene for gene in np.argsort(-logs.var(axis=0)) if gene != 3]
    assert list(panel.gene_id) == [NAMES[gene] for gene in ranked[:5]]
    assert genes.fit_panel(str(tmp_path), manifest, ["A2", "A1"], GenesConfig(num_genes=5)) == panel
    assert len(genes.fit_panel(str(tmp_path), manifest, ["A1", "A2"], GenesConfig(num_genes=99))) == len(NAMES) - 1


def test_held_out_sections_do_not_touch_the_panel(tmp_path: Path) -> None:
    panels = []
    for place, held_out in enumerate((_counts(10, 2), np.zeros((10, len(NAMES)), np.int32), _counts(10, 3) * 100)):
        root = tmp_path / str(place)
        root.mkdir()
        manifest = _table(root, {"A1": _counts(20, 0), "B1": held_out})
        panels.append(genes.fit_panel(str(root), manifest, ["A1"], GenesConfig(num_genes=4)))
    assert panels[0] == panels[1] == panels[2]


def test_equal_variances_are_ranked_by_gene_id(tmp_path: Path) -> None:
    counts = np.repeat(np.array([[1], [2], [5]], np.int32), len(NAMES), axis=1)
    manifest = _table(tmp_path, {"A1": counts})
    panel = genes.fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(num_genes=len(NAMES)))
    assert list(panel.gene_id) == sorted(NAMES)


def test_a_panel_file_keeps_its_order_and_takes_symbols_and_ensembl_ids(tmp_path: Path) -> None:
    manifest = _table(tmp_path, {"A1": _counts(9, 0)})
    file = tmp_path / "panel.txt"
    file.write_text("MUC1\n\nENSG00000141510.17\nTP53\nMUC1\n")
    panel = genes.fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(panel=str(file)))
    assert panel.gene_id == ("MUC1", "ENSG00000141510", "TP53")
    assert panel.names() == ["MUC1", "ENSG00000141510", "TP53"]


def test_unknown_genes_of_a_panel_file_are_named_or_dropped(tmp_path: Path) -> None:
    manifest = _table(tmp_path, {"A1": _counts(9, 0)})
    file = tmp_path / "panel.txt"
    file.write_text("MUC1\nNOPE1\nNOPE2\n")
    with pytest.raises(
        ConfigError, match=r"has 1 of the panel's 3 genes; it lacks NOPE1, NOPE2; set genes\.missing=drop"
    ):
        genes.fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(panel=str(file)))
    dropped = genes.fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(panel=str(file), missing="drop"))
    assert dropped.gene_id == ("MUC1",)
    with pytest.raises(ConfigError, match="give a file or hvg"):
        genes.fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(panel=str(tmp_path / "none.txt")))
    file.write_text("\n")
    with pytest.raises(ConfigError, match="no gene is left"):
        genes.fit_panel(str(tmp_path), manifest, ["A1"], GenesConfig(panel=str(file)))


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
    assert genes.coverage(panel, columns) == "the data has 3 of the panel's 4 genes; it lacks X"


def test_a_symbol_of_another_ensembl_id_is_another_gene() -> None:
    panel = GenePanel(("ENSG1", "ENSG2"), ("X", "X"), ("ENSG1", "ENSG2"))
    table = pa.table([["ENSG1"], ["X"], ["ENSG1"]], schema=GENE_SCHEMA)
    assert list(genes.align(panel, table)) == [0, -1]


def test_panel_counts_are_the_dense_columns(tmp_path: Path) -> None:
    counts = _counts(11, 5)
    table = pa.concat_tables([_sentence("A1", counts[:4]), _sentence("A1", counts[4:])])
    columns = np.array([6, -1, 0, 3], np.int32)
    for part, expected in ((table, counts), (table.slice(3, 5), counts[3:8]), (table.slice(0, 0), counts[:0])):
        dense, totals = genes.panel_counts(part["gene_index"], part["count"], columns)
        wanted = expected[:, columns]
        wanted[:, 1] = 0
        np.testing.assert_array_equal(dense, wanted)
        np.testing.assert_array_equal(totals, expected.sum(axis=1))


def test_gene_totals_are_over_the_section(tmp_path: Path) -> None:
    counts = _counts(11, 5)
    manifest = _table(tmp_path, {"A1": counts})
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
