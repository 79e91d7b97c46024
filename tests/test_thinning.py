"""Thinned targets: which depths, what they mean, and that they do not depend on the order of sections."""

from dataclasses import replace

import numpy as np
import pytest

from mclstexp.data.genes import Normaliser
from mclstexp.data.measured import MeasuredSection
from mclstexp.model.thinning import shares_of, thinned, thinned_target

TARGET = Normaliser("per_spot_all", 1e4, "e")


def _section(depth: int, name: str = "a", num_spots: int = 400) -> MeasuredSection:
    """Spots with the same shares of three panel genes; half of the counts are of other genes."""
    rng = np.random.default_rng(depth)
    shares = np.array([0.3, 0.19, 0.01, 0.5])
    counts = rng.multinomial(depth, shares, size=num_spots)
    spots = np.arange(num_spots)
    xy = np.zeros((num_spots, 2))
    return MeasuredSection(name, "P", spots, xy, xy, spots, counts[:, :3].astype(np.float32), counts.sum(axis=1))


@pytest.mark.parametrize(("median", "expected"), [(900, [1]), (3_400, [1, 0.3]), (40_000, [1, 0.3, 0.1, 0.03])])
def test_shallow_sections_stay_as_they_are(median: int, expected: list[float]) -> None:
    assert shares_of(np.array([median - 100, median, median + 100])) == expected


def test_each_depth_is_a_binomial_share_of_panel_and_other_counts() -> None:
    section = _section(40_000)
    depths = thinned(section, TARGET)
    np.testing.assert_array_equal(depths[0], section.expression(TARGET))
    for share, expression in zip((0.3, 0.1, 0.03), depths[1:], strict=True):
        kept = np.expm1(expression) / 1e4  # shares of the thinned total
        np.testing.assert_allclose(kept.mean(axis=0), [0.3, 0.19, 0.01], rtol=0.03)
        expected = np.sqrt(0.3 * 0.7 / (40_000 * share))
        np.testing.assert_allclose(kept[:, 0].std(), expected, rtol=0.15)


def test_a_rare_gene_is_lower_at_lower_depth_as_in_a_shallow_section() -> None:
    deep, shallow = _section(40_000), _section(1_200)
    depths = thinned(deep, TARGET)
    rare = [expression[:, 2].mean() for expression in depths]
    assert rare[-1] < rare[0] - 0.03
    np.testing.assert_allclose(rare[-1], shallow.expression(TARGET)[:, 2].mean(), rtol=0.05)


def test_the_target_is_half_plain_and_half_the_mean_over_depths() -> None:
    section = _section(40_000)
    depths = thinned(section, TARGET)
    expected = 0.5 * depths[0] + 0.5 * np.mean(depths, axis=0)
    np.testing.assert_allclose(thinned_target(section, TARGET), expected, rtol=1e-6)


def test_draws_depend_on_the_name_alone() -> None:
    section = _section(40_000)
    np.testing.assert_array_equal(thinned_target(section, TARGET), thinned_target(section, TARGET))
    assert (thinned_target(section, TARGET) != thinned_target(replace(section, section_id="b"), TARGET)).any()


def test_unmeasured_genes_stay_unknown() -> None:
    section = replace(_section(40_000), unmeasured=np.array([1]))
    target = thinned_target(section, TARGET)
    assert np.isnan(target[:, 1]).all()
    assert np.isfinite(target[:, [0, 2]]).all()
