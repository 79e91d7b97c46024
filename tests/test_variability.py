"""Which genes vary most: the rules against a reference written out by hand and against scanpy."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from anndata import AnnData
from small_table import NAMES, make_table

from ingest.readers import legacy_st
from mclstexp.data.panel import fit_panel
from mclstexp.data.sheet import SectionRow
from mclstexp.data.variability import normalised_dispersion
from mclstexp.settings import GenesConfig


def levelled_counts(num_spots: int, seed: int, num_genes: int) -> np.ndarray:
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
    counts = levelled_counts(50, seed, 120)
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
    names = [f"G{index:03d}" for index in range(num_genes)]
    sections = {name: levelled_counts(40, seed, num_genes) for seed, name in enumerate(("A1", "A2", "B1"))}
    sections["A2"][:, 3] = 0
    manifest = make_table(tmp_path, sections, names)
    config = GenesConfig(panel="hvg_union", num_genes=each, min_spots=min_spots)

    training = [sections["A1"], sections["A2"]]
    common = [gene for gene in range(num_genes) if all(counts[:, gene].any() for counts in training)]
    union: set[int] = set()
    for counts in training:
        measure = _dispersion_by_hand(counts[:, common])["normalised"].sort_values(ascending=False)
        assert measure.iloc[each - 1] > measure.iloc[each], "no tie to hide behind"
        union |= {common[index] for index in measure.index[:each]}
    often = [gene for gene in union if sum((counts[:, gene] > 0).sum() for counts in training) >= min_spots]
    assert each < len(often) < len(union) < 2 * each
    expected = tuple(names[gene] for gene in sorted(often))
    assert fit_panel(str(tmp_path), manifest, ["A1", "A2"], config).gene_id == expected
    assert fit_panel(str(tmp_path), manifest, ["A2", "A1"], config).gene_id == expected


def _by_scanpy(counts: np.ndarray, num_genes: int | None = None) -> pd.DataFrame:
    """Returns scanpy's table of highly variable genes with its defaults, or with a number of genes to choose."""
    import scanpy  # here, since importing it takes seconds

    data = AnnData(counts.astype(np.float64))
    scanpy.pp.normalize_total(data)
    scanpy.pp.log1p(data)
    scanpy.pp.highly_variable_genes(data, n_top_genes=num_genes)
    return data.var


@pytest.mark.filterwarnings("ignore:Some cells have zero counts:UserWarning")
@pytest.mark.parametrize("seed", range(4))
def test_dispersion_is_scanpys(seed: int) -> None:
    """The normalised dispersion of every variable gene agrees, with a gene alone in its bin and a spot without counts.

    Constant genes are left out: rounding gives them a variance above 0 in scanpy, while ours is NaN.
    """
    counts = levelled_counts(50, seed, 120)
    counts = counts[:, counts.var(axis=0) > 0]
    counts[7] = 0
    expected = _by_scanpy(counts)["dispersions_norm"]
    assert (expected == 1).any(), "a gene is alone in its bin"
    found = normalised_dispersion(scipy.sparse.csr_array(counts))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)  # scanpy stores float32


def test_the_union_is_of_scanpys_choices(tmp_path: Path) -> None:
    """The panel is the union of the genes that `n_top_genes` chooses in each section, of those with counts in both."""
    num_genes, each = 120, 25
    names = [f"G{index:03d}" for index in range(num_genes)]
    sections = {name: levelled_counts(40, seed, num_genes) for seed, name in enumerate(("A1", "A2"))}
    manifest = make_table(tmp_path, sections, names)
    common = np.flatnonzero([all(counts[:, gene].any() for counts in sections.values()) for gene in range(num_genes)])
    chosen = [_by_scanpy(counts[:, common], each)["highly_variable"].to_numpy() for counts in sections.values()]
    assert [choice.sum() for choice in chosen] == [each, each]
    union = common[chosen[0] | chosen[1]]
    assert each < len(union) < 2 * each
    config = GenesConfig(panel="hvg_union", num_genes=each)
    assert fit_panel(str(tmp_path), manifest, ["A1", "A2"], config).gene_id == tuple(names[gene] for gene in union)


@pytest.mark.slow
@pytest.mark.skipif("MCLSTEXP_DATA" not in os.environ, reason="MCLSTEXP_DATA names no folder of real data")
def test_dispersion_of_a_real_section_is_scanpys() -> None:
    """Dispersion and the thousand chosen genes agree on a section of HER2+ breast cancer."""
    folder = Path(os.environ["MCLSTEXP_DATA"])
    row = SectionRow(
        section_id="C2",
        patient_id="C",
        image="C2.jpg",
        format="legacy_st",
        expression=str(folder / "her2st/counts/C2.tsv.gz"),
        positions=str(folder / "her2st/spots/C2_selection.tsv"),
    )
    counts = legacy_st.read(row.files, row).spots.counts
    assert counts is not None
    counts = counts[:, counts.sum(axis=0) > 0]
    expected = _by_scanpy(counts.toarray(), 1000)
    found = normalised_dispersion(counts)
    np.testing.assert_allclose(found, expected["dispersions_norm"], rtol=1e-6, atol=1e-6)
    highest = np.sort(np.argsort(-found, kind="stable")[:1000])
    np.testing.assert_array_equal(highest, np.flatnonzero(expected["highly_variable"]))
