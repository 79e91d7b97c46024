"""Means over neighbours, against a dense matrix of weights."""

import numpy as np

from mclstexp.model import neighbours
from mclstexp.model.neighbours import neighbour_means, pitch_um


def test_means_are_weighted_by_distance_without_the_tile_itself() -> None:
    rng = np.random.default_rng(0)
    xy, values = rng.uniform(0, 1000, (200, 2)), rng.normal(size=(200, 5))
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    weight = np.exp(-0.5 * (distance / 80) ** 2) * (distance > 1) * (distance <= 320)
    found, has_any = neighbour_means(values, xy, 80)
    assert has_any.all()
    np.testing.assert_allclose(found, weight @ values / weight.sum(axis=1, keepdims=True), atol=1e-12)


def test_a_lone_tile_has_no_neighbours() -> None:
    xy = np.array([[0.0, 0.0], [10_000.0, 0.0], [10_000.0, 50.0], [0.5, 0.0]])  # the last is at the first one's place
    found, has_any = neighbour_means(np.ones((4, 2)), xy, 100)
    np.testing.assert_array_equal(has_any, [False, True, True, False])
    np.testing.assert_array_equal(found[[0, 3]], 0)
    assert neighbour_means(np.zeros((0, 2)), np.zeros((0, 2)), 100)[0].shape == (0, 2)


def test_the_same_bytes_however_many_tiles_at_once(monkeypatch: object) -> None:
    rng = np.random.default_rng(0)
    xy, values = rng.uniform(0, 3000, (500, 2)), rng.normal(size=(500, 16)).astype(np.float32)
    whole = neighbour_means(values, xy, 150)[0]
    monkeypatch.setattr(neighbours, "_AT_ONCE", 7)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(neighbour_means(values, xy, 150)[0], whole)


def test_the_pitch_is_the_median_distance_to_the_next_spot() -> None:
    grid = np.stack(np.meshgrid(np.arange(5) * 200.0, np.arange(4) * 200.0), axis=-1).reshape(-1, 2)
    assert pitch_um([grid, grid[:1]]) == 200
