"""Spatial domains: scores against hand-written formulas, and a section whose domains are known."""

import os
import random
from collections import Counter
from math import comb, log
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ingest.readers import legacy_st
from mclstexp.data.sheet import SectionRow
from mclstexp.errors import SourceError
from mclstexp.evaluation import domains
from mclstexp.evaluation.domains import MEASURED, NO_DOMAIN, SMOOTHED

SIDE = 18
PITCH_UM = 200.0


def _square(side: int = SIDE, stretch: float = 1.0) -> np.ndarray:
    rows, columns = np.indices((side, side)).reshape(2, -1)
    return np.stack([columns * PITCH_UM * stretch, rows * PITCH_UM], axis=1)


def _hexagonal(side: int = SIDE) -> np.ndarray:
    rows, columns = np.indices((side, side)).reshape(2, -1)
    return np.stack([(columns + rows % 2 / 2) * PITCH_UM, rows * PITCH_UM * np.sqrt(3) / 2], axis=1)


def _section(noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates, labels and expression of three bands, each with a program of its own over 40 genes."""
    rng = np.random.default_rng(0)
    xy_um = _square()
    band = (xy_um[:, 1] // (6 * PITCH_UM)).astype(int)
    expression = rng.normal(size=(3, 40))[band] + noise * rng.normal(size=(len(xy_um), 40))
    return xy_um, np.array(["fat", "immune infiltrate", "cancer"], object)[band], expression.astype(np.float32)


def _pair_ari(labels: np.ndarray, found: np.ndarray) -> float:
    both, rows, columns = (
        sum(comb(count, 2) for count in Counter(each).values())
        for each in (list(zip(labels, found, strict=True)), labels, found)
    )
    chance = rows * columns / comb(len(labels), 2)
    return (both - chance) / ((rows + columns) / 2 - chance)


def _entropy(values: list) -> float:
    return -sum(count / len(values) * log(count / len(values)) for count in Counter(values).values())


@pytest.mark.parametrize("num", [2, 5, 9])
def test_agreement_equals_pair_counts_and_entropies(num: int) -> None:
    rng = np.random.default_rng(num)
    labels = rng.integers(num, size=200)
    found = np.where(rng.random(200) < 0.6, labels, rng.integers(num, size=200))
    score = domains.agreement(labels.astype(str), found)
    one, other, both = _entropy(list(labels)), _entropy(list(found)), _entropy(list(zip(labels, found, strict=True)))
    assert score.ari == pytest.approx(_pair_ari(labels, found))
    assert score.nmi == pytest.approx((one + other - both) / ((one + other) / 2))
    assert score.clusters == num


def test_agreement_knows_neither_names_nor_numbers() -> None:
    rng = np.random.default_rng(0)
    labels, found = rng.integers(4, size=100), rng.integers(4, size=100)
    names = np.array(["d", "a", "c", "b"])
    assert domains.agreement(names[labels], rng.permutation(4)[found]) == domains.agreement(labels, found)


def test_both_ways_find_known_domains_and_unlabelled_spots_are_dropped_and_counted() -> None:
    xy_um, labels, expression = _section(noise=0.3)
    labels[[0, 50, 200, 300]] = [None, "Undetermined", " ", float("nan")]
    noise = np.random.default_rng(1).normal(size=expression.shape)
    result = domains.compare_domains(labels, xy_um, expression, {"model": 2 * expression + 1, "noise": noise})
    table = result.table.set_index("method")
    assert list(table.index) == [MEASURED, SMOOTHED, "model", "noise"]
    scores = ["kmeans_ari", "kmeans_nmi", "leiden_ari", "leiden_nmi"]
    np.testing.assert_allclose(table.loc[[MEASURED, "model"], scores], 1.0)
    assert (table.loc["noise", scores] < 0.05).all()
    assert (table["kmeans_clusters"] == 3).all()
    assert (table.loc[[MEASURED, "model", "noise"], "leiden_clusters"] == 3).all()
    assert (table[["num_labels", "spots_used", "spots_dropped"]] == [3, SIDE**2 - 4, 4]).all(axis=None)
    for found in (result.domains[MEASURED].kmeans, result.domains[MEASURED].leiden):
        assert np.flatnonzero(found == NO_DOMAIN).tolist() == [0, 50, 200, 300]
        assert set(found) == {NO_DOMAIN, 0, 1, 2}


@pytest.mark.parametrize("missing", ["NA", "na", " NA ", "NaN", "<NA>", "", None, np.nan])
def test_what_r_and_pandas_write_for_no_label_is_none(missing: object) -> None:
    assert domains.is_labelled(["cancer", missing, "nasal mucosa"]).tolist() == [True, False, True]


def test_domains_are_those_of_the_labelled_spots_after_smoothing_over_all() -> None:
    xy_um, labels, expression = _section(noise=2.0)
    used = np.random.default_rng(2).random(len(xy_um)) < 0.5
    result = domains.compare_domains(np.where(used, labels, None), xy_um, expression, {})
    smooth = domains.neighbourhoods(xy_um).mean(expression)
    for method, values in {MEASURED: expression, SMOOTHED: smooth}.items():
        expected = domains.find_domains(values[used], 3)
        np.testing.assert_array_equal(result.domains[method].kmeans[used], expected.kmeans)
        np.testing.assert_array_equal(result.domains[method].leiden[used], expected.leiden)


def test_smoothing_alone_raises_the_agreement() -> None:
    xy_um, labels, expression = _section(noise=2.5)
    table = domains.compare_domains(labels, xy_um, expression, {}).table.set_index("method")
    gain = table.loc[SMOOTHED] - table.loc[MEASURED]
    assert gain["kmeans_ari"] > 0.2
    assert gain["leiden_ari"] > 0.2


def test_fewer_than_two_labels_are_refused() -> None:
    xy_um, _, expression = _section(noise=0.1)
    labels = ["cancer"] * 10 + ["undetermined"] * (len(xy_um) - 10)
    with pytest.raises(SourceError, match=f"10 of {SIDE**2} spots have a label, 1 different"):
        domains.compare_domains(labels, xy_um, expression, {})


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_a_constant_prediction_has_one_domain(value: float) -> None:
    xy_um, labels, expression = _section(noise=0.3)
    constant = np.full_like(expression, value)
    row = domains.compare_domains(labels, xy_um, expression, {"train mean": constant}).table.iloc[2]
    assert (row["kmeans_clusters"], row["leiden_clusters"]) == (1, 1)
    assert (row["kmeans_ari"], row["leiden_nmi"]) == (0.0, 0.0)


def test_fewer_different_spots_than_domains_pass_without_a_warning() -> None:
    kind = np.arange(60) % 2
    found = domains.find_domains(np.eye(2)[kind], 4)
    for each in (found.kmeans, found.leiden):
        assert len(set(each[kind == 0]) & set(each[kind == 1])) == 0
        assert len(set(each)) <= 4


def test_principal_components_equal_a_singular_value_decomposition() -> None:
    rng = np.random.default_rng(0)
    expression = (rng.normal(size=(80, 30)) * np.linspace(1, 5, 30)).astype(np.float32)
    centred = expression.astype(np.float64) - expression.mean(axis=0, dtype=np.float64)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    expected = left[:, :9] * size[:9]
    with_constant = np.insert(expression, 4, np.float32(0.1), axis=1)
    for values in (expression, with_constant):
        found = domains.principal_components(values)
        np.testing.assert_allclose(found * np.sign((found * expected).sum(axis=0)), expected, atol=1e-9)
    assert domains.principal_components(expression[:, :4]).shape == (80, 4)


@pytest.mark.parametrize(("xy_um", "around"), [(_square(), 8), (_square(stretch=1.12), 8), (_hexagonal(), 6)])
def test_smoothing_is_the_mean_over_the_first_ring(xy_um: np.ndarray, around: int) -> None:
    expression = np.random.default_rng(0).normal(size=(len(xy_um), 3)).astype(np.float32)
    smooth = domains.neighbourhoods(xy_um)
    inner = 5 * SIDE + 7
    nearest = np.argsort(np.linalg.norm(xy_um - xy_um[inner], axis=1), kind="stable")[: around + 1]
    result = smooth.mean(expression)
    np.testing.assert_allclose(result[inner], expression[nearest].astype(np.float64).mean(axis=0))
    assert smooth.radius == pytest.approx(1.57 * domains.spot_pitch(xy_um))
    assert around - 1.5 < smooth.num_neighbours < around
    if around == 8:
        corner = expression[[0, 1, SIDE, SIDE + 1]].astype(np.float64)
        np.testing.assert_allclose(result[0], corner.mean(axis=0))


@pytest.mark.parametrize("num_domains", [2, 3, 6, 12])
def test_leiden_finds_the_given_number_of_domains(num_domains: int) -> None:
    components = np.random.default_rng(0).normal(size=(300, 4))
    random.seed(7)
    state = random.getstate()
    found = domains.leiden_domains(components, num_domains)
    assert set(found) == set(range(num_domains))
    assert random.getstate() == state
    np.testing.assert_array_equal(domains.leiden_domains(components, num_domains), found)


def test_leiden_takes_the_nearest_number_where_the_graph_falls_into_more_parts() -> None:
    rng = np.random.default_rng(0)
    part = np.repeat(np.arange(4), 40)
    components = 100.0 * np.eye(4)[part] + rng.normal(size=(160, 4))
    found = domains.leiden_domains(components, 2)
    assert domains.agreement(part, found) == domains.Agreement(ari=1.0, nmi=1.0, clusters=4)


def test_a_section_of_a_few_spots_passes() -> None:
    xy_um, _, expression = _section(noise=0.3)
    table = domains.compare_domains(["a", "b", "a"], xy_um[:3], expression[:3], {}).table
    assert table["spots_used"].tolist() == [3, 3]


@pytest.mark.parametrize("num_spots", [0, 1])
def test_a_spot_without_neighbours_has_a_pitch_and_only_itself_around(num_spots: int) -> None:
    assert domains.spot_pitch(_square()[:num_spots]) == domains.NO_PITCH > 0
    assert domains.spot_pitch(_square(2)[:2]) == PITCH_UM
    if num_spots:
        smooth = domains.neighbourhoods(_square()[:1])
        assert smooth.num_neighbours == 0
        np.testing.assert_array_equal(smooth.mean(np.array([[3.0, 4.0]])), [[3.0, 4.0]])


@pytest.mark.skipif("MCLSTEXP_DATA" not in os.environ, reason="MCLSTEXP_DATA names no folder of real data")
def test_section_a1_against_its_pathologist() -> None:
    folder = Path(os.environ["MCLSTEXP_DATA"]) / "her2st"
    paths = {"expression": folder / "counts" / "A1.tsv.gz", "positions": folder / "spots" / "A1_lowres_selection.tsv"}
    files = {part: str(path) for part, path in paths.items()}
    row = SectionRow(section_id="A1", patient_id="A", image="A1.jpg", format="legacy_st", **files)
    section = legacy_st.read(row.files, row)
    table = pd.read_csv(folder / "labels" / "A1_labeled_coordinates.tsv", sep="\t")
    named = {f"{round(x)}x{round(y)}": label for x, y, label in zip(table.x, table.y, table.label, strict=True)}
    labels = [named.get(spot_id) for spot_id in section.spots.spot_id]
    assert sum(label is not None for label in labels) == 346
    xy_um = 3.4 * np.stack([section.spots.x_px, section.spots.y_px], axis=1)
    panel = set((folder / "panel_785.txt").read_text().split())
    counts = section.spots.counts.toarray().astype(np.float64)
    expression = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    result = domains.compare_domains(labels, xy_um, expression[:, [gene.symbol in panel for gene in section.genes]], {})
    print(result.table.to_string(), f"radius {result.smoothing_radius_um:.0f} um", result.smoothing_neighbours)
    scores = result.table.set_index("method")
    assert (scores[["num_labels", "spots_used", "spots_dropped"]] == [5, 341, 5]).all(axis=None)
    assert (scores[["kmeans_clusters", "leiden_clusters"]] == 5).all(axis=None)
    assert scores.loc[MEASURED, "kmeans_ari"] == pytest.approx(0.220, abs=0.02)
    assert scores.loc[SMOOTHED, "kmeans_ari"] == pytest.approx(0.270, abs=0.02)
    assert scores.loc[MEASURED, "kmeans_nmi"] == pytest.approx(0.292, abs=0.02)
    assert scores.filter(like="leiden_", axis=1).map(np.isfinite).all(axis=None)
