"""The fit of pixels over an array: pitch, kind of array, mirror images, and spots that are off."""

import numpy as np
import pytest

from ingest.array_fit import fit_array, on_array
from ingest.readers.spots import Layout


def square(columns=6, rows=5):
    return np.array([(x, y) for x in range(columns) for y in range(rows)], float)


def hexagon(columns=8, rows=8):
    return np.array([(2 * x + y % 2, y) for x in range(columns) for y in range(rows)], float)


def turned(degrees, mirrored=1, shear=0.0):
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return np.diag([mirrored, 1]) @ np.array([[1, 0], [shear, 1]]) @ turn


def visium(pitch_px=100.0, array_xy=None, **turn):
    """A layout of Visium's array on an image."""
    array_xy = hexagon() if array_xy is None else array_xy
    steps = np.array([0.5, np.sqrt(3) / 2]) * pitch_px
    return Layout(array_xy, array_xy * steps @ turned(**({"degrees": 3} | turn)) + [700, 500])


@pytest.mark.parametrize("mirrored", [1, -1])
@pytest.mark.parametrize("degrees", [0, 2, 90, 211])
@pytest.mark.parametrize("shear", [0, 0.03])
def test_pitch_of_a_turned_or_mirrored_array(degrees, mirrored, shear):
    fit = fit_array(Layout(square(), square() @ turned(degrees, mirrored, shear) * 290 + [5000, 700]))
    assert fit.pitch_px == pytest.approx(290)
    assert (fit.is_mirrored, fit.is_hexagonal, fit.is_exchanged) == (mirrored < 0, False, False)
    fit = fit_array(visium(137.5, degrees=degrees, mirrored=mirrored, shear=shear))
    assert fit.pitch_px == pytest.approx(137.5)
    assert (fit.is_mirrored, fit.is_hexagonal, fit.is_exchanged) == (mirrored < 0, True, False)


def test_pitch_of_a_chequerboard():
    """Arrays of 2,000 spots are chequerboards: neighbours are a diagonal apart, and the array is no hexagon."""
    array_xy = square(12, 6)[square(12, 6).sum(axis=1) % 2 == 0]
    fit = fit_array(Layout(array_xy, array_xy * 176.9))
    assert fit.pitch_px == pytest.approx(176.9 * np.sqrt(2))
    assert not fit.is_hexagonal


def test_arrays_that_say_nothing():
    line = np.array([(x, 0) for x in range(30)], float)
    assert fit_array(Layout(line, line * 290)) is None
    assert fit_array(Layout(square()[:15], square()[:15] * 290)) is None
    assert fit_array(Layout(np.full((30, 2), np.nan), square() * 290)) is None
    assert fit_array(Layout()) is None
    nearly = np.zeros((2000, 2))
    nearly[:3] = [(1, 2), (3, 4), (5, 1)]
    assert fit_array(Layout(nearly, np.random.default_rng(0).random((2000, 2)))) is None


@pytest.mark.odd
@pytest.mark.parametrize("share", [0.02, 0.1, 0.2])
@pytest.mark.parametrize("what", ["pixels at 0, 0", "pixels anywhere", "array anywhere", "array far away"])
def test_wrong_spots_do_not_move_the_fit_and_are_off(what, share):
    rng, right = np.random.default_rng(0), visium()
    wrong = rng.choice(64, max(1, int(share * 64)), replace=False)
    array_xy, xy_px = right.array_xy.copy(), right.xy_px.copy()
    if what.startswith("pixels"):
        xy_px[wrong] = 0 if what.endswith("0, 0") else rng.uniform(-1e5, 1e5, (len(wrong), 2))
    else:
        array_xy[wrong] += rng.integers(3, 60_000 if what.endswith("far away") else 60, (len(wrong), 2))
    fit = fit_array(Layout(array_xy, xy_px))
    assert fit.pitch_px == pytest.approx(100, rel=1e-6)
    assert fit.is_hexagonal
    assert np.flatnonzero(fit.off(array_xy, xy_px)).tolist() == sorted(wrong.tolist())
    assert fit.explains(array_xy, xy_px)


@pytest.mark.odd
@pytest.mark.parametrize("array_xy", [hexagon(4, 4), hexagon(), square(), square(20, 20)])
@pytest.mark.parametrize("how", ["shuffled", "sorted by x", "reversed by row", "one line", "one place"])
def test_positions_that_do_not_follow_the_array(array_xy, how):
    right = visium(array_xy=array_xy)
    xy_px = {
        "shuffled": np.random.default_rng(0).permutation(right.xy_px),
        "sorted by x": np.sort(right.xy_px, axis=0),
        "reversed by row": right.xy_px[np.lexsort((-array_xy[:, 0] * (array_xy[:, 1] % 3), array_xy[:, 1] % 2))],
        "one line": right.xy_px[:, [0, 0]],
        "one place": np.full_like(right.xy_px, 300.0),
    }[how]
    assert not fit_array(Layout(array_xy, xy_px)).explains(array_xy, xy_px)
    assert fit_array(right).explains(*on_array(right))


def test_measured_positions_follow_the_array():
    """Legacy positions were measured: they are off by a fifth of the pitch, not more."""
    noise = np.random.default_rng(0).normal(0, 0.08, (30, 2))
    layout = Layout(square(), (square() + noise) * 290)
    fit = fit_array(layout)
    assert fit.pitch_px == pytest.approx(290, rel=0.02)
    assert not fit.off(*on_array(layout)).any()
    assert not fit.off(np.full((3, 2), np.nan), layout.xy_px[:3]).any(), "spots without array position are not judged"
    least_squares = np.linalg.lstsq(square() - square().mean(axis=0), layout.xy_px - layout.xy_px.mean(axis=0))[0]
    np.testing.assert_allclose(fit.px_per_step, least_squares, rtol=1e-9)


@pytest.mark.odd
@pytest.mark.parametrize("degrees", [0, 90, 187])
def test_rows_and_columns_of_a_hexagon_that_are_exchanged(degrees):
    layout = visium(degrees=degrees)
    fit = fit_array(Layout(layout.array_xy[:, ::-1], layout.xy_px))
    assert (fit.is_hexagonal, fit.is_exchanged, fit.is_mirrored) == (False, True, True)
    assert fit.pitch_px == pytest.approx(100)
    both = fit_array(Layout(layout.array_xy[:, ::-1], layout.xy_px[:, ::-1]))
    assert (both.is_hexagonal, both.is_exchanged, both.is_mirrored) == (False, True, False)
