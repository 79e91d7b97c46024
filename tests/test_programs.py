"""Program scores, loadings and decoding, against plain linear algebra."""

import numpy as np
import pytest

from mclstexp.model.programs import centred_within, fit_programs


@pytest.fixture
def centred() -> tuple[np.ndarray, np.ndarray]:
    """Expression of two sections within their means, (60, 12), with three strong directions, and its sections."""
    rng = np.random.default_rng(0)
    section = np.repeat(np.array(["a", "b"], object), [25, 35])
    values = rng.normal(size=(60, 3)) @ rng.normal(size=(3, 12)) + 0.1 * rng.normal(size=(60, 12))
    return centred_within(values + 5, section), section


def test_sections_are_centred_on_their_own() -> None:
    section = np.array(["a", "b", "a", "b"], object)
    values = np.array([[1.0], [10.0], [3.0], [30.0]])
    np.testing.assert_array_equal(centred_within(values, section), [[-1], [-10], [1], [10]])


def test_loadings_are_the_leading_singular_vectors(centred: tuple[np.ndarray, np.ndarray]) -> None:
    values, _ = centred
    programs = fit_programs(values, 3)
    expected = np.linalg.svd(values, full_matrices=False)[2][:3].T
    expected = expected * np.sign((expected * programs.loadings).sum(axis=0))
    np.testing.assert_allclose(programs.loadings, expected, atol=1e-10)
    np.testing.assert_allclose(programs.scores(values), values @ expected, atol=1e-10)
    np.testing.assert_allclose(programs.expression(programs.scores(values)), values @ expected @ expected.T, atol=1e-10)


def test_signs_do_not_depend_on_the_order_of_spots(centred: tuple[np.ndarray, np.ndarray]) -> None:
    values, _ = centred
    one, other = fit_programs(values, 3).loadings, fit_programs(values[::-1], 3).loadings
    np.testing.assert_allclose(one, other, atol=1e-9)
    assert (one[np.abs(one).argmax(axis=0), range(3)] > 0).all()


def test_few_spots_or_genes_give_fewer_programs() -> None:
    rng = np.random.default_rng(0)
    assert fit_programs(rng.normal(size=(5, 40))).loadings.shape == (40, 4)
    assert fit_programs(rng.normal(size=(50, 3))).loadings.shape == (3, 3)


def test_a_gene_that_a_section_lacks_is_decoded_from_the_others(centred: tuple[np.ndarray, np.ndarray]) -> None:
    values, section = centred
    whole = values.copy()
    values[section == "b", 7] = np.nan
    programs = fit_programs(values, 3)
    assert not programs.loadings[7].any()
    decoded = programs.expression(programs.scores(values))
    assert np.corrcoef(decoded[section == "b", 7], whole[section == "b", 7])[0, 1] > 0.95
    others = np.delete(whole, 7, axis=1)
    np.testing.assert_allclose(np.delete(programs.loadings, 7, axis=0), fit_programs(others, 3).loadings, atol=1e-9)
